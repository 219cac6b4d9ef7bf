"""What bench reports. How fast anything is, no test asserts."""

import json
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import axes, figure
from PIL import Image
from support.damage import edited
from support.systems import SMALL

from vqdeploy import bench, checkpoint
from vqdeploy.bench import baselines, plans
from vqdeploy.bench.plans import divergences
from vqdeploy.engines.build import build
from vqdeploy.errors import VqdeployError
from vqdeploy.runtime import load
from vqdeploy.runtime.manifest import SizeRange
from vqdeploy.systems import create

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize(
    ("name", "batch", "options", "calls"),
    [
        ("rqvae", 3, {}, 2 * 16),  # in two calls of the sampler
        ("movq", 3, {"guidance_scale": 1.0}, 2 * 5),
        ("movq", 3, {"guidance_scale": 2.0}, 2 * 5),
        ("text", 1, {}, 16),  # the prefill of the text draws the first codes
    ],
)
def test_engine_calls_are_counted(artifacts, name, batch, options, calls, monkeypatch):
    monkeypatch.setattr(bench, "_bound", lambda *_: {"matmul_gflop_s": 1.0} if name == "movq" else {})
    plan = artifacts.plan(name, batch=SizeRange(1, 1, 2))
    report = bench.bench(plan, ("generate",), (batch,), iterations=1, options=options)
    (result,) = report["results"]
    assert result["calls"] == calls
    assert result["step_ms"] == pytest.approx(result["steps_ms"] / calls)
    if name == "movq":
        conditions = 1 if options["guidance_scale"] == 1 else 2
        whole = 5 * batch * conditions * bench.step_gflop(load(plan))
        assert result["gflop_per_step"] == pytest.approx(whole / calls)


def _renamed(monkeypatch, old, new):
    """All weights of an own system, under other names."""
    original = bench._matrices
    monkeypatch.setattr(
        bench, "_matrices", lambda *of: {name.replace(old, new): matrix for name, matrix in original(*of).items()}
    )


@pytest.mark.parametrize(
    ("name", "old", "new", "known"),
    [
        ("var", "head.product", "classifier", {}),
        ("var", "", "", {"prior": {"layers": 2}}),
        ("var", "", "", {"prior": None}),
        ("movq", "", "", {}),
        ("movq", "", "", {"prior": {"width": "wide", "layers": 2}}),
        ("rqvae", "body.", "trunk.", {}),
    ],
)
def test_figures_of_what_is_not_known_are_left_out(artifacts, name, old, new, known, monkeypatch, tmp_path):
    _renamed(monkeypatch, old, new)
    plan = artifacts.plan(name)
    if known or not old:
        plan = edited(plan, tmp_path / "a.plan", lambda data: data.update(config=known))
    (result,) = bench.bench(plan, ("generate",), warm_up=0, iterations=1)["results"]
    assert result["step_ms"] > 0
    assert not {"gflop_s", "weight_gb_s"} & set(result)


def test_weight_traffic_counts_the_matrices_of_the_step(plan):
    # Width 64: two layers of the body, and at each of four depths one layer and the classifier of 64 codes.
    assert bench.step_weight_bytes(load(plan)) == 4 * (2 * 12 * 64**2 + 4 * (12 * 64**2 + 64 * 64))


@pytest.mark.parametrize(("dtype", "usual"), [("int8", 1), ("int8", 8), ("int4", 1), ("int4", 8)])
def test_matrices_are_counted_in_every_form(artifacts, plan, dtype, usual):
    """Bytes may hold one weight or two."""
    low = artifacts.pipeline("rqvae", dtype, batch=SizeRange(1, usual, 64))
    counts = [sum(matrix.count for matrix in bench._matrices(pipe, "step").values()) for pipe in (low, load(plan))]
    assert counts[0] == counts[1]
    assert bench.step_weight_bytes(low) < bench.step_weight_bytes(load(plan)) / 3


def test_a_plan_in_half_is_timed_against_pytorch_in_half(half_package, checkpoint_folder, plan, tmp_path, monkeypatch):
    build(half_package, tmp_path / "half.plan")
    seen = set()
    finished = baselines.Reference._generate

    def spy(reference, *arguments):
        seen.update(weight.dtype for weight in reference.system.parameters())
        return finished(reference, *arguments)

    monkeypatch.setattr(baselines.Reference, "_generate", spy)
    options = {"warm_up": 0, "iterations": 1, "baselines": ("eager",), "checkpoint": checkpoint_folder}
    report = bench.bench(tmp_path / "half.plan", **options)
    assert seen == {torch.float16}
    assert set(report["ratios"]) == {f"{task}/b1/eager" for task in bench.TASKS}
    assert " fp16 " in report["environment"]["plan"]
    assert 2 * bench.step_weight_bytes(load(tmp_path / "half.plan")) == bench.step_weight_bytes(load(plan))


def test_plans_are_compared(artifacts):
    first, second = artifacts.plan("rqvae", "int8"), artifacts.plan("rqvae")
    report = bench.bench(first, warm_up=0, iterations=1, compare=[second])
    assert {r["name"] for r in report["results"]} == {"vqdeploy", second.stem}
    assert set(report["ratios"]) == {f"{task}/b1/{second.stem}" for task in bench.TASKS}
    one, other = (next(r for r in report["results"] if r["name"] == n) for n in ("vqdeploy", second.stem))
    # How many times as fast the other plan is, while a baseline has how many times as fast the plan is.
    assert report["ratios"][f"{one['task']}/b1/{second.stem}"] == pytest.approx(one["median_ms"] / other["median_ms"])
    table = bench.table(report)
    assert second.stem in table
    assert first.stem in table
    assert "vqdeploy" not in table
    assert 3 * bench.step_weight_bytes(load(first)) < bench.step_weight_bytes(load(second))
    described = report["plans"]
    assert described["vqdeploy"]["plan_mb"] < described[second.stem]["plan_mb"]
    assert all(0 < plan["needed_mb"] < plan["plan_mb"] < plan["peak_mb"] for plan in described.values())
    assert "divergence" not in described["vqdeploy"]
    assert 1e-7 < described[second.stem]["divergence"] < 1e-2
    assert bench.table(report).count("it is there after") == 2


@pytest.mark.parametrize("name", ["rqvae", "movq", "vqvae2", "vit", "var"])
def test_plans_of_equal_graphs_draw_from_the_same_distributions(artifacts, name):
    plan, other = (load(artifacts.plan(name, portable=portable)) for portable in (False, True))
    half = load(artifacts.plan(name, "fp16"))
    found = divergences(plan, {"portable": other, "fp16": half, "itself": plan})
    assert found["itself"] == {"divergence": 0, "variation": 0}
    assert abs(found["portable"]["divergence"]) < 1e-6
    assert 0 < found["fp16"]["divergence"] < 1e-3
    assert found["portable"]["variation"] < found["fp16"]["variation"] < 0.02


def test_the_divergence_is_that_of_the_distributions(plan, system):
    """Against PyTorch, for logits that are twice as large in the other plan."""
    pipeline = load(plan)
    labels = pipeline.condition.examples(16)  # a thousand codes
    codes = pipeline.generate(labels, seed=1).codes
    logits = system.prior.logits(torch.from_numpy(codes), torch.from_numpy(labels)).detach().double()
    wanted = torch.nn.functional.kl_div(
        (2 * logits).log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none"
    )
    with pytest.MonkeyPatch.context() as patch:
        original = plans.forced_logits
        patch.setattr(plans, "forced_logits", lambda p, *rest: original(p, *rest) * (1 if p is pipeline else 2))
        found = divergences(pipeline, {"other": load(plan)})["other"]
    assert found["divergence"] == pytest.approx(float(wanted.sum(-1).mean()), rel=1e-3)
    variation = (logits.softmax(-1) - (2 * logits).softmax(-1)).abs().sum(-1).mean() / 2
    assert found["variation"] == pytest.approx(float(variation), rel=1e-3)


def test_plans_that_cannot_be_compared(plan, movq_plan):
    with pytest.raises(VqdeployError, match="cannot be compared; expected images, codes and sampling options like"):
        bench.bench(plan, compare=[movq_plan])
    with pytest.raises(VqdeployError, match="two of what is compared have one name"):
        bench.bench(plan, compare=[movq_plan, movq_plan])


def test_plans_of_other_weights_are_compared_by_speed_alone(artifacts, system):
    other = deepcopy(system)
    with torch.no_grad():
        other.prior.input_mlp.weight.mul_(1.5)
    options = {"warm_up": 0, "iterations": 1, "tasks": ("generate",), "batch_sizes": (1, 1)}
    report = bench.bench(artifacts.plan("rqvae"), compare=[artifacts.plan(other)], **options)
    assert [r["batch_size"] for r in report["results"]] == [1, 1]
    assert all("divergence" not in plan for plan in report["plans"].values())


def test_what_four_bits_read_and_multiply():
    """Two numbers in a byte, and a scale of 4 bytes for 32 of them."""
    tensors = {
        "body.0.qkv.weight": np.zeros((384, 4, 16), np.uint8),
        "body.0.qkv.scale": np.zeros((384, 4), np.float32),
        "body.0.qkv.bias": np.zeros(384, np.float32),
        "head.product.weight": np.zeros((128, 256), np.int8),
        "labels": np.zeros((11, 128), np.float32),
    }
    stage = SimpleNamespace(weights=tuple(tensors))
    plan = SimpleNamespace(
        grid=(4, 4, 2),
        manifest=SimpleNamespace(stage={"step": stage}.get),
        bundle=SimpleNamespace(tensors=lambda: tensors),
    )
    assert [matrix.count for matrix in bench._matrices(plan, "step").values()] == [384 * 128, 128 * 256]
    assert bench.step_weight_bytes(plan) == 384 * 128 // 2 + 4 * 384 * 4 + 2 * 128 * 256


@pytest.mark.parametrize("name", ["movq_", "vqvae2_"])
def test_every_kind_of_prior_has_a_baseline_in_half(request, name, tmp_path):
    checkpoint.save(request.getfixturevalue(f"{name}system"), tmp_path / "checkpoint")
    build(request.getfixturevalue(f"{name}half_package"), tmp_path / "half.plan")
    options = {"warm_up": 0, "iterations": 1, "baselines": ("eager",), "checkpoint": tmp_path / "checkpoint"}
    report = bench.bench(tmp_path / "half.plan", **options)
    assert set(report["ratios"]) == {f"{task}/b1/eager" for task in bench.TASKS}


# What a step reads: the layers, the head, and the projection of texts.
WEIGHTS = {
    "vit": 3 * 12 * 64**2 + 64 * 64,
    "llamagen": 3 * 48 * (192 + 64 + 128 + 64) + 48 * 32,  # heads of 12 are filled up to 16
    "features": 2 * 32 * (96 + 32 + 128 + 64) + 32 * 32 + (12 + 32) * 32,
}


@pytest.mark.parametrize(
    ("name", "steps", "guidance"),
    [("vit", 16, {}), ("llamagen", 16, {"guidance_interval": 3}), ("features", 18, {"guidance_interval": 3})],
)
def test_a_prior_is_timed_with_guidance(artifacts, name, steps, guidance):
    options = {"baselines": ("eager",), "checkpoint": artifacts.checkpoint(name)}
    options["options"] = {"guidance_scale": 2.0, **guidance}
    report = bench.bench(artifacts.plan(name), warm_up=0, iterations=1, **options)
    assert {(r["name"], r["task"]) for r in report["results"]} == {
        (n, t) for n in ("vqdeploy", "eager") for t in bench.TASKS
    }
    assert report["options"]["guidance_scale"] == 2
    generated = next(r for r in report["results"] if (r["name"], r["task"]) == ("vqdeploy", "generate"))
    assert generated["step_ms"] == pytest.approx(generated["steps_ms"] / steps)
    assert bench.step_weight_bytes(artifacts.pipeline(name)) == 4 * WEIGHTS[name]


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


def test_a_tokenizer_has_no_steps_to_profile(artifacts, monkeypatch):
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("timed before it is refused"))
    with pytest.raises(VqdeployError, match="a tokenizer and no prior"):
        bench.bench(artifacts.plan(create(replace(SMALL, prior=None))), profile=True)


def test_the_plot_is_a_picture(report, tmp_path):
    bench.plot(report, tmp_path / "times.png")
    with Image.open(tmp_path / "times.png") as image:
        assert image.width > image.height > 100


NOTEBOOK = "module://matplotlib_inline.backend_inline"
PLOT = """
import json, sys
from pathlib import Path
from vqdeploy import bench
report, picture = map(Path, sys.argv[1:])
bench.plot(json.loads(report.read_text()), picture)
"""


@pytest.mark.parametrize(("backend", "settings"), [(NOTEBOOK, ""), ("", "text.usetex: True")])
def test_settings_of_the_user_do_not_matter(report, tmp_path, python, monkeypatch, backend, settings):
    """A notebook hands its backend to the processes that it starts."""
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "matplotlibrc").write_text(settings)
    monkeypatch.setenv("MPLBACKEND", backend)
    python(PLOT, tmp_path / "report.json", tmp_path / "plot.png", cwd=tmp_path)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"


@pytest.mark.filterwarnings("error")
def test_the_plot_names_what_was_timed(report, tmp_path, monkeypatch):
    named = []
    original = figure.Figure.legend

    def note(drawn, handles, labels, **options):
        legend = original(drawn, handles, labels, **options)
        named.extend(text.get_text().replace(r"\$", "$") for text in legend.get_texts())
        return legend

    monkeypatch.setattr(figure.Figure, "legend", note)
    odd = r"_a$\frac$b"
    results = [r | {"name": odd if r["name"] == "eager" else r["name"]} for r in report["results"]]
    plan = report["plans"]["vqdeploy"] | {"plan_mb": 3.2}
    bench.plot(report | {"results": results, "plans": {"vqdeploy": plan, odd: plan}}, tmp_path / "times.png")
    assert named == [f"{report['environment']['file']}, 3 MB", f"{odd}, 3 MB"]


def test_the_plot_of_compared_plans_has_their_quality(report, tmp_path, monkeypatch):
    compared = {**report["plans"]["vqdeploy"], "divergence": 2e-4, "variation": 0.01}
    exact = {**compared, "divergence": 0.0}
    both = report | {"plans": report["plans"] | {"eager": compared}}
    drawn = []
    original = axes.Axes.plot

    def note(axis, *arguments, **options):
        drawn.append(arguments[:2])
        return original(axis, *arguments, **options)

    monkeypatch.setattr(axes.Axes, "plot", note)
    for plans_ in (both, report | {"plans": report["plans"] | {"eager": exact}}):
        bench.plot(plans_, tmp_path / "both.png")
    speeds = [r["images_per_s"] for r in report["results"] if (r["name"], r["task"]) == ("eager", "generate")]
    assert drawn[:2] == [(speed, 2e-4) for speed in speeds]
    assert all(value > 0 for _, value in drawn)
    bench.plot(report, tmp_path / "one.png")
    with Image.open(tmp_path / "both.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.height > 1.8 * one.height


@pytest.mark.parametrize("wrong", [{"tasks": ["paint"]}, {"baselines": ["jax"]}])
def test_unknown_names_are_refused(plan, wrong):
    with pytest.raises(VqdeployError, match="there is no such"):
        bench.bench(plan, **wrong)


def test_the_compiled_baseline_draws_the_eager_tokens(plan, system, checkpoint_folder, monkeypatch):
    pipeline, drawn = load(plan), []
    generate = type(system.prior).generate
    monkeypatch.setattr(type(system.prior), "generate", lambda *args: drawn.append(generate(*args)), raising=True)
    reference = baselines.Reference(pipeline, checkpoint_folder, {})
    for compiled in (False, True):
        reference.call("generate", 2, pipeline, compiled)()
    known = -(drawn[0] * 0 + 1).numpy()
    assert (drawn[0] == drawn[1]).all()
    assert (pipeline.sample(known, [0, 1], seed=0)[0] == drawn[0].numpy()).all()


# A hierarchy


@pytest.fixture(scope="module")
def hierarchy(vqvae2_plan, vqvae2_checkpoint):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_measure_apart", lambda call, threads: {"read": 8.0, "matm": 90.0}[call[:4]])
        return bench.bench(
            vqvae2_plan, batch_sizes=(1, 2), iterations=2, baselines=("eager",), checkpoint=vqvae2_checkpoint
        )


def test_the_parts_of_a_generation(hierarchy):
    calls = {"top_row": 3, "top_pixel": 9, "bottom_condition": 1, "bottom_row": 6, "bottom_pixel": 36}
    results = [r for r in hierarchy["results"] if (r["name"], r["task"]) == ("vqdeploy", "generate")]
    assert [r["batch_size"] for r in results] == [1, 2]
    for result in results:
        parts = result["parts"]
        assert {name: part["calls"] for name, part in parts.items()} == calls
        for name, part in parts.items():
            assert part["call_ms"] * part["calls"] == pytest.approx(result[f"{name}_ms"])
            assert part["share"] == pytest.approx(result[f"{name}_ms"] / result["median_ms"])
            assert part["weight_gb_s"] == pytest.approx(part["weight_mb"] / part["call_ms"])
            assert part["gflop_s"] == pytest.approx(part["gflop"] / part["call_ms"] * 1e3)
        assert sum(result[f"{name}_ms"] for name in calls) == pytest.approx(result["steps_ms"], rel=0.2)
        assert 0 < result["host_ms"] < result["median_ms"]
    assert all("parts" not in r for r in hierarchy["results"] if r not in results)
    once, twice = (r["parts"]["bottom_pixel"] for r in results)
    assert twice["gflop"] == pytest.approx(2 * once["gflop"])
    assert twice["weight_mb"] == once["weight_mb"]


def test_the_arithmetic_of_a_place_is_that_of_its_matrices(hierarchy):
    """Two blocks of two gated layers, 1x1 exits on 18 channels, a 1x1 gated layer, 32 logits."""
    layer = 2 * 16 * 24 + 2 * 24 * 32  # of two places to the left
    expected = 4 * layer + 2 * 18 * 16 + 16 * 24 + 24 * 32 + 16 * 32
    (part,) = [r["parts"]["bottom_pixel"] for r in hierarchy["results"] if "parts" in r and r["batch_size"] == 1]
    assert part["weight_mb"] == pytest.approx(expected * 4 / 1e6)
    assert part["gflop"] == pytest.approx(expected * 2 / 1e9)


def test_a_hierarchy_against_its_baseline(hierarchy):
    assert set(hierarchy["ratios"]) == {f"{task}/b{batch}/eager" for task in bench.TASKS for batch in (1, 2)}
    assert min(hierarchy["ratios"].values()) > 0
    report = json.loads(json.dumps(hierarchy))
    assert report["environment"]["read_bandwidth_gb_s"] == 8
    assert report["options"] == {"temperature": 0.9, "top_k": 0, "top_p": 1.0}
    text = bench.table(hierarchy)
    assert text.count("bottom_pixel") == 2
    assert "reads 8.0 GB/s and multiplies large matrices at 90 GFLOP/s" in text


def test_the_profile_of_a_hierarchy_is_of_all_its_stages(vqvae2_plan):
    rows = bench.step_profile(load(vqvae2_plan), 1, {"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    calls = {row["op"]: row["calls"] for row in rows}
    assert calls["TensorScatter"] == 9 * (2 + 2 * 2) + 36 * 2  # two rows in each level, and two caches a block


class Clock:
    """Time that stands still but for the networks: each call takes as long as a function of its rows says."""

    def __init__(self, cost):
        self.now, self.cost, self.calls = 0.0, cost, []

    def network(self, height, width):
        def forward(codes, condition):
            assert condition == (None if not self.calls or height == self.calls[0][0] else "above")
            self.calls.append((height, *codes.shape))
            self.now += self.cost(codes.shape[1])

        forward.config = SimpleNamespace(grid=(height, width))
        forward.embed_condition = lambda labels, above: None if above is None else "above"
        return forward


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 4), (32, 32)])
def test_the_public_sampler_is_extrapolated_row_by_row(monkeypatch, height, width):
    clock = Clock(lambda rows: float(rows))
    monkeypatch.setattr("vqdeploy.bench.baselines.time.perf_counter", lambda: clock.now)
    prior = SimpleNamespace(levels=[clock.network(height, width), clock.network(2 * height, 2 * width)])
    seconds = baselines.extrapolate(prior, 3, compiled=False)
    rows, finer = height * (height + 1) / 2, 2 * height * (2 * height + 1) / 2
    assert seconds == pytest.approx(width * rows + 2 * width * finer)
    assert isinstance(seconds, float)
    assert {shape[1:2] + shape[3:] for shape in clock.calls} == {(3, width), (3, 2 * width)}
    assert len(clock.calls) <= 10


def test_an_extrapolation_is_near_a_time_that_bends(monkeypatch):
    """Attention grows with the square of the rows."""
    clock = Clock(lambda rows: 20 + 3 * rows + 0.1 * rows**2)
    monkeypatch.setattr("vqdeploy.bench.baselines.time.perf_counter", lambda: clock.now)
    seconds = baselines.extrapolate(SimpleNamespace(levels=[clock.network(32, 32)]), 1, compiled=False)
    assert seconds == pytest.approx(32 * sum(clock.cost(rows) for rows in range(1, 33)), rel=0.02)


def test_an_extrapolation_takes_the_place_of_what_was_measured(vqvae2_plan, vqvae2_checkpoint, monkeypatch):
    monkeypatch.setattr(baselines, "extrapolate", lambda prior, batch, compiled, device: 123.0 * batch)
    pipeline = load(vqvae2_plan)
    call = baselines.Reference(pipeline, vqvae2_checkpoint, {}).call("generate", 2, pipeline, compiled=False)
    assert bench._timed(call)() == {"total": 246.0}
    assert not torch.is_inference_mode_enabled()
