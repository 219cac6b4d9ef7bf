"""What every request passes: who may ask, how long it may take, and what is counted."""

import asyncio
import hmac
import time
from contextlib import suppress

import anyio
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vqdeploy.serve.metrics import Metrics
from vqdeploy.serve.schemas import Problem, Refusal

_GUARDED = "/v1/"
_TOO_LARGE = "the request is too large; expected at most {} bytes"


def refusal(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """The reply to a request that failed, in OpenAI's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    problem = Problem(message=message, type=kind, param=param, code=code)
    return JSONResponse(Refusal(error=problem).model_dump(), status, headers)


def too_late(seconds: float) -> JSONResponse:
    """The reply to a request whose time is over."""
    return refusal(504, f"the request took longer than {seconds:g} s", code="timeout")


def too_large(size: int) -> JSONResponse:
    """The reply to a request of more than `size` bytes."""
    return refusal(413, _TOO_LARGE.format(size))


class Counted:
    """Counts requests by route and status, never by text that a client chose."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # what nginx calls a client that left

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, counted_send)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.request_seconds.labels(route).observe(time.perf_counter() - start)


class Guarded:
    """Asks for the key, and refuses requests of other web sites, which a browser on this machine would send."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app, self._key = app, None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request as an ASGI application."""
        answer = self._refusal(Headers(scope=scope)) if self._guards(scope) else None
        await (answer or self._app)(scope, receive, send)

    @staticmethod
    def _guards(scope: Scope) -> bool:
        return scope["type"] == "http" and str(scope["path"]).startswith(_GUARDED)

    def _refusal(self, headers: Headers) -> JSONResponse | None:
        if headers.get("sec-fetch-site") == "cross-site":
            return refusal(403, "other web sites may not use this server")
        kind, _, key = headers.get("authorization", "").partition(" ")
        if self._key is None or (kind.lower() == "bearer" and hmac.compare_digest(key.encode("latin-1"), self._key)):
            return None
        wanted = "the API key is wrong or missing; expected the header Authorization: Bearer KEY"
        return refusal(401, wanted, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class Bounded:
    """Refuses a request that is too large, and cancels one when its time is over, and when its client leaves."""

    def __init__(self, app: ASGIApp, seconds: float, size: int):
        self._app, self._seconds, self._size = app, seconds, size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if int(Headers(scope=scope).get("content-length", 0)) > self._size:
            await too_large(self._size)(scope, receive, send)
            return
        exchange = _Exchange(receive, send, self._seconds, self._size)
        try:
            with exchange.time:
                await self._app(scope, exchange.receive, exchange.send)
        finally:
            await exchange.close()
        if exchange.time.cancelled_caught and not exchange.left.is_set() and not exchange.started:
            await too_late(self._seconds)(scope, receive, send)


class _Exchange:
    """A request and its reply.

    Attributes:
        time: The scope that is cancelled when the time is over, and when the client leaves.
        left: Set when the client has left.
        started: Whether the reply has begun.
    """

    def __init__(self, receive: Receive, send: Send, seconds: float, size: int):
        self._receive, self._send, self._seconds, self._size = receive, send, seconds, size
        self.time, self.left, self.started = anyio.move_on_after(seconds), asyncio.Event(), False
        self._received = 0
        self._watcher: asyncio.Task[None] | None = None

    async def receive(self) -> Message:
        """The next part of the body; after it, the departure of the client."""
        if self._watcher:
            await self.left.wait()
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._size:
            raise HTTPException(413, _TOO_LARGE.format(self._size))
        if not message.get("more_body", False):  # the body has ended, or the client has left
            self._watcher = asyncio.create_task(self._watch())
        return message

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.left.set()
        self.time.cancel()

    async def send(self, message: Message) -> None:
        """Sends a part of the reply."""
        if not self.started:
            self.started = True
            # A stream keeps the time itself; what is added is for clients that do not read.
            self.time.deadline += self._seconds
        await self._send(message)

    async def close(self) -> None:
        """Ends the watch."""
        if self._watcher:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
