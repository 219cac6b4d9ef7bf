"""Schedules of parallel decoding, shared with no sampler of plans: `verify` judges those by it.

Chang et al., "MaskGIT" (CVPR 2022), section 3.3, and the public codes that `docs/movq.md` names.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor


def masked_counts(schedule: str, codes: int, steps: int) -> list[int]:
    """How many of the codes to draw stay masked after each step: fewer each time, but one at least."""
    counts = [codes]
    for wanted in _arccos(codes, steps) if schedule == "arccos" else _by_share(schedule, codes, steps):
        counts.append(max(min(wanted, counts[-1] - 1), 1))
    return counts[1:]


def _by_share(schedule: str, codes: int, steps: int) -> list[int]:
    ratios = [step / steps for step in range(1, steps + 1)]
    if schedule == "halton":  # rounds what is drawn, not what stays
        return [codes - int(codes * (1 - 2 * math.acos(ratio) / math.pi)) for ratio in ratios]
    return [math.floor(codes * max(_share(schedule, ratio, codes), 1e-6)) for ratio in ratios]


def _share(schedule: str, ratio: float, codes: int) -> float:
    """The mask scheduling function gamma(r)."""
    bits = math.log2(max(codes, 2))  # a single code has none
    match schedule:
        case "cosine":
            return math.cos(ratio * math.pi / 2)
        case "exp":
            return 1 - 2 ** (bits * (ratio - 1))
        case "log":
            return min(-math.log2(ratio) / bits, 1)
    return 1 - ratio ** {"linear": 1, "square": 2, "cubic": 3}[schedule]


def _arccos(codes: int, steps: int) -> list[int]:
    """Each step draws a share of the codes that grows like the arc cosine of a line from 1 to 0; the last the rest."""
    angles = [math.acos(1 - step / max(steps - 1, 1)) for step in range(steps)]
    drawn = [max(1, round(angle / sum(angles) * codes)) for angle in angles[:-1]]
    return [*(codes - total for total in itertools.accumulate(drawn)), 0]


def choice_weight(start: float, step: int, steps: int) -> float:
    """Weight of the noise on the confidence after a step, counted from 0: none after the last (section 3.2)."""
    return start * (1 - (step + 1) / steps)


def halton_ranks(grid: tuple[int, ...]) -> Tensor:
    """Rank of each code in the Halton order, float32 [h, w, Q]; the channels of a position follow each other."""
    height, width, depth = grid
    cells: dict[tuple[int, int], int] = {}
    for index in itertools.count(1):
        cells.setdefault((_mirrored(index, 2, height), _mirrored(index, 3, width)), len(cells))
        if len(cells) == height * width:
            break
    ranks = torch.tensor([[cells[row, column] for column in range(width)] for row in range(height)])
    return (ranks[..., None] * depth + torch.arange(depth)).float()


def _mirrored(index: int, base: int, size: int) -> int:
    """The radical inverse of an index, its digits after the point in reverse, as one of `size` cells."""
    digits = np.base_repr(index, base)[::-1]
    cell: int = int(digits, base) * size // base ** len(digits)
    return cell
