"""LlamaGen: a VQGAN with unit codebook vectors, and a Llama decoder."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from vqdeploy.models.conv import ConvConfig
from vqdeploy.models.llamagen import LlamaGen, LlamaGenConfig
from vqdeploy.models.movq import MoVQ, MoVQConfig
from vqdeploy.systems import emoji, tiny
from vqdeploy.systems.losses import next_code_loss
from vqdeploy.systems.system import Definition, GuidedSampling, SystemConfig

if TYPE_CHECKING:
    from vqdeploy.export.stage import Stage


@dataclass(frozen=True)
class LlamaGenSampling(GuidedSampling):
    """Default options; codes after position `guidance_interval` + 1 are drawn without guidance, -1 guides all."""

    guidance_interval: int = -1


_preset = partial(SystemConfig, "llamagen")
_tokenizer = partial(MoVQConfig, code_dim=8, groups=1, modulation=False, metric="cosine")


def published_tokenizer(resolution: int, multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)) -> MoVQConfig:
    """VQ-16 of FoundationVision/LlamaGen, or VQ-8; attention follows the blocks of the last level at every size."""
    conv = ConvConfig(resolution, 128, multipliers, attention_resolutions=(resolution >> len(multipliers) - 1,))
    return _tokenizer(conv, 16384)


def _published(name: str, side: int, *shape: int, scale: float, top_k: int = 0, text: bool = False) -> SystemConfig:
    """A prior of width, layers, heads and width of the MLP, for images of a side."""
    condition = {"classes": 1, "condition_length": 120, "text_width": 2048} if text else {}
    prior = LlamaGenConfig((side // 16, side // 16, 1), 16384, *shape, **condition)
    return _preset(name, published_tokenizer(side), prior, sampling=LlamaGenSampling(top_k=top_k, guidance_scale=scale))


_B, _L = (768, 12, 12, 2048), (1024, 24, 16, 2816)
_XL, _XXL, _3B = (1280, 36, 20, 3584), (1536, 48, 24, 4096), (3200, 24, 32, 8704)

# Sizes and guidance scales of FoundationVision/LlamaGen.
_PRESETS = [
    _preset(
        "tiny",
        _tokenizer(tiny.CONV, codebook_size=256),
        LlamaGenConfig((8, 8, 1), 256, width=128, layers=6, heads=4, mlp_width=384, classes=10),
        tiny.LABELS,
        LlamaGenSampling(guidance_scale=3.0),
    ),
    _preset(
        "emoji",
        _tokenizer(dataclasses.replace(emoji.CONV, channel_multipliers=(1, 2, 4)), codebook_size=512),
        LlamaGenConfig((16, 16, 1), 512, width=160, layers=4, heads=4, mlp_width=320, classes=10),
        emoji.LABELS,
        LlamaGenSampling(top_p=0.95, guidance_scale=2.0),
    ),
    _published("bench", 256, *_B, scale=2.0),
    _published("b-256", 256, *_B, scale=2.0),
    _published("b-384", 384, *_B, scale=2.0),
    _published("l-256", 256, *_L, scale=2.0),
    _published("l-384", 384, *_L, scale=2.0),
    _published("xl-384", 384, *_XL, scale=1.75),
    _published("xxl-384", 384, *_XXL, scale=1.75),
    _published("3b-384", 384, *_3B, scale=1.65),
    _published("text-xl-256", 256, *_XL, scale=7.5, top_k=1000, text=True),
    _published("text-xl-512", 512, *_XL, scale=7.5, top_k=1000, text=True),
    _preset("vq-16", published_tokenizer(256), sampling=LlamaGenSampling()),
    _preset("vq-8", published_tokenizer(256, (1, 2, 2, 4)), sampling=LlamaGenSampling()),
]


def _make_prior(config: LlamaGenConfig, tokenizer: nn.Module) -> LlamaGen:
    return LlamaGen(config)


def _stages(prior: LlamaGen, floats: str) -> "list[Stage]":
    from vqdeploy.export import llamagen

    return llamagen.stages(prior)


SYSTEM = Definition(
    name="llamagen",
    kind="autoregressive",
    tokenizer=MoVQ,
    tokenizer_config=MoVQConfig,
    prior=_make_prior,
    prior_config=LlamaGenConfig,
    sampling=LlamaGenSampling,
    loss=next_code_loss,
    stages=_stages,
    presets={config.preset: config for config in _PRESETS},
    recipes={
        "tiny": dataclasses.replace(tiny.RECIPE, prior_learning_rate=1e-3),
        "emoji": dataclasses.replace(emoji.RECIPE, steps=2000, prior_steps=4000, prior_learning_rate=1e-3),
    },
)
