"""Classifier-free guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from vqdeploy.models.prior import Prior

Noise = Callable[[int, tuple[int, ...]], Tensor]
"""(Index of a draw, shape [B, ...]) -> standard Gumbel noise float32; samplers of plans count draws alike."""


def guided_logits(prior: Prior, codes: Tensor, conditions: Tensor, scale: float, interval: int = -1) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022): u + scale * (c - u), conditional c and unconditional u.

    With an `interval` from 0 on, positions after it + 1 in raster order have the conditional logits.
    """
    if scale == 1:
        return prior.logits(codes, conditions)
    both = prior.logits(codes.repeat(2, 1, 1, 1), torch.cat([conditions, without_condition(prior, conditions)]))
    conditional, unconditional = both.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    if interval < 0:
        return guided
    positions = torch.arange(codes[0, ..., 0].numel(), device=codes.device).view(codes.shape[1:3])
    return torch.where((positions <= interval + 1)[..., None, None], guided, conditional)


def without_condition(prior: Prior, conditions: Tensor) -> Tensor:
    """The same images without labels; a prior of texts says what stands for none."""
    if hasattr(prior, "unconditional"):
        none: Tensor = prior.unconditional(conditions)
        return none
    return torch.full_like(conditions, prior.config.classes)
