"""The stages of a GPT: `step` and `features`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.export.layers import InferenceBlock, Projection, at_least, embed_entries, widened
from vqdeploy.export.stage import IMAGES, Dimension, Stage
from vqdeploy.models.gpt import GPT


class Entries(nn.Module):
    """Entries [B, S, width] of the transformer, from codes int64 [B, S, 1], labels [B] and positions [B]."""

    codes: Tensor  # [K, width]
    labels: Tensor  # [classes + 1, width]
    positions: Tensor  # [h * w, width]

    def __init__(self, prior: GPT):
        super().__init__()
        self.register_buffer("codes", prior.tok_emb_code.weight.detach())
        self.register_buffer("labels", (prior.tok_emb_cond.weight + prior.pos_emb_cond[0]).detach())
        self.register_buffer("positions", prior.pos_emb_code[0].detach())

    def forward(self, codes: Tensor, label: Tensor, position: Tensor) -> Tensor:
        entry = position[:, None] + torch.arange(codes.shape[1])
        return embed_entries(codes, F.embedding(label, self.labels)[:, None], entry, self.codes, self.positions)


class Step(nn.Module):
    """The code of the position after S known entries; compare `vqdeploy.export.rqtransformer.Step`."""

    body: Any  # list of InferenceBlock

    def __init__(self, prior: GPT):
        super().__init__()
        self.entries, self.norm = Entries(prior), prior.layer_norm
        self.head = at_least(8, Projection(prior.head))
        self.body = nn.ModuleList(InferenceBlock(block) for block in prior.transformer.blocks)

    def forward(
        self,
        codes: Tensor,
        label: Tensor,
        position: Tensor,
        noise: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        past_key: list[Tensor],
        past_value: list[Tensor],
        past_entry: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        hidden, states = self.run(codes, label, position, past_key, past_value, past_entry)
        return *draw(widened(self.head(hidden)), noise, temperature, top_k, top_p), *states

    def run(
        self,
        codes: Tensor,
        label: Tensor,
        position: Tensor,
        past_key: list[Tensor],
        past_value: list[Tensor],
        past_entry: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """The normalized output [B, width] of the last entry, and the states for the next call."""
        x = self.entries(codes, label, position)
        keys, values, last = [], [], []
        for i, (block, key, value) in enumerate(zip(self.body, past_key, past_value, strict=True)):
            if past_entry:
                before = past_entry[i] * (position > 0)[:, None, None].to(x.dtype)
                x, key, value, entry = block.shifted(x, key, value, position, before)
                last.append(entry)
            else:
                x, key, value = block.cached(x, key, value, position)
            keys.append(key)
            values.append(value)
        return self.norm(x[:, -1]), [*keys, *values, *last]


class GuidedStep(Step):
    """The step of a prior that was trained without labels too.

    With guidance an image has two rows of the batch; see `guided`. Noise, options and results have one.
    """

    def forward(  # type: ignore[override]
        self,
        codes: Tensor,
        label: Tensor,
        position: Tensor,
        row: Tensor,
        partner: Tensor,
        guidance: Tensor,
        noise: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        past_key: list[Tensor],
        past_value: list[Tensor],
        past_entry: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        hidden, states = self.run(codes, label, position, past_key, past_value, past_entry)
        logits = widened(self.head(guided(hidden, row, partner, guidance)))
        return *draw(logits, noise, temperature, top_k, top_p), *states


def guided(hidden: Tensor, row: Tensor, partner: Tensor, guidance: Tensor) -> Tensor:
    """Outputs of a transformer with guidance. A linear head makes of u + guidance * (c - u) that of the logits.

    Args:
        hidden: Outputs of all rows [B, width].
        row: Index of the row of each image [images].
        partner: Index of its row without the condition [images]; `row` without guidance.
        guidance: Guidance scale of each image [images].

    Returns:
        [images, width] in fp32.
    """
    own, base = (widened(F.embedding(index, hidden)) for index in (row, partner))
    return base + guidance[:, None] * (own - base)


def draw(logits: Tensor, noise: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, 1] drawn from logits [B, K], and the logits [B, 1, K]."""
    options = (option[:, 0] for option in (temperature, top_k, top_p))
    sampled = torch.ops.vqdeploy.sample(logits, noise[:, 0], *options)
    return sampled[:, None], logits[:, None]


class Features(nn.Module):
    """Hidden states before the first block and after each, averaged over the entries [B, layers + 1, width]."""

    body: Any  # list of InferenceBlock

    def __init__(self, prior: GPT):
        super().__init__()
        self.entries = Entries(prior)
        self.body = nn.ModuleList(InferenceBlock(block) for block in prior.transformer.blocks)

    def forward(self, codes: Tensor, label: Tensor) -> Tensor:
        x = self.entries(F.pad(codes.flatten(1, 2)[:, :-1], (0, 0, 1, 0)), label, torch.zeros_like(label))
        means = [widened(x).mean(1)]
        for block in self.body:
            x = block.in_order(x)
            means.append(widened(x).mean(1))
        return torch.stack(means, 1)


def stages(prior: GPT) -> list[Stage]:
    """The graphs of a prior."""
    config = prior.config
    step = step_stage(
        GuidedStep(prior) if config.null_label else Step(prior),
        {"label": torch.zeros(2, dtype=torch.int64)},
        config.codebook_size,
        [(config.heads, config.positions, config.width // config.heads)] * config.layers,
        [(1, config.width)] * config.layers if config.token_shift else [],
        config.null_label,
    )
    return [step, _features(prior)]


def step_stage(
    module: nn.Module,
    condition: dict[str, Tensor],
    codebook_size: int,
    caches: list[tuple[int, ...]],
    entries: list[tuple[int, ...]],
    guidance: bool,
) -> Stage:
    """The stage `step` of a prior with one code per position.

    Args:
        module: A `Step` or `GuidedStep`, or one with their inputs.
        condition: Example inputs of the condition.
        codebook_size: Number of codes, K.
        caches: Shape of the keys of a row in each layer, (heads, entries, width of a head); values have the same.
        entries: Shape of what else each layer keeps of the last call.
        guidance: Whether images may have two rows.
    """
    rows = {
        "row": torch.arange(2),
        "partner": torch.arange(2),
        "guidance": torch.ones(2),
    }
    once = {
        **(rows if guidance else {}),
        "noise": torch.zeros(2, 1, codebook_size),
        "temperature": torch.ones(2, 1),
        "top_k": torch.ones(2, 1, dtype=torch.int64),
        "top_p": torch.ones(2, 1),
    }
    states = {
        "past_key": [torch.zeros(2, *shape) for shape in caches],
        "past_value": [torch.zeros(2, *shape) for shape in caches],
        **({"past_entry": [torch.zeros(2, *shape) for shape in entries]} if entries else {}),
    }
    inputs: dict[str, Tensor | list[Tensor]] = {
        "codes": torch.zeros(2, 2, 1, dtype=torch.int64),
        **condition,
        "position": torch.zeros(2, dtype=torch.int64),
        **once,
        **states,
    }
    names = [f"{name.removeprefix('past_')}.{i}" for name, tensors in states.items() for i in range(len(tensors))]
    return Stage(
        "step",
        module,
        inputs,
        ["next_codes", "logits", *(f"present_{name}" for name in names)],
        dynamic={
            "codes": {1: Dimension("length", caches[0][1])},
            **({name: {0: IMAGES} for name in once} if guidance else {}),
        },
        states=("past_key", "past_value", "past_entry"),
        aliases={f"present_{name}": f"past_{name}" for name in names if not name.startswith("entry")},
    )


def _features(prior: GPT) -> Stage:
    inputs: dict[str, Tensor | list[Tensor]] = {
        "codes": torch.zeros(2, *prior.config.grid, dtype=torch.int64),
        "label": torch.zeros(2, dtype=torch.int64),
    }
    return Stage("features", Features(prior), inputs, ["features"])
