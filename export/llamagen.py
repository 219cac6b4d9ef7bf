"""The stage of LlamaGen's prior: `step`.

What is folded into the weights: those of the norms into the next products, the scale into the queries, and the order of
features, in which the halves of a head rotate together, into queries and keys.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.export.gpt import draw, guided, step_stage
from vqdeploy.export.layers import CachedAttention, Product, at_least, widened
from vqdeploy.export.stage import Stage
from vqdeploy.models.llamagen import EPSILON, Attention, Block, LlamaGen, LlamaGenConfig, RMSNorm, TextEmbedding

_MULTIPLE = 8  # of which ONNX Runtime's attention wants the width of a head to be one


def head_width(config: LlamaGenConfig) -> int:
    """Width of a head with the zeros that fill it up."""
    return -(-config.width // config.heads // _MULTIPLE) * _MULTIPLE


def normalized(x: Tensor) -> Tensor:
    """An `RMSNorm` without a weight.

    Without one of ones ONNX Runtime adds up a single row in another order than several.
    """
    return F.rms_norm(widened(x), x.shape[-1:], torch.ones(x.shape[-1]), EPSILON).to(x.dtype)


class InferenceBlock(nn.Module):
    """A block with the weights of its norms, the scale and the order of rotation folded into its products."""

    def __init__(self, block: Block, width: int):
        super().__init__()
        attention, mlp = block.attention, block.feed_forward
        self.heads, self.width = attention.heads, width
        query, key, value = attention.wqkv.weight.unflatten(0, (3, self.heads, -1))  # [H, D, width]
        own = query.shape[1]
        rows = [_halves(query * own**-0.5, width), _halves(key, width), _filled(value, width)]
        self.qkv = _folded(torch.cat(rows).flatten(0, 1), block.attention_norm, attention.wqkv)
        out = _filled(attention.wo.weight.T.unflatten(0, (self.heads, own)), width).flatten(0, 1)
        self.out = Product(out, _filled_moment(attention.wo, self.heads, width))
        self.mlp_in = _folded(torch.cat([mlp.w1.weight, mlp.w3.weight]), block.ffn_norm, mlp.w1)
        self.mlp_out = _product(mlp.w2)
        self.attend = CachedAttention(_largest(attention))

    def forward(
        self, x: Tensor, cosine: Tensor, sine: Tensor, key: Tensor, value: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Entries [B, S, width] at `position` [B], with KV caches [B, H, T, D] as inputs and outputs.

        Cosine and sine of the rotations are [B, S, 1, D], the sine of the first half of the features negative.
        """
        turning, last = self.qkv(normalized(x)).split([2 * self.heads * self.width, self.heads * self.width], -1)
        heads = turning.unflatten(-1, (2 * self.heads, self.width))
        turned = heads * cosine + torch.cat(heads.chunk(2, -1)[::-1], -1) * sine
        qkv = torch.cat([turned.flatten(-2), last], -1)
        attention, key, value = self.attend(qkv, key, value, position)
        x = x + self.out(attention)
        gate, up = self.mlp_in(normalized(x)).chunk(2, -1)
        return x + self.mlp_out(F.silu(gate) * up), key, value


def _product(layer: nn.Linear) -> Product:
    return Product(layer.weight.T, getattr(layer, "moment", None))


def _folded(weight: Tensor, norm: RMSNorm, layer: nn.Linear) -> Product:
    """The product with the weight [outputs, inputs] of a layer, or one made of it, after a norm without a weight."""
    moment: Tensor | None = getattr(layer, "moment", None)
    scale = norm.weight.detach()
    if moment is not None:
        divisor = torch.where(scale == 0, 1.0, scale)
        moment = moment / torch.outer(divisor, divisor)
    return Product((weight * scale).T, moment)


def _largest(attention: Attention) -> Tensor | None:
    """The largest key, however it is rotated, and the largest value of each head [2, H]; see `CachedAttention`."""
    seen: Tensor | None = getattr(attention.wqkv, "largest", None)
    if seen is None:
        return None
    _, key, value = seen.unflatten(0, (3, attention.heads, -1))
    return torch.stack([key.unflatten(-1, (-1, 2)).norm(dim=-1).amax(-1), value.amax(-1)])


def _filled(heads: Tensor, width: int) -> Tensor:
    """Heads [H, D, ...], filled up with zeros to a width."""
    return F.pad(heads, (0, 0, 0, width - heads.shape[1]))


def _filled_moment(layer: nn.Linear, heads: int, width: int) -> Tensor | None:
    """What is known of the inputs of a layer when their heads are filled up."""
    moment: Tensor | None = getattr(layer, "moment", None)
    for _ in range(2):
        moment = moment if moment is None else _filled(moment.unflatten(0, (heads, -1)), width).flatten(0, 1).T
    return moment


def _halves(heads: Tensor, width: int) -> Tensor:
    """Heads [H, D, ...], whose pairs are neighbours, with the first of all pairs before the second of all."""
    return torch.cat([_filled(heads[:, first::2], width // 2) for first in (0, 1)], 1)


class Texts(nn.Module):
    """The entries of texts, or of what stands for none; what it gives for entries behind them means nothing.

    A text has its first entry where its padding would have one: no entry attends to padding, and those of the condition
    are not rotated by their position.
    """

    none: Tensor  # [C, text_width]

    def __init__(self, embedding: TextEmbedding):
        super().__init__()
        self.register_buffer("none", embedding.uncond_embedding.detach())
        self.first, self.second = (_product(embedding.cap_proj[name]) for name in ("fc1", "fc2"))

    def forward(self, text: Tensor, length: Tensor, label: Tensor, entry: Tensor) -> Tensor:
        """Features [B, C, text_width], lengths [B], labels [B], 1 for none, and entries [B, S] -> [B, S, width]."""
        row = (entry + len(self.none) - length[:, None]).clamp(0, len(self.none) - 1)
        own = text.gather(1, row[..., None].expand(-1, -1, text.shape[2]))
        none = F.embedding(row, self.none)
        features = torch.where(label[:, None, None] == 1, none, own.to(none.dtype))
        entries: Tensor = self.second(F.gelu(self.first(features), approximate="tanh"))
        return entries


class Step(nn.Module):
    """The code of the position after S known entries; compare `vqdeploy.export.gpt.GuidedStep`."""

    body: Any  # list of InferenceBlock
    codes: Tensor  # [K, width]
    cosine: Tensor  # [1 + h * w, D], zeros first
    sine: Tensor  # [1 + h * w, D]

    def __init__(self, prior: LlamaGen):
        super().__init__()
        width, length = head_width(prior.config), prior.config.condition_length
        self.register_buffer("codes", prior.tok_embeddings.weight.detach())
        angles = prior.angles[length - 1 :]
        cosine, sine = F.pad(angles, (0, 0, 0, width // 2 - angles.shape[1])).unbind(-1)
        self.register_buffer("cosine", torch.cat([cosine, cosine], -1))
        self.register_buffer("sine", torch.cat([-sine, sine], -1))
        self.body = nn.ModuleList(InferenceBlock(block, width) for block in prior.layers)
        self.head = at_least(8, _folded(prior.output.weight, prior.norm, prior.output))

    def run(
        self,
        codes: Tensor,
        condition: Tensor,
        length: Tensor | int,
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
    ) -> tuple[Tensor, ...]:
        """The outputs, given the entries of the condition [B, S, width], or [B, 1, width], and how many they are."""
        number = position[:, None] + torch.arange(codes.shape[1]) - length + 1  # of a code, from 1
        x = torch.where((number < 1)[:, :, None], condition, F.embedding(codes[:, :, 0], self.codes))
        turned = number.clamp(0, len(self.cosine) - 1)  # a prefill may go on behind the condition
        cosine, sine = (F.embedding(turned, table)[:, :, None] for table in (self.cosine, self.sine))
        keys, values = [], []
        for block, key, value in zip(self.body, past_key, past_value, strict=True):
            x, key, value = block(x, cosine, sine, key, value, position)
            keys.append(key)
            values.append(value)
        logits = widened(self.head(guided(normalized(x[:, -1]), row, partner, guidance)))
        return *draw(logits, noise, temperature, top_k, top_p), *keys, *values


class LabelStep(Step):
    """The step of a prior of classes."""

    labels: Tensor  # [classes + 1, width]

    def __init__(self, prior: LlamaGen):
        super().__init__(prior)
        self.register_buffer("labels", prior.cls_embedding.embedding_table.weight.detach())

    def forward(
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
    ) -> tuple[Tensor, ...]:
        condition = F.embedding(label, self.labels)[:, None]
        options = row, partner, guidance, noise, temperature, top_k, top_p
        return self.run(codes, condition, 1, position, *options, past_key, past_value)


class TextStep(Step):
    """The step of a prior of texts."""

    def __init__(self, prior: LlamaGen):
        super().__init__(prior)
        self.texts = Texts(prior.cls_embedding)

    def forward(
        self,
        codes: Tensor,
        text: Tensor,
        text_length: Tensor,
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
    ) -> tuple[Tensor, ...]:
        entry = position[:, None] + torch.arange(codes.shape[1])
        condition = self.texts(text, text_length, label, entry)
        options = row, partner, guidance, noise, temperature, top_k, top_p
        return self.run(codes, condition, text_length[:, None], position, *options, past_key, past_value)


def stages(prior: LlamaGen) -> list[Stage]:
    """The stage of a prior."""
    config = prior.config
    entries = config.condition_length + config.positions - 1  # nothing is drawn after the code of the last position
    cache = (config.heads, entries, head_width(config))
    label = {"label": torch.zeros(2, dtype=torch.int64)}
    text = {
        "text": torch.zeros(2, config.condition_length, config.text_width),
        "text_length": torch.ones(2, dtype=torch.int64),
    }
    module, condition = (TextStep(prior), text | label) if config.text_width else (LabelStep(prior), label)
    return [step_stage(module, condition, config.codebook_size, [cache] * config.layers, [], guidance=True)]
