"""Our TensorRT plugins: what the bindings of TensorRT make of them, and when a build uses them."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner

from vqdeploy.cli import app
from vqdeploy.engines import plugin, tensorrt
from vqdeploy.engines.build import build
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.runtime import device
from vqdeploy.runtime.bundle import Bundle


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """What each plugin answers to its builder. No engine is built: TensorRT's own libraries are not at hand."""
    for module, reason in (
        ("triton", "Triton is not installed (pip install vqdeploy[kernels])"),
        ("tensorrt_bindings", "TensorRT's bindings are not installed (pip install tensorrt-cu13-bindings)"),
        ("tensorrt_rtx_libs", "tensorrt-rtx, whose libraries stand in for TensorRT's, is not installed"),
    ):
        if importlib.util.find_spec(module) is None:
            pytest.skip(reason)
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler for an empty library")
    folder = tmp_path_factory.mktemp("libraries")
    libraries = Path(importlib.util.find_spec("tensorrt_rtx_libs").submodule_search_locations[0])
    for name, stand_in in (("nvinfer", "tensorrt_rtx"), ("nvonnxparser", "tensorrt_onnxparser_rtx")):
        (folder / f"lib{name}.so.11").symlink_to(next(libraries.glob(f"lib{stand_in}.so*")))
    command = [compiler, "-shared", "-x", "c", "-", "-o", folder / "libnvinfer_plugin.so.11"]
    subprocess.run(command, input=b"int initLibNvInferPlugins(void) { return 1; }", check=True)  # noqa: S603
    process = subprocess.run(  # noqa: S603
        [sys.executable, Path(__file__).parents[1] / "support" / "plugin_rehearsal.py"],
        env=os.environ
        | {"LD_LIBRARY_PATH": str(folder), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    nearest, residual, own = json.loads(process.stdout.splitlines()[-1])
    return {"VQNearest": nearest, "VQResidual": residual, "VQResidual of a codebook a depth": own}


def test_outputs_are_described_as_the_onnx_functions_give_them(rehearsal):
    assert rehearsal["VQNearest"]["types"] == ["HALF", "FLOAT", "INT64"]
    assert rehearsal["VQNearest"]["shapes"] == [["n"]]
    assert rehearsal["VQResidual"]["types"] == ["BF16", "BF16", "INT64", "BF16"]
    assert rehearsal["VQResidual"]["shapes"] == [["n", 4], ["n", 64]]
    assert rehearsal["VQResidual of a codebook a depth"]["types"] == ["HALF", "FLOAT", "INT64", "HALF"]
    assert rehearsal["VQResidual of a codebook a depth"]["shapes"] == [["n", 4], ["n", 32]]


def test_the_types_of_the_network_are_the_only_ones_offered(rehearsal):
    assert all(answer["supported"] == answer["types"] for answer in rehearsal.values())


@pytest.mark.parametrize(
    ("name", "kernel", "pointers"),
    [
        ("VQNearest", "vq_nearest", 3),
        ("VQResidual", "vq_residual", 4),
        ("VQResidual of a codebook a depth", "vq_residual", 4),
    ],
)
def test_every_tactic_is_ptx_and_how_to_launch_it(rehearsal, name, kernel, pointers):
    tactics = rehearsal[name]["tactics"]
    assert set(tactics) == {"16", "64"}
    for rows, tactic in tactics.items():
        launch = tactic["launch"]
        assert launch.pop("grid_x") == f"CEIL_DIV(n, {rows})"
        assert launch.pop("block_x") == {"16": 128, "64": 256}[rows]
        assert 0 < launch.pop("shared_mem") <= 48 * 1024
        assert launch == dict.fromkeys(["grid_y", "grid_z", "block_y", "block_z"], 1)
        assert tactic["scalars"] == ["n", 1000]
        assert tactic["kernel"] == kernel
        assert f".visible .entry {kernel}(" in tactic["ptx"]
        assert tactic["ptx"].count(".param .u64") == pointers
        assert ".target sm_80" in tactic["ptx"]  # runs on every later GPU too


def test_the_metric_and_the_depth_reach_the_kernel(rehearsal):
    assert "sqrt.rn.f32" in rehearsal["VQNearest"]["tactics"]["16"]["ptx"]
    assert "sqrt.rn.f32" not in rehearsal["VQResidual"]["tactics"]["16"]["ptx"]


@pytest.mark.parametrize(
    ("fixture", "name", "expected"),
    [
        ("package", "VQResidual", {"depth": 4, "metric": b"l2"}),
        ("movq_package", "VQNearest", {"metric": b"l2"}),
    ],
)
def test_a_package_says_what_the_plugin_wants_to_know(request, fixture, name, expected):
    graph = onnx.load(request.getfixturevalue(fixture) / "encode.onnx", load_external_data=False).graph
    (node,) = [node for node in graph.node if node.op_type == name]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"plugin_namespace": b"vqdeploy", "plugin_version": b"1"} | expected
    assert node.domain == "vqdeploy"
    assert node.name


def test_nodes_that_a_plugin_runs_are_told_from_other_layers():
    layers = [
        SimpleNamespace(name=name, type=SimpleNamespace(name=kind))
        for name, kind in (("conv", "CONVOLUTION"), ("quantize", "PLUGIN_V3"), ("lookup", "GATHER"))
    ]
    network = SimpleNamespace(num_layers=3, get_layer=layers.__getitem__)
    assert plugin.nodes(network) == ["quantize"]


@pytest.fixture
def triton_is(monkeypatch):
    """Makes Triton seem installed or missing."""
    found = importlib.util.find_spec

    def make(installed):
        monkeypatch.setattr(
            "importlib.util.find_spec",
            lambda name, *rest: (found("json") if installed else None) if name == "triton" else found(name, *rest),
        )

    return make


@pytest.mark.parametrize(
    ("backend", "version", "triton", "expected"),
    [
        ("tensorrt", "10.15.1.29", True, None),
        ("tensorrt", "11.4.0.106", True, None),
        ("tensorrt", "10.14.1.48.post1", True, "at least 10.15"),
        ("tensorrt", "12.0.0", True, "below 12.0"),
        ("tensorrt", "unknown", True, "and is unknown"),
        ("tensorrt", "11.4.0", False, "pip install triton"),
        ("tensorrt-rtx", "1.7.1", True, "tensorrt-rtx has no ahead-of-time compiled plugins"),
        ("onnxrt", "1.23.2", True, "onnxrt has no ahead-of-time compiled plugins"),
    ],
)
def test_the_obstacle_to_the_plugin_is_named(triton_is, backend, version, triton, expected):
    triton_is(triton)
    obstacle = plugin.obstacle(backend, version)
    assert obstacle is None if expected is None else expected in obstacle


# What `Worker` starts, but without a library: it builds nothing, and refuses plugins where it is told to.
BUILDER = """
import json, pathlib, sys
print(json.dumps({"version": "11.4.0"}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    with open(sys.argv[1], "a") as file:
        print(job["stage"], job["plugin"], file=file)
    if job["plugin"] and sys.argv[2] == "True":
        sys.exit("[E] misaligned address")
    pathlib.Path(job["engine"]).write_bytes(b"engine")
    nodes = ["quantizer/VQResidual"] if job["plugin"] and job["stage"] == "encode" else []
    print(json.dumps({"plugins": nodes}), flush=True)
"""


@pytest.fixture
def builder(monkeypatch, triton_is, tmp_path_factory):
    """A TensorRT whose builder refuses plugins if it is told to, the jobs that it got, and how often it started."""
    triton_is(True)
    jobs = tmp_path_factory.mktemp("builder") / "jobs"
    state = SimpleNamespace(refuses=False, starts=0, jobs=lambda: [tuple(job.split()) for job in jobs.open()])
    popen = subprocess.Popen

    def start(command, **options):
        state.starts += 1
        return popen([sys.executable, "-c", BUILDER, jobs, str(state.refuses)], **options)

    monkeypatch.setattr(tensorrt, "check", lambda backend: None)
    monkeypatch.setattr(device, "check", lambda: None)
    monkeypatch.setattr(device, "compute_capability", lambda: "sm_90")
    monkeypatch.setattr(subprocess, "Popen", start)
    return state


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_plan_says_which_nodes_a_plugin_runs(package, tmp_path, builder, mode):
    file = tmp_path / "a.plan"
    build(package, file, "tensorrt", plugin=mode)
    assert builder.jobs() == [("encode", "True"), ("decode", "True"), ("step", "True")]
    assert builder.starts == 1
    manifest = Bundle(file).manifest
    assert (manifest.builder, manifest.targets) == ("tensorrt 11.4.0", ("sm_90",))
    assert {stage.name: stage.plugins for stage in manifest.stages} == {
        "encode": ("quantizer/VQResidual",),
        "decode": (),
        "step": (),
    }
    assert set(Bundle(file).sizes()) == {"manifest.json", "encode.engine", "decode.engine", "step.engine"}


def test_without_the_plugin_nothing_is_registered(package, tmp_path, builder):
    build(package, tmp_path / "a.plan", "tensorrt", plugin="off")
    assert {used for _, used in builder.jobs()} == {"False"}
    assert not any(stage.plugins for stage in Bundle(tmp_path / "a.plan").manifest.stages)


def test_a_stage_that_fails_with_the_plugin_is_built_without(package, tmp_path, builder, caplog):
    builder.refuses = True
    build(package, tmp_path / "a.plan", "tensorrt")
    assert builder.jobs() == [(stage, used) for stage in ("encode", "decode", "step") for used in ("True", "False")]
    assert builder.starts == 4  # what has failed is not used again, and what has plugins builds nothing without
    assert "could not build stage encode: misaligned address" in caplog.text
    assert "without the plugin" in caplog.text
    assert not any(stage.plugins for stage in Bundle(tmp_path / "a.plan").manifest.stages)


def test_with_the_plugin_on_a_failure_is_an_error(package, tmp_path, builder):
    builder.refuses = True
    with pytest.raises(ArtifactError, match="misaligned address"):
        build(package, tmp_path / "a.plan", "tensorrt", plugin="on")
    assert not list(tmp_path.iterdir())


def test_a_plugin_that_a_backend_cannot_have_is_refused_when_asked_for(package, tmp_path):
    with pytest.raises(VqdeployError, match=r"--plugin is no option of onnxrt\. Fix: leave out --plugin"):
        build(package, tmp_path / "a.plan", plugin="on")
    with pytest.raises(VqdeployError, match="auto or on or off"):
        build(package, tmp_path / "a.plan", "tensorrt", plugin="yes")
    assert not list(tmp_path.iterdir())


def test_inspect_names_the_nodes(package, tmp_path, builder):
    build(package, tmp_path / "a.plan", "tensorrt")
    lines = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.plan")]).stdout.splitlines()
    (line,) = [line for line in lines if "quantizer/VQResidual" in line]
    assert line == "  our kernel runs quantizer/VQResidual"


def test_the_command_offers_the_choice(package, tmp_path, builder):
    arguments = ["build", str(package), "--backend", "tensorrt", "--plugin", "off", "-o", str(tmp_path / "a.plan")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {used for _, used in builder.jobs()} == {"False"}
