"""The stages of a hierarchy of PixelSNAILs: for each level `LEVEL_row` and `LEVEL_pixel`.

The receptive field of a causal convolution without its centre is the rows above and a few positions to the left. One
call of `row` computes the contribution of the rows above to a whole row. One call of `pixel` per position adds that of
the positions to the left. No output of a convolution at a position depends on the code at that position, so that all
convolutions of a network run in parallel (compare Ramachandran et al., "Fast Generation for Convolutional
Autoregressive Models", 2017). A level that is conditioned on codes has a stage `LEVEL_condition`, called once per
image.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.export.layers import Product, Projection, RowProduct, at_least, widened
from vqdeploy.export.stage import Stage
from vqdeploy.export.winograd import ONE, minimal_filtering
from vqdeploy.models.modules import Modules
from vqdeploy.models.pixelsnail import (
    AttentionExit,
    CodeCondition,
    CodeConv,
    GatedResBlock,
    PixelSNAIL,
    PlainExit,
    VQVAE2Prior,
)
from vqdeploy.runtime.manifest import level_names

_PRODUCTS = 8  # products per tile of a row; more lose precision
_PRODUCTS_IN_HALF = 4  # uses the points 0, 1 and -1 only: further ones would cost two bits in fp16


class CodeTable(nn.Module):
    """Some taps of a convolution over codes: codes under the taps [..., taps], -1 for none -> [..., channels]."""

    rows: Tensor  # [taps * (K + 1), channels], zeros in front of each tap's
    starts: Tensor  # [taps]

    def __init__(self, conv: CodeConv, taps: list[int]):
        super().__init__()
        weight = F.pad(conv.weight.detach()[taps], (0, 0, 1, 0))
        self.register_buffer("rows", weight.flatten(0, 1))
        self.register_buffer("starts", 1 + weight.shape[1] * torch.arange(len(taps)))

    def forward(self, codes: Tensor) -> Tensor:
        return F.embedding(codes + self.starts, self.rows).sum(-2)


def _gated(network: PixelSNAIL) -> list[GatedResBlock]:
    return [resblock for block in network.blocks for resblock in block.resblocks]


class RowConv(nn.Module):
    """The contribution of the rows above to a row, through the causal convolutions of all L layers.

    Uses minimal filtering along the row: a tile of m outputs needs n products of n overlapping inputs, which `spread`
    transforms. The layers and the n products are groups of one convolution.
    """

    mixed: Tensor  # [n * tiles, w]
    outputs: Tensor  # [m, n]

    def __init__(self, convolutions: list[Any], width: int, products: int):
        super().__init__()
        weight = torch.stack([conv.weight.detach() for conv in convolutions])  # [L, outputs, inputs, K - 1, K]
        self.layers, self.channels, inputs, rows, taps = weight.shape
        m = max(products + 1 - taps, 1)
        self.width, self.tiles = width, -(-width // m)
        outputs, filters, mixed = (matrix.to(weight) for matrix in minimal_filtering(m, taps))
        n = len(mixed)
        groups = self.layers * n
        self.conv: Any = nn.Conv2d(groups * inputs, groups * self.channels, (rows, 1), groups=groups)
        self.conv.weight.data = (weight @ filters.T).permute(0, 4, 1, 2, 3).flatten(0, 2)[..., None].contiguous()
        bias = weight.new_zeros(self.layers, n, self.channels)
        bias[:, ONE] = torch.stack([conv.bias.detach() for conv in convolutions])
        self.conv.bias = nn.Parameter(bias.flatten())
        first = m * torch.arange(self.tiles) - taps // 2
        columns = torch.arange(width) - first[:, None]  # selects the inputs of each tile from a row [tiles, w]
        inside = (columns >= 0) & (columns < n)
        self.register_buffer("mixed", (mixed[:, columns.clamp(0, n - 1)] * inside).flatten(0, 1))
        self.register_buffer("outputs", outputs.contiguous())

    def spread(self, row: Tensor) -> Tensor:
        """Activations of a row [B, L, w, inputs] -> [B, tiles, L * n * inputs]."""
        mixed: Tensor = (self.mixed @ row).unflatten(2, (-1, self.tiles))  # [B, L, n, tiles, inputs]
        return mixed.permute(0, 3, 1, 2, 4).flatten(2)

    def forward(self, rows: list[Tensor]) -> Tensor:
        """The K - 1 rows above, transformed by `spread`, farthest first -> [B, w, L * outputs].

        The tiles of all images form one row of one map, so that the weights are read once for all of them.
        """
        maps = torch.stack(rows).flatten(1, 2)[None]  # [1, K - 1, B * tiles, groups * inputs]
        products: Tensor = self.conv(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        products = products.reshape(-1, self.tiles, self.layers, self.outputs.shape[1], self.channels)
        return (self.outputs @ products).transpose(2, 3).flatten(3).flatten(1, 2)[:, : self.width]


class RowProducts(nn.Module):
    """`RowConv` as a product for each layer, for integers, which gain nothing by minimal filtering."""

    bias: Tensor  # [L * outputs]

    def __init__(self, convolutions: list[Any]):
        super().__init__()
        kernels = [conv.weight.detach().permute(3, 2, 1, 0).flatten(1, 2) for conv in convolutions]
        self.products = Modules(map(RowProduct, kernels))
        self.register_buffer("bias", torch.cat([conv.bias.detach() for conv in convolutions]))

    def spread(self, row: Tensor) -> Tensor:
        """Returns the activations of a row as they are."""
        return row

    def forward(self, rows: list[Tensor]) -> Tensor:
        """The K - 1 rows above [B, L, w, inputs], farthest first -> [B, w, L * outputs]."""
        layers = torch.cat(rows, 3).unbind(1)
        return torch.cat([product(x) for product, x in zip(self.products, layers, strict=True)], 2) + self.bias


def at_row(maps: Tensor, row: Tensor) -> Tensor:
    """One row of each map [B, h, ...], that of `row` [B] -> [B, ...]."""
    batch, height = maps.shape[:2]
    rows = F.embedding(row + height * torch.arange(batch, device=row.device), maps.flatten(0, 1).flatten(1))
    return rows.view(batch, *maps.shape[2:])


class Row(nn.Module):
    """The contribution of the rows above to all positions of a row, and that of the condition.

    The inputs of the first and of the second convolutions of all L gated layers are given as activations [B, L, w, C]
    for the row directly above, and as transformed by `spread` for the K - 2 rows above that one. `products` is the
    number of products of a tile of `RowConv`; None takes `RowProducts`.
    """

    row_bias: Tensor  # [C]
    column_bias: Tensor  # [w, C]
    labels: Tensor  # [classes, L * 2C]

    def __init__(self, network: PixelSNAIL, products: int | None = _PRODUCTS):
        super().__init__()
        gated, config = _gated(network), network.config
        self.side, self.width = config.kernel // 2, config.grid[1]
        offsets = network.entry.codes.offsets
        self.offsets = [offset for offset in offsets if offset[0] < 0]
        self.entry = CodeTable(network.entry.codes, [offsets.index(offset) for offset in self.offsets])
        self.first, self.second = (
            RowProducts(layers) if products is None else RowConv(layers, self.width, products)
            for layers in ([block.conv1.above for block in gated], [block.conv2.above for block in gated])
        )
        self.register_buffer("row_bias", network.entry.row_bias.detach().flatten())
        self.register_buffer("column_bias", network.entry.bias(1, self.width)[:, 0].T.detach().contiguous())
        if gated[0].condition is not None:
            weights = torch.cat([block.condition.weight for block in gated]).detach().flatten(1).T
            self.condition = Product(weights)
            labels = weights.new_zeros(1, len(weights)) if network.label is None else network.label.weight.detach()
            self.register_buffer("labels", labels @ weights)

    def forward(
        self,
        row: Tensor,
        codes: Tensor,
        row_x: Tensor,
        row_y: Tensor,
        above_x: list[Tensor],
        above_y: list[Tensor],
        label: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The contributions, and the transformed activations of the row directly above for later calls.

        Args:
            row: Index of the row [B].
            codes: Codes of the rows above in the receptive field of the first layer [B, rows, w], -1 outside the map.
            row_x: Activations of the row directly above, inputs of the first convolutions.
            row_y: The same for the second ones.
            above_x: Transformed activations of the rows above that one, farthest first, for the first convolutions.
            above_y: The same for the second ones.
            label: Labels [B], if the level is conditioned.
            condition: Output of `LEVEL_condition` [B, h, w, channels], if there is a level above.

        Returns:
            `entry` [B, w, C], `inner` [B, w, L * inner], `gates` [B, w, L * 2C], and `row_x` and `row_y` after
            `spread`.
        """
        spread_x, spread_y = self.first.spread(row_x), self.second.spread(row_y)
        inner, gates = self.first([*above_x, spread_x]), self.second([*above_y, spread_y])
        if label is not None:
            gates = gates + F.embedding(label, self.labels)[:, None]
        if condition is not None:
            gates = gates + self.condition(at_row(condition, row))
        return self._enter(row, codes), inner, gates, spread_x, spread_y

    def _enter(self, row: Tensor, codes: Tensor) -> Tensor:
        padded = F.pad(codes, (self.side, self.side), value=-1)
        near = [padded[:, down, self.side + right :][:, : self.width] for down, right in self.offsets]
        bias = torch.where(row[:, None] > 0, self.row_bias, torch.zeros_like(self.row_bias))
        entry: Tensor = self.entry(torch.stack(near, -1))
        return entry + self.column_bias + bias[:, None]


class PointwiseGate(nn.Module):
    """A `GatedResBlock` of 1x1 convolutions, on vectors [B, channels]."""

    def __init__(self, block: GatedResBlock):
        super().__init__()
        self.conv1, self.conv2 = _pointwise(block.conv1), _pointwise(block.conv2)
        self.aux_conv: Any = None if block.aux_conv is None else _pointwise(block.aux_conv)

    def forward(self, x: Tensor, auxiliary: Tensor | None = None) -> Tensor:
        h = self.conv1(F.elu(x))
        if auxiliary is not None:
            h = h + self.aux_conv(F.elu(auxiliary))
        return x + F.glu(self.conv2(F.elu(h)), 1)


def _pointwise(conv: nn.Module) -> Projection:
    weight, bias = (conv.get_parameter(name).detach() for name in ("weight", "bias"))
    linear = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    linear.weight.data, linear.bias.data = weight.flatten(1), bias
    return Projection(linear)


class PixelExit(nn.Module):
    """A `PlainExit` on vectors."""

    def __init__(self, plain: PlainExit):
        super().__init__()
        self.out = _pointwise(plain.out)

    def forward(self, x: Tensor, out: Tensor, background: Tensor) -> Tensor:
        ended: Tensor = self.out(torch.cat([out, background], 1))
        return ended


class PixelAttention(nn.Module):
    """An `AttentionExit` on vectors, with KV caches.

    A position does not attend to itself. So its key and value go to the next call, which writes them into the caches
    at the index of the position before and attends to all entries up to there.
    """

    def __init__(self, exit_: AttentionExit):
        super().__init__()
        attention = exit_.causal_attention
        self.key_resblock, self.query_resblock = PointwiseGate(exit_.key_resblock), PointwiseGate(exit_.query_resblock)
        self.out_resblock = PointwiseGate(exit_.out_resblock)
        scale = (attention.query.out_features // attention.heads) ** -0.5
        self.query = Projection(attention.query, scales=(scale,))
        self.key_value = Projection(attention.key, attention.value)

    def forward(
        self, x: Tensor, out: Tensor, background: Tensor, position: Tensor, key: Tensor, value: Tensor, last: Tensor
    ) -> tuple[Tensor, ...]:
        """`last` [B, 2 * width] is key and value of the position before; also returns the new caches and `last`."""
        pair = self.key_value(self.key_resblock(torch.cat([x, out, background], 1)))
        query = self.query(self.query_resblock(torch.cat([out, background], 1)))
        before = (position - 1).clamp(min=0)
        qkv = torch.cat([query, last], 1)[:, None]
        attention, key, value = torch.ops.vqdeploy.cached_attention(qkv, key, value, before)
        seen = torch.where(position[:, None] > 0, attention[:, 0], torch.zeros_like(query))
        return self.out_resblock(out, seen), key, value, pair


class Pixel(nn.Module):
    """The code of one position.

    The states `left_x` and `left_y` [B, L * side * C] are the activations of the positions to the left, inputs of the
    first and of the second convolutions. `row_x` and `row_y` collect them for the next call of `Row`.
    """

    background: Tensor  # [h * w, 2]

    def __init__(self, network: PixelSNAIL):
        super().__init__()
        gated, config = _gated(network), network.config
        self.layers, self.side, self.width = len(gated), config.kernel // 2, config.grid[1]
        self.blocks = config.blocks
        offsets = network.entry.codes.offsets
        self.entry = CodeTable(network.entry.codes, [i for i, (down, _) in enumerate(offsets) if down == 0])
        self.first = Modules(_taps(block.conv1) for block in gated)
        self.second = Modules(_taps(block.conv2) for block in gated)
        kind: Any = PixelAttention if config.attention else PixelExit
        # The path of the residuals to the logits: in 8 bits it alone costs more than everything else together.
        self.exits = at_least(32, nn.ModuleList(kind(block.exit) for block in network.blocks))
        self.out_blocks = nn.ModuleList(PointwiseGate(block) for block in network.out_blocks)
        self.out = at_least(32, _pointwise(network.out))
        self.register_buffer("background", network.background[0].flatten(1).T.contiguous())

    def forward(
        self,
        codes: Tensor,
        row: Tensor,
        column: Tensor,
        noise: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        entry: Tensor,
        inner: Tensor,
        gates: Tensor,
        left_x: Tensor,
        left_y: Tensor,
        row_x: Tensor,
        row_y: Tensor,
        key: Sequence[Tensor] = (),
        value: Sequence[Tensor] = (),
        last: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        logits, *states = self.logits(codes, row, column, entry, inner, gates, left_x, left_y, key, value, last)
        activations_x, activations_y, left_x, left_y, *caches = states
        # Joined: TensorRT-RTX 1.7 crashes on two cache writes of which only one depends on attention.
        widths = activations_x.shape[2], activations_y.shape[2]
        entries = torch.cat([activations_x, activations_y], 2)[:, :, None].split(widths, 3)
        row_x, row_y = (
            torch.ops.vqdeploy.write_cache(rows, new, column) for rows, new in zip((row_x, row_y), entries, strict=True)
        )
        options = (option[:, 0] for option in (temperature, top_k, top_p))
        sampled = torch.ops.vqdeploy.sample(logits, noise[:, 0], *options)
        return sampled[:, None], logits[:, None], left_x, left_y, row_x, row_y, *caches

    def logits(
        self,
        codes: Tensor,
        row: Tensor,
        column: Tensor,
        entry: Tensor,
        inner: Tensor,
        gates: Tensor,
        left_x: Tensor,
        left_y: Tensor,
        key: Sequence[Tensor] = (),
        value: Sequence[Tensor] = (),
        last: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """Logits [B, K] of the position at `row` and `column` [B], and the states for the next calls.

        Args:
            codes: Codes of the positions to the left in this row [B, side], -1 outside the map.
            row: Index of the row [B].
            column: Index of the column [B].
            entry: Contributions of the rows above, from `Row`.
            inner: See `entry`.
            gates: See `entry`.
            left_x: Activations of the positions to the left.
            left_y: See `left_x`.
            key: Key cache [B, H, h * w, D] of each block with attention.
            value: Value cache, see `key`.
            last: Key and value of the position before [B, 2 * width], for each block with attention.

        Returns:
            The logits, the activations of the position [B, L, C] twice, `left_x`, `left_y`, and `key`, `value`, `last`
            of each block.
        """
        position = row * self.width + column
        entry, inner, gates = (at_row(rows, column) for rows in (entry, inner, gates))
        y = F.elu(inner + _each(left_x, self.first))
        branches = (gates + _each(left_y, self.second)).unflatten(1, (self.layers, -1))
        branches = F.glu(branches, 2).flatten(1).split(branches.shape[2] // 2, 1)
        x, background = entry + self.entry(codes), F.embedding(position, self.background)
        inputs: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        lasts: list[Tensor] = []
        for i, exit_ in enumerate(self.exits):
            out = x
            for branch in branches[i * self.layers // self.blocks : (i + 1) * self.layers // self.blocks]:
                inputs.append(out)
                out = out + branch
            if key:
                x, *caches = exit_(x, out, background, position, key[i], value[i], last[i])
                for group, cache in zip((keys, values, lasts), caches, strict=True):
                    group.append(cache)
            else:
                x = exit_(x, out, background)
        for block in self.out_blocks:
            x = block(x)
        activations_x, activations_y = (
            each.unflatten(1, (self.layers, -1)) for each in (F.elu(torch.cat(inputs, 1)), y)
        )
        return (
            widened(self.out(F.elu(x))),
            activations_x,
            activations_y,
            self._pushed(left_x, activations_x),
            self._pushed(left_y, activations_y),
            *keys,
            *values,
            *lasts,
        )

    def _pushed(self, left: Tensor, new: Tensor) -> Tensor:
        """Shifts the window of positions to the left: drops the farthest and appends this one."""
        window = left.unflatten(1, (self.layers, self.side, -1))
        return torch.cat([window[:, :, 1:], new[:, :, None]], 2).flatten(1)


def _taps(causal: nn.Module) -> Product:
    """The convolution to the left as a matrix [side * inputs, outputs]."""
    return Product(causal.get_parameter("left.weight").detach()[:, :, 0].permute(2, 1, 0).flatten(0, 1))


def _each(left: Tensor, products: Modules[Product]) -> Tensor:
    """Applies one matrix to each of L equal parts of [B, L * n], and concatenates the results."""
    parts = left.split(left.shape[1] // len(products), 1)
    return torch.cat([product(part) for part, product in zip(parts, products, strict=True)], 1)


class Condition(nn.Module):
    """Codes of the level above [B, h / 2, w / 2] -> condition [B, h, w, channels]."""

    def __init__(self, condition: CodeCondition):
        super().__init__()
        self.condition = condition
        self.entry = CodeTable(condition.codes, list(range(len(condition.codes.offsets))))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.entry(self.condition.codes.neighbours(codes)).permute(0, 3, 1, 2)
        return self.condition.refine(x).permute(0, 2, 3, 1)


def stages(prior: VQVAE2Prior, floats: str) -> list[Stage]:
    """The stages of a prior whose floats are `fp32` or `fp16`."""
    products = _PRODUCTS if floats == "fp32" else _PRODUCTS_IN_HALF
    graphs = []
    for name, network in zip(level_names(len(prior.levels)), prior.levels, strict=True):
        graphs += _level(name, network, prior.config.codebook_size, products)
    return graphs


def _level(name: str, network: PixelSNAIL, codebook_size: int, products: int) -> list[Stage]:
    config = network.config
    height, width = config.grid
    layers, side = config.blocks * config.res_blocks, config.kernel // 2
    channels, inner = config.channels, config.res_channels
    attention = range(config.blocks if config.attention else 0)
    cache = (2, config.heads, height * width, channels // 2 // config.heads)
    graphs = []
    if network.above is not None:
        codes = torch.zeros(2, height // 2, width // 2, dtype=torch.int64)
        graphs.append(Stage(f"{name}_condition", Condition(network.above), {"codes": codes}, ["condition"]))
    of_rows = partial(_row_stage, name, network)
    graphs.append(dataclasses.replace(of_rows(products), in_products=partial(of_rows, None)))

    pixels: dict[str, Any] = {
        "codes": torch.zeros(2, side, dtype=torch.int64),
        "row": _index(),
        "column": _index(),
        "noise": torch.zeros(2, 1, codebook_size),
        "temperature": torch.ones(2, 1),
        "top_k": torch.ones(2, 1, dtype=torch.int64),
        "top_p": torch.ones(2, 1),
        "entry": torch.zeros(2, width, channels),
        "inner": torch.zeros(2, width, layers * inner),
        "gates": torch.zeros(2, width, layers * 2 * channels),
        "past_left_x": torch.zeros(2, layers * side * channels),
        "past_left_y": torch.zeros(2, layers * side * inner),
        "past_row_x": torch.zeros(2, layers, width, channels),
        "past_row_y": torch.zeros(2, layers, width, inner),
    }
    if config.attention:
        pixels["past_key"] = [torch.zeros(cache) for _ in attention]
        pixels["past_value"] = [torch.zeros(cache) for _ in attention]
        pixels["past_last"] = [torch.zeros(2, channels // 2 * 2) for _ in attention]
    caches = [f"{kind}.{i}" for kind in ("key", "value") for i in attention]
    in_place = ["row_x", "row_y", *caches]
    carried = ["left_x", "left_y", *in_place, *(f"last.{i}" for i in attention)]
    graphs.append(
        Stage(
            f"{name}_pixel",
            Pixel(network),
            pixels,
            ["next_codes", "logits", *(f"present_{state}" for state in carried)],
            states=("entry", "inner", "gates", *(name for name in pixels if name.startswith("past_"))),
            aliases={f"present_{state}": f"past_{state}" for state in in_place},
        )
    )
    return graphs


def _row_stage(name: str, network: PixelSNAIL, products: int | None) -> Stage:
    config = network.config
    height, width = config.grid
    layers, side = config.blocks * config.res_blocks, config.kernel // 2
    stage = Row(network, products)
    row_x, row_y = (torch.zeros(2, layers, width, size) for size in (config.channels, config.res_channels))
    rows: dict[str, Any] = {
        "row": _index(),
        "codes": torch.zeros(2, side, width, dtype=torch.int64),
        "row_x": row_x,
        "row_y": row_y,
        "above_x": [torch.zeros_like(stage.first.spread(row_x)) for _ in range(config.kernel - 2)],
        "above_y": [torch.zeros_like(stage.second.spread(row_y)) for _ in range(config.kernel - 2)],
    }
    if network.label is not None or network.above is not None:
        rows["label"] = _index()
    if network.above is not None:
        rows["condition"] = torch.zeros(2, height, width, config.condition_channels)
    made = ["entry", "inner", "gates", "spread_x", "spread_y"]
    states = ("row_x", "row_y", "above_x", "above_y", "condition")
    return Stage(f"{name}_row", stage, rows, made, states=states)


def _index() -> Tensor:
    """A row or a column of each image; the exporter would merge inputs that are the same tensor."""
    return torch.zeros(2, dtype=torch.int64)
