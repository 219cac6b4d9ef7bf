"""Sessions on TensorRT and TensorRT-RTX, whose Python interfaces are one but for what is compiled at run time."""

import importlib
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import device, kernel_cache
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.device import DeviceArray, DeviceBinding, Graph, Stream, buffers
from vqdeploy.runtime.manifest import Manifest, StageInfo, TensorInfo

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backend -> Python module."""

_KEPT = 2  # sizes of a batch whose buffers are kept: as many as one request is split into

log = logging.getLogger("vqdeploy")


def check(manifest: Manifest) -> None:
    """Looks for the library of a plan, in the version that it was built with, and for a GPU of the kind it is for.

    Raises:
        VqdeployError: It is not installed, or there is no GPU.
        ArtifactError: The version or the GPU is another.
    """
    fix = f"vqdeploy build PACKAGE --backend {manifest.backend}"
    device.check()
    found = f"{manifest.backend} {_library(str(manifest.backend)).__version__}"
    if found != manifest.builder:
        what = "an engine runs on the version that built it, and on no other"
        raise ArtifactError(what, expected=manifest.builder, found=found, fix=fix)
    # TensorRT-RTX compiles for the GPU that is there, and knows best which ones it can do that for.
    if manifest.backend == "tensorrt" and (gpu := device.compute_capability()) not in manifest.targets:
        expected = " or ".join(manifest.targets)
        raise ArtifactError("this plan is for another kind of GPU", expected=expected, found=gpu, fix=fix)


def _library(backend: str) -> Any:
    try:
        return importlib.import_module(MODULES[backend])
    except ImportError as error:
        source = "from NVIDIA's TensorRT download" if backend == "tensorrt" else "from PyPI"
        raise VqdeployError(f"this plan needs {backend} ({source})", fix=f"pip install {backend}") from error


class TensorrtSession:
    """One stage of a plan as an engine. All sessions of a plan share a stream and the memory that engines work in.

    `in_place` are those of the stage's aliases that the engine writes in place; other caches are copied after a call.
    """

    def __init__(self, bundle: Bundle, stage: StageInfo, stream: Stream):
        self.stage, self._stream = stage, stream
        self._backend = str(bundle.manifest.backend)
        self._trt = trt = _library(self._backend)
        self._logger = _logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._runtime.engine_host_code_allowed = False
        engine = bundle.member(stage.file)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise ArtifactError(
                f"stage {stage.name} of {bundle.path} cannot run here ({self._obstacle(engine)})",
                fix=f"vqdeploy build PACKAGE --backend {self._backend}, on this machine",
            )
        if not self._described():
            raise ArtifactError(f"stage {stage.name} of {bundle.path} is not the engine that its manifest describes")
        stream.reserve(self._engine.device_memory_size_v2)
        self._cache: Any = None
        if self._backend == "tensorrt-rtx":
            self._cache = kernel_cache.KernelCache(f"{bundle.manifest.members[stage.file]}-{trt.__version__}")
        self._scratch: Any = None
        self._context: Any = None
        self._bindings: dict[tuple[tuple[str, int], ...], TensorrtBinding] = {}  # of `run`
        written = {output: self._engine.get_aliased_input_tensor(output) for output in stage.aliases}
        self.in_place = {output: name for output, name in stage.aliases.items() if written[output] == name}

    def _obstacle(self, engine: memoryview) -> str:
        """Why an engine was refused."""
        if self._backend == "tensorrt":
            return self._logger.reason
        _, found = self._runtime.get_engine_validity(engine)
        kinds = self._trt.EngineInvalidityDiagnostics.__members__.values()
        names = [kind.name.lower().replace("_", " ") for kind in kinds if int(kind) & int(found)]
        return ", ".join(names) or self._logger.reason

    def _described(self) -> bool:
        """Whether the manifest has the tensors of the engine, and pairs only such."""
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
            and all(output in outputs and inputs.get(name) == outputs[output] for output, name in pairs)
        )

    def caches(self, dims: dict[str, int]) -> dict[str, DeviceArray]:
        """Empty buffers of the inputs that are updated in place."""
        return self.buffers(dims, *self.stage.aliases.values())

    def buffers(self, dims: dict[str, int], *names: str) -> dict[str, DeviceArray]:
        """Empty buffers of inputs and outputs, for bindings to share."""
        return buffers(self.stage, dims, names, self._stream)

    def array(self, values: np.ndarray) -> DeviceArray:
        """A copy of an array where the buffers lie."""
        return self._stream.array(values)

    def bind(self, dims: dict[str, int], shared: dict[str, DeviceArray] | None = None) -> "TensorrtBinding":
        """Buffers for these sizes of the open dimensions, some of them shared with other bindings."""
        return TensorrtBinding(self, dims, shared or {}, self._stream)

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """One call with fresh outputs."""
        dims = {
            d: size
            for info in self.stage.inputs
            for d, size in zip(info.shape, inputs[info.name].shape, strict=True)
            if isinstance(d, str)
        }
        key = tuple(sorted(dims.items()))
        binding = self._bindings.pop(key, None)
        if binding is None and len(self._bindings) == _KEPT:
            del self._bindings[next(iter(self._bindings))]  # the one that was not used for the longest time
        self._bindings[key] = binding = binding or self.bind(dims)
        for name, values in inputs.items():
            binding.inputs[name][...] = values
        binding.run()
        return {name: np.array(array) for name, array in binding.outputs.items()}

    def common_context(self) -> Any:
        """A context for calls of any shape."""
        if self._context is None:
            self._context = self.new_context()
        return self._context

    def new_context(self, specialize: bool = False) -> Any:
        """A context of its own, in the memory that all share.

        With `specialize` TensorRT-RTX compiles kernels for the shapes before it first runs, and not meanwhile.
        """
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
        """Gives a context the shapes and addresses of a binding."""
        for info in self.stage.inputs:
            if not context.set_input_shape(info.name, binding.shapes[info.name]):
                raise ArtifactError(
                    f"stage {self.stage.name} takes no {info.name} of shape {list(binding.shapes[info.name])}"
                )
        for name, address in binding.addresses.items():
            context.set_tensor_address(name, address)

    def execute(self, context: Any) -> None:
        """Queues one call."""
        if not context.execute_async_v3(self._stream.handle):
            raise ArtifactError(f"stage {self.stage.name} failed ({self._logger.reason})")

    def keep_kernels(self) -> None:
        """Writes what was compiled at run time to disk, for the next process."""
        if self._cache is not None:
            self._cache.save()


class TensorrtBinding(DeviceBinding):
    """A binding that becomes a CUDA graph when it is used more than once.

    The first call goes through the context that all bindings share: a prefix has no other. The second goes through a
    context of its own, since a graph is bound to one, and TensorRT sets itself up in the first call with new shapes,
    which cannot be captured. The third call is captured.
    """

    def __init__(self, session: TensorrtSession, dims: dict[str, int], shared: dict[str, DeviceArray], stream: Stream):
        stage = replace(session.stage, aliases=session.in_place)
        self._copied = {o: name for o, name in session.stage.aliases.items() if o not in session.in_place}
        missing = [name for name in self._copied.values() if name not in shared]
        super().__init__(stage, dims, buffers(stage, dims, missing, stream) | shared, stream)
        self._session, self._stream = session, stream
        self._calls = 0
        self._context: Any = None
        self._graph: Graph | None = None

    def enqueue(self) -> None:
        """Queues one engine call."""
        self._calls += 1
        if self._calls == 1:
            context = self._session.common_context()
            self._session.prepare(context, self)
            self._session.execute(context)
        elif self._calls == 2:
            self._context = self._session.new_context(specialize=True)
            self._session.prepare(self._context, self)
            self._session.execute(self._context)
            self._session.keep_kernels()
        else:
            if self._calls == 3:
                self._graph = self._captured()
            if self._graph:
                self._graph.launch()
            else:
                self._session.execute(self._context)
        for output, name in self._copied.items():
            self.inputs[name][...] = self.outputs[output]

    def _captured(self) -> Graph | None:
        """The call as a graph; None if the engine does what cannot be captured."""
        try:
            return self._stream.capture(lambda: self._session.execute(self._context))
        except VqdeployError as error:
            log.info("stage %s runs without CUDA graphs: %s", self._session.stage.name, error)
            return None


def _logger(trt: Any) -> Any:
    """A logger that remembers the last error."""

    class Logger(trt.ILogger):
        reason = "it gave no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.reason = " ".join(message.split())[:500]
            log.debug("%s", message)

    return Logger()
