"""What an ONNX package holds."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import uses_external_data
from safetensors.numpy import load_file

from vqdeploy.checkpoint import digest
from vqdeploy.engines.package import read
from vqdeploy.errors import VqdeployError
from vqdeploy.export.package import export
from vqdeploy.export.tokenizer import stages
from vqdeploy.runtime import load
from vqdeploy.runtime.manifest import WEIGHTS
from vqdeploy.systems import create

STAGES = ("encode", "decode", "step")


def graph(folder: Path, stage: str) -> onnx.ModelProto:
    return onnx.load(folder / f"{stage}.onnx", load_external_data=False)


def custom_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain not in ("", "ai.onnx")]


@pytest.fixture(params=STAGES)
def stage(request):
    return request.param


def test_the_checker_accepts_every_graph(package, stage):
    onnx.checker.check_model(package / f"{stage}.onnx", full_check=True)


def test_the_quantizer_is_one_node(package):
    nodes = custom_nodes(graph(package, "encode"))
    assert [(node.domain, node.op_type) for node in nodes] == [("vqdeploy", "VQResidual")]


def test_operators_stay_single_nodes(package, system):
    names = [node.op_type for node in custom_nodes(graph(package, "step"))]
    config = system.config.prior
    assert sorted(names) == ["CachedAttention"] * config.body_layers + ["GumbelSample"] * config.depth
    assert [node.op_type for node in custom_nodes(graph(package, "decode"))] == ["VQLookup"]


def test_every_operator_brings_its_function_and_names_its_plugin(package, stage):
    model = graph(package, stage)
    assert {(f.domain, f.name) for f in model.functions} == {(n.domain, n.op_type) for n in custom_nodes(model)}
    for node in custom_nodes(model):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"vqdeploy"
        assert attributes["plugin_version"] == b"1"
        assert attributes.get("depth", 4) == 4


def test_weights_are_stored_once(package):
    weights = load_file(package / WEIGHTS)
    keys = [(w.dtype, w.shape, hashlib.sha256(w.tobytes()).digest()) for w in weights.values()]
    assert len(keys) == len(set(keys))


def test_encode_and_decode_share_the_codebook(package, system):
    codebook = system.tokenizer.quantizer.codebook.numpy()
    weights = load_file(package / WEIGHTS)
    (name,) = [name for name, w in weights.items() if np.array_equal(w, codebook)]
    for stage_ in ("encode", "decode"):
        node = custom_nodes(graph(package, stage_))[0]
        assert node.input[1] == name


def test_external_data_points_into_the_weights(package, stage):
    """A loader that knows only ONNX finds the same weights that safetensors finds."""
    weights = load_file(package / WEIGHTS)
    external = [t.name for t in graph(package, stage).graph.initializer if uses_external_data(t)]
    loaded = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(package / f"{stage}.onnx").graph.initializer}
    assert external
    for name in external:
        np.testing.assert_array_equal(loaded[name], weights[name])
    assert set(read(package).stage(stage).weights) == set(external)


def test_weights_are_those_of_the_checkpoint(package, system):
    stored = {w.tobytes() for w in load_file(package / WEIGHTS).values()}
    for name, weight in system.tokenizer.encoder.named_parameters():
        if weight.numel() * 4 >= 256 and "norm" not in name:
            assert weight.detach().numpy().tobytes() in stored, name


def test_no_weight_is_unused(package):
    used = {name for stage_ in STAGES for name in read(package).stage(stage_).weights}
    assert used == set(load_file(package / WEIGHTS))


def test_nothing_tells_of_the_machine(package, stage):
    content = (package / f"{stage}.onnx").read_bytes()
    for trace in (
        b"site-packages",
        b".py",
        b'File "',
        b"stack_trace",
        b"/work/",
        b"/tmp/",
        str(Path.home()).encode() + b"/",
    ):
        assert trace not in content


def test_provenance(package, system, stage):
    properties = {entry.key: entry.value for entry in graph(package, stage).metadata_props}
    assert properties.pop("producer").startswith("vqdeploy ")
    assert properties == {"system": "rqvae", "checkpoint": digest(system), "stage": stage, "precision": "fp32"}
    assert read(package).provenance.checkpoint == digest(system)


def test_members_are_listed_with_their_digests(package):
    manifest = json.loads((package / "manifest.json").read_text())
    files = {file.name for file in package.iterdir()} - {"manifest.json"}
    assert set(manifest["members"]) == files == {*(f"{name}.onnx" for name in STAGES), WEIGHTS}
    for name, expected in manifest["members"].items():
        assert hashlib.sha256((package / name).read_bytes()).hexdigest() == expected


def test_signature_of_the_stages(package, system):
    manifest, config = read(package), system.config.prior
    encode, decode, step = (manifest.stage(name) for name in STAGES)
    assert [(i.name, i.dtype, i.shape) for i in encode.inputs] == [("image", "uint8", ("batch", 16, 16, 3))]
    assert [(i.name, i.dtype, i.shape) for i in encode.outputs] == [("codes", "int64", ("batch", 4, 4, 4))]
    assert [(i.name, i.dtype, i.shape) for i in decode.inputs] == [("codes", "int64", ("batch", 4, 4, 4))]
    assert [(i.name, i.dtype, i.shape) for i in decode.outputs] == [("image", "uint8", ("batch", 16, 16, 3))]
    shapes = {info.name: info.shape for info in step.inputs}
    assert shapes["codes"] == ("batch", "length", 4)
    assert all(shape[0] == "batch" for shape in shapes.values())
    cache = ("batch", config.heads, config.positions, config.width // config.heads)
    caches = [f"{kind}.{layer}" for kind in ("key", "value") for layer in range(config.body_layers)]
    assert {name for name, shape in shapes.items() if shape == cache} == {f"past_{name}" for name in caches}
    assert step.aliases == {f"present_{name}": f"past_{name}" for name in caches}
    assert {f"present_{name}" for name in caches} < {info.name for info in step.outputs}


def test_caches_are_written_by_tensor_scatter_straight_from_input_to_output(package):
    """TensorRT updates a cache in place only when it is a network input and the result a network output."""
    model = graph(package, "step")
    (body,) = [f for f in model.functions if f.name == "CachedAttention"]
    writes = [node for node in body.node if node.op_type == "TensorScatter"]
    assert [(n.input[0], n.output[0]) for n in writes] == [("past_key", "present_key"), ("past_value", "present_value")]
    readers = [n for n in body.node if n.op_type != "Shape" and {"past_key", "past_value"} & set(n.input)]
    assert readers == writes
    inputs, outputs = ({info.name for info in infos} for infos in (model.graph.input, model.graph.output))
    for node in custom_nodes(model):
        if node.op_type == "CachedAttention":
            assert set(node.input[1:3]) <= inputs
            assert set(node.output[1:3]) <= outputs


def test_only_casts_touch_uint8(package):
    model = graph(package, "encode")
    assert [n.op_type for n in model.graph.node if "image" in n.input] == ["Cast"]
    model = graph(package, "decode")
    assert [n.op_type for n in model.graph.node if "image" in n.output] == ["Cast"]


@pytest.mark.parametrize("stage_", STAGES)
def test_no_operator_that_tensorrt_lacks_or_that_has_no_seed(package, stage_):
    model = graph(package, stage_)
    used = {n.op_type for n in model.graph.node} | {n.op_type for f in model.functions for n in f.node}
    assert not used & {"RandomUniform", "RandomNormal", "Multinomial", "Bernoulli", "NonZero", "Loop", "Scan"}


@pytest.fixture
def tokenizer_only(monkeypatch):
    """Only the graphs of the tokenizer, where the package around them is what matters."""
    monkeypatch.setattr("vqdeploy.export.package.stages_of", lambda s, _, size, *__: stages(s.tokenizer, size))


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes(package, checkpoint_folder, tmp_path, python):
    """In another process, where hashes and addresses differ."""
    script = (
        "import sys; from pathlib import Path; from vqdeploy.checkpoint import load; "
        "from vqdeploy.export.package import export; export(load(sys.argv[1]), Path(sys.argv[2]))"
    )
    again = tmp_path / "again"
    python(script, checkpoint_folder, again)
    for file in package.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_an_export_replaces_the_last_one_and_leaves_nothing_else(tokenizer_only, system, tmp_path):
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "stale.onnx").write_text("old")
    export(system, folder)
    assert not (folder / "stale.onnx").exists()
    assert list(tmp_path.iterdir()) == [folder]
    assert [stage.name for stage in read(folder).stages] == ["encode", "decode"]


def test_a_folder_of_something_else_is_not_replaced(system, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(VqdeployError, match="holds something else"):
        export(system, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_failing_export_leaves_nothing(monkeypatch, system, tmp_path):
    def fail(*_):
        raise RuntimeError("no memory left")

    monkeypatch.setattr("vqdeploy.export.package._export_stage", fail)
    with pytest.raises(RuntimeError):
        export(system, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp64"}, "unsupported precision"),
        ({"dtype": "FP32"}, "expected fp32"),
        ({"opset": 23}, "expected 24..25, found 23"),
        ({"opset": 0}, "expected 24..25, found 0"),
    ],
)
def test_refuses(system, tmp_path, options, message):
    with pytest.raises(VqdeployError, match=message):
        export(system, tmp_path / "onnx", **options)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(system, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VqdeployError, match="file/onnx cannot be written"):
        export(system, tmp_path / "file" / "onnx")


@pytest.fixture(scope="session")
def tokenizer_plan(system, artifacts):
    """Of a system without a prior."""
    return artifacts.plan(create(replace(system.config, prior=None)))


def test_without_a_prior_only_encode_and_decode_are_exported(tokenizer_plan):
    pipeline = load(tokenizer_plan)
    assert [stage.name for stage in pipeline.manifest.stages] == ["encode", "decode"]
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    assert pipeline.reconstruct(images).shape == images.shape
    with pytest.raises(VqdeployError, match="tokenizer and no prior"):
        pipeline.generate([0])


def test_verify_without_a_prior(tokenizer_plan, system):
    from vqdeploy.verify import verify

    report = verify(tokenizer_plan, create(replace(system.config, prior=None)))
    assert report["passed"]
    assert {check["stage"] for check in report["checks"]} == {"reference", "encode", "decode"}
