"""Sessions on TensorRT and TensorRT-RTX. Their Python APIs differ only in run-time compilation."""

import importlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.errors import ArtifactError, VqdeployError, one_line
from vqdeploy.runtime import device
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.device import DeviceArray, DeviceBinding, DeviceSession, Graph, Stream, buffers
from vqdeploy.runtime.kernel_cache import KernelCache
from vqdeploy.runtime.manifest import Manifest, StageInfo, TensorInfo
from vqdeploy.runtime.session import Opener
from vqdeploy.runtime.tensorrt_library import MODULES, SOURCES

log = logging.getLogger("vqdeploy")

_KEPT_BINDINGS = 2  # one for each batch size of a split request, since buffers, contexts and graphs are slow to make


class TensorrtBackend:
    """Runs plans for TensorRT or TensorRT-RTX, on a GPU only."""

    def __init__(self, name: str):
        self.name = name

    def place(self, manifest: Manifest, device: str) -> str:
        """`cuda`, after checking the library and the GPU.

        Raises:
            VqdeployError: The CPU was asked for, or the library or the GPU is not available.
            ArtifactError: The plan is for another version or another kind of GPU.
        """
        if device == "cpu":
            what = f"this plan was built for {self.name}, which runs on a GPU"
            raise VqdeployError(what, fix="vqdeploy build PACKAGE --backend onnxrt")
        check(manifest)
        return "cuda"

    def opener(self, bundle: Bundle, device: str, threads: int, profile: Path | None) -> Opener:
        """Returns an opener of the stages of a plan, which share a stream.

        Raises:
            VqdeployError: A profile was asked for, or CUDA failed.
        """
        if profile is not None:
            raise VqdeployError("engines of TensorRT cannot be profiled here", expected="a plan for onnxrt")
        stream = Stream()
        return lambda stage: TensorrtSession(bundle, stage, stream)


backend = TensorrtBackend


def check(manifest: Manifest) -> None:
    """Checks that the library has the version that built the plan, and that the GPU is of the right kind.

    Raises:
        VqdeployError: The library is not installed or does not load, or there is no GPU.
        ArtifactError: The version or the GPU differs.
    """
    fix = f"vqdeploy build PACKAGE --backend {manifest.backend}"
    device.check()
    found = f"{manifest.backend} {_library(str(manifest.backend)).__version__}"
    if found != manifest.builder:
        what = "an engine runs only on the version that built it"
        raise ArtifactError(what, expected=manifest.builder, found=found, fix=fix)
    # TensorRT-RTX compiles for the present GPU, and checks by itself whether it can.
    if manifest.backend == "tensorrt" and (gpu := device.compute_capability()) not in manifest.targets:
        expected = " or ".join(manifest.targets)
        raise ArtifactError("this plan is for another kind of GPU", expected=expected, found=gpu, fix=fix)


def _library(backend: str) -> Any:
    try:
        return importlib.import_module(MODULES[backend])
    except (ImportError, OSError, RuntimeError) as error:
        what = f"this plan needs {backend} ({SOURCES[backend]}), which does not load ({error})"
        raise VqdeployError(what, fix=f"pip install {backend}") from error


class TensorrtSession(DeviceSession):
    """One stage of a plan. All sessions of a plan share a stream and the memory that engines work in."""

    def __init__(self, bundle: Bundle, stage: StageInfo, stream: Stream):
        self.stage, self._stream = stage, stream
        self._engine = Engine(bundle, stage, stream)
        # The bindings of `run`. A function of the session would be a reference cycle, which holds GPU memory for long.
        self._bound = lru_cache(_KEPT_BINDINGS)(partial(_bound, self._engine, stream))

    def bind(self, dims: dict[str, int], shared: Mapping[str, DeviceArray] | None = None) -> "TensorrtBinding":
        """Binds buffers for these sizes of the dynamic dimensions; `shared` ones belong to other bindings too.

        Raises:
            VqdeployError: The GPU has too little memory free.
        """
        return TensorrtBinding(self._engine, dims, shared or {}, self._stream)

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """One call with fresh outputs.

        Raises:
            VqdeployError: The engine was not built for these sizes, or CUDA failed.
            ArtifactError: The engine failed.
        """
        dims = {
            d: size
            for info in self.stage.inputs
            for d, size in zip(info.shape, inputs[info.name].shape, strict=True)
            if isinstance(d, str)
        }
        binding = self._bound(*self._engine.all_sizes(dims).items())
        for name, values in inputs.items():
            binding.inputs[name][...] = values
        binding.run()
        return {name: np.array(array) for name, array in binding.outputs.items()}


class Engine:
    """An engine of a plan and its execution contexts.

    Attributes:
        stage: The stage.
        in_place: The aliases of the stage that the engine writes in place.
    """

    def __init__(self, bundle: Bundle, stage: StageInfo, stream: Stream):
        self.stage, self._stream = stage, stream
        self._backend = str(bundle.manifest.backend)
        self._trt = trt = _library(self._backend)
        self._logger = _logger(trt)
        self._logger.reason = "it gave no reason"
        self._engine = self._deserialized(bundle)
        if not self._described():
            raise ArtifactError(f"stage {stage.name} of {bundle.path} is not the engine that its manifest describes")
        written = {output: self._engine.get_aliased_input_tensor(output) for output in stage.aliases}
        self.in_place = {output: name for output, name in stage.aliases.items() if written[output] == name}
        stream.reserve(self._engine.device_memory_size_v2)
        self._cache: KernelCache | None = None
        if self._backend == "tensorrt-rtx":
            self._cache = KernelCache(f"{bundle.manifest.members[stage.file]}-{trt.__version__}")
        self._scratch: Any = None
        self._common: Any = None

    def _deserialized(self, bundle: Bundle) -> Any:
        what = f"stage {self.stage.name} of {bundle.path} cannot run here"
        blob = bundle.member(self.stage.file)
        try:
            self._runtime = self._trt.Runtime(self._logger)
            self._runtime.engine_host_code_allowed = False
            engine = self._runtime.deserialize_cuda_engine(blob)
        except (TypeError, RuntimeError, AttributeError) as error:  # of pybind11, when the library returns no object
            raise VqdeployError(f"{what} ({self._backend} does not start: {error})") from error
        if engine is None:
            fix = f"vqdeploy build PACKAGE --backend {self._backend}, on this machine"
            raise ArtifactError(f"{what} ({self._obstacle(blob)})", fix=fix)
        return engine

    def _obstacle(self, blob: memoryview) -> str:
        """Why an engine was rejected."""
        if self._backend == "tensorrt":
            return str(self._logger.reason)
        _, found = self._runtime.get_engine_validity(blob)
        kinds = self._trt.EngineInvalidityDiagnostics.__members__.values()
        names = [kind.name.lower().replace("_", " ") for kind in kinds if int(kind) & int(found)]
        return ", ".join(names) or self._logger.reason

    def _described(self) -> bool:
        """Whether the manifest has the inputs, outputs and aliases of the engine, all on the GPU."""
        engine, mode = self._engine, self._trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]

        def found(kind: Any) -> dict[str, tuple[np.dtype, list[int]]]:
            return {
                name: (np.dtype(self._trt.nptype(engine.get_tensor_dtype(name))), list(engine.get_tensor_shape(name)))
                for name in names
                if engine.get_tensor_mode(name) == kind
            }

        def expected(infos: Iterable[TensorInfo]) -> dict[str, tuple[np.dtype, list[int]]]:
            return {i.name: (np.dtype(i.dtype), [-1 if isinstance(d, str) else d for d in i.shape]) for i in infos}

        inputs, outputs = expected(self.stage.inputs), expected(self.stage.outputs)
        pairs = self.stage.aliases.items()
        return (
            found(mode.INPUT) == inputs
            and found(mode.OUTPUT) == outputs
            and all(engine.get_tensor_location(name) == self._trt.TensorLocation.DEVICE for name in names)
            and all(output in outputs and inputs.get(name) == outputs[output] for output, name in pairs)
        )

    def common_context(self) -> Any:
        """The shared execution context, for calls of any shape.

        Raises:
            ArtifactError: The engine cannot run on this GPU.
        """
        if self._common is None:
            self._common = self._new_context(specialize=False)
        return self._common

    def all_sizes(self, dims: dict[str, int]) -> dict[str, int]:
        """Sizes of the dynamic dimensions of outputs too, of which the engine works out those that no input has.

        Raises:
            VqdeployError: The engine was not built for these sizes.
        """
        outputs = {info.name: info.shape for info in self.stage.outputs}
        if {d for shape in outputs.values() for d in shape if isinstance(d, str)} <= set(dims):
            return dims
        context = self.common_context()
        for info in self.stage.inputs:
            self._set_shape(context, info.name, info.concrete(dims))
        found = {name: context.get_tensor_shape(name) for name in outputs}
        return {
            d: int(size)
            for name, shape in outputs.items()
            for d, size in zip(shape, found[name], strict=True)
            if isinstance(d, str)
        } | dims

    def own_context(self, binding: "TensorrtBinding") -> Any:
        """An execution context of one binding; TensorRT-RTX compiles kernels for its shapes.

        Raises:
            VqdeployError: The engine was not built for these sizes.
            ArtifactError: The engine cannot run on this GPU.
        """
        context = self._new_context(specialize=True)
        self.prepare(context, binding)
        return context

    def _new_context(self, specialize: bool) -> Any:
        """A new execution context on the shared scratch memory."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is None:
            context = self._engine.create_execution_context(strategy)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            kinds = self._trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if specialize else kinds.NONE
            self._cache.attach(config)
            context = self._engine.create_execution_context(config)
        if context is None:
            raise ArtifactError(f"stage {self.stage.name} cannot run on this GPU ({self._logger.reason})")
        self._scratch = self._scratch or self._stream.scratch()
        context.set_device_memory(self._scratch.address, self._scratch.size)
        return context

    def prepare(self, context: Any, binding: "TensorrtBinding") -> None:
        """Sets the shapes and addresses of a binding on a context.

        Raises:
            VqdeployError: The engine was not built for these sizes.
            ArtifactError: It refuses an address.
        """
        for info in self.stage.inputs:
            self._set_shape(context, info.name, binding.shapes[info.name])
        for name, address in binding.addresses.items():
            if not context.set_tensor_address(name, address):
                raise ArtifactError(f"stage {self.stage.name} takes no {name} ({self._logger.reason})")

    def _set_shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(name, shape):
            sizes = (f"{dim} of {size.min} to {size.max}" for dim, size in self.stage.dims.items())
            raise VqdeployError(
                f"stage {self.stage.name} takes no {name} of shape {list(shape)}",
                expected=", ".join(sizes) or None,
                fix="vqdeploy build PACKAGE --max-batch N",
            )

    def execute(self, context: Any) -> None:
        """Enqueues one call.

        Raises:
            ArtifactError: The engine failed.
        """
        if not context.execute_async_v3(self._stream.handle):
            raise ArtifactError(f"stage {self.stage.name} failed ({self._logger.reason})")

    def captured(self, context: Any) -> Graph | None:
        """A call as a CUDA graph; None if it cannot be captured."""
        try:
            if self._backend == "tensorrt-rtx" and not context.is_stream_capturable(self._stream.handle):
                raise VqdeployError("TensorRT-RTX cannot be captured in it")
            return self._stream.capture(partial(self.execute, context))
        except VqdeployError as error:
            log.info("stage %s runs without CUDA graphs: %s", self.stage.name, error)
            return None

    def keep_kernels(self) -> None:
        """Writes the kernels compiled at run time to disk, for the next process."""
        if self._cache is not None:
            self._cache.save()


class TensorrtBinding(DeviceBinding):
    """A binding that becomes a CUDA graph on repeated use.

    The first call runs in the shared context; prefill makes no other. The second runs in a context of its own, since a
    graph is bound to its context and TensorRT initializes itself at the first call with new shapes, which cannot be
    captured. The third call is captured.
    """

    def __init__(self, engine: Engine, dims: dict[str, int], shared: Mapping[str, DeviceArray], stream: Stream):
        stage = replace(engine.stage, aliases=engine.in_place)
        self._copied = {o: name for o, name in engine.stage.aliases.items() if o not in engine.in_place}
        missing = [name for name in self._copied.values() if name not in shared]
        super().__init__(stage, dims, buffers(stage, dims, missing, stream) | dict(shared), stream)
        self._engine = engine
        self._calls = 0
        self._context: Any = None
        self._graph: Graph | None = None

    def enqueue(self) -> None:
        """Enqueues one engine call.

        Raises:
            VqdeployError: The engine was not built for these sizes, or CUDA failed.
            ArtifactError: The engine failed.
        """
        if self._calls == 0:
            context = self._engine.common_context()
            self._engine.prepare(context, self)
            self._engine.execute(context)
        elif self._calls == 1:
            self._context = self._engine.own_context(self)
            self._engine.execute(self._context)
            self._engine.keep_kernels()
        else:
            if self._calls == 2:
                self._graph = self._engine.captured(self._context)
            if self._graph:
                self._graph.launch()
            else:
                self._engine.execute(self._context)
        for output, name in self._copied.items():
            self.inputs[name][...] = self.outputs[output]
        self._calls += 1  # a failed call does not count


def _bound(engine: Engine, stream: Stream, *dims: tuple[str, int]) -> TensorrtBinding:
    return TensorrtBinding(engine, dict(dims), {}, stream)


@cache
def _logger(trt: Any) -> Any:
    """The logger of a library, which uses only the first one it gets. It remembers the last error."""

    class Logger(trt.ILogger):
        reason = "it gave no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.reason = one_line(message)
            log.debug("%s", message)

    return Logger()
