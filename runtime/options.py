"""Sampling options: as users give them, and as the graphs take them."""

from typing import Any

import numpy as np

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.arguments import as_numbers
from vqdeploy.runtime.schedules import SCHEDULES

_COLDEST, _HOTTEST = 1e-20, 1e20  # temperatures beyond which quotients of logits leave fp32

_STRONGEST = 1e6  # far from where confidence in known codes or fp32 ends

_PER_DEPTH, _WHOLE = ("temperature", "top_k", "top_p"), ("top_k", "steps")

_LIMITS = {
    "temperature": (0, np.inf),
    "top_k": (0, np.inf),
    "top_p": (0, 1),
    "steps": (1, 10_000),
    "guidance_scale": (0, _STRONGEST),
    "choice_temperature": (0, _STRONGEST),
}


def choose(given: dict[str, Any], defaults: dict[str, Any], depth: int, codebook_size: int) -> dict[str, Any]:
    """The options in force, as numbers, names, or lists of one number for each depth.

    Args:
        given: Some of the options; None for the default.
        defaults: All options that the system has, with the checkpoint's values.
        depth: Codes per position.
        codebook_size: Number of codes.

    Raises:
        VqdeployError: A value is malformed or out of range, or the system has no such option.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(set(given) - set(defaults)):
        raise VqdeployError(f"this system has no option {unknown[0]}", expected=", ".join(defaults), found=unknown[0])
    chosen = defaults | given
    return {name: _check(name, value, depth, codebook_size) for name, value in chosen.items()}


def _check(name: str, value: Any, depth: int, codebook_size: int) -> Any:
    if name == "schedule":
        if value not in SCHEDULES:
            raise VqdeployError("there is no such schedule", expected=" or ".join(SCHEDULES), found=value)
        return value
    low, high = _LIMITS[name]
    high = codebook_size if name == "top_k" else high
    values, most = np.atleast_1d(as_numbers(name, value)), depth if name in _PER_DEPTH else 1
    if values.shape not in ((1,), (most,)):
        expected = f"one value or {most}" if most > 1 else "one value"
        raise VqdeployError(f"{name} has the wrong number of values", expected=expected, found=values.size)
    if not np.all((values >= low) & (values <= high) & np.isfinite(values)):
        expected = f"{low}..{high}" if np.isfinite(high) else f"a finite number from {low} on"
        raise VqdeployError(f"{name} is out of range", expected=expected, found=value)
    if name in _WHOLE and np.any(values % 1):
        raise VqdeployError(f"{name} is malformed", expected="whole numbers", found=value)
    if name in _PER_DEPTH:
        return np.asarray(value).tolist()
    return int(values[0]) if name in _WHOLE else float(values[0])


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
