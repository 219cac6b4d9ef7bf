"""Processes of Python that libraries start for us."""

import contextlib
import os
from collections.abc import Iterator

_SAFE = "PYTHONSAFEPATH"


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Processes that start meanwhile import no module from the current folder, as with `python -P`.

    `multiprocessing` starts its workers and its resource tracker with `python -c`, which looks there first.
    """
    before = os.environ.get(_SAFE)
    os.environ[_SAFE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE]
        else:
            os.environ[_SAFE] = before
