"""Validates arguments from Python and converts them to arrays."""

from numbers import Integral, Real
from typing import TypeGuard

import numpy as np

from vqdeploy.errors import VqdeployError, one_line

LARGEST = 2**62
"""Upper bound of seeds and image indices, which key the noise."""

MOST_THREADS = 4096
"""Upper bound of CPU threads, more than any machine has."""


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, numpy's too; bool does not count."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(lowest: int = 0, most: int = LARGEST, **named: object) -> None:
    """Rejects values that are not integers in `lowest`..`most`.

    Raises:
        VqdeployError: It names the first such argument.
    """
    for name, value in named.items():
        if not is_whole(value) or not lowest <= value <= most:
            expected = f"an integer in {lowest}..{most}"
            raise VqdeployError(f"{name} is out of range", expected=expected, found=one_line(value, 80))


def as_array(name: str, value: object) -> np.ndarray:
    """`value` as a numpy array.

    Raises:
        VqdeployError: It is ragged.
    """
    try:
        return np.asarray(value)
    except Exception as error:  # an object may raise anything when it is asked for an array
        found = one_line(value, 80)
        raise VqdeployError(f"{name} cannot be an array", expected="rows of one length", found=found) from error


def as_numbers(name: str, value: object, whole: bool = False) -> np.ndarray:
    """A number, nested list or array as an array: float64, or int64 with `whole`. Strings and bool are rejected.

    Raises:
        VqdeployError: An element has another type.
    """
    if whole and isinstance(value, np.ndarray) and value.dtype.kind == "i":
        return value.astype(np.int64)
    try:
        array = np.asarray(value, object)
        if all(is_whole(item) if whole else _is_number(item) for item in array.flat):
            return array.astype(np.int64 if whole else float)
    except Exception:  # noqa: S110 (likewise; the error follows)
        pass
    expected = "integers" if whole else "a number"
    raise VqdeployError(f"{name} is malformed", expected=expected, found=one_line(value, 80))


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
