"""RQ-Transformer: a transformer over positions, and a small one over the depths of each position.

Lee et al., "Autoregressive Image Generation using Residual Quantization" (CVPR 2022), section 3.2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqdeploy.models.ops import sample
from vqdeploy.models.prior import MapConfig
from vqdeploy.models.transformer import Transformer, initialize


@dataclass(frozen=True)
class RQTransformerConfig(MapConfig):
    """Shape of the prior.

    `classes` is the number of class labels; 1 means unconditional, with one label as start token. With
    `condition_length` above 1 the condition is a text of that many tokens, `classes` the size of its vocabulary.
    """

    grid: tuple[int, ...] = (8, 8, 4)
    codebook_size: int = 16384
    code_dim: int = 256
    width: int = 1536
    body_layers: int = 12
    head_layers: int = 4
    heads: int = 24
    classes: int = 1000
    condition_length: int = 1
    dropout: float = 0.1


class Classifier(nn.Module):
    """LayerNorm, and a linear layer to the logits."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.layer_norm(x))
        return logits


class RQTransformer(nn.Module):
    """The prior. Codes are int64 [B, h, w, Q], labels int64 [B], or [B, condition_length] for text.

    `codebook` [K, D] is that of the tokenizer: codes are embedded by their codebook vectors. It is shared with the
    tokenizer and not saved with the prior.
    """

    codebook: Tensor

    def __init__(self, config: RQTransformerConfig, codebook: Tensor):
        super().__init__()
        self.config = config
        width = config.width
        self.register_buffer("codebook", codebook, persistent=False)
        self.pos_emb_cond = nn.Parameter(torch.zeros(1, config.condition_length, width))
        self.pos_emb_hw = nn.Parameter(torch.zeros(1, config.positions, width))
        self.pos_emb_d = nn.Parameter(torch.zeros(1, config.depth, width))
        self.cond_emb = nn.Embedding(config.classes, width)
        self.input_mlp = nn.Linear(config.code_dim, width)
        self.head_mlp = nn.Linear(config.code_dim, width)
        self.body_transformer = Transformer(config.body_layers, width, config.heads, config.dropout)
        self.head_transformer = Transformer(config.head_layers, width, config.heads, config.dropout)
        self.classifier = Classifier(width, config.codebook_size)
        if config.condition_length > 1:
            self.cond_classifier = Classifier(width, config.classes)
        self.apply(initialize)
        for embedding in (self.pos_emb_cond, self.pos_emb_hw, self.pos_emb_d):
            nn.init.normal_(embedding, std=0.02)

    def embed_condition(self, labels: Tensor) -> Tensor:
        """Labels -> the first entries of the body [B, condition_length, width]."""
        entries: Tensor = self.cond_emb(labels.view(len(labels), -1))
        return entries + self.pos_emb_cond

    def embed_codes(self, codes: Tensor, first: int = 0) -> Tensor:
        """Codes [B, S, Q] of the positions from `first` on -> entries of the body [B, S, width].

        The bias of `input_mlp` is added once per depth.
        """
        places = self.pos_emb_hw[:, first : first + codes.shape[1]]
        depths: Tensor = self.input_mlp(self.codebook[codes])
        return depths.sum(2) + places

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits [B, h, w, Q, K] of each code given all before it."""
        batch, flat = len(codes), codes.flatten(1, 2)
        entries = torch.cat([self.embed_condition(labels), self.embed_codes(flat[:, :-1])], 1)
        context = self.body_transformer(entries)[:, self.config.condition_length - 1 :]  # [B, h*w, width]
        sums = self.codebook[flat[:, :, :-1]].cumsum(2)
        head = torch.cat([context.unsqueeze(2), self.head_mlp(sums)], 2) + self.pos_emb_d
        hidden = self.head_transformer(head.flatten(0, 1))
        logits: Tensor = self.classifier(hidden)
        return logits.view(batch, *self.config.grid, -1)

    @torch.no_grad()
    def generate(
        self, labels: Tensor, noise: Callable[[int], Tensor], temperature: Tensor, top_k: Tensor, top_p: Tensor
    ) -> Tensor:
        """Samples codes position by position with KV caches that grow, as the public implementation does.

        Args:
            labels: Labels [B], or texts [B, condition_length].
            noise: Index of a position -> Gumbel noise [B, Q, K].
            temperature: [B, Q], above 0.
            top_k: [B, Q] int64, in 1..K.
            top_p: [B, Q].

        Returns:
            Codes [B, h, w, Q].
        """
        body = self.body_transformer.growing_caches()
        codes: list[Tensor] = []
        for position in range(self.config.positions):
            entry = self.embed_condition(labels) if not codes else self.embed_codes(codes[-1][:, None], position - 1)
            context = self.body_transformer(entry, body)[:, -1:]
            options = (noise(position), temperature, top_k, top_p)
            codes.append(self._sample_depths(context, *options))
        return torch.stack(codes, 1).view(len(labels), *self.config.grid)

    def _sample_depths(self, context: Tensor, noise: Tensor, *options: Tensor) -> Tensor:
        caches, entry, codes = self.head_transformer.growing_caches(), context, []
        total = torch.zeros_like(self.codebook[0])
        for depth in range(self.config.depth):
            hidden = self.head_transformer(entry + self.pos_emb_d[:, depth], caches)
            logits = self.classifier(hidden[:, 0])
            code = sample(logits, noise[:, depth], *(option[:, depth] for option in options))
            total = total + self.codebook[code]
            entry = self.head_mlp(total).unsqueeze(1)
            codes.append(code)
        return torch.stack(codes, 1)  # [B, Q]
