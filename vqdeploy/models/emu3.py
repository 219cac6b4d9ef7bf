"""Emu3's vision tokenizer for single images: MoVQGAN, and convolutions over time that reduce to 2-d ones.

BAAI, "Emu3: Next-Token Prediction is All You Need" (2024). The public code repeats an image to a clip of
`temporal_factor` frames, encodes all of them, decodes as many and keeps the first. The convolutions over time are
causal with zero padding, so only their last tap contributes to the first frame, and a still clip is encoded once. What
remains are 2-d convolutions.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.config import Config
from vqdeploy.models.conv import ConvConfig, Decoder, Encoder
from vqdeploy.models.quantizers import MultichannelQuantizer
from vqdeploy.models.tokenizer import ConvTokenizer


@dataclass(frozen=True)
class Emu3Config(Config):
    """Shape of the tokenizer; `temporal_blocks` are the residual blocks over time, `pixel_range` as in `MoVQConfig`."""

    conv: ConvConfig = ConvConfig(512, 256, (1, 2, 2, 4), 2, (64,), 4)
    codebook_size: int = 32768
    code_dim: int = 4
    temporal_factor: int = 4
    temporal_blocks: int = 2
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
        return (self.conv.grid, self.conv.grid, 1)


class Affine(nn.Module):
    """Scale and shift per channel: batch normalization in inference."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class TemporalBlock(nn.Module):
    """A residual block over time, for the first frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = Affine(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = Affine(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        change: Tensor = self.conv2(F.silu(self.norm2(h)))
        return x + change


class TemporalEncoder(nn.Module):
    """The map of a still clip [B, C, h, w], halved in time until one frame is left, then the residual blocks.

    Distinct frames are concatenated as channels: the first convolution makes `temporal_factor` / 2 of one.
    """

    def __init__(self, config: Emu3Config):
        super().__init__()
        channels, frames = config.conv.latent_channels, [1]
        while (left := config.temporal_factor >> len(frames)) > 0:
            frames.append(left)
        self.time_conv = nn.ModuleList(
            nn.Conv2d(channels * inputs, channels * outputs, 3, padding=1) for inputs, outputs in pairwise(frames)
        )
        self.time_res_stack = nn.ModuleList(TemporalBlock(channels) for _ in range(config.temporal_blocks))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.time_conv:
            x = F.silu(conv(x))
        for block in self.time_res_stack:
            x = block(x)
        return x


class TemporalDecoder(nn.Module):
    """The first frame of a clip [B, C, h, w]: the residual blocks, then doubled in time."""

    def __init__(self, config: Emu3Config):
        super().__init__()
        channels = config.conv.latent_channels
        self.time_res_stack = nn.ModuleList(TemporalBlock(channels) for _ in range(config.temporal_blocks))
        self.time_conv = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(config.temporal_factor.bit_length() - 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.time_res_stack:
            x = block(x)
        for conv in self.time_conv:
            x = F.silu(conv(x))
        return x


class Emu3(ConvTokenizer):
    """The tokenizer. Images are float [B, 3, H, W] in `pixel_range`, codes int64 [B, h, w, 1]."""

    config: Emu3Config
    any_size = True

    def __init__(self, config: Emu3Config):
        super().__init__()
        if config.code_dim != config.conv.latent_channels:
            raise ValueError(f"{config.code_dim} channels of codes do not fit {config.conv.latent_channels} of latents")
        self.config = config
        self.encoder, self.temporal_encoder = Encoder(config.conv), TemporalEncoder(config)
        self.decoder, self.temporal_decoder = Decoder(config.conv, config.code_dim), TemporalDecoder(config)
        self.quant_conv = nn.Conv2d(config.conv.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.conv.latent_channels, 1)
        self.quantizer = MultichannelQuantizer(config.codebook_size, config.code_dim, 1, decay=config.decay)

    def latents(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> vectors before quantization [B, h, w, D]."""
        vectors: Tensor = self.quant_conv(self.temporal_encoder(self.encoder(x)))
        return vectors.permute(0, 2, 3, 1)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Vectors [B, h, w, D] -> images [B, 3, H, W].

        The condition of the norms passes through the temporal layers too.
        """
        condition = vectors.permute(0, 3, 1, 2)
        latents, condition = map(self.temporal_decoder, (self.post_quant_conv(condition), condition))
        image: Tensor = self.decoder(latents, condition)
        return image
