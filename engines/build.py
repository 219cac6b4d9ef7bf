"""From an ONNX package to a plan."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from vqdeploy.engines import package
from vqdeploy.engines.builder import Builder, Options
from vqdeploy.engines.onnxrt import OnnxrtBuilder
from vqdeploy.engines.tensorrt import TensorrtBuilder
from vqdeploy.errors import VqdeployError
from vqdeploy.files import real, temporary_folder
from vqdeploy.runtime import bundle
from vqdeploy.runtime.manifest import WEIGHTS, Manifest, SizeRange, StageInfo

BUILDERS: dict[str, Builder] = {
    "onnxrt": OnnxrtBuilder(),
    "tensorrt": TensorrtBuilder("tensorrt"),
    "tensorrt-rtx": TensorrtBuilder("tensorrt-rtx"),
}
"""Backend -> its builder. Add a backend here and in `vqdeploy.runtime.backends`."""

log = logging.getLogger("vqdeploy")


def build(
    folder: Path,
    plan: Path,
    backend: str = "onnxrt",
    batch: SizeRange = SizeRange(),
    progress: Callable[[str], object] = log.info,
    portable: bool = False,
    plugin: str | None = None,
    device: str | None = None,
) -> Manifest:
    """Builds a plan and writes it atomically.

    Args:
        folder: The ONNX package.
        plan: The file to write.
        backend: One of `BUILDERS`.
        batch: Batch sizes that the plan accepts, as far as the package does. It is tuned for the usual one: engines of
            TensorRT, and matrix products in int8 of `onnxrt` on the CPU. Where it changes nothing, it must be the
            smallest.
        progress: Called with the name of each stage before its build.
        portable: For `onnxrt`: keep the portable function bodies of the package, to test them.
        plugin: For `tensorrt`, whether our kernels run the nodes that they support: `auto`, `on` or `off`. `auto`, also
            the default, uses them if the libraries allow it, and builds a stage without them if it fails with them.
        device: For `onnxrt`, `cpu`, also the default, or `cuda`. A plan for CUDA keeps the portable function bodies:
            those for the CPU have fused attention, which has no fp32 on CUDA.

    Raises:
        VqdeployError: A library is missing, a size is wrong, the backend would ignore an option, or the file cannot be
            written or lies in the package.
        ArtifactError: The package is damaged, or the builder failed.
    """
    if not 1 <= batch.min <= batch.usual <= batch.max:
        sizes = f"{batch.min}, {batch.usual}, {batch.max}"
        raise VqdeployError("the batch sizes are not ascending", expected="1 <= min <= opt <= max", found=sizes)
    if backend not in BUILDERS:
        raise VqdeployError(f"there is no backend {backend!r}", expected=" or ".join(BUILDERS), found=backend)
    builder = BUILDERS[backend]
    for option, value in {"plugin": plugin, "device": device}.items():
        choices = builder.choices.get(option, ())
        if value is not None and value not in choices:
            if not choices:
                raise VqdeployError(f"--{option} is no option of {backend}", fix=f"leave out --{option}")
            raise VqdeployError(f"{backend} has no {option} {value!r}", expected=" or ".join(choices), found=value)
    if real(folder) in real(plan).parents:
        raise VqdeployError(
            f"{plan} lies in the package", expected="a file outside it", fix="name another place with -o"
        )
    manifest = package.read(folder)
    options = Options(portable, plugin, device)
    smallest = dataclasses.replace(batch, usual=batch.min)
    if batch.usual > batch.min and not builder.tunes(_with_batch(manifest.stages, smallest), folder, options):
        what = f"{backend} would build this package in the same way for every batch size"
        raise VqdeployError(what, expected="no --opt-batch", found=batch.usual)
    stages = _with_batch(manifest.stages, batch)
    with temporary_folder(plan) as scratch:
        built = builder.build(stages, folder, scratch, options, progress)
        stages = [
            dataclasses.replace(stage, file=part.file.name, weights=part.weights, plugins=part.plugins)
            for stage, part in zip(stages, built.stages, strict=True)
        ]
        files = [part.file for part in built.stages]
        members = {file.name: bundle.sha256(file) for file in files}
        if any(part.weights for part in built.stages):
            files.append(built.weights or folder / WEIGHTS)
            members[WEIGHTS] = bundle.sha256(built.weights) if built.weights else manifest.members[WEIGHTS]
        manifest = dataclasses.replace(
            manifest,
            stages=tuple(stages),
            members=members,
            backend=backend,
            builder=built.builder,
            targets=built.targets,
        )
        bundle.write(plan, manifest, files)
    return manifest


def _with_batch(stages: Sequence[StageInfo], batch: SizeRange) -> list[StageInfo]:
    return [dataclasses.replace(stage, dims=_sizes(stage.dims, batch)) for stage in stages]


def _sizes(dims: dict[str, SizeRange], batch: SizeRange) -> dict[str, SizeRange]:
    if "batch" not in dims:
        return dims
    own = dims["batch"]  # of a module that takes no other
    smallest, largest = max(batch.min, own.min), min(batch.max, own.max)
    if smallest > largest:
        found = f"{batch.min}..{batch.max}"
        raise VqdeployError(
            "the package does not take these batch sizes", expected=f"{own.min}..{own.max}", found=found
        )
    chosen = SizeRange(smallest, min(max(batch.usual, smallest), largest), largest)
    return dims | {"batch": chosen} | ({"images": SizeRange(1, chosen.usual, largest)} if "images" in dims else {})
