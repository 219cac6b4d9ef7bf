"""The convolutional encoder and decoder that VQGAN introduced and RQ-VAE and MoVQ keep.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (CVPR 2021). Parameter names follow the public
checkpoints, so that their weights fit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.config import Config
from vqdeploy.models.modules import Modules


@dataclass(frozen=True)
class ConvConfig(Config):
    """Shape of the encoder and of its mirror, the decoder.

    `attention_resolutions` are sizes of the feature map at which each residual block is followed by attention.
    They are counted from `resolution`, whatever size the network later runs at. `middle_attention` is the attention
    between the two residual blocks of the lowest resolution.
    """

    resolution: int = 256
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    latent_channels: int = 256
    norm_groups: int = 32
    middle_attention: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the full resolution down."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def grid(self) -> int:
        """Side of the latent map."""
        return self.resolution >> (len(self.channel_multipliers) - 1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm, which has no use for a condition."""

    def __init__(self, groups: int, channels: int):
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return super().forward(x)


class SpatialNorm(nn.Module):
    """GroupNorm, scaled and shifted at each place by a map of code vectors.

    Zheng et al., "MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation" (NeurIPS 2022), section 3.2.
    A 1x1 convolution and an enlargement by nearest neighbour can change places, so the convolutions run on the small
    map.
    """

    def __init__(self, groups: int, condition_channels: int, channels: int):
        super().__init__()
        self.norm_layer = GroupNorm(groups, channels)
        self.conv_y = nn.Conv2d(condition_channels, channels, 1)
        self.conv_b = nn.Conv2d(condition_channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = (F.interpolate(conv(condition), x.shape[-2:]) for conv in (self.conv_y, self.conv_b))
        normal: Tensor = self.norm_layer(x)
        return normal * scale + shift


Norm = Callable[[int], GroupNorm | SpatialNorm]
"""Makes the norm of a number of channels; both are called with a map and a condition."""


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions behind a norm and SiLU, and a skip connection."""

    def __init__(self, inputs: int, outputs: int, norm: Norm):
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut: nn.Module = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x, condition)))
        h = self.conv2(F.silu(self.norm2(h, condition)))
        shortcut: Tensor = self.nin_shortcut(x)
        return shortcut + h


class AttentionBlock(nn.Module):
    """Attention with one head over all positions of the map."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        n = self.norm(x, condition)
        q, k, v = self.q(n).flatten(2), self.k(n).flatten(2), self.v(n).flatten(2)  # [B, C, H*W]
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        mixed: Tensor = self.proj_out((v @ weights.transpose(1, 2)).view_as(x))
        return x + mixed


class Downsample(nn.Module):
    """Halves the map. It is padded on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        half: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return half


class Upsample(nn.Module):
    """Doubles the map by nearest neighbour, then convolves."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        double: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return double


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the configuration asks for it."""

    downsample: nn.Module  # behind a level of the encoder
    upsample: nn.Module  # behind a level of the decoder

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, norm: Norm):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(inputs if i == 0 else outputs, outputs, norm) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs, norm) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x, condition)
            if self.attn:
                x = self.attn[i](x, condition)
        return x


class Middle(nn.Module):
    """Residual block, attention if the configuration asks for it, residual block, at the lowest resolution."""

    def __init__(self, channels: int, attention: bool, norm: Norm):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, norm)
        if attention:
            self.attn_1 = AttentionBlock(channels, norm)
        self.block_2 = ResnetBlock(channels, channels, norm)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        for layer in self.children():
            x = layer(x, condition)
        return x


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> latent [B, latent_channels, H / f, W / f]."""

    def __init__(self, config: ConvConfig):
        super().__init__()
        widths, norm = config.widths, partial(GroupNorm, config.norm_groups)
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down: Modules[Level] = Modules()
        for i, width in enumerate(widths):
            attention = config.resolution >> i in config.attention_resolutions
            level = Level(widths[i - 1] if i else config.channels, width, config.res_blocks, attention, norm)
            level.downsample = Downsample(width) if i < len(widths) - 1 else nn.Identity()
            self.down.append(level)
        self.mid = Middle(widths[-1], config.middle_attention, norm)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level.downsample(level(x))
        latent: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return latent


class Decoder(nn.Module):
    """Latent [B, latent_channels, h, w] -> image [B, 3, h * f, w * f]. `up[i]` is the level of `Encoder.down[i]`.

    With `condition_channels` every norm is a `SpatialNorm`, and the call takes a map [B, condition_channels, h, w] too.
    """

    def __init__(self, config: ConvConfig, condition_channels: int = 0):
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        norm: Norm = (
            partial(SpatialNorm, groups, condition_channels) if condition_channels else partial(GroupNorm, groups)
        )
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.middle_attention, norm)
        self.up: Modules[Level] = Modules()
        for i, width in enumerate(widths):
            attention = config.resolution >> i in config.attention_resolutions
            level = Level(widths[min(i + 1, len(widths) - 1)], width, config.res_blocks + 1, attention, norm)
            level.upsample = Upsample(width) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.mid(self.conv_in(z), condition)
        for level in reversed(self.up):
            x = level.upsample(level(x, condition))
        image: Tensor = self.conv_out(F.silu(self.norm_out(x, condition)))
        return image
