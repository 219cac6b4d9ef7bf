"""Classifier-free guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from vqdeploy.models.prior import Prior

Noise = Callable[[int, tuple[int, ...]], Tensor]
"""(Index of a draw, shape [B, ...]) -> standard Gumbel noise float32; samplers of plans count draws alike."""


def guided_logits(prior: Prior, codes: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022): u + scale * (c - u), conditional c and unconditional u."""
    if scale == 1:
        return prior.logits(codes, labels)
    both = prior.logits(codes.repeat(2, 1, 1, 1), torch.cat([labels, torch.full_like(labels, prior.config.classes)]))
    conditional, unconditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)
