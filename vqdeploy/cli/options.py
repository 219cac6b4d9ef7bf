"""Options shared by several verbs, and those generated from the table of sampling options."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vqdeploy.errors import VqdeployError
from vqdeploy.options import SAMPLING_OPTIONS, SamplingOption

if TYPE_CHECKING:
    from vqdeploy.systems import System

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr.")]
Model = Annotated[str, typer.Option(help="System, such as rqvae; see `vqdeploy models`.")]
Preset = Annotated[str, typer.Option(help="Named configuration; see `vqdeploy models`.")]
Engine = Annotated[Path, typer.Option(help="The plan.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Checkpoint folder; the shipped weights by default.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes CUDA for plans built for it.")]
Threads = Annotated[int, typer.Option(min=0, max=4096, help="CPU threads of the engine; 0 for one per core.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")]


def find_system(model: str, preset: str, checkpoint: Path | None) -> "System":
    """The system of a checkpoint folder, or the shipped one of a preset."""
    from vqdeploy import checkpoint as checkpoints

    return checkpoints.load(checkpoint) if checkpoint else checkpoints.default(model, preset)


def with_sampling_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Adds an option for each sampling option to a verb, which receives them as the dictionary `sampling`."""

    @functools.wraps(verb)
    def with_options(**arguments: Any) -> None:
        sampling = {option.name: _parsed(option, arguments.pop(option.name)) for option in SAMPLING_OPTIONS}
        verb(sampling=sampling, **arguments)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb).parameters.values():
        parameters += map(_parameter, SAMPLING_OPTIONS) if parameter.name == "sampling" else [parameter]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _parameter(option: SamplingOption) -> inspect.Parameter:
    """The parameter annotation for typer; lists such as `0.9,0.8,1,1` are parsed from text."""
    kind = str if option.per_depth else option.type
    text = f"{option.help} {option.values}." if option.choices else option.help
    annotation = Annotated[kind | None, typer.Option(*option.spellings, help=text)]  # type: ignore[valid-type]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parsed(option: SamplingOption, value: str | float | None) -> str | float | list[str | float] | None:
    """Parses a value, or a list with one per depth: `0.9` or `0.9,0.8,1,1`."""
    if not isinstance(value, str) or not option.per_depth:
        return value
    try:
        values = [option.type(part) for part in value.split(",")]
    except ValueError as error:
        expected = "comma-separated integers" if option.type is int else "comma-separated numbers"
        raise VqdeployError(f"{option.spellings[0]} is malformed", expected=expected, found=value) from error
    return values[0] if len(values) == 1 else values
