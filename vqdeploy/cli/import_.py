"""`vqdeploy import`."""

from pathlib import Path
from typing import Annotated

import typer

from vqdeploy.cli.options import Json
from vqdeploy.cli.output import finish, progress


def import_checkpoint(
    format_: Annotated[
        str | None,
        typer.Option(
            "--format", help="The public code that wrote the weights; guessed from their names when left out."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="File or folder of the tokenizer; left out where the prior's file has it too.")
    ] = None,
    prior: Annotated[
        list[Path] | None, typer.Option(help="File or folder of the prior; repeatable, one for each level.")
    ] = None,
    tokenizer_config: Annotated[
        Path | None, typer.Option(help="YAML or JSON of the tokenizer; the one beside the weights when left out.")
    ] = None,
    prior_config: Annotated[Path | None, typer.Option(help="The same of the prior.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Names of the classes, one a line, or JSON.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the weights where a file has their averages too.")] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint folder.")] = Path("imported"),
    as_json: Json = False,
) -> None:
    """Turn published weights into a checkpoint. Files are read as data: nothing in them is run."""
    from vqdeploy.convert.importer import import_checkpoint as run_import

    with progress("importing") as tell:
        tell(" and ".join(str(path) for path in (tokenizer, *(prior or ())) if path))
        result = run_import(output, tokenizer, prior or (), format_, tokenizer_config, prior_config, labels, raw)
    millions = ", ".join(f"{key} {count / 1e6:.1f}M" for key, count in result["parameters"].items())
    lines = [f"{result['checkpoint']}  {result['model']} from {' and '.join(result['formats'])}: {millions} parameters"]
    finish(result, as_json, "\n".join([*lines, *(f"note: {note}" for note in result["notes"])]))
