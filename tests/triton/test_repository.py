"""Model repositories: configurations in Triton's own message, stages that stand alone, the model that samples."""

import errno
import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from google.protobuf import json_format, text_format
from support.damage import edited
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import load
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.triton.repository import stage_config, write

SYSTEMS = ("rqvae", "movq", "vqvae2", "text")


def config_of(model):
    return text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())


@pytest.fixture(scope="module")
def repository(artifacts, tmp_path_factory):
    """The repository of a small system, and its plan."""
    made = {}

    def make(name, dtype="fp32"):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp("triton") / name
            write(artifacts.plan(name, dtype), folder)
            made[name, dtype] = folder
        return made[name, dtype], artifacts.plan(name, dtype)

    return make


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "fp32") for name in SYSTEMS), ("rqvae", "int8"), ("vqvae2", "int8")]
)
def test_stages_stand_alone(repository, name, dtype):
    """ONNX Runtime alone opens each, and computes what the plan does."""
    folder, plan = repository(name, dtype)
    pipeline = load(plan, threads=1)
    for stage in pipeline.manifest.stages:
        model = folder / f"{pipeline.manifest.name}-{stage.name}"
        config = config_of(model)
        assert config.HasField("dynamic_batching") == (stage.name in ("encode", "decode"))
        assert (config.name, config.backend, config.platform) == (model.name, "onnxruntime", "onnxruntime_onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model / "1" / config.default_model_filename, options)
        dims = {dim: sizes.min for dim, sizes in stage.dims.items()} | {"batch": 2}
        inputs = {info.name: np.zeros(info.concrete(dims), info.dtype) for info in stage.inputs}
        for option in {"temperature", "top_k", "top_p"} & set(inputs):
            inputs[option] += 1
        found = dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))
        for output, array in pipeline.run(stage.name, **inputs).items():
            np.testing.assert_array_equal(found[output], array)
        _check_tensors(config, session, stage)


def _check_tensors(config, session, stage):
    """The configuration has the names, types and shapes that the graph has, without the batch."""
    types = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64", "tensor(uint8)": "TYPE_UINT8"}
    assert config.max_batch_size == stage.dims["batch"].max
    for described, graph in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        wanted = [(i.name, types[i.type], [-1 if isinstance(d, str) else d for d in i.shape[1:]]) for i in graph]
        assert [(t.name, DataType.Name(t.data_type), list(t.dims)) for t in described] == wanted
        assert all(i.shape[0] == "batch" for i in graph)


def test_weights_are_on_disk_once(repository):
    folder, plan = repository("rqvae")
    weights = list(folder.glob("*/1/weights.safetensors"))
    assert len(weights) == len(Bundle(plan).manifest.stages)
    assert len({file.stat().st_ino for file in weights}) == 1


@pytest.mark.parametrize("name", ["rqvae", "movq", "text"])
def test_the_configuration_of_the_sampler(repository, name):
    folder, plan = repository(name)
    manifest = Bundle(plan).manifest
    config = config_of(folder / manifest.name)
    assert (config.name, config.backend, config.max_batch_size) == (manifest.name, "python", 0)
    assert [group.kind for group in config.instance_group] == [config.instance_group[0].KIND_CPU]
    inputs = {
        tensor.name: (DataType.Name(tensor.data_type), list(tensor.dims), tensor.optional) for tensor in config.input
    }
    condition = (
        {"texts": ("TYPE_INT64", [-1, 18], False)} if name == "text" else {"labels": ("TYPE_INT64", [-1], False)}
    )
    assert inputs.items() >= condition.items()
    assert inputs["seed"] == ("TYPE_INT64", [1], True)
    assert set(inputs) == {*condition, "seed", *manifest.sampling.options}
    if name == "movq":
        assert inputs["schedule"] == ("TYPE_STRING", [1], True)
        assert inputs["top_p"] == ("TYPE_FP64", [-1], True)
    outputs = {tensor.name: (DataType.Name(tensor.data_type), list(tensor.dims)) for tensor in config.output}
    maps = manifest.tokenizer.maps
    assert outputs["images"] == ("TYPE_UINT8", [-1, *manifest.tokenizer.image])
    assert outputs["codes"] == ("TYPE_INT64", [-1, *maps[0]])


# The model that samples


class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


@pytest.fixture
def server(monkeypatch):
    """What stands in for the module of the server."""

    def get(request, name):
        return next((tensor for tensor in request if tensor.name == name), None)

    def response(output_tensors=(), error=None):
        return SimpleNamespace(tensors={t.name: t.array for t in output_tensors}, error=error)

    module = SimpleNamespace(
        get_input_tensor_by_name=get, InferenceResponse=response, Tensor=Tensor, TritonError=lambda message: message
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    monkeypatch.delitem(sys.modules, "vqdeploy.triton.model", raising=False)
    yield module
    sys.modules.pop("vqdeploy.triton.model", None)


def opened(folder, name):
    """The model of a repository as the server opens it: from its file, by the name of its class."""
    spec = importlib.util.spec_from_file_location("model", folder / name / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = json_format.MessageToDict(config_of(folder / name), preserving_proto_field_name=True)
    model.initialize(
        {
            "model_config": json.dumps(config),
            "model_instance_kind": "CPU",
            "model_repository": str(folder / name),
            "model_version": "1",
            "model_name": name,
        }
    )
    return model


def request(**arrays):
    return [Tensor(name, np.asarray(array)) for name, array in arrays.items()]


def test_the_model_samples_what_the_plan_does(repository, server):
    folder, plan = repository("movq")
    model, pipeline = opened(folder, "movq"), load(plan, threads=1)
    plain, chosen = model.execute(
        [
            request(labels=np.array([0, 2])),
            request(
                labels=np.array([1]),
                seed=np.array([7]),
                temperature=np.array([0.5]),
                top_k=np.array([3, 4, 5, 6]),
                guidance_scale=np.array([2.5]),
                steps=np.array([4]),
                schedule=np.array([b"cosine"], object),
            ),
        ]
    )
    wanted = pipeline.generate([0, 2])
    np.testing.assert_array_equal(plain.tensors["images"], wanted.images)
    np.testing.assert_array_equal(plain.tensors["codes"], wanted.codes)
    options = {"temperature": 0.5, "top_k": [3, 4, 5, 6], "guidance_scale": 2.5, "steps": 4, "schedule": "cosine"}
    np.testing.assert_array_equal(chosen.tensors["codes"], pipeline.generate([1], seed=7, **options).codes)
    model.finalize()
    assert "closed" in model.execute([request(labels=np.array([0]))])[0].error


def test_texts(repository, server):
    folder, plan = repository("text")
    texts = np.arange(36).reshape(2, 18)
    (response,) = opened(folder, Bundle(plan).manifest.name).execute([request(texts=texts)])
    np.testing.assert_array_equal(response.tensors["codes"], load(plan, threads=1).generate(texts).codes)


def test_a_bad_request_harms_no_other(repository, server):
    folder, _ = repository("movq")
    responses = opened(folder, "movq").execute(
        [
            request(labels=np.array([3])),
            request(labels=np.array([0]), schedule=np.array([b"\xff"], object)),
            request(labels=np.array([0]), top_k=np.array([1, 2])),
            request(labels=np.array([0]), seed=np.array([-1])),
            request(labels=np.array([0])),
        ]
    )
    assert [bool(response.error) for response in responses] == [True, True, True, True, False]
    assert responses[0].error == "a label is out of range; expected 0..2, found 3."


# Other plans


def test_engines_are_named_by_the_compute_capability(artifacts):
    manifest = replace(Bundle(artifacts.plan("rqvae")).manifest, backend="tensorrt", targets=("8.9",))
    config = stage_config(manifest, manifest.stage("encode"))
    config = text_format.Parse(text_format.MessageToString(config), ModelConfig())
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert dict(config.cc_model_filenames) == {"8.9": "model-sm89.plan"}
    assert config.default_model_filename == "model-sm89.plan"
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU


def test_an_engine_of_rtx_has_no_stage_models(plan, tmp_path):
    """The server has no backend for it; the sampler runs on our own."""
    rtx = {"backend": "tensorrt-rtx", "targets": ["8.9"]}
    plan = edited(plan, tmp_path / "a.plan", lambda data: data.update(rtx))
    assert write(plan, tmp_path / "out") == ["rqvae"]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["rqvae"]
    plan = edited(plan, tmp_path / "b.plan", lambda data: data.update(sampling=None))
    with pytest.raises(VqdeployError, match="the server runs no part of this plan"):
        write(plan, tmp_path / "other")


def _of_all_batches(data):
    for stage in data["stages"]:
        stage["dims"]["batch"]["max"] = 2**31


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (_of_all_batches, "dims.batch of the manifest is wrong"),
        (lambda data: data["sampling"]["options"].update(bogus=1), "bogus"),
        (lambda data: data["sampling"].update(kind="nonsense"), "sampling.kind of the manifest is unknown"),
        (lambda data: data["sampling"].update(kind="masked"), "does not fit its sampler"),
        (lambda data: data.update(backend="nonsense"), "is for an unknown backend"),
        (lambda data: data["stages"][2]["inputs"][0].update(name="\ud800x"), "expected a name that can be shown"),
        (lambda data: data["stages"][2]["inputs"][0].update(name="\x1b[31m"), "expected a name that can be shown"),
        (
            lambda data: data.update(backend="tensorrt", targets=["../../x", "8.9"]),
            r"targets\[0\] of the manifest is wrong",
        ),
    ],
)
def test_a_manifest_that_no_server_could_take(plan, tmp_path, edit, told):
    plan = edited(plan, tmp_path / "a.plan", edit)
    with pytest.raises(ArtifactError, match=told) as caught:
        write(plan, tmp_path / "out")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_a_repository_is_replaced_and_nothing_else_is(vqdeploy, plan, tmp_path):
    for _ in range(2):
        code, out, _ = vqdeploy("triton", plan, "-o", "out", "--json")
        assert (code, json.loads(out)["models"]) == (0, ["rqvae-encode", "rqvae-decode", "rqvae-step", "rqvae"])
    folders = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert sorted(path.name for path in folders) == sorted(json.loads(out)["models"])
    assert all(path.stat().st_mode & 0o111 for path in folders)  # that can be entered
    (tmp_path / "out" / "another").mkdir()
    code, _, err = vqdeploy("triton", plan, "-o", "out")
    assert code == 2
    assert "out holds something else and is not replaced; found another. Fix:" in err


def _checkpoint(folder, plan):
    (folder / "rqvae").mkdir()
    (folder / "rqvae" / "model.safetensors").write_text("weights")


def _bare_file(folder, plan):
    (folder / "rqvae").write_text("mine")


def _edited_configuration(folder, plan):
    write(plan, folder)
    with (folder / "rqvae-step" / "config.pbtxt").open("a") as file:
        file.write("# two instances\n")


def _another_version(folder, plan):
    write(plan, folder)
    (folder / "rqvae" / "2").mkdir()
    shutil.copy(plan, folder / "rqvae" / "2" / "model.plan")


def _another_graph(folder, plan):
    write(plan, folder)
    (folder / "rqvae-step" / "1" / "model.onnx").unlink()
    (folder / "rqvae-step" / "1" / "model.onnx").write_text("mine")


def _damaged_record(folder, plan):
    write(plan, folder)
    (folder / "vqdeploy.json").write_text('["rqvae"]')


@pytest.mark.parametrize(
    ("fill", "found"),
    [
        (_checkpoint, "rqvae"),
        (_bare_file, "rqvae"),
        (_edited_configuration, "rqvae-step/config.pbtxt"),
        (_another_version, "rqvae/2"),
        (_another_graph, "rqvae-step/1/model.onnx"),
        (_damaged_record, "rqvae"),
    ],
)
def test_nothing_of_the_user_is_replaced(plan, tmp_path, fill, found):
    folder = tmp_path / "out"
    folder.mkdir()
    fill(folder, plan)
    before = contents(tmp_path)
    with pytest.raises(VqdeployError, match=f"out holds something else and is not replaced; found {found}. Fix"):
        write(plan, folder)
    assert contents(tmp_path) == before


def test_the_plan_itself_is_not_replaced(plan, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(plan, tmp_path / "out" / "rqvae")
    before = contents(tmp_path)
    with pytest.raises(VqdeployError, match="holds the input"):
        write(tmp_path / "out" / "rqvae", tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_full_disk_names_the_repository(plan, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Bundle, "copy", full)
    with pytest.raises(VqdeployError, match=f"{tmp_path}/out cannot be written \\(No space left on device\\)"):
        write(plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
