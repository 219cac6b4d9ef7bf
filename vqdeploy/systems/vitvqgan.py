"""ViT-VQGAN with a GPT, VIM in its paper."""

import dataclasses
from functools import partial

from vqdeploy.models.gpt import GPTConfig
from vqdeploy.models.vitvqgan import ViTConfig, ViTVQGAN, ViTVQGANConfig
from vqdeploy.systems import tiny
from vqdeploy.systems.losses import next_code_loss
from vqdeploy.systems.system import Definition, GuidedSampling, SystemConfig
from vqdeploy.systems.vqgan import make_prior, stages

_preset = partial(SystemConfig, "vitvqgan", sampling=GuidedSampling())

_BASE = ViTConfig(768, 12, 12, 3072)
_BASE_VIT = ViTVQGANConfig(encoder=_BASE, decoder=_BASE)
_LARGE_VIT = ViTVQGANConfig(decoder=ViTConfig(1280, 32, 16, 5120))
_TINY = ViTConfig(128, 3, 2, 512)

# Tokenizers of thuanz123/enhancing-transformers; priors of the ViT-VQGAN paper, in the layout of a plain GPT.
_PRESETS = [
    _preset(
        "tiny",
        ViTVQGANConfig(32, 4, _TINY, _TINY, codebook_size=256, code_dim=16),
        tiny.GPT,
        tiny.LABELS,
        sampling=GuidedSampling(guidance_scale=2.0),
    ),
    _preset("bench", ViTVQGANConfig(), GPTConfig()),
    _preset("small", ViTVQGANConfig()),
    _preset("base", _BASE_VIT),
    _preset("large", _LARGE_VIT),
    _preset("vim-base", _BASE_VIT, GPTConfig(width=1536, layers=24, heads=16)),
    _preset("vim-large", _LARGE_VIT, GPTConfig(width=2048, layers=36, heads=32)),
]


SYSTEM = Definition(
    name="vitvqgan",
    kind="autoregressive",
    tokenizer=ViTVQGAN,
    tokenizer_config=ViTVQGANConfig,
    prior=make_prior,
    prior_config=GPTConfig,
    sampling=GuidedSampling,
    loss=next_code_loss,
    stages=stages,
    presets={config.preset: config for config in _PRESETS},
    recipes={"tiny": dataclasses.replace(tiny.RECIPE, steps=1000, learning_rate=1e-3, prior_learning_rate=1e-3)},
)
