"""A loaded plan, ready for requests."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import options
from vqdeploy.runtime.autoregressive import Callback, Request, Sampler
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.manifest import BatchRange

log = logging.getLogger("vqdeploy")

_CALL_PIXELS = 256 * 256
_LARGEST = 2**62  # seed and image index, which key the noise


@dataclass
class Output:
    """Result of a request: images uint8 [B, H, W, 3], codes int64 [B, *grid], the options in force, seconds."""

    images: np.ndarray
    codes: np.ndarray
    options: dict[str, Any]
    timings: dict[str, float] = field(default_factory=dict)


def load(path: str | Path, device: str = "auto", threads: int = 0) -> "Pipeline":
    """Opens a plan: reads its manifest, checks the device and all digests, then opens the engines.

    Args:
        path: The plan.
        device: `auto` or `cpu`.
        threads: Threads of the engine; 0 for as many as there are cores.

    Raises:
        VqdeployError: The file does not exist, its library is not installed, or its device is not here.
        ArtifactError: The file is damaged, tampered with or of another version.
    """
    bundle = Bundle(path)
    backend = bundle.manifest.backend
    if backend is None:
        raise VqdeployError(f"{path} is not a plan", fix="vqdeploy build PACKAGE")
    if device not in ("auto", "cpu"):
        raise VqdeployError(f"device {device!r} is not supported", expected="auto or cpu", found=device)
    if backend not in ("onnxrt", "tensorrt-rtx", "tensorrt"):
        raise ArtifactError(
            f"{path} is for a backend that is not known here", found=backend, fix="pip install -U vqdeploy"
        )
    if backend != "onnxrt":
        raise VqdeployError(
            f"{path} was built for {backend} and cannot run here",
            expected=f"an NVIDIA GPU of {' or '.join(bundle.manifest.targets)} and a vqdeploy that drives it",
            found="ONNX Runtime only",
            fix="vqdeploy build PACKAGE --backend onnxrt",
        )
    bundle.verify()
    return Pipeline(bundle, threads)


class Pipeline:
    """The tasks of a plan. Not for use by several threads at once.

    With `profile`, ONNX Runtime writes a trace of each stage into that folder; see `OnnxrtSession.end_profile`.
    """

    def __init__(self, bundle: Bundle, threads: int = 0, profile: Path | None = None):
        from vqdeploy.runtime.onnxrt import OnnxrtSession

        self.bundle = bundle
        self.manifest = bundle.manifest
        self._config, self._batch = bundle.manifest.config, bundle.manifest.batch or BatchRange()
        self._sessions = {
            stage.name: OnnxrtSession(bundle, stage, threads, profile and profile / stage.name)
            for stage in self.manifest.stages
        }
        self._sampler: Any = Sampler(self._sessions["step"]) if "step" in self._sessions else None
        if not self._configured():
            raise ArtifactError(f"the configuration in {bundle.path} is damaged", fix="vqdeploy build PACKAGE")

    def _configured(self) -> bool:
        """Whether the manifest holds what this class reads of it."""
        config = self._config
        try:
            counts = [config["tokenizer"]["codebook_size"]] + ([config["prior"]["classes"]] if self._sampler else [])
            sampling = [config["sampling"][name] for name in ("temperature", "top_k", "top_p")]
            texts = list(config["labels"])
            return (
                {"encode", "decode"} <= set(self._sessions)
                and 1 <= self._batch.min <= self._batch.opt <= self._batch.max
                and all(isinstance(count, int) and count > 0 for count in counts)
                and all(isinstance(value, int | float) for value in sampling)
                and all(isinstance(text, str) for text in texts)
            )
        except (KeyError, TypeError):
            return False

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image: rows, columns, depth."""
        return self.manifest.stage("encode").outputs[0].shape[1:]

    @property
    def side(self) -> int:
        """Height and width of an image in pixels."""
        return self.manifest.stage("encode").inputs[0].shape[1]

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self._config["tokenizer"]["codebook_size"]

    @property
    def classes(self) -> int:
        """Number of labels; 1 for an unconditional prior.

        Raises:
            VqdeployError: The plan has no prior.
        """
        if self._sampler is None:
            raise VqdeployError("this plan has a tokenizer and no prior", fix="vqdeploy train")
        return self._config["prior"]["classes"]

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that the plan has."""
        return tuple(self._sessions)

    def session(self, stage: str) -> Any:
        """The session of one stage, to drive it call by call."""
        self.manifest.stage(stage)
        return self._sessions[stage]

    def label(self, name: str) -> int:
        """The label of a class by its name or its number.

        Raises:
            VqdeployError: There is no such class.
        """
        names = self._config["labels"]
        if name in names:
            return list(names).index(name)
        if name.isdecimal() and len(name) < 10 and int(name) < self.classes:
            return int(name)
        expected = f"0..{self.classes - 1}" + (f" or one of {', '.join(names)}" if names else "")
        raise VqdeployError("no such label", expected=expected, found=name)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [B, H, W, 3] -> codes int64 [B, *grid].

        Raises:
            VqdeployError: The images have the wrong shape or type.
        """
        expected = (self.side, self.side, 3)
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            raise VqdeployError(
                "images have the wrong shape or type",
                expected=f"uint8 [B, {', '.join(map(str, expected))}]",
                found=f"{images.dtype} {list(images.shape)}",
            )
        run = self._sessions["encode"].run
        return np.concatenate([run(image=images[part])["codes"] for part in self._image_batches(len(images))])

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
            if not 1 <= depth <= self.grid[-1]:
                raise VqdeployError("no such depth", expected=f"1..{self.grid[-1]}", found=depth)
            codes = np.where(np.arange(self.grid[-1]) < depth, codes, -1)
        run = self._sessions["decode"].run
        return np.concatenate([run(codes=codes[part])["image"] for part in self._image_batches(len(codes))])

    def reconstruct(self, images: np.ndarray, depth: int | None = None) -> np.ndarray:
        """Images -> their codes -> images, as `encode` and `decode`."""
        return self.decode(self.encode(images), depth)

    def generate(self, labels: Sequence[int] | None = None, *, num_images: int = 1, **options: Any) -> Output:
        """Samples images.

        Args:
            labels: Class of each image; None for `num_images` of an unconditional prior.
            num_images: How many images when `labels` is None.
            **options: `seed`, `first_image`, `temperature`, `top_k`, `top_p`, `callback`; see `complete`.

        Raises:
            VqdeployError: A label or an option is out of range, or the plan has no prior.
        """
        if labels is None:
            if self.classes > 1:
                raise VqdeployError(
                    "this prior needs labels", expected=f"labels in 0..{self.classes - 1}", found="none"
                )
            labels = [0] * num_images
        known = np.full((np.size(labels), *self.grid), -1, np.int64)
        return self.complete(known, labels, **options)

    def inpaint(
        self,
        images: np.ndarray,
        labels: Sequence[int] | None = None,
        *,
        mask: np.ndarray | None = None,
        mask_ratio: float | None = None,
        **options: Any,
    ) -> Output:
        """Keeps the upper rows of images and samples the rest.

        The prior goes from the top left to the bottom right: everything from the first row of codes that the mask
        touches is sampled anew.

        Args:
            images: uint8 [B, H, W, 3].
            labels: Class of each image; None for an unconditional prior.
            mask: True where pixels are unknown, bool [B, H, W] or [H, W].
            mask_ratio: Instead of a mask, the share of the image to sample, from the bottom up.
            **options: As for `generate`.

        Raises:
            VqdeployError: An argument is out of range or missing.
        """
        if (mask is None) == (mask_ratio is None):
            raise VqdeployError("the part to sample is not clear", expected="either a mask or a mask ratio")
        images = np.asarray(images)
        codes = self.encode(images)
        if mask_ratio is not None:
            if not 0 <= mask_ratio <= 1:
                raise VqdeployError("the mask ratio is out of range", expected="0..1", found=mask_ratio)
            mask = np.broadcast_to(
                np.arange(self.side)[:, None] >= round(self.side * (1 - mask_ratio)), (self.side,) * 2
            )
        mask = np.asarray(mask, bool)
        if mask.shape not in (images.shape[:3], images.shape[1:3]):
            raise VqdeployError("the mask does not fit", expected=list(images.shape[1:3]), found=list(mask.shape))
        rows = np.broadcast_to(mask, images.shape[:3]).any(2).reshape(len(images), self.grid[0], -1).any(2)
        unknown = np.maximum.accumulate(rows, axis=1)  # [B, h]
        codes[unknown] = -1
        return self.complete(codes, [0] * len(images) if labels is None and self.classes == 1 else labels, **options)

    def complete(
        self,
        known: np.ndarray,
        labels: Sequence[int] | None,
        *,
        seed: int = 0,
        first_image: int = 0,
        temperature: options.PerDepth | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: options.PerDepth | None = None,
        callback: Callback | None = None,
    ) -> Output:
        """Samples the codes that are -1, given those before them in raster order.

        Args:
            known: Codes int64 [B, *grid], -1 at whole positions to sample.
            labels: Class of each image [B].
            seed: Seed of the noise, at least 0.
            first_image: Index of the first image: image i of any batch is drawn from (seed, first_image + i).
            temperature: Divides the logits; 0 takes the most likely code.
            top_k: Keeps the k most likely codes; 0 keeps all.
            top_p: Keeps the most likely codes until their probability reaches p.
            callback: Called after every step; see `Callback`.

        Raises:
            VqdeployError: An argument is out of range, or the plan has no prior.
        """
        start = time.perf_counter()
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        chosen = options.choose(given, self._config["sampling"], self.grid[-1], self.codebook_size)
        codes, engine = self.sample(known, labels, seed, first_image, chosen, callback)
        sampled = time.perf_counter()
        images = self.decode(codes)
        end = time.perf_counter()
        timings = {
            "steps_s": engine,
            "host_s": sampled - start - engine,
            "decode_s": end - sampled,
            "total_s": end - start,
        }
        return Output(images, codes, {"seed": seed, "labels": np.asarray(labels).tolist(), **chosen}, timings)

    def sample(
        self,
        known: np.ndarray,
        labels: Sequence[int] | None,
        seed: int = 0,
        first_image: int = 0,
        chosen: dict[str, Any] | None = None,
        callback: Callback | None = None,
    ) -> tuple[np.ndarray, float]:
        """The codes of `complete`, and the seconds that the engine took of it; `chosen` comes from `options.choose`."""
        classes = self._check_labels(labels, len(known))
        known = self._check_codes(known, lowest=-1).reshape(len(known), -1, self.grid[-1])
        if np.any((known < 0).any(-1) != (known < 0).all(-1)):
            raise VqdeployError("a position is known in part", expected="all of its codes, or -1 for each")
        for name, value in (("seed", seed), ("first_image", first_image)):
            if not isinstance(value, int | np.integer) or not 0 <= value <= _LARGEST:
                expected = f"a whole number in 0..{_LARGEST}"
                raise VqdeployError(f"{name} is out of range", expected=expected, found=value)
        per_depth = options.for_graph(chosen or self._config["sampling"], self.grid[-1], self.codebook_size)
        codes, engine = [], 0.0
        for part in self._batches(len(known), self._batch.max):
            images = np.arange(len(known))[part]
            per_image = {name: np.tile(value, (len(images), 1)) for name, value in per_depth.items()}
            request = Request(known[part], classes[part], images + first_image, seed=seed, **per_image)
            codes.append(self._sampler(request, callback))
            engine += self._sampler.engine_seconds
        return np.concatenate(codes).reshape(-1, *self.grid), engine

    def _check_labels(self, labels: Sequence[int] | None, count: int) -> np.ndarray:
        classes = self.classes
        if labels is None:
            raise VqdeployError("this prior needs labels", expected=f"labels in 0..{classes - 1}", found="none")
        array = np.asarray(labels)
        if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
            raise VqdeployError("labels are malformed", expected=f"{count} whole numbers", found=labels)
        if wrong := [label for label in array.tolist() if not 0 <= label < classes]:
            raise VqdeployError("a label is out of range", expected=f"0..{classes - 1}", found=wrong[0])
        return array.astype(np.int64)

    def _check_codes(self, codes: np.ndarray, lowest: int = 0) -> np.ndarray:
        codes = np.asarray(codes)
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
        """Batches for the tokenizer, small enough for the feature maps to stay in the caches of a CPU."""
        return self._batches(count, min(self._batch.max, max(1, _CALL_PIXELS // self.side**2)))

    def _batches(self, count: int, size: int) -> list[slice]:
        if count == 0:
            raise VqdeployError("nothing was asked for", expected="at least one image", found=0)
        return [slice(start, start + size) for start in range(0, count, size)]
