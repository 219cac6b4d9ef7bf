"""MoVQ with MaskGIT."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from vqdeploy.models.adaptive_maskgit import AdaptiveMaskGIT
from vqdeploy.models.bert_maskgit import BertMaskGIT
from vqdeploy.models.class_last_maskgit import ClassLastMaskGIT
from vqdeploy.models.conv import ConvConfig
from vqdeploy.models.maskgit import MaskGIT, MaskGITConfig
from vqdeploy.models.movq import MoVQ, MoVQConfig
from vqdeploy.systems import emoji, tiny
from vqdeploy.systems.llamagen import published_tokenizer
from vqdeploy.systems.losses import masked_loss
from vqdeploy.systems.system import Definition, MaskedSampling, SystemConfig
from vqdeploy.systems.vqgan import published_vqgan

if TYPE_CHECKING:
    from vqdeploy.export.maskgit import MaskedPrior
    from vqdeploy.export.stage import Stage

_preset = partial(SystemConfig, "movq", sampling=MaskedSampling())


def _published(channels: int = 128, res_blocks: int = 2) -> MoVQConfig:
    conv = ConvConfig(256, channels, (1, 2, 2, 4), res_blocks, attention_resolutions=(32,), latent_channels=4)
    return MoVQConfig(conv, codebook_size=16384, code_dim=4, groups=1)


_HALTON = MaskGITConfig((24, 24, 1), 16384, width=1024, layers=24, heads=16, network="adaptive")

# Sizes of ai-forever/MoVQGAN, CompVis/taming-transformers, valeoai/Halton-MaskGIT with the tokenizer of
# FoundationVision/LlamaGen, and of the MoVQ paper as far as it gives them.
_PRESETS = [
    _preset(
        "tiny",
        MoVQConfig(tiny.CONV, codebook_size=128, code_dim=32),
        MaskGITConfig((8, 8, 4), 128, width=128, layers=6, heads=4, classes=10),
        tiny.LABELS,
        sampling=MaskedSampling(steps=8, guidance_scale=2.0),
    ),
    _preset(
        "emoji",
        MoVQConfig(emoji.CONV, codebook_size=512, code_dim=32),
        MaskGITConfig((8, 8, 4), 512, width=160, layers=5, heads=4, classes=10),
        emoji.LABELS,
        sampling=MaskedSampling(steps=12, guidance_scale=2.0),
    ),
    _preset("bench", MoVQConfig(), MaskGITConfig()),
    _preset("paper", MoVQConfig(), MaskGITConfig(width=1024, layers=24, heads=16)),
    _preset("67m", _published()),
    _preset("102m", _published(res_blocks=4)),
    _preset("270m", _published(channels=256)),
    _preset("vqgan-f16-1024", published_vqgan(1024)),
    _preset("vqgan-f16-16384", published_vqgan(16384)),
    _preset(
        "halton-large",
        published_tokenizer(384),
        _HALTON,
        sampling=MaskedSampling(steps=32, schedule="halton", guidance_scale=3.0),
    ),
]


_NETWORKS: dict[str, type[nn.Module]] = {
    "plain": MaskGIT,
    "adaptive": AdaptiveMaskGIT,
    "class-last": ClassLastMaskGIT,
    "bert": BertMaskGIT,
}


def make_prior(config: MaskGITConfig, tokenizer: nn.Module) -> nn.Module:
    """The masked prior of a configuration.

    Raises:
        ValueError: There is no such network, or its sizes do not fit.
    """
    if config.network not in _NETWORKS:
        raise ValueError(f"there is no network {config.network!r}")
    return _NETWORKS[config.network](config)


def stages(prior: "MaskedPrior", floats: str) -> "list[Stage]":
    """The stages of a masked prior."""
    from vqdeploy.export import maskgit

    return maskgit.stages(prior)


SYSTEM = Definition(
    name="movq",
    kind="masked",
    tokenizer=MoVQ,
    tokenizer_config=MoVQConfig,
    prior=make_prior,
    prior_config=MaskGITConfig,
    sampling=MaskedSampling,
    loss=masked_loss,
    stages=stages,
    presets={config.preset: config for config in _PRESETS},
    recipes={
        "tiny": dataclasses.replace(tiny.RECIPE, prior_steps=3000, prior_learning_rate=1e-3),
        "emoji": emoji.RECIPE,
    },
)
