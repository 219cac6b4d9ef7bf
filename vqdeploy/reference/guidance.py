"""Guidance without a classifier."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Noise = Callable[[int, tuple[int, ...]], Tensor]
"""Index of a draw and a shape [B, ...] -> standard Gumbel noise float32; the plan's samplers count draws alike."""


def guided_logits(prior: Any, codes: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Logits without the label, moved towards and beyond those with it (Ho and Salimans, 2022); 1 is no guidance."""
    if scale == 1:
        logits: Tensor = prior.logits(codes, labels)
        return logits
    both: Tensor = prior.logits(
        codes.repeat(2, 1, 1, 1), torch.cat([labels, torch.full_like(labels, prior.config.classes)])
    )
    conditional, unconditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)
