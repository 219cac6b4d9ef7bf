"""`vqdeploy build`."""

from pathlib import Path
from typing import Annotated

import typer

from vqdeploy.cli.options import Json
from vqdeploy.cli.output import finish, progress


def build(
    package: Annotated[Path, typer.Argument(help="Folder that `vqdeploy export` wrote.")] = Path("rqvae-onnx"),
    backend: Annotated[str, typer.Option(help="onnxrt, tensorrt-rtx or tensorrt.")] = "onnxrt",
    device: Annotated[str | None, typer.Option(help="onnxrt: target of the plan, cpu or cuda; cpu by default.")] = None,
    opt_batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Batch size that the plan is tuned for; 1 by default. For onnxrt: of matrix products in int8."
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, max=4096, help="Largest batch of an engine call; larger requests are split.")
    ] = 64,
    plugin: Annotated[
        str | None,
        typer.Option(help="TensorRT: whether our kernels run the quantizers, auto, on or off; auto by default."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Output file; SYSTEM.plan by default.")] = None,
    as_json: Json = False,
) -> None:
    """Build an ONNX package into one plan."""
    from vqdeploy.engines.build import build as build_plan
    from vqdeploy.engines.package import read_manifest
    from vqdeploy.runtime.manifest import SizeRange

    plan = output or Path(f"{read_manifest(package).name}.plan")
    with progress("building") as tell:
        batch = SizeRange(1, opt_batch or 1, max_batch)
        manifest = build_plan(package, plan, backend, batch, tell, plugin=plugin, device=device)
    size = plan.stat().st_size
    result = {"plan": str(plan), "backend": backend, "builder": manifest.builder, "bytes": size}
    finish(result, as_json, f"{plan}  {size / 1e6:.1f} MB for {backend}")
