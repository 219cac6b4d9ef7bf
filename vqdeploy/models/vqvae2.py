"""VQ-VAE-2: an autoencoder with codes at several resolutions, the finer ones conditioned on the coarser.

Razavi et al., "Generating Diverse High-Fidelity Images with VQ-VAE-2" (NeurIPS 2019), section 3.1. With two levels the
layers are those of rosinality/vq-vae-2-pytorch; a further level repeats the step from one level to the next.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqdeploy.config import Config
from vqdeploy.models.modules import Modules
from vqdeploy.models.quantizers import MultichannelQuantizer, Quantized
from vqdeploy.models.tokenizer import Tokenizer

Grids = tuple[tuple[int, ...], ...]
"""Height and width of the code map of each level, top first."""

_STRIDE = 4  # downsampling factor of the bottom level


def split_levels(codes: Tensor, grids: Grids) -> list[Tensor]:
    """Codes of all levels, concatenated [B, N, ...] -> the map of each level [B, h, w, ...]."""
    parts = codes.split([math.prod(grid) for grid in grids], 1)
    return [part.unflatten(1, grid) for part, grid in zip(parts, grids, strict=True)]


def join_levels(maps: Iterable[Tensor]) -> Tensor:
    """Maps [B, h, w, ...], top first -> concatenated [B, N, ...], each in raster order."""
    return torch.cat([level.flatten(1, 2) for level in maps], 1)


@dataclass(frozen=True)
class VQVAE2Config(Config):
    """Shape of the tokenizer.

    The bottom level has a quarter of the image's resolution, each of the `levels` above it half of the next.
    `pixel_range` is the range of the images inside the model.
    """

    resolution: int = 256
    levels: int = 2
    channels: int = 128
    res_blocks: int = 2
    res_channels: int = 32
    codebook_size: int = 512
    code_dim: int = 64
    decay: float = 0.99
    commitment_weight: float = 0.25
    pixel_range: tuple[float, ...] = (-1.0, 1.0)

    @property
    def level_grids(self) -> Grids:
        """Height and width of each level, top first."""
        levels = min(self.levels, self.resolution.bit_length())  # more do not fit
        sides = [self.resolution // _STRIDE >> level for level in reversed(range(levels))]
        return tuple((side, side) for side in sides)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image: all levels concatenated, top first."""
        return (sum(map(math.prod, self.level_grids)),)


class ResBlock(nn.Module):
    """x + a 3x3 and a 1x1 convolution, each after ReLU."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.conv(x)
        return x + change


def encoder(config: VQVAE2Config, inputs: int, stride: int) -> nn.Sequential:
    """Map [B, inputs, H, W] -> [B, channels, H / stride, W / stride]; the stride is 2 or 4."""
    channels, half = config.channels, config.channels // 2
    layers: list[nn.Module] = [nn.Conv2d(inputs, half, 4, 2, 1), nn.ReLU()]
    if stride == 4:
        layers += [nn.Conv2d(half, channels, 4, 2, 1), nn.ReLU()]
    layers.append(nn.Conv2d(channels if stride == 4 else half, channels, 3, padding=1))
    return nn.Sequential(*layers, *_res_blocks(config), nn.ReLU())


def decoder(config: VQVAE2Config, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Map [B, inputs, h, w] -> [B, outputs, h * stride, w * stride]; the stride is 2 or 4."""
    channels, half = config.channels, config.channels // 2
    layers = [nn.Conv2d(inputs, channels, 3, padding=1), *_res_blocks(config), nn.ReLU()]
    if stride == 4:
        layers += [nn.ConvTranspose2d(channels, half, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(half if stride == 4 else channels, outputs, 4, 2, 1))


def _res_blocks(config: VQVAE2Config) -> list[nn.Module]:
    return [ResBlock(config.channels, config.res_channels) for _ in range(config.res_blocks)]


class VQVAE2(nn.Module):
    """The tokenizer. Images are float [B, 3, H, W] in `pixel_range`, codes int64 [B, N], see `split_levels`.

    Lists have one part per level, top first. A level concatenates the upsampled map of the levels above and its own
    vectors to a map [B, (1 + level) * D, h, w]; `decoders[level]` maps it to the condition of the next level, or to the
    image.
    """

    any_size = False
    omits_depths = False

    @property
    def maps(self) -> tuple[tuple[int, ...], ...]:
        """Height, width and depth of each level, top first."""
        return tuple((*grid, 1) for grid in self.config.level_grids)

    def __init__(self, config: VQVAE2Config):
        super().__init__()
        if config.levels < 1 or config.resolution % (_STRIDE << (config.levels - 1)):
            raise ValueError(f"{config.levels} levels do not fit a resolution of {config.resolution}")
        self.config = config
        channels, dim, last = config.channels, config.code_dim, config.levels - 1
        self.encoders = Modules(encoder(config, channels, 2) for _ in range(last))
        self.encoders.append(encoder(config, 3, _STRIDE))
        self.projections = Modules(
            nn.Conv2d(channels + (dim if level else 0), dim, 1) for level in range(config.levels)
        )
        self.quantizers = Modules(
            MultichannelQuantizer(config.codebook_size, dim, groups=1, decay=config.decay) for _ in range(config.levels)
        )
        widths = [(1 + level) * dim for level in range(config.levels)]
        self.upsamplers = Modules(nn.ConvTranspose2d(width, width, 4, 2, 1) for width in widths[:-1])
        self.decoders = Modules(decoder(config, width, dim, 2) for width in widths[:-1])
        self.decoders.append(decoder(config, widths[-1], 3, _STRIDE))

    @property
    def last_weight(self) -> Tensor:
        """Weight of the output layer."""
        return self.decoders[-1][-1].get_parameter("weight")

    def encode(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> codes int64 [B, N]."""
        codes = []

        def quantize(level: int, z: Tensor) -> Tensor:
            chosen, vectors = self.quantizers[level].encode(z)
            codes.append(chosen[..., 0])
            return vectors

        self._descend(x, quantize)
        return join_levels(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, N] -> images [B, 3, H, W]."""
        merged: Tensor | None = None
        for level, codes_of_level in enumerate(split_levels(codes[..., None], self.config.level_grids)):
            merged = self.merge(level, self.quantizers[level].decode(codes_of_level), merged)
        image: Tensor = self.decoders[-1](merged)
        return image

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        """Images [B, 3, H, W] -> their reconstructions [B, 3, H, W], and the quantization of all levels, in training.

        Its vectors are [B, N, D], its codes [B, N]; the commitment losses of the levels are summed.
        """
        levels: list[Quantized] = []

        def quantize(level: int, z: Tensor) -> Tensor:
            levels.append(self.quantizers[level](z))
            return levels[-1].vectors

        reconstruction = self.decoders[-1](self._descend(x, quantize))
        vectors, codes, losses, _ = zip(*levels, strict=True)
        return reconstruction, Quantized(join_levels(vectors), join_levels(codes)[..., 0], torch.stack(losses).sum())

    def distances(self, x: Tensor, codes: Tensor) -> Tensor:
        """Squared distances [B, N, K] of image latents from the codebooks, given the codes of coarser levels."""
        maps, distances = split_levels(codes[..., None], self.config.level_grids), []

        def quantize(level: int, z: Tensor) -> Tensor:
            distances.append(self.quantizers[level].distances(z, maps[level])[..., 0, :])
            return self.quantizers[level].decode(maps[level])

        self._descend(x, quantize)
        return join_levels(distances)

    def depths(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Codes int64 [B, N] -> the codes of each level [B, h * w]."""
        return tuple(level.flatten(1) for level in split_levels(codes, self.config.level_grids))

    def features(self, x: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> features of each level [B, channels, h, w], top first."""
        features = []
        for layer in reversed(self.encoders):
            x = layer(x)
            features.append(x)
        return features[::-1]

    def latents(self, level: int, features: Tensor, merged: Tensor | None) -> Tensor:
        """The vectors of a level before quantization [B, h, w, D].

        Args:
            level: Index of the level, 0 for the top.
            features: Its features [B, channels, h, w].
            merged: The map of the levels above [B, level * D, h / 2, w / 2]; None at the top.
        """
        if merged is not None:
            features = torch.cat([self.decoders[level - 1](merged), features], 1)
        vectors: Tensor = self.projections[level](features)
        return vectors.permute(0, 2, 3, 1)

    def merge(self, level: int, vectors: Tensor, merged: Tensor | None) -> Tensor:
        """Appends the vectors of a level [B, h, w, D] to the map of the levels above -> [B, (1 + level) * D, h, w]."""
        own = vectors.permute(0, 3, 1, 2)
        return own if merged is None else torch.cat([self.upsamplers[level - 1](merged), own], 1)

    def _descend(self, x: Tensor, quantize: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Runs the levels from top to bottom; `quantize` maps the latents of a level [B, h, w, D] to vectors."""
        first, *rest = self.features(x)
        merged = self.merge(0, quantize(0, self.latents(0, first, None)), None)
        for level, features in enumerate(rest, 1):
            merged = self.merge(level, quantize(level, self.latents(level, features, merged)), merged)
        return merged


AnyTokenizer = Tokenizer | VQVAE2
"""A tokenizer with one code map or with several."""
