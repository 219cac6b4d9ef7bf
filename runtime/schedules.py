"""Which codes a parallel decoder settles, and when: mask counts and the Halton order."""

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
"""Share of n codes that stays masked after a share r of the steps, as in google-research/maskgit."""

SCHEDULES = (*_SHARES, "arccos", "halton")
"""`arccos` counts as valeoai/Maskgit-pytorch does. `halton` goes through the positions in a fixed order that spreads
over the image, whatever the confidence, as valeoai/Halton-MaskGIT does."""


def masked_counts(schedule: str, unknown: int, steps: int) -> np.ndarray:
    """Number of codes to mask again after each step [steps] int64, when none tie.

    The last is of no consequence: the answer is what the last step draws.

    Args:
        schedule: One of `SCHEDULES`.
        unknown: Number of codes to find, N.
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
    # In Python's own arithmetic: numpy's differs in the last bit from one processor to the next.
    shares = [step / steps for step in range(1, steps + 1)]
    if schedule == "arccos":
        counts: list[int] = (unknown - np.cumsum(_arccos_gains(unknown, steps))).tolist()
        return counts
    if schedule == "halton":
        return [unknown - int((1 - math.acos(r) / (math.pi / 2)) * unknown) for r in shares]
    share = _SHARES[schedule]
    return [math.floor(unknown * min(max(share(r, max(unknown, 2)), 1e-6), 1)) for r in shares]


def _arccos_gains(unknown: int, steps: int) -> list[int]:
    """Codes that each step settles: the arc cosine of a falling line, scaled to their number and rounded."""
    values = [math.acos(1 - step / (steps - 1)) for step in range(steps)] if steps > 1 else [1.0]
    total = sum(values)
    gains = [max(round(value / total * unknown), 1) for value in values]
    gains[-1] += unknown - sum(gains)
    return gains


BY_ORDER = 1e6
"""Choice temperature beside which a log-probability counts for nothing."""


def choice_temperature(start: float, step: int, steps: int) -> float:
    """Weight of the noise on the confidence in a step, counted from 0: it fades out in a line."""
    return start * (1 - (step + 1) / steps)


def order_noise(grid: tuple[int, ...]) -> np.ndarray:
    """In place of the choice noise, to settle codes by order [h, w, Q]: minus the rank of each in Halton order.

    The channels of a position come one after the other.
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
    """The cell, of `size`, of a member of the van der Corput sequence: its digits mirrored at the point."""
    numerator, denominator = 0, 1
    while index:
        index, digit = divmod(index, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return numerator * size // denominator
