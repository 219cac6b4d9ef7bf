"""Arrays on a GPU against numpy, and work on a stream, with a CUDA that runs everything as late as it may."""

import gc
import inspect
import math

import numpy as np
import pytest
from cuda.bindings import runtime as real
from hypothesis import given
from hypothesis import strategies as st
from support.late_cuda import Cuda

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime import device
from vqdeploy.runtime.device import DeviceBinding, Stream
from vqdeploy.runtime.manifest import StageInfo, TensorInfo


@pytest.fixture(scope="module")
def simulated():
    with pytest.MonkeyPatch.context() as patch:
        cuda = Cuda()
        patch.setattr(device, "cudart", cuda)
        yield cuda


@pytest.fixture
def stream(simulated):
    return Stream()


SIDES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def index(draw, shape):
    """Integers, slices and steps, for some of the dimensions."""
    kinds = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        whole = st.integers(-size, size - 1)
        part = st.builds(slice, st.integers(-size, size), st.integers(-size, size), st.integers(1, 2))
        kinds.append(draw(st.one_of(whole, part, st.just(slice(None)))))
    return tuple(kinds)


TYPES = st.sampled_from(["int64", "float32", "float16", "uint8"])


@given(data=st.data(), shape=SIDES, dtype=TYPES)
def test_views_and_assignments_are_those_of_numpy(simulated, data, shape, dtype):
    compare(data, shape, dtype)


@pytest.mark.gpu
@given(data=st.data(), shape=SIDES, dtype=TYPES)
def test_they_are_on_a_gpu_too(data, shape, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "cudart", real)
        try:
            device.check()
        except VqdeployError as error:
            pytest.skip(str(error))
        compare(data, shape, dtype)


def compare(data, shape, dtype):
    """Reads a part of an array, and writes one."""
    expected = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    found = Stream().array(expected)
    other = Stream().array(expected[::-1] + 1)
    part = index(data.draw, shape)
    target = expected[part]
    np.testing.assert_array_equal(found[part], target)
    assert found[part].shape == np.shape(target)

    kind = data.draw(st.sampled_from(["number", "zero", "host", "row", "gpu"]))
    host = (expected[::-1] + 1)[part]
    value = {"number": 7, "zero": 0, "host": host, "row": host[..., :1] if np.ndim(host) else host, "gpu": host}[kind]
    changed = expected.copy()
    changed[part] = value
    found[part] = other[part] if kind == "gpu" else value
    np.testing.assert_array_equal(found, changed)


def test_an_array_that_is_assigned_spreads_as_in_numpy(stream):
    target, row = stream.zeros((3, 2, 4), "int64"), stream.array(np.arange(4))
    target[1:] = row
    np.testing.assert_array_equal(target, np.stack([np.zeros((2, 4))] + [[range(4)] * 2] * 2))


def test_new_arrays_are_zero_whatever_was_there(stream):
    stream.array(np.full(64, 7))
    assert not np.asarray(stream.zeros((64,), "int64")).any()


def test_types_are_not_changed_in_a_copy(stream):
    with pytest.raises(TypeError, match="a copy of float32 to int64"):
        stream.zeros((2,), "int64")[:] = stream.zeros((2,), "float32")


@pytest.mark.parametrize("wrong", [np.array([0, 1]), [0, 1], np.array([True, False]), True, None, (slice(None), [0])])
def test_only_whole_numbers_and_slices_are_indices(stream, wrong):
    """numpy would read the host's memory at the GPU's address for any other."""
    array = stream.zeros((2, 3), "int64")
    with pytest.raises(TypeError, match="indexed by integers and slices"):
        array[wrong]
    with pytest.raises(TypeError, match="indexed by integers and slices"):
        array[wrong] = 1


def test_what_is_given_for_reading_is_a_copy(stream):
    array = stream.array(np.arange(3))
    values = np.asarray(array)
    values[:] = 9
    np.testing.assert_array_equal(array, range(3))
    assert np.asarray(array, np.float32).dtype == np.float32


def test_the_host_may_reuse_what_it_assigned(stream):
    values = np.arange(5)
    array = stream.array(values)
    values[:] = 0
    np.testing.assert_array_equal(array, range(5))


STAGE = StageInfo(
    "step",
    "step.engine",
    (
        TensorInfo("x", "float32", ("batch",)),
        TensorInfo("past", "float32", ("batch", 3)),
        TensorInfo("n", "int64", (1,)),
    ),
    (TensorInfo("y", "float32", ("batch",)), TensorInfo("present", "float32", ("batch", 3))),
    aliases={"present": "past"},
)


class Adding(DeviceBinding):
    """An engine that adds its input to its output."""

    def __init__(self, simulated, stream, **shared):
        super().__init__(STAGE, {"batch": 2}, shared, stream)
        self.simulated, self.sum = simulated, self.outputs["y"]
        self.source = device._view(self.addresses["x"], self.shapes["x"], np.dtype(np.float32))

    def enqueue(self):
        def add():
            self.sum._view[...] += self.source

        self.simulated.queue("engine", add)


def test_each_call_sees_its_own_inputs_however_late_it_runs(simulated, stream):
    binding = Adding(simulated, stream)
    for number in range(20):
        binding.inputs["x"][:] = number, 1
        binding.run()
    binding.inputs["x"][:] = 100
    np.testing.assert_array_equal(binding.outputs["y"], [190, 20])


def test_the_host_gets_no_more_than_a_few_calls_ahead(simulated, stream):
    binding = Adding(simulated, stream)
    stream.synchronize()
    del simulated.log[:]
    for _ in range(10):
        binding.run()
    # The last call waited for the upload of the one three before it, and so for all calls before that.
    assert simulated.log.count("engine") == 10 - device._AHEAD - 1


def test_without_a_host_input_nothing_is_uploaded(simulated, stream):
    shared = {name: stream.zeros((2,), "float32") for name in ("x",)} | {"n": stream.zeros((1,), "int64")}
    binding = Adding(simulated, stream, **shared)
    stream.synchronize()
    del simulated.log[:]
    binding.run()
    stream.synchronize()
    assert simulated.log == ["wait", "engine"]


def test_inputs_of_the_host_and_shared_ones_are_told_apart(simulated, stream):
    past = stream.zeros((2, 3), "float32")
    binding = Adding(simulated, stream, past=past)
    assert isinstance(binding.inputs["x"], np.ndarray)
    assert binding.inputs["past"] is past
    assert binding.addresses["present"] == binding.addresses["past"] == past.address
    assert list(binding.outputs) == ["y"]
    assert all(address % device._ALIGNMENT == 0 for address in binding.addresses.values())


def test_clear_reaches_every_input(simulated, stream):
    binding = Adding(simulated, stream, past=stream.array(np.ones((2, 3), np.float32)))
    binding.inputs["x"][:] = 3
    binding.clear()
    assert not any(np.asarray(array).any() for array in binding.inputs.values())


def test_a_graph_replays_what_was_captured(simulated, stream):
    a, b = stream.array(np.array([1])), stream.array(np.array([0]))

    def copy():
        b[:] = a

    graph = stream.capture(copy)
    np.testing.assert_array_equal(b, [0])
    for number in (5, 6):
        a[:] = number
        graph.launch()
        np.testing.assert_array_equal(b, [number])


def test_a_failure_ends_the_capture(simulated, stream):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        stream.capture(fail)
    stream.synchronize()


def test_memory_is_given_back(simulated, stream):
    gc.collect()
    before = sum(simulated.live.values())
    array = stream.zeros((100,), "uint8")
    view = array[50:]
    del array
    gc.collect()
    assert sum(simulated.live.values()) == before + 100
    del view
    gc.collect()
    assert sum(simulated.live.values()) == before


def test_working_memory_is_shared_and_as_large_as_the_largest_needs(stream):
    for size in (10, 500, 20):
        stream.reserve(size)
    first = stream.scratch()
    assert first.size == 500
    assert stream.scratch() is first
    stream.reserve(600)
    assert stream.scratch().size == 600


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr(device, "cudart", Cuda(free=1000))
    with pytest.raises(VqdeployError, match=r"too little memory free\. Fix: vqdeploy build PACKAGE --max-batch N"):
        Stream().zeros((1001,), "uint8")


def test_another_failure_is_named(monkeypatch):
    cuda = Cuda()
    cuda.cudaStreamSynchronize = lambda stream: (real.cudaError_t.cudaErrorIllegalAddress,)
    monkeypatch.setattr(device, "cudart", cuda)
    with pytest.raises(VqdeployError, match=r"CUDA failed \(cudaErrorIllegalAddress\)"):
        Stream().synchronize()


FUNCTIONS = [name for name, value in vars(Cuda).items() if name.startswith("cuda") and inspect.isfunction(value)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_simulation_has_the_parameters_of_cuda(name):
    """Compiled functions tell them in the first line of their documentation alone."""
    parameters = inspect.signature(getattr(Cuda, name)).parameters
    line = inspect.getdoc(getattr(real, name)).splitlines()[0]
    inside = line[line.index("(") + 1 : line.rindex(")")]
    assert len(parameters) - 1 == len([p for p in inside.split(",") if p.strip()])
