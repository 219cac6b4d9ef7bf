"""Sessions on ONNX Runtime's CUDA provider, and what is missing where it does not run."""

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
    """Loads the libraries that CUDA needs, as ONNX Runtime itself tells of a missing one in its log alone.

    Raises:
        VqdeployError: A package, the driver or the GPU is missing.
    """
    if _PROVIDER not in ort.get_available_providers():
        raise VqdeployError(
            "this ONNX Runtime has no CUDA",
            expected="the package onnxruntime-gpu, and onnxruntime not beside it",
            found=f"onnxruntime {ort.__version__} for {', '.join(ort.get_available_providers())}",
            fix=_INSTALL,
        )
    device.check()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
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
    """What ONNX Runtime loads, and the package of each, by the version of CUDA that it was built for."""
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
    """One stage of a plan on ONNX Runtime's CUDA provider. All sessions of a plan share a stream.

    ONNX Runtime replays bindings as CUDA graphs where it can capture the stage: when it sees that it cannot, it refuses
    to open the session, which is then opened without. `host_inputs` are those that it takes on the CPU, as it does when
    no operator on the GPU takes them; nor can such a stage be captured.
    """

    def __init__(self, bundle: Bundle, stage: StageInfo, stream: Stream, profile: Path | None = None):
        # With TF32 the products would have ten bits of mantissa, and codes would differ from those of the CPU.
        options = {"use_tf32": "0", "user_compute_stream": str(stream.handle)}
        self.graphs = profile is None  # a trace has the operators of the first call of a graph alone
        if self.graphs:
            try:
                self._open(bundle, stage, None, options | {"enable_cuda_graph": "1"})
            except ArtifactError as error:
                log.info("stage %s runs without CUDA graphs: %s", stage.name, error)
                self.graphs = False
        if not self.graphs or self.host_inputs:
            self.graphs = False
            self._open(bundle, stage, profile, options)
        if _PROVIDER not in self._session.get_providers():
            raise VqdeployError("ONNX Runtime gave up CUDA, for a reason that it keeps to itself", fix=_INSTALL)
        self._stream, self._numbers = stream, itertools.count(1)
        self._options = self.run_options(_NO_GRAPH)

    def _open(self, bundle: Bundle, stage: StageInfo, profile: Path | None, options: dict[str, str]) -> None:
        super().__init__(bundle, stage, profile=profile, providers=[(_PROVIDER, options), "CPUExecutionProvider"])
        places = zip(stage.inputs, self._session.get_input_memory_infos(), strict=True)
        self.host_inputs = [info.name for info, memory in places if memory.name.lower() != _MEMORY]

    def run_options(self, graph: int) -> "ort.RunOptions":
        """Options of a run that captures or replays the graph of this number, where stages can be captured."""
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph if self.graphs else _NO_GRAPH))
        return options

    def bind(self, dims: dict[str, int], shared: Mapping[str, Any] | None = None) -> "CudaBinding":
        """Buffers for these sizes of the open dimensions, some of them shared with other bindings."""
        return CudaBinding(self, self._session, next(self._numbers), dims, shared or {}, self._stream)


class CudaBinding(DeviceBinding):
    """A binding that becomes a CUDA graph in its second call; the first may be the only one, as of a prefix."""

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
            place = self.shapes[info.name], self.addresses[info.name]
            self._io.bind_output(info.name, _MEMORY, 0, np.dtype(info.dtype), *place)
        self._options, self._later = owner.run_options(_NO_GRAPH), owner.run_options(number)
        for options in (self._options, self._later):
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        weakref.finalize(self, session.release_captured_graph, number)

    def _bind_inputs(self, infos: Iterable[TensorInfo]) -> None:
        for info in infos:
            place = self.shapes[info.name], self.addresses[info.name]
            self._io.bind_input(info.name, _MEMORY, 0, np.dtype(info.dtype), *place)

    def enqueue(self) -> None:
        """Queues one engine call."""
        if self._host_inputs:  # ONNX Runtime copies them when they are bound
            self._stream.synchronize()
            self._bind_inputs(self._host_inputs)
        try:
            self._session.run_with_iobinding(self._io, self._options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but this
            raise failure(f"stage {self._name} failed", error) from error
        self._options = self._later
