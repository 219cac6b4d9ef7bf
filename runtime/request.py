"""What a sampling loop is asked for."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vqdeploy.runtime.options import for_graph

Callback = Callable[[int, int, np.ndarray], None]
"""Called after each step with its number from 1, the number of steps, and the codes so far.

A code that is not settled is negative: -1 - c where a masked prior would put c for now, -1 where nothing is drawn yet.
"""


@dataclass
class Request:
    """What to sample, for a batch of B images. Nothing is shared by the batch but the seed and the options.

    `known` holds the codes that are given, int64 [B, *grid], and -1 where a code is to be drawn. `images` are the
    indices that key the noise. `options` come from `options.choose`.
    """

    known: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    seed: int
    options: dict[str, Any]


class Sampler:
    """What the sampling loops have in common; a request goes to `__call__`.

    `options` names the sampling options, `no_label` is the label that stands for no class, `call_images` the number of
    images that one call may take, and `keeps_pixels` tells whether what surrounds a mask can stay as it is. `seconds`
    tells how much of the time of the last request each stage took.
    """

    options: tuple[str, ...] = ("temperature", "top_k", "top_p")
    no_label: int | None = None
    keeps_pixels = False
    call_images = 2**31

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def read(self, stage: str, values: Any) -> np.ndarray:
        """What engine calls left in a buffer [...]; the wait for it counts as time of the stage."""
        start = time.perf_counter()
        values = np.array(values)
        self.seconds[stage] += time.perf_counter() - start
        return values

    def rows(self, labels: np.ndarray, options: dict[str, Any]) -> int:
        """How many rows of an engine's batch each image takes."""
        return 1


def cells_of(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Which cells of a grid [B, height, width] a mask of pixels [B, H, W] touches."""
    pixels = mask.reshape(len(mask), height, mask.shape[1] // height, width, -1)
    return np.logical_or.reduce(pixels, (2, 4))


def still_where_greedy(inputs: dict[str, np.ndarray]) -> None:
    """No noise [B, ..., Q, K] where only the likeliest code may be drawn.

    Logits in half precision often tie, and what ties is kept together: noise would draw one of them.
    """
    greedy = inputs["top_k"][0] == 1  # the same for all rows
    if greedy.any():
        inputs["noise"][..., greedy, :] = 0


def write_options(options: dict[str, Any], inputs: dict[str, np.ndarray], size: int) -> None:
    """Writes the options of the sampler into the inputs [B, Q] of a graph; `size` is that of the codebook."""
    for name, values in for_graph(options, inputs["temperature"].shape[1], size).items():
        inputs[name][:] = values
