"""`vqdeploy run`: the tasks of a plan, from files to files."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import check_other, check_regular, real, replacing_file
from vqdeploy.options import SAMPLING_OPTIONS
from vqdeploy.runtime import Pipeline, Step, load
from vqdeploy.runtime.folder import find_images
from vqdeploy.runtime.images import GREY, read, read_mask, veil, write_frames, write_grid

_CLASSES_SHOWN = 10  # rows of the grid without --label
_COLUMNS = 8
_LARGEST_ARRAYS = 2**30  # bytes of arrays that are read, against decompression bombs
_FILM_FRAMES = 256  # frames of a film; a published prior has thousands of steps


@dataclass
class Job:
    """What the command line asked for; `options` are those of `Pipeline.complete`.

    `text_ids` and `text_features` are files with texts. `num_images` is the number of images of each label or text,
    `completions` that of each image, and `columns` that of a row of decoded ones; None for a usual number.
    `keep_levels` is what `resample` keeps, `depth` what decoding uses. `film` is where the steps of the first image go.
    `threads` is that of `vqdeploy.load`, `stage` what the task `stage` runs.
    """

    engine: Path
    device: str = "auto"
    threads: int = 0
    task: str = "generate"
    stage: str | None = None
    labels: Sequence[str] = ()
    text_ids: Path | None = None
    text_features: Path | None = None
    num_images: int | None = None
    completions: int | None = None
    inputs: Sequence[Path] = ()
    mask: Path | None = None
    mask_ratio: float | None = None
    depth: int | None = None
    keep_levels: int | None = None
    columns: int | None = None
    layer: int | None = None
    film: Path | None = None
    output: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)


def run(job: Job) -> dict[str, Any]:
    """Runs a task and writes its result: a PNG, or an NPZ for `encode`, `features` and `stage`.

    Raises:
        VqdeployError: The request is malformed, or a file is missing.
        ArtifactError: A file is damaged.
    """
    if job.task not in TASKS:
        raise VqdeployError("there is no such task", expected=" or ".join(TASKS), found=job.task)
    task = TASKS[job.task]
    _check_options(job)
    _check_output(job, task.suffix)
    _check_film(job)
    with load(job.engine, job.device, job.threads, keep=False) as pipeline:
        output = job.output or Path(f"{pipeline.manifest.name}-{job.stage or job.task}{task.suffix}")
        _check_unread(job, output)
        start = time.perf_counter()
        result = task.run(pipeline, job, output)
        seconds = time.perf_counter() - start
    return {"task": job.task, "output": str(output), "seconds": round(seconds, 4), **result}


def _generate(pipeline: Pipeline, job: Job, output: Path) -> dict[str, Any]:
    conditions, columns = _conditions(pipeline, job), job.num_images or _COLUMNS
    if conditions is None:
        if pipeline.condition.name == "text":
            raise VqdeployError("this prior needs texts", expected=f"{_option(pipeline)} FILE", found="none")
        conditions = np.arange(min(pipeline.classes, _CLASSES_SHOWN))
    conditions = np.repeat(conditions, columns, 0)
    seen: list[np.ndarray] = []

    def watch(step: Step) -> None:
        if 0 in step.images:
            seen.append(step.codes[:1])

    result = pipeline.generate(conditions, callback=watch if job.film else None, **job.options)
    note = {"options": result.options, "timings": result.timings}
    written = _write(output, pipeline, result.images, columns, note)
    if job.film is None:
        return written
    frames = _frames(pipeline, seen)
    frames[-1] = result.images[0]  # `more_smooth` decodes no codes
    write_frames(job.film, frames, {**_source(pipeline), "options": result.options})
    return {**written, "film": str(job.film)}


def _frames(pipeline: Pipeline, seen: Sequence[np.ndarray]) -> np.ndarray:
    """The image of codes [1, *grid] after a step, greyed out where codes are not final."""
    shown = np.linspace(0, len(seen) - 1, min(len(seen), _FILM_FRAMES)).astype(int)
    codes = np.concatenate([seen[step] for step in shown])
    return pipeline.preview(codes)


def _reconstruct(pipeline: Pipeline, job: Job, output: Path) -> dict[str, Any]:
    images = _read_images(pipeline, _files(job))
    shown = np.concatenate([images, pipeline.reconstruct(images, job.depth)])
    return _write(output, pipeline, shown, len(images), _depth(pipeline, job))


def _depth(pipeline: Pipeline, job: Job) -> dict[str, int]:
    """The number of depths that were decoded, for the note in the PNG."""
    return {"depth": job.depth or pipeline.layout.depth} if job.depth or len(pipeline.grid) == 3 else {}


def _resample(pipeline: Pipeline, job: Job, output: Path) -> dict[str, Any]:
    images = _read_images(pipeline, _files(job))
    keep = 1 if job.keep_levels is None else job.keep_levels
    labels = _conditions(pipeline, job, len(images))
    result = pipeline.resample(images, labels, keep=keep, completions=job.completions or 1, **job.options)
    note = {"options": result.options, "kept_levels": keep, "timings": result.timings}
    return _write(output, pipeline, np.concatenate([images, result.images]), len(images), note)


def _inpaint(pipeline: Pipeline, job: Job, output: Path) -> dict[str, Any]:
    images = _read_images(pipeline, _files(job))
    mask = None if job.mask is None else read_mask(job.mask, pipeline.image_shape[0])
    ratio = 0.5 if mask is None and job.mask_ratio is None else job.mask_ratio
    labels = _conditions(pipeline, job, len(images))
    place: dict[str, Any] = {"mask": mask, "mask_ratio": ratio}
    result = pipeline.inpaint(images, labels, completions=job.completions or 1, **place, **job.options)
    unknown = pipeline.unknown(len(images), **place, seed=result.options["seed"])
    if mask is not None and pipeline.keeps_pixels:
        masked = np.where(mask[..., None], GREY, images)
    elif len(pipeline.layout.maps) > 1 and pipeline.tokenizer.omits_depths:  # the sum of what is known
        masked = pipeline.preview(np.where(unknown, -1, result.codes[: len(images)]))
    else:
        masked = veil(images, np.logical_or.reduce(pipeline.layout.enlarged(unknown)))
    shown = np.concatenate([masked, result.images, images])
    note = {"options": result.options, "mask_ratio": ratio, "timings": result.timings}
    return _write(output, pipeline, shown, len(images), note)


def _conditions(pipeline: Pipeline, job: Job, count: int = 1) -> np.ndarray | None:
    """Labels [B] or texts [B, length]; one alone stands for all of `count` images; None where none is given."""
    wanted = _option(pipeline)
    given = {option: getattr(job, _OPTIONS[option]) for option in ("--label", "--text-ids", "--text-features")}
    for option, value in given.items():
        if value and option != wanted:
            raise VqdeployError(f"{option} does not fit this prior", expected=wanted, found=option)
    if not given[wanted]:
        return None
    if wanted == "--label":
        conditions = np.array([pipeline.label(name) for name in job.labels])
    else:
        conditions = pipeline.condition.check(_read_texts(given[wanted], pipeline.condition.argument))
    return np.repeat(conditions, count if len(conditions) == 1 else 1, 0)


def _option(pipeline: Pipeline) -> str:
    """The option with what a prior is conditioned on."""
    return "--" + pipeline.condition.argument.replace("_", "-")


def _read_texts(file: Path, name: str) -> np.ndarray:
    """Token ids [B, length] or features [B, tokens, width] out of an NPY, or of an array of this name in an NPZ."""
    check_regular(file)
    with file.open("rb") as stream:
        if stream.read(2) == b"PK":
            return _read_archive(file, [name])[name]
    try:
        return np.array(np.load(file, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # parsers of numpy raise anything
        expected = f"an NPY of texts, or an NPZ with {name}"
        raise ArtifactError(f"{file} does not hold texts", expected=expected, found=str(error)[:200]) from error


def _encode(pipeline: Pipeline, job: Job, output: Path) -> dict[str, Any]:
    files = _files(job)
    return _write_archive(output, "codes", pipeline.encode(_read_images(pipeline, files)), files)


def _features(pipeline: Pipeline, job: Job, output: Path) -> dict[str, Any]:
    files = _files(job)
    images = _read_images(pipeline, files)
    features = pipeline.features(images, _conditions(pipeline, job, len(images)))
    if job.layer is not None:
        if not 0 <= job.layer < features.shape[1]:
            raise VqdeployError("no such layer", expected=f"0..{features.shape[1] - 1}", found=job.layer)
        features = features[:, job.layer]
    return _write_archive(output, "features", features, files)


def _write_archive(output: Path, name: str, array: np.ndarray, files: Sequence[Path]) -> dict[str, Any]:
    """Writes an NPZ with an array, and under `files` the input file of each row."""
    contents: dict[str, Any] = {name: array, "files": np.array([str(file) for file in files])}
    with replacing_file(output) as file, file.open("wb") as stream:
        np.savez_compressed(stream, **contents)
    return {"shape": list(array.shape)}


def _decode(pipeline: Pipeline, job: Job, output: Path) -> dict[str, Any]:
    if len(job.inputs) != 1:
        raise VqdeployError("decode takes one file of codes", expected="--input FILE.npz", found=len(job.inputs))
    codes = _read_codes(job.inputs[0])
    images = pipeline.decode(codes, job.depth)
    return _write(output, pipeline, images, job.columns or _COLUMNS, _depth(pipeline, job))


def _stage(pipeline: Pipeline, job: Job, output: Path) -> dict[str, Any]:
    if job.stage is None or len(job.inputs) != 1:
        expected = "--stage NAME --input FILE.npz"
        raise VqdeployError("a stage takes one file of arrays", expected=expected, found=len(job.inputs))
    names = [info.name for info in pipeline.manifest.stage(job.stage).inputs]
    outputs = pipeline.run(job.stage, **_read_archive(job.inputs[0], names))
    with replacing_file(output) as file, file.open("wb") as stream:
        np.savez(stream, **outputs)  # type: ignore[arg-type]  # by its stub, an array may be named allow_pickle
    return {"stage": job.stage, "shapes": {name: list(array.shape) for name, array in outputs.items()}}


class Task(NamedTuple):
    """A task: its function, the extension of its output, and its options; `samples` adds the sampling options."""

    run: Callable[[Pipeline, Job, Path], dict[str, Any]]
    suffix: str
    options: str
    samples: bool = False

    def takes(self, option: str) -> bool:
        """Whether the task has an option; those not in `_OPTIONS` are --seed and sampling options."""
        return option in self.options.split() or (self.samples and option not in _OPTIONS)


_OPTIONS = {
    "--stage": "stage",
    "--label": "labels",
    "--text-ids": "text_ids",
    "--text-features": "text_features",
    "--num-images": "num_images",
    "--completions": "completions",
    "--input": "inputs",
    "--mask": "mask",
    "--mask-ratio": "mask_ratio",
    "--depth": "depth",
    "--keep-levels": "keep_levels",
    "--columns": "columns",
    "--layer": "layer",
    "--film": "film",
}

TASKS = {
    "generate": Task(_generate, ".png", "--label --text-ids --text-features --num-images --film", samples=True),
    "reconstruct": Task(_reconstruct, ".png", "--input --depth"),
    "inpaint": Task(
        _inpaint, ".png", "--input --label --text-ids --text-features --completions --mask --mask-ratio", samples=True
    ),
    "resample": Task(_resample, ".png", "--input --label --completions --keep-levels", samples=True),
    "encode": Task(_encode, ".npz", "--input"),
    "decode": Task(_decode, ".png", "--input --columns --depth"),
    "features": Task(_features, ".npz", "--input --label --layer"),
    "stage": Task(_stage, ".npz", "--stage --input"),
}


def _check_options(job: Job) -> None:
    """Rejects options that the task would ignore."""
    task = TASKS[job.task]
    sampling = {option.spellings[0]: job.options.get(option.name) for option in SAMPLING_OPTIONS}
    sampling["--seed"] = job.options.get("seed")
    for option, value in ({option: getattr(job, name) for option, name in _OPTIONS.items()} | sampling).items():
        if value not in (None, (), []) and not task.takes(option):
            expected = "--task " + " or ".join(name for name, other in TASKS.items() if other.takes(option))
            fix = f"--completions {value}" if option == "--num-images" and task.takes("--completions") else None
            what = f"{option} is not an option of this task"
            raise VqdeployError(what, expected=expected, found=job.task, fix=fix)


def _check_output(job: Job, suffix: str) -> None:
    """Rejects an output name with the extension of another format."""
    given = job.output.suffix.lower() if job.output else suffix
    if given != suffix and given in (".npz", *Image.registered_extensions()):
        raise VqdeployError(f"{job.task} writes a {suffix} file", expected=f"-o FILE{suffix}", found=job.output)


def _check_unread(job: Job, output: Path) -> None:
    """Rejects outputs that would replace a file that the task reads."""
    read = [path for path in (job.engine, job.mask, job.text_ids, job.text_features, *job.inputs) if path]
    for written in filter(None, (output, job.film)):
        check_other(written, read)


def _write(output: Path, pipeline: Pipeline, images: np.ndarray, columns: int, note: dict[str, Any]) -> dict[str, Any]:
    # No timings: the same request must give the same file.
    stable = {key: value for key, value in note.items() if key != "timings"}
    write_grid(output, images, columns, {**_source(pipeline), **stable})
    return {"images": len(images), **note}


def _source(pipeline: Pipeline) -> dict[str, Any]:
    return {"system": pipeline.manifest.name, "checkpoint": pipeline.manifest.provenance.checkpoint}


def _check_film(job: Job) -> None:
    """Rejects an invalid --film before any work is done."""
    if job.film is None:
        return
    if job.film.suffix.lower() not in (".gif", ".png") or job.film.is_dir():
        raise VqdeployError("a film cannot be written there", expected="a .gif or .png file", found=job.film)
    if job.output and real(job.film) == real(job.output):
        raise VqdeployError("the film would replace the images", expected="another file than -o", found=job.film)


def _files(job: Job) -> list[Path]:
    """The image files of the inputs, folders expanded."""
    files: list[Path] = []
    for path in job.inputs:
        files += find_images(path) if path.is_dir() else [path]
    if not files:
        raise VqdeployError("this task needs images", expected="--input FILE or FOLDER", found="none")
    for file in files:
        check_regular(file)
    return files


def _read_images(pipeline: Pipeline, files: Sequence[Path]) -> np.ndarray:
    return np.stack([read(file, *pipeline.image_shape[:2]) for file in files])


def _read_codes(file: Path) -> np.ndarray:
    check_regular(file)
    try:
        return _read_archive(file, ["codes"])["codes"]
    except ArtifactError as error:
        raise ArtifactError(f"{file} is not a file of codes", fix="vqdeploy run --task encode") from error


def _read_archive(file: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays out of an NPZ."""
    check_regular(file)
    try:
        with np.load(file, allow_pickle=False) as archive:
            size = sum(archive.zip.getinfo(f"{name}.npy").file_size for name in names)
            arrays = {name: archive[name] for name in names} if size <= _LARGEST_ARRAYS else {}
    except Exception as error:  # parsers of numpy raise anything
        expected = f"an NPZ with {', '.join(names)}"
        raise ArtifactError(f"{file} does not hold the arrays", expected=expected, found=str(error)[:200]) from error
    if not arrays:
        raise ArtifactError(f"{file} is too large", expected=f"at most {_LARGEST_ARRAYS} bytes", found=size)
    return arrays
