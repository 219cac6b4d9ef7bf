"""Key-value cached sampling: one engine call a position."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vqdeploy.runtime.noise import gumbel

Callback = Callable[[int, int, np.ndarray], None]
"""Called after each step with its number from 1, the number of steps, and the codes so far."""


@dataclass
class Request:
    """What to sample, for a batch of B images. Nothing is shared by the batch but the seed.

    `known` holds the codes that are given, int64 [B, h * w, Q], and -1 at the positions to sample. `images` are the
    indices that key the noise. Options have one value for each depth [B, Q]; `top_k` is in 1..K.
    """

    known: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    seed: int


class Sampler:
    """Runs the `step` stage of a system. Buffers are made once for each batch size and reused."""

    def __init__(self, session: Any):
        self._session = session
        self._bindings: dict[int, tuple[dict[str, np.ndarray], Any]] = {}
        self.engine_seconds = 0.0

    def __call__(self, request: Request, callback: Callback | None = None) -> np.ndarray:
        """Codes int64 [B, h * w, Q]: the known ones, and samples elsewhere.

        `engine_seconds` then tells how much of the time the engine took.
        """
        self.engine_seconds = 0.0
        codes, unknown = request.known.copy(), request.known[..., 0] < 0
        batch, positions = codes.shape[:2]
        needed = np.flatnonzero(unknown.any(0))
        if needed.size == 0:
            return codes
        first = int(needed[0])
        caches, binding = self._buffers(batch)
        if first > 0:
            prefill = self._session.bind({"batch": batch, "length": first}, caches)
            prefill.inputs["codes"][:, 1:] = codes[:, : first - 1]
            self._call(prefill, request, position=0)
        for position in range(first, positions):
            if position > 0:
                binding.inputs["codes"][:, 0] = codes[:, position - 1]
            gumbel(request.seed, request.images, position, binding.inputs["noise"])
            self._call(binding, request, position)
            sampled = unknown[:, position]
            codes[sampled, position] = binding.outputs["next_codes"][sampled]
            if callback:
                callback(position - first + 1, positions - first, codes)
        return codes

    def _buffers(self, batch: int) -> tuple[dict[str, np.ndarray], Any]:
        if batch not in self._bindings:
            dims = {"batch": batch, "length": 1}
            caches = self._session.caches(dims)
            self._bindings = {batch: (caches, self._session.bind(dims, caches))}  # one batch size at a time
        return self._bindings[batch]

    def _call(self, binding: Any, request: Request, position: int) -> None:
        binding.inputs["position"][:] = position
        for name, value in (
            ("label", request.labels),
            ("temperature", request.temperature),
            ("top_k", request.top_k),
            ("top_p", request.top_p),
        ):
            binding.inputs[name][:] = value
        start = time.perf_counter()
        binding.run()
        self.engine_seconds += time.perf_counter() - start
