"""Schedules of parallel decoding: mask counts per step, and the Halton order."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np

_SHARES: dict[str, Callable[[float, int], float]] = {
    "cosine": lambda r, n: math.cos(math.pi / 2 * r),
    "linear": lambda r, n: 1 - r,
    "square": lambda r, n: 1 - r**2,
    "cubic": lambda r, n: 1 - r**3,
    "exp": lambda r, n: 1 - 2 ** (-math.log2(n) * (1 - r)),
    "log": lambda r, n: -math.log2(r) / math.log2(n),
}
"""Schedule -> f(r, n), the fraction of n codes that stays masked after a fraction r of the steps, as in
google-research/maskgit."""

SCHEDULES = (*_SHARES, "arccos", "halton")
"""All schedules. `arccos` has the counts of valeoai/Maskgit-pytorch. `halton` draws the positions in a fixed
low-discrepancy order, independent of the confidence, as valeoai/Halton-MaskGIT does."""


def masked_counts(schedule: str, unknown: int, steps: int) -> np.ndarray:
    """Number of codes to mask again after each step [steps] int64, when none tie.

    The last count has no effect: the result is what the last step draws.

    Args:
        schedule: One of `SCHEDULES`.
        unknown: Number of unknown codes, N.
        steps: Number of steps, T, at least 1.
    """
    if unknown == 0:
        return np.zeros(steps, np.int64)
    counts, left = [], unknown
    for wanted in _wanted(schedule, unknown, steps):
        left = max(1, min(left - 1, wanted))
        counts.append(left)
    return np.array(counts)


def _wanted(schedule: str, unknown: int, steps: int) -> list[int]:
    # Python's math: numpy's last bit differs between processors.
    shares = [step / steps for step in range(1, steps + 1)]
    if schedule == "arccos":
        counts: list[int] = (unknown - np.cumsum(_arccos_gains(unknown, steps))).tolist()
        return counts
    if schedule == "halton":
        return [unknown - int((1 - math.acos(r) / (math.pi / 2)) * unknown) for r in shares]
    share = _SHARES[schedule]
    return [math.floor(unknown * min(max(share(r, max(unknown, 2)), 1e-6), 1)) for r in shares]


def _arccos_gains(unknown: int, steps: int) -> list[int]:
    """Codes that each step fixes: the arc cosine of a falling line, scaled to their number and rounded."""
    values = [math.acos(1 - step / (steps - 1)) for step in range(steps)] if steps > 1 else [1.0]
    total = sum(values)
    gains = [max(round(value / total * unknown), 1) for value in values]
    gains[-1] += unknown - sum(gains)
    return gains


BY_ORDER = 1e6
"""Choice temperature at which the log-probability is negligible."""


def choice_temperature(start: float, step: int, steps: int) -> float:
    """Weight of the choice noise at a step, counted from 0; it falls linearly to 0."""
    return start * (1 - (step + 1) / steps)


def order_noise(grid: tuple[int, ...]) -> np.ndarray:
    """Replaces the choice noise to fix codes in Halton order: minus the rank of each code, float32 [h, w, Q].

    The channels of a position follow each other.
    """
    height, width, depth = grid
    ranks = np.argsort(halton_order(height, width)).reshape(height, width, 1)
    return -(ranks * depth + np.arange(depth)).astype(np.float32)


@cache
def halton_order(height: int, width: int) -> np.ndarray:
    """The positions of a grid in the order of the two-dimensional Halton sequence, bases 2 and 3 [h * w] int64."""
    order: dict[int, None] = {}
    index = 0
    while len(order) < height * width:
        index += 1
        order.setdefault(_cell(index, 2, height) * width + _cell(index, 3, width))
    return np.array(list(order))


def _cell(index: int, base: int, size: int) -> int:
    """A member of the van der Corput sequence (mirrored digits), scaled to 0..size-1."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator * size // denominator
