"""What callers give from Python: as arrays, or refused in one sentence."""

from numbers import Integral, Real
from typing import Any

import numpy as np

from vqdeploy.errors import VqdeployError

LARGEST = 2**62
"""Bound of seeds and image indices, which key the noise."""


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(lowest: int = 0, **named: Any) -> None:
    """Refuses values that are no whole numbers, or out of range."""
    for name, value in named.items():
        if not is_whole(value) or not lowest <= value <= LARGEST:
            expected = f"a whole number in {lowest}..{LARGEST}"
            raise VqdeployError(f"{name} is out of range", expected=expected, found=_shown(value))


def as_array(name: str, value: Any) -> np.ndarray:
    """Anything that has one length in each dimension."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise VqdeployError(f"{name} cannot be an array", expected="rows of one length", found=_shown(value)) from error


def as_numbers(name: str, value: Any, whole: bool = False) -> np.ndarray:
    """A number, or an array of them: float, or int64 when they must be whole. Text and bool are not taken for such."""
    try:
        array = np.asarray(value, object)
        if all(is_whole(item) if whole else _is_number(item) for item in array.flat):
            return array.astype(np.int64 if whole else float)
    except (OverflowError, ValueError):
        pass
    expected = "whole numbers" if whole else "a number"
    raise VqdeployError(f"{name} is malformed", expected=expected, found=_shown(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value on one short line."""
    return " ".join(str(value).split())[:80]
