"""RQ-VAE: a convolutional autoencoder whose latent vectors are each a sum of Q vectors of one codebook.

Lee et al., "Autoregressive Image Generation using Residual Quantization" (CVPR 2022), section 3.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqdeploy.config import Config
from vqdeploy.models.conv import ConvConfig, Decoder, Encoder
from vqdeploy.models.quantizers import ResidualQuantizer
from vqdeploy.models.tokenizer import ConvTokenizer


@dataclass(frozen=True)
class RQVAEConfig(Config):
    """`depth` is the number of codes per position, `pixel_range` the range of the images inside the model."""

    conv: ConvConfig = ConvConfig(channel_multipliers=(1, 1, 2, 2, 4, 4), attention_resolutions=(8,))
    codebook_size: int = 16384
    code_dim: int = 256
    depth: int = 4
    decay: float = 0.99
    commitment_weight: float = 0.25
    pixel_range: tuple[float, ...] = (-1.0, 1.0)

    @property
    def resolution(self) -> int:
        """Side of the image in pixels."""
        return self.conv.resolution

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image."""
        return (self.conv.grid, self.conv.grid, self.depth)


class RQVAE(ConvTokenizer):
    """The tokenizer. Images are float [B, 3, H, W] in `pixel_range`, codes int64 [B, h, w, Q]."""

    omits_depths = True
    any_size = True

    config: RQVAEConfig
    quantizer: ResidualQuantizer

    def __init__(self, config: RQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.conv)
        self.decoder = Decoder(config.conv)
        self.quant_conv = nn.Conv2d(config.conv.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.conv.latent_channels, 1)
        self.quantizer = ResidualQuantizer(config.codebook_size, config.code_dim, config.depth, config.decay)

    @torch.no_grad()
    def soft_codes(self, x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> drawn codes int64 [B, h, w, Q], and their distributions [B, h, w, Q, K].

        See `ResidualQuantizer.soft_codes`.
        """
        return self.quantizer.soft_codes(self.latents(x), temperature)
