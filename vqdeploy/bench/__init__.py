"""`vqdeploy bench`: latency of the tasks of a plan, compared with PyTorch in the same process."""

import contextlib
import gc
import importlib.util
import logging
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vqdeploy import machine
from vqdeploy.bench.plans import describe, divergences
from vqdeploy.errors import VqdeployError, missing
from vqdeploy.files import replacing_file
from vqdeploy.runtime import Pipeline, load
from vqdeploy.runtime.backends import BACKENDS
from vqdeploy.runtime.manifest import level_names
from vqdeploy.runtime.threads import cores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from vqdeploy.bench.baselines import Reference

log = logging.getLogger("vqdeploy")

TASKS = ("generate", "encode", "decode")
BASELINES = ("eager", "compile")
_SMALLEST = 1e-9  # divergence that is drawn: a logarithm of 0 has no place
_RATES = {"read_bandwidth_gb_s": "read_bandwidth({threads})", "matmul_gflop_s": "matmul_rate()"}
_BODY, _HEAD = "body.", "head.product.weight"  # weights that a step multiplies once, and after guidance
_BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

Phases = dict[str, float]
"""Seconds of the phases of one call; `total` is the whole call, `calls` the number of engine calls of the prior."""


@dataclass
class Runner:
    """A named call to time, which returns its phases."""

    name: str
    call: Callable[[], Phases]


def bench(
    engine: Path,
    tasks: Sequence[str] = (),
    batch_sizes: Sequence[int] = (1,),
    warm_up: int = 1,
    iterations: int = 5,
    baselines: Sequence[str] = (),
    checkpoint: Path | None = None,
    profile: bool = False,
    options: dict[str, Any] | None = None,
    progress: Callable[[str], object] = lambda name: None,
    device: str = "auto",
    threads: int = 0,
    compare: Sequence[Path] = (),
) -> dict[str, Any]:
    """Times tasks of a plan, and the same tasks in PyTorch and of other plans.

    Calls of the plan and of what it is compared with alternate, so that all see the same machine.

    Args:
        engine: The plan.
        tasks: Some of `TASKS`; all of the plan if empty. `generate` times the prior alone, `decode` the decoder.
        batch_sizes: Images per call.
        warm_up: Untimed calls of each.
        iterations: Timed calls of each.
        baselines: Some of `BASELINES`.
        checkpoint: Checkpoint folder for the baselines; by default the shipped one of the plan.
        profile: Whether to add `profile`, from the profiler of ONNX Runtime.
        options: Sampling options that differ from the checkpoint's, for `generate`.
        progress: Called with a description before each measurement.
        device: Where the plan runs, as for `vqdeploy.runtime.load`; PyTorch runs there too.
        threads: CPU threads of the engines, the baselines and the roofline; 0 for one per core.
        compare: Other plans, of codes of the same shape.

    Returns:
        A dictionary of JSON types:

        - `results`: a list with a dictionary for each task, batch size and runner. `name` is `vqdeploy`, the
          baseline or the name of the other plan;
          `task`; `batch_size` in images; `median_ms`, `p90_ms` and `p99_ms`, times of a call in milliseconds;
          `images_per_s` by the median; `iterations`, the number of timed calls. `generate` of plans has `calls`, the
          number of engine calls of the prior, and medians of
          `steps_ms` (engine calls of the prior; for a hierarchy `STAGE_ms` of each stage) and `host_ms` (noise and
          schedules between them), and figures per step, set against the roofline of this machine on a CPU: `step_ms`
          (of an engine call: the prefill of a text counts as a step);
          autoregressive: `weight_mb_per_step` (1e6 bytes), `weight_gb_s`, `share_of_read_bandwidth` (0..1); masked and
          next-scale, whose steps differ, in the mean: `gflop_per_step`, `gflop_s`, and without integers
          `share_of_matmul_rate` (0..1);
          hierarchical: `parts`, for each stage its `calls`, `call_ms`, `share` of the median (0..1), `weight_mb`,
          `weight_gb_s`, `gflop` and `gflop_s` of a call.
        - `ratios`: speedups, see `ratios`.
        - `plans`, with `generate`, for each plan by name: `plan_mb`, the size of its file; `needed_mb`, that of the
          stages which generate images, with their weights; `peak_mb` and `first_image_s`, peak memory and seconds of a
          process that generates one image, with the options of the checkpoint, and writes it (all in 2^20 bytes). For
          other plans of the same checkpoint also how far their distributions of codes are from those of the first, at
          a thousand codes or more that it draws: `divergence`, the mean Kullback-Leibler divergence in nats, and
          `variation`, the mean total variation distance (0..1).
        - `environment`: `cpu`, `cpu_features` (AVX2 and the like), `cores` (that this process may use), `threads`,
          `load` (average of one minute, before the first call), `python`, `versions`, `load_s` (seconds to open
          the plan), `peak_memory_mb` (2^20 bytes, of this process), `plan`, `file` (its name); on a GPU `gpu` (compute
          capability) and `gpu_memory_mb` (2^20 bytes in use); the roofline as far as it was measured:
          `read_bandwidth_gb_s`, `matmul_gflop_s`.
        - `options`: the effective sampling options.
        - `profile`, with `profile`: a list of `op`, `ms`, `share` (0..1) and `calls` of one generation, descending.

    Raises:
        VqdeployError: A task, baseline or size is not known, or plans cannot be compared.
    """
    facts = environment() | {"threads": threads or cores()}
    _check(tasks, TASKS, "task")
    _check(baselines, BASELINES, "baseline")
    batch_sizes = list(dict.fromkeys(batch_sizes))
    names = ["vqdeploy", *baselines, *(path.stem for path in compare)]
    if len(set(names)) < len(names):
        raise VqdeployError("two of what is compared have one name", found=", ".join(names))
    with contextlib.ExitStack() as opened:
        start = time.perf_counter()
        pipeline = opened.enter_context(load(engine, device, threads))
        load_seconds = time.perf_counter() - start
        tasks = tasks or [task for task in TASKS if task != "generate" or pipeline.manifest.sampling]
        chosen = pipeline.options(**options or {}) if "generate" in tasks or profile else {}
        reference = _reference(pipeline, checkpoint, chosen, threads) if baselines else None
        others = {p.stem: _comparable(opened.enter_context(load(p, device, threads)), pipeline) for p in compare}
        # Measured just before the steps, because the speed of shared machines drifts.
        bound = _bound(pipeline, facts["threads"]) if "generate" in tasks and pipeline.device == "cpu" else {}
        results = []
        for task in sorted(tasks, key=TASKS.index):
            for batch in batch_sizes:
                runners = [Runner("vqdeploy", _plan_call(pipeline, task, batch, chosen))]
                if reference:
                    runners += [
                        Runner(name, _timed(reference.call(task, batch, pipeline, compiled=name == "compile")))
                        for name in baselines
                    ]
                runners += [Runner(name, _plan_call(other, task, batch, chosen)) for name, other in others.items()]
                progress(f"{task}, batch {batch}")
                results += _measure(runners, task, batch, warm_up, iterations)
        facts |= {"load_s": load_seconds, "peak_memory_mb": machine.peak_memory_mb(), "plan": _describe(pipeline)}
        facts["file"] = pipeline.bundle.path.stem
        if pipeline.device == "cuda":
            facts |= _gpu_facts()
        for result in results:
            if result["task"] == "generate" and result["name"] == "vqdeploy":
                result |= _step_figures(pipeline, chosen, result, bound)
        report = {"results": results, "ratios": ratios(results), "environment": facts | bound, "options": chosen}
        if "generate" in tasks:
            progress("first image")
            plans = {name: describe(plan, threads) for name, plan in ({"vqdeploy": pipeline} | others).items()}
            weights = pipeline.manifest.provenance.checkpoint
            same = {name: other for name, other in others.items() if other.manifest.provenance.checkpoint == weights}
            distances = divergences(pipeline, same, **chosen)
            report["plans"] = {name: plan | distances.get(name, {}) for name, plan in plans.items()}
        return report | {"profile": step_profile(pipeline, batch_sizes[0], chosen, threads)} if profile else report


def _check(chosen: Sequence[str], known: Sequence[str], kind: str) -> None:
    if unknown := [name for name in chosen if name not in known]:
        raise VqdeployError(f"there is no such {kind}", expected=" or ".join(known), found=unknown[0])


def _comparable(other: Pipeline, pipeline: Pipeline) -> Pipeline:
    """The other plan, if it has the codes, the images and the sampler of the first."""
    if _kind(other) != _kind(pipeline):
        expected = "images, codes and sampling options like those of the first plan"
        raise VqdeployError(f"{other.bundle.path} cannot be compared", expected=expected)
    return other


def _kind(pipeline: Pipeline) -> tuple[object, ...]:
    """What plans must have in common to be compared."""
    tokenizer, sampling = pipeline.tokenizer.to_dict(), pipeline.manifest.sampling
    if sampling is None:
        return (tokenizer,)
    return tokenizer, sampling.kind, sampling.classes, sampling.text, sorted(sampling.options)


def _reference(pipeline: Pipeline, checkpoint: Path | None, options: dict[str, Any], threads: int) -> "Reference":
    from vqdeploy.bench.baselines import Reference

    return Reference(pipeline, checkpoint, options, threads)


def _plan_call(pipeline: Pipeline, task: str, batch: int, options: dict[str, Any]) -> Callable[[], Phases]:
    rng = np.random.default_rng(0)
    if task == "encode":
        images = rng.integers(0, 256, (batch, *pipeline.image_shape), np.uint8)
        return _timed(lambda: pipeline.encode(images))
    if task == "decode":
        codes = rng.integers(0, pipeline.codebook_size, (batch, *pipeline.grid))
        return _timed(lambda: pipeline.decode(codes))
    labels = pipeline.condition.examples(batch)
    known = np.full((batch, *pipeline.grid), -1)

    def generate() -> Phases:
        start = time.perf_counter()
        spent = pipeline.sample(known, labels, seed=0, chosen=options)[1]
        total, stages = time.perf_counter() - start, {stage: each.seconds for stage, each in spent.items()}
        engine = sum(stages.values())
        phases = {"total": total, "steps": engine, "host": total - engine, **(stages if len(stages) > 1 else {})}
        return phases | {"calls": float(sum(each.calls for each in spent.values()))}

    return generate


def _timed(call: Callable[[], Any]) -> Callable[[], Phases]:
    def timed() -> Phases:
        start = time.perf_counter()
        extrapolated = call()
        elapsed = time.perf_counter() - start
        return {"total": extrapolated if isinstance(extrapolated, float) else elapsed}

    return timed


def _measure(runners: list[Runner], task: str, batch: int, warm_up: int, iterations: int) -> list[dict[str, Any]]:
    for runner in runners:
        for _ in range(warm_up):
            runner.call()
    gc.collect()
    samples: dict[str, list[Phases]] = {runner.name: [] for runner in runners}
    for _ in range(iterations):
        for runner in runners:
            samples[runner.name].append(runner.call())
    return [_summary(name, task, batch, phases) for name, phases in samples.items()]


def _summary(name: str, task: str, batch: int, phases: list[Phases]) -> dict[str, Any]:
    totals = np.array([phase["total"] for phase in phases]) * 1e3
    median = float(np.median(totals))
    timed = [key for key in phases[0] if key not in ("total", "calls")]
    parts = {f"{key}_ms": float(np.median([p[key] for p in phases]) * 1e3) for key in timed}
    counted = {"calls": round(phases[-1]["calls"])} if "calls" in phases[-1] else {}
    return {
        "name": name,
        "task": task,
        "batch_size": batch,
        "median_ms": median,
        "p90_ms": float(np.percentile(totals, 90)),
        "p99_ms": float(np.percentile(totals, 99)),
        "images_per_s": batch / median * 1e3,
        "iterations": len(phases),
        **counted,
        **parts,
    }


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """Speedups, median / median, keyed `TASK/bBATCH/NAME`: of the plan over baselines, of other plans over the plan."""
    found, plan = {}, {(r["task"], r["batch_size"]): r["median_ms"] for r in results if r["name"] == "vqdeploy"}
    for r in results:
        if r["name"] != "vqdeploy":
            ratio = r["median_ms"] / plan[r["task"], r["batch_size"]]
            found[f"{r['task']}/b{r['batch_size']}/{r['name']}"] = ratio if r["name"] in BASELINES else 1 / ratio
    return found


def _bound(pipeline: Pipeline, threads: int) -> dict[str, float]:
    """The roofline of a step on this machine: read bandwidth in GB/s, fp32 matrix products in GFLOP/s.

    Empty if it cannot be measured, or what a step reads and computes is not known.
    """
    names = {"hierarchical": list(_RATES), "masked": ["matmul_gflop_s"], "next-scale": ["matmul_gflop_s"]}
    if not _is_counted(pipeline):
        return {}
    rates = names.get(pipeline.sampling.kind, ["read_bandwidth_gb_s"])
    try:
        return {name: _measure_apart(_RATES[name].format(threads=threads), threads) for name in rates}
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        log.warning("the roofline of this machine is left out, because its measurement failed: %s", error)
        return {}


def _is_counted(pipeline: Pipeline) -> bool:
    """Whether names of weights and the configuration of training tell what a step reads and computes."""
    matrices = {name for stage in pipeline.prior_stages for name in _matrices(pipeline, stage)}
    given = pipeline.manifest.config.get("prior")
    prior = given if isinstance(given, dict) else {}
    sized = all(type(prior.get(name)) is int for name in ("width", "layers"))
    if not matrices:  # they lie in the graphs, or in what another backend makes of them
        return False
    if pipeline.sampling.kind == "masked":
        return sized and prior.get("network", "plain") == "plain" and not prior.get("mlp_width")
    if pipeline.sampling.kind == "next-scale":
        return sized and _HEAD in matrices
    if pipeline.sampling.kind == "autoregressive":
        return pipeline.grid[-1] == 1 or any(name.startswith(_BODY) for name in matrices)
    return True


def _step_figures(
    pipeline: Pipeline, options: dict[str, Any], result: dict[str, Any], bound: dict[str, float]
) -> dict[str, Any]:
    """Time of a step, and its share of the roofline."""
    if pipeline.sampling.kind == "hierarchical":
        return {"parts": _parts(pipeline, result)} if bound else {}
    time_ms = result["steps_ms"] / result["calls"]
    if not bound:
        return {"step_ms": time_ms}
    if "matmul_gflop_s" in bound:
        conditions = 1 if options["guidance_scale"] == 1 else 2
        if pipeline.sampling.kind == "next-scale":
            image = scales_gflop(pipeline, conditions)
        else:
            image = step_gflop(pipeline) * conditions * options["steps"]
        work = image * result["batch_size"] / result["calls"]
        rate = work / time_ms * 1e3
        figures = {"step_ms": time_ms, "gflop_per_step": work, "gflop_s": rate}
        if not pipeline.quantized:  # the rate of this machine is that of fp32
            figures["share_of_matmul_rate"] = rate / bound["matmul_gflop_s"]
        return figures
    size = step_weight_bytes(pipeline)
    rate = size / time_ms / 1e6
    share = rate / bound["read_bandwidth_gb_s"]
    return {
        "step_ms": time_ms,
        "weight_mb_per_step": size / 1e6,
        "weight_gb_s": rate,
        "share_of_read_bandwidth": share,
    }


def _parts(pipeline: Pipeline, result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Time, weight traffic and arithmetic of each stage of a hierarchy in one generation.

    Each weight is read once per call. It multiplies once per position of the output of a call; a row kernel multiplies
    once per tile of positions.
    """
    parts = {}
    maps, above = pipeline.layout.maps, 0
    for name, (height, width, _) in zip(level_names(len(maps)), maps, strict=True):
        for part, calls, places in (
            ("condition", 1, above),  # it convolves the codes of the level above, then enlarges
            ("row", height, width),
            ("pixel", height * width, 1),
        ):
            stage = f"{name}_{part}"
            if stage not in pipeline.stages:
                continue
            outputs = {info.name: info.shape for info in pipeline.manifest.stage(stage).outputs}
            tiles = outputs["spread_x"][1] if part == "row" else places
            weights = _matrices(pipeline, stage).values()
            work = 2 * result["batch_size"] * sum(w.count * (int(tiles) if w.axes == 4 else places) for w in weights)
            size, time_ms = sum(w.bytes for w in weights), result[f"{stage}_ms"] / calls
            parts[stage] = {
                "calls": calls,
                "call_ms": time_ms,
                "share": result[f"{stage}_ms"] / result["median_ms"],
                "weight_mb": size / 1e6,
                "weight_gb_s": size / time_ms / 1e6,
                "gflop": work / 1e9,
                "gflop_s": work / time_ms / 1e6,
            }
        above = height * width
    return parts


def step_profile(pipeline: Pipeline, batch: int, options: dict[str, Any], threads: int = 0) -> list[dict[str, Any]]:
    """Operators of the prior by time in one generation, descending.

    The profiler adds a few microseconds per operator, visible for small ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        backend, bundle, device = BACKENDS[str(pipeline.manifest.backend)](), pipeline.bundle, pipeline.device
        profiled = Pipeline(bundle, device, lambda: backend.opener(bundle, device, threads, Path(folder)), threads)
        _plan_call(profiled, "generate", batch, options)()
        sessions: list[Any] = [profiled.session(stage) for stage in profiled.prior_stages]
        traces = [event for session in sessions for event in session.end_profile()]
        events = [e for e in traces if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    spent, calls = Counter[str](), Counter[str]()
    for event in events:
        spent[event["args"]["op_name"]] += event["dur"]
        calls[event["args"]["op_name"]] += 1
    total = sum(spent.values())
    return [
        {"op": op, "ms": micros / 1e3, "share": micros / total, "calls": calls[op]}
        for op, micros in spent.most_common()
    ]


@dataclass(frozen=True)
class _Matrix:
    """How many numbers the weight of a product or convolution has, in how many axes, and its bytes with its scales."""

    count: int
    axes: int
    bytes: int


def _matrices(pipeline: Pipeline, stage: str) -> dict[str, _Matrix]:
    """The weights of matrix products and convolutions of a stage, without embedding tables and those in its graph."""
    names, found = pipeline.manifest.stage(stage).weights, dict[str, _Matrix]()
    weights = pipeline.bundle.tensors() if names else {}
    for name in names:
        weight, parts = weights[name], re.fullmatch(r"(.*\.)weight(\.bytes_\d+)?", name)
        if parts and weight.ndim > 1:
            pairs = 2 if weight.dtype == np.uint8 and not parts[2] else 1  # of 4 bits each
            scale = weights.get(f"{parts[1]}scale{parts[2] or ''}")
            size = weight.nbytes + (0 if scale is None else scale.nbytes)
            found[name] = _Matrix(weight.size * pairs, weight.ndim, size)
    return found


def step_weight_bytes(pipeline: Pipeline) -> int:
    """Bytes of weights that one step of an autoregressive prior reads, in the precision of the plan.

    The depth transformer and the classifier count once per depth, since they do not fit the cache of a core.
    """
    matrices = _matrices(pipeline, "step").items()
    return sum(matrix.bytes * (1 if name.startswith(_BODY) else pipeline.grid[-1]) for name, matrix in matrices)


def step_gflop(pipeline: Pipeline) -> float:
    """GFLOP of one step of a masked prior for one image and label."""
    prior = pipeline.manifest.config["prior"]
    entries = 1 + pipeline.grid[0] * pipeline.grid[1]
    attention = 2 * entries**2 * prior["width"] * prior["layers"]
    weights = sum(matrix.count for matrix in _matrices(pipeline, "step").values())
    gflop: float = 2 * (entries * weights + attention) / 1e9
    return gflop


def scales_gflop(pipeline: Pipeline, conditions: int) -> float:
    """GFLOP of all steps of a next-scale prior for one image, with one label or with guidance."""
    prior, sizes = pipeline.manifest.config["prior"], [math.prod(each) for each in pipeline.layout.maps]
    matrices = {name: matrix.count for name, matrix in _matrices(pipeline, "step").items() if matrix.axes < 4}
    head = matrices.pop(_HEAD)  # after guidance
    pairs = sum(size * sum(sizes[: scale + 1]) for scale, size in enumerate(sizes))
    attention = 2 * pairs * prior["width"] * prior["layers"]
    gflop: float = 2 * (sum(sizes) * (conditions * sum(matrices.values()) + head) + conditions * attention) / 1e9
    return gflop


def matmul_rate(size: int = 2048, repeats: int = 8) -> float:
    """GFLOP/s of NumPy's threads in a product of fp32 matrices, best of several."""
    a = np.random.default_rng(0).random((size, size), np.float32)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best


def read_bandwidth(threads: int, megabytes: int = 1024, repeats: int = 5) -> float:
    """GB/s at which some threads together read uncached memory, best of several.

    Each thread computes the dot product of its part with itself, which BLAS does at memory speed.
    """
    data = np.ones(megabytes * 2**20 // 4, np.float32)
    # Several streams per thread: one does not saturate the memory.
    parts = [np.array_split(part, 8) for part in np.array_split(data, threads)]
    best = 0.0
    for _ in range(repeats):
        readers = [threading.Thread(target=_read, args=(part,)) for part in parts]
        start = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = max(best, data.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def _measure_apart(call: str, threads: int) -> float:
    """Calls a function of this module in a subprocess, so that its memory does not count for the plan.

    Raises:
        OSError, subprocess.SubprocessError, ValueError: It failed, out of memory for one.
    """
    environment = os.environ | dict.fromkeys(_BLAS_THREADS, str(threads))
    # Without -P, files of the current folder would replace modules.
    command = [sys.executable, "-P", "-c", f"from vqdeploy import bench; print(bench.{call})"]
    return float(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)  # noqa: S603


def _read(parts: list[np.ndarray]) -> None:
    for part in parts:
        part.dot(part)


def environment() -> dict[str, Any]:
    """CPU, its features, cores, load and versions; see `bench`."""
    return {
        "cpu": machine.cpu(),
        "cpu_features": machine.cpu_features(),
        "cores": cores(),
        "load": machine.load(),
        "python": platform.python_version(),
        "versions": machine.versions(),
    }


def _gpu_facts() -> dict[str, Any]:
    """Kind of the GPU, and how much of its memory is in use at the end, the baselines' too."""
    from vqdeploy.runtime import device

    return {"gpu": device.compute_capability(), "gpu_memory_mb": device.used_memory() / 2**20}


def _describe(pipeline: Pipeline) -> str:
    manifest = pipeline.manifest
    device = "" if pipeline.device == "cpu" else f" on {pipeline.device}"
    return f"{manifest.name} {manifest.provenance.preset} {manifest.precision} {manifest.backend}{device}"


def table(report: dict[str, Any]) -> str:
    """The report as text; where plans are compared, the first has the name of its file, too."""
    plan = report["environment"]["file"] if len(report.get("plans", {})) > 1 else "vqdeploy"
    names = {r["name"]: plan if r["name"] == "vqdeploy" else r["name"] for r in report["results"]}
    width = max(10, *map(len, names.values()))
    head = " ".join(f"{name:>10}" for name in ("median", "p90", "p99"))
    lines = [f"{'task':9} {'batch':>5} {'':{width}} {head} {'images/s':>9} {'ratio':>6}"]
    for r in report["results"]:
        ratio = report["ratios"].get(f"{r['task']}/b{r['batch_size']}/{r['name']}")
        times = " ".join(f"{r[key]:7.1f} ms" for key in ("median_ms", "p90_ms", "p99_ms"))
        shown = f"{ratio:5.2f}x" if ratio else ""
        lines.append(
            f"{r['task']:9} {r['batch_size']:5} {names[r['name']]:{width}} {times} {r['images_per_s']:9.2f} {shown:>6}"
        )
    for r in report["results"]:
        for name, part in r.get("parts", {}).items():
            lines.append(_part_line(r["batch_size"], name, part))
        if "parts" in r:
            lines.append(f"batch {r['batch_size']}: host {r['host_ms'] / r['median_ms']:.1%}" + _rates_line(report))
        if "step_ms" in r:
            host = f"batch {r['batch_size']}: {r['step_ms']:.2f} ms a step, host {r['host_ms'] / r['median_ms']:.1%}"
            lines.append(host + _bound_line(r, report["environment"]))
    lines += _plan_lines({names[name]: facts for name, facts in report.get("plans", {}).items()}, width)
    lines += [
        f"  {row['op']:24} {row['ms']:8.1f} ms {row['share']:6.1%} {row['calls']:7} calls"
        for row in report.get("profile", [])[:12]
    ]
    facts = report["environment"]
    if "gpu" in facts:
        lines.append(f"{facts['gpu']}, {facts['gpu_memory_mb']:.0f} MB of its memory in use at the end")
    cpu = ", ".join([facts["cpu"], f"{facts['cores']} cores", *facts["cpu_features"]])
    lines.append(f"{facts['plan']}; {cpu}; loaded in {facts['load_s']:.2f} s")
    busy = "" if facts["load"] is None else f"; {facts['load']:.1f} processes ran or waited in the minute before"
    lines.append(f"{facts['threads']} threads{busy}")
    return "\n".join(lines)


def _plan_lines(plans: dict[str, dict[str, float]], width: int) -> list[str]:
    """One line for each plan."""
    lines = []
    for name, plan in plans.items():
        lines.append(f"{name:{width}} {plan['plan_mb']:.0f} MB, of which one image needs {plan['needed_mb']:.0f} MB")
        if "first_image_s" in plan:
            lines[-1] += f"; it is there after {plan['first_image_s']:.2f} s, with a peak of {plan['peak_mb']:.0f} MB"
        if "divergence" in plan:
            lines[-1] += f"; KL divergence {plan['divergence']:.1e}, total variation {plan['variation']:.1e}"
    return lines


def _part_line(batch: int, name: str, part: dict[str, float]) -> str:
    return (
        f"batch {batch}: {name:16} {part['share']:6.1%} {part['calls']:5} calls of {part['call_ms']:8.2f} ms; "
        f"{part['weight_mb']:6.1f} MB, {part['weight_gb_s']:5.1f} GB/s; {part['gflop']:7.3f} GFLOP, "
        f"{part['gflop_s']:4.0f} GFLOP/s"
    )


def _rates_line(report: dict[str, Any]) -> str:
    facts = report["environment"]
    return (
        f"; the machine reads {facts['read_bandwidth_gb_s']:.1f} GB/s and "
        f"multiplies large matrices at {facts['matmul_gflop_s']:.0f} GFLOP/s"
    )


def _bound_line(result: dict[str, Any], facts: dict[str, Any]) -> str:
    if "gflop_s" in result:
        line = f"; {result['gflop_per_step']:.3g} GFLOP a step, {result['gflop_s']:.0f} GFLOP/s"
        if "share_of_matmul_rate" not in result:
            return line
        share = f"{result['share_of_matmul_rate']:.0%} of {facts['matmul_gflop_s']:.0f} GFLOP/s"
        return f"{line}, {share} in a large matrix product"
    if "weight_gb_s" not in result:
        return ""
    return (
        f"; weights {result['weight_mb_per_step']:.0f} MB a step, {result['weight_gb_s']:.1f} GB/s, "
        f"{result['share_of_read_bandwidth']:.0%} of {facts['read_bandwidth_gb_s']:.1f} GB/s read"
    )


def check_plot() -> None:
    """Checks that `plot` can draw.

    Raises:
        VqdeployError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise missing("matplotlib")


def plot(report: dict[str, Any], path: Path) -> None:
    """Bar chart of the median times by task and batch size, one colour per runner.

    Where plans are compared, a second row has quality against speed: for each batch size of `generate`, how far the
    distributions of codes of each plan are from those of the first, over its images per second.

    Raises:
        VqdeployError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot()
    if "matplotlib" not in sys.modules:
        os.environ["MPLBACKEND"] = "Agg"  # that of a notebook may not be installed here
    from matplotlib import style

    with style.context("default"):  # a plot for everybody, whatever the settings of this user
        _plot(report, path)


def _plot(report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    results, plans = report["results"], report.get("plans", {})
    groups = list(dict.fromkeys((r["task"], r["batch_size"]) for r in results))
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["name"] for r in results))}
    batches = [batch for task, batch in groups if task == "generate"] if len(plans) > 1 else []
    figure = Figure(figsize=(max(2.2 * len(groups), 3.2 * len(batches)) + 1, 6.8 if batches else 3.6))
    figure.set_layout_engine("constrained")
    top, *bottom = figure.subfigures(2, 1, squeeze=False)[:, 0] if batches else [figure]
    axes = top.subplots(1, len(groups), squeeze=False)[0]
    for axis, group in zip(axes, groups, strict=True):
        _plot_times([r for r in results if (r["task"], r["batch_size"]) == group], colors, axis)
    axes[0].set_ylabel("median time, ms")
    for below in bottom:
        _plot_quality(report, batches, colors, below)
    figure.suptitle(report["environment"]["plan"], fontsize=11)
    handles, labels = [Patch(color=color) for color in colors.values()], [_label(report, name) for name in colors]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    with replacing_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _label(report: dict[str, Any], name: str) -> str:
    """The name of what was timed in a legend, of a plan with its size."""
    plans = report.get("plans", {})
    shown = _literal(report["environment"]["file"] if name == "vqdeploy" and len(plans) > 1 else name)
    return f"{shown}, {plans[name]['plan_mb']:.0f} MB" if name in plans else shown


def _literal(name: str) -> str:
    """A name for matplotlib, which would read what is between dollar signs as TeX."""
    return name.replace("$", r"\$")


def _plot_times(results: Sequence[dict[str, Any]], colors: Mapping[str, str], axis: "Axes") -> None:
    """A bar for each result of one task and batch size."""
    for i, result in enumerate(results):
        drawn = axis.bar(i, result["median_ms"], color=colors[result["name"]])
        axis.bar_label(drawn, fmt=lambda ms: f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}")
    axis.set_title(f"{results[0]['task']}, batch {results[0]['batch_size']}", fontsize=10)
    axis.margins(y=0.12)  # room for the label of the tallest bar
    axis.set_xticks([])
    axis.spines[["top", "right"]].set_visible(False)


def _plot_quality(
    report: dict[str, Any], batches: Sequence[int], colors: Mapping[str, str], figure: "FigureBase"
) -> None:
    """Divergence over images per second. A plan that has none, such as the first, is a line."""
    axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for axis, batch in zip(axes, batches, strict=True):
        for result in report["results"]:
            name, plan = result["name"], report["plans"].get(result["name"])
            if plan is None or (result["task"], result["batch_size"]) != ("generate", batch):
                continue
            if "divergence" not in plan:
                axis.axvline(result["images_per_s"], color=colors[name], linestyle="--")
            else:
                axis.plot(result["images_per_s"], max(plan["divergence"], _SMALLEST), "o", color=colors[name])
        axis.set(yscale="log", xlabel="images/s")
        axis.set_title(f"generate, batch {batch}", fontsize=10)
        axis.margins(0.2)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"KL divergence from {_literal(report['environment']['file'])}, nats")
