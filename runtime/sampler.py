"""The base of samplers: images join the batch of an engine, step together, and leave (continuous batching)."""

import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime import options
from vqdeploy.runtime.arguments import as_array, check_whole, is_whole
from vqdeploy.runtime.condition import Condition
from vqdeploy.runtime.interface import Tensors
from vqdeploy.runtime.layout import Layout
from vqdeploy.runtime.manifest import SamplingInfo, StageInfo, TokenizerInfo
from vqdeploy.runtime.noise import Draw, Key
from vqdeploy.runtime.session import Array, Binding, Session


@dataclass(frozen=True)
class Item:
    """One image to sample.

    Attributes:
        known: Codes int64 [*grid], -1 for codes to draw.
        condition: Its class or `no_label` of the manifest; or the token ids int64 [length] of its text, or the features
            float32 [length, width].
        seed: Seed of its noise.
        image: Index of the image, which with `seed` keys its noise.
        options: Sampling options, from `vqdeploy.runtime.options.choose`.
    """

    known: np.ndarray
    condition: int | np.ndarray
    seed: int
    image: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """What was drawn for an image.

    Attributes:
        codes: int64 [*grid], negative where not final; see `Sampler.codes`.
        whole_map: What the stage `reconstruct` takes for it float32, if that is not the image of its codes.
    """

    codes: np.ndarray
    whole_map: np.ndarray | None = None


@dataclass
class Spent:
    """Engine calls of a stage: how many, and their seconds, including waits for a GPU."""

    calls: int = 0
    seconds: float = 0.0

    def run(self, binding: Binding) -> None:
        """One call."""
        start = time.perf_counter()
        binding.run()
        self.calls += 1
        self.seconds += time.perf_counter() - start

    def __iadd__(self, other: Self) -> Self:
        self.calls += other.calls
        self.seconds += other.seconds
        return self


class Sampler(ABC):
    """The batch of an engine as slots, each of which holds one image.

    `admit` puts an image into a free slot, `step` makes one engine call for all slots, `codes` reads the codes of a
    slot so far, and `release` frees it. Images share the call and nothing else: condition, options, noise and progress
    belong to the slot, so that an image gets the codes that it would get alone.

    Attributes:
        joins: `any step` if images may join before any step, `when empty` if only while no slot is in use.
        raster: Whether codes are drawn in raster order, each given those before it.
        needs: Sampling options that a plan must have, besides those of guidance.
        spent: What the engine calls of each stage took so far.
        last: The binding of the last engine call, to inspect its inputs and outputs.
    """

    joins: ClassVar[Literal["any step", "when empty"]] = "any step"
    raster: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("temperature", "top_k", "top_p")
    last: Binding

    def __init__(
        self,
        sessions: Mapping[str, Session],
        info: SamplingInfo,
        tokenizer: TokenizerInfo,
        slots: int,
        guided: bool,
        draw: Draw,
        lock: AbstractContextManager[Any] | None = None,
    ):
        """Makes a sampler of a number of slots.

        Args:
            sessions: The sessions of the plan, by stage.
            info: `sampling` of the manifest.
            tokenizer: `tokenizer` of the manifest.
            slots: Number of images that it holds.
            guided: Whether it supports guidance, at twice the work for every slot.
            draw: Fills the noise.
            lock: Held during engine calls, reentrantly; by default one of its own.
        """
        self.slots, self.guided, self.no_label, self.condition = slots, guided, info.no_label, Condition.of(info)
        self.spent: dict[str, Spent] = defaultdict(Spent)
        self.draw, self._lock = draw, lock or threading.RLock()
        self._layout, self._options, self._size = Layout(tokenizer.maps), info.options, tokenizer.codebook_size
        self._items: dict[int, Item] = {}
        self._running: set[int] = set()
        self._copies: dict[int, tuple[Array, np.ndarray]] = {}  # host copies of buffers since the last step
        self._parts: dict[tuple[tuple[int, int], ...], Binding] = {}
        self._begun = False
        self._prepare(sessions, tokenizer)

    @abstractmethod
    def _prepare(self, sessions: Mapping[str, Session], tokenizer: TokenizerInfo) -> None:
        """Makes the buffers for all slots; the last act of the constructor."""

    @classmethod
    @abstractmethod
    def inputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """The graph inputs that the sampler writes, by stage."""

    @classmethod
    @abstractmethod
    def outputs(cls, tokenizer: TokenizerInfo, sampling: SamplingInfo) -> dict[str, Tensors]:
        """What the sampler reads, stage by stage, apart from what one call leaves for the next."""

    @classmethod
    def rows(cls, guided: bool) -> int:
        """Batch rows per slot."""
        return 1

    @classmethod
    def most_slots(cls, stages: Mapping[str, StageInfo], device: str) -> int:
        """Most slots of a sampler for speed, apart from the largest batch of the engine."""
        return 2**31

    def guides(self, item: Item) -> bool:
        """Whether an image needs a sampler with guidance."""
        return needs_guidance(item.options, item.condition, self.no_label)

    def admit(self, slot: int, item: Item) -> None:
        """Puts an image into a free slot.

        Raises:
            VqdeployError: The slot is in use, images cannot join now, the image needs guidance, or a part of it is
                malformed or out of range. Other slots are as before.
        """
        with self._lock:
            self._put(slot, item)

    def _put(self, slot: int, item: Item) -> None:
        if not is_whole(slot) or slot in self._items or not 0 <= slot < self.slots:
            raise VqdeployError(f"slot {slot} is not free", expected=f"a free one of {self.slots}")
        if self.joins == "when empty" and self._begun:
            raise VqdeployError("images cannot join while others run", expected="an empty sampler")
        item = self._checked(item)
        if self.guides(item) and not self.guided:
            raise VqdeployError("this sampler takes no guidance", expected="a guidance scale of 1")
        self._copies.clear()
        self._admit(slot, item)
        self._items[slot] = item
        self._running.add(slot)

    def _checked(self, item: Item) -> Item:
        """The image with every part in its usual form; what passes here fails no later step."""
        check_whole(seed=item.seed, image=item.image)
        known = self._layout.check(as_array("codes", item.known)[None], self._size, lowest=-1)[0]
        condition = as_array("the condition", item.condition)
        if condition.shape or condition.dtype.kind != "i" or condition != self.no_label:
            condition = self.condition.check(condition[None], 1)[0]
        if not isinstance(item.options, Mapping):
            raise VqdeployError("the options are malformed", expected="a dictionary", found=type(item.options).__name__)
        chosen = options.choose(dict(item.options), self._options, self._layout.depth, self._size)
        return replace(item, known=known, condition=condition, options=chosen)

    def step(self) -> list[int]:
        """Makes one engine call for all unfinished images, if any, and returns the slots that are now done."""
        with self._lock:
            done = self._leave()  # images that had no code to draw
            if self._running:
                self._begun = True
                self._copies.clear()
                self._call()
            return sorted(done | self._leave())

    def _leave(self) -> set[int]:
        """Removes finished slots from the running ones and returns them."""
        done = {slot for slot in self._running if self.left(slot) == 0}
        self._running -= done
        return done

    def release(self, slot: int) -> None:
        """Frees a slot; its image need not be done."""
        self._items.pop(slot, None)
        self._running.discard(slot)
        self._begun = self._begun and bool(self._items)

    def left(self, slot: int) -> int:
        """Engine calls until the image of a slot is done.

        Raises:
            VqdeployError: The slot holds no image.
        """
        self._check_used(slot)
        return self._left_of(slot)

    def codes(self, slot: int) -> np.ndarray:
        """Codes int64 [*grid] of a slot so far; on a GPU this synchronizes.

        Negative where not final: -1 - c for a tentative code c of a masked prior, -1 where nothing has been drawn.

        Raises:
            VqdeployError: The slot holds no image.
        """
        self._check_used(slot)
        return self._codes_of(slot)

    def drawn(self, slot: int) -> Drawn:
        """What was drawn for the image of a slot; on a GPU this synchronizes.

        Raises:
            VqdeployError: The slot holds no image.
        """
        self._check_used(slot)
        return self._drawn_of(slot)

    def _check_used(self, slot: object) -> None:
        if not is_whole(slot) or slot not in self._items:
            raise VqdeployError("the slot holds no image", expected="a slot in use", found=slot)

    @abstractmethod
    def _left_of(self, slot: int) -> int: ...

    @abstractmethod
    def _codes_of(self, slot: int) -> np.ndarray: ...

    def _drawn_of(self, slot: int) -> Drawn:
        return Drawn(self._codes_of(slot))

    @abstractmethod
    def _admit(self, slot: int, item: Item) -> None: ...

    @abstractmethod
    def _call(self) -> None: ...

    def _used_slots(self, session: Session, running: Collection[int] | None = None) -> int:
        """How many slots, the first ones, a call has to compute for these, by default all that run.

        On a CPU these are the slots up to the last one, rounded up to a power of two to bind few sizes. On a GPU it is
        all of them: fewer rows take as long there.
        """
        running = self._running if running is None else running
        if session.device != "cpu":
            return self.slots
        return min(self.slots, 1 << max(running).bit_length()) if running else 0

    def _part(self, session: Session, whole: Binding, dims: Mapping[str, int], **rows: slice) -> Binding:
        """A binding of some rows of each dimension, such as `batch`; it shares all buffers with that of all rows."""
        sizes = {name: part.stop - part.start for name, part in rows.items()}
        if all(size == dims[name] for name, size in sizes.items()):
            return whole
        key = tuple((part.start, part.stop) for part in rows.values())
        if key not in self._parts:
            firsts = {info.name: str(info.shape[0]) for info in (*session.stage.inputs, *session.stage.outputs)}
            arrays = {**whole.inputs, **whole.outputs}
            views = {name: array[rows[firsts[name]]] for name, array in arrays.items()}
            self._parts[key] = session.bind({**dims, **sizes}, views)
        return self._parts[key]

    def _run(self, stage: str, binding: Binding) -> None:
        """One engine call, counted among those of the stage."""
        self.spent[stage].run(binding)
        self.last = binding

    def _read(self, stage: str, values: Array) -> np.ndarray:
        """What engine calls left in a buffer [...]; the wait for it counts as time of the stage.

        A buffer is copied once per step, for all slots: on a GPU each copy synchronizes.
        """
        if id(values) not in self._copies:
            start = time.perf_counter()
            with self._lock:
                self._copies[id(values)] = values, np.array(values)
            self.spent[stage].seconds += time.perf_counter() - start
        return self._copies[id(values)][1]

    def _fill_noise(self, noise: Array, draws: Mapping[int, int], greedy: Mapping[int, np.ndarray]) -> None:
        """Writes the noise of the draw of each slot into its row of `noise` [rows, ..., Q, K].

        Depths that are `greedy` [Q] get zeros. Logits in fp16 often tie, top-k keeps ties, and noise would then choose
        among them at random.
        """
        drawn = [slot for slot in draws if not greedy[slot].all()]
        keys: list[Key] = [(self._items[s].seed, self._items[s].image, draws[s]) for s in drawn]
        rows = {slot: np.asarray(noise[slot]) for slot in draws}  # views: noise is an array of the host
        self.draw(keys, [rows[slot] for slot in drawn])
        for slot in draws:
            if greedy[slot].any():
                rows[slot][..., greedy[slot], :] = 0


def needs_guidance(chosen: Mapping[str, Any], condition: int | np.ndarray, no_label: int | None) -> bool:
    """Whether an image is sampled with guidance: it has a label and a scale other than 1."""
    return bool(chosen.get("guidance_scale", 1.0) != 1 and (np.ndim(condition) or condition != no_label))


def write_options(chosen: dict[str, Any], inputs: Mapping[str, Array], row: int, depth: int, size: int) -> np.ndarray:
    """Writes sampling options into a row of the inputs [rows, Q] of a graph.

    Args:
        chosen: Effective options, from `vqdeploy.runtime.options.choose`.
        inputs: Inputs of a binding.
        row: Batch row to write.
        depth: Codes per position, Q.
        size: Size of the codebook, K.

    Returns:
        Bool [Q]: the depths at which only the most likely code may be drawn.
    """
    values: dict[str, np.ndarray] = options.for_graph(chosen, depth, size)
    for name, value in values.items():
        inputs[name][row] = value
    greedy: np.ndarray = values["top_k"] == 1
    return greedy


def carried(binding: Binding) -> dict[str, Array]:
    """States of a call for the next one, by input name, without those that are updated in place."""
    outputs = binding.outputs
    return {n.replace("present_", "past_", 1): outputs[n] for n in outputs if n.startswith("present_")}
