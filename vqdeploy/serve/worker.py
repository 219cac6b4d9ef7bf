"""The worker of a plan: the one thread that calls its engines, and batches what requests ask for."""

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from vqdeploy.errors import ArtifactError
from vqdeploy.runtime import Pipeline
from vqdeploy.runtime.sampler import Drawn, Item, Sampler, needs_guidance
from vqdeploy.serve.metrics import Metrics

_log = logging.getLogger(__name__)
_PATIENCE = 10.0  # seconds to wait for the last engine call when the worker closes


class EngineError(Exception):
    """An engine failed, or a plan could not be opened again; the log has the reason."""


@dataclass(frozen=True)
class Preview:
    """An image after a step.

    Attributes:
        image: Index of the image in its request.
        step: Number of the step, from 1.
        steps: Number of steps of the image.
        drawn: What was drawn so far; its codes are negative where not final.
    """

    image: int
    step: int
    steps: int
    drawn: Drawn

    @property
    def done(self) -> bool:
        """Whether it was the last step, so that all codes are final."""
        return self.step == self.steps


Watch = Callable[[Preview], object]
_Stage = Literal["encode", "decode", "preview", "decode_maps"]
_Result = TypeVar("_Result")


@dataclass
class _Sampling:
    """The images of a request, and what was drawn for those that are done."""

    items: Sequence[Item]
    guided: bool
    future: "Future[list[Drawn]]"
    watch: Watch | None
    previews: int
    drawn: dict[int, Drawn] = field(default_factory=dict)

    def tell(self, image: "_Image", step: int, read: Callable[[], Drawn]) -> None:
        """Shows the last step, and `previews` of those before it, evenly spread, to who watches."""
        parts, steps = min(self.previews + 1, image.steps), image.steps
        if self.watch and (step == steps or step * parts // steps != (step - 1) * parts // steps):
            self.watch(Preview(image.index, step, steps, read()))


@dataclass
class _Image:
    """An image that waits for a slot, or has one."""

    sampling: _Sampling
    index: int
    steps: int = 0

    @property
    def item(self) -> Item:
        return self.sampling.items[self.index]


@dataclass
class _Call:
    """Images to encode, codes to decode with a number of depths, codes to preview, or maps to decode."""

    stage: _Stage
    array: np.ndarray
    depth: int | None
    future: "Future[np.ndarray]"


class _Lane:
    """A sampler that stays open, with guidance or without."""

    def __init__(self, pipeline: Pipeline, slots: int, guided: bool):
        self._context = pipeline.sampler(min(slots, pipeline.call_images(guided)), guided)
        self.sampler: Sampler = self._context.__enter__()
        self.images: dict[int, _Image] = {}

    def free(self) -> list[int]:
        """Slots that images may join now, the lowest first: an engine calls only rows up to the last one in use."""
        if self.images and self.sampler.joins == "when empty":
            return []
        return [slot for slot in range(self.sampler.slots) if slot not in self.images]

    def release(self, slot: int) -> None:
        del self.images[slot]
        self.sampler.release(slot)

    def close(self) -> None:
        self._context.__exit__(None, None, None)


class Worker:
    """Continuous batching: images join the running batch at the next step, and leave when they are done.

    What is asked for is a future. Cancelling it frees the slots of its images at the next step. An error of an engine
    fails the requests of that call, and the plan is opened again for the next one.

    Attributes:
        pipeline: The plan. Only the worker calls its engines; its checks are free for everybody, also after a failure.
    """

    def __init__(self, name: str, open_plan: Callable[[], Pipeline], slots: int, metrics: Metrics):
        """Opens a plan and all its stages, and starts the thread.

        Args:
            name: Its name, for metrics and the log.
            open_plan: Opens it, for the first time and after a failure.
            slots: Most images of a sampler.
            metrics: What to count in.

        Raises:
            VqdeployError: The plan cannot be opened.
        """
        self.pipeline = open_plan()
        for stage in set(self.pipeline.stages) - {"features"}:
            self.pipeline.session(stage)  # the first request need not wait for it
        self._name, self._open_plan, self._slots, self._metrics = name, open_plan, slots, metrics
        self._inbox: queue.SimpleQueue[_Sampling | _Call | None] = queue.SimpleQueue()
        self._waiting: dict[bool, deque[_Image]] = {False: deque(), True: deque()}
        self._calls: list[_Call] = []
        self._lanes: dict[bool, _Lane] = {}
        self._failed = self._closing = False
        self._busy, self._done = 0.0, 0
        self._thread = threading.Thread(target=self._work, name=f"worker of {name}", daemon=True)
        self._thread.start()

    @property
    def seconds_per_image(self) -> float:
        """Time of all steps so far over the number of images that they drew; 0 before the first."""
        return self._busy / max(self._done, 1)

    @property
    def works(self) -> bool:
        """Whether the thread runs, and the last engine call succeeded."""
        return self._thread.is_alive() and not self._failed

    def sample(self, items: Sequence[Item], watch: Watch | None = None, previews: int = 0) -> "Future[list[Drawn]]":
        """What was drawn for each of some items that were checked.

        Args:
            items: Images of one request.
            watch: Called after some steps of each image and after its last one, in the thread of the worker.
            previews: Number of those steps, evenly spread; at most all before the last.
        """
        no_label = self.pipeline.sampling.no_label
        guided = any(needs_guidance(item.options, item.condition, no_label) for item in items)
        sampling = _Sampling(items, guided, Future(), watch, previews)
        self._inbox.put(sampling)
        return sampling.future

    def encode(self, images: np.ndarray) -> "Future[np.ndarray]":
        """The codes int64 [B, *grid] of images uint8 [B, H, W, 3] that were checked."""
        return self._ask(_Call("encode", images, None, Future()))

    def decode(self, codes: np.ndarray, depth: int | None = None) -> "Future[np.ndarray]":
        """The images uint8 [B, H, W, 3] of codes that were checked; `depth` as for `Pipeline.decode`."""
        return self._ask(_Call("decode", codes, depth, Future()))

    def preview(self, codes: np.ndarray) -> "Future[np.ndarray]":
        """The images uint8 [B, H, W, 3] of codes that need not be final; see `Pipeline.preview`."""
        return self._ask(_Call("preview", codes, None, Future()))

    def decode_maps(self, whole_maps: np.ndarray) -> "Future[np.ndarray]":
        """The images uint8 [B, H, W, 3] of maps of `Drawn`, stacked."""
        return self._ask(_Call("decode_maps", whole_maps, None, Future()))

    def close(self) -> None:
        """Cancels what is unfinished, ends the thread and closes the plan."""
        self._inbox.put(None)
        self._thread.join(_PATIENCE)

    def _ask(self, call: _Call) -> "Future[np.ndarray]":
        self._inbox.put(call)
        return call.future

    def _work(self) -> None:
        while not self._closing:
            self._take()
            self._drop()
            self._run_calls()
            for guided in self._waiting:
                self._step(guided)
            self._count()
        for image in self._images():
            image.sampling.future.cancel()
        for lane in self._lanes.values():
            lane.close()
        self.pipeline.close()

    def _images(self) -> Iterable[_Image]:
        """All images that wait or run."""
        lanes = (lane.images.values() for lane in self._lanes.values())
        return itertools.chain(*self._waiting.values(), *lanes)

    def _take(self) -> None:
        """Sorts what was asked for; waits for it if there is nothing else to do."""
        idle = not any(True for _ in self._images())
        while idle or not self._inbox.empty():
            task, idle = self._inbox.get(), False
            if task is None:
                self._closing = True
            elif isinstance(task, _Call):
                self._calls.append(task)
            else:
                self._waiting[task.guided] += [_Image(task, index) for index in range(len(task.items))]

    def _drop(self) -> None:
        """Drops the images of requests that were cancelled, or of which another image failed."""
        for guided, waiting in self._waiting.items():
            self._waiting[guided] = deque(image for image in waiting if not image.sampling.future.done())
        for lane in self._lanes.values():
            for slot in [slot for slot, image in lane.images.items() if image.sampling.future.done()]:
                lane.release(slot)

    def _run_calls(self) -> None:
        """Encodes and decodes what was asked for, together where that is possible."""
        calls, self._calls = [call for call in self._calls if not call.future.cancelled()], []
        for stage, depth in dict.fromkeys((call.stage, call.depth) for call in calls):
            batch = [call for call in calls if (call.stage, call.depth) == (stage, depth)]
            arrays = np.concatenate([call.array for call in batch])
            try:
                pipeline = self._opened()
                results = _call(pipeline, stage, arrays, depth)
            except Exception as error:  # of any engine
                self._fail(error, [call.future for call in batch])
                continue
            self._metrics.images.labels(self._name, stage).inc(len(arrays))
            ends = np.cumsum([len(call.array) for call in batch])
            for call, result in zip(batch, np.split(results, ends[:-1]), strict=True):
                _answer(call.future, result)

    def _step(self, guided: bool) -> None:
        """Fills the free slots of a lane and makes a step."""
        waiting, lane = self._waiting[guided], self._lanes.get(guided)
        if not waiting and not (lane and lane.images):
            return
        try:
            lane = self._lanes[guided] = lane or _Lane(self._opened(), self._slots, guided)
        except Exception as error:  # of any engine
            self._fail(error, [image.sampling.future for image in waiting])
            waiting.clear()
            return
        start = time.perf_counter()
        try:
            self._admit(lane, waiting)
            done = lane.sampler.step()
            for slot in lane.images.keys() - set(done):
                self._tell(lane, slot)
            for slot in done:
                self._finish(lane, slot)
        except Exception as error:  # of any engine
            self._fail(error, [image.sampling.future for image in lane.images.values()])
            del self._lanes[guided]  # without leaving its context, so that nobody uses the sampler again
        seconds = time.perf_counter() - start
        self._busy += seconds
        self._metrics.step_seconds.labels(self._name).observe(seconds)

    def _admit(self, lane: _Lane, waiting: deque[_Image]) -> None:
        for slot in lane.free()[: len(waiting)]:
            image = lane.images[slot] = waiting.popleft()
            lane.sampler.admit(slot, image.item)
            image.steps = lane.sampler.left(slot)

    def _tell(self, lane: _Lane, slot: int) -> None:
        image = lane.images[slot]
        image.sampling.tell(image, image.steps - lane.sampler.left(slot), lambda: lane.sampler.drawn(slot))

    def _finish(self, lane: _Lane, slot: int) -> None:
        """Takes what was drawn for a finished image; a request is done with its last one."""
        self._tell(lane, slot)
        sampling = lane.images[slot].sampling
        sampling.drawn[lane.images[slot].index] = lane.sampler.drawn(slot)
        lane.release(slot)
        self._done += 1
        self._metrics.images.labels(self._name, "sample").inc()
        if len(sampling.drawn) == len(sampling.items):
            _answer(sampling.future, [sampling.drawn[i] for i in range(len(sampling.items))])

    def _opened(self) -> Pipeline:
        """The plan, opened again after a failure."""
        if self._failed:
            self.pipeline.close()
            pipeline = self._open_plan()
            if pipeline.manifest != self.pipeline.manifest:
                raise ArtifactError(f"the plan of {self._name} was replaced", fix="start the server again")
            self.pipeline, self._failed = pipeline, False
            # Samplers in use go on with the engines that they have; idle ones would keep them in memory.
            self._lanes = {guided: lane for guided, lane in self._lanes.items() if lane.images}
        return self.pipeline

    def _fail(self, error: Exception, futures: Iterable["Future[_Result]"]) -> None:
        _log.error("an engine of %s failed: %s", self._name, error)
        _log.debug("its traceback", exc_info=error)
        self._failed = True
        self._metrics.engine_failures.labels(self._name).inc()
        for future in set(futures):
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_exception(EngineError("the engine failed"))

    def _count(self) -> None:
        self._metrics.waiting.labels(self._name).set(sum(map(len, self._waiting.values())))
        lanes = self._lanes.values()
        self._metrics.slots.labels(self._name).set(sum(lane.sampler.slots for lane in lanes))
        self._metrics.slots_in_use.labels(self._name).set(sum(len(lane.images) for lane in lanes))


def _call(pipeline: Pipeline, stage: _Stage, arrays: np.ndarray, depth: int | None) -> np.ndarray:
    if stage == "decode":
        return pipeline.decode(arrays, depth)
    calls = {"encode": pipeline.encode, "preview": pipeline.preview, "decode_maps": pipeline.decode_maps}
    return calls[stage](arrays)


def _answer(future: "Future[_Result]", result: _Result) -> None:
    """Gives a result, unless nobody waits for it any more."""
    if future.set_running_or_notify_cancel():
        future.set_result(result)
