"""Servers in this process: an application that is called directly, or one that listens on a port of its own."""

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np
import uvicorn
from PIL import Image

from vqdeploy.serve import Metrics, ServedPlan, Settings, create_app


@contextlib.contextmanager
def application(plans: dict[str, object], **limits: object) -> Iterator[object]:
    """The application that serves plan files under these names; `app.plans` has the served plans."""
    settings, metrics = Settings(**limits), Metrics()
    served = {name: ServedPlan(path, settings, metrics, threads=1) for name, path in plans.items()}
    for name, plan in served.items():
        plan.name = name
    app = create_app(served, settings, metrics)
    app.plans = served
    try:
        yield app
    finally:
        for plan in served.values():
            plan.worker.close()


@contextlib.contextmanager
def listening(app: object, **options: object) -> Iterator[str]:
    """Its address, while it listens on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off", **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def requests(app: object, *calls: tuple[str, str, dict], **options: object) -> list[httpx.Response]:
    """Replies to requests (method, path, arguments of httpx) that are sent at once."""

    async def send_all() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60, **options) as client:
            return await asyncio.gather(*(client.request(method, path, **given) for method, path, given in calls))

    return asyncio.run(send_all())


def post(app: object, path: str, **given: object) -> httpx.Response:
    """The reply to one request."""
    return requests(app, ("POST", path, given))[0]


def get(app: object, path: str, **given: object) -> httpx.Response:
    """The reply to one request."""
    return requests(app, ("GET", path, given))[0]


def until(held, seconds: float = 30) -> None:
    """Waits for a condition, which must hold in the end."""
    end = time.monotonic() + seconds
    while not held():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def png(image: np.ndarray) -> bytes:
    """An image uint8 as a file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def text(file: bytes) -> str:
    """A file in base64."""
    return base64.b64encode(file).decode()


def pixels(file: str) -> np.ndarray:
    """The image of a file in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))


def codes(reply: httpx.Response) -> np.ndarray:
    """The codes [B, *grid] of a reply."""
    assert reply.status_code == 200, reply.text
    return np.array([image["codes"] for image in reply.json()["data"]])
