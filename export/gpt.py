"""The stages of a GPT: `step` and `features`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.export.layers import InferenceBlock, Projection, at_least, embed_entries, widened
from vqdeploy.export.stage import Dimension, Stage
from vqdeploy.models.gpt import GPT


class Entries(nn.Module):
    """Entries [B, S, width] of the transformer, from codes int64 [B, S, 1], labels [B] and positions [B]."""

    codes: Tensor  # [K, width]
    labels: Tensor  # [classes + 1, width]
    places: Tensor  # [h * w, width]

    def __init__(self, prior: GPT):
        super().__init__()
        self.register_buffer("codes", prior.tok_emb_code.weight.detach())
        self.register_buffer("labels", (prior.tok_emb_cond.weight + prior.pos_emb_cond[0]).detach())
        self.register_buffer("places", prior.pos_emb_code[0].detach())

    def forward(self, codes: Tensor, label: Tensor, position: Tensor) -> Tensor:
        entry = position[:, None] + torch.arange(codes.shape[1])
        return embed_entries(codes, F.embedding(label, self.labels)[:, None], entry, self.codes, self.places)


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
        logits, states = self.run(codes, label, position, past_key, past_value, past_entry)
        return *draw(logits, noise, temperature, top_k, top_p), *states

    def run(
        self,
        codes: Tensor,
        label: Tensor,
        position: Tensor,
        past_key: list[Tensor],
        past_value: list[Tensor],
        past_entry: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, K] after the last entry, and the states for the next call."""
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
        return widened(self.head(self.norm(x[:, -1]))), [*keys, *values, *last]


class GuidedStep(Step):
    """The step of a prior that was trained without labels too.

    With guidance an image has two batch rows. `partner` is the index of the row without the label: logits become
    partner + guidance * (own - partner). A row that is its own partner keeps its logits.
    """

    def forward(  # type: ignore[override]
        self,
        codes: Tensor,
        label: Tensor,
        position: Tensor,
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
        logits, states = self.run(codes, label, position, past_key, past_value, past_entry)
        base = F.embedding(partner, logits)
        logits = base + guidance[:, None] * (logits - base)
        return *draw(logits, noise, temperature, top_k, top_p), *states


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
    return [_step(prior), _features(prior)]


def _step(prior: GPT) -> Stage:
    config = prior.config
    layers = range(config.layers)
    cache = (2, config.heads, config.positions, config.width // config.heads)
    states = [torch.zeros(2, 1, config.width) for _ in layers] if config.token_shift else []
    inputs: dict[str, Tensor | list[Tensor]] = {
        "codes": torch.zeros(2, 2, 1, dtype=torch.int64),
        "label": torch.zeros(2, dtype=torch.int64),
        "position": torch.zeros(2, dtype=torch.int64),
        **({"partner": torch.zeros(2, dtype=torch.int64), "guidance": torch.ones(2)} if config.null_label else {}),
        "noise": torch.zeros(2, 1, config.codebook_size),
        "temperature": torch.ones(2, 1),
        "top_k": torch.ones(2, 1, dtype=torch.int64),
        "top_p": torch.ones(2, 1),
        "past_key": [torch.zeros(cache) for _ in layers],
        "past_value": [torch.zeros(cache) for _ in layers],
    }
    if states:
        inputs["past_entry"] = states
    caches = [f"{kind}.{i}" for kind in ("key", "value") for i in layers]
    entries = [f"entry.{i}" for i in range(len(states))]
    return Stage(
        "step",
        GuidedStep(prior) if config.null_label else Step(prior),
        inputs,
        ["next_codes", "logits", *(f"present_{name}" for name in [*caches, *entries])],
        dynamic={"codes": {1: Dimension("length", config.positions)}},
        states=("past_key", "past_value", "past_entry"),
        aliases={f"present_{name}": f"past_{name}" for name in caches},
    )


def _features(prior: GPT) -> Stage:
    inputs: dict[str, Tensor | list[Tensor]] = {
        "codes": torch.zeros(2, *prior.config.grid, dtype=torch.int64),
        "label": torch.zeros(2, dtype=torch.int64),
    }
    return Stage("features", Features(prior), inputs, ["features"])
