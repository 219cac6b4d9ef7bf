"""From an ONNX package to a plan."""

import dataclasses
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from vqdeploy.engines import onnxrt, package, tensorrt
from vqdeploy.engines.plugin import MODES, obstacle
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import temporary_folder
from vqdeploy.runtime import bundle
from vqdeploy.runtime.backends import BACKENDS
from vqdeploy.runtime.manifest import WEIGHTS, Manifest, SizeRange, StageInfo

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
    """Builds a plan, whole or not at all.

    Args:
        folder: The ONNX package.
        plan: The file to write.
        backend: One of `BACKENDS`.
        batch: Batch sizes that the plan accepts.
        progress: Told the name of each stage as its build begins.
        portable: For `onnxrt`: keep the package's own function bodies, to test those.
        plugin: For `tensorrt`, one of `MODES`: whether our kernels run the nodes that they can. With `auto` they do
            where the libraries allow it, and a stage that cannot be built with them is built without.
        device: For `onnxrt`, one of `DEVICES`. A plan for CUDA has the package's own function bodies too: ours are made
            for the CPU, and the fused attention in them has no fp32 on CUDA.

    Raises:
        VqdeployError: A library is missing, a size is wrong, or the file cannot be written.
        ArtifactError: The package is damaged, or the builder failed.
    """
    if backend not in BACKENDS:
        raise VqdeployError(f"there is no backend {backend!r}", expected=" or ".join(BACKENDS), found=backend)
    if not 1 <= batch.min <= batch.usual <= batch.max:
        sizes = f"{batch.min}, {batch.usual}, {batch.max}"
        raise VqdeployError("the batch sizes are out of order", expected="1 <= min <= opt <= max", found=sizes)
    if plugin not in MODES:
        raise VqdeployError(f"there is no plugin mode {plugin!r}", expected=" or ".join(MODES), found=plugin)
    if device not in DEVICES:
        raise VqdeployError(f"there is no device {device!r}", expected=" or ".join(DEVICES), found=device)
    manifest = package.read(folder)
    library = version("onnx") if backend == "onnxrt" else tensorrt.check(backend)
    builder = f"{'onnx' if backend == 'onnxrt' else backend} {library}"
    if plugin != "off" and (reason := obstacle(backend, library)):
        if plugin == "on":
            raise VqdeployError(f"the plan can have no plugin: {reason}", fix="vqdeploy build --plugin off")
        plugin = "off"
    targets = tensorrt.targets(backend) if backend != "onnxrt" else ("cuda",) if device == "cuda" else ()
    with temporary_folder(plan) as scratch:
        files, stages = [], []
        for stage in manifest.stages:
            progress(stage.name)
            files.append(
                _build_stage(backend, manifest, stage, folder, scratch, batch, portable or device == "cuda", plugin)
            )
            kept = stage.weights if backend == "onnxrt" else ()
            nodes = tensorrt.plugin_nodes(files[-1])
            dims = stage.dims | {"batch": batch}
            stages.append(dataclasses.replace(stage, file=files[-1].name, weights=kept, plugins=nodes, dims=dims))
        members = {file.name: bundle.sha256(file) for file in files}
        if backend == "onnxrt":
            files.append(folder / WEIGHTS)
            members[WEIGHTS] = manifest.members[WEIGHTS]
        manifest = dataclasses.replace(
            manifest,
            stages=tuple(stages),
            members=members,
            backend=backend,
            builder=builder,
            targets=targets,
        )
        bundle.write(plan, manifest, files)
    return manifest


def _build_stage(
    backend: str,
    manifest: Manifest,
    stage: StageInfo,
    folder: Path,
    scratch: Path,
    batch: SizeRange,
    portable: bool,
    plugin: str,
) -> Path:
    if backend == "onnxrt":
        return onnxrt.build_stage(stage, folder, scratch, portable)
    dims = stage.dims | {"batch": SizeRange(1, batch.usual, batch.max)}  # the last call of a request may be as small
    sizes = {name: (size.min, size.usual, size.max) for name, size in dims.items()}
    if plugin == "auto":
        try:
            return tensorrt.build_stage(backend, stage, folder, scratch, sizes, plugin=True)
        except ArtifactError as error:
            log.warning("%s; building it without the plugin", error)
    return tensorrt.build_stage(backend, stage, folder, scratch, sizes, plugin=plugin == "on")
