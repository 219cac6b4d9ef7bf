"""Parallel decoding of masked codes: one engine call per step, which draws every masked code.

Chang et al., "MaskGIT: Masked Generative Image Transformer" (CVPR 2022), section 3.2 and its public code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vqdeploy.runtime.interface import Tensors, floats, sampling_options, whole
from vqdeploy.runtime.manifest import SamplingInfo, StageInfo, TokenizerInfo
from vqdeploy.runtime.sampler import Item, Sampler, write_options
from vqdeploy.runtime.schedules import BY_ORDER, choice_temperature, masked_counts, order_noise
from vqdeploy.runtime.session import Session

_CALL_LOGITS = {"cpu": 2**20, "cuda": 2**27}  # larger batches are no faster on a CPU and need more memory


@dataclass
class _Progress:
    """Progress of an image: the number of steps done, and how many codes each step masks again [T]."""

    done: int
    counts: np.ndarray
    by_order: bool
    greedy: np.ndarray


class MaskedSampler(Sampler):
    """Runs the stage `step` of a masked prior, with two labels per image under guidance."""

    raster = False
    needs = (*Sampler.needs, "steps", "schedule", "choice_temperature")

    def _prepare(self, sessions: Mapping[str, Session], tokenizer: TokenizerInfo) -> None:
        self._session = session = sessions["step"]
        slots, self._shape = self.slots, self._layout.shape
        self._dims = dims = {"batch": slots, "conditions": 2 if self.guided else 1}
        # The codes stay on the device of the engine from step to step.
        self._binding = session.bind(dims, session.buffers(dims, "codes", "given"))
        self._result = session.array(np.zeros((slots, *self._shape), np.int64))
        self._progress: dict[int, _Progress] = {}

    @classmethod
    def inputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """The graph inputs that the sampler writes, by stage."""
        grid = tokenizer.maps[0]
        state = {"codes": whole(*grid), "given": whole(*grid), "masked": whole()}
        noise = {"noise": floats(*grid, tokenizer.codebook_size), "choice_noise": floats(*grid)}
        guidance = {"label": whole("conditions"), "guidance": floats("conditions")}
        options = sampling_options(grid[2]) | {"choice_temperature": floats()}
        return {"step": state | noise | guidance | options}

    @classmethod
    def outputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """What the sampler reads, stage by stage."""
        return {"step": dict.fromkeys(("drawn", "remaining"), whole(*tokenizer.maps[0]))}

    @classmethod
    def most_slots(cls, stages: Mapping[str, StageInfo], device: str) -> int:
        """Most slots of a sampler, for speed."""
        logits = next(info for info in stages["step"].inputs if info.name == "noise")
        return max(1, _CALL_LOGITS[device] // math.prod(size for size in logits.shape if isinstance(size, int)))

    def _left_of(self, slot: int) -> int:
        """Engine calls until the image of a slot is done."""
        progress = self._progress[slot]
        return len(progress.counts) - progress.done

    def _codes_of(self, slot: int) -> np.ndarray:
        """Codes int64 [h, w, Q] so far: -1 - c for a tentative code c, -1 before the first step."""
        if self._progress[slot].done == 0:
            return self._items[slot].known.copy()
        if self._left_of(slot) == 0:
            settled: np.ndarray = self._read("step", self._result)[slot].copy()
            return settled
        outputs = self._binding.outputs
        drawn, remaining = (self._read("step", outputs[name])[slot] for name in ("drawn", "remaining"))
        codes: np.ndarray = np.where(remaining == self._size, -1 - drawn, drawn)
        return codes

    def _admit(self, slot: int, item: Item) -> None:
        inputs, options = self._binding.inputs, item.options
        unknown = int((item.known < 0).sum())
        by_order = options["schedule"] == "halton"
        counts = masked_counts(options["schedule"], unknown, options["steps"] if unknown else 0)
        greedy = write_options(options, inputs, slot, self._shape[-1], self._size)
        self._progress[slot] = _Progress(0, counts, by_order, greedy)
        self._result[slot] = item.known
        inputs["codes"][slot] = inputs["given"][slot] = np.where(item.known < 0, self._size, item.known)
        # Without guidance the second label has weight 0, which changes no logit.
        scale = options["guidance_scale"] if self.guides(item) else 1
        filler = item.condition if self.no_label is None else self.no_label
        inputs["label"][slot], inputs["guidance"][slot] = filler, 1 - scale
        inputs["label"][slot, 0], inputs["guidance"][slot, 0] = item.condition, scale
        if by_order:
            inputs["choice_noise"][slot], inputs["choice_temperature"][slot] = order_noise(self._shape), BY_ORDER

    def _call(self) -> None:
        binding, inputs = self._binding, self._binding.inputs
        running = {slot: self._progress[slot] for slot in sorted(self._running)}
        greedy = {slot: progress.greedy for slot, progress in running.items()}
        self._fill_noise(inputs["noise"], {slot: 2 * progress.done for slot, progress in running.items()}, greedy)
        self._fill_choice({slot: progress for slot, progress in running.items() if not progress.by_order})
        for slot, progress in running.items():
            inputs["masked"][slot] = progress.counts[progress.done]
        used = slice(0, self._used_slots(self._session))
        self._run("step", self._part(self._session, binding, self._dims, batch=used))
        drawn, remaining = binding.outputs["drawn"], binding.outputs["remaining"]
        inputs["codes"][:] = remaining
        # The Halton order draws earlier codes again.
        if any(progress.by_order for progress in running.values()):
            for slot in (slot for slot, progress in running.items() if not progress.by_order):
                inputs["given"][slot] = remaining[slot]
        else:
            inputs["given"][:] = remaining
        for slot, progress in running.items():
            progress.done += 1
            if progress.done == len(progress.counts):
                self._result[slot] = drawn[slot]

    def _fill_choice(self, running: Mapping[int, _Progress]) -> None:
        """The choice noise, added to the confidence; it fades out over the steps."""
        noise: Any = self._binding.inputs["choice_noise"]  # an array of the host
        weights = self._binding.inputs["choice_temperature"]
        items = {slot: self._items[slot] for slot in running}
        keys = [(item.seed, item.image, 2 * running[slot].done + 1) for slot, item in items.items()]
        self.draw(keys, [noise[slot] for slot in items])
        for slot, item in items.items():
            start, steps = item.options["choice_temperature"], item.options["steps"]
            weights[slot] = choice_temperature(start, running[slot].done, steps)
