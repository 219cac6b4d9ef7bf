"""`load` and `Pipeline`: a plan and its tasks."""

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from vqdeploy.errors import ArtifactError, VqdeployError, shown
from vqdeploy.precision import PRECISIONS
from vqdeploy.runtime import checked, interface, options
from vqdeploy.runtime.arguments import MOST_THREADS, as_array, as_numbers, check_whole, is_whole
from vqdeploy.runtime.autoregressive import AutoregressiveSampler
from vqdeploy.runtime.backends import BACKENDS
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.condition import Condition
from vqdeploy.runtime.hierarchical import HierarchicalSampler
from vqdeploy.runtime.images import PREVIEW_VEIL, veil
from vqdeploy.runtime.layout import Layout
from vqdeploy.runtime.manifest import Manifest, SamplingInfo, StageInfo, TokenizerInfo
from vqdeploy.runtime.masked import MaskedSampler
from vqdeploy.runtime.memory import return_freed
from vqdeploy.runtime.next_scale import NextScaleSampler
from vqdeploy.runtime.noise import ThreadedNoise
from vqdeploy.runtime.sampler import Drawn, Item, Sampler, Spent, needs_guidance
from vqdeploy.runtime.session import Opener, Session

SAMPLERS: dict[str, type[Sampler]] = {
    "autoregressive": AutoregressiveSampler,
    "masked": MaskedSampler,
    "hierarchical": HierarchicalSampler,
    "next-scale": NextScaleSampler,
}
"""Kind of sampling in a manifest -> its sampler. Add a kind here."""

_CALL_PIXELS = {"cpu": 256 * 256, "cuda": 16 * 256 * 256}  # pixels of the images of an encoder or decoder call
_MOST_IMAGES = 2**20  # of one request for masks
_FEATURE_IMAGES = 8  # images of a call of `features`
# Samplers kept for later requests; on a GPU one for each batch size of a split request, since buffers, contexts and
# graphs are slow to make there.
_KEPT_SAMPLERS = {"cpu": 1, "cuda": 2}
_NOT_OF_THE_PRIOR = ("encode", "decode", "reconstruct", "features")


@dataclass(frozen=True)
class Step:
    """The progress of a generation, passed to a callback after each step.

    Attributes:
        step: Number of the step, from 1.
        steps: Number of steps for these images.
        images: Indices in the request of the images in this batch. A large request is split into batches, one after the
            other, each with steps 1..`steps`.
        codes: Codes so far, int64 [B, *grid]. Negative where not final: -1 - c for a tentative code c of a masked
            prior, -1 where nothing has been drawn.
    """

    step: int
    steps: int
    images: range
    codes: np.ndarray


Conditions = Sequence[int] | np.ndarray
"""Labels [B], texts [B, length], or features of texts [B, tokens, width]."""

Callback = Callable[[Step], object]


@dataclass
class Output:
    """Result of a request.

    Attributes:
        images: uint8 [B, H, W, 3].
        codes: int64 [B, *grid].
        options: The effective sampling options, see `Pipeline.options`, with `seed` and `labels`, or `texts`.
        timings: Wall-clock seconds. `steps_s`: engine calls of the prior, including waits for a GPU. `host_s`: work
            between them (noise, schedules, callbacks). `decode_s`: the decoder. `total_s`: their sum.
    """

    images: np.ndarray
    codes: np.ndarray
    options: dict[str, Any]
    timings: dict[str, float] = field(default_factory=dict)


def open_plan(path: str | Path) -> Bundle:
    """Opens the file of a plan. Its backend is known and its stages fit its sampler; digests are not compared.

    Raises:
        VqdeployError: The file does not exist, or is not a plan.
        ArtifactError: The file is damaged or of another version, or its backend or sampler does not fit.
    """
    try:
        path = os.fsdecode(path)
    except Exception as error:  # an object may raise anything when it is asked for its path
        raise VqdeployError("the plan is not a path", expected="a file name", found=path) from error
    bundle = Bundle(path)
    name = bundle.manifest.backend
    if name is None:
        raise VqdeployError(f"{path} is not a plan", fix="vqdeploy build PACKAGE")
    if name not in BACKENDS:
        raise ArtifactError(f"{path} is for an unknown backend", found=name, fix="pip install -U vqdeploy")
    if bundle.manifest.sampling:
        _check_sampler(bundle.manifest)
    return bundle


def load(
    path: str | Path, device: str = "auto", threads: int = 0, *, verify: bool = True, keep: bool = True
) -> "Pipeline":
    """Opens a plan: reads its manifest, checks the device and all digests. Stages open on first use.

    Args:
        path: The plan.
        device: `auto`, `cpu` or `cuda`. `auto` is CUDA if the plan was built for it and CUDA works here, else the CPU.
            Plans for TensorRT always run on CUDA.
        threads: CPU threads of the engine and of the noise; 0 for one per core.
        verify: Whether to check the digests, unless this user checked them before and the file has not changed
            since; False for a file that was just checked.
        keep: Whether stages stay open. False, for a process with one request, closes encoder and prior once their codes
            are there, so that they do not share the memory with the decoder.

    Raises:
        VqdeployError: The file does not exist, its library is not installed, or the device is not available.
        ArtifactError: The file is damaged, tampered with or of another version.
    """
    bundle = open_plan(path)
    if not isinstance(device, str) or device not in ("auto", "cpu", "cuda"):
        raise VqdeployError(f"device {shown(device)!r} is not supported", expected="auto, cpu or cuda", found=device)
    check_whole(most=MOST_THREADS, threads=threads)
    backend = BACKENDS[str(bundle.manifest.backend)]()
    device = backend.place(bundle.manifest, device)
    if verify:
        checked.check(bundle)
    return Pipeline(bundle, device, lambda: backend.opener(bundle, device, threads, None), threads, keep=keep)


class Pipeline:
    """A plan and its tasks.

    Threads may share a pipeline: engine calls are serialized, those of samplers too, but not those through `session`.
    A sampler is used by one thread at a time. Use the pipeline as a context manager, or call `close`, to free engines
    and memory. After a fork, the child reopens stages on the CPU; a GPU cannot be used there.
    """

    def __init__(
        self, bundle: Bundle, device: str, open_stages: Callable[[], Opener], threads: int = 0, *, keep: bool = True
    ):
        """Makes a pipeline that opens stages on first use.

        Args:
            bundle: The plan, from `open_plan`.
            device: Device of its stages, `cpu` or `cuda`.
            open_stages: Returns an opener of stages; see `vqdeploy.runtime.session.Backend`.
            threads: As for `load`.
            keep: As for `load`.
        """
        self.bundle, self.manifest, self.device = bundle, bundle.manifest, device
        self._sessions = _Sessions(bundle, device, open_stages)
        self._batch = bundle.manifest.batch
        self._noise, self._keep = ThreadedNoise(threads), keep
        self._lock = threading.RLock()  # serializes engine calls
        self._samplers: dict[tuple[int, bool], Sampler] = {}
        self._closed = False
        _PIPELINES.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the stages and the file. Later requests raise `VqdeployError`; closing twice is allowed.

        A sampler in use keeps its stages, and may be stepped, until it is left.
        """
        with self._lock:
            self._closed = True
            self._samplers.clear()
            self._sessions.close()
            self.bundle.close()

    def _done(self) -> None:
        """Closes the stages that made codes, unless they are kept; a later request opens them again."""
        if not self._keep:
            with self._lock:
                self._samplers.clear()
                self._sessions.clear()

    @property
    def tokenizer(self) -> TokenizerInfo:
        """Shapes of images and codes, and the size of the codebook.

        Raises:
            VqdeployError: The plan has no tokenizer.
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
            raise VqdeployError("this plan has a tokenizer and no prior", fix="vqdeploy train --tokenizer CHECKPOINT")
        return self.manifest.sampling

    @property
    def layout(self) -> Layout:
        """Array layout of the codes of an image.

        Raises:
            VqdeployError: The plan has no tokenizer.
        """
        return Layout(self.tokenizer.maps)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image: (h, w, Q), or (N,) for several levels, see `maps`."""
        return self.layout.shape

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image: height, width, channels."""
        return self.tokenizer.image

    @property
    def codebook_size(self) -> int:
        """Number of codes in the codebook, K."""
        return self.tokenizer.codebook_size

    @property
    def classes(self) -> int:
        """Number of labels; 1 for a prior that is unconditional, or conditioned on texts.

        Raises:
            VqdeployError: The plan has no prior.
        """
        return self.sampling.classes

    @property
    def condition(self) -> Condition:
        """What images are conditioned on: labels, or texts of a length and a vocabulary.

        Raises:
            VqdeployError: The plan has no prior.
        """
        return Condition.of(self.sampling)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that the plan has."""
        return tuple(stage.name for stage in self.manifest.stages)

    @property
    def prior_stages(self) -> tuple[str, ...]:
        """Names of those that draw codes."""
        return tuple(name for name in self.stages if name not in _NOT_OF_THE_PRIOR)

    def session(self, stage: str) -> Session:
        """The session of one stage, for direct engine calls, which the caller has to serialize.

        Raises:
            ArtifactError: There is no such stage, or it cannot be opened.
        """
        self.manifest.stage(stage)
        with self._lock:
            return self._sessions[stage]

    def run(self, stage: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one stage on arrays.

        Args:
            stage: Name of the stage.
            **arrays: One array per input, with the shape and dtype that the manifest gives.

        Returns:
            The outputs by name.

        Raises:
            VqdeployError: An input is missing, unknown, or has another shape or dtype.
            ArtifactError: There is no such stage, or the engine failed.
        """
        info = self.manifest.stage(stage)
        given = {name: as_array(name, array) for name, array in arrays.items()}
        _check_arrays(info, given)
        with self._lock:
            return self._sessions[stage].run(**given)

    @property
    def keeps_pixels(self) -> bool:
        """Whether `inpaint` draws only the masked codes, so that all other pixels stay as they are.

        Raises:
            VqdeployError: The plan has no prior.
        """
        return not self._sampler_class.raster

    def maps(self, codes: np.ndarray) -> list[np.ndarray]:
        """Codes [B, *grid] -> the map of each level [B, h, w, Q], coarse to fine; most systems have one level.

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
            name: Number (int) or name (str) of the class. A numeric string that is not a name is taken as the number,
                unless the class names are numbers themselves.

        Raises:
            VqdeployError: There is no such class.
        """
        if self.condition.name == "text":
            expected = f"{'features' if self.condition.features else 'token ids'} of texts"
            raise VqdeployError("this prior has no labels", expected=expected, found=name)
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
            VqdeployError: The images have the wrong shape or dtype.
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
        codes = np.concatenate([self._run("encode", image=images[part])["codes"] for part in parts])
        self._done()
        return codes

    def decode(self, codes: np.ndarray, depth: int | None = None) -> np.ndarray:
        """Codes int64 [B, *grid] -> images uint8 [B, H, W, 3].

        Args:
            codes: The codes.
            depth: Use only the first codes of each position, or the first maps of several; None for all.

        Raises:
            VqdeployError: The codes have the wrong shape or dtype, or codes or depth are out of range.
        """
        codes = self._check_codes(codes)
        self.check_depth(depth)
        if depth is not None:
            codes = self.layout.first(codes, depth)
        return self._decoded(codes)

    def preview(self, codes: np.ndarray) -> np.ndarray:
        """The images uint8 [B, H, W, 3] of codes [B, *grid] that are negative where not final; see `Step`.

        These parts are greyed out or, where codes are summed over several maps, the maps are left out.

        Raises:
            VqdeployError: The codes have the wrong shape or dtype, or are out of range.
        """
        codes = self._check_codes(codes, lowest=-self.codebook_size)
        if self.tokenizer.omits_depths and len(self.layout.maps) > 1:
            return self._decoded(codes)
        pixels = self.decode(np.where(codes < 0, -1 - codes, codes))
        return veil(pixels, self.layout.unsettled(codes), PREVIEW_VEIL) if (codes < 0).any() else pixels

    def decode_maps(self, whole_maps: np.ndarray) -> np.ndarray:
        """Sums of code vectors of all scales float32 [B, h * w, D] -> images uint8 [B, H, W, 3]; see `Drawn`.

        Raises:
            VqdeployError: They have the wrong shape or dtype.
            ArtifactError: The plan has no stage `reconstruct`.
        """
        whole_maps = as_array("whole_maps", whole_maps)
        parts = self._image_batches(whole_maps.shape[0] if whole_maps.ndim else 0)
        return np.concatenate([self.run("reconstruct", whole_map=whole_maps[part])["image"] for part in parts])

    def _decoded(self, codes: np.ndarray) -> np.ndarray:
        parts = self._image_batches(len(codes))
        return np.concatenate([self._run("decode", codes=codes[part])["image"] for part in parts])

    def check_depth(self, depth: int | None) -> None:
        """Rejects a number of depths that `decode` does not take.

        Raises:
            VqdeployError: It is out of range, or the codes have no depths to leave out.
        """
        if depth is None:
            return
        if not self.tokenizer.omits_depths:
            raise VqdeployError("this plan's codes have no depths to leave out", expected="no depth", found=depth)
        if not is_whole(depth) or not 1 <= depth <= self.layout.depth:
            raise VqdeployError("no such depth", expected=f"1..{self.layout.depth}", found=depth)

    def _run(self, stage: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        with self._lock:
            return self._sessions[stage].run(**arrays)

    def features(self, images: np.ndarray, labels: Conditions | None = None) -> np.ndarray:
        """Hidden states of the prior before its first layer and after each, averaged over the positions.

        Args:
            images: uint8 [B, H, W, 3].
            labels: Class of each image; None for no label.

        Returns:
            float32 [B, layers + 1, width].

        Raises:
            VqdeployError: The plan has no stage `features`, or an argument is malformed.
        """
        if "features" not in self.stages:
            raise VqdeployError(
                "this plan has no features", expected="a stage `features`", found=", ".join(self.stages)
            )
        codes = self.encode(images)
        name, conditions = self.condition.name, self._check_conditions(labels, len(codes))
        parts = batches(len(codes), min(self._batch.max, _FEATURE_IMAGES))
        return np.concatenate(
            [self._run("features", codes=codes[part], **{name: conditions[part]})["features"] for part in parts]
        )

    def reconstruct(self, images: np.ndarray, depth: int | None = None) -> np.ndarray:
        """Images uint8 [B, H, W, 3] -> codes -> images uint8 [B, H, W, 3]; see `encode` and `decode`.

        Raises:
            VqdeployError: The images have the wrong shape or dtype, or the depth is out of range.
        """
        return self.decode(self.encode(images), depth)

    def generate(self, labels: Conditions | None = None, *, num_images: int | None = None, **options: Any) -> Output:
        """Samples images.

        Args:
            labels: Class of each image; None for `num_images` of an unconditional prior. A prior that is conditioned on
                texts takes their token ids int64 [B, length] or features float32 [B, tokens, width]; `condition` has
                the sizes.
            num_images: Number of images if `labels` is None; 1 by default.
            **options: `seed`, `first_image`, `callback` and sampling options; see `complete`.

        Raises:
            VqdeployError: A label or an option is out of range, or the plan has no prior.
        """
        if labels is None:
            if not self._unconditional:
                raise self.condition.missing()
            num_images = 1 if num_images is None else num_images
            check_whole(1, num_images=num_images)
            labels = np.zeros(num_images, np.int64)
        elif num_images is not None:
            raise VqdeployError("labels already give the number of images", expected="no num_images", found=num_images)
        known = np.full((len(self.condition.check(labels)), *self.grid), -1, np.int64)
        return self.complete(known, labels, **options)

    def inpaint(
        self,
        images: np.ndarray,
        labels: Conditions | None = None,
        *,
        mask: np.ndarray | None = None,
        mask_ratio: float | None = None,
        completions: int = 1,
        seed: int = 0,
        first_image: int = 0,
        **options: Any,
    ) -> Output:
        """Keeps a part of the codes of each image and samples the rest.

        Masked and next-scale priors sample the masked codes alone, and with a mask, pixels outside it stay as they are.
        Others draw in raster order: they sample all codes from the first row of a map that the mask touches.

        Args:
            images: uint8 [B, H, W, 3].
            labels: Classes, or texts as for `generate`; None for an unconditional prior, and for no label if the prior
                takes guidance.
            mask: Bool [B, H, W] or [H, W], True for unknown pixels.
            mask_ratio: Instead of a mask, the fraction of codes to sample: random positions, by the seed, or the bottom
                rows where codes are drawn in raster order.
            completions: Number of samples per image, N. The result has N * B images: the first sample of each image,
                then the second of each, and so on.
            seed: See `complete`.
            first_image: See `complete`.
            **options: See `complete`.

        Raises:
            VqdeployError: An argument is out of range or missing.
        """
        check_whole(1, _MOST_IMAGES, completions=completions)
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
        labels: Conditions | None = None,
        *,
        keep: int = 1,
        completions: int = 1,
        **options: Any,
    ) -> Output:
        """Keeps the codes of the coarse levels of each image and samples those of the finer ones.

        Args:
            images: uint8 [B, H, W, 3].
            labels: Class of each image; None for an unconditional prior.
            keep: Number of levels to keep, coarsest first.
            completions: See `inpaint`.
            **options: See `complete`.

        Raises:
            VqdeployError: The system's codes have one level, or an argument is out of range.
        """
        check_whole(1, _MOST_IMAGES, completions=completions)
        codes = self.encode(images)
        maps = self.maps(codes)
        if len(maps) == 1:
            raise VqdeployError("this plan's codes have one level", expected="two or more")
        if not is_whole(keep) or not 0 <= keep < len(maps):
            raise VqdeployError("no such number of levels to keep", expected=f"0..{len(maps) - 1}", found=keep)
        count = sum(level[0].size for level in maps[:keep])
        known = np.concatenate([np.where(np.arange(codes.shape[1]) < count, codes, -1)] * completions)
        return self.complete(known, self._repeated(labels, len(codes), completions), **options)

    def _repeated(self, labels: Conditions | None, count: int, completions: int) -> np.ndarray | None:
        """The labels or texts of all completions; an unconditional prior has one label, 0."""
        if labels is None:
            return np.zeros(count * completions, np.int64) if self._unconditional else None
        return np.concatenate([self.condition.check(labels, count)] * completions)

    @property
    def _unconditional(self) -> bool:
        return self.classes == 1 and self.sampling.text is None

    def unknown(
        self,
        count: int,
        *,
        mask: np.ndarray | None = None,
        mask_ratio: float | None = None,
        seed: int = 0,
        first_image: int = 0,
    ) -> np.ndarray:
        """The codes that `inpaint` samples, bool [B, *grid], for `count` images; other arguments as for `inpaint`.

        Raises:
            VqdeployError: An argument is out of range or missing, or the plan has no prior.
        """
        if (mask is None) == (mask_ratio is None):
            raise VqdeployError("the part to sample is ambiguous", expected="either a mask or a mask ratio")
        check_whole(most=_MOST_IMAGES, count=count)
        check_whole(seed=seed, first_image=first_image)
        raster, layout = self._sampler_class.raster, self.layout
        if mask_ratio is not None:
            ratio = as_numbers("the mask ratio", mask_ratio)
            if ratio.shape or not 0 <= ratio <= 1:
                raise VqdeployError("the mask ratio is out of range", expected="one number in 0..1", found=mask_ratio)
            return layout.share(float(ratio), raster, first_image + np.arange(count), seed)
        mask, square = as_array("the mask", mask), self.image_shape[:2]
        if mask.shape not in (square, (count, *square)):
            raise VqdeployError("the mask does not fit", expected=list(square), found=list(mask.shape))
        if mask.dtype.kind not in "biuf" or not ((mask == 0) | (mask == 1)).all():
            raise VqdeployError("the mask is malformed", expected="bool, or numbers 0 and 1", found=f"{mask.dtype}")
        mask = np.broadcast_to(mask.astype(bool), (count, *square))
        unknown = layout.masked(mask, raster)
        if (mask.any((1, 2)) & ~unknown.reshape(count, -1).any(1)).any():
            raise VqdeployError("the mask is too small", expected="one that covers the centre of a code's cell")
        return unknown

    def complete(
        self,
        known: np.ndarray,
        labels: Conditions | None,
        *,
        seed: int = 0,
        first_image: int = 0,
        callback: Callback | None = None,
        **given: Any,
    ) -> Output:
        """Samples the codes that are -1, given the others.

        An autoregressive prior draws all codes of a position at once, given those before it in raster order.

        Args:
            known: Codes int64 [B, *grid], -1 for codes to sample.
            labels: Class of each image [B], or texts as for `generate`; None for no label, if the prior takes guidance.
            seed: Seed of the noise, a nonnegative integer.
            first_image: Index of the first image: the noise of image i depends on (seed, first_image + i).
            callback: Called with a `Step` after each step. On a GPU, each call waits for the codes.
            **given: The options of `vqdeploy.options.OPTIONS` that the prior has; None or no value means the
                default of the checkpoint. Options of each depth may be lists, with one value per depth or level.

        Raises:
            VqdeployError: An argument is out of range, or the plan has no prior.
        """
        start = time.perf_counter()
        chosen = self.options(**given)
        drawn, spent = self._sample(known, labels, seed, first_image, chosen, callback)
        self._done()
        engine = sum(each.seconds for each in spent.values())
        sampled = time.perf_counter()
        images, codes = self._images(drawn), np.stack([each.codes for each in drawn])
        end = time.perf_counter()
        timings = {
            "steps_s": engine,
            "host_s": sampled - start - engine,
            "decode_s": end - sampled,
            "total_s": end - start,
        }
        named = self.condition.record(labels)
        return Output(images, codes, {"seed": seed, f"{self.condition.name}s": named, **chosen}, timings)

    def options(self, **given: Any) -> dict[str, Any]:
        """The effective sampling options: those given, else the defaults of the checkpoint.

        Raises:
            VqdeployError: An option is malformed or out of range, or the system does not have it.
        """
        return options.choose(given, self.sampling.options, self.layout.depth, self.codebook_size)

    def sample(
        self,
        known: np.ndarray,
        labels: Conditions | None,
        seed: int = 0,
        first_image: int = 0,
        chosen: dict[str, Any] | None = None,
        callback: Callback | None = None,
    ) -> tuple[np.ndarray, dict[str, Spent]]:
        """Samples codes as `complete` does, and decodes nothing.

        Args:
            known: Codes int64 [B, *grid], -1 for codes to sample.
            labels: As for `complete`.
            seed: As for `complete`.
            first_image: As for `complete`.
            chosen: Sampling options from `options`; None for the defaults.
            callback: As for `complete`.

        Returns:
            Codes int64 [B, *grid], and the engine calls of each stage that ran, by name.

        Raises:
            VqdeployError: An argument is malformed or out of range, or the plan has no prior.
            ArtifactError: An engine failed.
        """
        drawn, spent = self._sample(known, labels, seed, first_image, chosen, callback)
        return np.stack([each.codes for each in drawn]), spent

    def _images(self, drawn: Sequence[Drawn]) -> np.ndarray:
        images = np.empty((len(drawn), *self.image_shape), np.uint8)
        maps = {image: each.whole_map for image, each in enumerate(drawn) if each.whole_map is not None}
        if maps:
            images[list(maps)] = self.decode_maps(np.stack(list(maps.values())))
        if plain := [image for image in range(len(drawn)) if image not in maps]:
            images[plain] = self.decode(np.stack([drawn[image].codes for image in plain]))
        return images

    def _sample(
        self,
        known: np.ndarray,
        labels: Conditions | None,
        seed: int,
        first_image: int,
        chosen: dict[str, Any] | None,
        callback: Callback | None,
    ) -> tuple[list[Drawn], dict[str, Spent]]:
        """What was drawn for each image, and what each stage that ran took."""
        known = self._check_codes(known, lowest=-1)
        conditions = self._check_conditions(labels, len(known))
        check_whole(seed=seed, first_image=first_image)
        if callback is not None and not callable(callback):
            raise VqdeployError("the callback cannot be called", expected="a function of a Step", found=callback)
        chosen = chosen or self.options()
        guided = any(needs_guidance(chosen, condition, self.sampling.no_label) for condition in conditions)
        drawn: list[Drawn] = []
        spent: dict[str, Spent] = defaultdict(Spent)
        for part in batches(len(known), self.call_images(guided)):
            images = range(*part.indices(len(known)))
            items = [Item(known[i], conditions[i], seed, first_image + i, chosen) for i in images]
            with self.sampler(len(items), guided) as sampler:
                sampler.spent.clear()
                drawn += self._draw_all(sampler, items, images, callback)
                for stage, each in sampler.spent.items():
                    spent[stage] += each
        return drawn, spent

    def _draw_all(
        self, sampler: Sampler, items: Sequence[Item], images: range, callback: Callback | None
    ) -> list[Drawn]:
        """Draws items that fit one sampler, a slot each."""
        for slot, item in enumerate(items):
            sampler.admit(slot, item)
        slots = range(len(items))
        steps = max(sampler.left(slot) for slot in slots)
        for step in range(1, steps + 1):
            sampler.step()
            if callback:
                callback(Step(step, steps, images, np.stack([sampler.codes(slot) for slot in slots])))
        return [sampler.drawn(slot) for slot in slots]

    @contextlib.contextmanager
    def sampler(self, slots: int, guided: bool = False) -> Iterator[Sampler]:
        """A context manager with a sampler of empty slots, to admit images and step by step; see `Sampler`.

        Args:
            slots: Number of images that it holds, at most those of the largest batch of the plan.
            guided: Whether it supports guidance, at two rows of the batch for each image.

        Raises:
            VqdeployError: The plan has no prior, or not as many rows, or the pipeline is closed.
        """
        kind, key = self._sampler_class, (slots, guided)
        most = self._most_slots(guided)
        if not is_whole(slots) or not 1 <= slots <= most:
            raise VqdeployError("slots is out of range", expected=f"an integer in 1..{most}", found=slots)
        with self._lock:
            self._sessions.check_open()
            kept = self._samplers
            sampler = kept.pop(key, None)
            if sampler is None:
                sampler = kind(self._sessions, self.sampling, self.tokenizer, slots, guided, self._noise, self._lock)
        yield sampler
        # A sampler that an error left in the middle of a call is not reused.
        sampler.draw = self._noise
        for slot in range(slots):
            sampler.release(slot)
        with self._lock:
            if self._closed or kept is not self._samplers:  # this is a forked child, and the sampler the parent's
                return
            kept[key] = sampler
            while len(kept) > _KEPT_SAMPLERS[self.device]:
                del kept[next(iter(kept))]

    @property
    def quantized(self) -> bool:
        """Whether the prior has matrix products in int8 or int4."""
        return any(PRECISIONS[each.precision].bits for each in self.manifest.stages if each.name in self.prior_stages)

    def call_images(self, guided: bool = False) -> int:
        """Images per sampler: as many as the largest batch of the plan holds, or fewer if more are no faster.

        Raises:
            VqdeployError: The plan has no prior, or not as many rows as an image with guidance takes.
        """
        stages = {stage.name: stage for stage in self.manifest.stages}
        return min(self._most_slots(guided), self._sampler_class.most_slots(stages, self.device))

    def _start_again(self) -> None:
        """In a forked child: forgets the sessions of the parent, whose threads do not exist here."""
        _keep_for_ever(self._samplers)
        self._samplers, self._lock = {}, threading.RLock()
        self._sessions.start_again()

    @property
    def _sampler_class(self) -> type[Sampler]:
        return SAMPLERS[self.sampling.kind]

    def _most_slots(self, guided: bool) -> int:
        """Images that the largest batch of the plan holds."""
        rows = self._sampler_class.rows(guided)
        if rows > self._batch.max:
            raise VqdeployError(
                f"an image with guidance takes {rows} rows of the batch",
                expected=f"a plan for batches of {rows} or more",
                found=self._batch.max,
                fix=f"vqdeploy build PACKAGE --max-batch {rows}",
            )
        return self._batch.max // rows

    def _check_conditions(self, labels: Conditions | None, count: int) -> np.ndarray:
        if labels is not None:
            return self.condition.check(labels, count)
        if self.sampling.no_label is None:
            raise self.condition.missing()
        return np.full(count, self.sampling.no_label)

    def _check_codes(self, codes: np.ndarray, lowest: int = 0) -> np.ndarray:
        return self.layout.check(codes, self.codebook_size, lowest)

    def _image_batches(self, count: int) -> list[slice]:
        """Batches for the tokenizer, small enough for CPU caches or GPU memory."""
        return batches(
            count,
            min(self._batch.max, max(1, _CALL_PIXELS[self.device] // (self.image_shape[0] * self.image_shape[1]))),
        )


def batches(count: int, size: int) -> list[slice]:
    """The parts of a request of `count` images in calls of at most `size`.

    Raises:
        VqdeployError: It has no images.
    """
    if count == 0:
        raise VqdeployError("the request has no images", expected="at least one image", found=0)
    return [slice(start, start + size) for start in range(0, count, size)]


class _Sessions(Mapping[str, Session]):
    """The sessions of a plan by stage, each opened on first use."""

    def __init__(self, bundle: Bundle, device: str, open_stages: Callable[[], Opener]):
        self._bundle, self._device, self._open_stages = bundle, device, open_stages
        self._names = tuple(stage.name for stage in bundle.manifest.stages)
        self._opened: dict[str, Session] = {}
        self._opener: Opener | None = None
        self._unusable: VqdeployError | None = None

    def __getitem__(self, name: str) -> Session:
        self.check_open()
        if name not in self._names:
            raise KeyError(name)
        if name not in self._opened:
            self._opener = self._opener or self._open_stages()
            session = self._opened[name] = self._opener(self._bundle.manifest.stage(name))
            _SESSIONS[id(session)] = session
            return_freed()
        return self._opened[name]

    def start_again(self) -> None:
        """In a forked child: forgets the open sessions without closing them."""
        _keep_for_ever(self._opener)
        if self._device != "cpu":  # the parent asked CUDA for its devices, if for nothing else
            fix = "load the plan in the process that uses it"
            self._unusable = VqdeployError("a GPU cannot be used after a fork", fix=fix)
        self._opened, self._opener = {}, None

    def check_open(self) -> None:
        """Rejects use after `close`, or of a GPU after a fork."""
        if self._unusable:
            raise self._unusable

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def clear(self) -> None:
        """Closes all sessions; they open again on next use."""
        self._opened.clear()
        return_freed()

    def close(self) -> None:
        """Closes all sessions for good."""
        self.clear()
        self._opener, self._unusable = None, VqdeployError("this pipeline is closed", fix="load the plan again")


def _keep_for_ever(of_parent: object) -> None:
    """Keeps what a forked child has of its parent, to the end of the process and beyond.

    A session that is destroyed waits for its threads, which do not exist in the child, and when an interpreter ends it
    destroys all that its references do not save.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(of_parent))


_PIPELINES: "weakref.WeakSet[Pipeline]" = weakref.WeakSet()
_SESSIONS: "weakref.WeakValueDictionary[int, Session]" = weakref.WeakValueDictionary()


def _start_again_after_a_fork() -> None:
    for session in list(_SESSIONS.values()):
        _keep_for_ever(session)
    for pipeline in list(_PIPELINES):
        pipeline._start_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_again_after_a_fork)


def _check_sampler(manifest: Manifest) -> None:
    """Rejects a plan whose stages do not fit its sampler."""
    tokenizer, sampling = manifest.tokenizer, manifest.sampling
    if sampling is None or tokenizer is None or sampling.kind not in SAMPLERS:
        found = sampling and sampling.kind
        expected = " or ".join(SAMPLERS)
        what = "sampling.kind of the manifest is unknown"
        raise ArtifactError(what, expected=expected, found=repr(found), fix="pip install -U vqdeploy")
    kind = SAMPLERS[sampling.kind]
    inputs, outputs = kind.inputs(tokenizer, sampling), kind.outputs(tokenizer, sampling)
    if any(stage.name == "features" for stage in manifest.stages):
        codes = interface.whole(*Layout(tokenizer.maps).shape)
        inputs["features"] = {"codes": codes, **Condition.of(sampling).inputs}
        outputs["features"] = {"features": interface.floats("layers", "width")}
    interface.check(manifest, inputs, outputs)
    names, guided = set(sampling.options), sampling.no_label is not None
    if not names.issuperset(kind.needs) or guided != ("guidance_scale" in names):
        expected = f"{', '.join(kind.needs)} and {'a' if guided else 'no'} guidance_scale"
        raise ArtifactError(
            "sampling.options of the manifest is wrong", expected=expected, found=", ".join(sorted(names))
        )
    try:
        options.choose({}, sampling.options, Layout(tokenizer.maps).depth, tokenizer.codebook_size)
    except VqdeployError as error:
        raise ArtifactError(f"sampling.options of the manifest is wrong: {error}") from error


def _check_arrays(stage: StageInfo, given: dict[str, np.ndarray]) -> None:
    """Rejects arrays that do not fit the inputs of a stage."""
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
