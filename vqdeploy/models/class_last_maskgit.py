"""MaskGIT with the class as a token behind the codes: the first version of valeoai/Maskgit-pytorch.

Besnier and Chen, "A Pytorch Reproduction of Masked Generative Image Transformer" (2023).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.models.transformer import Transformer, bidirectional, initialize

_EPSILON = 1e-12


class ClassLastMaskGIT(nn.Module):
    """The prior, for one code a position; codes and labels as in `MaskGIT`.

    The head is tied to the embedding, and has a bias for each code and position. The public network gives the mask a
    logit too; here it cannot be drawn.
    """

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        if config.depth != 1:
            raise ValueError(f"this prior takes one code a position, and not {config.depth}")
        self.config = config
        width, size = config.width, config.codebook_size
        self.tok_emb = nn.Embedding(size + 1, width)
        self.cls_emb = nn.Embedding(config.classes + 1, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.positions + 1, width))
        self.first_layer = nn.Sequential(
            nn.LayerNorm(width, eps=_EPSILON),
            nn.Dropout(config.dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width, eps=_EPSILON),
            nn.Dropout(config.dropout),
            nn.Linear(width, width),
        )
        self.transformer = Transformer(
            config.layers, width, config.heads, config.dropout, bidirectional, mlp_width=config.mlp_width
        )
        self.last_layer = nn.Sequential(
            nn.LayerNorm(width, eps=_EPSILON),
            nn.Dropout(config.dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.LayerNorm(width, eps=_EPSILON),
        )
        self.bias = nn.Parameter(torch.zeros(config.positions, size))
        self.apply(initialize)
        nn.init.normal_(self.pos_emb, std=0.02)

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, h, w, 1, K] of each code given those that are not masked."""
        entries = torch.cat(
            [F.embedding(codes.flatten(1), self.tok_emb.weight), F.embedding(labels, self.cls_emb.weight)[:, None]], 1
        )
        hidden: Tensor = self.last_layer(self.transformer(self.first_layer(entries + self.pos_emb))[:, :-1])
        logits = hidden @ self.tok_emb.weight[: self.config.codebook_size].T + self.bias
        return logits.reshape(codes.shape[0], *self.config.grid, -1)
