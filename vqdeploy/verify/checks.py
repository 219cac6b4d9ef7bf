"""One measured value and its limit, and how near a draw was to another."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqdeploy.models.ops import truncate

IMAGES = 4
SEED = 1
LOGITS = 1e-4  # of the largest logit or hidden state
_MASS = 1e-5  # by how much summing 16,384 probabilities in another order may move a prefix sum


@dataclass(frozen=True)
class Check:
    """One measured value and its limit."""

    stage: str
    metric: str
    value: float
    limit: float
    passed: bool


def at_most(stage: str, metric: str, value: float, limit: float) -> Check:
    """A check that passes when the value does not exceed the limit."""
    return Check(stage, metric, float(value), float(limit), bool(value <= limit))


def compare_logits(name: str, logits: Tensor, expected: Tensor) -> list[Check]:
    """Checks of a step's logits [..., K] against the reference's."""
    difference, limit = (logits - expected).abs(), float(LOGITS * expected.abs().max())
    differing = (logits.argmax(-1) != expected.argmax(-1)).float().mean()
    return [
        at_most("step", f"{name}: largest difference of logits", float(difference.max()), limit),
        at_most("step", f"{name}: mean difference of logits", float(difference.mean()), limit / 10),
        at_most("step", f"{name}: share of likeliest codes that differ", float(differing), 0.01),
    ]


def judge(
    logits: Tensor, noise: Tensor, drawn: Tensor, options: dict[str, Any], tolerance: float
) -> tuple[Tensor, Tensor]:
    """Holds drawn codes against the reference's choice.

    Args:
        logits: The reference's [N, K].
        noise: Gumbel noise of the draw [N, K].
        drawn: Codes [N].
        options: `temperature`, `top_k` and `top_p` of the draw, one number each.
        tolerance: By how much logits may be off.

    Returns:
        Which codes [N] the reference would clearly not have drawn, and where [N] its two best candidates are closer
        than the tolerance.
    """
    slack = tolerance / options["temperature"] + 1e-6
    surely, perhaps = _candidates(logits, options, slack)
    perturbed = logits / options["temperature"] + noise
    drawn = drawn[:, None]
    best = perturbed.masked_fill(~surely, -torch.inf).amax(1)
    far = (perturbed.gather(1, drawn)[:, 0] < best - slack) | ~perhaps.gather(1, drawn)[:, 0]
    two = perturbed.masked_fill(~perhaps, -torch.inf).topk(2).values
    return far, two[:, 0] - two[:, 1] <= slack


def _candidates(logits: Tensor, options: dict[str, Any], slack: float) -> tuple[Tensor, Tensor]:
    """Which codes [N, K] truncation surely, and which it perhaps leaves in, when logits are off by up to `slack`."""
    rows, size = logits.shape
    temperature, top_p = options["temperature"], options["top_p"]
    top_k = torch.full((rows,), options["top_k"] or size)

    def lowest_kept(p: float) -> Tensor:
        kept = truncate(logits, torch.full((rows,), temperature), top_k, torch.full((rows,), p))
        return kept.masked_fill(kept < -1e29, torch.inf).amin(1, keepdim=True)

    if top_p >= 1 and options["top_k"] == 0:
        everything = torch.ones_like(logits, dtype=torch.bool)
        return everything, everything
    scaled = logits / temperature
    surely = scaled >= lowest_kept(max(top_p - _MASS, 0.0)) + slack
    surely |= scaled >= scaled.amax(1, keepdim=True)
    return surely, scaled >= lowest_kept(min(top_p + _MASS, 1.0)) - slack
