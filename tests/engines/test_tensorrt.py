"""Real engines of TensorRT-RTX, which builds without a GPU, and what happens when its builder dies."""

import contextlib
import importlib.util
import json
import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from vqdeploy.engines import tensorrt
from vqdeploy.engines.build import build
from vqdeploy.engines.package import read
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import load
from vqdeploy.runtime.bundle import Bundle, sha256
from vqdeploy.runtime.manifest import FILE, SizeRange

pytestmark = pytest.mark.slow

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (it is on PyPI)"
)
needs_no_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed, so its absence cannot be tested"
)


@needs_rtx
def test_every_stage_of_tiny_builds(tiny, tmp_path):
    names = []
    manifest = build(tiny.package, tmp_path / "tiny.plan", "tensorrt-rtx", SizeRange(1, 2, 4), names.append)
    assert names == ["encode", "decode", "step"]
    assert [stage.file for stage in manifest.stages] == ["encode.engine", "decode.engine", "step.engine"]
    assert (manifest.backend, manifest.targets[0]) == ("tensorrt-rtx", "sm_80")
    assert manifest.builder.startswith("tensorrt-rtx 1.")
    bundle = Bundle(tmp_path / "tiny.plan")
    bundle.verify()
    assert set(bundle.sizes()) == {FILE, "encode.engine", "decode.engine", "step.engine"}
    assert min(bundle.sizes()[stage.file] for stage in manifest.stages) > 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.plan"]
    with pytest.raises(VqdeployError, match=r"built for tensorrt-rtx, which runs on a GPU.*--backend onnxrt"):
        load(tmp_path / "tiny.plan", device="cpu")


@needs_rtx
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", ["rqvae", "vqvae2"])
def test_quantized_products_are_built(artifacts, tmp_path, name, dtype):
    """The parser names layers of DequantizeLinear by their node, and the calls of a function share their nodes."""
    manifest = build(artifacts.package(name, dtype), tmp_path / "low.plan", "tensorrt-rtx")
    found = {stage.name: stage.precision for stage in manifest.stages}
    kept = {"encode", "decode", "bottom_condition"}
    eight = {"top_row", "top_pixel", "bottom_row"} if dtype == "int4" else ()  # which has nothing in 4 bits
    assert found == {stage: "fp32" if stage in kept else "int8" if stage in eight else dtype for stage in found}
    assert [path.name for path in tmp_path.iterdir()] == ["low.plan"]


@needs_rtx
def test_products_keep_all_bits_of_fp32_and_engines_can_be_captured(python):
    """TF32 is on by default, and engines may allocate memory as they run."""
    printed = python("""
import os
os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
import tensorrt_rtx as trt
from polygraphy.backend.trt import Profile, create_network
from vqdeploy.engines.tensorrt import _config
builder, network = create_network()
tensor = network.add_input("x", trt.float32, (-1,))
config = _config(Profile().add("x", (1,), (1,), (1,)))(builder, network)
print(config.get_flag(trt.BuilderFlag.TF32), config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION))
""")
    assert printed.split()[-2:] == ["False", "True"]


@needs_rtx
@pytest.mark.parametrize("package_of", ["package", "text_package", "vqgan_package", "vqvae2_package"])
def test_each_cache_is_an_update_in_place(package_of, request, python):
    """Sessions give a cache and what becomes of it one address."""
    package = request.getfixturevalue(package_of)
    stages = read(package).stages
    printed = python(
        """
import os, sys
os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
from polygraphy.backend.trt import network_from_onnx_path
counts = []
for file in sys.argv[1:]:
    _, network, _ = network_from_onnx_path(file, strongly_typed=True)
    counts.append(sum(network.get_layer(i).type.name == "KV_CACHE_UPDATE" for i in range(network.num_layers)))
print(*counts)
""",
        *(package / stage.file for stage in stages),
    )
    counts = map(int, printed.splitlines()[-1].split())
    assert dict(zip([s.name for s in stages], counts, strict=True)) == {s.name: len(s.aliases) for s in stages}


@needs_rtx
def test_every_stage_of_a_masked_system_builds(movq_package, tmp_path):
    manifest = build(movq_package, tmp_path / "movq.plan", "tensorrt-rtx", SizeRange(1, 2, 4))
    assert [stage.file for stage in manifest.stages] == ["encode.engine", "decode.engine", "step.engine"]
    bundle = Bundle(tmp_path / "movq.plan")
    bundle.verify()
    assert min(bundle.sizes()[stage.file] for stage in manifest.stages) > 50_000


@needs_rtx
def test_an_adaptive_prior_builds(adaptive_package, tmp_path):
    build(adaptive_package, tmp_path / "a.plan", "tensorrt-rtx", SizeRange(1, 2, 4))
    assert Bundle(tmp_path / "a.plan").sizes()["step.engine"] > 50_000


HALF = ["", "text_", "movq_", "vit_", "vqgan_", "llamagen_", "vqvae2_"]


@needs_rtx
@pytest.mark.parametrize("name", HALF, ids=lambda name: name[:-1] or "rqvae")
def test_every_stage_is_built_in_half(request, name, tmp_path):
    """The types of a network are those of its graph: a cast that is missing is refused."""
    package = request.getfixturevalue(f"{name}half_package")
    assert read(package).precision == "fp16"
    manifest = build(package, tmp_path / "a.plan", "tensorrt-rtx", SizeRange(1, 2, 4))
    sizes = Bundle(tmp_path / "a.plan").sizes()
    assert min(sizes[stage.file] for stage in manifest.stages) > 10_000


def crashing_graph():
    """TensorRT finds importers by name, whatever the domain: given no whole k, the parser dies of SIGSEGV."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    body = helper.make_function(
        "vqdeploy",
        "TopK",
        ["a", "c"],
        ["b"],
        [helper.make_node("Identity", ["a"], ["b"])],
        [helper.make_opsetid("", 24)],
    )
    return helper.make_model(
        helper.make_graph([helper.make_node("TopK", ["x", "x"], ["y"], domain="vqdeploy")], "crash", [x], [y]),
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid("vqdeploy", 1)],
        functions=[body],
        ir_version=10,
    )


def refused_graph():
    """Valid and allowed, but TensorRT lacks this reduction."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    node = helper.make_node("ScatterElements", ["x", "index", "x"], ["y"], reduction="mul")
    index = helper.make_tensor("index", TensorProto.INT64, [1, 4], range(4))
    graph = helper.make_graph([node], "refused", [x], [y], [index])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def passing_graph():
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "passes", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


@pytest.fixture
def package_of(package, tmp_path):
    """A package of stages with the given graphs, whose digests fit."""

    def make(*models):
        folder = tmp_path / "package"
        folder.mkdir()
        shutil.copy(package / "weights.safetensors", folder)
        data = json.loads((package / FILE).read_text())
        tensor = {"dtype": "float32", "shape": ["batch", 4]}
        sides = {"inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}], "dims": {"batch": {}}}
        stages = []
        for name, model in zip(("encode", "decode", "step", "features"), models, strict=False):
            onnx.save(model, folder / f"{name}.onnx")
            stages.append({"name": name, "file": f"{name}.onnx", "weights": [], "aliases": {}, **sides})
        members = {file.name: sha256(file) for file in folder.iterdir()}
        data |= {"stages": stages, "members": members, "tokenizer": None, "sampling": None}
        (folder / FILE).write_text(json.dumps(data))
        return folder

    return make


def test_a_package_says_itself_what_to_build(package_of, tmp_path):
    """No field of a training configuration is read, and there need be none."""
    folder = package_of(passing_graph())
    data = json.loads((folder / FILE).read_text())
    data["provenance"] = {"producer": "another"}
    (folder / FILE).write_text(json.dumps(data))
    build(folder, tmp_path / "cpu.plan")
    assert set(Bundle(tmp_path / "cpu.plan").sizes()) == {FILE, "encode.onnx"}
    if importlib.util.find_spec("tensorrt_rtx"):
        build(folder, tmp_path / "gpu.plan", "tensorrt-rtx")
        assert set(Bundle(tmp_path / "gpu.plan").sizes()) == {FILE, "encode.engine"}


@needs_rtx
@pytest.mark.parametrize(
    ("graph", "reason"),
    [(crashing_graph, "its builder crashed with SIG(SEGV|ABRT)"), (refused_graph, "ScatterElements")],
)
def test_a_builder_that_dies_or_refuses_is_an_error(package_of, tmp_path, graph, reason):
    folder = package_of(graph())
    with pytest.raises(ArtifactError, match=f"tensorrt-rtx could not build stage encode: .*({reason})") as caught:
        build(folder, tmp_path / "out.plan", "tensorrt-rtx")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


@needs_rtx
def test_the_command_survives_a_builder_that_dies(package_of, tmp_path, command):
    folder = package_of(crashing_graph())
    result = command("build", folder, "--backend", "tensorrt-rtx", "-o", tmp_path / "out.plan")
    assert result.returncode == 1
    assert "error: tensorrt-rtx could not build stage encode" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


@needs_no_tensorrt
def test_without_its_libraries_tensorrt_is_refused(package, tmp_path, command):
    result = command("build", package, "--backend", "tensorrt", "-o", tmp_path / "out.plan")
    assert result.returncode == 2
    assert "error: tensorrt is not installed" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("missing", "fix"), [("tensorrt_rtx", "tensorrt-rtx"), ("polygraphy", "polygraphy")])
def test_what_is_missing_is_named(monkeypatch, missing, fix):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == missing else found("json", *rest)
    )
    with pytest.raises(VqdeployError, match=f"Fix: pip install .*{fix}") as caught:
        tensorrt.check("tensorrt-rtx")
    assert caught.value.exit_code == 2


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that a builder gets which only writes files."""
    jobs = {}

    class Worker:
        version = "1.7"

        def __init__(self, backend, log):
            pass

        def build(self, job, fall_back):
            jobs[job.stage] = job
            Path(job.engine).write_bytes(b"engine")
            return ()

        def close(self):
            pass

    monkeypatch.setattr(tensorrt, "Worker", Worker)
    return jobs


@needs_rtx
def test_the_profile_covers_the_batch_and_the_prefix(tiny, tmp_path, jobs):
    """The builder is told the smallest, usual and largest shape of every input."""
    manifest = build(tiny.package, tmp_path / "a.plan", "tensorrt-rtx", SizeRange(1, 3, 8))
    shapes = jobs["step"].shapes
    assert shapes["codes"] == [(1, 1, 4), (3, 1, 4), (8, 64, 4)]
    assert shapes["past_key.0"] == [(1, 4, 64, 32), (3, 4, 64, 32), (8, 4, 64, 32)]
    assert {name: set(job.shapes) for name, job in jobs.items()} == {
        stage.name: {info.name for info in stage.inputs} for stage in manifest.stages
    }


@needs_rtx
def test_the_profile_covers_one_label_and_two(movq_package, tmp_path, jobs):
    """Guidance doubles the labels of every image."""
    build(movq_package, tmp_path / "a.plan", "tensorrt-rtx", SizeRange(1, 2, 4))
    shapes = jobs["step"].shapes
    assert shapes["label"] == shapes["guidance"] == [(1, 1), (2, 1), (4, 2)]
    assert shapes["noise"] == [(1, 4, 4, 4, 32), (2, 4, 4, 4, 32), (4, 4, 4, 4, 32)]


@needs_rtx
def test_a_plan_names_the_version_that_sessions_will_find(package_of, tmp_path):
    """The version of a distribution may have a part more than the library's own."""
    manifest = build(package_of(passing_graph()), tmp_path / "out.plan", "tensorrt-rtx")
    assert manifest.builder == f"tensorrt-rtx {importlib.import_module('tensorrt_rtx').__version__}"


@needs_rtx
def test_one_process_builds_all_stages_until_it_crashes(package_of, tmp_path, monkeypatch):
    starts, start = [], tensorrt.Worker._start
    monkeypatch.setattr(tensorrt.Worker, "_start", lambda worker: (starts.append(worker), start(worker)))
    folder = package_of(passing_graph(), crashing_graph(), refused_graph(), passing_graph())
    shapes = {"x": [(1, 4), (1, 4), (2, 4)]}
    results = []
    with contextlib.closing(tensorrt.Worker("tensorrt-rtx", tmp_path / "log")) as worker:
        for stage in read(folder).stages:
            job = tensorrt.Job(stage.name, str(folder / stage.file), str(tmp_path / stage.name), shapes)
            for _ in range(2):
                try:
                    results.append(worker.build(job))
                except ArtifactError as error:
                    results.append(str(error).split(":")[0])
    refusals = [f"tensorrt-rtx could not build stage {name}" for name in ("decode", "step")]
    assert results == [(), (), *[refusals[0]] * 2, *[refusals[1]] * 2, (), ()]
    assert len(starts) == 5  # at first, and after each failure


@needs_rtx
@pytest.mark.parametrize("name", ["vit_package", "vqgan_package", "llamagen_package", "features_package"])
def test_every_stage_of_a_gpt_is_built(request, name, tmp_path):
    package = request.getfixturevalue(name)
    manifest = build(package, tmp_path / "a.plan", "tensorrt-rtx", SizeRange(1, 2, 4))
    assert [stage.name for stage in manifest.stages] == [stage.name for stage in read(package).stages]


@needs_rtx
def test_every_stage_of_a_next_scale_prior_is_built(var_package, tmp_path):
    """The first call has no past: its caches have no entries."""
    manifest = build(var_package, tmp_path / "a.plan", "tensorrt-rtx", SizeRange(1, 1, 2))
    assert [stage.name for stage in manifest.stages] == ["encode", "decode", "reconstruct", "step", "blend"]


def test_every_stage_of_a_hierarchy_is_built(vqvae2_package, tmp_path):
    """Two blocks with attention, and the rows beside their caches, are what the builder once died of."""
    manifest = build(vqvae2_package, tmp_path / "a.plan", "tensorrt-rtx", SizeRange(1, 2, 4))
    names = ["encode", "decode", "top_row", "top_pixel", "bottom_condition", "bottom_row", "bottom_pixel"]
    assert [stage.file for stage in manifest.stages] == [f"{name}.engine" for name in names]
    sizes = Bundle(tmp_path / "a.plan").sizes()
    assert min(sizes[stage.file] for stage in manifest.stages) > 10_000
