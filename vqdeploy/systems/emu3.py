"""Emu3's vision tokenizer. Its own prior is a language model; a MaskGIT can be trained on its codes."""

import dataclasses

from vqdeploy.models.emu3 import Emu3, Emu3Config
from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.systems import tiny
from vqdeploy.systems.losses import masked_loss
from vqdeploy.systems.movq import make_prior, stages
from vqdeploy.systems.system import Definition, MaskedSampling, SystemConfig

_PRESETS = [
    SystemConfig(
        "emu3",
        "tiny",
        Emu3Config(dataclasses.replace(tiny.CONV, latent_channels=4), 128, 4, temporal_blocks=1),
        MaskGITConfig((8, 8, 1), 128, width=128, layers=6, heads=4, classes=10),
        tiny.LABELS,
        MaskedSampling(steps=8, guidance_scale=2.0),
    ),
    SystemConfig("emu3", "vision", Emu3Config(), sampling=MaskedSampling()),
]

SYSTEM = Definition(
    name="emu3",
    kind="masked",
    tokenizer=Emu3,
    tokenizer_config=Emu3Config,
    prior=make_prior,
    prior_config=MaskGITConfig,
    sampling=MaskedSampling,
    loss=masked_loss,
    stages=stages,
    presets={config.preset: config for config in _PRESETS},
    recipes={"tiny": tiny.RECIPE},
)
