"""A backend that the sources have never heard of: a builder and a runtime, and no edit elsewhere.

It puts the weights into the graph, and copies what other backends write in place.
"""

from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from typer.testing import CliRunner

from vqdeploy import bench
from vqdeploy.cli import app
from vqdeploy.engines.build import BUILDERS, build
from vqdeploy.engines.builder import Built, BuiltStage
from vqdeploy.errors import VqdeployError
from vqdeploy.runtime import load
from vqdeploy.runtime.backends import BACKENDS
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.verify import verify


class ToyBuilder:
    choices = MappingProxyType({})

    def tunes(self, stages, package, options):
        return False

    def build(self, stages, package, folder, options, progress):
        built = []
        for stage in stages:
            progress(stage.name)
            file = folder / f"{stage.name}.toy"
            file.write_bytes(onnx.load(package / stage.file).SerializeToString())
            built.append(BuiltStage(file))
        return Built("toymaker 7", ("toybox",), built)


class ToyBinding:
    def __init__(self, session, dims, shared):
        self._session = session
        self.inputs = self._arrays(session.stage.inputs, dims, shared)
        self.outputs = self._arrays(
            [info for info in session.stage.outputs if info.name not in session.stage.aliases], dims, shared
        )

    @staticmethod
    def _arrays(infos, dims, shared):
        return {
            info.name: shared[info.name] if info.name in shared else np.zeros(info.concrete(dims), info.dtype)
            for info in infos
        }

    def run(self):
        for name, values in self._session.run(**self.inputs).items():
            alias = self._session.stage.aliases.get(name)
            (self.inputs[alias] if alias else self.outputs[name])[...] = values

    def clear(self):
        for array in self.inputs.values():
            array[...] = 0


class ToySession:
    device = "cpu"

    def __init__(self, bundle, stage):
        self.stage = stage
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(bytes(bundle.member(stage.file)), options)

    def run(self, **inputs):
        names = [info.name for info in self.stage.outputs]
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def bind(self, dims, shared=None):
        return ToyBinding(self, dims, shared or {})

    def buffers(self, dims, *names):
        infos = [info for info in (*self.stage.inputs, *self.stage.outputs) if info.name in names]
        return {info.name: np.zeros(info.concrete(dims), info.dtype) for info in infos}

    def array(self, values):
        return values.copy()


class ToyBackend:
    def place(self, manifest, device):
        if manifest.targets != ("toybox",):
            raise VqdeployError("this is no toybox")
        return "cpu"

    def opener(self, bundle, device, threads, profile):
        return lambda stage: ToySession(bundle, stage)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(BUILDERS, "toy", ToyBuilder())
    monkeypatch.setitem(BACKENDS, "toy", ToyBackend)


def test_a_backend_builds_runs_and_verifies(toy, artifacts, tmp_path):
    plan = tmp_path / "a.plan"
    manifest = build(artifacts.package("rqvae"), plan, "toy")
    assert (manifest.backend, manifest.builder, manifest.targets) == ("toy", "toymaker 7", ("toybox",))
    assert set(Bundle(plan).sizes()) == {"manifest.json", "encode.toy", "decode.toy", "step.toy"}
    pipeline, portable = load(plan), artifacts.pipeline("rqvae", portable=True)
    found, expected = (pipe.generate([0, 1, 2], seed=3) for pipe in (pipeline, portable))
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(pipeline.encode(found.images), portable.encode(found.images))
    assert verify(plan, artifacts.system("rqvae"))["passed"]


@pytest.mark.parametrize("name", ["movq", "vit", "vqvae2"])
def test_every_kind_of_sampler_runs_on_it(toy, artifacts, tmp_path, name):
    build(artifacts.package(name), tmp_path / "a.plan", "toy")
    found, expected = (
        pipe.generate([0, 2], seed=5).codes
        for pipe in (load(tmp_path / "a.plan"), artifacts.pipeline(name, portable=True))
    )
    np.testing.assert_array_equal(found, expected)


def test_the_command_line_knows_it(toy, artifacts, tmp_path):
    run = CliRunner().invoke
    plan = tmp_path / "a.plan"
    built = run(app, ["build", str(artifacts.package("rqvae")), "--backend", "toy", "-o", str(plan)])
    assert built.exit_code == 0, built.output
    refusals = {
        "--opt-batch 4": "expected no --opt-batch, found 4",
        "--device cuda": "--device is no option of toy. Fix: leave out --device",
        "--plugin off": "--plugin is no option of toy. Fix: leave out --plugin",
    }
    for option, message in refusals.items():
        ignored = run(app, ["build", str(artifacts.package("rqvae")), "--backend", "toy", *option.split()])
        assert message in str(ignored.exception)
    image = tmp_path / "a.png"
    ran = run(app, ["run", "--engine", str(plan), "--num-images", "1", "-o", str(image)])
    assert ran.exit_code == 0, ran.output
    assert Path(image).stat().st_size > 0
    for verb in (["inspect", str(plan)], ["bench", "--engine", str(plan), "--iterations", "1"]):
        done = run(app, verb)
        assert done.exit_code == 0, done.output
        assert " toy" in done.output
    refused = run(app, ["triton", str(plan), "-o", str(tmp_path / "models")])
    assert isinstance(refused.exception, VqdeployError)
    assert "expected onnxrt or tensorrt or tensorrt-rtx, found toy" in str(refused.exception)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("name", ["rqvae", "movq", "vqvae2", "var"])
def test_what_a_step_reads_is_left_out_where_its_weights_are_not_listed(toy, artifacts, tmp_path, name):
    build(artifacts.package(name), tmp_path / "a.plan", "toy")
    report = bench.bench(tmp_path / "a.plan", warm_up=0, iterations=1)
    times = {r["task"]: r for r in report["results"]}
    assert set(times) == set(bench.TASKS)
    assert {"weight_gb_s", "gflop_s", "parts"}.isdisjoint(times["generate"])
    assert "read_bandwidth_gb_s" not in report["environment"]
    assert ("a step" in bench.table(report)) == (name != "vqvae2")


def test_a_plan_for_an_unknown_backend_is_refused(artifacts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(BUILDERS, "toy", ToyBuilder())
        build(artifacts.package("rqvae"), tmp_path / "a.plan", "toy")
    with pytest.raises(VqdeployError, match="toy"):
        load(tmp_path / "a.plan")
