"""Next-scale sampling in PyTorch, as VAR's public code does it: KV caches grow, norms are modulated anew at each scale.

Tian et al., "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (NeurIPS 2024).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqdeploy.models.ops import sample, truncate
from vqdeploy.models.var import VAR, blended
from vqdeploy.reference.guidance import Noise
from vqdeploy.systems import NextScaleSampling


def generate(
    prior: VAR, sampling: NextScaleSampling, labels: Tensor, noise: Noise, options: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Codes [B, N] for labels [B], and the sum of their vectors [B, h, w, D], blended with `more_smooth`.

    `options` are temperature, top-k and top-p [B, number of scales]; draw s of `noise` is for the whole map of scale s.
    """
    config, quantizer, guided = prior.config, prior.quantizer, sampling.guidance_scale != 1
    rows = torch.cat([labels, torch.full_like(labels, config.classes)]) if guided else labels
    caches = [_GrowingCache() for _ in prior.blocks]
    places = prior.places.split(quantizer.sizes)
    total = torch.zeros(len(labels), quantizer.sizes[-1], config.code_dim, device=labels.device)
    codes: list[Tensor] = []
    for scale, own_places in enumerate(places):
        share = scale / max(config.depth - 1, 1)
        label, modulations, last = prior.modulations(rows)
        if scale == 0:
            x = label[:, None] + prior.pos_start
        else:
            x = prior.word_embed(quantizer.reduced(total, scale)).repeat(1 + guided, 1, 1)
        x = x + own_places
        for block, modulation, cache in zip(prior.blocks, modulations, caches, strict=True):
            x = block(x, modulation, cache)
        logits = prior.head(prior.head_nm(x, last))
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = guided_at(conditional, unconditional, sampling.guidance_scale, share)
        flat = logits.flatten(0, 1)
        drawn = noise(scale, logits.shape).to(flat.device).flatten(0, 1)
        chosen = [option[:, scale].repeat_interleave(len(own_places)) for option in options]
        codes.append(sample(flat, drawn, *chosen).view(logits.shape[:2]))
        vectors = quantizer.codebook[codes[-1]]
        if sampling.more_smooth:
            shares = torch.full_like(flat[:, 0], share)
            vectors = blended(truncate(flat, *chosen), drawn, shares, quantizer.codebook).view_as(vectors)
        total = total + quantizer.enlarged(vectors, scale)
    return torch.cat(codes, 1), total.unflatten(1, (config.sides[-1], -1))


def guided_at(conditional: Tensor, unconditional: Tensor, scale: float, share: float | Tensor) -> Tensor:
    """Classifier-free guidance, whose scale rises linearly from 1 at the first scale to `scale` at the last.

    In the terms of the public code, (1 + t) c - t u, where t rises from 0 to `cfg`: `scale` is 1 + cfg.
    """
    return unconditional + (1 + (scale - 1) * share) * (conditional - unconditional)


class _GrowingCache:
    """A KV cache that grows by concatenation; a call attends to all of it."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.key = key if self.key is None else torch.cat([self.key, key], 2)
        self.value = value if self.value is None else torch.cat([self.value, value], 2)
        return F.scaled_dot_product_attention(query, self.key, self.value, scale=1.0)
