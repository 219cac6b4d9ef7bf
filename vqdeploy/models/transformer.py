"""Pre-norm transformer blocks.

The attention function is a parameter, so that one block serves training and cached sampling.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.models.modules import Modules

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values of the new entries [B, H, S, D] -> attention output [B, H, S, D]."""


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of queries, keys and values [B, H, S, D] -> [B, H, S, D]."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def bidirectional(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Bidirectional attention of queries [B, H, S, D] to keys and values [B, H, T, D] -> [B, H, S, D]."""
    return F.scaled_dot_product_attention(query, key, value)


class GrowingCache:
    """A KV cache that grows by concatenation, as in the public samplers; the entries of a call attend causally."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.last: Tensor | None = None

    def previous(self, x: Tensor) -> Tensor:
        """The entry before each of x [B, S, width]: `last`, then x without its last entry."""
        first = torch.zeros_like(x[:, :1]) if self.last is None else self.last
        self.last = x[:, -1:]
        return torch.cat([first, x[:, :-1]], 1)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.key = key if self.key is None else torch.cat([self.key, key], 2)
        self.value = value if self.value is None else torch.cat([self.value, value], 2)
        scale: float = query.shape[-1] ** -0.5
        scores = query @ (self.key * scale).transpose(-1, -2)
        if query.shape[2] > 1:
            later = scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1 + scores.shape[-1] - scores.shape[-2])
            scores = scores.masked_fill(later, -torch.inf)
        return scores.softmax(-1) @ self.value


class Attention(nn.Module):
    """Multi-head attention with separate projections; a token shift mixes each entry with the one before it."""

    def __init__(self, width: int, heads: int, dropout: float, token_shift: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be split into {heads} heads")
        self.heads = heads
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        if token_shift:
            self.time_mix = nn.Parameter(torch.linspace(0, 1, width).view(1, 1, width))

    def forward(self, x: Tensor, attend: Attend = causal) -> Tensor:
        if hasattr(self, "time_mix"):
            before = attend.previous(x) if isinstance(attend, GrowingCache) else F.pad(x, (0, 0, 1, -1))
            x = torch.lerp(before, x, self.time_mix)
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        mixed: Tensor = self.dropout(self.proj(attend(q, k, v).transpose(1, 2).flatten(2)))
        return mixed


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(
        self, width: int, heads: int, dropout: float, token_shift: bool, activation: nn.Module, mlp_width: int
    ):
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout, token_shift)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width), activation, nn.Linear(mlp_width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, attend: Attend = causal) -> Tensor:
        x = x + self.attn(self.ln1(x), attend)
        change: Tensor = self.mlp(self.ln2(x))
        return x + change


class Transformer(nn.Module):
    """A stack of blocks on [B, S, width], without embeddings or a last norm.

    `activation` is that of the MLPs, whose width is `mlp_width`, or four times the width if it is 0.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        dropout: float,
        attend: Attend = causal,
        token_shift: bool = False,
        activation: nn.Module = nn.GELU(),  # noqa: B008  (it holds no weights)
        mlp_width: int = 0,
    ):
        super().__init__()
        self.attend = attend
        hidden = mlp_width or 4 * width
        self.blocks = Modules(Block(width, heads, dropout, token_shift, activation, hidden) for _ in range(layers))

    def forward(self, x: Tensor, caches: list[GrowingCache] | None = None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, self.attend if caches is None else caches[i])
        return x

    def growing_caches(self) -> list[GrowingCache]:
        """One empty KV cache per layer."""
        return [GrowingCache() for _ in self.blocks]


def initialize(module: nn.Module) -> None:
    """GPT's initialization, for `Module.apply`: normal(0, 0.02), biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
