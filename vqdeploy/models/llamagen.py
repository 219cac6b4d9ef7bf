"""The prior of LlamaGen: a Llama decoder over codes in raster order, after a class token or the features of a text.

Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (2024), section 3.2, whose
public code (FoundationVision/LlamaGen) it follows in names and in what the paper leaves open: entries of the condition
are rotated to zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.models.modules import Modules
from vqdeploy.models.ops import sample
from vqdeploy.models.prior import MapConfig
from vqdeploy.models.transformer import Attend, causal

EPSILON = 1e-5
_MOST_POSITIONS = 2**16  # of an image; VQ-8 has as many at 2,048 pixels
ROTATION_BASE = 10_000.0  # of the frequencies of rotations


@dataclass(frozen=True)
class LlamaGenConfig(MapConfig):
    """Shape of the prior.

    The label `classes` means no label. With `text_width`, images are conditioned on texts instead: features of this
    width from a text encoder, at most `condition_length` of them.
    """

    grid: tuple[int, ...] = (16, 16, 1)
    codebook_size: int = 16384
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 2048
    classes: int = 1000
    condition_length: int = 1
    text_width: int = 0
    dropout: float = 0.1

    @property
    def null_label(self) -> bool:
        """Whether images without a condition were part of training."""
        return True


class RMSNorm(nn.Module):
    """x / root mean square of x, in fp32, times a weight (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=EPSILON).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Multi-head attention whose queries and keys are rotated."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, angles: Tensor, attend: Attend) -> Tensor:
        qkv = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()
        mixed = attend(rotate(query, angles), rotate(key, angles), value)
        out: Tensor = self.dropout(self.wo(mixed.transpose(1, 2).flatten(2)))
        return out


class FeedForward(nn.Module):
    """w2(SiLU(w1 x) * w3 x) (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.w1 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.w3 = nn.Linear(config.width, config.mlp_width, bias=False)
        self.w2 = nn.Linear(config.mlp_width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)

    def forward(self, x: Tensor, angles: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, attend)
        change: Tensor = self.feed_forward(self.ffn_norm(x))
        return x + change


class LabelEmbedding(nn.Module):
    """Labels [B] -> the entry of the condition [B, 1, width]."""

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.classes + 1, config.width)

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels[:, None], self.embedding_table.weight)


class TextEmbedding(nn.Module):
    """Features of texts [B, C, text_width] -> the entries of the condition [B, C, width]."""

    cap_proj: Any
    uncond_embedding: Tensor  # [C, text_width]

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.cap_proj = nn.ModuleDict(
            {
                "fc1": nn.Linear(config.text_width, config.width, bias=False),
                "fc2": nn.Linear(config.width, config.width, bias=False),
            }
        )
        none = torch.randn(config.condition_length, config.text_width) / config.text_width**0.5
        self.register_buffer("uncond_embedding", none)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.cap_proj["fc1"](features.to(self.uncond_embedding.dtype))
        entries: Tensor = self.cap_proj["fc2"](F.gelu(hidden, approximate="tanh"))
        return entries


class LlamaGen(nn.Module):
    """The prior. Codes are int64 [B, h, w, 1]; conditions are labels int64 [B] in 0..classes, or texts.

    Texts are features [B, C, text_width], of which the first may be rows of zeros: padding, which no entry attends to.
    Entry C - 1 + t predicts the code of position t, entry C + t has it.
    """

    cls_embedding: Any  # TextEmbedding or LabelEmbedding
    angles: Tensor  # [C + h * w, D / 2, 2]

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        if config.depth != 1:
            raise ValueError(f"this prior takes one code per position, not {config.depth}")
        if config.width % config.heads or config.width // config.heads % 4:
            raise ValueError(f"a width of {config.width} cannot be split into {config.heads} heads of a multiple of 4")
        if config.positions > _MOST_POSITIONS:
            raise ValueError(f"maps of {config.positions} codes are too large")
        if not config.text_width and config.condition_length > 1:
            raise ValueError(f"a label is one entry, not {config.condition_length}")
        self.config = config
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.width)
        self.cls_embedding = TextEmbedding(config) if config.text_width else LabelEmbedding(config)
        self.tok_dropout = nn.Dropout(config.dropout)
        self.layers = Modules(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        self.register_buffer("angles", rotations(config), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def logits(self, codes: Tensor, conditions: Tensor) -> Tensor:
        """Teacher-forced logits [B, h, w, 1, K] of each code given all before it."""
        entries = [self.cls_embedding(conditions), self.tok_embeddings(codes.flatten(1)[:, :-1])]
        x = self.tok_dropout(torch.cat(entries, 1))
        attend: Attend = causal
        if self.config.text_width:
            attend = _masked(visible(conditions, x.shape[1])[:, None])
        for layer in self.layers:
            x = layer(x, self.angles[: x.shape[1]], attend)
        logits: Tensor = self.output(self.norm(x[:, self.config.condition_length - 1 :]))
        return logits.view(codes.shape[0], *self.config.grid, -1)

    def unconditional(self, conditions: Tensor) -> Tensor:
        """The conditions of the same images without their labels or texts; a text keeps its length."""
        if not self.config.text_width:
            return torch.full_like(conditions, self.config.classes)
        return torch.where(given(conditions)[..., None], self.cls_embedding.uncond_embedding, 0.0)

    @torch.no_grad()
    def generate(
        self,
        conditions: Tensor,
        noise: Callable[[int], Tensor],
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        guidance_scale: float = 1.0,
        guidance_interval: int = -1,
    ) -> Tensor:
        """Samples codes position by position as the public implementation does.

        Its caches have a row for each entry, and every entry attends to all rows, under a mask. With guidance both
        halves of the batch are computed to the end.

        Args:
            conditions: Labels [B], or texts [B, C, text_width].
            noise: Index of a position -> Gumbel noise [B, 1, K].
            temperature: [B, 1], above 0.
            top_k: [B, 1] int64, in 1..K.
            top_p: [B, 1].
            guidance_scale: Strength of guidance; 1 is none.
            guidance_interval: Codes up to this position + 1 are guided; -1 for all.

        Returns:
            Codes [B, h, w, 1].
        """
        guided, config = guidance_scale != 1, self.config
        rows = torch.cat([conditions, self.unconditional(conditions)]) if guided else conditions
        length = config.condition_length
        caches = [IndexedCache(self, len(rows)) for _ in self.layers]
        mask = visible(rows, len(self.angles)) if config.text_width else None
        codes: list[Tensor] = []
        for position in range(config.positions):
            if position:
                x, first = self.tok_embeddings(codes[-1].repeat(1 + guided, 1)), length + position - 1
            else:
                x, first = self.cls_embedding(rows), 0
            entries = torch.arange(first, first + x.shape[1], device=x.device)
            for layer, cache in zip(self.layers, caches, strict=True):
                x = layer(x, self.angles[entries], cache.at(entries, mask))
            logits = self.output(self.norm(x[:, -1])).float()
            if guided:
                conditional, unconditional = logits.chunk(2)
                within = guidance_interval < 0 or position <= guidance_interval + 1
                logits = unconditional + guidance_scale * (conditional - unconditional) if within else conditional
            options = (option[:, 0] for option in (temperature, top_k, top_p))
            codes.append(sample(logits, noise(position)[:, 0], *options)[:, None])
        return torch.stack(codes, 1).view(len(conditions), *config.grid)


class IndexedCache:
    """A KV cache with a row for each entry, written by index; an entry attends to all rows, under a mask."""

    entries: Tensor
    seen: Tensor

    def __init__(self, prior: LlamaGen, batch: int):
        config, weight = prior.config, prior.output.weight
        shape = (batch, config.heads, len(prior.angles), config.width // config.heads)
        self.key, self.value = weight.new_zeros(shape), weight.new_zeros(shape)

    def at(self, entries: Tensor, mask: Tensor | None) -> "IndexedCache":
        """Sets the entries [S] of the next call, and what each may see [B, entries, entries], None for all before."""
        order = torch.arange(self.key.shape[2], device=entries.device) <= entries[:, None]
        self.entries, self.seen = entries, order if mask is None else mask[:, None, entries]
        return self

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.key[:, :, self.entries], self.value[:, :, self.entries] = key, value
        return F.scaled_dot_product_attention(query, self.key, self.value, attn_mask=self.seen)


def _masked(mask: Tensor) -> Attend:
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def given(texts: Tensor) -> Tensor:
    """Which features of texts [B, C, text_width] are no padding, bool [B, C]."""
    return texts.ne(0).any(-1)


def visible(texts: Tensor, entries: int) -> Tensor:
    """Which entries each entry of a text and its codes attends to, bool [B, entries, entries].

    All before it but padding, and itself.
    """
    shown = F.pad(given(texts), (0, entries - texts.shape[1]), value=True)
    order = torch.ones(entries, entries, dtype=torch.bool, device=texts.device)
    return (order.tril() & shown[:, None]) | torch.eye(entries, dtype=torch.bool, device=texts.device)


def rotations(config: LlamaGenConfig) -> Tensor:
    """Cosine and sine of the rotation of each pair of features, by entry [C + h * w, D / 2, 2].

    The first half of the pairs turns by the row of a code, the second half by its column. Cosine and sine of the
    condition are both zero, as in the public code: its entries act by their values alone.
    """
    height, width, _ = config.grid
    count = config.width // config.heads // 4
    frequencies = ROTATION_BASE ** -(torch.arange(count).float() / count)
    turns = torch.cat(
        [
            torch.arange(height).float()[:, None, None].expand(height, width, 1) * frequencies,
            torch.arange(width).float()[None, :, None].expand(height, width, 1) * frequencies,
        ],
        -1,
    ).flatten(0, 1)
    table = torch.stack([turns.cos(), turns.sin()], -1)
    return F.pad(table, (0, 0, 0, 0, config.condition_length, 0))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates the pairs (2j, 2j + 1) of the features of entries [B, H, S, D] by angles [S, D / 2, 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angles.unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1)
    return turned.flatten(-2).to(x.dtype)
