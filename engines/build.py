"""From an ONNX package to a plan."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from vqdeploy.engines import package
from vqdeploy.engines.builder import Builder, Options
from vqdeploy.engines.onnxrt import OnnxrtBuilder
from vqdeploy.engines.plugin import MODES
from vqdeploy.engines.tensorrt import TensorrtBuilder
from vqdeploy.errors import VqdeployError
from vqdeploy.files import real, temporary_folder
from vqdeploy.runtime import bundle
from vqdeploy.runtime.manifest import WEIGHTS, Manifest, SizeRange

BUILDERS: dict[str, Builder] = {
    "onnxrt": OnnxrtBuilder(),
    "tensorrt": TensorrtBuilder("tensorrt"),
    "tensorrt-rtx": TensorrtBuilder("tensorrt-rtx"),
}
"""Backend -> its builder. Add a backend here and in `vqdeploy.runtime.backends`."""

DEVICES = ("cpu", "cuda")

log = logging.getLogger("vqdeploy")


def build(
    folder: Path,
    plan: Path,
    backend: str = "onnxrt",
    batch: SizeRange = SizeRange(),
    progress: Callable[[str], object] = log.info,
    portable: bool = False,
    plugin: str = "auto",
    device: str = "cpu",
) -> Manifest:
    """Builds a plan and writes it atomically.

    Args:
        folder: The ONNX package.
        plan: The file to write.
        backend: One of `BUILDERS`.
        batch: Batch sizes that the plan accepts, as far as the package does. It is tuned for the usual one: engines of
            TensorRT, and matrix products in int8 of `onnxrt` on the CPU.
        progress: Called with the name of each stage before its build.
        portable: For `onnxrt`: keep the portable function bodies of the package, to test them.
        plugin: For `tensorrt`, one of `MODES`: whether our kernels run the nodes that they support. `auto` uses them if
            the libraries allow it, and builds a stage without them if it fails with them.
        device: For `onnxrt`, one of `DEVICES`. A plan for CUDA keeps the portable function bodies: those for the CPU
            have fused attention, which has no fp32 on CUDA.

    Raises:
        VqdeployError: A library is missing, a size is wrong, or the file cannot be written or lies in the package.
        ArtifactError: The package is damaged, or the builder failed.
    """
    if not 1 <= batch.min <= batch.usual <= batch.max:
        sizes = f"{batch.min}, {batch.usual}, {batch.max}"
        raise VqdeployError("the batch sizes are not ascending", expected="1 <= min <= opt <= max", found=sizes)
    for kind, choice, choices in (
        ("backend", backend, BUILDERS),
        ("plugin mode", plugin, MODES),
        ("device", device, DEVICES),
    ):
        if choice not in choices:
            raise VqdeployError(f"there is no {kind} {choice!r}", expected=" or ".join(choices), found=choice)
    if real(folder) in real(plan).parents:
        raise VqdeployError(
            f"{plan} lies in the package", expected="a file outside it", fix="name another place with -o"
        )
    manifest = package.read(folder)
    stages = [dataclasses.replace(stage, dims=_with_batch(stage.dims, batch)) for stage in manifest.stages]
    with temporary_folder(plan) as scratch:
        options = Options(portable, plugin, device)
        built = BUILDERS[backend].build(stages, folder, scratch, options, progress)
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


def _with_batch(dims: dict[str, SizeRange], batch: SizeRange) -> dict[str, SizeRange]:
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
