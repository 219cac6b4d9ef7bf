"""What bench reports. How fast anything is, no test asserts."""

import json

import pytest
from PIL import Image

from vqdeploy import bench, checkpoint
from vqdeploy.errors import VqdeployError
from vqdeploy.runtime import load


@pytest.fixture(scope="module")
def report(plan, checkpoint_folder):
    return bench.bench(
        plan, batch_sizes=(1, 2), warm_up=1, iterations=2, baselines=("eager",), checkpoint=checkpoint_folder
    )


def test_every_task_and_batch_is_timed_for_the_plan_and_its_baseline(report):
    timed = {(r["name"], r["task"], r["batch_size"]) for r in report["results"]}
    assert timed == {(n, t, b) for n in ("vqdeploy", "eager") for t in bench.TASKS for b in (1, 2)}
    for result in report["results"]:
        assert 0 < result["median_ms"] <= result["p90_ms"] <= result["p99_ms"]
        assert result["images_per_s"] == pytest.approx(result["batch_size"] / result["median_ms"] * 1e3)
        assert result["iterations"] == 2


def test_ratios_are_baseline_over_plan(report):
    medians = {(r["name"], r["task"], r["batch_size"]): r["median_ms"] for r in report["results"]}
    expected = medians["eager", "decode", 2] / medians["vqdeploy", "decode", 2]
    assert report["ratios"]["decode/b2/eager"] == pytest.approx(expected)


def test_steps_and_host_make_up_a_generation(report):
    for result in report["results"]:
        if result["task"] == "generate" and result["name"] == "vqdeploy":
            assert result["step_ms"] == pytest.approx(result["steps_ms"] / 16)
            assert 0 < result["host_ms"] < result["median_ms"]


def test_weight_traffic_counts_the_matrices_of_the_step(plan):
    # Width 64: two layers of the body, and at each of four depths one layer and the classifier of 64 codes.
    assert bench.step_weight_bytes(load(plan)) == 4 * (2 * 12 * 64**2 + 4 * (12 * 64**2 + 64 * 64))


def test_a_gpt_is_timed_with_guidance(vit_plan, vit_system, tmp_path):
    checkpoint.save(vit_system, tmp_path / "vit")
    options = {"baselines": ("eager",), "checkpoint": tmp_path / "vit", "options": {"guidance_scale": 2.0}}
    report = bench.bench(vit_plan, warm_up=0, iterations=1, **options)
    assert {(r["name"], r["task"]) for r in report["results"]} == {
        (n, t) for n in ("vqdeploy", "eager") for t in bench.TASKS
    }
    assert report["options"]["guidance_scale"] == 2
    generated = next(r for r in report["results"] if (r["name"], r["task"]) == ("vqdeploy", "generate"))
    assert generated["step_ms"] == pytest.approx(generated["steps_ms"] / 16)
    # Width 64: three layers, and the classifier of 64 codes.
    assert bench.step_weight_bytes(load(vit_plan)) == 4 * (3 * 12 * 64**2 + 64 * 64)


def test_the_report_is_json_and_a_table(report):
    assert json.loads(json.dumps(report))["environment"]["read_bandwidth_gb_s"] > 0
    text = bench.table(report)
    assert text.count("eager") == 6
    assert "GB/s read" in text


def test_the_profile_names_the_operators_of_the_step(plan):
    report = bench.bench(plan, tasks=("generate",), iterations=1, profile=True)
    shares = {row["op"]: row["share"] for row in report["profile"]}
    assert sum(shares.values()) == pytest.approx(1)
    assert {"MatMul", "GroupQueryAttention", "ArgMax"} <= set(shares)
    assert report["profile"][0]["op"] in bench.table(report)


def test_the_plot_is_a_picture(report, tmp_path):
    bench.plot(report, tmp_path / "times.png")
    with Image.open(tmp_path / "times.png") as image:
        assert image.width > image.height > 100


@pytest.mark.parametrize("wrong", [{"tasks": ["paint"]}, {"baselines": ["jax"]}])
def test_unknown_names_are_refused(plan, wrong):
    with pytest.raises(VqdeployError, match="there is no such"):
        bench.bench(plan, **wrong)


def test_the_compiled_baseline_draws_the_eager_tokens(plan, system, checkpoint_folder, monkeypatch):
    from vqdeploy import baselines

    pipeline, drawn = load(plan), []
    generate = type(system.prior).generate
    monkeypatch.setattr(type(system.prior), "generate", lambda *args: drawn.append(generate(*args)), raising=True)
    reference = baselines.Reference(pipeline, checkpoint_folder, {})
    for compiled in (False, True):
        reference.call("generate", 2, pipeline, compiled)()
    known = -(drawn[0] * 0 + 1).numpy()
    assert (drawn[0] == drawn[1]).all()
    assert (pipeline.sample(known, [0, 1], seed=0)[0] == drawn[0].numpy()).all()
