"""VQ-VAE-2 with a PixelSNAIL for each level."""

import dataclasses
from typing import TYPE_CHECKING

from vqdeploy.models.pixelsnail import PixelSNAILConfig, VQVAE2Prior, VQVAE2PriorConfig
from vqdeploy.models.vqvae2 import VQVAE2, VQVAE2Config
from vqdeploy.systems import tiny
from vqdeploy.systems.losses import level_loss
from vqdeploy.systems.system import Definition, Sampling, SystemConfig

if TYPE_CHECKING:
    from vqdeploy.export.stage import Stage


def _tiny_pixelsnail(side: int, attention: bool) -> PixelSNAILConfig:
    return PixelSNAILConfig(
        (side, side),
        channels=64,
        kernel=3,
        blocks=2,
        res_blocks=2,
        res_channels=64,
        attention=attention,
        condition_channels=64,
        condition_res_blocks=1,
        dropout=0.0,
    )


# Sizes of rosinality/vq-vae-2-pytorch, which trains without labels.
_PRESETS = [
    SystemConfig(
        "vqvae2",
        "tiny",
        VQVAE2Config(32, channels=64, res_channels=32, codebook_size=128, code_dim=32),
        VQVAE2PriorConfig((_tiny_pixelsnail(4, True), _tiny_pixelsnail(8, False)), 128, classes=10),
        tiny.LABELS,
        Sampling(top_p=0.95),
    ),
    SystemConfig("vqvae2", "bench", VQVAE2Config(), VQVAE2PriorConfig()),
    SystemConfig("vqvae2", "ffhq", VQVAE2Config(), VQVAE2PriorConfig(classes=1)),
]


def _make_prior(config: VQVAE2PriorConfig, tokenizer: VQVAE2) -> VQVAE2Prior:
    return VQVAE2Prior(config)


def _stages(prior: VQVAE2Prior, floats: str) -> "list[Stage]":
    from vqdeploy.export import pixelsnail

    return pixelsnail.stages(prior, floats)


SYSTEM = Definition(
    name="vqvae2",
    kind="hierarchical",
    tokenizer=VQVAE2,
    tokenizer_config=VQVAE2Config,
    prior=_make_prior,
    prior_config=VQVAE2PriorConfig,
    sampling=Sampling,
    loss=level_loss,
    stages=_stages,
    presets={config.preset: config for config in _PRESETS},
    recipes={"tiny": dataclasses.replace(tiny.RECIPE, prior_steps=3000, prior_learning_rate=3e-3)},
)
