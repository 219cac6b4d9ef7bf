"""From a package to a plan for ONNX Runtime."""

import hashlib
import json
import zipfile

import onnx
import pytest

from vqdeploy.engines.build import BUILDERS, _sizes, build
from vqdeploy.engines.package import read
from vqdeploy.errors import VqdeployError
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.manifest import SizeRange


def graph(plan, stage):
    return onnx.load_from_string(bytes(Bundle(plan).member(f"{stage}.onnx")))


def test_building_twice_gives_equal_bytes(package, plan, tmp_path):
    build(package, tmp_path / "again.plan")
    assert (tmp_path / "again.plan").read_bytes() == plan.read_bytes()


def test_the_manifest_of_a_plan(package, plan):
    source, built = read(package), Bundle(plan).manifest
    assert (built.backend, built.builder) == ("onnxrt", f"onnx {onnx.__version__}")
    assert built.batch == SizeRange(1, 1, 64)
    assert built.provenance == source.provenance
    assert (built.name, built.tokenizer, built.sampling) == (source.name, source.tokenizer, source.sampling)
    assert built.labels == source.labels
    with zipfile.ZipFile(plan) as archive:
        assert json.loads(archive.read("manifest.json")) == json.loads(json.dumps(built.to_dict()))
        for name, digest in built.members.items():
            assert hashlib.sha256(archive.read(name)).hexdigest() == digest


def test_the_weights_are_those_of_the_package_byte_for_byte(package, plan):
    weights = Bundle(plan).member("weights.safetensors")
    assert bytes(weights) == (package / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ["encode", "decode", "step"])
def test_a_portable_plan_keeps_the_graphs(package, portable_plan, stage):
    original = onnx.load(package / f"{stage}.onnx", load_external_data=False)
    assert list(graph(portable_plan, stage).functions) == list(original.functions)


def test_a_plan_has_bodies_of_onnxruntime_behind_the_same_interface(plan, portable_plan):
    step, portable = graph(plan, "step"), graph(portable_plan, "step")
    operators = [node.op_type for node in step.graph.node]
    original = [node.op_type for node in portable.graph.node]
    assert operators.count("GroupQueryAttention") == original.count("CachedAttention") > 1
    assert operators.count("CacheExtents") == 1
    bodies = [{f.name: f for f in model.functions} for model in (step, portable)]
    assert bodies[1].keys() - bodies[0].keys() == {"CachedAttention"}  # which nothing uses any more
    for name in bodies[1].keys() & bodies[0].keys():
        body = bodies[1][name]
        assert list(bodies[0][name].input) == list(body.input)
        assert list(bodies[0][name].output) == list(body.output)
    assert (list(step.graph.input), list(step.graph.output)) == (
        list(portable.graph.input),
        list(portable.graph.output),
    )


def test_progress_names_the_stages(package, tmp_path):
    names = []
    build(package, tmp_path / "a.plan", progress=names.append)
    assert names == ["encode", "decode", "step"]


def test_folders_are_made_and_only_the_plan_stays(package, tmp_path):
    build(package, tmp_path / "deep" / "er" / "a.plan")
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "er", "a.plan"]


@pytest.mark.parametrize("sizes", [(0, 1, 1), (2, 1, 4), (1, 4, 2), (-1, -1, -1), (1, 0, 1)])
def test_batch_sizes_out_of_order(package, tmp_path, sizes):
    with pytest.raises(VqdeployError, match="1 <= min <= opt <= max"):
        build(package, tmp_path / "a.plan", batch=SizeRange(*sizes))
    assert not list(tmp_path.iterdir())


def test_a_batch_that_the_package_does_not_take():
    own = {"batch": SizeRange(2, 4, 8)}
    with pytest.raises(VqdeployError, match=r"does not take these batch sizes; expected 2\.\.8, found 1\.\.1"):
        _sizes(own, SizeRange(1, 1, 1))
    assert _sizes(own, SizeRange(1, 1, 4))["batch"] == SizeRange(2, 2, 4)


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("rqvae", "fp32", {}),
        ("rqvae", "decode=int8", {}),
        ("movq", "int8", {}),
        ("rqvae", "int8", {"device": "cuda"}),
        ("rqvae", "int8", {"portable": True}),
    ],
)
def test_a_usual_batch_that_changes_nothing_is_refused(artifacts, tmp_path, name, dtype, options):
    with pytest.raises(VqdeployError, match="in the same way for every batch size; expected no --opt-batch, found 8"):
        build(artifacts.package(name, dtype), tmp_path / "a.plan", batch=SizeRange(1, 8, 64), **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_backend(package, tmp_path):
    with pytest.raises(VqdeployError, match="expected onnxrt or tensorrt or tensorrt-rtx, found tflite") as caught:
        build(package, tmp_path / "a.plan", backend="tflite")
    assert caught.value.exit_code == 2
    assert set(BUILDERS) == {"onnxrt", "tensorrt", "tensorrt-rtx"}


@pytest.mark.parametrize("place", ["file/a.plan", "file/deep/a.plan"])
def test_a_place_that_cannot_be_written(package, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(VqdeployError, match="cannot be written"):
        build(package, tmp_path / place)


def test_a_folder_is_not_overwritten(package, tmp_path):
    (tmp_path / "a.plan").mkdir()
    with pytest.raises(VqdeployError, match="cannot be written"):
        build(package, tmp_path / "a.plan")
    assert [path.name for path in tmp_path.rglob("*")] == ["a.plan"]


def test_a_failing_build_leaves_the_old_plan_and_nothing_else(package, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    (tmp_path / "a.plan").write_text("old")
    monkeypatch.setattr("vqdeploy.engines.onnxrt.onnx.save", fail)
    with pytest.raises(KeyboardInterrupt):
        build(package, tmp_path / "a.plan")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.plan": "old"}
