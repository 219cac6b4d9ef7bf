"""Runs the application of plans until a signal ends it."""

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from vqdeploy.errors import VqdeployError
from vqdeploy.serve.app import create_app
from vqdeploy.serve.metrics import Metrics
from vqdeploy.serve.plans import ServedPlan
from vqdeploy.serve.settings import Settings

_CONNECTIONS = 1000  # at a time; each may hold a request of the largest size
HEADER_SECONDS = 20.0
"""Time for the headers of a request."""


def run(
    paths: Sequence[Path],
    settings: Settings,
    host: str,
    port: int,
    device: str,
    threads: int,
    tell: Callable[[str], object],
) -> None:
    """Serves plans. SIGTERM ends it once the requests that came before are answered, and so does Ctrl-C.

    Args:
        paths: Their files.
        settings: The limits.
        host: Address to listen on.
        port: Port to listen on; 0 for any free one.
        device: As for `vqdeploy.load`.
        threads: As for `vqdeploy.load`.
        tell: Gets the address, once it listens.

    Raises:
        VqdeployError: A plan cannot be opened, two have one name, or the address is taken.
    """
    metrics, plans = Metrics(), dict[str, ServedPlan]()
    with contextlib.closing(_listen(host, port)) as listening, contextlib.ExitStack() as opened:
        for path in paths:
            plan = ServedPlan(path, settings, metrics, device, threads)
            opened.callback(plan.worker.close)
            if plan.name in plans:
                raise VqdeployError(f"two plans have the name {plan.name}", expected="files with different names")
            plans[plan.name] = plan
        address, port = listening.getsockname()[:2]
        where = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        server = _Server(
            uvicorn.Config(
                create_app(plans, settings, metrics),
                log_config=None,  # the handler of the command line escapes what it writes
                log_level="warning",
                lifespan="off",
                http=_Protocol,
                ws="none",
                limit_concurrency=_CONNECTIONS,
                timeout_graceful_shutdown=math.ceil(settings.max_wait),
                server_header=False,
            ),
            lambda: tell(f"serving {', '.join(plans)} at {where}"),
        )
        # uvicorn raises the signal again at the end, which must not fail.
        signal.signal(signal.SIGTERM, server.handle_exit)
        server.run([listening])


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Closes a connection that sends no whole headers in time; else a few of them could hold all connections.

    A request whose body is malformed gets one reply, and the connection closes.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_headers()

    def send_400_response(self, msg: str) -> None:
        cycle = self.cycle
        if cycle is not None and cycle.more_body:  # the application is about to reply too, or has
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.close()
                return
        super().send_400_response(msg)

    def _expect_headers(self) -> None:
        """The timer of the next request."""
        self.loop.call_later(HEADER_SECONDS, self._close_if_idle, self.cycle)

    def _close_if_idle(self, last: object) -> None:
        if self.cycle is last:
            self.transport.close()


class _Server(uvicorn.Server):
    """Tells when it has started, that is, when signals end it."""

    def __init__(self, config: uvicorn.Config, tell: Callable[[], object]):
        super().__init__(config)
        self._tell = tell

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound before plans are opened, since that takes long."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except (OSError, UnicodeError) as error:  # a name that is none
        reason = getattr(error, "strerror", None) or error
        raise VqdeployError(f"cannot listen at {host}:{port} ({reason})", fix="--port 0") from error
