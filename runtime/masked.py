"""Parallel masked decoding: one engine call a step, every masked code drawn in each.

Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022), section 3.2 and its public code.
"""

import math
import time
from functools import partial
from typing import Any

import numpy as np

from vqdeploy.runtime.kept import kept
from vqdeploy.runtime.noise import gumbel
from vqdeploy.runtime.request import Callback, Request, Sampler, cells_of, still_where_greedy, write_options
from vqdeploy.runtime.schedules import BY_ORDER, choice_temperature, masked_counts, order_noise

_CALL_LOGITS = {"cpu": 2**20, "cuda": 2**27}  # more images at once are no faster on a CPU and need more memory
_MASK_DRAW = 2**32  # index of the noise that chooses a random mask; steps stay far below it


class MaskedSampler(Sampler):
    """Runs the `step` stage of a masked prior."""

    options = (*Sampler.options, "steps", "schedule", "guidance_scale", "choice_temperature")
    keeps_pixels = True

    def __init__(self, sessions: dict[str, Any], prior: dict[str, Any]):
        super().__init__()
        session = sessions["step"]
        self.no_label = prior["classes"]
        logits = next(info for info in session.stage.inputs if info.name == "noise")
        self.call_images = max(1, _CALL_LOGITS[session.device] // math.prod(logits.shape[1:]))
        self._bound = kept(partial(_bound, session), session.device)

    @staticmethod
    def inputs(prior: dict[str, Any]) -> dict[str, frozenset[str]]:
        """What the sampler writes to, stage by stage."""
        names = "codes given label guidance noise choice_noise masked temperature choice_temperature"
        return {"step": frozenset(names.split())}

    def __call__(self, request: Request, callback: Callback | None = None) -> np.ndarray:
        """Codes int64 [B, h, w, Q]: the known ones, and samples elsewhere."""
        self.seconds.clear()
        batch, steps, schedule = len(request.known), request.options["steps"], request.options["schedule"]
        unknown = (request.known < 0).reshape(batch, -1).sum(1)
        if not unknown.any():
            return request.known
        binding = self._binding(request)
        inputs, size = binding.inputs, binding.inputs["noise"].shape[-1]
        counts = np.stack([masked_counts(schedule, int(n), steps) for n in unknown], 1)  # [T, B]
        inputs["codes"][:] = inputs["given"][:] = np.where(request.known < 0, size, request.known)
        for step in range(steps):
            gumbel(request.seed, request.images, 2 * step, inputs["noise"])
            still_where_greedy(inputs)
            _write_choice(inputs, request, step)
            inputs["masked"][:] = counts[step]
            start = time.perf_counter()
            binding.run()
            self.seconds["step"] += time.perf_counter() - start
            drawn, remaining = binding.outputs["drawn"], binding.outputs["remaining"]
            inputs["codes"][:] = remaining
            if schedule != "halton":  # by order, codes found earlier are drawn again
                inputs["given"][:] = remaining
            if callback:
                found, left = np.array(drawn), np.array(remaining)
                open_codes = (left == size) & (step + 1 < steps)
                callback(step + 1, steps, np.where(open_codes, -1 - found, found))
        return self.read("step", drawn)

    def _binding(self, request: Request) -> Any:
        """Buffers with the label and the options of a request written into them."""
        batch, scale = len(request.known), request.options["guidance_scale"]
        conditions = 1 if scale == 1 or (request.labels == self.no_label).all() else 2
        binding = self._bound(batch, conditions)
        binding.inputs["label"][:] = self.no_label
        binding.inputs["label"][:, 0] = request.labels
        binding.inputs["guidance"][:] = 1 - scale
        binding.inputs["guidance"][:, 0] = scale if conditions == 2 else 1
        write_options(request.options, binding.inputs, size=binding.inputs["noise"].shape[-1])
        return binding

    def unknown(self, mask: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
        """The codes to draw [B, h, w, Q], where pixels are unknown [B, H, W]."""
        return np.repeat(cells_of(mask, *grid[:2])[..., None], grid[2], -1)

    def unknown_share(self, ratio: float, grid: tuple[int, ...], images: np.ndarray, seed: int) -> np.ndarray:
        """A share of the codes of each image [B, h, w, Q], each position and channel chosen by itself."""
        noise = np.empty((len(images), *grid), np.float32)
        gumbel(seed, images, _MASK_DRAW, noise)
        ranks = noise.reshape(len(images), -1).argsort(1).argsort(1)
        return (ranks < round(ratio * ranks.shape[1])).reshape(noise.shape)


def _bound(session: Any, batch: int, conditions: int) -> Any:
    """Buffers for a batch; the codes that one step leaves for the next stay with the engine."""
    dims = {"batch": batch, "conditions": conditions}
    return session.bind(dims, session.buffers(dims, "codes", "given"))


def _write_choice(inputs: dict[str, np.ndarray], request: Request, step: int) -> None:
    """What is added to the confidence: noise that fades out, or the order."""
    if request.options["schedule"] == "halton":
        inputs["choice_noise"][:] = order_noise(request.known.shape[1:])
        inputs["choice_temperature"][:] = BY_ORDER
    else:
        gumbel(request.seed, request.images, 2 * step + 1, inputs["choice_noise"])
        start, steps = request.options["choice_temperature"], request.options["steps"]
        inputs["choice_temperature"][:] = choice_temperature(start, step, steps)
