"""Verbs whose parts are tested elsewhere: that they pass on what was asked, and say what there is."""

import json
import os

import pytest

from vqdeploy import bench
from vqdeploy.runtime import Pipeline


def test_bench_times_what_was_asked(vqdeploy, movq_plan, monkeypatch):
    asked = {}
    real = bench.bench
    monkeypatch.setattr(bench, "bench", lambda engine, **given: asked.update(given) or real(engine, **given))
    monkeypatch.setattr(bench, "_measure_apart", lambda call, threads: 50.0)
    request = "--task generate --task decode --batch-size 1 --batch-size 2 --warmup 0 --iterations 2 --threads 1"
    sampling = "--steps 2 --cfg-scale 1 --temperature 0"
    arguments = ("bench", "--engine", movq_plan, *request.split(), *sampling.split())
    code, out, err = vqdeploy(*arguments, "--json")
    assert code == 0, err
    report = json.loads(out)
    timed = [(r["task"], r["batch_size"], r["iterations"]) for r in report["results"]]
    assert timed == [("generate", 1, 2), ("generate", 2, 2), ("decode", 1, 2), ("decode", 2, 2)]
    assert (report["options"]["steps"], report["options"]["temperature"]) == (2, 0)
    assert (asked["warm_up"], asked["threads"], asked["device"], asked["profile"]) == (0, 1, "auto", False)
    assert "timing generate, batch 2" in err
    code, out, _ = vqdeploy(*arguments)
    assert code == 0
    assert out.count("vqdeploy") == 5  # each call, and the first image
    assert out.count(" s, with a peak of") == 1


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ("--compare a.plan b.plan c.plan", "a b c"),
        ("--engine a.plan --compare b.plan --compare c.plan", "a b c"),
        ("--engine a.plan --compare b.plan c.plan", "a b c"),
        ("--engine a.plan", "a"),
    ],
)
def test_bench_compares_the_plans_that_are_named(vqdeploy, monkeypatch, arguments, asked):
    seen = []
    monkeypatch.setattr(bench, "bench", lambda engine, **given: seen.extend([engine, *given["compare"]]) or {})
    monkeypatch.setattr(bench, "table", lambda report: "")
    assert vqdeploy("bench", *arguments.split())[0] == 0
    assert [path.stem for path in seen] == asked.split()


@pytest.mark.parametrize("arguments", ["", "a.plan", "--engine a.plan b.plan"])
def test_bench_without_the_name_of_a_plan(vqdeploy, arguments):
    code, _, err = vqdeploy("bench", *arguments.split())
    assert code == 2
    assert "expected --engine A.plan, or --compare A.plan B.plan" in err


def test_bench_draws_nothing_without_matplotlib(vqdeploy, monkeypatch):
    """Before anything is timed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = vqdeploy("bench", "--engine", "none.plan", "--plot", "times.png")
    assert code == 2
    assert "matplotlib" in err


def test_bench_refuses_options_that_the_plan_has_not(vqdeploy, plan):
    code, _, err = vqdeploy("bench", "--engine", plan, "--steps", 2)
    assert code == 2
    assert "error: this system has no option steps" in err


@pytest.mark.parametrize("verb", ["run --num-images 1 --label cat", "verify", "bench --iterations 1"])
def test_the_number_of_threads_reaches_the_engine(vqdeploy, plan, checkpoint_folder, monkeypatch, verb):
    seen = []
    session = pytest.importorskip("onnxruntime").InferenceSession

    def opened(graph, options, **rest):
        seen.append(options.intra_op_num_threads)
        return session(graph, options, **rest)

    monkeypatch.setattr("onnxruntime.InferenceSession", opened)
    name, *rest = verb.split()
    rest += ["--checkpoint", checkpoint_folder] if name == "verify" else []
    assert vqdeploy(name, "--engine", plan, "--threads", 3, *rest)[0] == 0
    assert set(seen) == {3}
    assert vqdeploy(name, "--engine", plan, "--threads", -1, *rest)[0] == 2


@pytest.mark.parametrize("verb", ["run --num-images 1 --label cat", "verify", "bench --iterations 1"])
def test_verbs_close_their_plans(vqdeploy, plan, checkpoint_folder, monkeypatch, verb):
    monkeypatch.setattr(bench, "_measure_apart", lambda call, threads: 50.0)
    opened, closed = [], []
    made, close = Pipeline.__init__, Pipeline.close
    monkeypatch.setattr(
        Pipeline, "__init__", lambda self, *given, **named: opened.append(self) or made(self, *given, **named)
    )
    monkeypatch.setattr(Pipeline, "close", lambda self: closed.append(self) or close(self))
    name, *rest = verb.split()
    rest += ["--checkpoint", checkpoint_folder] if name == "verify" else []
    assert vqdeploy(name, "--engine", plan, "--threads", 1, *rest)[0] == 0
    assert opened == closed != []


def test_inspect_tells_all_that_the_manifest_holds(vqdeploy, plan):
    _, out, _ = vqdeploy("inspect", plan)
    shown = [line.split() for line in out.splitlines()]
    manifest = json.loads(vqdeploy("inspect", plan, "--json")[1])

    def scalars(value):
        if isinstance(value, dict):
            return [found for key, item in value.items() if key != "weights" for found in scalars(item)]
        return [found for item in value for found in scalars(item)] if isinstance(value, list) else [str(value or "")]

    words = {word.strip("(),'[]:") for line in shown for word in line}
    missing = [text for text in scalars(manifest) if text and not set(text.replace(",", " ").split()) <= words]
    assert missing == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--opt-batch", 8], "in the same way for every batch size; expected no --opt-batch, found 8"),
        (["--device", "tpu"], "onnxrt has no device 'tpu'; expected cpu or cuda, found tpu"),
        (["--plugin", "off"], "--plugin is no option of onnxrt. Fix: leave out --plugin"),
        (
            ["--backend", "tensorrt-rtx", "--device", "cpu"],
            "tensorrt-rtx has no device 'cpu'; expected cuda, found cpu",
        ),
        (["--backend", "tensorrt-rtx", "--plugin", "off"], "--plugin is no option of tensorrt-rtx"),
        (["--backend", "tensorrt", "--plugin", "of"], "tensorrt has no plugin 'of'; expected auto or on or off"),
    ],
)
def test_build_refuses_options_that_the_backend_ignores(vqdeploy, package, arguments, message):
    code, _, err = vqdeploy("build", package, *arguments)
    assert code == 2
    assert message in err


def test_env_tells_what_a_report_needs(vqdeploy, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    facts = json.loads(vqdeploy("env", "--json")[1])
    assert {"python", "system", "cpu", "cores", "memory_mb", "gpu", "vqdeploy", "onnxruntime", "torch"} <= set(facts)
    assert facts["ORT_DISABLE_TELEMETRY"] == "1"
    assert facts["OMP_NUM_THREADS"] == "3"
    assert 1 <= facts["cores"] <= os.cpu_count()
    assert facts["memory_mb"] > 100
    text = vqdeploy("env")[1]
    assert all(name in text for name in facts)


def test_pipes_in_the_place_of_inputs_are_refused(vqdeploy, plan, package, tmp_path):
    """Opening one would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "package").mkdir()
    os.mkfifo(tmp_path / "package" / "manifest.json")
    run = ("run", "--engine", plan)
    for arguments in (
        (*run, "--task", "encode", "--input", "pipe"),
        (*run, "--task", "decode", "--input", "pipe"),
        ("run", "--engine", "pipe"),
        ("inspect", "pipe"),
        ("build", "package"),
    ):
        code, out, err = vqdeploy(*arguments)
        assert (code, out) == (1, "")
        assert err.endswith("cannot be read (it is not a regular file).\n")
