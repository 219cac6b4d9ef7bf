"""`vqdeploy train`."""

from pathlib import Path
from typing import Annotated

import typer

from vqdeploy.cli.options import Json, Model, Preset, Seed
from vqdeploy.cli.output import finish
from vqdeploy.files import to_json


def train(
    model: Model = "rqvae",
    preset: Preset = "tiny",
    data: Annotated[
        str,
        typer.Option(
            help="digits, photos, a folder of images with one subfolder per class, or codes of vqdeploy tokenize."
        ),
    ] = "digits",
    held_out: Annotated[
        Path | None,
        typer.Option(help="Image folder with the same classes to measure on.  [default: a tenth of the images]"),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Checkpoint folder whose tokenizer is kept: only a prior is trained.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the tokenizer; those of the recipe by default.")
    ] = None,
    prior_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the prior; those of the recipe by default.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per step; those of the recipe by default.")
    ] = None,
    perceptual_weight: Annotated[float, typer.Option(min=0, help="Weight of LPIPS.")] = 0.0,
    adversarial_weight: Annotated[float, typer.Option(min=0, help="Weight of the discriminator.")] = 0.0,
    logit_laplace_weight: Annotated[float, typer.Option(min=0, help="Weight of the logit-Laplace loss.")] = 0.0,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")] = False,
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
        held_out=held_out,
        steps=steps,
        prior_steps=prior_steps,
        batch_size=batch_size,
        seed=seed,
        output=folder,
        resume=resume,
        tokenizer=tokenizer,
        perceptual_weight=perceptual_weight,
        adversarial_weight=adversarial_weight,
        logit_laplace_weight=logit_laplace_weight,
    )
    finish({"checkpoint": str(folder), **metrics}, as_json, f"{to_json(metrics, indent=2)}\n{folder}")
