"""VAR: the multi-scale tokenizer and the transformer that predicts the next scale."""

import dataclasses
from typing import TYPE_CHECKING

from vqdeploy.models.conv import ConvConfig
from vqdeploy.models.var import VAR, VARConfig
from vqdeploy.models.var_tokenizer import MultiScaleConfig, MultiScaleTokenizer
from vqdeploy.systems import emoji, tiny
from vqdeploy.systems.losses import next_code_loss
from vqdeploy.systems.system import Definition, NextScaleSampling, SystemConfig

if TYPE_CHECKING:
    from vqdeploy.export.stage import Stage

_SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
_256 = MultiScaleConfig()
_512 = MultiScaleConfig(
    ConvConfig(512, channels=160, attention_resolutions=(32,), latent_channels=32), sides=_SIDES_512
)
_SAMPLING = NextScaleSampling(top_k=900, top_p=0.96, guidance_scale=2.5)  # of the public figures
_EMOJI_SIDES = (1, 2, 3, 4, 6, 8)
_EMOJI_CONV = dataclasses.replace(emoji.CONV, channel_multipliers=(1, 2, 3, 3))
_TINY_CONV = dataclasses.replace(tiny.CONV, channel_multipliers=(1, 1, 1, 2))


def _published(depth: int) -> SystemConfig:
    prior = VARConfig(width=64 * depth, layers=depth, heads=depth)
    return SystemConfig("var", f"d{depth}", _256, prior, sampling=_SAMPLING)


_D16 = _published(16)
_TINY_PRIOR = VARConfig((1, 2, 3, 4), 256, 32, width=128, layers=3, heads=4, classes=10)

# Sizes of FoundationVision/VAR.
_PRESETS = [
    SystemConfig(
        "var",
        "tiny",
        MultiScaleConfig(_TINY_CONV, _TINY_PRIOR.sides, codebook_size=256),
        _TINY_PRIOR,
        tiny.LABELS,
        NextScaleSampling(top_p=0.95, guidance_scale=2.0),
    ),
    SystemConfig(
        "var",
        "emoji",
        MultiScaleConfig(_EMOJI_CONV, _EMOJI_SIDES, codebook_size=512),
        dataclasses.replace(_TINY_PRIOR, sides=_EMOJI_SIDES, codebook_size=512, layers=5, shared_modulation=True),
        emoji.LABELS,
        NextScaleSampling(top_p=0.95, guidance_scale=2.0),
    ),
    dataclasses.replace(_D16, preset="bench"),
    _D16,
    *(_published(depth) for depth in (20, 24, 30)),
    SystemConfig(
        "var",
        "d36-s",
        _512,
        VARConfig(_SIDES_512, width=64 * 36, layers=36, heads=36, shared_modulation=True),
        sampling=_SAMPLING,
    ),
]


def _make_prior(config: VARConfig, tokenizer: MultiScaleTokenizer) -> VAR:
    return VAR(config, tokenizer.quantizer)


def _stages(prior: VAR, floats: str) -> "list[Stage]":
    from vqdeploy.export import var

    return var.stages(prior)


SYSTEM = Definition(
    name="var",
    kind="next-scale",
    tokenizer=MultiScaleTokenizer,
    tokenizer_config=MultiScaleConfig,
    prior=_make_prior,
    prior_config=VARConfig,
    sampling=NextScaleSampling,
    loss=next_code_loss,
    stages=_stages,
    presets={config.preset: config for config in _PRESETS},
    recipes={
        "tiny": dataclasses.replace(tiny.RECIPE, steps=600, prior_steps=800, prior_learning_rate=1e-3),
        "emoji": dataclasses.replace(emoji.RECIPE, steps=2000, prior_steps=6000, prior_learning_rate=1e-3),
    },
)
