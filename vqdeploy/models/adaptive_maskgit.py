"""MaskGIT whose class enters through the norms, as in DiT: the transformer of Halton-MaskGIT.

Besnier et al., "Halton Scheduler for Masked Generative Image Transformer" (ICLR 2025), public code at
valeoai/Halton-MaskGIT. Parameter names follow it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.models.modules import Modules
from vqdeploy.models.transformer import bidirectional

_EPSILON = 1e-5


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Entries [B, S, width], shifted and scaled by [B, width]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head attention. Queries and keys are normalized over the whole width, without weights."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be split into {heads} heads")
        self.heads, self.attend = heads, bidirectional
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key = (F.rms_norm(w(x), x.shape[-1:], eps=_EPSILON) for w in (self.wq, self.wk))
        heads = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (query, key, self.wv(x)))
        mixed: Tensor = self.wo(self.attend(*heads).transpose(1, 2).flatten(2))
        return mixed


class FeedForward(nn.Module):
    """SwiGLU; where no hidden width is given, it is 8/3 of the width, rounded up to a multiple of 256."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        hidden = hidden or -(-int(8 * width / 3) // 256) * 256
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """Attention and feed-forward, each modulated before and gated behind by the class."""

    def __init__(self, width: int, heads: int, dropout: float, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.ln1 = nn.RMSNorm(width, eps=_EPSILON)
        self.attn = Attention(width, heads)
        self.ln2 = nn.RMSNorm(width, eps=_EPSILON)
        self.ff = FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.mlp.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation: Tensor = self.mlp(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, 1)
        x = x + gate1[:, None] * self.dropout(self.attn(modulate(self.ln1(x), shift1, scale1)))
        change: Tensor = self.dropout(self.ff(modulate(self.ln2(x), shift2, scale2)))
        return x + gate2[:, None] * change


class Layers(nn.Module):
    """A stack of blocks."""

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        blocks = (Block(config.width, config.heads, config.dropout, config.mlp_width) for _ in range(config.layers))
        self.layers = Modules(blocks)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x, condition)
        return x


class BiasedRMSNorm(nn.RMSNorm):
    """RMSNorm with a bias."""

    def __init__(self, width: int):
        super().__init__(width, eps=_EPSILON)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class LastNorm(nn.Module):
    """The norm before the logits, modulated by the class."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_final = BiasedRMSNorm(width)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return modulate(self.norm_final(x), *self.mlp(condition).chunk(2, 1))


class AdaptiveMaskGIT(nn.Module):
    """The prior, for one code a position; codes and labels as in `MaskGIT`.

    One register token stands behind the positions. The head is tied to the embedding and gives the mask a logit too.
    """

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        if config.depth != 1:
            raise ValueError(f"an adaptive prior takes one code a position, and not {config.depth}")
        self.config = config
        width, rows = config.width, config.codebook_size + 1
        self.cls_emb = nn.Embedding(config.classes + 1, width)
        self.tok_emb = nn.Embedding(rows, width)
        self.pos_emb = nn.Embedding(config.positions, width)
        self.transformer = Layers(config)
        self.last_norm = LastNorm(width)
        self.head = nn.Linear(width, rows)
        self.head.weight = self.tok_emb.weight
        self.reg_tokens = nn.Embedding(1, width)
        for embedding in (self.cls_emb, self.tok_emb, self.pos_emb, self.reg_tokens):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def logits_with_mask(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, h * w, K + 1] of codes [B, h, w, 1]; the last is that of the mask."""
        condition = F.embedding(labels, self.cls_emb.weight)
        x = F.embedding(codes.flatten(1), self.tok_emb.weight) + self.pos_emb.weight
        x = torch.cat([x, self.reg_tokens.weight.expand(codes.shape[0], 1, -1)], 1)
        x = self.transformer(x, condition)[:, : self.config.positions]
        logits: Tensor = self.head(self.last_norm(x, condition))
        return logits

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, h, w, 1, K] of each code given those that are not masked."""
        logits = self.logits_with_mask(codes, labels)[..., : self.config.codebook_size]
        return logits.reshape(codes.shape[0], *self.config.grid, -1)
