"""A CUDA that is as late as it may be, on a machine without a GPU, and a TensorRT that runs ONNX graphs on it.

What is queued on a stream runs when somebody waits for the stream or for an event on it, and not before. Whoever reuses
memory too early, or reads a result without a wait, sees it in the numbers. The memory of the "GPU" cannot be touched
between times: an access by the host ends the process. Every function takes what that of `cuda.bindings.runtime` takes
and answers as that does.
"""

import ctypes
import mmap

import numpy as np
import onnxruntime as ort
from cuda.bindings import runtime as real

_SPACE = 1 << 28  # bytes
_OK = real.cudaError_t.cudaSuccess
_libc = ctypes.CDLL(None)


class Cuda:
    """Stands in for the module `cuda.bindings.runtime`. `log` names what ran, in order, and each `wait`."""

    def __init__(self, free=_SPACE):
        self._map = mmap.mmap(-1, _SPACE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._next, self._free = 4096, free
        self.pinned, self._spare = {}, {}  # those of a size that was freed are given out again
        self._queue, self._recording, self._running = [], None, False
        self.done, self.log = set(), []
        self.graphs, self.made = {}, 0
        self.live = {}  # address -> bytes of what is allocated
        self._protect(False)

    cudaError_t, cudaMemcpyKind, cudaDeviceAttr = real.cudaError_t, real.cudaMemcpyKind, real.cudaDeviceAttr
    cudaStreamCaptureMode, cudaStreamNonBlocking = real.cudaStreamCaptureMode, real.cudaStreamNonBlocking
    cudaEventDisableTiming = real.cudaEventDisableTiming
    capability = 9, 0

    def _protect(self, readable):
        flags = mmap.PROT_READ | mmap.PROT_WRITE if readable else 0
        assert _libc.mprotect(ctypes.c_void_p(self._start), ctypes.c_size_t(_SPACE), flags) == 0

    def queue(self, name, work):
        (self._queue if self._recording is None else self._recording).append((name, work))
        return (_OK,)

    def drain(self, until=None):
        """Runs what is queued, up to an event if one is given."""
        if self._running:  # memory is given back whenever Python collects garbage
            return
        self.log.append("wait")
        self._running = True
        self._protect(True)
        try:
            while self._queue and (until is None or until not in self.done):
                name, work = self._queue.pop(0)
                self.log.append(name)
                work()
        finally:
            self._protect(False)
            self._running = False

    def holds(self, address, size):
        """Whether all of a stretch of memory is allocated on the GPU, in one piece."""
        return any(start <= address and address + size <= start + length for start, length in self.live.items())

    # memory

    def cudaMalloc(self, size):
        if sum(self.live.values()) + size > self._free:
            return real.cudaError_t.cudaErrorMemoryAllocation, None
        room = -(-size // 512) * 512
        if self._spare.get(room):
            address = self._spare[room].pop()
        else:
            address, self._next = self._start + self._next, self._next + room
            assert self._next <= _SPACE
        self.live[address] = size
        self.queue("garbage", lambda: ctypes.memset(address, 0xAB, size))
        return _OK, address

    def cudaFree(self, address):
        self.drain()
        self._spare.setdefault(-(-self.live.pop(address) // 512) * 512, []).append(address)
        return (_OK,)

    def cudaMallocHost(self, size):
        array = np.full(size, 0xAB, np.uint8)
        self.pinned[array.ctypes.data] = array
        return _OK, array.ctypes.data

    def cudaFreeHost(self, address):
        self.drain()
        del self.pinned[address]
        return (_OK,)

    def cudaMemsetAsync(self, address, value, size, stream):
        return self.cudaMemset2DAsync(address, size, value, size, 1, stream)

    def cudaMemcpyAsync(self, to, of, size, kind, stream):
        return self.cudaMemcpy2DAsync(to, size, of, size, size, 1, kind, stream)

    def cudaMemcpy2DAsync(self, to, to_pitch, of, of_pitch, width, height, kind, stream):
        kinds = real.cudaMemcpyKind
        assert width <= to_pitch
        assert width <= of_pitch
        extent, kept = (height - 1) * of_pitch + width, None
        on_gpu = {kinds.cudaMemcpyHostToDevice: (True, False), kinds.cudaMemcpyDeviceToHost: (False, True)}
        for address, pitch, expected in zip(
            (to, of), (to_pitch, of_pitch), on_gpu.get(kind, (True, True)), strict=True
        ):
            assert self.holds(address, (height - 1) * pitch + width) == expected
        if kind == kinds.cudaMemcpyHostToDevice and not self._is_pinned(of):
            kept = ctypes.create_string_buffer(ctypes.string_at(of, extent), extent)  # CUDA stages such memory at once
            of = ctypes.addressof(kept)

        def copy(kept=kept):
            for row in range(height):
                ctypes.memmove(to + row * to_pitch, of + row * of_pitch, width)

        self.queue(kind.name.removeprefix("cudaMemcpy"), copy)
        if kind == kinds.cudaMemcpyDeviceToHost:
            self.drain()  # into memory that is not pinned
        return (_OK,)

    def _is_pinned(self, address):
        return any(start <= address < start + len(array) for start, array in self.pinned.items())

    def cudaMemset2DAsync(self, address, pitch, value, width, height, stream):
        assert self.holds(address, (height - 1) * pitch + width)

        def fill():
            for row in range(height):
                ctypes.memset(address + row * pitch, value, width)

        return self.queue("memset", fill)

    def cudaMemGetInfo(self):
        return _OK, self._free - sum(self.live.values()), self._free

    # streams, events and graphs

    def cudaDriverGetVersion(self):
        return _OK, 13050

    def cudaRuntimeGetVersion(self):
        return _OK, 13050

    def cudaGetDeviceCount(self):
        return _OK, 1

    def cudaDeviceGetAttribute(self, attribute, number):
        attributes = real.cudaDeviceAttr
        parts = attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor
        return _OK, self.capability[parts.index(attribute)]

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == real.cudaStreamNonBlocking
        return _OK, 77

    def cudaStreamDestroy(self, stream):
        self.drain()
        return (_OK,)

    def cudaStreamSynchronize(self, stream):
        assert self._recording is None
        self.drain()
        return (_OK,)

    def cudaEventCreateWithFlags(self, flags):
        event = object()
        self.done.add(event)
        return _OK, event

    def cudaEventDestroy(self, event):
        return (_OK,)

    def cudaEventRecord(self, event, stream):
        self.done.discard(event)
        return self.queue("event", lambda: self.done.add(event))

    def cudaEventSynchronize(self, event):
        assert self._recording is None
        if event not in self.done:
            self.drain(event)
        return (_OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        assert self._recording is None
        assert mode == real.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed  # Python frees memory at any time
        self._recording = []
        return (_OK,)

    def cudaStreamEndCapture(self, stream):
        recorded, self._recording = self._recording, None
        return _OK, recorded

    def cudaGraphInstantiate(self, graph, flags):
        self.made += 1
        self.graphs[self.made] = list(graph)
        return _OK, self.made

    def cudaGraphDestroy(self, graph):
        return (_OK,)

    def cudaGraphExecDestroy(self, graph):
        del self.graphs[graph]
        return (_OK,)

    def cudaGraphLaunch(self, graph, stream):
        def replay():
            for _, work in self.graphs[graph]:
                work()

        return self.queue("graph", replay)


class TensorRT:
    """Stands in for the module `tensorrt_rtx`, or `tensorrt`. Its engines are ONNX graphs with their weights.

    It is as strict as its documents: addresses are aligned, contexts have memory and shapes before they run, what was
    captured may not change, and the first call with new shapes cannot be captured. `contexts` holds all contexts.
    """

    def __init__(self, real_module, cuda, in_place=True):
        self._real, self.cuda, self.in_place = real_module, cuda, in_place
        self.on_host, self.capturable = (), True
        self.__version__, self.__spec__ = real_module.__version__, real_module.__spec__
        self.contexts = []
        for name in (
            "ILogger",
            "TensorIOMode",
            "TensorLocation",
            "DataType",
            "nptype",
            "ExecutionContextAllocationStrategy",
            "DynamicShapesKernelSpecializationStrategy",
            "EngineInvalidityDiagnostics",
            "EngineValidity",
        ):
            if hasattr(real_module, name):
                setattr(self, name, getattr(real_module, name))

    def Runtime(self, logger):
        return _Runtime(self, logger)


class _Runtime:
    def __init__(self, trt, logger):
        self._trt, self._logger = trt, logger
        self.engine_host_code_allowed = True

    def deserialize_cuda_engine(self, engine):
        assert self.engine_host_code_allowed is False
        try:
            options = ort.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 4
            session = ort.InferenceSession(bytes(engine), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # as with a damaged engine
            self._logger.log(self._trt.ILogger.Severity.ERROR, f"no engine: {error}")
            return None
        return _Engine(self._trt, session)

    def get_engine_validity(self, engine):
        return self._trt.EngineValidity.INVALID, int(self._trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC)


class _Engine:
    device_memory_size_v2 = 1000

    def __init__(self, trt, session):
        self.trt, self.session = trt, session
        self._inputs = {i.name: i for i in session.get_inputs()}
        self._all = self._inputs | {o.name: o for o in session.get_outputs()}
        self.num_io_tensors = len(self._all)

    def get_tensor_name(self, index):
        return list(self._all)[index]

    def get_tensor_mode(self, name):
        return self.trt.TensorIOMode.INPUT if name in self._inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        kinds = {"float": "FLOAT", "float16": "HALF", "int64": "INT64", "uint8": "UINT8"}
        return getattr(self.trt.DataType, kinds[self._all[name].type[7:-1]])

    def get_tensor_shape(self, name):
        return [-1 if isinstance(size, str) else size for size in self._all[name].shape]

    def get_tensor_location(self, name):
        return self.trt.TensorLocation.HOST if name in self.trt.on_host else self.trt.TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name):
        past = name.replace("present_", "past_")
        return past if self.trt.in_place and name != past and past in self._inputs else None

    def create_runtime_config(self):
        return _Config()

    def create_execution_context(self, config):
        user_managed = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        assert config == user_managed or config.strategy == user_managed
        context = _Context(self)
        self.trt.contexts.append(context)
        if isinstance(config, _Config):
            context.specialization = config.dynamic_shapes_kernel_specialization_strategy
            context.cache = config.cache
        return context


class _Config:
    dynamic_shapes_kernel_specialization_strategy = None
    cache = None
    strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return _Cache()

    def set_runtime_cache(self, cache):
        self.cache = cache


class _Cache:
    """What was compiled, one byte a context, behind a header."""

    def __init__(self):
        self.compiled, self.loaded = b"", False

    def deserialize(self, blob):
        if not blob.startswith(b"kernels"):
            return False
        self.compiled, self.loaded = blob[7:], True
        return True

    def serialize(self):
        return b"kernels" + self.compiled


class _Context:
    def __init__(self, engine):
        self._engine, self._cuda = engine, engine.trt.cuda
        self._shapes, self._addresses, self._settled = {}, {}, False
        self.captured, self.memory = 0, None
        self.specialization = self.cache = None

    def set_device_memory(self, address, size):
        assert address % 256 == 0
        assert size >= self._engine.device_memory_size_v2
        assert self._cuda.holds(address, size)
        self.memory = address

    def is_stream_capturable(self, stream):
        assert stream == 77
        return self._engine.trt.capturable

    def set_input_shape(self, name, shape):
        assert not self.captured
        self._settled = False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        """Of an output, once the inputs have shapes. The engine works it out without any numbers."""
        session = self._engine.session
        types = {"float": np.float32, "float16": np.float16, "int64": np.int64, "uint8": np.uint8}
        feeds = {i.name: np.zeros(self._shapes[i.name], types[i.type[7:-1]]) for i in session.get_inputs()}
        return session.run([name], feeds)[0].shape

    def set_tensor_address(self, name, address):
        assert not self.captured
        assert address % 256 == 0
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        cuda, session = self._cuda, self._engine.session
        assert stream == 77
        assert self.memory
        if cuda._recording is not None:
            assert self._settled, "the first call with new shapes cannot be captured"
            self.captured += 1
        else:
            assert not self.captured
        self._settled = True
        if self.cache is not None:
            self.cache.compiled += b"k"
        inputs = {i.name: i for i in session.get_inputs()}
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        types = {"float": np.float32, "float16": np.float16, "int64": np.int64, "uint8": np.uint8}

        def at(info, shape):
            dtype = np.dtype(types[info.type[7:-1]])
            size = dtype.itemsize * int(np.prod(shape))
            assert cuda.holds(addresses[info.name], size), info.name
            buffer = (ctypes.c_byte * size).from_address(addresses[info.name])
            return np.frombuffer(buffer, dtype).reshape(shape)

        def run():
            feeds = {name: at(info, shapes[name]).copy() for name, info in inputs.items()}
            for info, values in zip(session.get_outputs(), session.run(None, feeds), strict=True):
                at(info, values.shape)[...] = values

        cuda.queue("engine", run)
        return True
