"""VQGAN with a GPT."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from vqdeploy.models.gpt import GPT, GPTConfig
from vqdeploy.models.movq import MoVQ, MoVQConfig
from vqdeploy.systems import tiny
from vqdeploy.systems.losses import next_code_loss
from vqdeploy.systems.system import Definition, GuidedSampling, SystemConfig

if TYPE_CHECKING:
    from vqdeploy.export.stage import Stage

_preset = partial(SystemConfig, "vqgan", sampling=GuidedSampling())


def published_vqgan(codebook_size: int) -> MoVQConfig:
    """The tokenizer of CompVis/taming-transformers for images of 256x256, with 16x16 codes."""
    return MoVQConfig(codebook_size=codebook_size, groups=1, modulation=False)


# Sizes of CompVis/taming-transformers.
_PRESETS = [
    _preset(
        "tiny",
        MoVQConfig(tiny.CONV, codebook_size=256, code_dim=32, groups=1, modulation=False),
        tiny.GPT,
        tiny.LABELS,
        sampling=GuidedSampling(guidance_scale=2.0),
    ),
    _preset("faces", published_vqgan(1024), GPTConfig((16, 16, 1), 1024, width=1024, layers=24, heads=16, classes=1)),
    _preset("imagenet", published_vqgan(16384), GPTConfig((16, 16, 1), 16384, width=1536, layers=48, heads=24)),
]


def make_prior(config: GPTConfig, tokenizer: nn.Module) -> GPT:
    """The GPT of a configuration."""
    return GPT(config)


def stages(prior: GPT, floats: str) -> "list[Stage]":
    """The stages of a GPT."""
    from vqdeploy.export import gpt

    return gpt.stages(prior)


SYSTEM = Definition(
    name="vqgan",
    kind="autoregressive",
    tokenizer=MoVQ,
    tokenizer_config=MoVQConfig,
    prior=make_prior,
    prior_config=GPTConfig,
    sampling=GuidedSampling,
    loss=next_code_loss,
    stages=stages,
    presets={config.preset: config for config in _PRESETS},
    recipes={"tiny": dataclasses.replace(tiny.RECIPE, prior_learning_rate=1e-3)},
)
