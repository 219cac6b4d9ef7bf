"""Builds engines for TensorRT and TensorRT-RTX. Run as a module, it is the worker process, which may crash.

The two libraries share one API, and Polygraphy selects one by an environment variable. Parsing and building can crash
on valid graphs, so both happen in a worker process, which builds all stages unless it crashes.
"""

import importlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import external_data_helper, inliner

from vqdeploy.engines.builder import Built, BuiltStage, Options, read_graph
from vqdeploy.engines.plugin import MODES, obstacle
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.precision import PRECISIONS
from vqdeploy.runtime.manifest import WEIGHTS, StageInfo
from vqdeploy.runtime.tensorrt_library import MODULES, SOURCES

_RTX_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")
"""Compute capabilities of a default TensorRT-RTX engine, by its documentation."""

_QUANTIZED = ("QuantizedLinear", "QuantizedRowConvolution")

log = logging.getLogger("vqdeploy")


@dataclass(frozen=True)
class TensorrtBuilder:
    """Builds engines for `tensorrt` or `tensorrt-rtx`."""

    backend: str

    @property
    def choices(self) -> Mapping[str, Collection[str]]:
        """See `Builder`."""
        return {"device": ("cuda",)} | ({"plugin": MODES} if self.backend == "tensorrt" else {})

    def tunes(self, stages: Sequence[StageInfo], package: Path, options: Options) -> bool:
        """Every engine."""
        return True

    def build(
        self,
        stages: Sequence[StageInfo],
        package: Path,
        folder: Path,
        options: Options,
        progress: Callable[[str], object],
    ) -> Built:
        """See `Builder`."""
        check(self.backend)
        targets = self._targets()
        with closing(Worker(self.backend, folder / "builder.log")) as worker:
            plugin = self._plugin(options.plugin, worker.version)
            built = []
            for stage in stages:
                progress(stage.name)
                engine = folder / f"{stage.name}.engine"
                graph = package / stage.file
                if PRECISIONS[stage.precision].bits:
                    graph = _inlined(graph, folder)
                job = Job(stage.name, str(graph), str(engine), _shapes(stage), plugin)
                nodes = worker.build(job, fall_back=options.plugin != "on")
                built.append(BuiltStage(engine, plugins=nodes))
            return Built(f"{self.backend} {worker.version}", targets, built)

    def _targets(self) -> tuple[str, ...]:
        """Compute capabilities that engines are built for; for TensorRT, that of the GPU of this machine."""
        if self.backend == "tensorrt-rtx":
            return _RTX_TARGETS
        from vqdeploy.runtime import device

        device.check()
        return (device.compute_capability(),)

    def _plugin(self, mode: str | None, version: str) -> bool:
        """Whether to use our kernels."""
        reason = obstacle(self.backend, version)
        if mode == "on" and reason:
            raise VqdeployError(f"a plugin is not possible: {reason}", fix="vqdeploy build --plugin off")
        return mode != "off" and not reason


def _inlined(file: Path, folder: Path) -> Path:
    """A copy of a graph in a folder, with its quantized matrix products in the form that the parser takes.

    The parser names the layer of a DequantizeLinear after its node, and two calls of a function have the same nodes.

    Raises:
        VqdeployError: The stage has convolutions or KV caches in int8.
    """
    weights = folder / WEIGHTS
    if not weights.exists():
        weights.symlink_to((file.parent / WEIGHTS).resolve())
    model = read_graph(file)
    if any(node.op_type.startswith("QuantizedConvolution") for node in model.graph.node):
        raise VqdeployError(
            f"TensorRT cannot build {file.stem} in int8: its activations have zero points other than 0",
            fix=f"vqdeploy export without {file.stem}=int8",
        )
    if any(node.op_type == "QuantizedCachedAttention" for node in model.graph.node):
        raise VqdeployError(
            f"TensorRT cannot build {file.stem} with KV caches in int8: its TensorScatter takes only floats",
            fix="vqdeploy export without caches=int8",
        )
    quantized = [function.name for function in model.functions if function.name.startswith(_QUANTIZED)]
    model = inliner.inline_selected_functions(model, [("vqdeploy", name) for name in quantized])
    _use_int4(model.graph, file.parent)
    onnx.save(model, folder / file.name)
    return folder / file.name


def _use_int4(graph: onnx.GraphProto, package: Path) -> None:
    """Stores the weights of matrix products in 4 bits as INT4, which the parser knows; it has no operators on bytes."""
    initializers = {initializer.name: initializer for initializer in graph.initializer}
    tables: dict[str, str] = {}  # one for each matrix, shared by all products with it
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "BlockQuantizedLinear":
            nodes.append(node)
            continue
        x, weight, scale = node.input
        if weight not in tables:
            tables[weight] = f"{weight}_table"
            block = _to_int4(initializers[weight], package)
            rows = f"{weight}_rows"
            nodes.append(
                onnx.helper.make_node("DequantizeLinear", [weight, scale], [rows], rows, axis=1, block_size=block)
            )
            nodes.append(onnx.helper.make_node("Transpose", [rows], [tables[weight]], tables[weight], perm=[1, 0]))
        nodes.append(onnx.helper.make_node("MatMul", [x, tables[weight]], node.output, node.name))
    del graph.node[:]
    graph.node.extend(nodes)


def _to_int4(weight: onnx.TensorProto, package: Path) -> int:
    """Turns bytes [outputs, blocks, block / 2] into INT4 [outputs, inputs] in place; returns the size of a block."""
    if weight.external_data:
        external_data_helper.load_external_data_for_tensor(weight, str(package))
        weight.ClearField("external_data")
        weight.ClearField("data_location")
    outputs, blocks, half = weight.dims
    weight.raw_data = (np.frombuffer(weight.raw_data, np.uint8) ^ 0x88).tobytes()  # 8 stands for zero: now zero does
    weight.data_type = onnx.TensorProto.INT4
    weight.dims[:] = [outputs, blocks * 2 * half]
    return 2 * int(half)


def check(backend: str) -> None:
    """Checks that the libraries of a backend are installed, without loading them.

    Raises:
        VqdeployError: One is not installed.
    """
    if importlib.util.find_spec(MODULES[backend]) is None:
        raise VqdeployError(f"{backend} is not installed ({SOURCES[backend]})", fix=f"pip install {backend} polygraphy")
    if importlib.util.find_spec("polygraphy") is None:
        raise VqdeployError("Polygraphy is not installed", fix="pip install polygraphy")


def _shapes(stage: StageInfo) -> dict[str, list[tuple[int, ...]]]:
    """Smallest, usual and largest shape of each input, for the optimization profile."""
    smallest = {name: size.min for name, size in stage.dims.items()} | {"batch": 1}  # for the last of a split request
    usual = {name: size.usual for name, size in stage.dims.items()}
    largest = {name: size.max for name, size in stage.dims.items()}
    return {info.name: [info.concrete(sizes) for sizes in (smallest, usual, largest)] for info in stage.inputs}


@dataclass(frozen=True)
class Job:
    """One engine to build.

    Attributes:
        stage: Name of the stage.
        graph: Path of its ONNX file.
        engine: Path of the file to write.
        shapes: Input -> smallest, usual and largest shape.
        plugin: Whether our kernels run the nodes that they support.
    """

    stage: str
    graph: str
    engine: str
    shapes: dict[str, list[tuple[int, ...]]]
    plugin: bool = False


class _BuilderError(Exception):
    """The worker process ended without an answer."""


class Worker:
    """The worker process. After a failure the next job starts a new one.

    `version` is the version that the library reports, which sessions will compare.

    Raises:
        VqdeployError: The library does not load.
    """

    def __init__(self, backend: str, log_file: Path):
        self._backend, self._log = backend, log_file
        try:
            self._start()
        except _BuilderError as error:
            raise VqdeployError(f"{backend} does not load ({error})") from error

    def build(self, job: Job, fall_back: bool = False) -> tuple[str, ...]:
        """Builds an engine; with `fall_back`, a build that fails with plugins is repeated without.

        Returns:
            Names of the nodes that our kernels run.

        Raises:
            ArtifactError: The builder rejected the graph or crashed.
        """
        try:
            if self._has_plugins and not job.plugin:
                self.close()  # the parser uses a registered plugin for every node that names it
            if self._process.poll() is not None:
                self._start()
            self._has_plugins |= job.plugin
            return tuple(self._answer(job)["plugins"])
        except _BuilderError as error:
            what = f"{self._backend} could not build stage {job.stage}: {error}"
            if not (job.plugin and fall_back):
                raise ArtifactError(what) from error
        log.warning("%s; building it without the plugin", what)
        return self.build(replace(job, plugin=False))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _start(self) -> None:
        environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if self._backend == "tensorrt-rtx" else "0"}
        environment["TRITON_INTERPRET"] = "0"  # compile kernels even if the user has set the interpreter
        self._has_plugins = False
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 (our own module)
                [sys.executable, "-P", "-u", "-m", __name__, MODULES[self._backend]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=environment,
            )
        self.version = str(self._answer()["version"])

    def _answer(self, job: Job | None = None) -> dict[str, Any]:
        """The next message of the process."""
        start = self._log.stat().st_size
        assert self._process.stdin and self._process.stdout  # noqa: S101, PT018 (for mypy)
        try:
            if job:
                print(json.dumps(asdict(job)), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.communicate()
        raise _BuilderError(_reason(self._process.returncode, self._log.read_bytes()[start:].decode(errors="replace")))


def _reason(code: int, output: str) -> str:
    """Why a process ended."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if code < 0:
        death = f"its builder crashed with {signal.Signals(-code).name}"
        return f"{death} ({lines[-1]})" if lines else death
    errors = [line.removeprefix("[E] ") for line in lines if line.startswith("[E]")]
    return (errors or lines or ["it gave no reason"])[-1]


def _work(library: str) -> None:
    """Worker: answers each job on standard input with a line on standard output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print to standard output too
    print(json.dumps({"version": importlib.import_module(library).__version__}), file=answers)
    for line in sys.stdin:
        print(json.dumps({"plugins": _build(Job(**json.loads(line)))}), file=answers)


def _build(job: Job) -> list[str]:
    """Builds one engine with Polygraphy; returns the names of the nodes that our kernels run."""
    from polygraphy.backend.trt import NetworkFromOnnxPath, Profile, engine_bytes_from_network

    from vqdeploy.engines import plugin

    profile = Profile()
    for name, (smallest, usual, largest) in job.shapes.items():
        profile.add(name, smallest, usual, largest)
    if job.plugin:
        plugin.register()
    parsed = NetworkFromOnnxPath(job.graph, strongly_typed=True)()
    nodes = plugin.nodes(parsed[1])
    Path(job.engine).write_bytes(engine_bytes_from_network(parsed, _config(profile)))
    return nodes


def _config(profile: Any) -> Any:
    """The builder configuration, without TF32, which is on by default and has a 10-bit mantissa."""
    from polygraphy import func
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig

    rtx = os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] == "1"
    trt = importlib.import_module(MODULES["tensorrt-rtx" if rtx else "tensorrt"])

    @func.extend((CreateConfigRTX if rtx else CreateConfig)(profiles=[profile]))
    def config(builder: Any, network: Any, config: Any) -> None:  # noqa: ARG001 (Polygraphy passes all three)
        config.clear_flag(trt.BuilderFlag.TF32)
        if rtx:  # CUDA graphs need it
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    return config


if __name__ == "__main__":
    _work(sys.argv[1])
