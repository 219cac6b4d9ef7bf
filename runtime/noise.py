"""Random numbers that depend on the seed, the image and the step, and on nothing else."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

_SMALLEST = np.float32(2**-25)  # stands for u = 0, whose logarithm is infinite
_WORTH_A_THREAD = 2**14  # draws per image
_pool = ThreadPoolExecutor(os.cpu_count(), "noise")  # numpy releases the interpreter while it draws


def gumbel(seed: int, images: np.ndarray, step: int, out: np.ndarray) -> None:
    """Fills `out` [B, ...] float32 with standard Gumbel noise, -log(-log(u)).

    Philox is keyed by (seed, image index) and its counter starts at the step, so that image i gets the same noise
    alone, in any batch, and on any backend.

    Args:
        seed: At least 0.
        images: Index of each image [B].
        step: Index of the engine call.
        out: Where the noise goes, contiguous.
    """
    keys = [(seed, int(image), step) for image in images]
    rows = out.reshape(len(keys), -1)
    threaded = len(rows) > 1 and rows.shape[1] >= _WORTH_A_THREAD
    list((_pool.map if threaded else map)(_fill, keys, rows))


class _Philox(threading.local):
    """A generator of each thread; to set its state takes a third of the time that a new one takes."""

    def __init__(self) -> None:
        self.generator = np.random.Generator(np.random.Philox(key=0))
        self._state: Any = self.generator.bit_generator.state

    def at(self, seed: int, image: int, step: int) -> np.random.Generator:
        """As made with `Philox(key=[seed, image], counter=[0, 0, 0, step])`."""
        self._state["state"]["key"][:] = seed, image
        self._state["state"]["counter"][:] = 0, 0, 0, step
        self.generator.bit_generator.state = self._state
        return self.generator


_philox = _Philox()


def _fill(key: tuple[int, int, int], row: np.ndarray) -> None:
    _philox.at(*key).random(dtype=np.float32, out=row)
    np.maximum(row, _SMALLEST, out=row)
    for _ in range(2):
        np.log(row, out=row)
        np.negative(row, out=row)
