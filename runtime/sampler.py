"""Sampling as an object that steps: images join an engine's batch, go on together, and leave."""

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.interface import Tensors
from vqdeploy.runtime.manifest import SamplingInfo, StageInfo, TokenizerInfo
from vqdeploy.runtime.noise import Draw, Key
from vqdeploy.runtime.options import for_graph
from vqdeploy.runtime.session import Array, Binding, Session


@dataclass(frozen=True)
class Item:
    """One image to sample.

    Attributes:
        known: Codes int64 of the plan's shape, -1 where one is to be drawn.
        label: Its class, or the label that stands for none.
        seed: With `image`, the key of its noise.
        image: Its index.
        options: Sampling options, from `vqdeploy.runtime.options.choose`.
    """

    known: np.ndarray
    label: int
    seed: int
    image: int
    options: dict[str, Any]


class Sampler(ABC):
    """A batch of an engine as slots, each of which holds one image.

    `admit` puts an image into a free slot, `step` is one engine call for all slots, `codes` reads what a slot has so
    far, and `release` frees it, done or not. Nothing is shared by the images but the call: labels, options, noise and
    place in the process are each slot's own, so that an image gets the codes that it gets alone.

    Attributes:
        joins: When `admit` may be called: before any step, or only when no slot is in use.
        raster: Whether codes are drawn from the top left to the bottom right, and so depend on those before alone.
        seconds: Time that each stage took, waits for a GPU included.
        last: The binding of the last engine call, to look at its inputs and outputs.
    """

    joins: ClassVar[Literal["any step", "when empty"]] = "any step"
    raster: ClassVar[bool] = True
    last: Binding

    def __init__(
        self,
        sessions: Mapping[str, Session],
        info: SamplingInfo,
        tokenizer: TokenizerInfo,
        slots: int,
        guided: bool,
        draw: Draw,
    ):
        """Makes a sampler of a number of slots.

        Args:
            sessions: The stages of the plan.
            info: Of the plan.
            tokenizer: Of the plan.
            slots: How many images it holds.
            guided: Whether it takes images with guidance, at twice the work for every slot.
            draw: Fills the noise.
        """
        self._sessions, self._tokenizer = sessions, tokenizer
        self.slots, self.guided, self.no_label = slots, guided, info.no_label
        self.seconds: dict[str, float] = defaultdict(float)
        self.draw = draw
        self._items: dict[int, Item] = {}
        self._running: set[int] = set()
        self._copies: dict[int, tuple[Array, np.ndarray]] = {}  # of buffers, since the last step
        self._begun = False

    @classmethod
    @abstractmethod
    def inputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """What the sampler writes to, stage by stage."""

    @classmethod
    @abstractmethod
    def outputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """What the sampler reads, stage by stage, apart from what one call leaves for the next."""

    @classmethod
    def rows(cls, guided: bool) -> int:
        """Rows of the engine's batch that a slot takes."""
        return 1

    @classmethod
    def most_slots(cls, stages: Mapping[str, StageInfo], device: str) -> int:
        """How many slots are worth having, whatever the engine's largest batch."""
        return 2**31

    def guides(self, item: Item) -> bool:
        """Whether an image needs a sampler with guidance."""
        return needs_guidance(item.options, item.label, self.no_label)

    def admit(self, slot: int, item: Item) -> None:
        """Puts an image into a free slot.

        Raises:
            VqdeployError: The slot is in use, images cannot join now, or the image needs guidance.
        """
        if slot in self._items or not 0 <= slot < self.slots:
            raise VqdeployError(f"slot {slot} is not free", expected=f"a free one of {self.slots}")
        if self.joins == "when empty" and self._begun:
            raise VqdeployError("images cannot join while others run", expected="an empty sampler")
        if self.guides(item) and not self.guided:
            raise VqdeployError("this sampler takes no guidance", expected="a guidance scale of 1")
        self._copies.clear()
        self._admit(slot, item)
        self._items[slot] = item
        self._running.add(slot)

    def step(self) -> list[int]:
        """One engine call for all images that are not done, if there are any; the slots that are now done."""
        done = self._leave()  # those that had nothing to draw
        if self._running:
            self._begun = True
            self._copies.clear()
            self._call()
        return sorted(done | self._leave())

    def _leave(self) -> set[int]:
        """Takes out of the running slots those that are done."""
        done = {slot for slot in self._running if self.left(slot) == 0}
        self._running -= done
        return done

    def release(self, slot: int) -> None:
        """Frees a slot, whether its image is done or not."""
        self._items.pop(slot, None)
        self._running.discard(slot)
        self._begun = self._begun and bool(self._items)

    @abstractmethod
    def left(self, slot: int) -> int:
        """Engine calls until the image of a slot is done."""

    @abstractmethod
    def codes(self, slot: int) -> np.ndarray:
        """Codes int64 of the plan's shape so far; on a GPU this waits.

        A code that is not settled is negative: -1 - c where a masked prior would put c for now, -1 where nothing is
        drawn yet.
        """

    @abstractmethod
    def _admit(self, slot: int, item: Item) -> None: ...

    @abstractmethod
    def _call(self) -> None: ...

    def _run(self, stage: str, binding: Binding) -> None:
        """One engine call, its time added to that of the stage."""
        start = time.perf_counter()
        binding.run()
        self.seconds[stage] += time.perf_counter() - start
        self.last = binding

    def _read(self, stage: str, values: Array) -> np.ndarray:
        """What engine calls left in a buffer [...]; the wait for it counts as time of the stage.

        Between two steps a buffer is copied once, whichever slots are asked for: on a GPU each copy waits.
        """
        if id(values) not in self._copies:
            start = time.perf_counter()
            self._copies[id(values)] = values, np.array(values)
            self.seconds[stage] += time.perf_counter() - start
        return self._copies[id(values)][1]

    def _fill_noise(self, noise: Any, draws: Mapping[int, int], greedy: Mapping[int, np.ndarray]) -> None:
        """Noise of the draw of each slot into its row of `noise` [rows, ..., Q, K].

        There is none where only the likeliest code may be drawn, by `greedy` [Q]: logits in half precision often tie,
        and what ties is kept together, so that noise would draw one of them.
        """
        drawn = [slot for slot in draws if not greedy[slot].all()]
        keys: list[Key] = [(self._items[s].seed, self._items[s].image, draws[s]) for s in drawn]
        self.draw(keys, [noise[slot] for slot in drawn])
        for slot in draws:
            if greedy[slot].any():
                noise[slot][..., greedy[slot], :] = 0


def needs_guidance(options: Mapping[str, Any], label: int, no_label: int | None) -> bool:
    """Whether an image is sampled with guidance: not without a scale, nor without a label to guide to."""
    return options.get("guidance_scale", 1.0) != 1 and label != no_label


def write_options(options: dict[str, Any], inputs: Mapping[str, Array], row: int, depth: int, size: int) -> np.ndarray:
    """Writes sampling options into a row of the inputs [rows, Q] of a graph.

    Args:
        options: From `vqdeploy.runtime.options.choose`.
        inputs: Of a binding.
        row: The row.
        depth: Q.
        size: Of the codebook.

    Returns:
        At which depths [Q] only the likeliest code may be drawn.
    """
    values: dict[str, np.ndarray] = for_graph(options, depth, size)
    for name, value in values.items():
        inputs[name][row] = value
    greedy: np.ndarray = values["top_k"] == 1
    return greedy


def carried(binding: Binding) -> dict[str, Array]:
    """What a call leaves for the next, by the name of its input there, apart from what is updated in place."""
    outputs = binding.outputs
    return {n.replace("present_", "past_", 1): outputs[n] for n in outputs if n.startswith("present_")}
