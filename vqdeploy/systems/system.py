"""A system: a tokenizer and, once it is trained, a prior."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from vqdeploy.config import Config
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.models.adaptive_maskgit import AdaptiveMaskGIT
from vqdeploy.models.gpt import GPT, GPTConfig
from vqdeploy.models.maskgit import MaskGIT, MaskGITConfig
from vqdeploy.models.movq import MoVQ, MoVQConfig
from vqdeploy.models.pixelsnail import VQVAE2Prior, VQVAE2PriorConfig
from vqdeploy.models.rqtransformer import RQTransformer, RQTransformerConfig
from vqdeploy.models.rqvae import RQVAE, RQVAEConfig
from vqdeploy.models.vitvqgan import ViTVQGAN, ViTVQGANConfig
from vqdeploy.models.vqvae2 import VQVAE2, VQVAE2Config


@dataclass(frozen=True)
class Sampling(Config):
    """Default sampling options. `top_k` 0 keeps every code."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class GuidedSampling(Sampling):
    """Default options of a prior that was trained without labels too. A `guidance_scale` of 1 is no guidance."""

    guidance_scale: float = 1.0


@dataclass(frozen=True)
class MaskedSampling(GuidedSampling):
    """Default options of parallel decoding; see `vqdeploy.runtime.masked`."""

    steps: int = 12
    schedule: str = "cosine"
    choice_temperature: float = 4.5


class Architecture(NamedTuple):
    """What is behind one value of `--model`. `prior` makes a prior of its configuration and the tokenizer."""

    tokenizer: type[nn.Module]
    tokenizer_config: type[Config]
    prior: Callable[[Any, Any], nn.Module]
    prior_config: type[Config]
    sampling: type[Sampling]


def _rqtransformer(config: RQTransformerConfig, tokenizer: RQVAE) -> nn.Module:
    return RQTransformer(config, tokenizer.quantizer.codebook)


def _maskgit(config: MaskGITConfig, tokenizer: nn.Module) -> nn.Module:
    return AdaptiveMaskGIT(config) if config.adaptive else MaskGIT(config)


def _gpt(config: GPTConfig, tokenizer: nn.Module) -> nn.Module:
    return GPT(config)


def _vqvae2(config: VQVAE2PriorConfig, tokenizer: nn.Module) -> nn.Module:
    return VQVAE2Prior(config)


ARCHITECTURES = {
    "rqvae": Architecture(RQVAE, RQVAEConfig, _rqtransformer, RQTransformerConfig, Sampling),
    "movq": Architecture(MoVQ, MoVQConfig, _maskgit, MaskGITConfig, MaskedSampling),
    "vitvqgan": Architecture(ViTVQGAN, ViTVQGANConfig, _gpt, GPTConfig, GuidedSampling),
    "vqgan": Architecture(MoVQ, MoVQConfig, _gpt, GPTConfig, GuidedSampling),
    "vqvae2": Architecture(VQVAE2, VQVAE2Config, _vqvae2, VQVAE2PriorConfig, Sampling),
}


@dataclass(frozen=True)
class SystemConfig(Config):
    """Everything that `config.json` holds. `prior` is None for a tokenizer alone."""

    model: str
    preset: str
    tokenizer: Any
    prior: Any = None
    labels: tuple[str, ...] = ()
    sampling: Any = Sampling()

    @classmethod
    def from_dict(cls, data: Any) -> "SystemConfig":
        if not isinstance(data, dict) or data.get("model") not in list(ARCHITECTURES):
            found = data.get("model") if isinstance(data, dict) else data
            raise ArtifactError("the configuration names no known model", expected=sorted(ARCHITECTURES), found=found)
        parts, prior = ARCHITECTURES[data["model"]], data.get("prior")
        tokenizer = parts.tokenizer_config.from_dict(data.get("tokenizer"))
        prior = prior if prior is None else parts.prior_config.from_dict(prior)
        sampling = parts.sampling.from_dict(data.get("sampling", {}))
        return super().from_dict({**data, "tokenizer": tokenizer, "prior": prior, "sampling": sampling})


class System(nn.Module):
    """Tokenizer and prior of one configuration; `prior` is None when there is none."""

    tokenizer: Any
    prior: Any

    def __init__(self, config: SystemConfig):
        super().__init__()
        parts = ARCHITECTURES[config.model]
        self.config = config
        self.tokenizer = parts.tokenizer(config.tokenizer)
        self.prior = parts.prior(config.prior, self.tokenizer) if config.prior else None


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
