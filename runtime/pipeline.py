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
from vqdeploy.runtime.arguments import as_array, as_numbers, check_whole, is_whole
from vqdeploy.runtime.autoregressive import AutoregressiveSampler, GuidedSampler
from vqdeploy.runtime.backends import BACKENDS
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.hierarchical import HierarchicalSampler
from vqdeploy.runtime.manifest import BatchRange
from vqdeploy.runtime.masked import MaskedSampler
from vqdeploy.runtime.request import Callback, Request

log = logging.getLogger("vqdeploy")

_SAMPLERS: dict[str, Any] = {
    "rqvae": AutoregressiveSampler,
    "movq": MaskedSampler,
    "vitvqgan": GuidedSampler,
    "vqgan": GuidedSampler,
    "vqvae2": HierarchicalSampler,
}
_CALL_PIXELS = {"cpu": 256 * 256, "cuda": 16 * 256 * 256}
_FEATURE_IMAGES = 8  # of one call


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
        device: `auto`, `cpu` or `cuda`. `auto` is CUDA for a plan of ONNX Runtime that was built for it, where that
            runs. Plans for TensorRT have no other device.
        threads: Threads of the engine; 0 for as many as there are cores.

    Raises:
        VqdeployError: The file does not exist, its library is not installed, or its device is not here.
        ArtifactError: The file is damaged, tampered with or of another version.
    """
    bundle = Bundle(path)
    backend = bundle.manifest.backend
    if backend is None:
        raise VqdeployError(f"{path} is not a plan", fix="vqdeploy build PACKAGE")
    if device not in ("auto", "cpu", "cuda"):
        raise VqdeployError(f"device {device!r} is not supported", expected="auto, cpu or cuda", found=device)
    if backend not in BACKENDS:
        raise ArtifactError(
            f"{path} is for a backend that is not known here", found=backend, fix="pip install -U vqdeploy"
        )
    device = _device(device, bundle)
    bundle.verify()
    return Pipeline(bundle, threads, device=device)


def _device(wanted: str, bundle: Bundle) -> str:
    """Where to run a plan, `cpu` or `cuda`, when that is possible."""
    manifest = bundle.manifest
    if manifest.backend != "onnxrt":
        if wanted == "cpu":
            raise VqdeployError(
                f"{bundle.path} was built for {manifest.backend}, which runs on a GPU",
                fix="vqdeploy build PACKAGE --backend onnxrt",
            )
        from vqdeploy.runtime import tensorrt

        tensorrt.check(manifest)
        return "cuda"
    if wanted == "cpu" or (wanted == "auto" and "cuda" not in manifest.targets):
        return "cpu"
    if "cuda" not in manifest.targets:
        raise VqdeployError(f"{bundle.path} was built for the CPU", fix="vqdeploy build PACKAGE --device cuda")
    try:
        from vqdeploy.runtime import cuda

        cuda.check()
    except VqdeployError as error:
        if wanted == "cuda":
            raise
        log.log(_idle_gpu(), "running on the CPU: %s", error)
        return "cpu"
    return "cuda"


def _idle_gpu() -> int:
    """How loud to be when a plan for CUDA runs on the CPU: a GPU that lies idle is worth a warning."""
    from vqdeploy.runtime.onnxrt import ort

    return logging.WARNING if "CUDAExecutionProvider" in ort.get_available_providers() else logging.INFO


def _sessions(bundle: Bundle, threads: int, profile: Path | None, stream: Any) -> dict[str, Any]:
    """The session of each stage; on a GPU they share a stream."""
    stages = bundle.manifest.stages
    if stream is None:
        from vqdeploy.runtime.onnxrt import OnnxrtSession

        return {s.name: OnnxrtSession(bundle, s, threads, profile and profile / s.name) for s in stages}
    if bundle.manifest.backend == "onnxrt":
        from vqdeploy.runtime.cuda import CudaSession

        return {s.name: CudaSession(bundle, s, stream, profile and profile / s.name) for s in stages}
    from vqdeploy.runtime.tensorrt import TensorrtSession

    return {s.name: TensorrtSession(bundle, s, stream) for s in stages}


def _stream(device: str) -> Any:
    """The queue of a GPU; None for the CPU."""
    if device == "cpu":
        return None
    from vqdeploy.runtime.device import Stream

    return Stream()


class Pipeline:
    """The tasks of a plan. Not for use by several threads at once.

    With `profile`, ONNX Runtime writes a trace of each stage into that folder; see `OnnxrtSession.end_profile`.
    """

    def __init__(self, bundle: Bundle, threads: int = 0, profile: Path | None = None, device: str = "cpu"):
        self.bundle, self.device = bundle, device
        self.manifest = bundle.manifest
        self._config, self._batch = bundle.manifest.config, bundle.manifest.batch or BatchRange()
        self.stream = _stream(device)  # of a GPU; None on the CPU
        self._sessions = _sessions(bundle, threads, profile, self.stream)
        if not self._configured():
            raise ArtifactError(f"the configuration in {bundle.path} is damaged", fix="vqdeploy export, vqdeploy build")
        self._sampler: Any = None
        if self._config["prior"]:
            self._sampler = _SAMPLERS[self.manifest.system](self._sessions, self._config["prior"])

    def _configured(self) -> bool:
        """Whether the manifest holds what this class reads of it."""
        config = self._config
        try:
            size, texts = config["tokenizer"]["codebook_size"], list(config["labels"])
            return (
                {"encode", "decode"} <= set(self._sessions)
                and config["model"] == self.manifest.system
                and 1 <= self._batch.min <= self._batch.opt <= self._batch.max
                and type(size) is int
                and size > 0
                and all(isinstance(text, str) for text in texts)
                and (len(self.grid) == 3 or sum(side**2 for side in self._sides()) == self.grid[0])
                and (not config["prior"] or self._prior_configured(config["prior"], size))
            )
        except (KeyError, TypeError, IndexError, VqdeployError):
            return False

    def _prior_configured(self, prior: dict[str, Any], codebook_size: int) -> bool:
        classes, sampler = prior["classes"], _SAMPLERS[self.manifest.system]
        for stage, names in sampler.inputs(prior).items():
            shapes = {info.name: info.shape for info in self.manifest.stage(stage).inputs}
            if not names <= set(shapes) or shapes.get("noise", [codebook_size])[-1] != codebook_size:
                return False
        if len(self.grid) < 3 and [list(level["grid"]) for level in prior["levels"]] != [[n, n] for n in self._sides()]:
            return False
        self.options()
        return type(classes) is int and classes > 0 and len(self._config["labels"]) in (0, classes)

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the codes of one image: rows, columns, depth; or the number of codes of all levels, see `maps`."""
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
        self._check_prior()
        return self._config["prior"]["classes"]

    @property
    def keeps_pixels(self) -> bool:
        """Whether `inpaint` draws what a mask covers and nothing else, so that the other pixels stay as they are.

        Raises:
            VqdeployError: The plan has no prior.
        """
        self._check_prior()
        return bool(self._sampler.keeps_pixels)

    def maps(self, codes: np.ndarray) -> list[np.ndarray]:
        """Codes [B, *grid] -> the map of each level [B, h, w, depth], top first; most systems have one level.

        Raises:
            VqdeployError: The array has another shape.
        """
        codes = as_array("codes", codes)
        if codes.shape[1:] != self.grid:
            raise VqdeployError("codes have the wrong shape", expected=["B", *self.grid], found=list(codes.shape))
        if len(self.grid) == 3:
            return [codes]
        sides = self._sides()
        parts = np.split(codes, np.cumsum(np.square(sides))[:-1], 1)
        return [part.reshape(-1, side, side, 1) for part, side in zip(parts, sides, strict=True)]

    def _sides(self) -> list[int]:
        """Height and width of the map of each level, where codes have levels."""
        tokenizer = self._config["tokenizer"]
        levels = range(min(tokenizer["levels"], 64))  # more never fit
        return [tokenizer["resolution"] // 4 >> level for level in reversed(levels)]

    def _check_prior(self) -> None:
        if self._sampler is None:
            raise VqdeployError("this plan has a tokenizer and no prior", fix="vqdeploy train")

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that the plan has."""
        return tuple(self._sessions)

    def session(self, stage: str) -> Any:
        """The session of one stage, to drive it call by call."""
        self.manifest.stage(stage)
        return self._sessions[stage]

    def label(self, name: str | int) -> int:
        """The label of a class.

        Args:
            name: Its number, an int; or its name. Text that is no name but a number is the number of the class, unless
                classes are named by numbers: "7" is then the class of this name or none.

        Raises:
            VqdeployError: There is no such class.
        """
        names = list(self._config["labels"])
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
        expected = (self.side, self.side, 3)
        images = as_array("images", images)
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
            if "depth" not in self._config["tokenizer"]:
                raise VqdeployError("this system's codes have no depths to leave out", expected="no depth", found=depth)
            if not is_whole(depth) or not 1 <= depth <= self.grid[-1]:
                raise VqdeployError("no such depth", expected=f"1..{self.grid[-1]}", found=depth)
            codes = np.where(np.arange(self.grid[-1]) < depth, codes, -1)
        run = self._sessions["decode"].run
        return np.concatenate([run(codes=codes[part])["image"] for part in self._image_batches(len(codes))])

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
        if "features" not in self._sessions:
            raise VqdeployError(
                "this plan has no features", expected="a stage `features`", found=", ".join(self.stages)
            )
        codes = self.encode(images)
        classes, run = self._check_labels(labels, len(codes)), self._sessions["features"].run
        parts = self._batches(len(codes), min(self._batch.max, _FEATURE_IMAGES))
        return np.concatenate([run(codes=codes[part], label=classes[part])["features"] for part in parts])

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
        if mask is not None and self._sampler.keeps_pixels:
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
        return np.tile(self._check_labels(labels, count), completions).tolist()

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
        self._check_prior()
        if mask_ratio is not None:
            ratio = as_numbers("the mask ratio", mask_ratio)
            if ratio.shape or not 0 <= ratio <= 1:
                raise VqdeployError("the mask ratio is out of range", expected="one number in 0..1", found=mask_ratio)
            return self._sampler.unknown_share(float(ratio), self.grid, first_image + np.arange(count), seed)
        mask, square = as_array("the mask", mask).astype(bool), (self.side, self.side)
        if mask.shape not in (square, (count, *square)):
            raise VqdeployError("the mask does not fit", expected=list(square), found=list(mask.shape))
        return self._sampler.unknown(np.broadcast_to(mask, (count, *square)), self.grid)

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
        defaults = {name: self._config["sampling"][name] for name in _SAMPLERS[self.manifest.system].options}
        depth = self.grid[-1] if len(self.grid) == 3 else self._config["tokenizer"]["levels"]
        return options.choose(given, defaults, depth, self.codebook_size)

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
        codes, seconds = [], dict.fromkeys(self.stages, 0.0)
        for part in self._batches(len(known), min(self._call_images(classes, chosen), self._sampler.call_images)):
            images = first_image + np.arange(len(known))[part]
            codes.append(self._sampler(Request(known[part], classes[part], images, seed, chosen), callback))
            seconds |= {stage: seconds[stage] + spent for stage, spent in self._sampler.seconds.items()}
        return np.concatenate(codes), {stage: spent for stage, spent in seconds.items() if spent}

    def _call_images(self, labels: np.ndarray, chosen: dict[str, Any]) -> int:
        """How many images the plan's largest batch holds."""
        rows = self._sampler.rows(labels, chosen)
        if rows > self._batch.max:
            raise VqdeployError(
                f"an image with guidance takes {rows} rows of a call",
                expected=f"a plan for {rows} or more",
                found=self._batch.max,
                fix=f"vqdeploy build PACKAGE --max-batch {rows}",
            )
        return self._batch.max // rows

    def _check_labels(self, labels: Sequence[int] | None, count: int) -> np.ndarray:
        classes = self.classes
        if labels is None and self._sampler.no_label is not None:
            return np.full(count, self._sampler.no_label)
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
        return self._batches(count, min(self._batch.max, max(1, _CALL_PIXELS[self.device] // self.side**2)))

    def _batches(self, count: int, size: int) -> list[slice]:
        if count == 0:
            raise VqdeployError("nothing was asked for", expected="at least one image", found=0)
        return [slice(start, start + size) for start in range(0, count, size)]
