"""`vqdeploy verify`."""

import typer

from vqdeploy.cli.options import Checkpoint, Device, Engine, Json, Threads
from vqdeploy.cli.output import finish, progress


def verify(
    engine: Engine, device: Device = "auto", threads: Threads = 0, checkpoint: Checkpoint = None, as_json: Json = False
) -> None:
    """Compare every stage of a plan, and whole generations, with PyTorch; exit 1 when a check fails."""
    from vqdeploy import checkpoint as checkpoints
    from vqdeploy.verify import table
    from vqdeploy.verify import verify as verify_plan

    system = checkpoints.load(checkpoint) if checkpoint else None
    with progress("verifying") as tell:
        report = verify_plan(engine, system, tell, device, threads=threads)
    finish(report, as_json, table(report))
    if not report["passed"]:
        raise typer.Exit(1)
