"""Systems: the definition behind a value of `--model`, its configurations, and the networks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vqdeploy.config import Config, parse
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.systems.recipe import Recipe


@dataclass(frozen=True)
class Sampling(Config):
    """Default sampling options. `top_k` 0 keeps every code."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class GuidedSampling(Sampling):
    """Default options of a prior with classifier-free guidance. A `guidance_scale` of 1 is no guidance."""

    guidance_scale: float = 1.0


@dataclass(frozen=True)
class MaskedSampling(GuidedSampling):
    """Default options of parallel decoding; see `vqdeploy.runtime.masked`."""

    steps: int = 12
    schedule: str = "cosine"
    choice_temperature: float = 4.5


@dataclass(frozen=True)
class NextScaleSampling(GuidedSampling):
    """Default options of next-scale sampling, whose guidance rises from 1 at the first scale to `guidance_scale`.

    With `more_smooth` 1, code vectors are blended instead of drawn.
    """

    more_smooth: int = 0


@dataclass(frozen=True)
class SystemConfig(Config):
    """The content of `config.json`.

    `prior` is None for a tokenizer alone. `source` is the format of the public checkpoint that it was imported from.
    """

    model: str
    preset: str
    tokenizer: Any
    prior: Any = None
    labels: tuple[str, ...] = ()
    sampling: Any = Sampling()
    source: str | None = None

    @classmethod
    def from_dict(cls, data: object) -> "SystemConfig":
        """Builds the configuration, nested ones by the classes of its system.

        Raises:
            ArtifactError: The system is unknown, or a field is malformed.
        """
        if not isinstance(data, dict) or data.get("model") not in list(SYSTEMS):
            found = data.get("model") if isinstance(data, dict) else data
            raise ArtifactError("the configuration names no known model", expected=sorted(SYSTEMS), found=found)
        definition, prior = SYSTEMS[data["model"]], data.get("prior")
        tokenizer = parse(definition.tokenizer_config, data.get("tokenizer"), f"{cls.__name__}.tokenizer")
        prior = None if prior is None else parse(definition.prior_config, prior, f"{cls.__name__}.prior")
        sampling = parse(definition.sampling, data.get("sampling", {}), f"{cls.__name__}.sampling")
        return super().from_dict({**data, "tokenizer": tokenizer, "prior": prior, "sampling": sampling})


class System(nn.Module):
    """Tokenizer and prior of a configuration; `prior` may be None."""

    tokenizer: Any
    prior: Any

    def __init__(self, config: SystemConfig):
        super().__init__()
        definition = SYSTEMS[config.model]
        self.config = config
        self.tokenizer = definition.tokenizer(config.tokenizer)
        self.prior = definition.prior(config.prior, self.tokenizer) if config.prior else None


Loss = Callable[[System, Tensor, Tensor, Recipe, bool], Tensor]
"""(System, images float [B, 3, H, W] in its pixel range or their codes int64, labels [B], recipe, whether training) ->
scalar loss."""


@dataclass(frozen=True)
class Definition:
    """All that is specific to one system.

    Attributes:
        name: The value of `--model`.
        kind: Kind of its sampler, a key of `vqdeploy.runtime.pipeline.SAMPLERS`.
        tokenizer: Makes the tokenizer from its configuration.
        tokenizer_config: Class of that configuration.
        prior: Makes the prior from its configuration and the tokenizer.
        prior_config: Class of that configuration.
        sampling: Its sampling options with their defaults.
        loss: Training loss of the prior.
        stages: Returns the `vqdeploy.export.stage.Stage`s of a prior whose floats are `fp32` or `fp16`; those of the
            tokenizer are common to all systems. It must import the exporter inside.
        presets: Named configurations: `tiny`, `bench` and the published ones.
        recipes: Training recipes of presets that differ from the defaults of `Recipe`.
    """

    name: str
    kind: str
    tokenizer: Callable[[Any], nn.Module]
    tokenizer_config: type[Config]
    prior: Callable[[Any, Any], nn.Module]
    prior_config: type[Config]
    sampling: type[Sampling]
    loss: Loss
    stages: Callable[[Any, str], list[Any]]
    presets: dict[str, SystemConfig] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)

    def recipe(self, preset: str) -> Recipe:
        """The training recipe of a preset."""
        return self.recipes.get(preset, Recipe())


SYSTEMS: dict[str, Definition] = {}
"""Value of `--model` -> definition."""


def definition(model: str) -> Definition:
    """The definition of a system.

    Raises:
        VqdeployError: There is no such system.
    """
    if model not in SYSTEMS:
        raise VqdeployError(
            f"there is no model {model!r}", expected=" or ".join(sorted(SYSTEMS)), fix="vqdeploy models"
        )
    return SYSTEMS[model]


def preset(model: str, name: str) -> SystemConfig:
    """The configuration of a preset.

    Raises:
        VqdeployError: There is no such model or preset.
    """
    presets = definition(model).presets
    if name not in presets:
        raise VqdeployError(f"{model} has no preset {name!r}", expected=" or ".join(presets), fix="vqdeploy models")
    return presets[name]


def create(config: SystemConfig, seed: int = 0) -> System:
    """A system with random weights, determined by the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return System(config).eval()
