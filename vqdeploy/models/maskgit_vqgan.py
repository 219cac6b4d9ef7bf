"""The tokenizer of MaskGIT: VQGAN without attention, with average pooling instead of strided convolutions.

Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022), as in google-research/maskgit. A residual
block that changes the width has its shortcut after the convolutions, not from its input. Parameter names follow the
PyTorch port of open-muse.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.config import Config
from vqdeploy.models.conv import GroupNorm
from vqdeploy.models.quantizers import MultichannelQuantizer
from vqdeploy.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class MaskGITVQGANConfig(Config):
    """Shape of the tokenizer; `pixel_range` is the range of the images inside the model."""

    resolution: int = 256
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    codebook_size: int = 1024
    code_dim: int = 256
    norm_groups: int = 32
    decay: float = 0.99
    commitment_weight: float = 0.25
    pixel_range: tuple[float, ...] = (0.0, 1.0)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, from the full resolution down."""
        return tuple(self.channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image."""
        side = self.resolution >> (len(self.channel_multipliers) - 1)
        return (side, side, 1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after a norm and SiLU."""

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if inputs != outputs:
            self.nin_shortcut: nn.Module | None = nn.Conv2d(outputs, outputs, 1, bias=False)
        else:
            self.nin_shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut: Tensor = x if self.nin_shortcut is None else self.nin_shortcut(h)
        return h + shortcut


class Down(nn.Module):
    """The residual blocks of one resolution, then 2x2 average pooling unless it is the last."""

    def __init__(self, blocks: Iterable[ResBlock], last: bool):
        super().__init__()
        self.block, self.last = nn.Sequential(*blocks), last

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x if self.last else F.avg_pool2d(x, 2)


class Up(nn.Module):
    """The residual blocks of one resolution, then upsampling and a convolution unless it is the last."""

    def __init__(self, blocks: Iterable[ResBlock], channels: int, last: bool):
        super().__init__()
        self.block = nn.Sequential(*blocks)
        self.upsample_conv: nn.Module | None = None if last else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        if self.upsample_conv is None:
            return x
        double: Tensor = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return double


def _blocks(config: MaskGITVQGANConfig, inputs: int, outputs: int) -> list[ResBlock]:
    return [ResBlock(outputs if i else inputs, outputs, config.norm_groups) for i in range(config.res_blocks)]


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> latent [B, code_dim, H / f, W / f]."""

    def __init__(self, config: MaskGITVQGANConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1, bias=False)
        self.down = nn.Sequential(
            *(
                Down(_blocks(config, widths[i - 1] if i else config.channels, width), i == len(widths) - 1)
                for i, width in enumerate(widths)
            )
        )
        self.mid = nn.Sequential(*_blocks(config, widths[-1], widths[-1]))
        self.norm_out = GroupNorm(config.norm_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.code_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.down(self.conv_in(x)))
        latent: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return latent


class Decoder(nn.Module):
    """Latent [B, code_dim, h, w] -> image [B, 3, h * f, w * f]. `up[i]` is the level of `Encoder.down[i]`."""

    def __init__(self, config: MaskGITVQGANConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.code_dim, widths[-1], 3, padding=1)
        self.mid = nn.Sequential(*_blocks(config, widths[-1], widths[-1]))
        self.up = nn.ModuleList(
            Up(_blocks(config, widths[min(i + 1, len(widths) - 1)], width), width, i == 0)
            for i, width in enumerate(widths)
        )
        self.norm_out = GroupNorm(config.norm_groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            x = level(x)
        image: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return image


class MaskGITVQGAN(Tokenizer):
    """The tokenizer. Images are float [B, 3, H, W] in `pixel_range`, codes int64 [B, h, w, 1]."""

    any_size = True

    config: MaskGITVQGANConfig

    def __init__(self, config: MaskGITVQGANConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = MultichannelQuantizer(config.codebook_size, config.code_dim, 1, decay=config.decay)

    @property
    def last_weight(self) -> Tensor:
        """Weight of the output layer."""
        return self.decoder.conv_out.weight

    def latents(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> vectors before quantization [B, h, w, D]."""
        vectors: Tensor = self.encoder(x)
        return vectors.permute(0, 2, 3, 1)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        """Vectors [B, h, w, D] -> images [B, 3, H, W]."""
        image: Tensor = self.decoder(vectors.permute(0, 3, 1, 2))
        return image
