"""The stage of the RQ-Transformer: `step`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.export.layers import InferenceBlock, Projection, at_least, embed_entries, widened
from vqdeploy.export.stage import Dimension, Stage
from vqdeploy.models.rqtransformer import RQTransformer


class Label(nn.Module):
    """The entry of a label: labels [B] -> [B, 1, width]."""

    labels: Tensor  # [classes, width]

    def __init__(self, prior: RQTransformer):
        super().__init__()
        self.register_buffer("labels", (prior.cond_emb.weight + prior.pos_emb_cond[0]).detach())

    def forward(self, label: Tensor, entry: Tensor) -> Tensor:
        return F.embedding(label, self.labels)[:, None]


class Text(nn.Module):
    """The entries of a text: token ids [B, C] and indices of entries [B, S] -> [B, S, width].

    What it gives for entries behind the text means nothing.
    """

    words: Tensor  # [vocabulary, width]
    positions: Tensor  # [C, width]

    def __init__(self, prior: RQTransformer):
        super().__init__()
        self.register_buffer("words", prior.cond_emb.weight.detach())
        self.register_buffer("positions", prior.pos_emb_cond[0].detach())

    def forward(self, text: Tensor, entry: Tensor) -> Tensor:
        index = entry.clamp(max=len(self.positions) - 1)
        return F.embedding(text.gather(1, index), self.words) + F.embedding(index, self.positions)


class Step(nn.Module):
    """Codes of the position after S known entries.

    The first C entries are the condition, a label or the tokens of a text; entry C + t has the codes of position t. A
    call takes entries position..position + S - 1, writes their keys and values into the KV caches, and samples the
    codes after the last of them: S = 1 in the sampling loop, more for prefill. Texts are attended causally, as they are
    in training, so their keys and values are written once, by the prefill.
    """

    body: Any  # list of InferenceBlock
    head: Any  # list of InferenceBlock
    input_table: Tensor  # [K, width]
    head_table: Tensor  # [K, width]
    positions: Tensor  # [h * w, width]
    depths: Tensor  # [Q, width]

    def __init__(self, prior: RQTransformer):
        super().__init__()
        config = prior.config
        self.depth, self.length = config.depth, config.condition_length
        self.condition = Text(prior) if config.condition_length > 1 else Label(prior)
        self.body = nn.ModuleList(InferenceBlock(block) for block in prior.body_transformer.blocks)
        self.head = nn.ModuleList(InferenceBlock(block) for block in prior.head_transformer.blocks)
        self.norm, self.classifier = prior.classifier.layer_norm, at_least(8, Projection(prior.classifier.linear))
        # Both projections are linear in rows of the codebook, so each becomes a table; biases are added once.
        self.register_buffer("input_table", prior.input_mlp(prior.codebook).detach())
        self.register_buffer("head_table", (prior.codebook @ prior.head_mlp.weight.T).detach())
        self.register_buffer("positions", prior.pos_emb_hw[0].detach())
        depths = prior.pos_emb_d[0].detach().clone()
        depths[1:] += prior.head_mlp.bias.detach()
        self.register_buffer("depths", depths)

    def forward(
        self,
        codes: Tensor,
        condition: Tensor,
        position: Tensor,
        noise: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        past_key: list[Tensor],
        past_value: list[Tensor],
    ) -> tuple[Tensor, ...]:
        entry = position[:, None] + torch.arange(codes.shape[1])
        given = self.condition(condition, entry)
        x = embed_entries(codes, given, entry, self.input_table, self.positions, self.length)
        keys, values = [], []
        for block, key, value in zip(self.body, past_key, past_value, strict=True):
            x, key, value = block.cached(x, key, value, position)
            keys.append(key)
            values.append(value)
        sampled, logits = self.sample_depths(x[:, -1:], noise, temperature, top_k, top_p)
        return sampled, logits, *keys, *values

    def sample_depths(self, context: Tensor, noise: Tensor, *options: Tensor) -> tuple[Tensor, Tensor]:
        """Context [B, 1, width] -> codes [B, Q] and logits [B, Q, K], depth by depth."""
        caches: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in self.head]
        x, sums, codes, logits = context, None, [], []
        for depth in range(self.depth):
            x = x + self.depths[depth]
            for block, (keys, values) in zip(self.head, caches, strict=True):
                x = block.append(x, keys, values)
            logits.append(widened(self.classifier(self.norm(x))[:, 0]))
            columns = (option[:, depth] for option in options)
            codes.append(torch.ops.vqdeploy.sample(logits[-1], noise[:, depth], *columns))
            row = F.embedding(codes[-1], self.head_table).unsqueeze(1)
            x = sums = row if sums is None else sums + row
        return torch.stack(codes, 1), torch.stack(logits, 1)


def stages(prior: RQTransformer) -> list[Stage]:
    """The stage of a prior, with an input `label` [B], or `text` [B, C] if it is conditioned on texts."""
    config = prior.config
    head_dim, layers, length = config.width // config.heads, range(config.body_layers), config.condition_length
    entries = length + config.positions - 1  # nothing is drawn after the codes of the last position
    per_code, cache = (2, config.depth), (2, config.heads, entries, head_dim)
    condition = {"text": torch.zeros(2, length, dtype=torch.int64)}
    inputs: dict[str, Tensor | list[Tensor]] = {
        "codes": torch.zeros(2, 2, config.depth, dtype=torch.int64),
        **(condition if length > 1 else {"label": torch.zeros(2, dtype=torch.int64)}),
        "position": torch.zeros(2, dtype=torch.int64),
        "noise": torch.zeros(*per_code, config.codebook_size),
        "temperature": torch.ones(per_code),
        "top_k": torch.ones(per_code, dtype=torch.int64),
        "top_p": torch.ones(per_code),
        "past_key": [torch.zeros(cache) for _ in layers],
        "past_value": [torch.zeros(cache) for _ in layers],
    }
    caches = [f"{kind}.{i}" for kind in ("key", "value") for i in layers]
    step = Stage(
        "step",
        Step(prior),
        inputs,
        ["next_codes", "logits", *(f"present_{name}" for name in caches)],
        dynamic={"codes": {1: Dimension("length", entries)}},
        states=("past_key", "past_value"),
        aliases={f"present_{name}": f"past_{name}" for name in caches},
    )
    return [step]
