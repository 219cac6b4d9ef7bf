"""Memory that the C library keeps for later."""

import ctypes
import sys

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # musl has none


def return_freed() -> None:
    """Returns freed memory to the system: engines free a third of what they allocate while they open."""
    if _trim:
        _trim(0)
