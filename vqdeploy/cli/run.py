"""`vqdeploy run`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vqdeploy.cli.options import Device, Engine, Json, Threads, with_sampling_options
from vqdeploy.cli.output import finish
from vqdeploy.errors import LONGEST, shown


@with_sampling_options
def run(
    *,
    engine: Engine,
    device: Device = "auto",
    threads: Threads = 0,
    task: Annotated[
        str | None,
        typer.Option(help="generate, reconstruct, inpaint, resample, encode, decode or features; generate by default."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Run one stage on the arrays of an NPZ, for plans of your own modules.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Class, by name or number; repeatable; the first ten by default.")
    ] = None,
    text_ids: Annotated[
        Path | None,
        typer.Option(help="For priors conditioned on texts: token ids [B, length], an NPY, or text_ids in an NPZ."),
    ] = None,
    text_features: Annotated[
        Path | None,
        typer.Option(
            help="For priors conditioned on features of texts: an NPY [B, tokens, width], or text_features in an NPZ."
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="generate: images per label or text, a row each; 8 by default."),
    ] = None,
    completions: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="inpaint, resample: completions per image, a row each; 1 by default."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of all random numbers; 0 by default.")] = None,
    sampling: dict[str, Any],
    inputs: Annotated[
        list[Path] | None, typer.Option("--input", help="Image, folder, codes or arrays; repeatable.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="inpaint: mask image, white where pixels are unknown.")] = None,
    mask_ratio: Annotated[
        float | None, typer.Option(help="inpaint: fraction of the codes to sample instead of a mask.")
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(help="decode, reconstruct: number of codes per position, or of maps, to use; coarse to fine."),
    ] = None,
    keep_levels: Annotated[
        int | None, typer.Option(help="resample: number of levels to keep, coarsest first; 1 by default.")
    ] = None,
    columns: Annotated[int | None, typer.Option(min=1, max=10_000, help="decode: images per row of the grid.")] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="features: the states after this many layers; by default those of every layer, from 0."),
    ] = None,
    film: Annotated[
        Path | None, typer.Option(help="generate: write the steps of the first image, as a GIF or a PNG strip.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Output file; SYSTEM-TASK.png by default, .npz for encode, features and stages."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate, reconstruct or complete images with a plan, or extract codes and features.

    Temperature, top-k and top-p take one number, or one for each depth or level: 0.9,0.95,1,1.
    """
    from vqdeploy.cli.tasks import Job
    from vqdeploy.cli.tasks import run as run_job

    task = task or ("stage" if stage else "generate")
    job = Job(
        engine=engine,
        device=device,
        threads=threads,
        task=task,
        stage=stage,
        labels=label or (),
        text_ids=text_ids,
        text_features=text_features,
        num_images=num_images,
        completions=completions,
        inputs=inputs or (),
        mask=mask,
        mask_ratio=mask_ratio,
        depth=depth,
        keep_levels=keep_levels,
        columns=columns,
        layer=layer,
        film=film,
        output=output,
        options=sampling if seed is None else {"seed": seed, **sampling},
    )
    result = run_job(job)
    finish(result, as_json, f"{shown(result['output'], LONGEST)}  {task} in {result['seconds']:.2f} s")
