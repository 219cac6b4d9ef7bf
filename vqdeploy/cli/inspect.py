"""`vqdeploy inspect`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vqdeploy.cli.options import Json
from vqdeploy.cli.output import finish
from vqdeploy.errors import shown

_ELSEWHERE = (
    "format",
    "name",
    "precision",
    "opset",
    "backend",
    "builder",
    "targets",
    "stages",
    "provenance",
    "members",
)
"""Fields with a line format of their own."""

_SHARE = 4  # short values per line


def inspect(
    file: Annotated[Path, typer.Argument(help="The plan.")],
    extract: Annotated[Path | None, typer.Option(help="Write the engines into this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Show the manifest of a plan, with sizes and digests, without opening an engine."""
    from vqdeploy.runtime.bundle import Bundle

    bundle = Bundle(file)
    extracted = [str(path) for path in bundle.extract(extract)] if extract else []
    manifest, sizes = bundle.manifest.to_dict(), bundle.sizes()
    lines = [shown(file) + ": " + " ".join(_head(manifest)), *_body(manifest, sizes), *map(shown, extracted)]
    finish({**manifest, "sizes": sizes, "extracted": extracted}, as_json, "\n".join(lines))


def _head(manifest: dict[str, Any]) -> Iterator[str]:
    preset = manifest["provenance"]["preset"]
    yield from (shown(name) for name in (manifest["name"], preset, manifest["precision"]) if name)
    yield f"for {shown(manifest['backend'])}"
    if manifest["targets"]:
        yield f"on {shown(', '.join(manifest['targets']))}"


def _body(manifest: dict[str, Any], sizes: dict[str, int]) -> Iterator[str]:
    yield f"built by {shown(manifest['builder'])}, opset {shown(manifest['opset'])}, format {shown(manifest['format'])}"
    for name, value in manifest.items():
        if name not in _ELSEWHERE:
            yield from _tree(name, value)
    for stage in manifest["stages"]:
        yield from _stage(stage)
    yield from _tree("provenance", manifest["provenance"])
    for name, size in sizes.items():
        digest = f"sha256 {shown(manifest['members'][name])}  " if name in manifest["members"] else ""
        yield f"{size:>12} bytes  {digest}{shown(name)}"


def _stage(stage: dict[str, Any]) -> Iterator[str]:
    """Lines for a stage: file, inputs, outputs and other fields."""
    yield f"stage {shown(stage['name'])} ({shown(stage['file'])})"
    for kind, tensors in (("in ", stage["inputs"]), ("out", stage["outputs"])):
        for info in tensors:
            yield f"  {kind} {shown(info['name']):18} {shown(info['dtype']):8} {shown(list(info['shape']))}"
    yield from (f"  our kernel runs {shown(node)}" for node in stage["plugins"])
    for name, value in stage.items():
        if name == "weights":
            yield f"  weights {len(value)}"
        elif name not in ("name", "file", "inputs", "outputs", "plugins") and value:
            yield from _tree(name, value, 1)


def _tree(name: object, value: object, depth: int = 0) -> Iterator[str]:
    """Lines for a part of the manifest, one per value; a few short values share one."""
    start = "  " * depth + shown(name)
    if isinstance(value, dict) and (len(value) > _SHARE or any(map(_nests, value.values()))):
        yield start
        for key, item in value.items():
            yield from _tree(key, item, depth + 1)
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _tree(f"{name} {number}", item, depth)
    else:
        yield f"{start:28} {_listed(value)}"


def _nests(value: object) -> bool:
    return isinstance(value, dict | list | tuple)


def _listed(value: object) -> str:
    """Values on one line, nested lists in brackets."""
    if isinstance(value, dict):
        return shown(", ".join(f"{key} {item}" for key, item in value.items()) or "none")
    if isinstance(value, list | tuple):
        return shown(", ".join(str(list(item)) if isinstance(item, tuple) else str(item) for item in value) or "none")
    return "none" if value is None else shown(value)
