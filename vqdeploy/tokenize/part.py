"""One part of a data set to one shard of codes: what every process does, on one machine or on many."""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from vqdeploy import shards
from vqdeploy.errors import VqdeployError
from vqdeploy.files import to_json
from vqdeploy.runtime import Pipeline, load
from vqdeploy.runtime.images import read, read_bytes
from vqdeploy.runtime.manifest import Manifest
from vqdeploy.shards import Origin, Rows, ShardInfo
from vqdeploy.tokenize.samples import DamagedDataError, Part, Sample, digest

_BATCH = 64  # images that are read while as many are encoded
_BYTES = 2**26  # of files in memory that end a batch sooner


@dataclass(frozen=True)
class Job:
    """What all parts have in common: the plan, the device as for `vqdeploy.load`, and the folder of codes."""

    engine: Path
    device: str
    codes: Path


@dataclass(frozen=True)
class Done:
    """A part that came to its end: numbers of images with codes and without, or why it has no shard."""

    images: int = 0
    errors: int = 0
    failure: str | None = None


def origin_of(manifest: Manifest) -> Origin:
    """What codes of a plan are made with.

    Raises:
        VqdeployError: It has no tokenizer.
    """
    tokenizer, provenance = manifest.tokenizer, manifest.provenance
    if tokenizer is None:
        raise VqdeployError("this plan has no images and codes", expected="a tokenizer", found=manifest.name)
    plan = hashlib.sha256(to_json(manifest.to_dict()).encode()).hexdigest()
    sizes = (tokenizer.image, tokenizer.maps, tokenizer.codebook_size)
    return Origin(plan, provenance.system, provenance.checkpoint, *sizes)


def tokenize_part(job: Job, part: Part, threads: int) -> Done:
    """Writes the shard of a part, atomically.

    Raises:
        VqdeployError: The plan cannot be opened or fails, or the shard cannot be written.
    """
    pipeline = _pipeline(job.engine, job.device, threads)
    rows, errors, identity = Rows(), [], digest(part)
    try:
        for sample, codes in _encoded(pipeline, part.samples(), threads):
            if isinstance(codes, VqdeployError):
                errors.append({"key": sample.key, "error": str(codes)})
                continue
            rows.keys.append(sample.key)
            rows.labels.append(sample.label)
            rows.classes.append(sample.class_name)
            rows.codes.append(codes)
    except DamagedDataError as error:
        return Done(failure=str(error))
    info = ShardInfo(origin_of(pipeline.manifest), identity, part.classes, tuple(errors))
    shards.write(job.codes / f"{part.name}{shards.SUFFIX}", info, rows)
    return Done(len(rows.keys), len(errors))


@cache
def _pipeline(engine: Path, device: str, threads: int) -> Pipeline:
    """The plan, open for all parts of this process."""
    return load(engine, device, threads)


def _encoded(
    pipeline: Pipeline, samples: Iterator[Sample], threads: int
) -> Iterator[tuple[Sample, np.ndarray | VqdeployError]]:
    """Each image with its codes, or with why it could not be read. Images are read while those before are encoded."""
    waiting: deque[tuple[list[Sample], list[Future[np.ndarray | VqdeployError]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in _batches(samples):
            waiting.append((batch, [pool.submit(_pixels, sample, pipeline.image_shape) for sample in batch]))
            if len(waiting) > 1:
                yield from _codes(pipeline, *waiting.popleft())
        for last in waiting:
            yield from _codes(pipeline, *last)


def _batches(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    held = 0
    for sample in samples:
        batch.append(sample)
        held += len(sample.content) if isinstance(sample.content, bytes) else 0
        if len(batch) == _BATCH or held >= _BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _pixels(sample: Sample, shape: tuple[int, ...]) -> np.ndarray | VqdeployError:
    try:
        if isinstance(sample.content, Path):
            return read(sample.content, *shape[:2])
        if isinstance(sample.content, bytes):
            return read_bytes(sample.content, sample.key, *shape[:2])
    except VqdeployError as error:
        return error
    return sample.content


def _codes(
    pipeline: Pipeline, batch: list[Sample], reading: list[Future[np.ndarray | VqdeployError]]
) -> Iterator[tuple[Sample, np.ndarray | VqdeployError]]:
    found = [future.result() for future in reading]
    images = [image for image in found if isinstance(image, np.ndarray)]
    codes = iter(pipeline.encode(np.stack(images)) if images else [])
    for sample, image in zip(batch, found, strict=True):
        yield sample, next(codes) if isinstance(image, np.ndarray) else image
