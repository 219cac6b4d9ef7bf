"""Named configurations: `tiny`, `bench` and the published ones."""

from vqdeploy.errors import VqdeployError
from vqdeploy.models.conv import ConvConfig
from vqdeploy.models.gpt import GPTConfig
from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.models.movq import MoVQConfig
from vqdeploy.models.pixelsnail import PixelSNAILConfig, VQVAE2PriorConfig
from vqdeploy.models.rqtransformer import RQTransformerConfig
from vqdeploy.models.rqvae import RQVAEConfig
from vqdeploy.models.vitvqgan import ViTConfig, ViTVQGANConfig
from vqdeploy.models.vqvae2 import VQVAE2Config
from vqdeploy.systems.system import GuidedSampling, MaskedSampling, Sampling, SystemConfig, architecture

_F32 = ConvConfig(channel_multipliers=(1, 1, 2, 2, 4, 4), attention_resolutions=(8,))
_IMAGENET = RQVAEConfig(conv=_F32)
_FFHQ = RQVAEConfig(
    conv=ConvConfig(channel_multipliers=(1, 1, 2, 2, 4, 4), attention_resolutions=(16,)), codebook_size=2048
)
_IMAGENET_SAMPLING = Sampling(top_p=0.92)
_UNCONDITIONAL_SAMPLING = Sampling(top_k=250)


def _rqvae(
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


_TINY_CONV = ConvConfig(
    resolution=32,
    channels=32,
    channel_multipliers=(1, 1, 1),
    res_blocks=1,
    attention_resolutions=(),
    latent_channels=32,
    norm_groups=8,
)
_TINY_TOKENIZER = RQVAEConfig(conv=_TINY_CONV, codebook_size=256, code_dim=32)
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

# Sizes and sampling options of kakaobrain/rq-vae-transformer, its configuration files and model cards.
_RQVAE = [
    _rqvae("tiny", _TINY_TOKENIZER, _TINY_PRIOR, Sampling(top_p=0.95), labels=tuple("0123456789")),
    _rqvae("bench", _IMAGENET, _prior(512, 24, 4)),
    _rqvae("ffhq-350m", _FFHQ, _prior(1024, 24, 4, classes=1, codes=2048), _UNCONDITIONAL_SAMPLING),
    _rqvae("church-350m", _IMAGENET, _prior(1024, 24, 4, classes=1), _UNCONDITIONAL_SAMPLING),
    _rqvae("cat-600m", _IMAGENET, _prior(1280, 26, 4, classes=1), _UNCONDITIONAL_SAMPLING),
    _rqvae("bedroom-600m", _IMAGENET, _prior(1280, 26, 4, classes=1), _UNCONDITIONAL_SAMPLING),
    _rqvae("imagenet-480m", _IMAGENET, _prior(1536, 12, 4), _IMAGENET_SAMPLING),
    _rqvae("imagenet-800m", _IMAGENET, _prior(1536, 24, 4), _IMAGENET_SAMPLING),
    _rqvae("imagenet-1400m", _IMAGENET, _prior(1536, 42, 6), _IMAGENET_SAMPLING),
    _rqvae("imagenet-3800m", _IMAGENET, _prior(2560, 42, 6), _IMAGENET_SAMPLING),
    _rqvae("cc3m-650m", _IMAGENET, _prior(1280, 26, 4, classes=16384, condition_length=32), Sampling(top_p=0.7)),
    _rqvae("f16", RQVAEConfig(conv=ConvConfig()), None),
    _rqvae("f8", RQVAEConfig(conv=ConvConfig(channel_multipliers=(1, 2, 2, 4), attention_resolutions=(32,))), None),
]


def _movq(
    preset: str,
    tokenizer: MoVQConfig,
    prior: MaskGITConfig | None = None,
    sampling: MaskedSampling = MaskedSampling(),
    labels: tuple[str, ...] = (),
) -> SystemConfig:
    return SystemConfig("movq", preset, tokenizer, prior, labels, sampling)


def _published_movq(channels: int = 128, res_blocks: int = 2) -> MoVQConfig:
    conv = ConvConfig(256, channels, (1, 2, 2, 4), res_blocks, attention_resolutions=(32,), latent_channels=4)
    return MoVQConfig(conv, codebook_size=16384, code_dim=4, groups=1)


def _vqgan(codebook_size: int) -> MoVQConfig:
    return MoVQConfig(codebook_size=codebook_size, groups=1, modulation=False)


_HALTON = MaskGITConfig((24, 24, 1), 16384, width=1024, layers=24, heads=16, adaptive=True)
_LLAMAGEN = MoVQConfig(
    ConvConfig(384, attention_resolutions=(24,)), 16384, 8, groups=1, modulation=False, metric="cosine"
)

# Sizes of ai-forever/MoVQGAN, CompVis/taming-transformers, valeoai/Halton-MaskGIT with the tokenizer of
# FoundationVision/LlamaGen, and of the MoVQ paper as far as it gives them.
_MOVQ = [
    _movq(
        "tiny",
        MoVQConfig(_TINY_CONV, codebook_size=128, code_dim=32),
        MaskGITConfig((8, 8, 4), 128, width=128, layers=6, heads=4, classes=10),
        MaskedSampling(steps=8, guidance_scale=2.0),
        labels=tuple("0123456789"),
    ),
    _movq("bench", MoVQConfig(), MaskGITConfig()),
    _movq("paper", MoVQConfig(), MaskGITConfig(width=1024, layers=24, heads=16)),
    _movq("67m", _published_movq()),
    _movq("102m", _published_movq(res_blocks=4)),
    _movq("270m", _published_movq(channels=256)),
    _movq("vqgan-f16-1024", _vqgan(1024)),
    _movq("vqgan-f16-16384", _vqgan(16384)),
    _movq("halton-large", _LLAMAGEN, _HALTON, MaskedSampling(steps=32, schedule="halton", guidance_scale=3.0)),
]


def _gpt(
    model: str,
    preset: str,
    tokenizer: ViTVQGANConfig | MoVQConfig,
    prior: GPTConfig | None = None,
    sampling: GuidedSampling = GuidedSampling(),
    labels: tuple[str, ...] = (),
) -> SystemConfig:
    return SystemConfig(model, preset, tokenizer, prior, labels, sampling)


_BASE = ViTConfig(768, 12, 12, 3072)
_BASE_VIT = ViTVQGANConfig(encoder=_BASE, decoder=_BASE)
_LARGE_VIT = ViTVQGANConfig(decoder=ViTConfig(1280, 32, 16, 5120))
_TINY_VIT = ViTConfig(128, 3, 2, 512)
_TINY_GPT = GPTConfig((8, 8, 1), 256, width=128, layers=6, heads=4, classes=10)
_DIGITS = tuple("0123456789")

# Tokenizers of thuanz123/enhancing-transformers; priors of the ViT-VQGAN paper, in the layout of a plain GPT.
_VITVQGAN = [
    _gpt(
        "vitvqgan",
        "tiny",
        ViTVQGANConfig(32, 4, _TINY_VIT, _TINY_VIT, codebook_size=256, code_dim=16),
        _TINY_GPT,
        GuidedSampling(guidance_scale=2.0),
        _DIGITS,
    ),
    _gpt("vitvqgan", "bench", ViTVQGANConfig(), GPTConfig()),
    _gpt("vitvqgan", "small", ViTVQGANConfig()),
    _gpt("vitvqgan", "base", _BASE_VIT),
    _gpt("vitvqgan", "large", _LARGE_VIT),
    _gpt("vitvqgan", "vim-base", _BASE_VIT, GPTConfig(width=1536, layers=24, heads=16)),
    _gpt("vitvqgan", "vim-large", _LARGE_VIT, GPTConfig(width=2048, layers=36, heads=32)),
]

# Sizes of CompVis/taming-transformers.
_VQGAN = [
    _gpt(
        "vqgan",
        "tiny",
        MoVQConfig(_TINY_CONV, codebook_size=256, code_dim=32, groups=1, modulation=False),
        _TINY_GPT,
        GuidedSampling(guidance_scale=2.0),
        _DIGITS,
    ),
    _gpt("vqgan", "faces", _vqgan(1024), GPTConfig((16, 16, 1), 1024, width=1024, layers=24, heads=16, classes=1)),
    _gpt("vqgan", "imagenet", _vqgan(16384), GPTConfig((16, 16, 1), 16384, width=1536, layers=48, heads=24)),
]


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
_VQVAE2 = [
    SystemConfig(
        "vqvae2",
        "tiny",
        VQVAE2Config(32, channels=64, res_channels=32, codebook_size=128, code_dim=32),
        VQVAE2PriorConfig((_tiny_pixelsnail(4, True), _tiny_pixelsnail(8, False)), 128, classes=10),
        _DIGITS,
        Sampling(top_p=0.95),
    ),
    SystemConfig("vqvae2", "bench", VQVAE2Config(), VQVAE2PriorConfig()),
    SystemConfig("vqvae2", "ffhq", VQVAE2Config(), VQVAE2PriorConfig(classes=1)),
]

PRESETS: dict[str, dict[str, SystemConfig]] = {
    model: {config.preset: config for config in configs}
    for model, configs in (
        ("rqvae", _RQVAE),
        ("movq", _MOVQ),
        ("vitvqgan", _VITVQGAN),
        ("vqgan", _VQGAN),
        ("vqvae2", _VQVAE2),
    )
}


def preset(model: str, name: str) -> SystemConfig:
    """The configuration of a preset.

    Raises:
        VqdeployError: There is no such model or preset.
    """
    architecture(model)
    if name not in PRESETS[model]:
        raise VqdeployError(
            f"{model} has no preset {name!r}", expected=" or ".join(PRESETS[model]), fix="vqdeploy models"
        )
    return PRESETS[model][name]
