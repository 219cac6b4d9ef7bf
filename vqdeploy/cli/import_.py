"""`vqdeploy import`."""

from pathlib import Path
from typing import Annotated

import typer

from vqdeploy.cli.options import Json
from vqdeploy.cli.output import finish, progress


def import_checkpoint(
    format_: Annotated[
        str | None,
        typer.Option("--format", help="Code base that wrote the weights; detected from their names by default."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="File or folder of the tokenizer; not needed if the file of the prior has it.")
    ] = None,
    prior: Annotated[
        list[Path] | None, typer.Option(help="File or folder of the prior; repeatable, one per level.")
    ] = None,
    tokenizer_config: Annotated[
        Path | None,
        typer.Option(help="Configuration of the tokenizer, YAML or JSON; by default the one beside the weights."),
    ] = None,
    prior_config: Annotated[Path | None, typer.Option(help="The same for the prior.")] = None,
    labels: Annotated[Path | None, typer.Option(help="File with class names, one per line, or JSON.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use the raw weights instead of their moving averages.")] = False,
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
