"""`vqdeploy tokenize`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from vqdeploy.cli.options import Device, Engine, Json
from vqdeploy.cli.output import counting, finish


def tokenize(
    *,
    engine: Engine,
    data: Annotated[
        str,
        typer.Option("--input", help="An image folder, tars of WebDataset or Parquet files; see docs/tokenize.md."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the codes.")],
    device: Device = "auto",
    workers: Annotated[int, typer.Option(min=0, max=4096, help="Processes; 0 for one per core, or one on a GPU.")] = 0,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster to run on; auto finds one on this machine.")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Images per shard, for image folders.")] = 1024,
    as_json: Json = False,
) -> None:
    """Write the codes of a data set as Parquet, to train a prior on.

    The same command again continues after an interrupt.
    """
    from vqdeploy.tokenize import Done
    from vqdeploy.tokenize import tokenize as run

    start, made = time.perf_counter(), 0
    with counting("tokenizing", "shards") as count:

        def report(done: Done, number: int, total: int) -> None:
            nonlocal made
            made += done.images
            rate = made / (time.perf_counter() - start)
            count(number, total, f"{made:,} images, {rate:,.1f} a second")

        summary = run(
            engine, data, output, device=device, workers=workers, ray=ray, shard_size=shard_size, report=report
        )
    seconds = time.perf_counter() - start
    result = {"output": str(output), "seconds": round(seconds, 4), "encoded": made, **summary.to_dict()}
    unread = f", {summary.errors} could not be read: see _errors.jsonl" if summary.errors else ""
    message = f"{output}  {summary.images} images in {summary.shards} shards{unread}"
    finish(result, as_json, message)
