"""A loaded plan, ready for requests."""

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import interface, options
from vqdeploy.runtime.arguments import as_array, as_numbers, check_whole, is_whole
from vqdeploy.runtime.autoregressive import AutoregressiveSampler
from vqdeploy.runtime.backends import BACKENDS
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.hierarchical import HierarchicalSampler
from vqdeploy.runtime.layout import Layout
from vqdeploy.runtime.manifest import SamplingInfo, StageInfo, TokenizerInfo
from vqdeploy.runtime.masked import MaskedSampler
from vqdeploy.runtime.noise import ThreadedNoise
from vqdeploy.runtime.sampler import Item, Sampler, needs_guidance
from vqdeploy.runtime.session import Opener, Session

SAMPLERS: dict[str, type[Sampler]] = {
    "autoregressive": AutoregressiveSampler,
    "masked": MaskedSampler,
    "hierarchical": HierarchicalSampler,
}
"""Kind of sampling in a manifest -> sampler. To add a kind, add it here."""

_CALL_PIXELS = {"cpu": 256 * 256, "cuda": 16 * 256 * 256}
_FEATURE_IMAGES = 8  # of one call
# Samplers that outlive a request; on a GPU as many as the calls of one request have, since buffers, contexts and graphs
# take long to make there.
_KEPT_SAMPLERS = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True)
class Step:
    """What a callback is told after each step of a generation.

    Attributes:
        step: Its number, from 1.
        steps: How many there are, for these images.
        images: Which images of the request these are: a large request is split, and each part takes its own steps.
        codes: Theirs so far, int64 [B, *grid]. A code that is not settled is negative: -1 - c where a masked prior
            would put c for now, -1 where nothing is drawn yet.
    """

    step: int
    steps: int
    images: range
    codes: np.ndarray


Callback = Callable[[Step], object]


@dataclass
class Output:
    """Result of a request.

    Attributes:
        images: uint8 [B, H, W, 3].
        codes: int64 [B, *grid].
        options: Those in force.
        timings: Seconds, by wall clock: `steps_s` of engine calls of the prior, waits for a GPU included, `host_s` of
            what is done between them, `decode_s` of the decoder, `total_s`.
    """

    images: np.ndarray
    codes: np.ndarray
    options: dict[str, Any]
    timings: dict[str, float] = field(default_factory=dict)


def load(path: str | Path, device: str = "auto", threads: int = 0, *, verify: bool = True) -> "Pipeline":
    """Opens a plan: reads its manifest, checks the device and all digests. Stages open when they are first used.

    Args:
        path: The plan.
        device: `auto`, `cpu` or `cuda`. `auto` is CUDA for a plan of ONNX Runtime that was built for it, where that
            runs. Plans for TensorRT have no other device.
        threads: Threads of the engine and of the noise; 0 for as many as there are cores.
        verify: Whether to compare the digests; False for a file that was just checked.

    Raises:
        VqdeployError: The file does not exist, its library is not installed, or its device is not here.
        ArtifactError: The file is damaged, tampered with or of another version.
    """
    bundle = Bundle(path)
    name = bundle.manifest.backend
    if name is None:
        raise VqdeployError(f"{path} is not a plan", fix="vqdeploy build PACKAGE")
    if device not in ("auto", "cpu", "cuda"):
        raise VqdeployError(f"device {device!r} is not supported", expected="auto, cpu or cuda", found=device)
    check_whole(threads=threads)
    if name not in BACKENDS:
        raise ArtifactError(f"{path} is for an unknown backend", found=name, fix="pip install -U vqdeploy")
    backend = BACKENDS[name]()
    device = backend.place(bundle.manifest, device)
    if verify:
        bundle.verify()
    return Pipeline(bundle, device, lambda: backend.opener(bundle, device, threads, None), threads)


class Pipeline:
    """The tasks of a plan. Several threads may use one at once: their engine calls take turns.

    It is a context manager; `close` gives memory and engines back. After a fork the child opens the stages anew, where
    they are on the CPU.
    """

    def __init__(self, bundle: Bundle, device: str, open_stages: Callable[[], Opener], threads: int = 0):
        """Makes a pipeline that opens stages when they are used.

        Args:
            bundle: The plan.
            device: Where its stages run, `cpu` or `cuda`.
            open_stages: Makes what opens the stages; see `vqdeploy.runtime.session.Backend`.
            threads: As for `load`.

        Raises:
            ArtifactError: The manifest does not fit its sampler.
        """
        self.bundle, self.manifest, self.device = bundle, bundle.manifest, device
        self._sessions = _Sessions(bundle, device, open_stages)
        self._batch = bundle.manifest.batch
        self._noise = ThreadedNoise(threads)
        self._lock = threading.RLock()  # an engine call at a time
        self._samplers: dict[tuple[int, bool], Sampler] = {}
        if self.manifest.sampling:
            _check_sampler(bundle)
        _PIPELINES.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the stages and the file; whatever is asked for afterwards is refused. To close twice is fine."""
        with self._lock:
            self._samplers.clear()
            self._sessions.close()
            self.bundle.close()

    @property
    def tokenizer(self) -> TokenizerInfo:
        """What images and codes are.

        Raises:
            VqdeployError: The plan is about arrays and not images.
        """
        if self.manifest.tokenizer is None:
            names = ", ".join(self.stages)
            raise VqdeployError(
                "this plan has no images and codes", expected="run(STAGE, ...)", found=f"stages {names}"
            )
        return self.manifest.tokenizer

    @property
    def sampling(self) -> SamplingInfo:
        """How codes are drawn.

        Raises:
            VqdeployError: The plan has no prior.
        """
        self.tokenizer  # noqa: B018 (which refuses plans that are about arrays)
        if self.manifest.sampling is None:
            raise VqdeployError("this plan has a tokenizer and no prior", fix="vqdeploy train")
        return self.manifest.sampling

    @property
    def layout(self) -> Layout:
        """How the codes of an image lie in arrays."""
        return Layout(self.tokenizer.maps)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image: rows, columns, depth; or the number of codes of all levels, see `maps`."""
        return self.layout.shape

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels of an image."""
        return self.tokenizer.image

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.tokenizer.codebook_size

    @property
    def classes(self) -> int:
        """Number of labels; 1 for an unconditional prior.

        Raises:
            VqdeployError: The plan has no prior.
        """
        return self.sampling.classes

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that the plan has."""
        return tuple(stage.name for stage in self.manifest.stages)

    def session(self, stage: str) -> Session:
        """The session of one stage, to drive it call by call.

        Raises:
            ArtifactError: There is no such stage, or it cannot be opened.
        """
        self.manifest.stage(stage)
        return self._sessions[stage]

    def run(self, stage: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """One call of a stage, whatever it is about.

        Args:
            stage: Its name.
            **arrays: One for each input, of the shape and type that the manifest says.

        Returns:
            The outputs by name.

        Raises:
            VqdeployError: An input is missing, unknown, or of another shape or type.
            ArtifactError: There is no such stage, or it failed.
        """
        info = self.manifest.stage(stage)
        given = {name: as_array(name, array) for name, array in arrays.items()}
        _check_arrays(info, given)
        with self._lock:
            return self._sessions[stage].run(**given)

    @property
    def keeps_pixels(self) -> bool:
        """Whether `inpaint` draws what a mask covers and nothing else, so that the other pixels stay as they are.

        Raises:
            VqdeployError: The plan has no prior.
        """
        return not self._sampler_class.raster

    def maps(self, codes: np.ndarray) -> list[np.ndarray]:
        """Codes [B, *grid] -> the map of each level [B, h, w, depth], top first; most systems have one level.

        Raises:
            VqdeployError: The array has another shape.
        """
        codes = as_array("codes", codes)
        if codes.shape[1:] != self.grid:
            raise VqdeployError("codes have the wrong shape", expected=["B", *self.grid], found=list(codes.shape))
        return self.layout.split(codes)

    def label(self, name: str | int) -> int:
        """The label of a class.

        Args:
            name: Its number, an int; or its name. Text that is no name but a number is the number of the class, unless
                classes are named by numbers: "7" is then the class of this name or none.

        Raises:
            VqdeployError: There is no such class.
        """
        names = self.manifest.labels
        if isinstance(name, str) and name in names:
            return names.index(name)
        if isinstance(name, str) and name.isdecimal() and len(name) < 10 and not any(map(str.isdecimal, names)):
            name = int(name)
        if is_whole(name) and 0 <= int(name) < self.classes:
            return int(name)
        named = f" or one of {', '.join(names[:10])}" + (", ..." if len(names) > 10 else "") if names else ""
        raise VqdeployError("no such label", expected=f"0..{self.classes - 1}{named}", found=name)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [B, H, W, 3] -> codes int64 [B, *grid].

        Raises:
            VqdeployError: The images have the wrong shape or type.
        """
        expected = self.image_shape
        images = as_array("images", images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            raise VqdeployError(
                "images have the wrong shape or type",
                expected=f"uint8 [B, {', '.join(map(str, expected))}]",
                found=f"{images.dtype} {list(images.shape)}",
            )
        parts = self._image_batches(len(images))
        return np.concatenate([self._run("encode", image=images[part])["codes"] for part in parts])

    def decode(self, codes: np.ndarray, depth: int | None = None) -> np.ndarray:
        """Codes int64 [B, *grid] -> images uint8 [B, H, W, 3].

        Args:
            codes: The codes.
            depth: Use only this many codes of each position, from coarse to fine; all when None.

        Raises:
            VqdeployError: The codes have the wrong shape or type or are out of range, or the depth is.
        """
        codes = self._check_codes(codes)
        if depth is not None:
            if not self.tokenizer.omits_depths:
                raise VqdeployError("this plan's codes have no depths to leave out", expected="no depth", found=depth)
            if not is_whole(depth) or not 1 <= depth <= self.grid[-1]:
                raise VqdeployError("no such depth", expected=f"1..{self.grid[-1]}", found=depth)
            codes = np.where(np.arange(self.grid[-1]) < depth, codes, -1)
        parts = self._image_batches(len(codes))
        return np.concatenate([self._run("decode", codes=codes[part])["image"] for part in parts])

    def _run(self, stage: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        with self._lock:
            return self._sessions[stage].run(**arrays)

    def features(self, images: np.ndarray, labels: Sequence[int] | None = None) -> np.ndarray:
        """Hidden states of the prior before its first layer and behind each, averaged over the positions.

        Args:
            images: uint8 [B, H, W, 3].
            labels: Class of each image; None for none.

        Returns:
            float32 [B, layers + 1, width].

        Raises:
            VqdeployError: The plan has no features, or an argument is malformed.
        """
        if "features" not in self.stages:
            raise VqdeployError(
                "this plan has no features", expected="a stage `features`", found=", ".join(self.stages)
            )
        codes = self.encode(images)
        classes = self._check_labels(labels, len(codes))
        parts = self._batches(len(codes), min(self._batch.max, _FEATURE_IMAGES))
        return np.concatenate(
            [self._run("features", codes=codes[part], label=classes[part])["features"] for part in parts]
        )

    def reconstruct(self, images: np.ndarray, depth: int | None = None) -> np.ndarray:
        """Images -> their codes -> images, as `encode` and `decode`."""
        return self.decode(self.encode(images), depth)

    def generate(self, labels: Sequence[int] | None = None, *, num_images: int | None = None, **options: Any) -> Output:
        """Samples images.

        Args:
            labels: Class of each image; None for `num_images` of an unconditional prior.
            num_images: How many images when `labels` is None, 1 by default.
            **options: `seed`, `first_image`, `callback` and sampling options; see `complete`.

        Raises:
            VqdeployError: A label or an option is out of range, or the plan has no prior.
        """
        if labels is None:
            if self.classes > 1:
                raise VqdeployError(
                    "this prior needs labels", expected=f"labels in 0..{self.classes - 1}", found="none"
                )
            num_images = 1 if num_images is None else num_images
            check_whole(1, num_images=num_images)
            labels = [0] * num_images
        elif num_images is not None:
            raise VqdeployError("labels say how many images", expected="no num_images beside them", found=num_images)
        known = np.full((as_numbers("the list of labels", labels, whole=True).size, *self.grid), -1, np.int64)
        return self.complete(known, labels, **options)

    def inpaint(
        self,
        images: np.ndarray,
        labels: Sequence[int] | None = None,
        *,
        mask: np.ndarray | None = None,
        mask_ratio: float | None = None,
        completions: int = 1,
        seed: int = 0,
        first_image: int = 0,
        **options: Any,
    ) -> Output:
        """Keeps a part of each image and samples the rest.

        A masked prior samples what is unknown and nothing else; with a mask, pixels outside of it stay as they are. An
        autoregressive prior goes from the top left to the bottom right: everything from the first row of codes that
        the mask touches is sampled anew.

        Args:
            images: uint8 [B, H, W, 3].
            labels: Class of each image; None for an unconditional prior, and for no label if the prior takes guidance.
            mask: True where pixels are unknown, bool [B, H, W] or [H, W].
            mask_ratio: Instead of a mask, the share of codes to sample: chosen at random by the seed for a masked
                prior, from the bottom up for an autoregressive one.
            completions: How many to sample of each image, N. The result holds N * B images: the first of each image,
                then the second of each, and so on.
            seed: As for `complete`.
            first_image: As for `complete`.
            **options: As for `complete`.

        Raises:
            VqdeployError: An argument is out of range or missing.
        """
        check_whole(1, completions=completions)
        check_whole(seed=seed, first_image=first_image)
        images = as_array("images", images)
        codes = self.encode(images)
        unknown = self.unknown(len(images), mask=mask, mask_ratio=mask_ratio, seed=seed, first_image=first_image)
        known = np.concatenate([np.where(unknown, -1, codes)] * completions)
        labels = self._repeated(labels, len(images), completions)
        output = self.complete(known, labels, seed=seed, first_image=first_image, **options)
        if mask is not None and self.keeps_pixels:
            drawn = output.images.reshape(completions, *images.shape)
            output.images = np.where(np.asarray(mask, bool)[..., None], drawn, images).reshape(output.images.shape)
        return output

    def resample(
        self,
        images: np.ndarray,
        labels: Sequence[int] | None = None,
        *,
        keep: int = 1,
        completions: int = 1,
        **options: Any,
    ) -> Output:
        """Keeps the coarse codes of each image and samples the finer ones: the details change, the picture stays.

        Args:
            images: uint8 [B, H, W, 3].
            labels: Class of each image; None for an unconditional prior.
            keep: How many levels stay as they are, from the top.
            completions: As for `inpaint`.
            **options: As for `complete`.

        Raises:
            VqdeployError: The system's codes have one level, or an argument is out of range.
        """
        check_whole(1, completions=completions)
        codes = self.encode(images)
        maps = self.maps(codes)
        if len(maps) == 1:
            raise VqdeployError("this plan's codes have one level", expected="two or more, as vqvae2's", found="one")
        if not is_whole(keep) or not 0 <= keep < len(maps):
            raise VqdeployError("no such number of levels to keep", expected=f"0..{len(maps) - 1}", found=keep)
        count = sum(level[0].size for level in maps[:keep])
        known = np.concatenate([np.where(np.arange(codes.shape[1]) < count, codes, -1)] * completions)
        return self.complete(known, self._repeated(labels, len(codes), completions), **options)

    def _repeated(self, labels: Sequence[int] | None, count: int, completions: int) -> list[int] | None:
        """The labels of several completions of a number of images; an unconditional prior has one label."""
        if labels is None:
            return [0] * (count * completions) if self.classes == 1 else None
        repeated: list[int] = np.tile(self._check_labels(labels, count), completions).tolist()
        return repeated

    def unknown(
        self,
        count: int,
        *,
        mask: np.ndarray | None = None,
        mask_ratio: float | None = None,
        seed: int = 0,
        first_image: int = 0,
    ) -> np.ndarray:
        """The codes that `inpaint` samples, bool [B, *grid], for a number of images; the rest as there.

        Raises:
            VqdeployError: An argument is out of range or missing, or the plan has no prior.
        """
        if (mask is None) == (mask_ratio is None):
            raise VqdeployError("the part to sample is not clear", expected="either a mask or a mask ratio")
        check_whole(seed=seed, first_image=first_image)
        raster, layout = self._sampler_class.raster, self.layout
        if mask_ratio is not None:
            ratio = as_numbers("the mask ratio", mask_ratio)
            if ratio.shape or not 0 <= ratio <= 1:
                raise VqdeployError("the mask ratio is out of range", expected="one number in 0..1", found=mask_ratio)
            return layout.share(float(ratio), raster, first_image + np.arange(count), seed)
        mask, square = as_array("the mask", mask).astype(bool), self.image_shape[:2]
        if mask.shape not in (square, (count, *square)):
            raise VqdeployError("the mask does not fit", expected=list(square), found=list(mask.shape))
        return layout.masked(np.broadcast_to(mask, (count, *square)), raster)

    def complete(
        self,
        known: np.ndarray,
        labels: Sequence[int] | None,
        *,
        seed: int = 0,
        first_image: int = 0,
        callback: Callback | None = None,
        **given: Any,
    ) -> Output:
        """Samples the codes that are -1, given the others.

        An autoregressive prior takes whole positions, and what comes before each in raster order.

        Args:
            known: Codes int64 [B, *grid], -1 where a code is to be sampled.
            labels: Class of each image [B]; None for no label, if the prior takes guidance.
            seed: Seed of the noise, at least 0.
            first_image: Index of the first image: image i of any batch is drawn from (seed, first_image + i).
            callback: Called after every step; see `Callback`.
            **given: Sampling options; the default of the checkpoint where one is left out or None.
                `temperature` divides the logits; 0 takes the most likely code.
                `top_k` keeps the k most likely codes; 0 keeps all.
                `top_p` keeps the most likely codes until their probability reaches p.
                These three may be lists of one value for each depth or level.
                `guidance_scale` s: logits are u + s * (c - u) with c given the label and u without; 1 is no guidance.
                Priors that were trained without labels too take it: masked ones and GPTs.
                Masked priors also take:
                `steps`, the number of engine calls.
                `schedule`, one of `vqdeploy.runtime.schedules.SCHEDULES`.
                `choice_temperature` scales the noise on the confidence, which falls to 0 at the last step.

        Raises:
            VqdeployError: An argument is out of range, or the plan has no prior.
        """
        start = time.perf_counter()
        chosen = self.options(**given)
        codes, seconds = self.sample(known, labels, seed, first_image, chosen, callback)
        engine = sum(seconds.values())
        sampled = time.perf_counter()
        images = self.decode(codes)
        end = time.perf_counter()
        timings = {
            "steps_s": engine,
            "host_s": sampled - start - engine,
            "decode_s": end - sampled,
            "total_s": end - start,
        }
        named = None if labels is None else np.asarray(labels).tolist()
        return Output(images, codes, {"seed": seed, "labels": named, **chosen}, timings)

    def options(self, **given: Any) -> dict[str, Any]:
        """The sampling options in force: those given, and the checkpoint's defaults.

        Raises:
            VqdeployError: An option is malformed or out of range, or the system does not have it.
        """
        return options.choose(given, self.sampling.options, self.layout.depth, self.codebook_size)

    def sample(
        self,
        known: np.ndarray,
        labels: Sequence[int] | None,
        seed: int = 0,
        first_image: int = 0,
        chosen: dict[str, Any] | None = None,
        callback: Callback | None = None,
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The codes of `complete`, and the seconds that each stage took of it; `chosen` comes from `options`."""
        known = self._check_codes(known, lowest=-1)
        classes = self._check_labels(labels, len(known))
        check_whole(seed=seed, first_image=first_image)
        chosen = chosen or self.options()
        guided = any(needs_guidance(chosen, label, self.sampling.no_label) for label in classes)
        codes, seconds = [], dict.fromkeys(self.stages, 0.0)
        for part in self._batches(len(known), self._call_images(guided)):
            images = range(*part.indices(len(known)))
            items = [Item(known[i], int(classes[i]), seed, first_image + i, chosen) for i in images]
            with self.sampler(len(items), guided) as sampler:
                sampler.seconds.clear()
                codes += self._all_codes(sampler, items, images, callback)
                for stage, spent in sampler.seconds.items():
                    seconds[stage] += spent
        return np.stack(codes), {stage: spent for stage, spent in seconds.items() if spent}

    def _all_codes(
        self, sampler: Sampler, items: Sequence[Item], images: range, callback: Callback | None
    ) -> list[np.ndarray]:
        """The codes of items, each of which is admitted to a slot of its own."""
        with self._lock:
            for slot, item in enumerate(items):
                sampler.admit(slot, item)
        slots = range(len(items))
        steps = max(sampler.left(slot) for slot in slots)
        for step in range(1, steps + 1):
            with self._lock:
                sampler.step()
            if callback:
                callback(Step(step, steps, images, np.stack([sampler.codes(slot) for slot in slots])))
        return [sampler.codes(slot) for slot in slots]

    @contextlib.contextmanager
    def sampler(self, slots: int, guided: bool = False) -> Iterator[Sampler]:
        """A sampler of this plan with empty slots, to step by hand; afterwards it is kept for the next request.

        Args:
            slots: How many images it holds.
            guided: Whether it takes images with guidance.

        Raises:
            VqdeployError: The plan has no prior.
        """
        kind, key = self._sampler_class, (slots, guided)
        with self._lock:
            sampler = self._samplers.pop(key, None)
            if sampler is None:
                sampler = kind(self._sessions, self.sampling, self.tokenizer, slots, guided, self._noise)
        yield sampler
        # One that an error left in the middle of a call is not worth keeping.
        sampler.draw = self._noise
        for slot in range(slots):
            sampler.release(slot)
        with self._lock:
            self._samplers[key] = sampler
            while len(self._samplers) > _KEPT_SAMPLERS[self.device]:
                del self._samplers[next(iter(self._samplers))]

    def _start_again(self) -> None:
        """In a forked child: what the parent opened stays open, but nobody runs it here."""
        self._lost = self._samplers, self._lock  # closed here, sessions would wait for threads that only the parent has
        self._samplers, self._lock = {}, threading.RLock()
        self._sessions.start_again()

    @property
    def _sampler_class(self) -> type[Sampler]:
        return SAMPLERS[self.sampling.kind]

    def _call_images(self, guided: bool) -> int:
        """How many images one call takes: what the plan's largest batch holds, or fewer where more are no faster."""
        rows = self._sampler_class.rows(guided)
        if rows > self._batch.max:
            raise VqdeployError(
                f"an image with guidance takes {rows} rows of a call",
                expected=f"a plan for {rows} or more",
                found=self._batch.max,
                fix=f"vqdeploy build PACKAGE --max-batch {rows}",
            )
        stages = {stage.name: stage for stage in self.manifest.stages}
        return min(self._batch.max // rows, self._sampler_class.most_slots(stages, self.device))

    def _check_labels(self, labels: Sequence[int] | None, count: int) -> np.ndarray:
        classes = self.classes
        if labels is None and self.sampling.no_label is not None:
            return np.full(count, self.sampling.no_label)
        if labels is None:
            raise VqdeployError("this prior needs labels", expected=f"labels in 0..{classes - 1}", found="none")
        array = as_numbers("the list of labels", labels, whole=True)
        if array.shape != (count,):
            expected = f"a list of one for each image ({count})"
            raise VqdeployError("there are too few or too many labels", expected=expected, found=array.tolist())
        if wrong := [label for label in array.tolist() if not 0 <= label < classes]:
            raise VqdeployError("a label is out of range", expected=f"0..{classes - 1}", found=wrong[0])
        return array

    def _check_codes(self, codes: np.ndarray, lowest: int = 0) -> np.ndarray:
        codes = as_array("codes", codes)
        if (
            codes.ndim != 1 + len(self.grid)
            or codes.shape[1:] != self.grid
            or not np.issubdtype(codes.dtype, np.integer)
        ):
            raise VqdeployError(
                "codes have the wrong shape or type",
                expected=f"whole numbers [B, {', '.join(map(str, self.grid))}]",
                found=f"{codes.dtype} {list(codes.shape)}",
            )
        if codes.size and not lowest <= codes.min() <= codes.max() < self.codebook_size:
            found = f"{codes.min()}..{codes.max()}"
            raise VqdeployError("codes are out of range", expected=f"{lowest}..{self.codebook_size - 1}", found=found)
        return codes.astype(np.int64)

    def _image_batches(self, count: int) -> list[slice]:
        """Batches for the tokenizer, small enough for the feature maps to stay in a CPU's caches or a GPU's memory."""
        return self._batches(
            count,
            min(self._batch.max, max(1, _CALL_PIXELS[self.device] // (self.image_shape[0] * self.image_shape[1]))),
        )

    def _batches(self, count: int, size: int) -> list[slice]:
        if count == 0:
            raise VqdeployError("nothing was asked for", expected="at least one image", found=0)
        return [slice(start, start + size) for start in range(0, count, size)]


class _Sessions(Mapping[str, Session]):
    """The sessions of a plan by stage, each opened when it is first asked for."""

    def __init__(self, bundle: Bundle, device: str, open_stages: Callable[[], Opener]):
        self._bundle, self._device, self._open_stages = bundle, device, open_stages
        self._names = tuple(stage.name for stage in bundle.manifest.stages)
        self._opened: dict[str, Session] = {}
        self._opener: Opener | None = None
        self._lost: list[object] = []
        self._unusable: VqdeployError | None = None

    def __getitem__(self, name: str) -> Session:
        if self._unusable:
            raise self._unusable
        if name not in self._names:
            raise KeyError(name)
        if name not in self._opened:
            self._opener = self._opener or self._open_stages()
            self._opened[name] = self._opener(self._bundle.manifest.stage(name))
        return self._opened[name]

    def start_again(self) -> None:
        """In a forked child: forgets what is open, and does not close it."""
        self._lost += [self._opened, self._opener]
        if self._device != "cpu" and self._opener:
            fix = "load the plan in the process that uses it"
            self._unusable = VqdeployError("a GPU cannot be used after a fork", fix=fix)
        self._opened, self._opener = {}, None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        """Closes all sessions."""
        self._opened.clear()
        self._opener, self._unusable = None, VqdeployError("this pipeline is closed", fix="load the plan again")


_PIPELINES: "weakref.WeakSet[Pipeline]" = weakref.WeakSet()


def _start_again_after_a_fork() -> None:
    for pipeline in list(_PIPELINES):
        pipeline._start_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_again_after_a_fork)


def _check_sampler(bundle: Bundle) -> None:
    """Refuses a plan whose stages do not fit its sampler."""
    manifest = bundle.manifest
    tokenizer, sampling = manifest.tokenizer, manifest.sampling
    if sampling is None or tokenizer is None or sampling.kind not in SAMPLERS:
        found = sampling and sampling.kind
        expected = " or ".join(SAMPLERS)
        raise ArtifactError("unknown kind of sampling", expected=expected, found=found, fix="pip install -U vqdeploy")
    kind = SAMPLERS[sampling.kind]
    inputs, outputs = kind.inputs(tokenizer, sampling), kind.outputs(tokenizer, sampling)
    if any(stage.name == "features" for stage in manifest.stages):
        codes = interface.whole(*Layout(tokenizer.maps).shape)
        inputs["features"] = {"codes": codes, "label": interface.whole()}
        outputs["features"] = {"features": interface.floats("layers", "width")}
    interface.check(manifest, inputs, outputs)
    try:
        options.choose({}, sampling.options, Layout(tokenizer.maps).depth, tokenizer.codebook_size)
    except VqdeployError as error:
        raise ArtifactError(f"sampling.options of the manifest is wrong: {error}") from error


def _check_arrays(stage: StageInfo, given: dict[str, np.ndarray]) -> None:
    """Refuses arrays that are not what a stage takes."""
    names = [info.name for info in stage.inputs]
    if set(names) != set(given):
        found = ", ".join(given) or "none"
        raise VqdeployError(f"stage {stage.name} takes other inputs", expected=", ".join(names), found=found)
    sizes: dict[str, int] = {}
    for info in stage.inputs:
        array = given[info.name]
        expected = f"{info.dtype} [{', '.join(map(str, info.shape))}]"
        fits = array.dtype == np.dtype(info.dtype) and array.ndim == len(info.shape)
        for wanted, found in zip(info.shape, array.shape, strict=False):
            if isinstance(wanted, str):
                size = stage.dims[wanted]
                fits = fits and sizes.setdefault(wanted, found) == found and size.min <= found <= size.max
                expected += f", {wanted} of {size.min} to {size.max}"
            else:
                fits = fits and wanted == found
        if not fits:
            shown = f"{array.dtype} {list(array.shape)}"
            raise VqdeployError(f"{info.name} has the wrong shape or type", expected=expected, found=shown)
