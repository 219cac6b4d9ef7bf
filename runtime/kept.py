"""Buffers that are reused across requests."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

# On a GPU one for each batch size of a split request: buffers, contexts and graphs are slow to make there.
_SIZES = {"cpu": 1, "cuda": 2}


def kept(make: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Caches `make`, which allocates buffers for a batch size, for the most recent sizes.

    `make` must not refer to the owner of the result: the reference cycle would hold GPU memory for long.
    """
    return lru_cache(_SIZES[device])(make)
