"""ONNX Runtime on CUDA: where a plan runs, what is missing, and its sessions on a simulated GPU."""

import ctypes
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support.late_cuda import Cuda
from support.trials import trial

from vqdeploy.engines.build import build
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import cuda, device, load, onnxrt
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.cuda import CudaSession
from vqdeploy.verify import verify

SYSTEMS = ("", "text", "movq", "adaptive", "vit", "vqgan", "llamagen", "features", "vqvae2", "three", "var")


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
def gpu(monkeypatch):
    """A simulated GPU, whose kernels are those of ONNX Runtime for the CPU, queued as the GPU's would be."""
    simulated = Cuda()
    monkeypatch.setattr(device, "cudart", simulated)
    monkeypatch.setattr(cuda, "_PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(cuda, "_MEMORY", "cpu")
    monkeypatch.setattr(cuda, "check", lambda: None)

    run = cuda.ort.InferenceSession.run_with_iobinding

    def late(session, binding, options=None):
        if options is None:  # on the CPU
            return run(session, binding)
        simulated.graphs_asked.append(options.get_run_config_entry("gpu_graph_id"))
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        return simulated.queue("engine", lambda: run(session, binding, options))

    simulated.graphs_asked = []
    monkeypatch.setattr(cuda.ort.InferenceSession, "run_with_iobinding", late)
    return simulated


@pytest.fixture
def gpu_build(monkeypatch):
    """An onnxruntime-gpu, with a GPU and every library; tests take one thing away."""
    loaded = []
    monkeypatch.setattr(cuda.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(cuda.ort, "cuda_version", "13.0")
    monkeypatch.setattr(cuda.ort, "preload_dlls", lambda: sys.stdout.write("Failed to load many"))
    monkeypatch.setattr(device, "cudart", Driver())
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


def codes_of(file, device):
    """What the loops draw: all of it, twice, and the rest of what is known, which is not the same in each image."""
    pipeline = load(file, device=device, threads=1)
    labels = pipeline.condition.examples(3)
    first = pipeline.generate(labels, seed=4)
    pipeline.generate(labels[:2], seed=5)
    again = pipeline.generate(labels, seed=4)
    side = pipeline.image_shape[0]
    masks = np.arange(side)[:, None] >= np.array([0.3, 0.8, 0.6])[:, None, None] * side
    rest = pipeline.inpaint(first.images, labels, mask=np.broadcast_to(masks, first.images.shape[:-1]), seed=6)
    return [first.codes, again.codes, rest.codes]


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_loops_on_a_gpu_draw_what_they_draw_on_the_cpu(cuda_plan, gpu):
    for a, b in zip(codes_of(cuda_plan, "cuda"), codes_of(cuda_plan, "cpu"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert gpu.log.count("engine") > 3


@pytest.mark.filterwarnings("ignore:Duplicate provider")
@pytest.mark.parametrize(("seed", "slots"), [(0, 2), (1, 5)])
def test_images_that_come_and_go_are_the_images_alone(cuda_plan, seed, slots, gpu):
    trial(load(cuda_plan, "cuda"), seed, slots, requests=4)


def test_checks_pass_on_a_gpu(small_plan, system, gpu):
    report = verify(small_plan, system, device="cuda")
    assert report["passed"], report


@pytest.fixture
def step(portable_plan, gpu):
    bundle = Bundle(portable_plan)
    return CudaSession(bundle, bundle.manifest.stage("step"), device.Stream())


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_caches_are_written_in_place_and_nothing_else_is_kept_from_the_host(step):
    dims = {"batch": 2, "length": 1}
    caches = step.buffers(dims, *step.stage.aliases.values())
    binding = step.bind(dims, caches)
    arrays = {name for name, array in binding.inputs.items() if isinstance(array, device.DeviceArray)}
    assert arrays == set(caches)
    assert set(binding.outputs) == {info.name for info in step.stage.outputs} - set(step.stage.aliases)
    for output, name in step.stage.aliases.items():
        assert binding.addresses[output] == binding.addresses[name] == caches[name].address
    binding.inputs["top_k"][:] = 64
    binding.inputs["temperature"][:] = 1
    binding.run()
    assert all(np.array(cache).any() for cache in caches.values())

    binding.clear()
    assert not any(np.array(array).any() for array in binding.inputs.values())


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_a_binding_is_captured_from_its_second_call_on(step, gpu):
    binding, other = step.bind({"batch": 1, "length": 1}), step.bind({"batch": 1, "length": 1})
    for chosen in (binding, binding, other, binding, other):
        chosen.run()
    first, second, third, fourth, fifth = gpu.graphs_asked
    assert first == third == "-1"
    assert second == fourth != "-1"
    assert fifth not in ("-1", second)


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_a_graph_goes_with_its_binding(step, monkeypatch):
    released = []
    monkeypatch.setattr(
        cuda.ort.InferenceSession, "release_captured_graph", lambda self, number: released.append(number)
    )
    binding = step.bind({"batch": 1, "length": 1})
    binding.run()
    number = binding._later.get_run_config_entry("gpu_graph_id")
    del binding
    assert list(map(str, released)) == [number]


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_a_call_by_name_is_not_captured(step):
    assert step._options.get_run_config_entry("gpu_graph_id") == "-1"


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_a_call_that_fails(step, monkeypatch):
    def fail(session, binding, options):
        raise RuntimeError("CUDA failure 2:\n out of memory")

    monkeypatch.setattr(cuda.ort.InferenceSession, "run_with_iobinding", fail)
    with pytest.raises(ArtifactError, match=r"stage step failed \(CUDA failure 2: out of memory\)"):
        step.bind({"batch": 1, "length": 1}).run()


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_inputs_that_onnxruntime_takes_on_the_host_are_bound_before_each_call(portable_plan, gpu, monkeypatch):
    """It copies them when they are bound."""
    bound = []
    bind_input = cuda.ort.IOBinding.bind_input

    def some_on_the_host(session):
        names = [info.name for info in session.get_inputs()]
        return [SimpleNamespace(name="Host" if name == "noise" else "Cpu") for name in names]

    def bind(self, name, *place):
        bound.append(name)
        bind_input(self, name, *place)

    monkeypatch.setattr(cuda.ort.InferenceSession, "get_input_memory_infos", some_on_the_host)
    monkeypatch.setattr(cuda.ort.IOBinding, "bind_input", bind)
    bundle = Bundle(portable_plan)
    session = CudaSession(bundle, bundle.manifest.stage("step"), device.Stream())
    assert session.host_inputs == ["noise"]
    assert not session.graphs
    binding = session.bind({"batch": 1, "length": 1})
    del bound[:], gpu.log[:]
    for _ in range(2):
        binding.run()
    gpu.drain()
    assert bound == ["noise", "noise"]
    assert [entry for entry in gpu.log if entry in ("wait", "engine")] == ["wait", "wait", "engine", "wait", "engine"]


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_a_stage_that_cannot_be_captured_runs_without_graphs(portable_plan, gpu, monkeypatch, caplog):
    opened, init = [], cuda.OnnxrtSession.__init__

    def refuse(self, *args, providers, **kwargs):
        opened.append(providers[0][1])
        if "enable_cuda_graph" in providers[0][1]:
            raise cuda.ArtifactError("not all nodes are on CUDA")
        init(self, *args, providers=providers, **kwargs)

    monkeypatch.setattr(cuda.OnnxrtSession, "__init__", refuse)
    bundle = Bundle(portable_plan)
    with caplog.at_level("INFO", "vqdeploy"):
        session = CudaSession(bundle, bundle.manifest.stage("step"), device.Stream())
    assert not session.graphs
    assert "step runs without CUDA graphs: not all nodes are on CUDA" in caplog.text
    assert [o["use_tf32"] + o["user_compute_stream"] for o in opened] == ["077", "077"]


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_threads_of_the_cpu_are_those_asked_for_on_cuda_too(portable_plan, gpu, monkeypatch):
    seen, original = [], cuda.ort.InferenceSession

    def opened(graph, options, **rest):
        seen.append(options.intra_op_num_threads)
        return original(graph, options, **rest)

    monkeypatch.setattr(cuda.ort, "InferenceSession", opened)
    bundle = Bundle(portable_plan)
    onnxrt.OnnxrtBackend().opener(bundle, "cuda", 3, None)(bundle.manifest.stage("step"))
    assert set(seen) == {3}


def test_cuda_is_not_taken_for_a_plan_of_the_cpu(plan, gpu_build):
    assert load(plan).device == "cpu"
    with pytest.raises(VqdeployError, match=r"built for the CPU\. Fix: vqdeploy build PACKAGE --device cuda") as caught:
        load(plan, device="cuda")
    assert caught.value.exit_code == 2


def test_where_a_plan_for_cuda_runs(small_plan, gpu_build, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "vqdeploy.runtime.pipeline.Pipeline", lambda bundle, device, *rest, **named: opened.append(device)
    )
    for wanted in ("auto", "cuda", "cpu"):
        load(small_plan, wanted)
    assert opened == ["cuda", "cuda", "cpu"]


def test_without_cuda_python(small_plan, monkeypatch):
    for module in ("vqdeploy.runtime.cuda", "vqdeploy.runtime.device"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("vqdeploy.runtime.device")
    monkeypatch.delattr("vqdeploy.runtime.cuda")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert load(small_plan).device == "cpu"
    with pytest.raises(VqdeployError, match=r"plans on a GPU need cuda-python\. Fix: pip install cuda-bindings"):
        load(small_plan, device="cuda")


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


class Driver(Cuda):
    """A driver of some version, and some GPUs."""

    def __init__(self, driver=13050, status="cudaSuccess", count=1):
        self.driver, self.answer = driver, (getattr(Cuda.cudaError_t, status), count)

    def cudaDriverGetVersion(self):
        return self.cudaError_t.cudaSuccess, self.driver

    def cudaGetDeviceCount(self):
        return self.answer


@pytest.mark.parametrize(
    ("driver", "sentence"),
    [
        (Driver(0), "there is no NVIDIA driver here, and so no GPU. Fix: vqdeploy build PACKAGE --backend onnxrt"),
        (
            Driver(12080, "cudaErrorInsufficientDriver", None),
            "the NVIDIA driver is too old; expected one for CUDA 13.5, found CUDA 12.8.",
        ),
        (
            Driver(status="cudaErrorNoDevice", count=None),
            "no NVIDIA GPU answers (cudaErrorNoDevice). Fix: vqdeploy build PACKAGE --backend onnxrt",
        ),
    ],
    ids=["none", "old", "idle"],
)
def test_unusable_drivers_are_refused(driver, sentence, monkeypatch):
    monkeypatch.setattr(device, "cudart", driver)
    with pytest.raises(VqdeployError) as caught:
        device.check()
    assert str(caught.value) == sentence


def test_a_usable_driver_is_accepted(monkeypatch):
    monkeypatch.setattr(device, "cudart", Driver())
    device.check()


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_fell_back_to_the_cpu_is_refused(plan):
    """ONNX Runtime goes on without a provider that it cannot load."""
    bundle = Bundle(plan)
    with pytest.raises(VqdeployError, match="ONNX Runtime disabled CUDA"):
        CudaSession(bundle, bundle.manifest.stage("decode"), SimpleNamespace(handle=77))


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
