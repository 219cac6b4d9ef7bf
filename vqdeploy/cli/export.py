"""`vqdeploy export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vqdeploy.cli.options import Checkpoint, Json, Model, Preset, find_system
from vqdeploy.cli.output import finish, progress, say
from vqdeploy.errors import VqdeployError


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parses height and width: `512` or `384x640`.

    Raises:
        VqdeployError: The text is neither.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(
        part.isascii() and part.isdecimal() and len(part) < 6 and 0 < int(part) < 1 << 16 for part in parts
    ):
        raise VqdeployError("--image-size is malformed", expected="512 or 384x640", found=text)
    return int(parts[0]), int(parts[-1])


def export(
    model: Model = "rqvae",
    preset: Preset = "tiny",
    checkpoint: Checkpoint = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            "--precision",
            help="Precision: fp32, fp16, int8 or int4; or one per stage, decode=fp16,step=int8; also caches=int8.",
        ),
    ] = "fp32",
    opset: Annotated[int, typer.Option(help="ONNX opset.")] = 24,
    image_size: Annotated[
        str | None, typer.Option(help="Image size, for convolutional tokenizers: 512, or height x width, 384x640.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare the package with PyTorch.")] = True,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Output folder; MODEL-onnx by default.")] = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to an ONNX package."""
    from vqdeploy.export.package import export as export_package

    system = find_system(model, preset, checkpoint)
    folder = output or Path(f"{system.config.model}-onnx")
    size = parse_size(image_size)
    with progress("exporting") as tell:
        export_package(system, folder, dtype, opset, tell, size)
    result: dict[str, Any] = {"package": str(folder)}
    if verify:
        from vqdeploy.verify import table, verify_package

        with progress("verifying") as tell:
            report = result["verify"] = verify_package(folder, system, tell)
        say(table(report))
    finish(result, as_json, str(folder))
    if verify and not report["passed"]:
        raise typer.Exit(1)
