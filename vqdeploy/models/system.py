"""A system: a tokenizer and, once it is trained, a prior."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from vqdeploy.config import Config
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.models.rqtransformer import RQTransformer, RQTransformerConfig
from vqdeploy.models.rqvae import RQVAE, RQVAEConfig


class Architecture(NamedTuple):
    """The classes behind one value of `--model`."""

    tokenizer: type[nn.Module]
    tokenizer_config: type[Config]
    prior: type[nn.Module]
    prior_config: type[Config]


ARCHITECTURES = {"rqvae": Architecture(RQVAE, RQVAEConfig, RQTransformer, RQTransformerConfig)}


@dataclass(frozen=True)
class Sampling(Config):
    """Default sampling options. `top_k` 0 keeps every code."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class SystemConfig(Config):
    """Everything that `config.json` holds. `prior` is None for a tokenizer alone."""

    model: str
    preset: str
    tokenizer: Any
    prior: Any = None
    labels: tuple[str, ...] = ()
    sampling: Sampling = Sampling()

    @classmethod
    def from_dict(cls, data: Any) -> "SystemConfig":
        if not isinstance(data, dict) or data.get("model") not in list(ARCHITECTURES):
            found = data.get("model") if isinstance(data, dict) else data
            raise ArtifactError("the configuration names no known model", expected=sorted(ARCHITECTURES), found=found)
        parts, prior = ARCHITECTURES[data["model"]], data.get("prior")
        tokenizer = parts.tokenizer_config.from_dict(data.get("tokenizer"))
        prior = prior if prior is None else parts.prior_config.from_dict(prior)
        return super().from_dict({**data, "tokenizer": tokenizer, "prior": prior})


class System(nn.Module):
    """Tokenizer and prior of one configuration; `prior` is None when there is none."""

    tokenizer: Any
    prior: Any

    def __init__(self, config: SystemConfig):
        super().__init__()
        parts = ARCHITECTURES[config.model]
        self.config = config
        self.tokenizer = parts.tokenizer(config.tokenizer)
        self.prior = parts.prior(config.prior, self.tokenizer.quantizer.codebook) if config.prior else None


def create(config: SystemConfig, seed: int = 0) -> System:
    """A system with random weights that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return System(config).eval()


def architecture(model: str) -> Architecture:
    """The classes of a model name.

    Raises:
        VqdeployError: There is no such model.
    """
    if model not in ARCHITECTURES:
        raise VqdeployError(
            f"no model is called {model!r}", expected=" or ".join(sorted(ARCHITECTURES)), fix="vqdeploy models"
        )
    return ARCHITECTURES[model]
