"""A decoder-only transformer over codes in raster order after a class token: VIM, and the GPT of VQGAN.

Yu et al., "Vector-quantized Image Modeling with Improved VQGAN" (ICLR 2022), section 4; Esser et al., "Taming
Transformers for High-Resolution Image Synthesis" (CVPR 2021), section 3.2. With `token_shift` and `squared_relu` it is
the prior of thuanz123/enhancing-transformers, whose parameter names it follows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.models.ops import sample
from vqdeploy.models.prior import MapConfig
from vqdeploy.models.transformer import Transformer, initialize


@dataclass(frozen=True)
class GPTConfig(MapConfig):
    """Shape of the prior.

    `classes` is the number of class labels; 1 means unconditional. With `null_label`, the label `classes` means no
    label; without it there is no guidance. `token_shift` mixes each entry of an attention layer with the one before it
    (Peng, RWKV-LM, 2021).
    """

    grid: tuple[int, ...] = (32, 32, 1)
    codebook_size: int = 8192
    width: int = 768
    layers: int = 12
    heads: int = 12
    classes: int = 1000
    dropout: float = 0.1
    token_shift: bool = False
    squared_relu: bool = False
    null_label: bool = True


class GPT(nn.Module):
    """The prior. Codes are int64 [B, h, w, 1], labels int64 [B] in 0..classes; `classes` means no label.

    Entry 0 is the class, entry t + 1 the code of position t. Entry t predicts the code of position t.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.depth != 1:
            raise ValueError(f"this prior takes one code per position, not {config.depth}")
        self.config = config
        width = config.width
        self.pos_emb_cond = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_emb_code = nn.Parameter(torch.zeros(1, config.positions, width))
        self.tok_emb_cond = nn.Embedding(config.classes + config.null_label, width)
        self.tok_emb_code = nn.Embedding(config.codebook_size, width)
        self.transformer = Transformer(
            config.layers,
            width,
            config.heads,
            config.dropout,
            token_shift=config.token_shift,
            activation=SquaredReLU() if config.squared_relu else nn.GELU(),
        )
        self.layer_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.codebook_size, bias=False)
        self.apply(initialize)
        for embedding in (self.pos_emb_cond, self.pos_emb_code):
            nn.init.normal_(embedding, std=0.02)

    def embed_condition(self, labels: Tensor) -> Tensor:
        """Labels [B] -> the first entry [B, 1, width]."""
        entries: Tensor = self.tok_emb_cond(labels)
        return entries[:, None] + self.pos_emb_cond

    def embed_codes(self, codes: Tensor, first: int = 0) -> Tensor:
        """Codes [B, S] of the positions from `first` on -> entries [B, S, width]."""
        entries: Tensor = self.tok_emb_code(codes)
        return entries + self.pos_emb_code[:, first : first + codes.shape[1]]

    def embed(self, codes: Tensor, labels: Tensor) -> Tensor:
        """The class and all codes but the last as entries [B, h * w, width]."""
        return torch.cat([self.embed_condition(labels), self.embed_codes(codes.flatten(1)[:, :-1])], 1)

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits [B, h, w, 1, K] of each code given all before it."""
        hidden = self.transformer(self.embed(codes, labels))
        logits: Tensor = self.head(self.layer_norm(hidden))
        return logits.view(codes.shape[0], *self.config.grid, -1)

    def features(self, codes: Tensor, labels: Tensor, layer: int) -> Tensor:
        """Hidden states after a number of layers, averaged over the entries [B, width] (ViT-VQGAN, section 4.2)."""
        x = self.embed(codes, labels)
        for block in self.transformer.blocks[:layer]:
            x = block(x)
        return x.mean(1)

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        noise: Callable[[int], Tensor],
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Samples codes position by position with KV caches that grow, as the public implementations do.

        Args:
            labels: Labels [B].
            noise: Index of a position -> Gumbel noise [B, 1, K].
            temperature: [B, 1], above 0.
            top_k: [B, 1] int64, in 1..K.
            top_p: [B, 1].
            guidance_scale: Strength of guidance; 1 is none.

        Returns:
            Codes [B, h, w, 1].
        """
        guided = guidance_scale != 1
        rows = torch.cat([labels, torch.full_like(labels, self.config.classes)]) if guided else labels
        caches = self.transformer.growing_caches()
        codes: list[Tensor] = []
        for position in range(self.config.positions):
            if position == 0:
                entry = self.embed_condition(rows)
            else:
                entry = self.embed_codes(codes[-1].repeat(1 + guided, 1), position - 1)
            logits = self.head(self.layer_norm(self.transformer(entry, caches)[:, 0]))
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + guidance_scale * (conditional - unconditional)
            options = (option[:, 0] for option in (temperature, top_k, top_p))
            codes.append(sample(logits, noise(position)[:, 0], *options)[:, None])
        return torch.stack(codes, 1).view(len(labels), *self.config.grid)


class SquaredReLU(nn.Module):
    """max(x, 0)^2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()
