"""Buffers that outlive a request."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

# On a GPU as many as the calls of one request have, since buffers, contexts and graphs take long to make there.
_SIZES = {"cpu": 1, "cuda": 2}


def kept(make: Callable[..., Any], device: str) -> Callable[..., Any]:
    """A function that makes buffers for a size of a batch, and gives those of the last sizes again.

    `make` must not refer to what keeps this function: memory of a GPU would wait for the garbage collector.
    """
    return lru_cache(_SIZES[device])(make)
