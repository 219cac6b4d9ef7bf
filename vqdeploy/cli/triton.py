"""`vqdeploy triton`."""

from pathlib import Path
from typing import Annotated

import typer

from vqdeploy.cli.options import Json
from vqdeploy.cli.output import finish


def triton(
    plan: Annotated[Path, typer.Argument(help="The plan.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the model repository.")],
    as_json: Json = False,
) -> None:
    """Write a plan as a model repository of NVIDIA's Triton Inference Server."""
    from vqdeploy.triton.repository import write

    models = write(plan, output)
    finish({"output": str(output), "models": models}, as_json, f"{output}  models {', '.join(models)}")
