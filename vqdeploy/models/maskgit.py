"""MaskGIT with one or several codes per position: a bidirectional transformer that predicts masked codes.

Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022). For several codes per position, Zheng et al.,
"MoVQ" (NeurIPS 2022), section 3.4, leaves the details open. Ours: each channel of a position has an embedding table of
width / Q, the embeddings of the channels are concatenated, one linear layer gives the logits of all channels, and the
mask is drawn independently for each channel and position. With one channel this is MaskGIT.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqdeploy.models.prior import MapConfig
from vqdeploy.models.transformer import Transformer, bidirectional, initialize

_KNOWN = 1e30  # confidence of codes that stay


@dataclass(frozen=True)
class MaskGITConfig(MapConfig):
    """Shape of the prior.

    `classes` is the number of class labels; 1 means unconditional. The label `classes` means no label, if the prior was
    trained with label dropout. `network` is the architecture: `plain` as here, `adaptive` with the class in the norms
    (`vqdeploy.models.adaptive_maskgit`), `class-last` with the class as last token
    (`vqdeploy.models.class_last_maskgit`), `bert` as in the published network (`vqdeploy.models.bert_maskgit`). With a
    `mlp_width` of 0 the MLPs have the usual width of the network, mostly four times the width.
    """

    grid: tuple[int, ...] = (16, 16, 4)
    codebook_size: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    classes: int = 1000
    dropout: float = 0.1
    network: str = "plain"
    mlp_width: int = 0

    @property
    def null_label(self) -> bool:
        """Whether the label `classes` means no label."""
        return self.network != "bert"


class MaskGIT(nn.Module):
    """The prior, with the class as first token. Codes are int64 [B, h, w, Q], `codebook_size` where masked.

    Labels are int64 [B] in 0..classes; `classes` means no label.
    """

    codes_first: Tensor  # [Q]

    def __init__(self, config: MaskGITConfig):
        super().__init__()
        if config.width % config.depth:
            raise ValueError(f"a width of {config.width} cannot be split among {config.depth} channels")
        self.config = config
        width, depth, rows = config.width, config.depth, config.codebook_size + 1
        self.tok_emb = nn.Embedding(depth * rows, width // depth)
        self.cls_emb = nn.Embedding(config.classes + 1, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, 1 + config.positions, width))
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = Transformer(
            config.layers, width, config.heads, config.dropout, bidirectional, mlp_width=config.mlp_width
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, depth * config.codebook_size)
        self.register_buffer("codes_first", torch.arange(depth) * rows, persistent=False)
        self.apply(initialize)
        nn.init.normal_(self.pos_emb, std=0.02)

    def embed(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Entries [B, 1 + h * w, width]: the class, then the positions."""
        places = F.embedding(codes.flatten(1, 2) + self.codes_first, self.tok_emb.weight).flatten(2)
        return torch.cat([self.cls_emb(labels)[:, None], places], 1) + self.pos_emb

    def logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, h, w, Q, K] of each code given those that are not masked."""
        hidden = self.transformer(self.dropout(self.embed(codes, labels)))
        logits: Tensor = self.head(self.norm(hidden[:, 1:]))
        return logits.view(len(codes), *self.config.grid, -1)


def unmask(
    logits: Tensor,
    given: Tensor,
    noise: Tensor,
    choice_noise: Tensor,
    masked: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    choice_temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of parallel decoding (MaskGIT, section 3.2): draws every masked code, then masks the least confident.

    Confidence is the log-probability of the drawn code at the temperature, before top-k and top-p, plus the choice
    temperature times the choice noise. Codes that tie with the last kept one are kept too.

    Args:
        logits: [B, h, w, Q, K].
        given: Known codes [B, h, w, Q] int64, K where a code is to be drawn.
        noise: Standard Gumbel noise for the draw [B, h, w, Q, K] float32.
        choice_noise: Noise for the confidence [B, h, w, Q] float32.
        masked: Number of codes to mask again [B] int64, clamped to 1..U - 1 for U unknown codes (ties may have left
            fewer).
        temperature: [B, Q] float32, above 0.
        top_k: [B, Q] int64, in 1..K; K keeps all.
        top_p: [B, Q] float32, in 0..1; 1 keeps all.
        choice_temperature: [B] float32, at least 0.

    Returns:
        The drawn codes, and the same with K where masked again; both int64 [B, h, w, Q].
    """
    size, shape = logits.shape[-1], given.shape
    temperature, top_k, top_p = (
        option[:, None, None].expand(shape).reshape(-1) for option in (temperature, top_k, top_p)
    )
    rows = logits.reshape(-1, size)
    sampled = torch.ops.vqdeploy.sample(rows, noise.reshape(-1, size), temperature, top_k, top_p)
    likelihood = (rows.float() / temperature[:, None]).log_softmax(-1).gather(1, sampled[:, None])
    known = (given < size).flatten(1)
    drawn = torch.where(known, given.flatten(1), sampled.view(known.shape))
    confidence = likelihood.view(known.shape) + choice_temperature[:, None] * choice_noise.flatten(1)
    confidence = torch.where(known, _KNOWN, confidence)
    left = torch.minimum(masked, (~known).sum(1) - 1).clamp(1, known.shape[1] - 1)
    cut = confidence.sort(1).values.gather(1, left[:, None])
    remaining = torch.where(confidence < cut, size, drawn)
    return drawn.view(shape), remaining.view(shape)
