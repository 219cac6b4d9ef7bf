"""Small systems with random weights."""

from collections.abc import Callable
from dataclasses import replace

import torch

from vqdeploy.models.conv import ConvConfig
from vqdeploy.models.gpt import GPTConfig
from vqdeploy.models.llamagen import LlamaGenConfig
from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.models.movq import MoVQConfig
from vqdeploy.models.pixelsnail import PixelSNAILConfig, VQVAE2PriorConfig
from vqdeploy.models.quantizers import AveragedCodebook
from vqdeploy.models.rqtransformer import RQTransformerConfig
from vqdeploy.models.rqvae import RQVAEConfig
from vqdeploy.models.var import VARConfig
from vqdeploy.models.var_tokenizer import MultiScaleConfig
from vqdeploy.models.vitvqgan import ViTConfig, ViTVQGANConfig
from vqdeploy.models.vqvae2 import VQVAE2Config
from vqdeploy.systems import System, SystemConfig, create
from vqdeploy.systems.llamagen import LlamaGenSampling
from vqdeploy.systems.system import GuidedSampling, MaskedSampling, NextScaleSampling, Sampling

CONV = ConvConfig(
    resolution=16,
    channels=16,
    channel_multipliers=(1, 1, 1),
    res_blocks=1,
    attention_resolutions=(),
    latent_channels=16,
    norm_groups=4,
)
SMALL = SystemConfig(
    model="rqvae",
    preset="small",
    tokenizer=RQVAEConfig(conv=CONV, codebook_size=64, code_dim=16),
    prior=RQTransformerConfig(
        grid=(4, 4, 4), codebook_size=64, code_dim=16, width=64, body_layers=2, head_layers=1, heads=4, classes=3
    ),
    labels=("cat", "dog", "eel"),
    sampling=Sampling(temperature=0.9, top_k=40, top_p=0.95),
)
SMALL_TEXT = replace(  # texts longer than the code map, and a vocabulary that is not the codebook
    SMALL,
    tokenizer=replace(SMALL.tokenizer, conv=replace(CONV, channels=8, norm_groups=2), depth=2),
    prior=replace(SMALL.prior, grid=(4, 4, 2), classes=40, condition_length=18),
    labels=(),
)
SMALL_MOVQ = SystemConfig(
    model="movq",
    preset="small",
    tokenizer=MoVQConfig(conv=CONV, codebook_size=32, code_dim=16, groups=4),
    prior=MaskGITConfig(grid=(4, 4, 4), codebook_size=32, width=64, layers=2, heads=4, classes=3, dropout=0.0),
    labels=("cat", "dog", "eel"),
    sampling=MaskedSampling(
        temperature=0.9, top_k=20, top_p=0.95, steps=5, schedule="linear", guidance_scale=1.5, choice_temperature=3.0
    ),
)
SMALL_ADAPTIVE = replace(
    SMALL_MOVQ,
    tokenizer=replace(SMALL_MOVQ.tokenizer, groups=1, metric="cosine", modulation=False),
    prior=replace(SMALL_MOVQ.prior, grid=(4, 4, 1), network="adaptive"),
)


SMALL_VIT = SystemConfig(
    model="vitvqgan",
    preset="small",
    tokenizer=ViTVQGANConfig(16, 4, ViTConfig(32, 1, 2, 64), ViTConfig(32, 2, 1, 64), codebook_size=64, code_dim=8),
    prior=GPTConfig((4, 4, 1), 64, width=64, layers=3, heads=4, classes=3, dropout=0.0),
    labels=("cat", "dog", "eel"),
    sampling=GuidedSampling(temperature=0.9, guidance_scale=1.5),
)
SMALL_VQGAN = SystemConfig(
    model="vqgan",
    preset="small",
    tokenizer=replace(SMALL_ADAPTIVE.tokenizer, metric="l2"),
    prior=replace(SMALL_VIT.prior, codebook_size=32, token_shift=True, squared_relu=True),
    labels=SMALL_VIT.labels,
    sampling=GuidedSampling(),
)

SMALL_LLAMAGEN = SystemConfig(  # heads whose width no attention of ONNX Runtime takes
    model="llamagen",
    preset="small",
    tokenizer=replace(SMALL_ADAPTIVE.tokenizer, code_dim=8),
    prior=LlamaGenConfig((4, 4, 1), 32, width=48, layers=3, heads=4, mlp_width=64, classes=3, dropout=0.0),
    labels=SMALL_VIT.labels,
    sampling=LlamaGenSampling(temperature=0.9, guidance_scale=1.5),
)
SMALL_FEATURES = replace(
    SMALL_LLAMAGEN,
    prior=replace(SMALL_LLAMAGEN.prior, width=32, layers=2, classes=1, condition_length=7, text_width=12),
    labels=(),
)

_SNAIL = PixelSNAILConfig((3, 3), 16, 3, 2, 2, 24, True, 4, 1, 12, 3, 1, dropout=0.0)
SMALL_VQVAE2 = SystemConfig(
    model="vqvae2",
    preset="small",
    tokenizer=VQVAE2Config(24, channels=16, res_blocks=1, res_channels=8, codebook_size=32, code_dim=8),
    prior=VQVAE2PriorConfig((_SNAIL, replace(_SNAIL, grid=(6, 6), kernel=5, attention=False)), 32, classes=3),
    labels=SMALL_VIT.labels,
    sampling=Sampling(temperature=0.9),
)
_THIN = replace(_SNAIL, grid=(2, 2), kernel=5, res_blocks=1, heads=1, out_res_blocks=0, condition_res_blocks=0)
SMALL_THREE = replace(
    SMALL_VQVAE2,
    tokenizer=VQVAE2Config(32, levels=3, channels=8, res_blocks=1, res_channels=8, codebook_size=32, code_dim=8),
    prior=VQVAE2PriorConfig(
        (
            replace(_THIN, channels=32, heads=2),
            replace(_THIN, grid=(4, 4), kernel=3, blocks=1, out_res_blocks=1),
            replace(_THIN, grid=(8, 8), kernel=7, blocks=1, attention=False, condition_res_blocks=1),
        ),
        codebook_size=32,
        classes=1,
    ),
    labels=(),
)

SMALL_VAR = SystemConfig(
    model="var",
    preset="small",
    tokenizer=MultiScaleConfig(CONV, (1, 2, 3, 4), codebook_size=64),
    prior=VARConfig((1, 2, 3, 4), 64, 16, width=64, layers=2, heads=4, classes=3),
    labels=SMALL_VIT.labels,
    sampling=NextScaleSampling(temperature=0.9, top_k=40, guidance_scale=2.5),
)
SMALL_SHARED = replace(
    SMALL_VAR,
    tokenizer=replace(SMALL_VAR.tokenizer, sides=(2, 4)),
    prior=replace(SMALL_VAR.prior, sides=(2, 4), heads=2, shared_modulation=True),
)


def lively(config: SystemConfig, seed: int = 0) -> System:
    """Random weights as large as trained ones, so that what a layer gets wrong is seen in the output."""
    system = create(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in system.tokenizer.modules():
            if isinstance(module, AveragedCodebook):
                module.codebook.normal_(std=0.5, generator=generator)
        for weight in system.prior.parameters() if system.prior else ():
            if weight.ndim > 1:
                inputs = weight[0].numel() if weight.ndim == 4 else weight.shape[-1]
                weight.normal_(std=inputs**-0.5, generator=generator)
        for weight in system.parameters():
            if weight.ndim == 1:  # biases, and the scales of norms
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return system


def lively_vqvae2(config: SystemConfig) -> System:
    """As `lively`, with codebooks that lie among the latents."""
    system, side = lively(config), config.tokenizer.resolution
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in system.tokenizer.parameters():
            if weight.ndim == 4:  # there are no norms that would bring small outputs back to size
                torch.nn.init.kaiming_normal_(weight)
        system.tokenizer.train()(torch.rand(8, 3, side, side) * 2 - 1)
    return system.eval()


SYSTEMS: dict[str, Callable[[], System]] = {
    "rqvae": lambda: lively(SMALL),
    # An RQ-Transformer that is conditioned on texts.
    "text": lambda: lively(SMALL_TEXT),
    "movq": lambda: lively(SMALL_MOVQ),
    # One code a position, an adaptive prior, and the other variants of the tokenizer.
    "adaptive": lambda: lively(SMALL_ADAPTIVE),
    "vit": lambda: lively(SMALL_VIT),
    # A GPT with token shift and squared ReLU.
    "vqgan": lambda: lively(SMALL_VQGAN),
    "llamagen": lambda: lively(SMALL_LLAMAGEN),
    # A prior that is conditioned on features of texts.
    "features": lambda: lively(SMALL_FEATURES),
    # Two levels with networks of different kernels, one with attention of heads that no operator takes.
    "vqvae2": lambda: lively_vqvae2(SMALL_VQVAE2),
    # Three levels without labels, the upper two with attention of a head that ONNX Runtime's operator takes.
    "three": lambda: lively_vqvae2(SMALL_THREE),
    "var": lambda: lively(SMALL_VAR),
    # Two scales, and a modulation that the blocks share.
    "shared": lambda: lively(SMALL_SHARED),
}
