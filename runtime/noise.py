"""Random numbers that depend only on the seed, the image and the draw."""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vqdeploy.runtime.threads import cores

Key = tuple[int, int, int]
"""Seed, index of the image and index of the draw, all nonnegative."""

Draw = Callable[[Sequence[Key], Iterable[np.ndarray]], None]
"""Fills each array float32 with noise, from its key."""

_SMALLEST = np.float32(2**-25)  # in place of u = 0, whose logarithm is infinite
_STEP = np.float32(2**-24)
_BLOCK = 8  # numbers of one count of Philox
_WORTH_A_THREAD = 2**16  # numbers; waking a thread and passing the GIL back and forth takes as long as half of them


def gumbel(keys: Sequence[Key], rows: Iterable[np.ndarray]) -> None:
    """Fills each row float32 with standard Gumbel noise, -log(-log(u)).

    Philox is keyed by (seed, image) and its counter starts at the index of the draw, so that an image gets the same
    noise alone, in any batch, and on any backend. Only raw bits are used: numpy guarantees their stream.

    Args:
        keys: One per row.
        rows: Output, contiguous.
    """
    for key, row in zip(keys, rows, strict=True):
        _fill(key, row.reshape(-1))


def of_images(seed: int, images: Sequence[int], draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """The noise of one draw of several images, float32 [B, *shape]."""
    noise = np.empty((len(images), *shape), np.float32)
    gumbel([(seed, image, draw) for image in images], noise)
    return noise


class ThreadedNoise:
    """`gumbel` on several threads, 0 for one per core; numpy releases the GIL while it draws.

    Threads may share a row, since the counter of Philox can start anywhere. They start on first use, and again in a
    forked process.
    """

    def __init__(self, threads: int = 0):
        self._threads = threads or cores()
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def __call__(self, keys: Sequence[Key], rows: Iterable[np.ndarray]) -> None:
        """As `gumbel`."""
        flat = [row.reshape(-1) for row in rows]
        threads = min(self._threads, sum(row.size for row in flat) // _WORTH_A_THREAD)
        if threads < 2:
            gumbel(keys, flat)
            return
        own, *others = _shares(keys, flat, threads)
        drawn = [self._running_pool().submit(_fill_all, share) for share in others]
        _fill_all(own)
        for share in drawn:
            share.result()

    def _running_pool(self) -> ThreadPoolExecutor:
        if self._pool is None or self._process != os.getpid():
            self._pool, self._process = ThreadPoolExecutor(self._threads, "noise"), os.getpid()
        return self._pool


class _Philox(threading.local):
    """One generator per thread: setting its state takes a third of the time of making a new one."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._state: Any = self._bits.state

    def raw(self, key: Key, start: int, count: int) -> np.ndarray:
        """32-bit numbers of `Philox(key=[seed, image], counter=[0, 0, 0, draw])`; `start` is a multiple of `_BLOCK`."""
        seed, image, draw = key
        self._state["state"]["key"][:] = seed, image
        self._state["state"]["counter"][:] = start // _BLOCK, 0, 0, draw
        self._bits.state = self._state
        raw: np.ndarray = self._bits.random_raw((count + 1) // 2)
        return raw.astype("<u8", copy=False).view("<u4")[:count]


_philox = _Philox()


_Part = tuple[Key, np.ndarray, int]
"""Key of a row, a part of it, and where in the row the part starts."""


def _shares(keys: Sequence[Key], rows: Sequence[np.ndarray], count: int) -> list[list[_Part]]:
    """Cuts rows into `count` shares of nearly equal size."""
    size = sum(row.size for row in rows) // count + 2 * _BLOCK  # up to a block is lost where a row ends
    shares: list[list[_Part]] = [[]]
    room = size
    for key, row in zip(keys, rows, strict=True):
        start = 0
        while start < row.size:
            if room < _BLOCK:
                shares.append([])
                room = size
            part = row[start : start + room // _BLOCK * _BLOCK]
            shares[-1].append((key, part, start))
            start += part.size
            room -= part.size
    return shares


def _fill_all(share: Sequence[_Part]) -> None:
    for part in share:
        _fill(*part)


def _fill(key: Key, flat: np.ndarray, start: int = 0) -> None:
    bits = _philox.raw(key, start, flat.size)
    bits >>= 8
    np.multiply(bits, _STEP, out=flat, dtype=np.float32, casting="unsafe")
    np.maximum(flat, _SMALLEST, out=flat)
    for _ in range(2):
        np.log(flat, out=flat)
        np.negative(flat, out=flat)
