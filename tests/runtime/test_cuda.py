"""ONNX Runtime on CUDA: where a plan runs, what is missing, and bindings on a device. A GPU is needed for the last.

Without a GPU the memory of the host stands in for that of the device, with the copies to it and from it.
"""

import ctypes
import re
import sys

import numpy as np
import pytest

from vqdeploy.engines.build import build
from vqdeploy.errors import VqdeployError
from vqdeploy.runtime import cuda, load
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.onnxrt import DeviceBinding, OnnxrtSession
from vqdeploy.verify import verify

SYSTEMS = ("", "movq", "adaptive", "vit", "vqgan", "vqvae2", "three")


def named(system, kind):
    return f"{system}_{kind}".lstrip("_")


@pytest.fixture(scope="module", params=SYSTEMS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def cuda_plan(name, request, tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "cuda.plan"
    build(request.getfixturevalue(named(name, "package")), file, device="cuda")
    return file


@pytest.fixture(scope="module")
def small_plan(package, tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "small-cuda.plan"
    build(package, file, device="cuda")
    return file


@pytest.fixture
def on_device(monkeypatch):
    """Pipelines whose buffers are those of a device."""
    opened = OnnxrtSession.__init__

    def init(self, *args, **kwargs):
        opened(self, *args, **kwargs)
        self._memory = "cpu"

    monkeypatch.setattr(OnnxrtSession, "__init__", init)


@pytest.fixture
def gpu_build(monkeypatch):
    """An onnxruntime-gpu, with a GPU and every library; tests take one thing away."""
    loaded = []
    monkeypatch.setattr(cuda.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(cuda.ort, "cuda_version", "13.0")
    monkeypatch.setattr(cuda.ort, "preload_dlls", lambda: sys.stdout.write("Failed to load many"))
    monkeypatch.setattr(cuda, "_check_driver", lambda cuda: None)
    monkeypatch.setattr(ctypes, "CDLL", loaded.append)
    return loaded


def test_a_plan_says_that_it_is_for_cuda_and_has_the_portable_bodies(cuda_plan, name, request):
    plan = Bundle(cuda_plan)
    assert plan.manifest.targets == ("cuda",)
    package = request.getfixturevalue(named(name, "package"))
    for stage in plan.manifest.stages:
        assert bytes(plan.member(stage.file)) == (package / stage.file).read_bytes()
        assert b"com.microsoft" not in bytes(plan.member(stage.file))


def test_plans_are_for_the_cpu_by_default(plan):
    assert Bundle(plan).manifest.targets == ()


def test_there_is_no_other_device(package, tmp_path):
    with pytest.raises(VqdeployError, match="expected cpu or cuda, found tpu"):
        build(package, tmp_path / "a.plan", device="tpu")


def codes_of(file):
    """What the loops draw: all of it, twice, and the rest of what is known."""
    pipeline = load(file, device="cpu", threads=1)
    labels = [i % pipeline.classes for i in range(3)]
    first = pipeline.generate(labels, seed=4)
    pipeline.generate(labels[:2], seed=5)
    again = pipeline.generate(labels, seed=4)
    rest = pipeline.inpaint(first.images, labels, mask_ratio=0.5, seed=6)
    return [first.codes, again.codes, rest.codes]


def test_loops_on_a_device_draw_what_they_draw_on_the_host(cuda_plan, on_device, monkeypatch):
    found = codes_of(cuda_plan)
    monkeypatch.undo()
    for a, b in zip(found, codes_of(cuda_plan), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checks_pass_on_a_device(small_plan, system, on_device):
    report = verify(small_plan, system, device="cpu")
    assert report["passed"], report


@pytest.fixture
def step(portable_plan):
    bundle = Bundle(portable_plan)
    session = OnnxrtSession(bundle, bundle.manifest.stage("step"), threads=1)
    session._memory = "cpu"
    return session


def test_caches_stay_on_the_device_and_nothing_else_is_kept_from_the_host(step):
    dims = {"batch": 2, "length": 1}
    caches = step.caches(dims)
    binding = step.bind(dims, caches)
    assert isinstance(binding, DeviceBinding)
    assert set(binding.inputs) == {info.name for info in step.stage.inputs} - set(caches)
    assert set(binding.outputs) == {info.name for info in step.stage.outputs} - set(step.stage.aliases)
    addresses = {name: value.data_ptr() for name, value in binding._values.items()}
    binding.inputs["top_k"][:] = 64
    binding.inputs["temperature"][:] = 1
    for _ in range(2):
        binding.run()
    results = dict(zip([o.name for o in step.stage.outputs], binding._io.get_outputs(), strict=True))
    for output, name in step.stage.aliases.items():
        assert results[output].data_ptr() == caches[name].data_ptr() == addresses[name]
        assert caches[name].numpy().any()
    assert {name: value.data_ptr() for name, value in binding._values.items()} == addresses

    binding.clear()
    assert not any(cache.numpy().any() for cache in caches.values())
    assert not any(array.any() for array in binding.inputs.values())


def test_cuda_is_not_taken_for_a_plan_of_the_cpu(plan, gpu_build):
    assert load(plan).device == "cpu"
    with pytest.raises(VqdeployError, match=r"built for the CPU\. Fix: vqdeploy build PACKAGE --device cuda") as caught:
        load(plan, device="cuda")
    assert caught.value.exit_code == 2


def test_where_a_plan_for_cuda_runs(small_plan, gpu_build, monkeypatch):
    opened = []
    monkeypatch.setattr("vqdeploy.runtime.pipeline.Pipeline", lambda *args, device: opened.append(device))
    for device in ("auto", "cuda", "cpu"):
        load(small_plan, device)
    assert opened == ["cuda", "cuda", "cpu"]


def test_onnxruntime_without_cuda(small_plan, monkeypatch, caplog):
    monkeypatch.setattr(cuda.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(VqdeployError, match=re.escape("no CUDA; expected the package onnxruntime-gpu")) as caught:
        load(small_plan, device="cuda")
    assert 'pip install "onnxruntime-gpu[cuda,cudnn]"' in str(caught.value)
    assert load(small_plan).device == "cpu"
    assert not caplog.records


@pytest.mark.parametrize(
    ("library", "source"),
    [
        ("libcudnn.so.9", "nvidia-cudnn-cu13"),
        ("libcublas.so.13", "nvidia-cublas"),
        ("libcurand.so.10", "nvidia-curand"),
    ],
)
def test_a_missing_library_is_named_with_its_package(
    small_plan, gpu_build, monkeypatch, capsys, caplog, library, source
):
    def open_library(name):
        if name == library:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", open_library)
    with pytest.raises(VqdeployError, match=f"needs {library} of {source}, which") as caught:
        load(small_plan, device="cuda")
    assert str(caught.value).endswith('Fix: pip install "onnxruntime-gpu[cuda,cudnn]"')
    assert not capsys.readouterr().out
    assert load(small_plan).device == "cpu"
    assert f"running on the CPU: ONNX Runtime on CUDA needs {library}" in caplog.text


def test_packages_of_cuda_12_have_its_number(gpu_build):
    assert cuda._libraries("12.8")["libcublas.so.12"] == "nvidia-cublas-cu12"


class Driver:
    def __init__(self, status=0, count=1, version=13010):
        self.status, self.count, self.version = status, count, version

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = self.count
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = self.version
        return 0


@pytest.mark.parametrize(("status", "count"), [(100, 0), (0, 0)])
def test_a_driver_without_a_gpu(monkeypatch, status, count):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(status, count))
    with pytest.raises(VqdeployError, match=f"no NVIDIA GPU answers; expected one or more, found 0 .status {status}."):
        cuda._check_driver(13)


def test_a_driver(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    cuda._check_driver(13)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(version=12080))
    with pytest.raises(VqdeployError, match=r"driver is too old; expected one for CUDA 13, found CUDA 12\.8"):
        cuda._check_driver(13)


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(VqdeployError, match="there is no NVIDIA driver"):
        cuda._check_driver(13)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_fell_back_to_the_cpu_is_refused(plan):
    """ONNX Runtime goes on without a provider that it cannot load."""
    bundle = Bundle(plan)
    with pytest.raises(VqdeployError, match="ONNX Runtime gave up CUDA"):
        OnnxrtSession(bundle, bundle.manifest.stage("decode"), device="cuda")


def missing():
    try:
        cuda.check()
    except VqdeployError as error:
        return str(error)


@pytest.mark.gpu
def test_every_system_agrees_with_pytorch_on_cuda(cuda_plan, name, request):
    if reason := missing():
        pytest.skip(reason)
    report = verify(cuda_plan, request.getfixturevalue(named(name, "system")), device="cuda")
    assert report["passed"], report
