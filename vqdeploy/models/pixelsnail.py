"""PixelSNAIL: gated causal convolutions and causal attention over maps of codes, one network for each level.

Chen et al., "PixelSNAIL: An Improved Autoregressive Generative Model" (ICML 2018), as the prior of Razavi et al.,
"Generating Diverse High-Fidelity Images with VQ-VAE-2" (NeurIPS 2019), section 3.2. The layers are those of
rosinality/vq-vae-2-pytorch, with folded weight normalization, tables instead of convolutions over one-hot codes, and
kernels without masked taps. Labels are our addition: they condition each level like the coarser codes do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.config import Config
from vqdeploy.models.modules import Modules
from vqdeploy.models.ops import sample
from vqdeploy.models.vqvae2 import Grids, join_levels, split_levels


@dataclass(frozen=True)
class PixelSNAILConfig(Config):
    """Shape of the network of one level.

    Each of the `blocks` has `res_blocks` gated causal convolutions of size `kernel`, then causal attention with `heads`
    if `attention`. `res_channels` is the width inside the gated convolutions, `out_res_blocks` the number of 1x1 ones
    before the logits. The condition has `condition_channels`; coarser codes pass through a convolution of size
    `condition_kernel` and `condition_res_blocks` gated ones.
    """

    grid: tuple[int, ...] = (32, 32)
    channels: int = 256
    kernel: int = 5
    blocks: int = 4
    res_blocks: int = 4
    res_channels: int = 256
    attention: bool = True
    heads: int = 8
    out_res_blocks: int = 0
    condition_channels: int = 256
    condition_kernel: int = 3
    condition_res_blocks: int = 3
    dropout: float = 0.1


@dataclass(frozen=True)
class VQVAE2PriorConfig(Config):
    """Shape of the prior: a network for each level, top first.

    `classes` is the number of class labels; 1 means unconditional.
    """

    levels: tuple[PixelSNAILConfig, ...] = (PixelSNAILConfig(), PixelSNAILConfig(grid=(64, 64), attention=False))
    codebook_size: int = 512
    classes: int = 1000

    @property
    def level_grids(self) -> Grids:
        """Height and width of each level, top first."""
        return tuple(level.grid for level in self.levels)

    @property
    def positions(self) -> int:
        """Number of codes of all levels."""
        return sum(map(math.prod, self.level_grids))

    @property
    def depth(self) -> int:
        """Number of codes per position."""
        return 1

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image: all levels concatenated, top first."""
        return (self.positions,)


class CodeConv(nn.Module):
    """A convolution over one-hot codes: the sum of one table row per tap; taps outside the map add nothing.

    Codes [B, h, w] -> [B, channels, h, w]. Tap t reads the code at `offsets[t]`, rows and columns.
    """

    def __init__(self, codebook_size: int, channels: int, offsets: Sequence[tuple[int, int]]):
        super().__init__()
        self.offsets = tuple(offsets)
        self.weight = nn.Parameter(torch.randn(len(offsets), codebook_size, channels) * len(offsets) ** -0.5)

    def neighbours(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] -> the codes under the taps [B, h, w, taps], -1 outside the map."""
        height, width = codes.shape[1:]
        margin = max(abs(step) for offset in self.offsets for step in offset)
        padded = F.pad(codes, (margin,) * 4, value=-1)
        corners = [(margin + row, margin + column) for row, column in self.offsets]
        return torch.stack([padded[:, top : top + height, left : left + width] for top, left in corners], -1)

    def forward(self, codes: Tensor) -> Tensor:
        taps, size, _ = self.weight.shape
        neighbours = self.neighbours(codes).flatten(0, 2)  # [B * h * w, taps]
        rows = neighbours.clamp(min=0) + size * torch.arange(taps, device=codes.device)
        known = (neighbours >= 0).to(self.weight.dtype)
        summed = F.embedding_bag(rows, self.weight.flatten(0, 1), mode="sum", per_sample_weights=known)
        return summed.view(*codes.shape, -1).permute(0, 3, 1, 2)


class Entry(nn.Module):
    """The first layer: codes [B, h, w] -> [B, channels, h, w], causal within a square kernel.

    The public network adds two convolutions with overlapping taps, whose outputs are shifted down by a row and right by
    a column; so their biases are missing from the first row and the first column.
    """

    def __init__(self, codebook_size: int, channels: int, kernel: int):
        super().__init__()
        self.codes = CodeConv(codebook_size, channels, causal_offsets(kernel // 2, kernel // 2))
        self.row_bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.column_bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def bias(self, height: int, width: int) -> Tensor:
        """Sum of the biases at each position [channels, height, width]."""
        below = (torch.arange(height, device=self.row_bias.device) > 0)[:, None]
        right = torch.arange(width, device=self.row_bias.device) > 0
        return self.row_bias * below + self.column_bias * right

    def forward(self, codes: Tensor) -> Tensor:
        taps: Tensor = self.codes(codes)
        return taps + self.bias(*codes.shape[1:])


def causal_offsets(rows: int, columns: int) -> list[tuple[int, int]]:
    """Offsets (row, column) of the positions before (0, 0) in raster order, up to `rows` above and `columns` aside."""
    square = product(range(-rows, 1), range(-columns, columns + 1))
    return [offset for offset in square if offset < (0, 0)]


class CausalConv(nn.Module):
    """A causal convolution with an odd kernel whose last row is that of the output.

    `above` has the taps in earlier rows, `left` those in the same row.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.kernel = kernel
        self.above = nn.Conv2d(inputs, outputs, (kernel - 1, kernel))
        self.left = nn.Conv2d(inputs, outputs, (1, kernel // 2), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        side = self.kernel // 2
        above: Tensor = self.above(F.pad(x[:, :, :-1], (side, side, self.kernel - 1, 0)))
        left: Tensor = self.left(F.pad(x[..., :-1], (side, 0)))
        return above + left


Conv = Callable[[int, int], nn.Module]
"""(Input channels, output channels) -> convolution."""


def _conv(kernel: int) -> Conv:
    return partial(nn.Conv2d, kernel_size=kernel, padding=kernel // 2)


class GatedResBlock(nn.Module):
    """x + a gated pair of convolutions, each after ELU.

    `auxiliary` and `condition` are the channels of maps added after the first and after the second convolution; 0 for
    none.
    """

    aux_conv: Any  # a layer, or None
    condition: Any

    def __init__(self, conv: Conv, channels: int, inner: int, dropout: float, auxiliary: int = 0, condition: int = 0):
        super().__init__()
        self.conv1 = conv(channels, inner)
        self.conv2 = conv(inner, 2 * channels)
        self.dropout = nn.Dropout(dropout)
        self.aux_conv = nn.Conv2d(auxiliary, inner, 1) if auxiliary else None
        self.condition = nn.Conv2d(condition, 2 * channels, 1, bias=False) if condition else None

    def forward(self, x: Tensor, auxiliary: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        h = self.conv1(F.elu(x))
        if auxiliary is not None:
            h = h + self.aux_conv(F.elu(auxiliary))
        h = self.conv2(self.dropout(F.elu(h)))
        if condition is not None:
            h = h + self.condition(condition)
        return x + F.glu(h, 1)


class CausalAttention(nn.Module):
    """Each position attends to those before it in raster order; the first gets zeros.

    Maps for the queries [B, queries, h, w] and for keys and values [B, keys, h, w] -> [B, width, h, w].
    """

    def __init__(self, queries: int, keys: int, width: int, heads: int, dropout: float):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be split into {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(queries, width)
        self.key = nn.Linear(keys, width)
        self.value = nn.Linear(keys, width)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        pairs = (self.query, query), (self.key, key), (self.value, key)
        q, k, v = (
            projection(x.flatten(2).transpose(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in pairs
        )  # [B, H, h * w, D]
        dropout = self.dropout if self.training else 0.0
        later = F.scaled_dot_product_attention(
            q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], is_causal=True, dropout_p=dropout
        )
        return F.pad(later, (0, 0, 1, 0)).transpose(2, 3).reshape(len(query), -1, *query.shape[2:])


class AttentionExit(nn.Module):
    """The end of a block with attention, from its input, the output of its convolutions, and the background."""

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        channels, dropout = config.channels, config.dropout
        queries, keys, width = channels + 2, 2 * channels + 2, channels // 2
        self.key_resblock = GatedResBlock(_conv(1), keys, channels, dropout)
        self.query_resblock = GatedResBlock(_conv(1), queries, channels, dropout)
        self.causal_attention = CausalAttention(queries, keys, width, config.heads, dropout)
        self.out_resblock = GatedResBlock(_conv(1), channels, channels, dropout, auxiliary=width)

    def forward(self, x: Tensor, out: Tensor, background: Tensor) -> Tensor:
        key = self.key_resblock(torch.cat([x, out, background], 1))
        query = self.query_resblock(torch.cat([out, background], 1))
        ended: Tensor = self.out_resblock(out, self.causal_attention(query, key))
        return ended


class PlainExit(nn.Module):
    """The end of a block without attention, with the same signature."""

    def __init__(self, config: PixelSNAILConfig):
        super().__init__()
        self.out = nn.Conv2d(config.channels + 2, config.channels, 1)

    def forward(self, x: Tensor, out: Tensor, background: Tensor) -> Tensor:
        ended: Tensor = self.out(torch.cat([out, background], 1))
        return ended


class Block(nn.Module):
    """Gated causal convolutions, then attention or a 1x1 convolution. `condition` is 0 without one."""

    def __init__(self, config: PixelSNAILConfig, condition: int):
        super().__init__()
        causal = partial(CausalConv, kernel=config.kernel)
        self.resblocks = Modules(
            GatedResBlock(causal, config.channels, config.res_channels, config.dropout, condition=condition)
            for _ in range(config.res_blocks)
        )
        self.exit = AttentionExit(config) if config.attention else PlainExit(config)

    def forward(self, x: Tensor, background: Tensor, condition: Tensor | None) -> Tensor:
        out = x
        for resblock in self.resblocks:
            out = resblock(out, condition=condition)
        ended: Tensor = self.exit(x, out, background)
        return ended


class LabelCondition(nn.Embedding):
    """Labels [B] -> condition [B, channels, 1, 1]."""

    def forward(self, labels: Tensor) -> Tensor:
        return super().forward(labels)[..., None, None]


class CodeCondition(nn.Module):
    """The codes of the level above [B, h / 2, w / 2] -> condition [B, channels, h, w]."""

    def __init__(self, config: PixelSNAILConfig, codebook_size: int):
        super().__init__()
        channels, kernel = config.condition_channels, config.condition_kernel
        if kernel % 2 == 0:
            raise ValueError(f"the kernel of a condition must have an odd size, not {kernel}")
        reach = range(-(kernel // 2), kernel // 2 + 1)
        self.codes = CodeConv(codebook_size, channels, list(product(reach, reach)))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.blocks = Modules(
            GatedResBlock(_conv(kernel), channels, channels, config.dropout) for _ in range(config.condition_res_blocks)
        )

    def forward(self, codes: Tensor) -> Tensor:
        return self.refine(self.codes(codes))

    def refine(self, x: Tensor) -> Tensor:
        """Output of `codes` -> condition."""
        x = x + self.bias
        for block in self.blocks:
            x = block(x)
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class PixelSNAIL(nn.Module):
    """The network of one level. Codes are int64 [B, h, w].

    With `classes` above 1 it is conditioned on labels; a `finer` level also on the codes of the level above.
    """

    background: Tensor  # [1, 2, h, w]

    def __init__(self, config: PixelSNAILConfig, codebook_size: int, classes: int = 1, finer: bool = False):
        super().__init__()
        if config.kernel % 2 == 0 or config.kernel < 3:
            raise ValueError(f"a causal kernel must have an odd size of 3 or more, not {config.kernel}")
        self.config = config
        self.label = LabelCondition(classes, config.condition_channels) if classes > 1 else None
        self.above = CodeCondition(config, codebook_size) if finer else None
        self.entry = Entry(codebook_size, config.channels, config.kernel)
        width = config.condition_channels if classes > 1 or finer else 0
        self.blocks = Modules(Block(config, width) for _ in range(config.blocks))
        self.out_blocks = Modules(
            GatedResBlock(_conv(1), config.channels, config.res_channels, config.dropout)
            for _ in range(config.out_res_blocks)
        )
        self.out = nn.Conv2d(config.channels, codebook_size, 1)
        self.register_buffer("background", background(*config.grid), persistent=False)

    def embed_condition(self, labels: Tensor, above: Tensor | None = None) -> Tensor | None:
        """Labels [B] and codes of the level above [B, h / 2, w / 2] -> sum of the conditions; None without any."""
        condition: Tensor | None = None if self.label is None else self.label(labels)
        if self.above is not None:
            codes: Tensor = self.above(above)
            condition = codes if condition is None else condition + codes
        return condition

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """The first rows of codes [B, r, w] -> teacher-forced logits [B, r, w, K]."""
        rows = codes.shape[1]
        x, places = self.entry(codes), self.background[:, :, :rows].expand(len(codes), -1, -1, -1)
        condition = None if condition is None else condition[:, :, :rows]
        for block in self.blocks:
            x = block(x, places, condition)
        for last in self.out_blocks:
            x = last(x)
        logits: Tensor = self.out(F.elu(x))
        return logits.permute(0, 2, 3, 1)

    def generate(self, batch: int, condition: Tensor | None, draw: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Samples codes [B, h, w] one by one; `draw` maps the position in the map and logits [B, K] to codes [B].

        Each takes a pass over its row and those above, as in the public sampler.
        """
        height, width = self.config.grid
        codes = torch.zeros(batch, height, width, dtype=torch.int64, device=self.background.device)
        for position, (row, column) in enumerate(product(range(height), range(width))):
            codes[:, row, column] = draw(position, self(codes[:, : row + 1], condition)[:, row, column])
        return codes


def background(height: int, width: int) -> Tensor:
    """Normalized row and column of each position, 0 at the centre [1, 2, height, width]."""
    rows = (torch.arange(height) - height / 2) / height
    columns = (torch.arange(width) - width / 2) / width
    return torch.stack([rows[:, None].expand(-1, width), columns.expand(height, -1)])[None]


class VQVAE2Prior(nn.Module):
    """The prior. Codes are int64 [B, N], all levels concatenated; labels int64 [B] in 0..classes-1."""

    def __init__(self, config: VQVAE2PriorConfig):
        super().__init__()
        for above, level in pairwise(config.level_grids):
            if level != (2 * above[0], 2 * above[1]):
                raise ValueError(f"a level of {level} cannot follow one of {above}, which it must double")
        self.config = config
        self.levels = Modules(
            PixelSNAIL(level, config.codebook_size, config.classes, finer=i > 0)
            for i, level in enumerate(config.levels)
        )

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits [B, N, K] of each code given all before it."""
        maps = split_levels(codes, self.config.level_grids)
        levels = zip(self.levels, maps, [None, *maps[:-1]], strict=True)
        return join_levels(network(own, network.embed_condition(labels, above)) for network, own, above in levels)

    @torch.no_grad()
    def generate(
        self, labels: Tensor, noise: Callable[[int], Tensor], temperature: Tensor, top_k: Tensor, top_p: Tensor
    ) -> Tensor:
        """Samples the levels one after the other; see `PixelSNAIL.generate`.

        Args:
            labels: Labels [B].
            noise: Index of a code among those of all levels -> Gumbel noise [B, 1, K].
            temperature: [B, 1], above 0.
            top_k: [B, 1] int64, in 1..K.
            top_p: [B, 1].

        Returns:
            Codes [B, N].
        """
        options = [option[:, 0] for option in (temperature, top_k, top_p)]

        def draw(first: int, position: int, logits: Tensor) -> Tensor:
            return sample(logits, noise(first + position)[:, 0], *options)

        maps: list[Tensor] = []
        first = 0
        for network in self.levels:
            condition = network.embed_condition(labels, maps[-1] if maps else None)
            maps.append(network.generate(len(labels), condition, partial(draw, first)))
            first += maps[-1][0].numel()
        return join_levels(maps)
