"""MaskGIT as it was published: a post-norm BERT with the class as a token in front.

Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022), google-research/maskgit. It was trained with
labels only, so that there is no guidance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.models.modules import Modules
from vqdeploy.models.transformer import Attend, Attention, bidirectional, initialize

_EPSILON = 1e-12


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + MLP(x)), the GELU by its approximation with tanh."""

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        width, hidden = config.width, config.mlp_width or 4 * config.width
        self.attn = Attention(width, config.heads, config.dropout)
        self.ln1 = nn.LayerNorm(width, eps=_EPSILON)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width), nn.Dropout(config.dropout)
        )
        self.ln2 = nn.LayerNorm(width, eps=_EPSILON)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.ln1(x + self.attn(x, attend))
        entries: Tensor = self.ln2(x + self.mlp(x))
        return entries


class Blocks(nn.Module):
    """A stack of blocks on [B, S, width]."""

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        self.attend: Attend = bidirectional
        self.blocks = Modules(Block(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.attend)
        return x


class BertMaskGIT(nn.Module):
    """The prior, for one code a position. Codes are int64 [B, h, w, 1], `codebook_size` where masked.

    Labels are int64 [B] in 0..classes-1. The head is tied to the embedding of the codes.
    """

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        if config.depth != 1:
            raise ValueError(f"this prior takes one code a position, and not {config.depth}")
        self.config = config
        width = config.width
        self.tok_emb = nn.Embedding(config.codebook_size + 1, width)
        self.cls_emb = nn.Embedding(config.classes, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, 1 + config.positions, width))
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = Blocks(config)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU("tanh"), nn.LayerNorm(width, eps=_EPSILON))
        self.bias = nn.Parameter(torch.zeros(config.codebook_size))
        self.apply(initialize)
        nn.init.normal_(self.pos_emb, std=0.02)

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, h, w, 1, K] of each code given those that are not masked."""
        entries = torch.cat(
            [F.embedding(labels, self.cls_emb.weight)[:, None], F.embedding(codes.flatten(1), self.tok_emb.weight)], 1
        )
        hidden: Tensor = self.head(self.transformer(self.dropout(self.norm(entries + self.pos_emb)))[:, 1:])
        logits = hidden @ self.tok_emb.weight[: self.config.codebook_size].T + self.bias
        return logits.reshape(codes.shape[0], *self.config.grid, -1)
