"""Sessions on ONNX Runtime's CUDA execution provider, and a check of what it needs."""

import contextlib
import ctypes
import io
import itertools
import logging
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import device
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.device import DeviceArray, DeviceBinding, DeviceSession, Stream
from vqdeploy.runtime.manifest import StageInfo, TensorInfo
from vqdeploy.runtime.onnxrt import OnnxrtSession, failure

_INSTALL = 'pip uninstall -y onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]"'
_PROVIDER = "CUDAExecutionProvider"
_MEMORY = "cuda"
_NO_GRAPH = -1

log = logging.getLogger("vqdeploy")


def check() -> None:
    """Loads the shared libraries that CUDA needs: ONNX Runtime reports a missing one only in its log.

    Raises:
        VqdeployError: A package, the driver or the GPU is missing.
    """
    if _PROVIDER not in ort.get_available_providers():
        raise VqdeployError(
            "this ONNX Runtime has no CUDA",
            expected="the package onnxruntime-gpu without onnxruntime",
            found=f"onnxruntime {ort.__version__} for {', '.join(ort.get_available_providers())}",
            fix=_INSTALL,
        )
    device.check()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the libraries that it does not find
        ort.preload_dlls()
    for library, package in _libraries(ort.cuda_version).items():
        try:
            ctypes.CDLL(library)
        except OSError as error:
            raise VqdeployError(
                f"ONNX Runtime on CUDA needs {library} of {package}, which cannot be loaded ({error})",
                fix='pip install "onnxruntime-gpu[cuda,cudnn]"',
            ) from error


def _libraries(cuda: str) -> dict[str, str]:
    """The shared libraries that ONNX Runtime loads and their PyPI packages, by its CUDA version."""
    major = cuda.partition(".")[0]
    suffix = f"-cu{major}" if int(major) < 13 else ""
    return {
        f"libcudart.so.{major}": f"nvidia-cuda-runtime{suffix}",
        f"libcublasLt.so.{major}": f"nvidia-cublas{suffix}",
        f"libcublas.so.{major}": f"nvidia-cublas{suffix}",
        "libcurand.so.10": f"nvidia-curand{suffix}",
        "libcudnn.so.9": f"nvidia-cudnn-cu{major}",
    }


class CudaSession(DeviceSession, OnnxrtSession):
    """One stage of a plan on ONNX Runtime's CUDA execution provider. All sessions of a plan share a stream.

    ONNX Runtime replays bindings as CUDA graphs if it can capture the stage. If not, opening the session fails, and it
    is then opened without CUDA graphs. `host_inputs` are inputs that it reads on the CPU, because no GPU operator
    consumes them; such a stage cannot be captured.
    """

    def __init__(self, bundle: Bundle, stage: StageInfo, stream: Stream, threads: int = 0, profile: Path | None = None):
        # TF32 has a 10-bit mantissa: codes would differ from those of the CPU.
        options = {"use_tf32": "0", "user_compute_stream": str(stream.handle)}
        self.graphs = profile is None  # a CUDA graph appears in a trace only once, at its first call
        if self.graphs:
            try:
                self._open(bundle, stage, threads, None, options | {"enable_cuda_graph": "1"})
            except ArtifactError as error:
                log.info("stage %s runs without CUDA graphs: %s", stage.name, error)
                self.graphs = False
        if not self.graphs or self.host_inputs:
            self.graphs = False
            self._open(bundle, stage, threads, profile, options)
        if _PROVIDER not in self._session.get_providers():
            raise VqdeployError("ONNX Runtime disabled CUDA and gave no reason", fix=_INSTALL)
        self._stream, self._numbers = stream, itertools.count(1)
        self._options = self.run_options(_NO_GRAPH)

    def _open(
        self, bundle: Bundle, stage: StageInfo, threads: int, profile: Path | None, options: dict[str, str]
    ) -> None:
        providers = [(_PROVIDER, options), "CPUExecutionProvider"]
        super().__init__(bundle, stage, threads, profile, providers=providers)
        memories = zip(stage.inputs, self._session.get_input_memory_infos(), strict=True)
        self.host_inputs = [info.name for info, memory in memories if memory.name.lower() != _MEMORY]

    def run_options(self, graph: int) -> "ort.RunOptions":
        """Run options that capture or replay the CUDA graph of this number, if the stage can be captured."""
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph if self.graphs else _NO_GRAPH))
        return options

    def bind(self, dims: dict[str, int], shared: Mapping[str, Any] | None = None) -> "CudaBinding":
        """Binds buffers for these sizes of the dynamic dimensions; `shared` ones belong to other bindings too.

        Raises:
            VqdeployError: The GPU has too little memory free.
        """
        return CudaBinding(self, self._session, next(self._numbers), dims, shared or {}, self._stream)


class CudaBinding(DeviceBinding):
    """A binding that becomes a CUDA graph at its second call; prefill, for one, makes a single call."""

    def __init__(
        self,
        owner: CudaSession,
        session: "ort.InferenceSession",
        number: int,
        dims: dict[str, int],
        shared: Mapping[str, DeviceArray],
        stream: Stream,
    ):
        super().__init__(owner.stage, dims, shared, stream)
        self._session, self._name, self._stream = session, owner.stage.name, stream
        self._io = session.io_binding()
        self._host_inputs = [info for info in owner.stage.inputs if info.name in owner.host_inputs]
        self._bind_inputs(owner.stage.inputs)
        for info in owner.stage.outputs:
            shape, address = self.shapes[info.name], self.addresses[info.name]
            self._io.bind_output(info.name, _MEMORY, 0, np.dtype(info.dtype), shape, address)
        self._options, self._later = owner.run_options(_NO_GRAPH), owner.run_options(number)
        for options in (self._options, self._later):
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        weakref.finalize(self, session.release_captured_graph, number)

    def _bind_inputs(self, infos: Iterable[TensorInfo]) -> None:
        for info in infos:
            shape, address = self.shapes[info.name], self.addresses[info.name]
            self._io.bind_input(info.name, _MEMORY, 0, np.dtype(info.dtype), shape, address)

    def enqueue(self) -> None:
        """Enqueues one engine call.

        Raises:
            VqdeployError: CUDA failed.
            ArtifactError: The engine failed.
        """
        if self._host_inputs:  # ONNX Runtime copies them at binding time
            self._stream.synchronize()
            self._bind_inputs(self._host_inputs)
        try:
            self._session.run_with_iobinding(self._io, self._options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this
            raise failure(f"stage {self._name} failed", error) from error
        self._options = self._later
