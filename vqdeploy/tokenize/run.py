"""A data set of images to a folder of codes: on the processes of one machine, or on a Ray cluster.

Each part of the data becomes one shard, written atomically, so that a run that was killed goes on where it was.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path

from vqdeploy import shards
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import check_apart, check_outside, check_replaceable, named
from vqdeploy.processes import safe_path
from vqdeploy.runtime import load
from vqdeploy.runtime.pipeline import open_plan
from vqdeploy.runtime.threads import cores
from vqdeploy.shards import Origin, Summary
from vqdeploy.tokenize import inputs
from vqdeploy.tokenize.part import Done, Job, origin_of, tokenize_part
from vqdeploy.tokenize.samples import Part, digest

Report = Callable[[Done, int, int], object]
"""Called with a part, the number of parts that are done, and that of all."""


def tokenize(
    engine: Path,
    data: str,
    codes: Path,
    *,
    device: str = "auto",
    workers: int = 0,
    ray: str | None = None,
    shard_size: int = 1024,
    report: Report = lambda done, parts, total: None,
) -> Summary:
    """Writes the codes of all images of a data set; shards that are there already are kept.

    Args:
        engine: The plan.
        data: See `vqdeploy.tokenize.inputs.find`.
        codes: Folder of the codes; see `vqdeploy.shards`.
        device: As for `vqdeploy.load`.
        workers: Processes on this machine; 0 for one per core, or one on a GPU.
        ray: Address of a Ray cluster whose machines all see the plan, the data and the folder of codes by these paths;
            None for this machine.
        shard_size: Images of a shard, for image folders.
        report: Called after each part.

    Returns:
        What the folder holds.

    Raises:
        VqdeployError: The plan has no tokenizer, there is no such data, or the folder holds codes of other data or of
            another plan.
        ArtifactError: A tar or Parquet file is damaged, or no image could be read; the other shards are written.
    """
    codes = named(codes)
    if ray is not None:  # its processes run in another folder
        engine, codes, data = engine.absolute(), codes.absolute(), str(Path(data).absolute())
    check_outside(codes, [engine, Path(data)])
    check_apart(codes, [Path(data)])
    check_replaceable(codes, shards.FILES)
    origin, on_gpu = _open(engine, device, here=ray is None)
    parts = inputs.find(data, shard_size)
    missing = _missing(codes, parts, origin)
    if missing:
        (codes / shards.SUMMARY).unlink(missing_ok=True)
    failures = []
    job = Job(engine, device, codes)
    run = _locally(job, missing, workers or (1 if on_gpu else cores()))
    if ray is not None:
        from vqdeploy.tokenize.cluster import run_on_ray

        run = run_on_ray(job, missing, ray, on_gpu)
    for number, done in enumerate(run, len(parts) - len(missing) + 1):
        report(done, number, len(parts))
        failures += [done.failure] if done.failure else []
    if failures:
        others = f"; so did {len(failures) - 1} more parts of the data" if len(failures) > 1 else ""
        raise ArtifactError(failures[0].removesuffix(".") + others, fix="repair or remove it, and run this again")
    summary = shards.finish(codes)
    if not summary.images:
        raise ArtifactError(f"no image of {data} could be read", fix=f"see {codes / shards.ERRORS}")
    return summary


def _open(engine: Path, device: str, *, here: bool) -> tuple[Origin, bool]:
    """What the codes are made with, and whether on a GPU; `here`, where the plan must open on this machine."""
    if here:
        with load(engine, device) as pipeline:
            return origin_of(pipeline.manifest), pipeline.device == "cuda"
    bundle = open_plan(engine)
    bundle.close()
    return origin_of(bundle.manifest), device != "cpu" and bool(bundle.manifest.targets)


def _missing(codes: Path, parts: Sequence[Part], origin: Origin) -> list[Part]:
    """The parts without a shard, after a check that all shards belong to this data and this plan."""
    elsewhere = "name another folder with -o"
    present, expected = shards.names(codes), {f"{part.name}{shards.SUFFIX}": part for part in parts}
    for name in present:
        info, _ = shards.read_info(codes / name)
        if info.origin != origin:
            plans = f"plan {origin.plan[:12]}", info.origin.plan[:12]
            raise VqdeployError(
                f"{codes} holds codes of another plan", expected=plans[0], found=plans[1], fix=elsewhere
            )
        part = expected.get(name)
        if part is None or (info.input, info.classes) != (digest(part), part.classes):
            raise VqdeployError(f"{codes} holds codes of other data, or of shards of another size", fix=elsewhere)
    return [part for name, part in expected.items() if name not in present]


def _locally(job: Job, parts: Sequence[Part], workers: int) -> Iterator[Done]:
    """Runs parts in processes of this machine, which end when this one does, whatever ends it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    threads = max(cores() // workers, 1)
    with (
        safe_path(),
        receiver,
        sender,
        ProcessPoolExecutor(min(workers, len(parts) or 1), context, _follow, (receiver,)) as pool,
    ):
        try:
            for future in as_completed([pool.submit(tokenize_part, job, part, threads) for part in parts]):
                yield future.result()
        except BrokenProcessPool as error:
            fix = "run this again, with fewer --workers if the memory was short"
            raise VqdeployError("a process was killed", fix=fix) from error
        except BaseException:
            sender.close()
            raise


def _follow(receiver: Connection) -> None:
    """In a worker: ends it as soon as the other end of a pipe is closed, at the latest when its process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it too, and closes the pipe

    def wait() -> None:
        receiver.poll(None)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
