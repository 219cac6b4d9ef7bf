"""The stages of VAR: `step` draws the codes of a scale; `blend` and `reconstruct` are for `more_smooth`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.export.layers import Projection, at_least, widened
from vqdeploy.export.stage import Dimension, Stage
from vqdeploy.models.modules import Modules
from vqdeploy.models.quantizers import MultiScaleQuantizer
from vqdeploy.models.var import VAR, Attention, Block, blended, normalized


class InferenceBlock(nn.Module):
    """A block with its modulation as a table over the labels, so that the layers that make it leave the graph.

    Entries are [B, c, S, C] for c conditions of each image. Where blocks share a modulation, it is an input
    [B, c, 1, 6 * C], and each block has its offset.
    """

    scale: Tensor  # [H, 1]
    modulations: Tensor  # [classes + 1, 6 * C], or the offset [6 * C]

    def __init__(self, block: Block, modulations: Tensor):
        super().__init__()
        attention: Attention = block.attn
        self.heads = attention.heads
        fused = nn.Linear(attention.mat_qkv.in_features, attention.mat_qkv.out_features)
        fused.weight, fused.bias = attention.mat_qkv.weight, nn.Parameter(attention.bias.detach())
        if hasattr(attention.mat_qkv, "moment"):
            fused.moment = attention.mat_qkv.moment
        self.qkv, self.proj = Projection(fused), Projection(attention.proj)
        self.fc1, self.fc2 = Projection(block.ffn.fc1), Projection(block.ffn.fc2)
        self.register_buffer("scale", attention.scale.detach().flatten()[:, None])
        self.register_buffer("modulations", modulations.detach())

    def forward(
        self, x: Tensor, label: Tensor, shared: Tensor | None, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = self.modulations
        modulation = F.embedding(label, own)[:, :, None] if shared is None else shared + own
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, -1)
        query, key, value = self.qkv(normalized(x) * scale1 + shift1).chunk(3, -1)
        query = (self.unit(query) * self.scale).flatten(-2)
        keys = torch.cat([past_key, self.unit(key).flatten(-2)], 2)
        values = torch.cat([past_value, value], 2)
        attention = torch.ops.vqdeploy.scaled_attention(
            query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), self.heads
        )
        x = x + self.proj(attention.view_as(x)) * gate1
        hidden = F.gelu(self.fc1(normalized(x) * scale2 + shift2), approximate="tanh")
        return x + self.fc2(hidden) * gate2, keys, values

    def unit(self, entries: Tensor) -> Tensor:
        """Entries of unit length for each head [B, c, S, H, D]."""
        by_head = widened(entries.unflatten(-1, (self.heads, -1)))
        unit: Tensor = by_head / by_head.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return unit.to(entries.dtype)


class Maps(nn.Module):
    """The whole map of an image, the sum of its scales [B, h * w, D], by constant matrices; see `MultiScaleQuantizer`.

    `rows` are the positions of a scale among all.
    """

    def __init__(self, quantizer: MultiScaleQuantizer):
        super().__init__()
        self.quantizer = quantizer

    def averaged(self, whole: Tensor, rows: Tensor) -> Tensor:
        """The map averaged to the positions of a scale [B, S, D]."""
        return F.embedding(rows, self.quantizer.down) @ whole

    def grown(self, whole: Tensor, vectors: Tensor, rows: Tensor) -> Tensor:
        """The map with the vectors [B, S, D] of a scale."""
        side = self.quantizer.sides[-1]
        large = F.embedding(rows, self.quantizer.up).T @ vectors
        square = large.mT.unflatten(-1, (side, side))
        every = torch.stack([convolution(square) for convolution in self.quantizer.convolutions], -1)
        mixed: Tensor = every @ F.embedding(rows[0], self.quantizer.mixing)
        return whole + (large + mixed.flatten(2).mT) / 2


class Step(nn.Module):
    """The codes of the scale whose positions follow those of the KV caches.

    An image has one label or, with guidance, two, whose outputs are summed with the weights `guidance` before the head.
    """

    positions: Tensor  # [N, C]
    labels: Tensor  # [classes + 1, C], the entries of the first scale
    last: Tensor  # [classes + 1, 2 * C], the modulation of the head
    shared: Tensor | None  # [classes + 1, 6 * C], the modulation that the blocks share, if they do

    def __init__(self, prior: VAR):
        super().__init__()
        config = prior.config
        labels, modulations, last = prior.modulations(torch.arange(config.classes + 1))
        self.register_buffer("shared", None)
        if prior.shared_ada_lin is not None:
            self.shared = prior.shared_ada_lin(labels).detach()
            modulations = [block.ada_gss[0] for block in prior.blocks]
        self.maps = Maps(prior.quantizer)
        # The two products that cost divergence most and time least stay as they are in int8.
        self.word_embed = at_least(16, Projection(prior.word_embed))
        self.blocks = Modules(
            InferenceBlock(block, _from_one(modulation, 2, 3).flatten(1).squeeze(0))
            for block, modulation in zip(prior.blocks, modulations, strict=True)
        )
        self.head = at_least(16, Projection(prior.head))
        self.first = len(prior.pos_start[0])
        positions = prior.places.detach().clone()
        positions[: self.first] += prior.pos_start[0].detach()
        self.register_buffer("positions", positions)
        self.register_buffer("labels", labels.detach())
        self.register_buffer("last", _from_one(last, 0, 0).flatten(1).detach())

    def forward(
        self,
        given: Tensor,
        label: Tensor,
        guidance: Tensor,
        noise: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        past_map: Tensor,
        past_key: list[Tensor],
        past_value: list[Tensor],
    ) -> tuple[Tensor, ...]:
        length, size = noise.shape[1:]
        rows = torch.arange(length) + past_key[0].shape[2]
        first = (rows < self.first)[:, None]
        inputs = self.word_embed(self.maps.averaged(past_map, rows))[:, None]
        x = torch.where(first, F.embedding(label, self.labels)[:, :, None], inputs) + F.embedding(rows, self.positions)
        shared = None if self.shared is None else F.embedding(label, self.shared)[:, :, None]
        keys, values = [], []
        for block, key, value in zip(self.blocks, past_key, past_value, strict=True):
            x, key, value = block(x, label, shared, key, value)
            keys.append(key)
            values.append(value)
        scale, shift = F.embedding(label, self.last)[:, :, None].chunk(2, -1)
        hidden = normalized(x) * scale + shift
        guided = (guidance[:, :, None, None] * widened(hidden)).sum(1)
        logits = widened(self.head(guided))
        drawn = torch.ops.vqdeploy.sample(
            logits.flatten(0, 1), noise.flatten(0, 1), *(_each(o, length) for o in (temperature, top_k, top_p))
        )
        codes = torch.where(given < size, given, drawn.view_as(given))
        vectors = F.embedding(codes, self.maps.quantizer.codebook)
        return codes, logits, self.maps.grown(past_map, vectors, rows), *keys, *values


class Blend(nn.Module):
    """The map with the blended vectors of a scale instead of its codes; see `vqdeploy.models.var.blended`."""

    def __init__(self, prior: VAR):
        super().__init__()
        self.maps = Maps(prior.quantizer)

    def forward(
        self,
        logits: Tensor,
        given: Tensor,
        position: Tensor,
        share: Tensor,
        noise: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        past_map: Tensor,
    ) -> Tensor:
        length, size = noise.shape[1:]
        codebook = self.maps.quantizer.codebook
        kept = torch.ops.vqdeploy.truncate(
            logits.flatten(0, 1), *(_each(option, length) for option in (temperature, top_k, top_p))
        )
        means = blended(kept, noise.flatten(0, 1), _each(share, length), codebook).unflatten(0, given.shape)
        known = F.embedding(given.clamp(max=size - 1), codebook)
        vectors = torch.where((given < size)[..., None], known, means)
        return self.maps.grown(past_map, vectors, position[0] + torch.arange(length))


def _from_one(modulation: Tensor, first: int, last: int) -> Tensor:
    """Modulations [rows, parts, C] whose scales, the parts `first`..`last`, multiply as they are."""
    offsets = torch.zeros(modulation.shape[1], 1)
    offsets[first : last + 1] = 1
    return modulation + offsets


def _each(option: Tensor, length: int) -> Tensor:
    """An option [B] for each position [B * length]."""
    return option[:, None].expand(-1, length).flatten()


def stages(prior: VAR) -> list[Stage]:
    """The stages of a prior."""
    config = prior.config
    cells, layers = config.sides[-1] ** 2, range(config.layers)
    length = Dimension("length", cells, usual=cells)
    conditions, past = Dimension("conditions", 2, usual=2), Dimension("past", config.grid[0] - cells, smallest=0)
    given = torch.zeros(2, 3, dtype=torch.int64)
    draw: dict[str, Tensor | list[Tensor]] = {
        "noise": torch.zeros(2, 3, config.codebook_size),
        "temperature": torch.ones(2),
        "top_k": torch.ones(2, dtype=torch.int64),
        "top_p": torch.ones(2),
        "past_map": torch.zeros(2, cells, config.code_dim),
    }
    inputs: dict[str, Tensor | list[Tensor]] = {
        "given": given,
        "label": torch.zeros(2, 2, dtype=torch.int64),
        "guidance": torch.zeros(2, 2),
        **draw,
        "past_key": [torch.zeros(2, 2, 4, config.width) for _ in layers],
        "past_value": [torch.zeros(2, 2, 4, config.width) for _ in layers],
    }
    drawn = {"given": {1: length}, "noise": {1: length}}
    both = {1: conditions}
    grown = [f"present_{kind}.{i}" for kind in ("key", "value") for i in layers]
    step = Stage(
        "step",
        Step(prior),
        inputs,
        ["codes", "logits", "present_map", *grown],
        dynamic=drawn
        | {"label": both, "guidance": both}
        | dict.fromkeys(("past_key", "past_value"), both | {2: past})
        | {name: {2: Dimension("total", config.grid[0])} for name in grown},
        states=("past_key", "past_value"),
    )
    blend_inputs: dict[str, Tensor | list[Tensor]] = {
        "logits": torch.zeros(2, 3, config.codebook_size),
        "given": given,
        "position": torch.zeros(2, dtype=torch.int64),
        "share": torch.zeros(2),
    }
    blend = Stage("blend", Blend(prior), blend_inputs | draw, ["present_map"], drawn | {"logits": {1: length}})
    return [step, blend]
