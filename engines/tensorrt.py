"""Builds engines for TensorRT and TensorRT-RTX. Run as a module, this is the process that may die.

The two libraries share one API, and Polygraphy chooses between them by an environment variable. Parsing and building
can crash on valid graphs, so both happen in a process of their own.
"""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime.backends import LIBRARIES, source
from vqdeploy.runtime.manifest import StageInfo

_RTX_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")
"""What a default TensorRT-RTX engine runs on, by its documentation."""


def check(backend: str) -> str:
    """Version of the library behind a backend.

    Raises:
        VqdeployError: It is not installed.
    """
    module = LIBRARIES[backend]
    if importlib.util.find_spec(module) is None:
        raise VqdeployError(f"{backend} is not installed ({source(backend)})", fix=f"pip install {backend} polygraphy")
    if importlib.util.find_spec("polygraphy") is None:
        raise VqdeployError("Polygraphy is not installed", fix="pip install polygraphy")
    distributions = packages_distributions().get(module, [])  # NVIDIA has several for one module
    return version(distributions[0]) if distributions else importlib.import_module(module).__version__


def targets(backend: str) -> tuple[str, ...]:
    """Compute capabilities that an engine of this machine is made for.

    Raises:
        VqdeployError: TensorRT builds for the GPU that is there, and there is none, or no cuda-python to tell its kind.
    """
    if backend == "tensorrt-rtx":
        return _RTX_TARGETS
    from vqdeploy.runtime import device

    device.check()
    return (device.compute_capability(),)


def build_stage(
    backend: str,
    stage: StageInfo,
    package: Path,
    folder: Path,
    sizes: dict[str, tuple[int, int, int]],
    plugin: bool = False,
) -> Path:
    """Builds the engine of a stage in a subprocess.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`.
        stage: The stage.
        package: Folder of its ONNX file.
        folder: Where the engine goes.
        sizes: Smallest, usual and largest size of each open dimension, for the optimization profile.
        plugin: Whether our kernels run the nodes that they can; `plugin_nodes` tells which ones those were.

    Raises:
        ArtifactError: The builder refused the graph or died.
    """
    target = folder / f"{stage.name}.engine"
    shapes = {
        info.name: [info.concrete({name: size[kind] for name, size in sizes.items()}) for kind in range(3)]
        for info in stage.inputs
    }
    job = {"onnx": str(package / stage.file), "engine": str(target), "shapes": shapes, "plugin": plugin}
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if backend == "tensorrt-rtx" else "0"}
    environment["TRITON_INTERPRET"] = "0"  # an engine takes compiled kernels, whatever else a debugging user runs
    process = subprocess.run(  # noqa: S603 (our own module)
        [sys.executable, "-u", "-m", __name__],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        check=False,
    )
    if process.returncode or not target.exists():
        raise ArtifactError(f"{backend} could not build stage {stage.name}: {_reason(process)}")
    return target


def plugin_nodes(engine: Path) -> tuple[str, ...]:
    """Names of the nodes that our kernels run in an engine that `build_stage` built."""
    report = engine.with_suffix(".json")
    return tuple(json.loads(report.read_text())["plugins"]) if report.exists() else ()


def _reason(process: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in process.stdout.splitlines() if line.strip()]
    errors = [line.removeprefix("[E] ") for line in lines if line.startswith("[E]")]
    if process.returncode < 0:
        death = f"its builder died of {signal.Signals(-process.returncode).name}"
        return f"{death} ({lines[-1]})" if lines else death
    return (errors or lines or ["it gave no reason"])[-1]


def _build(job: dict) -> None:
    """Builds one engine with Polygraphy's loaders."""
    from polygraphy.backend.trt import NetworkFromOnnxPath, Profile, engine_bytes_from_network

    from vqdeploy.engines import plugin

    profile = Profile()
    for name, (smallest, usual, largest) in job["shapes"].items():
        profile.add(name, smallest, usual, largest)
    if job["plugin"]:
        plugin.register()
    parsed = NetworkFromOnnxPath(job["onnx"], strongly_typed=True)()
    engine = Path(job["engine"])
    engine.with_suffix(".json").write_text(json.dumps({"plugins": plugin.nodes(parsed[1])}))
    engine.write_bytes(engine_bytes_from_network(parsed, _config(profile)))


def _config(profile: Any) -> Any:
    """The builder's configuration: without TF32, which is on by default, as its products have ten bits of mantissa."""
    from polygraphy import func
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig

    rtx = os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] == "1"
    trt = importlib.import_module(LIBRARIES["tensorrt-rtx" if rtx else "tensorrt"])

    @func.extend((CreateConfigRTX if rtx else CreateConfig)(profiles=[profile]))
    def config(builder: Any, network: Any, config: Any) -> None:
        config.clear_flag(trt.BuilderFlag.TF32)
        if rtx:  # what sessions need for CUDA graphs
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    return config


if __name__ == "__main__":
    _build(json.load(sys.stdin))
