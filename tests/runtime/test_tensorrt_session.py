"""Sessions on TensorRT: the loops, buffers, contexts and CUDA graphs, on a simulated GPU and with simulated engines."""

import gc
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.late_cuda import Cuda, TensorRT

from vqdeploy import bench
from vqdeploy.engines import tensorrt as builder
from vqdeploy.engines.build import build
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.export import Stage, export_module
from vqdeploy.runtime import bundle, device, load
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.manifest import SizeRange
from vqdeploy.runtime.tensorrt import TensorrtBackend
from vqdeploy.runtime.tensorrt_library import MODULES
from vqdeploy.verify import verify

rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
SYSTEMS = ("", "text", "movq", "adaptive", "vit", "vqgan", "llamagen", "features", "vqvae2", "three", "var")


def named(system, kind):
    return f"{system}_{kind}".lstrip("_")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A simulated GPU with its libraries."""
    cuda = Cuda()
    monkeypatch.setattr(device, "cudart", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", TensorRT(rtx, cuda))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cuda


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Builds a plan whose engines are those that the simulation runs."""

    class Worker:
        def __init__(self, backend, log):
            self.version = sys.modules[MODULES[backend]].__version__

        def build(self, job, fall_back):
            Path(job.engine).write_bytes(onnx.load(job.graph).SerializeToString())
            return ()

        def close(self):
            pass

    def make(package, backend="tensorrt-rtx", **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "Worker", Worker)
            file = tmp_path_factory.mktemp("plan") / "engines.plan"
            build(package, file, backend=backend, **options)
        return file

    return make


@pytest.fixture(scope="module", params=SYSTEMS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def engines(name, request, simulated):
    return simulated(request.getfixturevalue(named(name, "package")))


@pytest.fixture(scope="module")
def small_engines(package, simulated):
    return simulated(package)


def codes_of(pipeline):
    """What the loops draw: all of it, twice, and the rest of what is known, which is not the same in each image."""
    labels = pipeline.condition.examples(3)
    first = pipeline.generate(labels, seed=4)
    pipeline.generate(labels[:2], seed=5)
    again = pipeline.generate(labels, seed=4)
    np.testing.assert_array_equal(first.codes, again.codes)
    side = pipeline.image_shape[0]
    masks = np.arange(side)[:, None] >= np.array([0.3, 0.8, 0.6])[:, None, None] * side
    masks = np.broadcast_to(masks, (3, side, side))
    rest = pipeline.inpaint(first.images, labels, mask=masks, seed=6)
    return [first.codes, first.images, rest.codes]


def test_loops_draw_what_they_draw_on_the_cpu(engines, name, request, gpu, tmp_path):
    portable = tmp_path / "portable.plan"
    build(request.getfixturevalue(named(name, "package")), portable, portable=True)
    expected = codes_of(load(portable, threads=1))
    for a, b in zip(codes_of(load(engines)), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_loops_draw_the_same_in_fp16(vqgan_half_package, simulated, gpu, tmp_path):
    """Caches and states, those of the token shift among them, are in half."""
    build(vqgan_half_package, tmp_path / "portable.plan", portable=True)
    pipeline = load(simulated(vqgan_half_package))
    session = pipeline.session("step")
    caches = session.buffers({"batch": 1, "length": 1}, *session.stage.aliases.values())
    assert len(caches) == 2 * 3
    assert {cache.dtype for cache in caches.values()} == {np.dtype(np.float16)}
    for a, b in zip(codes_of(pipeline), codes_of(load(tmp_path / "portable.plan", threads=1)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_checks_pass(small_engines, system, gpu):
    report = verify(small_engines, system)
    assert report["passed"], report


def test_a_generation_waits_at_its_end_alone(name, engines, gpu):
    """The host may wait when it is several calls ahead; it never asks for a result, and never waits for all work."""
    pipeline = load(engines)
    labels = pipeline.condition.examples(2)
    for seed in range(2):
        expected = pipeline.generate(labels, seed=seed).codes
    gpu.drain()
    del gpu.log[:]
    codes, _ = pipeline.sample(np.full_like(expected, -1), labels, seed=1, chosen=pipeline.options())
    np.testing.assert_array_equal(codes, expected)
    first = gpu.log.index("DeviceToHost")
    calls = gpu.log.count("graph")
    assert calls + gpu.log.count("engine") == sum(steps_of(pipeline, len(codes)))
    assert calls == gpu.log[:first].count("graph") > 0
    maps = len(pipeline.maps(codes)) if name in ("vqvae2", "three", "var") else 1
    assert gpu.log.count("DeviceToHost") == maps
    # Until then it waited for uploads that gave way to later ones.
    assert gpu.log[:first].count("wait") <= gpu.log.count("event") + 1


def steps_of(pipeline, images):
    """How many engine calls a generation takes."""
    if pipeline.condition.length > 1:
        yield images * (1 if pipeline.sampling.no_label is None else 2)  # prefills
    if pipeline.sampling.kind == "masked":
        yield pipeline.options()["steps"]
        return
    if pipeline.sampling.kind == "next-scale":
        yield len(pipeline.layout.maps)
        return
    for i, (height, width, _) in enumerate(pipeline.layout.maps):
        yield height * width
        if pipeline.sampling.kind == "hierarchical":
            yield height + (i > 0)


def test_a_request_with_a_callback_draws_the_same(engines, gpu):
    pipeline, seen = load(engines), []
    labels = pipeline.condition.examples(2)
    whole = pipeline.generate(labels, seed=3)
    watched = pipeline.generate(labels, seed=3, callback=lambda step: seen.append(step.codes))
    np.testing.assert_array_equal(watched.codes, whole.codes)
    np.testing.assert_array_equal(seen[-1], whole.codes)
    assert (seen[0] < 0).any()


def test_a_context_for_each_binding_that_stays_and_one_for_the_others(small_engines, gpu):
    trt = sys.modules["tensorrt_rtx"]
    pipeline = load(small_engines)
    session = pipeline.session("step")
    binding = session.bind({"batch": 2, "length": 1})
    kinds = trt.DynamicShapesKernelSpecializationStrategy
    made = []
    for _ in range(4):
        binding.run()
        made.append(len(trt.contexts))
    assert made == [1, 2, 2, 2]
    assert [c.specialization for c in trt.contexts] == [kinds.NONE, kinds.EAGER]
    assert [c.captured for c in trt.contexts] == [0, 1]
    for length in (2, 3, 2):
        session.bind({"batch": 2, "length": length}).run()
    assert len(trt.contexts) == 2
    session.run(**{name: np.array(array) for name, array in binding.inputs.items()})
    assert len(trt.contexts) == 2
    assert len({c.memory for c in trt.contexts}) == 1


def test_buffers_of_two_sizes_are_kept(small_engines, gpu):
    pipeline = load(small_engines)
    session, codes = pipeline.session("decode"), np.zeros((3, *pipeline.grid), np.int64)
    for count in (1, 2, 1, 2):
        pipeline.decode(codes[:count])
    kept = session._bound(("batch", 2))
    for count in (3, 2):
        pipeline.decode(codes[:count])
    assert session._bound(("batch", 2)) is kept
    assert session._bound.cache_info()[1:] == (3, 2, 2)


def test_a_request_that_is_split_makes_nothing_anew(package, simulated, gpu):
    """Three images in calls of two: two sizes of a batch."""
    pipeline = load(simulated(package, batch=SizeRange(1, 1, 2)))
    for seed in range(3):
        pipeline.generate([0, 1, 2], seed=seed)
    made = len(sys.modules["tensorrt_rtx"].contexts), gpu.made
    pipeline.generate([0, 1, 2], seed=4)
    assert (len(sys.modules["tensorrt_rtx"].contexts), gpu.made) == made


def test_a_pipeline_gives_its_memory_back_at_once(small_engines, gpu):
    pipeline = load(small_engines)
    for seed in range(3):
        pipeline.generate([0, 1], seed=seed)
    gc.collect()
    gc.disable()
    try:
        assert gpu.live
        assert gpu.graphs
        del pipeline
        assert not gpu.live
        assert not gpu.graphs
        assert not gpu.pinned
    finally:
        gc.enable()


def test_an_interrupted_wait_loses_nothing(small_engines, gpu, monkeypatch):
    pipeline = load(small_engines)
    expected = [pipeline.generate([0, 1], seed=seed).codes for seed in range(2)]
    wait = Cuda.cudaEventSynchronize

    def interrupted(cuda, event):
        raise KeyboardInterrupt

    for _ in range(4):
        monkeypatch.setattr(Cuda, "cudaEventSynchronize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.generate([2, 2], seed=9)
        monkeypatch.setattr(Cuda, "cudaEventSynchronize", wait)
    for seed in range(2):
        np.testing.assert_array_equal(pipeline.generate([0, 1], seed=seed).codes, expected[seed])


@pytest.mark.parametrize("failing", ["create_execution_context", "execute_async_v3"])
def test_a_second_call_that_failed_can_be_made_again(small_engines, gpu, monkeypatch, failing):
    expected = load(small_engines).generate([0, 1], seed=3).codes
    pipeline = load(small_engines)
    engine = pipeline.session("step")._engine
    owner = type(engine._engine) if failing.startswith("create") else type(engine.common_context())
    working, calls = getattr(owner, failing), []

    def once(*arguments):
        calls.append(arguments)
        return (None if failing.startswith("create") else False) if len(calls) == 2 else working(*arguments)

    monkeypatch.setattr(owner, failing, once)
    engine._common = None
    with pytest.raises(ArtifactError):
        pipeline.generate([0, 1], seed=3)
    np.testing.assert_array_equal(pipeline.generate([0, 1], seed=3).codes, expected)


def test_caches_that_an_engine_does_not_write_in_place_are_copied(engines, gpu, monkeypatch):
    expected = codes_of(load(engines))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", TensorRT(rtx, gpu, in_place=False))
    pipeline = load(engines)
    assert not any(pipeline.session(stage)._engine.in_place for stage in pipeline.stages)
    for a, b in zip(codes_of(pipeline), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_names_that_sessions_use_exist(gpu):
    """The simulation answers to these; here the library itself is asked."""
    used = {
        "Runtime": "engine_host_code_allowed deserialize_cuda_engine get_engine_validity",
        "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_shape"
        " get_tensor_location get_aliased_input_tensor create_runtime_config create_execution_context"
        " device_memory_size_v2",
        "IRuntimeConfig": "set_execution_context_allocation_strategy dynamic_shapes_kernel_specialization_strategy"
        " create_runtime_cache set_runtime_cache",
        "IRuntimeCache": "serialize deserialize",
        "IExecutionContext": "set_device_memory set_input_shape set_tensor_address execute_async_v3"
        " is_stream_capturable",
    }
    for owner, names in used.items():
        assert set(names.split()) <= set(dir(getattr(rtx, owner)))


def test_a_benchmark_tells_of_the_gpu(small_engines, gpu):
    report = bench.bench(small_engines, iterations=1)
    facts = report["environment"]
    assert facts["gpu"] == "sm_90"
    assert facts["gpu_memory_mb"] > 0.01
    assert all(result["host_ms"] >= 0 for result in report["results"] if result["task"] == "generate")
    assert "sm_90, " in bench.table(report)


def test_engines_have_no_profile(small_engines, gpu):
    with pytest.raises(VqdeployError, match="cannot be profiled here"):
        bench.bench(small_engines, iterations=1, profile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt"])
def test_every_system_agrees_with_pytorch_on_a_gpu(name, request, tmp_path, backend):
    try:
        device.check()
        build(request.getfixturevalue(named(name, "package")), tmp_path / "a.plan", backend=backend)
        load(tmp_path / "a.plan")
    except VqdeployError as error:
        pytest.skip(str(error))
    report = verify(tmp_path / "a.plan", request.getfixturevalue(named(name, "system")))
    assert report["passed"], report


# What does not fit


def test_a_plan_for_a_gpu_without_one(small_engines, monkeypatch):
    monkeypatch.setattr(device, "cudart", Cuda())
    monkeypatch.setattr(Cuda, "cudaDriverGetVersion", lambda self: (Cuda.cudaError_t.cudaSuccess, 0))
    with pytest.raises(VqdeployError, match=r"no GPU\. Fix: vqdeploy build PACKAGE --backend onnxrt") as caught:
        load(small_engines)
    assert caught.value.exit_code == 2


def test_a_plan_for_a_gpu_is_not_run_on_the_cpu(small_engines, gpu):
    with pytest.raises(VqdeployError, match=r"built for tensorrt-rtx, which runs on a GPU. Fix: .* --backend onnxrt"):
        load(small_engines, device="cpu")


def test_another_version_of_the_library(small_engines, gpu):
    sys.modules["tensorrt_rtx"].__version__ = "1.8.0"
    with pytest.raises(ArtifactError, match=f"expected tensorrt-rtx {rtx.__version__}, found tensorrt-rtx 1.8.0. Fix:"):
        load(small_engines)


def test_a_library_that_is_not_there(small_engines, gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(
        VqdeployError, match=r"needs tensorrt-rtx \(from PyPI\), which does not .*Fix: pip install tensorrt-rtx"
    ):
        load(small_engines)


def changed(plan, target, **changes):
    """A plan with other bytes for a member, or another manifest."""
    source = Bundle(plan)
    manifest = source.manifest
    folder = target.parent / "members"
    folder.mkdir()
    for name in manifest.members:
        (folder / name).write_bytes(changes.get(name, source.member(name)))
    members = {name: bundle.sha256(folder / name) for name in manifest.members}
    manifest = replace(manifest, members=members, stages=changes.get("stages", manifest.stages))
    bundle.write(target, manifest, [folder / name for name in members])
    return target


def test_an_engine_that_this_gpu_cannot_run(small_engines, gpu, tmp_path):
    plan = changed(small_engines, tmp_path / "a.plan", **{"decode.engine": b"for another GPU"})
    with pytest.raises(
        ArtifactError, match=r"stage decode of .* cannot run here .unsupported cc.. Fix: vqdeploy build"
    ):
        load(plan).session("decode")


def test_an_engine_that_its_manifest_does_not_describe(small_engines, gpu):
    bundle = Bundle(small_engines)
    step = bundle.manifest.stage("step")
    open_stage = TensorrtBackend("tensorrt-rtx").opener(bundle, "cuda", 0, None)
    open_stage(step)
    for wrong in (
        replace(step, outputs=step.outputs[1:]),
        replace(step, inputs=(replace(step.inputs[0], dtype="int32"), *step.inputs[1:])),
        replace(step, inputs=(replace(step.inputs[0], shape=("batch", 1, 4)), *step.inputs[1:])),
        replace(step, aliases=step.aliases | {"logits": "codes"}),
        replace(step, aliases=step.aliases | {"no": "such"}),
    ):
        with pytest.raises(ArtifactError, match=r"stage step of .* is not the engine that its manifest describes"):
            open_stage(wrong)


def test_a_context_that_the_library_refuses(small_engines, gpu, monkeypatch):
    pipeline = load(small_engines)
    engine = type(pipeline.session("decode")._engine._engine)
    monkeypatch.setattr(engine, "create_execution_context", lambda self, config: None)
    with pytest.raises(ArtifactError, match=r"stage decode cannot run on this GPU \(it gave no reason\)"):
        pipeline.decode(np.zeros((1, *pipeline.grid), np.int64))


def test_a_call_that_fails(small_engines, gpu, monkeypatch):
    pipeline = load(small_engines)
    pipeline.generate([0])
    engine = pipeline.session("decode")._engine

    def fail(self, stream):
        engine._logger.log(rtx.ILogger.Severity.ERROR, "out of\n luck")
        return False

    monkeypatch.setattr(type(engine.common_context()), "execute_async_v3", fail)
    with pytest.raises(ArtifactError, match=r"stage decode failed \(out of luck\)"):
        pipeline.decode(np.zeros((1, *pipeline.grid), np.int64))


def test_an_engine_that_says_that_it_cannot_be_captured(small_engines, gpu, caplog):
    expected = load(small_engines).generate([0, 1], seed=3).codes
    sys.modules["tensorrt_rtx"].capturable = False
    del gpu.log[:]
    with caplog.at_level("INFO", "vqdeploy"):
        codes = load(small_engines).generate([0, 1], seed=3).codes
    np.testing.assert_array_equal(codes, expected)
    assert "stage step runs without CUDA graphs: TensorRT-RTX cannot be captured in it" in caplog.text
    assert "graph" not in gpu.log


def test_an_engine_that_cannot_be_captured_runs_all_the_same(small_engines, gpu, monkeypatch, caplog):
    expected = load(small_engines).generate([0, 1], seed=3).codes
    monkeypatch.setattr(gpu, "cudaStreamEndCapture", lambda stream: end(gpu))

    def end(cuda):
        cuda._recording = None
        for context in sys.modules["tensorrt_rtx"].contexts:
            context.captured = 0
        return cuda.cudaError_t.cudaErrorStreamCaptureInvalidated, None

    with caplog.at_level("INFO", "vqdeploy"):
        codes = load(small_engines).generate([0, 1], seed=3).codes
    np.testing.assert_array_equal(codes, expected)
    assert "step runs without CUDA graphs: CUDA failed (cudaErrorStreamCaptureInvalidated)" in caplog.text


def test_a_shape_that_the_engine_refuses(small_engines, gpu, monkeypatch):
    pipeline = load(small_engines)
    context = type(pipeline.session("decode")._engine.common_context())
    monkeypatch.setattr(context, "set_input_shape", lambda self, name, shape: False)
    with pytest.raises(
        VqdeployError, match=r"takes no codes of shape \[1, 4, 4, 4\]; expected batch of 1 to 64\. "
    ) as e:
        pipeline.decode(np.zeros((1, *pipeline.grid), np.int64))
    assert e.value.exit_code == 2


def test_an_address_that_the_engine_refuses(small_engines, gpu, monkeypatch):
    pipeline = load(small_engines)
    context = type(pipeline.session("decode")._engine.common_context())
    monkeypatch.setattr(context, "set_tensor_address", lambda self, name, address: False)
    with pytest.raises(ArtifactError, match="stage decode takes no codes"):
        pipeline.decode(np.zeros((1, *pipeline.grid), np.int64))


def test_a_tensor_that_the_engine_wants_on_the_host(small_engines, gpu):
    sys.modules["tensorrt_rtx"].on_host = ("position",)
    with pytest.raises(ArtifactError, match=r"stage step of .* is not the engine that its manifest describes"):
        load(small_engines).session("step")


@pytest.mark.parametrize("error", [OSError("libnvinfer.so.11: cannot open"), RuntimeError("no"), ImportError("none")])
def test_a_library_that_does_not_load(small_engines, gpu, monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr("vqdeploy.runtime.tensorrt.importlib.import_module", fail)
    with pytest.raises(VqdeployError, match=f"which does not load \\({error}\\)") as caught:
        load(small_engines)
    assert caught.value.exit_code == 2


def test_a_library_that_does_not_start(small_engines, gpu, monkeypatch):
    def fail(logger):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt_rtx"], "Runtime", fail, raising=False)
    with pytest.raises(VqdeployError, match=r"cannot run here \(tensorrt-rtx does not start: pybind11"):
        load(small_engines).session("decode")


# The other library


@pytest.fixture
def tensorrt_plan(package, simulated, gpu, monkeypatch):
    trt = TensorRT(rtx, gpu)
    trt.__version__ = "11.4.0.106"
    monkeypatch.setattr(builder, "check", lambda backend: None)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    return simulated(package, backend="tensorrt", plugin="off")


def test_tensorrt_itself(tensorrt_plan, pipeline):
    """No runtime cache, no specialization; everything else is the same."""
    found = load(tensorrt_plan)
    np.testing.assert_array_equal(found.generate([0, 1], seed=3).codes, pipeline.generate([0, 1], seed=3).codes)
    assert all(context.cache is None for context in sys.modules["tensorrt"].contexts)
    assert found.device == "cuda"


def test_engines_of_tensorrt_are_for_one_kind_of_gpu(tensorrt_plan, gpu):
    assert Bundle(tensorrt_plan).manifest.targets == ("sm_90",)
    gpu.capability = 8, 6
    with pytest.raises(ArtifactError, match=r"another kind of GPU; expected sm_90, found sm_86. Fix: vqdeploy build"):
        load(tensorrt_plan)


# What was compiled is kept


def files(tmp_path):
    return sorted((tmp_path / "cache" / "vqdeploy" / "tensorrt-rtx").glob("*"))


def test_kernels_are_kept_for_the_next_process(small_engines, gpu, tmp_path):
    trt = sys.modules["tensorrt_rtx"]
    expected = codes_of(load(small_engines))
    names = {file.name for file in files(tmp_path)}
    digests = Bundle(small_engines).manifest.members
    # A binding is compiled for in its second call, so what runs once leaves nothing.
    assert f"{digests['step.engine']}-{rtx.__version__}.bin" in names
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files(tmp_path))
    assert files(tmp_path)[0].parent.stat().st_mode & 0o777 == 0o700

    del trt.contexts[:]
    pipeline = load(small_engines)
    for a, b in zip(codes_of(pipeline), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert pipeline.session("step")._engine.common_context().cache.loaded


def test_an_output_whose_size_no_input_has(gpu, simulated, tmp_path):
    """As of strided convolutions in an own module: the engine is asked."""
    module = torch.nn.Conv1d(2, 3, 4, stride=4)
    stage = Stage(lambda m, x: m(x), inputs={"x": torch.randn(1, 2, 16)}, outputs=["y"])
    export_module(module, {"run": stage}, tmp_path / "own-onnx", dynamic={"x": {0: "batch", 2: "length"}})
    pipeline = load(simulated(tmp_path / "own-onnx"))
    for batch, length in ((1, 16), (3, 8), (3, 8), (2, 29)):
        x = torch.randn(batch, 2, length)
        found = pipeline.run("run", x=x.numpy())["y"]
        np.testing.assert_allclose(found, module(x).detach(), atol=1e-6)
