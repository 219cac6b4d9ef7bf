"""`vqdeploy bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vqdeploy.cli.options import Checkpoint, Device, Json, Threads, with_sampling_options
from vqdeploy.cli.output import finish, progress


@with_sampling_options
def bench(
    *,
    plans: Annotated[list[Path] | None, typer.Argument(help="More plans to compare: --compare A.plan B.plan.")] = None,
    engine: Annotated[Path | None, typer.Option(help="The plan; the first one to compare by default.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
    task: Annotated[
        list[str] | None, typer.Option(help="generate, encode or decode; repeatable; all by default.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, max=1 << 16, help="Images per call; repeatable; 1 by default.")
    ] = None,
    warm_up: Annotated[int, typer.Option("--warm-up", "--warmup", min=0, help="Untimed calls.")] = 1,
    iterations: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 5,
    baseline: Annotated[str, typer.Option(help="PyTorch baselines, comma-separated: eager,compile.")] = "",
    compare: Annotated[
        list[Path] | None, typer.Option(help="Another plan to time, of the same images and codes; repeatable.")
    ] = None,
    sampling: dict[str, Any],
    checkpoint: Checkpoint = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time of a step goes.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the times as a PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Time the tasks of a plan, and the same in PyTorch or of other plans."""
    from vqdeploy import bench as benchmark
    from vqdeploy.errors import VqdeployError
    from vqdeploy.files import check_other

    first, *others = [*([engine] if engine else []), *(compare or ()), *(plans or ())] or [None]
    if first is None or (plans and not compare):
        raise VqdeployError("no plan is given", expected="--engine A.plan, or --compare A.plan B.plan")
    if plot:
        if plot.suffix.lower() != ".png":
            raise VqdeployError("the times are drawn as a PNG", expected="--plot FILE.png", found=plot)
        check_other(plot, [first, *others])
        benchmark.check_plot()

    with progress("timing") as tell:
        report = benchmark.bench(
            first,
            tasks=task or (),
            batch_sizes=batch_size or (1,),
            warm_up=warm_up,
            iterations=iterations,
            baselines=[name for name in baseline.split(",") if name],
            checkpoint=checkpoint,
            profile=profile,
            options=sampling,
            progress=tell,
            device=device,
            threads=threads,
            compare=others,
        )
    finish(report, as_json, benchmark.table(report))
    if plot:
        benchmark.plot(report, plot)
