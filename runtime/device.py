"""GPU memory and the CUDA stream, through cuda-python.

All work is enqueued on one stream and runs in order. The host waits when it reads an array (`np.asarray`), when it
frees memory, and when it is several engine calls ahead of the GPU. Copies from pageable host memory may wait too; the
inputs of a `DeviceBinding` go through pinned memory, which does not.
"""

import math
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.manifest import StageInfo, TensorInfo
from vqdeploy.runtime.session import Index

try:
    from cuda.bindings import runtime as cudart
except ImportError as error:
    raise VqdeployError("plans on a GPU need cuda-python", fix="pip install cuda-bindings") from error

_AHEAD = 3  # engine calls that the host may enqueue ahead of the GPU
_CPU = "vqdeploy build PACKAGE --backend onnxrt"
_ALIGNMENT = 256  # bytes; TensorRT requires this alignment


def _check(answer: tuple[Any, ...]) -> Any:
    """The result of a CUDA call, without its status.

    Raises:
        VqdeployError: The call failed.
    """
    status, *values = answer
    if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
        raise VqdeployError("the GPU has too little memory free", fix="vqdeploy build PACKAGE --max-batch N")
    if status != cudart.cudaError_t.cudaSuccess:
        raise VqdeployError(f"CUDA failed ({status.name})")
    return values[0] if values else None


def check() -> None:
    """Checks that a GPU can be used.

    Raises:
        VqdeployError: There is no driver, it is too old, or no GPU answers.
    """
    driver, runtime = _check(cudart.cudaDriverGetVersion()), _check(cudart.cudaRuntimeGetVersion())
    if not driver:
        raise VqdeployError("there is no NVIDIA driver here, and so no GPU", fix=_CPU)
    status, count = cudart.cudaGetDeviceCount()
    if status == cudart.cudaError_t.cudaErrorInsufficientDriver:
        versions = (f"CUDA {version // 1000}.{version % 1000 // 10}" for version in (runtime, driver))
        raise VqdeployError("the NVIDIA driver is too old", expected=f"one for {next(versions)}", found=next(versions))
    if not count:
        raise VqdeployError(f"no NVIDIA GPU answers ({status.name})", fix=_CPU)


def compute_capability() -> str:
    """Compute capability of the GPU in use, such as `sm_90`.

    Raises:
        VqdeployError: CUDA failed.
    """
    kinds = cudart.cudaDeviceAttr
    parts = kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor
    major, minor = (_check(cudart.cudaDeviceGetAttribute(part, 0)) for part in parts)
    return f"sm_{major}{minor}"


def used_memory() -> int:
    """Bytes of GPU memory in use, by all processes.

    Raises:
        VqdeployError: CUDA failed.
    """
    status, free, total = cudart.cudaMemGetInfo()
    _check((status,))
    used: int = total - free
    return used


class Stream:
    """A CUDA stream, and the allocator of arrays on the GPU.

    Raises:
        VqdeployError: CUDA failed, or the GPU has too little memory free. The methods raise the same.
    """

    def __init__(self) -> None:
        self.handle = int(_check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)))
        self._scratch_size, self._scratch = 0, _Memory(0)
        weakref.finalize(self, cudart.cudaStreamDestroy, self.handle)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> "DeviceArray":
        """A new array of zeros."""
        array = self._empty(shape, np.dtype(dtype))
        array[...] = 0
        return array

    def array(self, values: np.ndarray) -> "DeviceArray":
        """A new array with a copy of host values."""
        array = self._empty(values.shape, values.dtype)
        array[...] = values
        return array

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> "DeviceArray":
        memory = _Memory(math.prod(shape) * dtype.itemsize)
        return DeviceArray(self, memory, _view(memory.address, shape, dtype))

    def reserve(self, size: int) -> None:
        """Announces that an engine needs this many bytes of scratch memory."""
        self._scratch_size = max(self._scratch_size, size)

    def scratch(self) -> "_Memory":
        """Scratch memory that engines share, since they run one after the other; of the largest size ever reserved."""
        if self._scratch.size < self._scratch_size:
            self._scratch = _Memory(self._scratch_size)
        return self._scratch

    def synchronize(self) -> None:
        """Synchronizes: waits until all enqueued work is done."""
        _check(cudart.cudaStreamSynchronize(self.handle))

    def capture(self, enqueue: Callable[[], None]) -> "Graph":
        """Captures what a function enqueues as a CUDA graph, without running it."""
        # Relaxed, since the garbage collector may free memory at any time.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        _check(cudart.cudaStreamBeginCapture(self.handle, mode))
        graph = None
        try:
            try:
                enqueue()
            finally:
                status, graph = cudart.cudaStreamEndCapture(self.handle)
            _check((status, graph))
            return Graph(self, int(_check(cudart.cudaGraphInstantiate(graph, 0))))
        finally:
            if graph is not None:
                cudart.cudaGraphDestroy(graph)


class _Memory:
    """A GPU allocation, in bytes, freed with its last reference."""

    def __init__(self, size: int):
        self.address, self.size = int(_check(cudart.cudaMalloc(max(1, size)))), size
        weakref.finalize(self, cudart.cudaFree, self.address)


class Graph:
    """A captured CUDA graph."""

    def __init__(self, stream: Stream, handle: int):
        self._stream, self._handle = stream, handle
        weakref.finalize(self, cudart.cudaGraphExecDestroy, handle)

    def launch(self) -> None:
        """Enqueues the graph."""
        _check(cudart.cudaGraphLaunch(self._handle, self._stream.handle))


class DeviceArray:
    """An array in GPU memory, with a part of numpy's interface.

    Indexing by integers and slices gives a view. Assignment, of a number or an array on host or GPU, is enqueued.
    `np.asarray` synchronizes and copies to the host.
    """

    def __init__(self, stream: Stream, memory: _Memory, view: np.ndarray):
        self._stream, self._memory = stream, memory
        self._view = view  # a numpy array at the GPU address: only for slicing, never to be read or written

    @property
    def shape(self) -> tuple[int, ...]:
        """As numpy's."""
        return self._view.shape

    @property
    def dtype(self) -> np.dtype:
        """As numpy's."""
        return self._view.dtype

    @property
    def address(self) -> int:
        """GPU address of the first element."""
        return _address(self._view)

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, index: Index) -> "DeviceArray":
        places = index if isinstance(index, tuple) else (index,)
        for each in places:
            if not isinstance(each, int | np.integer | slice | type(Ellipsis)) or isinstance(each, bool):
                raise TypeError(f"an array on a GPU is indexed by integers and slices, not by {type(each).__name__}")
        # With an ellipsis numpy returns a view of a single element too, instead of reading it.
        view = self._view[places if Ellipsis in places else (*places, ...)]
        return DeviceArray(self._stream, self._memory, view)

    def __setitem__(self, index: Index, value: ArrayLike) -> None:
        target, stream, kinds = self[index]._view, self._stream.handle, cudart.cudaMemcpyKind
        if isinstance(value, DeviceArray):
            _copy(target, np.broadcast_to(value._view, target.shape), kinds.cudaMemcpyDeviceToDevice, stream)
            return
        values = np.asarray(value, self.dtype)
        if values.ndim == 0 and len(pattern := set(values.tobytes())) == 1:
            _fill(target, pattern.pop(), stream)
        else:
            source = np.ascontiguousarray(np.broadcast_to(values, target.shape))
            _copy(target, source, kinds.cudaMemcpyHostToDevice, stream)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        values = np.empty(self.shape, self.dtype)
        _copy(values, self._view, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost, self._stream.handle)
        self._stream.synchronize()
        return values if dtype is None else values.astype(dtype, copy=False)


def _view(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    class Memory:
        __array_interface__ = {"data": (address, False), "shape": shape, "typestr": dtype.str, "version": 3}  # noqa: RUF012

    return np.asarray(Memory())


def _address(view: np.ndarray) -> int:
    address: int = view.__array_interface__["data"][0]
    return address


def _copy(target: np.ndarray, source: np.ndarray, kind: Any, stream: int) -> None:
    """Enqueues a copy between arrays of equal shape and type."""
    for (to, to_pitch), (of, of_pitch), width, height in _blocks(target, source):
        if height == 1:  # a pitch has a limit that a width has not
            _check(cudart.cudaMemcpyAsync(to, of, width, kind, stream))
        else:
            _check(cudart.cudaMemcpy2DAsync(to, to_pitch, of, of_pitch, width, height, kind, stream))


def _fill(target: np.ndarray, value: int, stream: int) -> None:
    """Enqueues a memset of every byte of an array."""
    for (to, pitch), _, width, height in _blocks(target, target):
        if height == 1:
            _check(cudart.cudaMemsetAsync(to, value, width, stream))
        else:
            _check(cudart.cudaMemset2DAsync(to, pitch, value, width, height, stream))


def _blocks(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[tuple[int, int], tuple[int, int], int, int]]:
    """Two arrays of equal shape as pairs of 2-d blocks: address and pitch of each, width in bytes, number of rows."""
    if target.size == 0:
        return
    if target.dtype != source.dtype:
        raise TypeError(f"a copy of {source.dtype} to {target.dtype}")
    kept = [axis for axis, size in enumerate(target.shape) if size > 1]
    lengths = [target.shape[axis] for axis in kept]
    strides = [(target.strides[axis], source.strides[axis]) for axis in kept]
    width, height = target.itemsize, 1
    while strides and strides[-1] == (width, width):
        strides.pop()
        width *= lengths.pop()
    pitches = width, width
    if strides and min(strides[-1]) >= width:
        height, pitches = lengths.pop(), strides.pop()
    to, of = _address(target), _address(source)
    for index in np.ndindex(*lengths):
        ahead, behind = (sum(i * steps[side] for i, steps in zip(index, strides, strict=True)) for side in range(2))
        yield (to + ahead, pitches[0]), (of + behind, pitches[1]), width, height


class _Staged:
    """Host arrays that go to the GPU in one copy, from pinned memory that stays untouched until the copy is done."""

    def __init__(self, stream: Stream, infos: list[TensorInfo], dims: dict[str, int]):
        self._stream = stream
        places, end = {}, 0
        for info in infos:
            places[info.name] = end
            size = math.prod(info.concrete(dims)) * np.dtype(info.dtype).itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._host, self._device = np.zeros(end, np.uint8), stream.zeros((end,), np.uint8)
        self._slots: deque[_Slot] = deque(maxlen=_AHEAD)
        self.arrays = {i.name: np.ndarray(i.concrete(dims), i.dtype, self._host, places[i.name]) for i in infos}
        self.addresses = {name: self._device.address + place for name, place in places.items()}

    def upload(self) -> None:
        """Enqueues a copy of the present values."""
        if not self._host.size:
            return
        if len(self._slots) < _AHEAD:
            self._slots.append(_Slot(self._host.size))
        else:
            self._slots.rotate(-1)  # before it is used, so that an interrupt during the wait does not lose it
        self._slots[-1].send(self._host, self._device.address, self._stream)


class _Slot:
    """Pinned host memory, and the event that marks the end of the copy from it."""

    def __init__(self, size: int):
        address = int(_check(cudart.cudaMallocHost(size)))
        self._memory = _view(address, (size,), np.dtype(np.uint8))
        self._event = _check(cudart.cudaEventCreateWithFlags(cudart.cudaEventDisableTiming))
        weakref.finalize(self, _give_back, cudart, address, self._event)

    def send(self, values: np.ndarray, address: int, stream: Stream) -> None:
        _check(cudart.cudaEventSynchronize(self._event))
        self._memory[...] = values
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        _check(cudart.cudaMemcpyAsync(address, _address(self._memory), values.nbytes, kind, stream.handle))
        _check(cudart.cudaEventRecord(self._event, stream.handle))


def _give_back(library: Any, address: int, event: Any) -> None:
    library.cudaEventSynchronize(event)
    library.cudaFreeHost(address)
    library.cudaEventDestroy(event)


class DeviceBinding:
    """Inputs and outputs of fixed shape on a GPU. Write into `inputs`, call `run`, read from `outputs`.

    Inputs that are shared with other bindings are arrays on the GPU. The others are host arrays, which `run` copies at
    the time of the call. Outputs are arrays on the GPU.
    """

    inputs: dict[str, np.ndarray | DeviceArray]
    outputs: dict[str, DeviceArray]

    def __init__(self, stage: StageInfo, dims: dict[str, int], shared: Mapping[str, DeviceArray], stream: Stream):
        places = {o.name: stage.aliases.get(o.name, o.name) for o in stage.outputs}  # buffer of an output
        missing = [name for name in places.values() if name not in shared]
        held = buffers(stage, dims, missing, stream) | dict(shared)
        kept = {i.name: held[i.name] for i in stage.inputs if i.name in held}
        self._staged = _Staged(stream, [i for i in stage.inputs if i.name not in held], dims)
        self.inputs = self._staged.arrays | kept
        self.outputs = {name: held[name] for name in places.values() if name not in kept}
        arrays = kept | {output: held[name] for output, name in places.items()}
        self.addresses = self._staged.addresses | {name: array.address for name, array in arrays.items()}
        self.shapes = {i.name: i.concrete(dims) for i in (*stage.inputs, *stage.outputs)}

    def run(self) -> None:
        """Enqueues one engine call, with the present values of the host inputs.

        Raises:
            VqdeployError: CUDA failed, or the engine was not built for these sizes.
            ArtifactError: The engine failed.
        """
        self._staged.upload()
        self.enqueue()

    def enqueue(self) -> None:
        """Enqueues one engine call, whose inputs are on the GPU; subclasses implement it.

        Raises:
            NotImplementedError: In this class.
            VqdeployError: CUDA failed, or the engine was not built for these sizes.
            ArtifactError: The engine failed.
        """
        raise NotImplementedError

    def clear(self) -> None:
        """Zeroes every input, shared ones too."""
        for array in self.inputs.values():
            array[...] = 0


class DeviceSession:
    """Base of sessions on a GPU: allocates their buffers."""

    device = "cuda"
    stage: StageInfo
    _stream: Stream

    def buffers(self, dims: dict[str, int], *names: str) -> dict[str, DeviceArray]:
        """Zeroed buffers of the named inputs and outputs, for bindings to share."""
        return buffers(self.stage, dims, names, self._stream)

    def array(self, values: np.ndarray) -> DeviceArray:
        """A copy of an array on the device."""
        return self._stream.array(values)


def buffers(stage: StageInfo, dims: dict[str, int], names: Collection[str], stream: Stream) -> dict[str, DeviceArray]:
    """Zeroed buffers of inputs and outputs of a stage, for bindings to share.

    Raises:
        VqdeployError: The GPU has too little memory free.
    """
    infos = [info for info in (*stage.inputs, *stage.outputs) if info.name in names]
    return {info.name: stream.zeros(info.concrete(dims), info.dtype) for info in infos}
