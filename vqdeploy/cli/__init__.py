"""The command line. Each verb imports what it needs: `vqdeploy --help` loads neither torch nor an engine library."""

import contextlib
import json
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vqdeploy.errors import VqdeployError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Take a vector-quantized image generator from PyTorch to one deployable file, and run it.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr.")]
Model = Annotated[str, typer.Option(help="System, such as rqvae; see `vqdeploy models`.")]
Preset = Annotated[str, typer.Option(help="Named configuration; see `vqdeploy models`.")]
Engine = Annotated[Path, typer.Option(help="The plan.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Checkpoint folder; the shipped weights when left out.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto is CUDA for plans that were built for it.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]


def main() -> None:
    """Entry point: errors become one sentence and an exit code, without a traceback unless `-vv` is given."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as clean as an interrupt
    try:
        app()
    except VqdeployError as error:
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("vqdeploy"):
            raise
        _fail(f'this needs the package {error.name}. Fix: pip install ".[dev]" in the checkout', 2)
    except MemoryError:
        _fail("the request does not fit into memory.", 2)
    except OSError as error:
        _fail(f"{error.filename or 'a file'} cannot be read or written ({error.strerror or error}).", 2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail(message: str, exit_code: int) -> NoReturn:
    if logging.getLogger("vqdeploy").isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _version(value: bool) -> None:
    if value:
        print(version("vqdeploy"))
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[int, typer.Option("-v", "--verbose", count=True, help="Tell more; -vv shows tracebacks.")] = 0,
    show_version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Version.")] = False,
) -> None:
    """Options of every verb."""
    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("vqdeploy").setLevel(level)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _finish(result: dict[str, Any], as_json: bool, message: str) -> None:
    print(json.dumps(result) if as_json else message)


@contextlib.contextmanager
def _progress(verb: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that names what is being worked on."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(verb) as status:

        def update(name: str) -> None:
            status.update(f"{verb} {name}")
            if not console.is_terminal:
                _say(f"{verb} {name}")

        yield update


def _system(model: str, preset: str, checkpoint: Path | None) -> Any:
    from vqdeploy import checkpoint as checkpoints

    return checkpoints.load(checkpoint) if checkpoint else checkpoints.default(model, preset)


@app.command()
def models(as_json: Json = False) -> None:
    """List systems and presets, and which weights are shipped."""
    from vqdeploy.checkpoint import SHIPPED
    from vqdeploy.systems import SYSTEMS

    listing = {
        model: {
            name: "trained" if (SHIPPED / model / name / "config.json").exists() else "random"
            for name in system.presets
        }
        for model, system in SYSTEMS.items()
    }
    lines = [
        f"{model:8} {name:16} {weights} weights" for model, named in listing.items() for name, weights in named.items()
    ]
    _finish(listing, as_json, "\n".join(lines))


@app.command()
def train(
    model: Model = "rqvae",
    preset: Preset = "tiny",
    data: Annotated[
        str, typer.Option(help="digits, photos, or a folder of images with one subfolder a class.")
    ] = "digits",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the tokenizer; the recipe's when left out.")
    ] = None,
    prior_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the prior; the recipe's when left out.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step; the recipe's when left out.")] = None,
    perceptual_weight: Annotated[float, typer.Option(min=0, help="Weight of LPIPS.")] = 0.0,
    adversarial_weight: Annotated[float, typer.Option(min=0, help="Weight of the discriminator.")] = 0.0,
    logit_laplace_weight: Annotated[float, typer.Option(min=0, help="Weight of the logit-Laplace loss.")] = 0.0,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted training stopped.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Checkpoint folder.")] = None,
    as_json: Json = False,
) -> None:
    """Train a tokenizer and its prior."""
    from vqdeploy.training import train as run_training

    folder = output or Path(f"{model}-{preset}")
    metrics = run_training(
        model=model,
        preset=preset,
        data=data,
        steps=steps,
        prior_steps=prior_steps,
        batch_size=batch_size,
        seed=seed,
        output=folder,
        resume=resume,
        perceptual_weight=perceptual_weight,
        adversarial_weight=adversarial_weight,
        logit_laplace_weight=logit_laplace_weight,
    )
    _finish({"checkpoint": str(folder), **metrics}, as_json, f"{json.dumps(metrics, indent=2)}\n{folder}")


@app.command()
def export(
    model: Model = "rqvae",
    preset: Preset = "tiny",
    checkpoint: Checkpoint = None,
    dtype: Annotated[
        str, typer.Option("--dtype", "--precision", help="Precision of the graphs: fp32 or fp16.")
    ] = "fp32",
    opset: Annotated[int, typer.Option(help="ONNX opset.")] = 24,
    image_size: Annotated[
        str | None, typer.Option(help="512, or height x width as 384x640, for tokenizers of convolutions.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare the package with PyTorch.")] = True,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder; MODEL-onnx when left out.")] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as an ONNX package."""
    from vqdeploy.export.package import export as export_package

    system = _system(model, preset, checkpoint)
    folder = output or Path(f"{system.config.model}-onnx")
    with _progress("exporting") as progress:
        export_package(system, folder, dtype, opset, progress, _size(image_size))
    result: dict[str, Any] = {"package": str(folder)}
    if verify:
        from vqdeploy.verify import table, verify_package

        with _progress("verifying") as progress:
            report = result["verify"] = verify_package(folder, system, progress)
        _say(table(report))
    _finish(result, as_json, str(folder))
    if verify and not report["passed"]:
        raise typer.Exit(1)


def _size(text: str | None) -> tuple[int, int] | None:
    """Height and width: `512` or `384x640`."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 0 < int(part) < 1 << 16 for part in parts):
        raise VqdeployError("--image-size is malformed", expected="512 or 384x640", found=text)
    return int(parts[0]), int(parts[-1])


@app.command()
def build(
    package: Annotated[Path, typer.Argument(help="Folder that `vqdeploy export` wrote.")] = Path("rqvae-onnx"),
    backend: Annotated[str, typer.Option(help="onnxrt, tensorrt-rtx or tensorrt.")] = "onnxrt",
    device: Annotated[str, typer.Option(help="onnxrt: what the plan is for, cpu or cuda.")] = "cpu",
    opt_batch: Annotated[int, typer.Option(min=1, help="TensorRT: batch that the engines are tuned for.")] = 1,
    max_batch: Annotated[
        int, typer.Option(min=1, max=4096, help="Largest batch of one call; larger requests are split.")
    ] = 64,
    plugin: Annotated[
        str, typer.Option(help="auto, on or off: for TensorRT, whether our kernels run the quantizers.")
    ] = "auto",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File; MODEL.plan when left out.")] = None,
    as_json: Json = False,
) -> None:
    """Build an ONNX package into one plan."""
    from vqdeploy.engines.build import build as build_plan
    from vqdeploy.engines.package import read_manifest
    from vqdeploy.runtime.manifest import SizeRange

    plan = output or Path(f"{read_manifest(package).name}.plan")
    with _progress("building") as progress:
        batch = SizeRange(1, opt_batch, max_batch)
        manifest = build_plan(package, plan, backend, batch, progress, plugin=plugin, device=device)
    size = plan.stat().st_size
    result = {"plan": str(plan), "backend": backend, "builder": manifest.builder, "bytes": size}
    _finish(result, as_json, f"{plan}  {size / 1e6:.1f} MB for {backend}")


def _numbers(option: str, text: str | None, kind: type) -> Any:
    """One number, or a list of one for each depth: `0.9` or `0.9,0.8,1,1`."""
    if text is None:
        return None
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError as error:
        expected = "whole numbers split by commas" if kind is int else "numbers split by commas"
        raise VqdeployError(f"{option} is malformed", expected=expected, found=text) from error
    return values[0] if len(values) == 1 else values


@app.command()
def run(
    engine: Engine,
    device: Device = "auto",
    task: Annotated[
        str, typer.Option(help="generate, reconstruct, inpaint, resample, encode, decode or features.")
    ] = "generate",
    label: Annotated[list[str] | None, typer.Option(help="Class, by name or number; repeatable.")] = None,
    num_images: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000, help="Images of each label, which make a row; inpaint, resample: completions of each."
        ),
    ] = None,
    seed: Seed = 0,
    temperature: Annotated[str | None, typer.Option(help="Divides the logits; 0 takes the likeliest code.")] = None,
    top_k: Annotated[str | None, typer.Option(help="Keep the k likeliest codes; 0 keeps all.")] = None,
    top_p: Annotated[str | None, typer.Option(help="Keep the likeliest codes up to this probability.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", "--num-inference-steps", help="Engine calls of a masked prior.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="How many codes stay masked: cosine, arccos, linear, ...; or halton."),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", "--cfg-scale", help="movq, vitvqgan, vqgan: pull to the label; 1 is none."),
    ] = None,
    choice_temperature: Annotated[
        float | None, typer.Option(help="Noise on the confidence by which a masked prior keeps codes.")
    ] = None,
    inputs: Annotated[list[Path] | None, typer.Option("--input", help="Image, folder or codes; repeatable.")] = None,
    mask: Annotated[Path | None, typer.Option(help="inpaint: image that is white where pixels are unknown.")] = None,
    mask_ratio: Annotated[float | None, typer.Option(help="inpaint: share of the codes to draw anew.")] = None,
    depth: Annotated[
        int | None,
        typer.Option(help="decode, reconstruct: use this many codes a position; resample: keep this many levels."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="features: behind this many layers of the prior; all when left out.")
    ] = None,
    film: Annotated[
        Path | None, typer.Option(help="generate: write the steps of the first image as a PNG strip or a GIF.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File; SYSTEM-TASK.png when left out, .npz for encode and features."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate, reconstruct or complete images with a plan, or take their codes and features.

    Temperature, top-k and top-p take one number, or one for each depth or level: 0.9,0.95,1,1.
    """
    from vqdeploy.run import Job
    from vqdeploy.run import run as run_job

    options = {
        "temperature": _numbers("--temperature", temperature, float),
        "top_k": _numbers("--top-k", top_k, int),
        "top_p": _numbers("--top-p", top_p, float),
        "steps": steps,
        "schedule": schedule,
        "guidance_scale": guidance_scale,
        "choice_temperature": choice_temperature,
    }
    job = Job(
        engine=engine,
        device=device,
        task=task,
        labels=label or (),
        num_images=num_images,
        inputs=inputs or (),
        mask=mask,
        mask_ratio=mask_ratio,
        depth=depth,
        layer=layer,
        film=film,
        output=output,
        options={"seed": seed, **options},
    )
    result = run_job(job)
    _finish(result, as_json, f"{result['output']}  {task} in {result['seconds']:.2f} s")


@app.command()
def verify(engine: Engine, device: Device = "auto", checkpoint: Checkpoint = None, as_json: Json = False) -> None:
    """Compare every stage of a plan, and whole generations, with PyTorch; exit 1 when a check fails."""
    from vqdeploy import checkpoint as checkpoints
    from vqdeploy.verify import table
    from vqdeploy.verify import verify as verify_plan

    system = checkpoints.load(checkpoint) if checkpoint else None
    with _progress("verifying") as progress:
        report = verify_plan(engine, system, progress, device)
    _finish(report, as_json, table(report))
    if not report["passed"]:
        raise typer.Exit(1)


@app.command()
def bench(
    engine: Engine,
    device: Device = "auto",
    task: Annotated[
        list[str] | None, typer.Option(help="generate, encode or decode; repeatable; all by default.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Images a call; repeatable; 1 by default.")
    ] = None,
    warm_up: Annotated[int, typer.Option("--warm-up", "--warmup", min=0, help="Calls that are not counted.")] = 1,
    iterations: Annotated[int, typer.Option(min=1, help="Calls that are counted.")] = 5,
    baseline: Annotated[str, typer.Option(help="PyTorch baselines, split by commas: eager,compile.")] = "",
    steps: Annotated[int | None, typer.Option(help="generate: engine calls of a masked prior.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--cfg-scale", help="generate: 1 is no guidance.")
    ] = None,
    checkpoint: Checkpoint = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time of a step goes.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the times as a PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Time the tasks of a plan, and the same in PyTorch."""
    from vqdeploy import bench as benchmark

    baselines = [name for name in baseline.split(",") if name]
    sizes = batch_size or (1,)
    with _progress("timing") as progress:
        report = benchmark.bench(
            engine,
            task or (),
            sizes,
            warm_up,
            iterations,
            baselines,
            checkpoint,
            profile,
            {"steps": steps, "guidance_scale": guidance_scale},
            progress,
            device,
        )
    if plot:
        benchmark.plot(report, plot)
    _finish(report, as_json, benchmark.table(report))


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="The plan.")],
    extract: Annotated[Path | None, typer.Option(help="Write the engines into this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Show the manifest, stages, sizes and digests of a plan without opening an engine."""
    from vqdeploy.runtime.bundle import Bundle

    bundle = Bundle(file)
    extracted = [str(path) for path in bundle.extract(extract)] if extract else []
    manifest = bundle.manifest
    on = f" on {', '.join(manifest.targets)}" if manifest.targets else ""
    lines = [
        f"{file}: {manifest.name} {manifest.provenance.preset or ''} {manifest.precision} for {manifest.backend}{on}",
        f"built by {manifest.builder}, exported by {manifest.provenance.producer}, opset {manifest.opset}",
        f"checkpoint sha256 {manifest.provenance.checkpoint}",
    ]
    for stage in manifest.stages:
        lines.append(f"stage {stage.name} ({stage.file})")
        tensors = [("in ", info) for info in stage.inputs] + [("out", info) for info in stage.outputs]
        lines += [f"  {kind} {info.name:18} {info.dtype:8} {list(info.shape)}" for kind, info in tensors]
        lines += [f"  our kernel runs {node}" for node in stage.plugins]
    sizes = bundle.sizes()
    lines += [f"{sizes[name]:>12} bytes  sha256 {digest}  {name}" for name, digest in manifest.members.items()]
    _finish({**manifest.to_dict(), "sizes": sizes, "extracted": extracted}, as_json, "\n".join(lines + extracted))


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions and devices, for bug reports."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError

    packages = {}
    for name in (
        "vqdeploy",
        "torch",
        "onnx",
        "onnxruntime",
        "onnxruntime-gpu",
        "tensorrt-rtx",
        "tensorrt",
        "cuda-bindings",
        "triton",
        "numpy",
    ):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    facts = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": _gpu(),
        **packages,
    }
    _finish(facts, as_json, "\n".join(f"{name:16} {value}" for name, value in facts.items()))


def _gpu() -> str:
    """The kind of GPU that plans can use here, or why there is none."""
    try:
        from vqdeploy.runtime import device

        device.check()
        return device.compute_capability()
    except VqdeployError as error:
        return str(error).partition(". Fix")[0]


from vqdeploy.cli import import_ as import_  # noqa: E402  (it needs the app)
