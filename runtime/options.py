"""Sampling options: as users give them, and as the graphs take them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vqdeploy.errors import VqdeployError

_COLDEST, _HOTTEST = 1e-20, 1e20  # temperatures beyond which quotients of logits leave fp32

PerDepth = float | Sequence[float]
"""One value for all depths, or one for each."""


def choose(given: dict[str, Any], defaults: dict[str, Any], depth: int, codebook_size: int) -> dict[str, Any]:
    """The options in force, as numbers or lists of one for each depth.

    Args:
        given: `temperature`, `top_k` and `top_p`; None for the default.
        defaults: The same, of the checkpoint.
        depth: Codes per position.
        codebook_size: Number of codes.

    Raises:
        VqdeployError: A value is malformed or out of range.
    """
    chosen = {name: defaults[name] if value is None else value for name, value in given.items()}
    limits = {"temperature": (0, np.inf), "top_k": (0, codebook_size), "top_p": (0, 1)}
    for name, value in chosen.items():
        try:
            values, (low, high) = np.atleast_1d(np.asarray(value, float)), limits[name]
        except (TypeError, ValueError, OverflowError) as error:
            raise VqdeployError(f"{name} is malformed", expected="a number", found=value) from error
        if values.shape not in ((1,), (depth,)):
            expected = f"one value or {depth}"
            raise VqdeployError(f"{name} has the wrong number of values", expected=expected, found=values.size)
        if not np.all((values >= low) & (values <= high) & np.isfinite(values)):
            raise VqdeployError(f"{name} is out of range", expected=f"{low}..{high}", found=value)
        if name == "top_k" and np.any(values % 1):
            raise VqdeployError("top_k is malformed", expected="whole numbers", found=value)
        chosen[name] = np.asarray(value).tolist()
    return chosen


def for_graph(chosen: dict[str, Any], depth: int, codebook_size: int) -> dict[str, np.ndarray]:
    """Options as the graph takes them [Q]: temperature above 0, `top_k` in 1..K."""
    temperature = np.broadcast_to(np.clip(np.asarray(chosen["temperature"], float), 0, _HOTTEST), depth)
    top_k = np.broadcast_to(np.asarray(chosen["top_k"], np.int64), depth)
    greedy = temperature < _COLDEST
    return {
        "temperature": np.where(greedy, 1, temperature).astype(np.float32),
        "top_k": np.where(greedy, 1, np.where(top_k == 0, codebook_size, top_k)),
        "top_p": np.broadcast_to(np.asarray(chosen["top_p"], np.float32), depth),
    }
