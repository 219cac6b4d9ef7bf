"""Load on a server that this tool starts itself, on loopback, with a bounded number of requests.

`python tools/load.py speed PLAN` compares a lone request with `Pipeline.generate`, in turns, and counts the code maps
per second of one request at a time and of many. `python tools/load.py soak PLAN` sends requests of all kinds, some of
them malformed, and some whose client leaves, and reads memory and file handles of the server as it goes.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import re
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from vqdeploy.runtime import Pipeline, load

GENERATE = "/v1/images/generations"


@contextlib.contextmanager
def server(plan: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Address and process of `vqdeploy serve`; it must end with 0 when it is asked to."""
    command = ["vqdeploy", "serve", str(plan), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            line = process.stderr.readline() if process.stderr else ""
            address = re.search(r"http://\S+", line)
            if not address:
                raise SystemExit(f"the server did not start: {line}")
            yield address[0], process.pid
        finally:
            process.terminate()
    if process.returncode:
        raise SystemExit(f"the server ended with {process.returncode}")


def client(address: str) -> httpx.AsyncClient:
    """A client without limits of its own."""
    return httpx.AsyncClient(base_url=address, timeout=600, limits=httpx.Limits(max_connections=None))


def speed(plan: Path, concurrency: int, turns: int, threads: int) -> dict[str, object]:
    """Latency of a lone request against `Pipeline.generate`, and code maps per second by number of requests."""
    pipeline = load(plan, threads=threads)
    with server(plan, "--slots", str(concurrency), "--threads", str(threads)) as (address, _):
        lone = asyncio.run(_in_turns(pipeline, address, turns))
        few, many = asyncio.run(_throughput(address, concurrency, turns))
    return {
        "plan": plan.name,
        "precision": pipeline.manifest.precision,
        "generate_s": round(statistics.median(alone for alone, _ in lone), 4),
        "request_s": round(statistics.median(served for _, served in lone), 4),
        "request_over_generate": round(statistics.median(served / alone for alone, served in lone), 4),
        "code_maps_per_s_at_1": round(few, 3),
        f"code_maps_per_s_at_{concurrency}": round(many, 3),
        "ratio": round(many / few, 2),
    }


async def _in_turns(pipeline: Pipeline, address: str, turns: int) -> list[tuple[float, float]]:
    """Seconds of the same PNG by the pipeline, as `run` makes it, and by a request; a first pair warms up."""
    times = []
    async with client(address) as asking:
        for turn in range(turns + 1):
            start = time.perf_counter()
            drawn = pipeline.generate([0], seed=turn)
            Image.fromarray(drawn.images[0]).save(io.BytesIO(), "png")
            middle = time.perf_counter()
            reply = await asking.post(GENERATE, json={"label": 0, "seed": turn})
            times.append((middle - start, time.perf_counter() - middle))
            if reply.raise_for_status().json()["data"][0]["codes"] != drawn.codes[0].tolist():
                raise SystemExit(f"the codes of seed {turn} differ")
    return times[1:]


async def _throughput(address: str, concurrency: int, turns: int) -> tuple[float, float]:
    """Code maps per second of one request at a time, and of as many as there are slots."""

    async def ask(seed: int) -> None:
        body = {"label": 0, "seed": seed, "response_format": "codes"}
        (await asking.post(GENERATE, json=body)).raise_for_status()

    async with client(address) as asking:
        await asyncio.gather(*map(ask, range(concurrency)))  # makes all buffers
        start = time.perf_counter()
        for seed in range(turns):
            await ask(seed)
        middle = time.perf_counter()
        rounds = max(1, turns // 4)

        async def ask_again(first: int) -> None:
            for turn in range(rounds):
                await ask(first + turn * concurrency)

        await asyncio.gather(*map(ask_again, range(concurrency)))
        end = time.perf_counter()
    return turns / (middle - start), rounds * concurrency / (end - middle)


def soak(plan: Path, requests: int, concurrency: int) -> dict[str, object]:
    """Memory and file handles of a server over many requests."""
    with server(plan, "--slots", "8", "--max-queue", str(concurrency)) as (address, process):
        readings, statuses = asyncio.run(_soak(address, process, requests, concurrency))
    settled = readings[len(readings) // 5 :]  # after the first fifth everything has been used
    return {
        "requests": requests,
        "statuses": dict(statuses),
        "readings": readings,
        "megabytes": [min(r["megabytes"] for r in settled), max(r["megabytes"] for r in settled)],
        "handles": [min(r["handles"] for r in settled), max(r["handles"] for r in settled)],
    }


async def _soak(
    address: str, process: int, requests: int, concurrency: int
) -> tuple[list[dict[str, float]], Counter[str]]:
    readings, statuses = [], Counter[str]()
    numbers = iter(range(requests))
    async with client(address) as asking:
        model = (await asking.get("/v1/models")).json()["data"][0]
        image = _image(*map(int, model["size"].split("x")))

        async def work() -> None:
            for number in numbers:
                try:
                    status = await _one(asking, number, image, model)
                except httpx.TimeoutException:
                    status = "left"
                statuses[status] += 1
                if statuses.total() % max(1, requests // 20) == 0:
                    readings.append({"requests": statuses.total(), **_usage(process)})

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return readings, statuses


def _image(width: int, height: int) -> bytes:
    """An image whose lower half is transparent."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    pixels[..., 3] = np.where(np.arange(height) < height // 2, 255, 0)[:, None]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


async def _one(asking: httpx.AsyncClient, number: int, image: bytes, model: dict[str, object]) -> str:
    """Sends a request of a kind that its number chooses; returns the status."""
    chance = random.Random(number)  # noqa: S311
    label = chance.randrange(int(str(model["classes"])))
    kind = chance.choice(["plain", "plain", "plain", "stream", "edit", "encode", "wrong", "leaves"])
    if kind == "edit":
        reply = await asking.post("/v1/images/edits", data={"label": str(label)}, files={"image": image})
    elif kind == "encode":
        reply = await asking.post("/v1/codes/encode", json={"images": [base64.b64encode(image).decode()]})
    elif kind == "wrong":
        reply = await asking.post(GENERATE, json={"label": "x" * 1000, "n": number})
    else:
        body = {"label": label, "seed": number, "n": chance.randint(1, 3)}
        body |= {"stream": True, "partial_images": 3} if kind == "stream" else {}
        waits = {"timeout": chance.random() * 0.05} if kind == "leaves" else {}
        reply = await asking.post(GENERATE, json=body, **waits)
    return str(reply.status_code)


def _usage(process: int) -> dict[str, float]:
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    memory = re.search(r"VmRSS:\s+(\d+)", status)
    return {
        "megabytes": round(int(memory[1]) / 2**10, 1) if memory else 0,
        "handles": len(list(Path(f"/proc/{process}/fd").iterdir())),
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, turns in (("speed", 8), ("soak", 20_000)):
        kind = kinds.add_parser(name)
        kind.add_argument("plan", type=Path)
        kind.add_argument("--concurrency", type=int, default=16)
        kind.add_argument("--requests", type=int, default=turns)
        kind.add_argument("--threads", type=int, default=0)
    asked = parser.parse_args()
    if asked.kind == "speed":
        found = speed(asked.plan, asked.concurrency, asked.requests, asked.threads)
    else:
        found = soak(asked.plan, asked.requests, asked.concurrency)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
