"""RQ-VAE with the RQ-Transformer."""

import dataclasses
from typing import TYPE_CHECKING

from vqdeploy.models.conv import ConvConfig
from vqdeploy.models.rqtransformer import RQTransformer, RQTransformerConfig
from vqdeploy.models.rqvae import RQVAE, RQVAEConfig
from vqdeploy.systems import emoji, tiny
from vqdeploy.systems.losses import soft_target_loss
from vqdeploy.systems.system import Definition, Sampling, SystemConfig

if TYPE_CHECKING:
    from vqdeploy.export.stage import Stage

_F32 = ConvConfig(channel_multipliers=(1, 1, 2, 2, 4, 4), attention_resolutions=(8,))
_IMAGENET = RQVAEConfig(conv=_F32)
_FFHQ = RQVAEConfig(
    conv=ConvConfig(channel_multipliers=(1, 1, 2, 2, 4, 4), attention_resolutions=(16,)), codebook_size=2048
)
_IMAGENET_SAMPLING = Sampling(top_p=0.92)
_UNCONDITIONAL_SAMPLING = Sampling(top_k=250)


def _preset(
    preset: str,
    tokenizer: RQVAEConfig,
    prior: RQTransformerConfig | None,
    sampling: Sampling = Sampling(),
    labels: tuple[str, ...] = (),
) -> SystemConfig:
    return SystemConfig("rqvae", preset, tokenizer, prior, labels, sampling)


def _prior(
    width: int, body: int, head: int, classes: int = 1000, codes: int = 16384, condition_length: int = 1
) -> RQTransformerConfig:
    return RQTransformerConfig(
        codebook_size=codes,
        width=width,
        body_layers=body,
        head_layers=head,
        heads=width // 64,
        classes=classes,
        condition_length=condition_length,
    )


_TINY_TOKENIZER = RQVAEConfig(conv=tiny.CONV, codebook_size=256, code_dim=32)
_TINY_PRIOR = RQTransformerConfig(
    grid=(8, 8, 4),
    codebook_size=256,
    code_dim=32,
    width=128,
    body_layers=4,
    head_layers=1,
    heads=4,
    classes=10,
    dropout=0.0,
)

# Sizes and sampling options from the configuration files and model cards of kakaobrain/rq-vae-transformer.
_PRESETS = [
    _preset("tiny", _TINY_TOKENIZER, _TINY_PRIOR, Sampling(top_p=0.95), labels=tiny.LABELS),
    _preset(
        "emoji",
        RQVAEConfig(conv=emoji.CONV, codebook_size=512, code_dim=32),
        dataclasses.replace(_TINY_PRIOR, codebook_size=512, width=160),
        Sampling(top_p=0.8),
        labels=emoji.LABELS,
    ),
    _preset("bench", _IMAGENET, _prior(512, 24, 4)),
    _preset("ffhq-350m", _FFHQ, _prior(1024, 24, 4, classes=1, codes=2048), _UNCONDITIONAL_SAMPLING),
    _preset("church-350m", _IMAGENET, _prior(1024, 24, 4, classes=1), _UNCONDITIONAL_SAMPLING),
    _preset("cat-600m", _IMAGENET, _prior(1280, 26, 4, classes=1), _UNCONDITIONAL_SAMPLING),
    _preset("bedroom-600m", _IMAGENET, _prior(1280, 26, 4, classes=1), _UNCONDITIONAL_SAMPLING),
    _preset("imagenet-480m", _IMAGENET, _prior(1536, 12, 4), _IMAGENET_SAMPLING),
    _preset("imagenet-800m", _IMAGENET, _prior(1536, 24, 4), _IMAGENET_SAMPLING),
    _preset("imagenet-1400m", _IMAGENET, _prior(1536, 42, 6), _IMAGENET_SAMPLING),
    _preset("imagenet-3800m", _IMAGENET, _prior(2560, 42, 6), _IMAGENET_SAMPLING),
    _preset("cc3m-650m", _IMAGENET, _prior(1280, 26, 4, classes=16384, condition_length=32), Sampling(top_p=0.7)),
    _preset("f16", RQVAEConfig(conv=ConvConfig()), None),
    _preset("f8", RQVAEConfig(conv=ConvConfig(channel_multipliers=(1, 2, 2, 4), attention_resolutions=(32,))), None),
]


def _make_prior(config: RQTransformerConfig, tokenizer: RQVAE) -> RQTransformer:
    return RQTransformer(config, tokenizer.quantizer.codebook)


def _stages(prior: RQTransformer, floats: str) -> "list[Stage]":
    from vqdeploy.export import rqtransformer

    return rqtransformer.stages(prior)


SYSTEM = Definition(
    name="rqvae",
    kind="autoregressive",
    tokenizer=RQVAE,
    tokenizer_config=RQVAEConfig,
    prior=_make_prior,
    prior_config=RQTransformerConfig,
    sampling=Sampling,
    loss=soft_target_loss,
    stages=_stages,
    presets={config.preset: config for config in _PRESETS},
    recipes={"tiny": tiny.RECIPE, "emoji": dataclasses.replace(emoji.RECIPE, prior_steps=7000)},
)
