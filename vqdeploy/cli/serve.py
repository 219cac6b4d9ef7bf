"""`vqdeploy serve`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from vqdeploy.cli.options import Device, Threads
from vqdeploy.cli.output import say

_KEY = "VQDEPLOY_API_KEY"


def serve(
    plans: Annotated[list[Path], typer.Argument(help="The plans; clients name them without `.plan`.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, max=4096, help="Images of each plan that are drawn at once.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests for each plan that may wait for a slot.")] = 64,
    max_wait: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="Seconds within which a request gets its reply.")
    ] = 300,
    max_images: Annotated[int, typer.Option(min=1, max=4096, help="Most images of one request.")] = 16,
    max_body: Annotated[int, typer.Option(min=1, max=100_000, help="Most megabytes of one request.")] = 16,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=_KEY,
            help="What clients must send as a bearer token. Prefer the variable: other users can see arguments.",
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Serve plans over HTTP, in the form of OpenAI's image API, with a page to draw on; SIGTERM ends it."""
    from vqdeploy.serve import Settings
    from vqdeploy.serve.server import run

    settings = Settings(
        slots=slots,
        max_queue=max_queue,
        max_wait=max_wait,
        max_images=max_images,
        max_body=max_body * 10**6,
        api_key=os.environ.get(_KEY) if api_key is None else api_key,  # Typer takes an empty variable for none
    )
    run(plans, settings, host, port, device, threads, say)
