"""Which codes a parallel decoder settles, and when: mask counts and the Halton order."""

from functools import cache

import numpy as np

_SHARES = {
    "cosine": lambda r, n: np.cos(np.pi / 2 * r),
    "linear": lambda r, n: 1 - r,
    "square": lambda r, n: 1 - r**2,
    "cubic": lambda r, n: 1 - r**3,
    "exp": lambda r, n: 1 - 2 ** (-np.log2(n) * (1 - r)),
    "log": lambda r, n: -np.log2(r) / np.log2(n),
}
"""Share of n codes that stays masked after a share r of the steps, as in google-research/maskgit."""

SCHEDULES = (*_SHARES, "arccos", "halton")
"""`arccos` counts as valeoai/Maskgit-pytorch does. `halton` goes through the positions in a fixed order that spreads
over the image, whatever the confidence, as valeoai/Halton-MaskGIT does."""


def masked_counts(schedule: str, unknown: int, steps: int) -> np.ndarray:
    """Number of codes to mask again after each step [steps] int64.

    The last is of no consequence: the answer is what the last step draws.

    Args:
        schedule: One of `SCHEDULES`.
        unknown: Number of codes to find, N.
        steps: Number of steps, T, at least 1.
    """
    r = np.arange(1, steps + 1) / steps
    if unknown == 0:
        return np.zeros(steps, np.int64)
    if schedule in _SHARES:
        shares = np.clip(_SHARES[schedule](r, max(unknown, 2)), 1e-6, 1)
        wanted = np.floor(unknown * shares)
    elif schedule == "arccos":
        wanted = unknown - np.cumsum(_arccos_gains(unknown, steps))
    else:
        wanted = unknown - np.maximum(np.arange(1, steps + 1), (unknown * (1 - np.arccos(r) / (np.pi / 2))).astype(int))
    counts, left = np.empty(steps, np.int64), unknown
    for step in range(steps):
        counts[step] = left = max(1, min(left - 1, int(wanted[step])))
    return counts


def _arccos_gains(unknown: int, steps: int) -> np.ndarray:
    """Codes that each step settles: the arc cosine of a falling line, scaled to their number and rounded."""
    if steps == 1:
        return np.array([unknown])
    values = np.arccos(np.linspace(1, 0, steps))
    gains = np.maximum(np.round(values / values.sum() * unknown), 1)
    gains[-1] += unknown - gains.sum()
    return gains


@cache
def halton_order(height: int, width: int) -> np.ndarray:
    """The positions of a grid in the order of the two-dimensional Halton sequence, bases 2 and 3 [h * w] int64."""
    order: dict[int, None] = {}
    index = 0
    while len(order) < height * width:
        index += 1
        order.setdefault(int(_radical(index, 2) * height) * width + int(_radical(index, 3) * width))
    return np.array(list(order))


def _radical(index: int, base: int) -> float:
    """Digits of the index in this base, mirrored behind the point."""
    value, digit = 0.0, 1.0
    while index:
        digit /= base
        value += digit * (index % base)
        index //= base
    return value
