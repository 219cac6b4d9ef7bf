"""A plan that is served: checks requests, and asks its worker for what they want."""

import asyncio
import base64
import binascii
import io
import math
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime import Pipeline, images, load
from vqdeploy.runtime.sampler import Drawn, Item, needs_guidance
from vqdeploy.serve.metrics import Metrics
from vqdeploy.serve.schemas import Drawing, Edit, Model
from vqdeploy.serve.settings import Settings
from vqdeploy.serve.worker import Preview, Worker

_MOST_UNSENT = 256  # previews of a request whose client reads slowly; further ones are dropped
_RASTER = "This prior draws in raster order: it drew all codes from the first row that the mask touches."


class BusyError(Exception):
    """Too many requests wait.

    Attributes:
        seconds: When to try again.
    """

    def __init__(self, seconds: int):
        super().__init__("too many requests are waiting")
        self.seconds = seconds


@dataclass
class Order:
    """Images to draw.

    Attributes:
        items: One for each image.
        options: The effective sampling options.
        seed: Their seed.
        original: Pixels to keep uint8 [H, W, 3], and where bool [H, W]; None to keep none.
        note: What an edit draws anew.
    """

    items: Sequence[Item]
    options: dict[str, Any]
    seed: int
    original: tuple[np.ndarray, np.ndarray] | None = None
    note: str | None = None


class ServedPlan:
    """A plan with a worker.

    Attributes:
        name: Name of the plan: that of its file, without `.plan`.
        created: Unix time of the file.
        worker: Calls its engines.
    """

    def __init__(self, path: Path, settings: Settings, metrics: Metrics, device: str = "auto", threads: int = 0):
        """Opens a plan.

        Args:
            path: Its file.
            settings: The limits.
            metrics: What to count in.
            device: As for `vqdeploy.load`.
            threads: As for `vqdeploy.load`.

        Raises:
            VqdeployError: The plan cannot be opened, or has no images.
        """
        self.name, self._settings, self._metrics = path.name.removesuffix(".plan"), settings, metrics

        def open_plan() -> Pipeline:
            pipeline = load(path, device, threads)
            pipeline.tokenizer  # noqa: B018 (which refuses plans that are about arrays)
            return pipeline

        self.worker = Worker(self.name, open_plan, settings.slots, metrics)
        self.created = int(path.stat().st_mtime)
        self._in_flight = 0

    @property
    def pipeline(self) -> Pipeline:
        """The plan, for its checks; only the worker calls its engines."""
        return self.worker.pipeline

    @property
    def size(self) -> str:
        """Width and height of its images."""
        height, width, _ = self.pipeline.image_shape
        return f"{width}x{height}"

    def describe(self) -> Model:
        """What clients may know about it."""
        pipeline, sampling = self.pipeline, self.pipeline.manifest.sampling
        condition = pipeline.condition if sampling else None
        return Model(
            id=self.name,
            created=self.created,
            size=self.size,
            maps=[list(each) for each in pipeline.layout.maps],
            codebook_size=pipeline.codebook_size,
            omits_depths=pipeline.tokenizer.omits_depths,
            kind=sampling.kind if sampling else None,
            keeps_pixels=pipeline.keeps_pixels if sampling else None,
            classes=sampling.classes if sampling else None,
            labels=list(pipeline.manifest.labels),
            label_is_optional=sampling.no_label is not None if sampling else None,
            text_length=condition.length if condition and condition.argument == "text_ids" else None,
            text_features=list(condition.shape) if condition and condition.features else None,
            options=pipeline.options() if sampling else {},
            max_images=self._settings.max_images,
        )

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request as unfinished.

        Raises:
            BusyError: As many requests are unfinished as the slots and the queue hold.
        """
        if self._in_flight >= self._settings.slots + self._settings.max_queue:
            seconds = math.ceil(self._in_flight * self.worker.seconds_per_image)
            raise BusyError(min(max(seconds, 1), math.ceil(self._settings.max_wait)))
        self._in_flight += 1
        self._metrics.in_flight.labels(self.name).set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            self._metrics.in_flight.labels(self.name).set(self._in_flight)

    def generation(self, asked: Drawing) -> Order:
        """The order of a generation.

        Raises:
            VqdeployError: A part of it is malformed or out of range.
        """
        return self._order(asked, np.full(self.pipeline.grid, -1))

    async def edit(self, asked: Edit) -> Order:
        """The order of an edit.

        Raises:
            VqdeployError: A part of it is malformed or out of range, or an image cannot be read.
        """
        self._order(asked, np.full(self.pipeline.grid, -1))  # refuses before anything is computed
        image, mask = await asyncio.to_thread(self._read_edit, asked)
        codes = await self.encode(image[None])
        unknown = self.pipeline.unknown(1, mask=mask)
        order = self._order(asked, np.where(unknown, -1, codes)[0])
        if self.pipeline.keeps_pixels:
            order.original = image, ~mask
        else:
            order.note = _RASTER
        return order

    async def draw(self, order: Order) -> list[Drawn]:
        """What was drawn for each image of an order."""
        return await asyncio.wrap_future(self.worker.sample(order.items))

    async def watch(self, order: Order, previews: int) -> AsyncGenerator[Preview]:
        """Each image of an order after some steps and after its last one."""
        loop, unsent = asyncio.get_running_loop(), asyncio.Queue[Preview | None]()

        def put(preview: Preview) -> None:
            if preview.done or unsent.qsize() < _MOST_UNSENT:
                unsent.put_nowait(preview)

        sampling = self.worker.sample(order.items, lambda preview: loop.call_soon_threadsafe(put, preview), previews)
        drawn = asyncio.wrap_future(sampling)
        drawn.add_done_callback(lambda _: unsent.put_nowait(None))
        try:
            while preview := await unsent.get():
                yield preview
            await drawn  # raises what went wrong
        finally:
            drawn.cancel()

    async def files(self, order: Order, drawn: Sequence[Drawn], asked: Drawing) -> list[str] | list[None]:
        """The images of an order as files in base64, greyed out where codes are not final; None for codes alone.

        Args:
            order: What is drawn.
            drawn: What was drawn for it, of all its images or of one.
            asked: The format.
        """
        if asked.response_format == "codes":
            return [None] * len(drawn)
        pixels = await asyncio.wrap_future(self._decode(drawn))
        return await asyncio.to_thread(self._finish, order, pixels, asked.output_format)

    def _decode(self, drawn: Sequence[Drawn]) -> "Future[np.ndarray]":
        """The images of one order, which all have maps, or none has."""
        maps = [each.whole_map for each in drawn if each.whole_map is not None]
        if maps:
            return self.worker.decode_maps(np.stack(maps))
        codes = np.stack([each.codes for each in drawn])
        return self.worker.preview(codes) if (codes < 0).any() else self.worker.decode(codes)

    def _finish(self, order: Order, pixels: np.ndarray, kind: str) -> list[str]:
        if order.original is not None:
            original, kept = order.original
            pixels = np.where(kept[..., None], original, pixels)
        return [file_of(each, kind) for each in pixels]

    async def encode(self, pixels: np.ndarray) -> np.ndarray:
        """The codes int64 [B, *grid] of images uint8 [B, H, W, 3]."""
        return await asyncio.wrap_future(self.worker.encode(pixels))

    async def decode(self, codes: object, depth: int | None) -> np.ndarray:
        """The images uint8 [B, H, W, 3] of codes int64 [B, *grid].

        Raises:
            VqdeployError: The codes are malformed or out of range, or there is no such depth.
        """
        checked = self.pipeline.layout.check(codes, self.pipeline.codebook_size)
        self._check_count(len(checked))
        self.pipeline.check_depth(depth)
        return await asyncio.wrap_future(self.worker.decode(checked, depth))

    async def read(self, files: Sequence[str]) -> np.ndarray:
        """Image files in base64 as uint8 [B, H, W, 3].

        Raises:
            VqdeployError: There are too many, or one cannot be read.
        """
        self._check_count(len(files))
        return np.stack([await asyncio.to_thread(self._read_base64, file) for file in files])

    def _order(self, asked: Drawing, known: np.ndarray) -> Order:
        pipeline = self.pipeline
        options = pipeline.options(**asked.options())
        self._check_count(asked.n)
        if asked.size not in ("auto", self.size):
            raise VqdeployError("this plan draws images of one size", expected=self.size, found=asked.size)
        if asked.partial_images and not asked.stream:
            raise VqdeployError("previews need a stream", expected="stream with partial_images")
        condition = self._condition(asked)
        seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        items = [Item(known, condition, seed, image, options) for image in range(asked.n)]
        pipeline.call_images(needs_guidance(options, condition, pipeline.sampling.no_label))  # refuses too few rows
        return Order(items, options, seed)

    def _condition(self, asked: Drawing) -> int | np.ndarray:
        """The label, or the token ids int64 [length] or features float32 [length, width] of a text."""
        pipeline, wanted = self.pipeline, self.pipeline.condition.argument
        for other in ("text_ids", "text_features"):
            if other != wanted and getattr(asked, other) is not None:
                kind = "labels, not texts" if wanted == "label" else wanted
                raise VqdeployError(f"this prior takes {kind}", expected=wanted, found=other)
        if wanted != "label":
            text = getattr(asked, wanted)
            if text is None:
                raise VqdeployError("this prior needs a text", expected=wanted, found="none")
            checked: np.ndarray = pipeline.condition.check([text if wanted == "text_ids" else _array(text)], 1)[0]
            return checked
        name = asked.label if asked.label is not None else asked.prompt.strip() or None
        if name is not None:
            return pipeline.label(name)
        if pipeline.classes == 1:
            return 0
        if pipeline.sampling.no_label is None:
            raise pipeline.condition.missing()
        return pipeline.sampling.no_label

    def _check_count(self, count: int) -> None:
        most = self._settings.max_images
        if count > most:
            raise VqdeployError("too many images in one request", expected=f"at most {most}", found=count)

    def _read_base64(self, text: str) -> np.ndarray:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise VqdeployError("an image is not in base64") from error
        height, width, _ = self.pipeline.image_shape
        return images.read_bytes(data, "an image", height, width, self._settings.max_pixels)

    def _read_edit(self, asked: Edit) -> tuple[np.ndarray, np.ndarray]:
        """The image of an edit uint8 [H, W, 3], and what is to be drawn anew, bool [H, W]."""
        most, shape = self._settings.max_pixels, self.pipeline.image_shape[:2]
        image = images.decode(asked.image.file, "the image", most)
        source = images.decode(asked.mask.file, "the mask", most) if asked.mask else image
        if source.mode == "RGBA":
            mask = images.fitted(source.getchannel("A"), *shape) < 128
        elif asked.mask:
            mask = images.light(source, *shape)
        else:
            raise VqdeployError("there is no mask", expected="a mask, or an image with transparency")
        if not mask.any():
            raise VqdeployError(
                "the mask is empty", expected="transparent pixels, or white ones if none are transparent"
            )
        return images.fitted(images.on_background(image), *shape), mask


def _array(text: str) -> np.ndarray:
    """The array of an NPY in base64."""
    try:
        return np.asarray(np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False))
    except Exception as error:  # parsers of numpy raise anything
        raise VqdeployError("the features of a text are malformed", expected="an NPY in base64") from error


def file_of(image: np.ndarray, kind: str) -> str:
    """An image uint8 [H, W, 3] as a file of a kind (png, webp, jpeg), in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind)
    return base64.b64encode(buffer.getvalue()).decode()


def now() -> int:
    """Unix time in seconds."""
    return int(time.time())
