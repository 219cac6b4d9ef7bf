"""Checks (a value and its limit), and the margin rule."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqdeploy.models.ops import truncate
from vqdeploy.precision import PRECISIONS, Limits
from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.manifest import Manifest

IMAGES = 4
SEED = 1
_LARGEST = "largest difference of logits"
_OWN = 1e-3  # of the largest logit: between two calls of one plan, whose sums may be in another order
_MASS = 1e-5  # rounding of a prefix sum of 16,384 probabilities


def limits(manifest: Manifest, *stages: str) -> Limits:
    """The limits of stages that are judged together: of those in the manifest, the loosest."""
    found = {PRECISIONS[stage.precision].limits for stage in manifest.stages if stage.name in stages}
    return max(found, key=lambda each: each.logits)


@dataclass(frozen=True)
class Check:
    """One measured value and its limit."""

    stage: str
    metric: str
    value: float
    limit: float
    passed: bool


def at_most(stage: str, metric: str, value: float, limit: float) -> Check:
    """A check that passes if value <= limit; NaN fails, and so does a limit that is not finite."""
    # JSON has no infinity and no NaN.
    shown, bound = (float(x) if math.isfinite(x) else sys.float_info.max for x in (value, limit))
    return Check(stage, metric, shown, bound, bool(value <= limit < math.inf))


def at_least(stage: str, metric: str, value: float, limit: float) -> Check:
    """A check that passes if value >= limit."""
    return Check(stage, metric, float(value), float(limit), bool(value >= limit))


def compare_logits(name: str, logits: Tensor, expected: Tensor, limits: Limits) -> list[Check]:
    """Checks logits [..., K] against those of the reference."""
    difference, largest = (logits - expected).abs(), float(expected.abs().max())
    differing = (logits.argmax(-1) != expected.argmax(-1)).float().mean()
    return [
        at_most("step", f"{name}: {_LARGEST}", float(difference.max()), limits.logits * largest),
        at_most("step", f"{name}: mean difference of logits", float(difference.mean()), limits.mean_logits * largest),
        at_most("step", f"{name}: share of top-1 codes that differ", float(differing), limits.likeliest),
    ]


def compare_distributions(
    name: str, logits: Tensor, expected: Tensor, limits: Limits, scale: float = 1.0
) -> list[Check]:
    """Checks the distributions of codes, of logits [..., K] at codes that the plan drew, against the reference.

    Guidance by `scale` amplifies errors of logits as much; the divergence grows with their square.
    """
    best = expected.topk(2).values
    clear = best[..., 0] - best[..., 1] > 4 * (logits - expected).abs().mean()
    differing = (logits.argmax(-1) != expected.argmax(-1))[clear]
    found, wanted = logits.double().log_softmax(-1), expected.double().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
    variation = (wanted.exp() - found.exp()).abs().sum(-1).mean() / 2
    values = {
        "share of clear top-1 codes that differ": (float(differing.sum()) / max(len(differing), 1), limits.clear),
        "Kullback-Leibler divergence": (float(divergence), scale**2 * limits.divergence),
        "total variation distance": (float(variation), scale * limits.variation),
    }
    return [at_most("step", f"{name}: {metric}", value, limit) for metric, (value, limit) in values.items()]


Judge = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""As `judge`, for codes [B, ...] of labels from an image on; both results have the shape of the codes."""


def check_repeats(
    pipeline: Pipeline, codes: np.ndarray, labels: np.ndarray, options: dict[str, Any], judged: Judge
) -> list[Check]:
    """A second run against the codes of the first, and one image alone against itself in the batch."""
    again = pipeline.generate(labels, seed=SEED, **options).codes
    chosen = IMAGES - 2
    label = labels[chosen : chosen + 1]
    alone = pipeline.generate(label, seed=SEED, first_image=chosen, **options).codes
    far, close = judged(alone, label, chosen)
    different = np.flatnonzero((alone != codes[chosen : chosen + 1]).ravel())
    excused = different.size == 0 or close.ravel()[different[0]]
    return [
        at_most("generate", "codes that differ in a second run", (again != codes).sum(), 0),
        at_most("generate", "image alone: tokens outside the margin rule", far.sum() + (not excused), 0),
    ]


def tolerance_of(checks: list[Check]) -> float:
    """Tolerance of the margin rule: twice the measured deviation of logits, capped by the limits."""
    return 2 * max(min(check.value, check.limit) for check in checks if check.metric.endswith(_LARGEST))


def own_tolerance(logits: Tensor) -> float:
    """Tolerance of the margin rule for logits of the plan itself.

    They judge the draws of a quantized prior, whose logits are too far from the reference's. That these are right is
    checked apart.
    """
    return 2 * _OWN * float(logits.abs().max())


def judge(
    logits: Tensor, noise: Tensor, drawn: Tensor, options: dict[str, Any], tolerance: float
) -> tuple[Tensor, Tensor]:
    """Judges drawn codes by the margin rule.

    Args:
        logits: Logits of the reference [N, K].
        noise: Gumbel noise of the draw [N, K].
        drawn: Codes [N].
        options: `temperature`, `top_k` and `top_p` of the draw, one number each.
        tolerance: Allowed deviation of logits.

    Returns:
        Bool [N]: codes that the reference would clearly not have drawn; and bool [N]: close calls, where its two best
        candidates are within the tolerance.
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
    """Codes [N, K] that truncation surely keeps, and those it may keep, for logits that are off by up to `slack`."""
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
    mass = _MASS + slack / 2  # an error s of logits changes a probability p by up to 2 s p (1 - p)
    surely = scaled >= lowest_kept(max(top_p - mass, 0.0)) + slack
    surely |= scaled >= scaled.amax(1, keepdim=True)
    return surely, scaled >= lowest_kept(min(top_p + mass, 1.0)) - slack
