"""The routes of a server, in the form of OpenAI's image API where it has one."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import ExitStack, aclosing
from importlib import resources
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.sse import format_sse_event
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from vqdeploy.errors import LONGEST, VqdeployError, shown
from vqdeploy.options import SAMPLING_OPTIONS
from vqdeploy.serve.metrics import Metrics
from vqdeploy.serve.middleware import Bounded, Counted, Guarded, refusal, too_late
from vqdeploy.serve.plans import BusyError, Order, ServedPlan, file_of, now
from vqdeploy.serve.schemas import (
    Codes,
    Decoding,
    Drawing,
    Edit,
    Encoding,
    Generation,
    Model,
    Models,
    Picture,
    Pictures,
    Refusal,
    State,
)
from vqdeploy.serve.settings import Settings
from vqdeploy.serve.worker import EngineError

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Refusal, "description": "The request is wrong, or there are too many."},
    "5XX": {"model": Refusal, "description": "It took too long, or an engine failed."},
}
_Drawn = Pictures | StreamingResponse
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "Images, or events of a stream."}
}


def create_app(plans: Mapping[str, ServedPlan], settings: Settings, metrics: Metrics) -> FastAPI:
    """The application of a server.

    Args:
        plans: Plans by name; the first one is the default.
        settings: The limits.
        metrics: Where the plans count.
    """
    app = FastAPI(
        title="vqdeploy",
        version=version("vqdeploy"),
        description="Images and codes of vector-quantized image generators.",
        docs_url=None,  # these pages load scripts of other hosts
        redoc_url=None,
        responses=_REFUSALS,
    )
    app.router.route_class = _LongFields
    app.add_middleware(Bounded, seconds=settings.max_wait, size=settings.max_body)
    app.add_middleware(Guarded, api_key=settings.api_key)
    app.add_middleware(Counted, metrics=metrics)
    _answer_errors(app)
    _add_page(app)

    def find(name: str | None) -> ServedPlan:
        if name is None:
            return next(iter(plans.values()))
        if name not in plans:
            raise HTTPException(404, f"there is no model {shown(name)}; expected {' or '.join(map(shown, plans))}")
        return plans[name]

    async def draw(plan: ServedPlan, order: Order, asked: Drawing, task: str) -> _Drawn:
        if not asked.stream:
            return await _pictures(plan, order, asked)
        events = _events(plan, order, asked, task, settings.max_wait)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.post("/v1/images/generations", response_model=Pictures, responses=_EVENTS)
    async def generate(asked: Generation, reply: _Reply) -> _Drawn:
        """Generate images of a class."""
        plan = find(asked.model)
        reply.enter_context(plan.request())
        return await draw(plan, plan.generation(asked), asked, "image_generation")

    @app.post("/v1/images/edits", response_model=Pictures, responses=_EVENTS)
    async def edit(
        asked: Annotated[Edit, Form(media_type="multipart/form-data")], reply: _Reply, request: Request
    ) -> _Drawn:
        """Draw a part of an image anew.

        Masked and next-scale priors draw the mask; others complete the image, from the first row that the mask touches.
        """
        _check_once(await request.form())
        plan = find(asked.model)
        reply.enter_context(plan.request())
        return await draw(plan, await plan.edit(asked), asked, "image_edit")

    @app.post("/v1/codes/encode")
    async def encode(asked: Encoding, reply: _Reply) -> Codes:
        """Turn images into codes."""
        plan = find(asked.model)
        reply.enter_context(plan.request())
        codes = await plan.encode(await plan.read(asked.images))
        return Codes(model=plan.name, codes=codes.tolist())

    @app.post("/v1/codes/decode")
    async def decode(asked: Decoding, reply: _Reply) -> Pictures:
        """Turn codes into images."""
        plan = find(asked.model)
        reply.enter_context(plan.request())
        images = await plan.decode(asked.codes, asked.depth)
        data = [Picture(b64_json=await asyncio.to_thread(file_of, image, asked.output_format)) for image in images]
        return Pictures(created=now(), model=plan.name, data=data, size=plan.size, output_format=asked.output_format)

    @app.get("/v1/models")
    async def models() -> Models:
        """List the plans, with their shapes, classes and sampling options."""
        return Models(data=[plan.describe() for plan in plans.values()])

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Model:
        """Describe one plan."""
        return find(name).describe()

    @app.get("/health")
    async def health() -> State:
        """Report that the server runs."""
        return State(status="ok")

    @app.get("/ready")
    async def ready() -> State:
        """Report whether all engines work."""
        if failed := [name for name, plan in plans.items() if not plan.worker.works]:
            raise HTTPException(503, f"an engine of {shown(failed[0])} failed and will be opened again")
        return State(status="ok")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics_text() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


class _LongFields(APIRoute):
    """A route whose forms may have fields as long as its body, which is bounded: features of texts are megabytes."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await answer(_LongRequest(request.scope, request.receive))

        return handle


class _LongRequest(Request):
    def form(self, **limits: Any) -> Any:  # noqa: ANN401 (a class that Starlette does not export)
        return super().form(**limits | {"max_part_size": sys.maxsize})


def _check_once(form: FormData) -> None:
    """Rejects a form that has a field twice, of which all but the last would be ignored; lists may be such."""
    counts = Counter(name for name, _ in form.multi_items())
    lists = {option.name for option in SAMPLING_OPTIONS if option.per_depth}
    if repeated := [name for name, count in counts.items() if count > 1 and name not in lists]:
        raise VqdeployError(f"the form has the field {repeated[0]} more than once", expected="one of each name")


async def _reply() -> AsyncIterator[ExitStack]:
    """What ends when a reply is sent, or its client has left."""
    with ExitStack() as stack:
        yield stack


_Reply = Annotated[ExitStack, Depends(_reply)]


async def _pictures(plan: ServedPlan, order: Order, asked: Drawing) -> Pictures:
    """All images of an order at once."""
    drawn = await plan.draw(order)
    files = await plan.files(order, drawn, asked)
    return Pictures(
        created=now(),
        model=plan.name,
        data=[Picture(b64_json=file, codes=each.codes.tolist()) for file, each in zip(files, drawn, strict=True)],
        size=plan.size,
        output_format=asked.output_format,
        seed=order.seed,
        options=order.options,
        note=order.note,
    )


async def _events(plan: ServedPlan, order: Order, asked: Drawing, task: str, seconds: float) -> AsyncIterator[bytes]:
    """Server-sent events: previews of steps and images, or what went wrong."""
    deadline = asyncio.get_running_loop().time() + seconds
    common = {"model": plan.name, "size": plan.size, "output_format": asked.output_format, "seed": order.seed}
    shown_before = [0] * len(order.items)
    async with aclosing(plan.watch(order, asked.partial_images)) as watched:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    preview = await anext(watched)
                    (file,) = await plan.files(order, [preview.drawn], asked)
            except StopAsyncIteration:
                return
            except (EngineError, TimeoutError) as error:
                problem = _engine_failed(error) if isinstance(error, EngineError) else too_late(seconds)
                yield format_sse_event(data_str=bytes(problem.body).decode(), event="error")
                return
            event: dict[str, Any] = {"type": f"{task}.{'completed' if preview.done else 'partial_image'}"}
            if preview.done:
                event |= {"options": order.options, "note": order.note}
            else:
                event |= {"partial_image_index": shown_before[preview.image]}
                event |= {"step": preview.step, "steps": preview.steps}
                shown_before[preview.image] += 1
            event |= {"b64_json": file, "codes": preview.drawn.codes.tolist(), "image_index": preview.image}
            event |= {"created_at": now(), **common}
            yield format_sse_event(data_str=json.dumps(event), event=event["type"])


def _add_page(app: FastAPI) -> None:
    """The files of the page, which are read once: no path of a request reaches the file system."""
    for path, (name, kind) in _PAGE.items():
        app.add_route(path, _file(name, kind), include_in_schema=False)


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files("vqdeploy.serve").joinpath("page", name).read_bytes()

    async def answer(_: Request) -> Response:
        return Response(content, headers=_PAGE_HEADERS, media_type=kind)

    return answer


def _answer_errors(app: FastAPI) -> None:
    """Gives all errors OpenAI's form; why an engine failed is only logged."""

    @app.exception_handler(VqdeployError)
    async def wrong(_: Request, error: VqdeployError) -> JSONResponse:
        return refusal(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":  # its location is a number of characters, not a field
            return refusal(400, shown(f"the body is not JSON: {first['ctx']['error']}", LONGEST))
        param = shown(".".join(str(part) for part in first["loc"][1:]))
        return refusal(400, shown(f"{param}: {first['msg']}" if param else first["msg"], LONGEST), param=param or None)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        headers = None if error.headers is None else dict(error.headers)
        return refusal(error.status_code, str(error.detail), headers=headers)

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        return refusal(429, str(error), code="rate_limit_exceeded", headers={"Retry-After": str(error.seconds)})

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> JSONResponse:
        return refusal(500, "unexpected error; the log of the server has the details")

    @app.exception_handler(EngineError)
    async def failed(_: Request, error: EngineError) -> JSONResponse:
        return _engine_failed(error)


def _engine_failed(error: EngineError) -> JSONResponse:
    return refusal(500, f"{error}; try again")
