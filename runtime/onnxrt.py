"""Sessions on ONNX Runtime: buffers are bound once and reused, KV caches are updated in place."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqdeploy.errors import ArtifactError, VqdeployError, one_line
from vqdeploy.runtime import graphs
from vqdeploy.runtime import session as interface
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.manifest import Manifest, StageInfo, TensorInfo
from vqdeploy.runtime.session import Array, Opener
from vqdeploy.runtime.threads import cores

try:
    import onnxruntime as ort
except ImportError as error:
    raise VqdeployError(
        "this plan runs on ONNX Runtime, which is not installed", fix='pip install "vqdeploy[onnxrt]"'
    ) from error

log = logging.getLogger("vqdeploy")

_FOLDED_BYTES = str(1 << 28)
_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int64": "tensor(int64)",
    "uint8": "tensor(uint8)",
    "int8": "tensor(int8)",
}


def failure(what: str, error: Exception) -> ArtifactError:
    """An error with the reason of ONNX Runtime, whose messages span many lines, on one line."""
    return ArtifactError(f"{what} ({one_line(error)})")


class Binding:
    """Input and output buffers of fixed shape. Write into `inputs`, call `run`, read from `outputs`."""

    inputs: dict[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    def __init__(
        self, session: "ort.InferenceSession", stage: StageInfo, dims: dict[str, int], shared: Mapping[str, np.ndarray]
    ):
        self._session, self._name = session, stage.name
        self._io = session.io_binding()
        self._values = {}  # keeps the bound memory alive
        self.inputs = {}
        self.outputs = outputs = {}
        for info in stage.inputs:
            self.inputs[info.name] = _buffer(info, dims, shared)
            self._values[info.name] = ort.OrtValue.ortvalue_from_numpy(self.inputs[info.name])
            self._io.bind_ortvalue_input(info.name, self._values[info.name])
        for info in stage.outputs:
            if info.name in stage.aliases:
                self._io.bind_ortvalue_output(info.name, self._values[stage.aliases[info.name]])
                continue
            outputs[info.name] = _buffer(info, dims, shared)
            self._values[info.name] = ort.OrtValue.ortvalue_from_numpy(outputs[info.name])
            self._io.bind_ortvalue_output(info.name, self._values[info.name])

    def run(self) -> None:
        """One engine call.

        Raises:
            ArtifactError: The engine failed.
        """
        try:
            self._session.run_with_iobinding(self._io)
        except Exception as error:  # the only base class of ONNX Runtime's exceptions
            raise failure(f"stage {self._name} failed", error) from error

    def clear(self) -> None:
        """Zeroes every input, shared ones too."""
        for buffer in self.inputs.values():
            buffer[...] = 0


def _buffer(info: TensorInfo, dims: dict[str, int], shared: Mapping[str, np.ndarray]) -> np.ndarray:
    return shared[info.name] if info.name in shared else np.zeros(info.concrete(dims), info.dtype)


class OnnxrtSession:
    """One stage of a plan on ONNX Runtime, on the CPU unless other providers are named."""

    device = "cpu"

    def __init__(
        self,
        bundle: Bundle,
        stage: StageInfo,
        threads: int = 0,
        profile: Path | None = None,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
    ):
        """Opens the stage; with `profile`, ONNX Runtime writes a trace whose name starts with this path.

        Raises:
            ArtifactError: The stage cannot be opened, or is not the graph that its manifest describes.
        """
        self.stage = stage
        self._options: ort.RunOptions | None = None
        options = ort.SessionOptions()
        options.enable_profiling = profile is not None
        options.profile_file_prefix = str(profile)
        options.intra_op_num_threads = threads or cores()
        options.log_severity_level = 4  # failures are raised as exceptions
        options.add_session_config_entry("session.force_spinning_stop", "1")  # the host works between calls
        # All weights come from the plan: a graph must not read files.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        # Folding a chain of constants that double in size would use up the memory at load time.
        options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", _FOLDED_BYTES)
        weights = bundle.tensors() if stage.weights else {}
        try:
            # ONNX Runtime borrows this memory: the views must outlive the session.
            self._weights = {name: ort.OrtValue.ortvalue_from_numpy(weights[name]) for name in stage.weights}
            options.add_external_initializers(list(self._weights), list(self._weights.values()))
            graph = bundle.read(stage.file)
            graphs.check(graph, {name: weights[name] for name in stage.weights})
            with bundle.sparing_memory():
                self._session = ort.InferenceSession(graph, options, providers=list(providers), enable_fallback=0)
        except Exception as error:
            raise failure(f"stage {stage.name} of {bundle.path} cannot be opened", error) from error
        if not self._described():
            raise ArtifactError(f"stage {stage.name} of {bundle.path} is not the graph that its manifest describes")

    def _described(self) -> bool:
        """Whether the manifest has the inputs, outputs and aliases of the graph."""
        pairs = (
            (self.stage.inputs, self._session.get_inputs(), list(self.stage.aliases.values())),
            (self.stage.outputs, self._session.get_outputs(), list(self.stage.aliases)),
        )
        return all(
            [(info.name, _TYPES.get(info.dtype), list(info.shape)) for info in infos]
            == [(found.name, found.type, found.shape) for found in graph]
            and not any(isinstance(size, bool) for info in infos for size in info.shape)  # True is 1
            and all(alias in [info.name for info in infos] for alias in aliases)
            for infos, graph, aliases in pairs
        )

    def end_profile(self) -> list[dict[str, Any]]:
        """The events of the profile so far, in the Chrome trace format."""
        events: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text())
        return events

    def buffers(self, dims: dict[str, int], *names: str) -> Mapping[str, Array]:
        """Zeroed buffers of the named inputs and outputs, for bindings to share."""
        infos = [info for info in (*self.stage.inputs, *self.stage.outputs) if info.name in names]
        return {info.name: np.zeros(info.concrete(dims), info.dtype) for info in infos}

    def array(self, values: np.ndarray) -> Array:
        """A copy of an array on the device."""
        return values.copy()

    def bind(self, dims: dict[str, int], shared: Mapping[str, Any] | None = None) -> interface.Binding:
        """Binds buffers for these sizes of the dynamic dimensions; `shared` ones belong to other bindings too."""
        return Binding(self._session, self.stage, dims, shared or {})

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """One call with fresh outputs.

        Raises:
            ArtifactError: The engine failed, or does not take the inputs.
        """
        names = [info.name for info in self.stage.outputs]
        try:
            return dict(zip(names, self._session.run(names, inputs, self._options), strict=True))
        except Exception as error:
            raise failure(f"stage {self.stage.name} failed", error) from error


class OnnxrtBackend:
    """Plans for ONNX Runtime, on the CPU or on CUDA."""

    def place(self, manifest: Manifest, device: str) -> str:
        """`cuda` if the plan was built for it, it runs here and `cpu` was not asked for; else `cpu`.

        Raises:
            VqdeployError: `cuda` was asked for, and the plan was not built for it or CUDA does not work here.
        """
        if device == "cpu" or (device == "auto" and "cuda" not in manifest.targets):
            return "cpu"
        if "cuda" not in manifest.targets:
            raise VqdeployError("this plan was built for the CPU", fix="vqdeploy build PACKAGE --device cuda")
        try:
            from vqdeploy.runtime import cuda

            cuda.check()
        except VqdeployError as error:
            if device == "cuda":
                raise
            # Not using a GPU deserves a warning.
            idle = "CUDAExecutionProvider" in ort.get_available_providers()
            log.log(logging.WARNING if idle else logging.INFO, "running on the CPU: %s", error)
            return "cpu"
        return "cuda"

    def opener(self, bundle: Bundle, device: str, threads: int, profile: Path | None) -> Opener:
        """Returns an opener of the stages of a plan; those on CUDA share a stream.

        Raises:
            VqdeployError: CUDA failed.
        """
        if device == "cpu":
            return lambda stage: OnnxrtSession(bundle, stage, threads, profile and profile / stage.name)
        from vqdeploy.runtime.cuda import CudaSession
        from vqdeploy.runtime.device import Stream

        stream = Stream()
        return lambda stage: CudaSession(bundle, stage, stream, threads, profile and profile / stage.name)


backend = OnnxrtBackend
