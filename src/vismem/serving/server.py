"""The web application: routes, errors in OpenAI's form, and what becomes of an answer whose client has gone.

What protects it - limits of bodies and connections, keys, slow clients - lies around it, in `guards.py`; what answers
is behind `engine.Answering`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from vismem import __version__
from vismem.serving import page, protocol
from vismem.serving.assembling import DONE, Assembly, ask_of, server_sent
from vismem.serving.engine import Answering
from vismem.serving.errors import ApiError, stopping
from vismem.serving.metrics import Metrics
from vismem.serving.protocol import ChatCompletion, ChatRequest, Health, Model, Models
from vismem.serving.writing import Event

T = TypeVar("T")
log = logging.getLogger(__name__)
VANILLA = ":vanilla"  # ends the name of the model without its memory
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": protocol.Error, "description": text}
    for code, text in {
        400: "The request is not valid, or this model cannot take it.",
        401: "The API key is missing or wrong.",
        403: "This server does not fetch images from there, or does not answer to this name or page.",
        404: "There is no such model or route.",
        408: "The request did not arrive in time.",
        413: "The body or an image is too large.",
        415: "The body is not sent as JSON.",
        429: "Too many requests are waiting.",
        500: "The model failed.",
        503: "The server is stopping, or out of memory.",
        504: "The answer took longer than an answer may.",
    }.items()
}


@dataclass(frozen=True)
class Serving:
    """How a server answers.

    Args:
        name: of the model; the same with `:vanilla` is the base without memory.
        invocation: who invokes memory where a request does not say.
        answer_timeout: seconds that an answer may take, waiting included.
        keyed: whether an API key is needed, so that the page of the interface says so.
    """

    name: str
    invocation: str = "learned"
    answer_timeout: float = 300.0
    keyed: bool = False

    @property
    def names(self) -> list[str]:
        """What may be asked for as `model`."""
        return [self.name, self.name + VANILLA]

    def invocation_for(self, request: ChatRequest) -> str:
        """Who invokes memory in a request's answer.

        Raises:
            ApiError: if there is no such model, or a vanilla one is asked to invoke.
        """
        if request.model not in self.names:
            names = ", ".join(self.names)
            raise ApiError(404, f"no model {request.model!r}; there are {names}", param="model", code="model_not_found")
        wanted = request.invocation
        if request.model == self.name:
            return wanted or self.invocation
        if wanted not in (None, "off"):
            raise ApiError(400, f"{request.model} has no memory to invoke; ask {self.name}", param="vismem.invocation")
        return "off"


def application(engine: Answering, serving: Serving, metrics: Metrics | None = None) -> FastAPI:
    """The application, without guards.

    Args:
        engine: what answers.
        serving: how.
        metrics: where counts go; new ones by default.
    """
    metrics = metrics or Metrics(engine.load)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await engine.close()

    app = FastAPI(
        title="VisMem",
        version=__version__,
        description="Chat with a vision-language model that has a latent vision memory, as with OpenAI's.",
        docs_url=None,  # FastAPI's own page loads from another host
        redoc_url=None,
        redirect_slashes=False,  # to where a Host header says
        lifespan=lifespan,
    )
    app.state.stopping = False  # whoever runs the server says when
    add_error_handlers(app)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses={**ERRORS, 200: STREAMED})
    async def chat_completions(request: Request, body: ChatRequest) -> Response | ChatCompletion:
        """Answers a conversation about images, in one piece or as server-sent events."""
        invocation = serving.invocation_for(body)
        if app.state.stopping or not engine.ready():
            raise stopping()
        assembly = request.state.assembly = Assembly(body, ask_of(body, invocation))
        events = metrics.watched(within(engine.answer(assembly.ask), serving.answer_timeout))
        if not body.stream:
            async with aclosing(events):
                return await while_connected(request, assembly.whole(events))
        try:
            first = await while_connected(request, anext(events))  # what cannot be taken has a status of its own
        except BaseException:
            await events.aclose()
            raise
        return StreamingResponse(streamed(assembly, first, events), media_type="text/event-stream")

    @app.get("/v1/models", responses=some(401))
    async def models() -> Models:
        """The models to ask: this one, and the same without memory."""
        return Models(data=[Model(id=name, created=created) for name in serving.names])

    @app.get("/v1/models/{name:path}", responses=some(401, 404))
    async def model(name: str) -> Model:
        """One of them."""
        if name not in serving.names:
            raise ApiError(404, f"no model {name!r}; there are {', '.join(serving.names)}", code="model_not_found")
        return Model(id=name, created=created)

    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "Not answering."}})
    async def health(response: Response) -> Health:
        """Whether requests are answered."""
        ready, load = engine.ready(), engine.load()
        status: Literal["ok", "stopping", "failed"] = "ok" if ready else "failed"
        status = "stopping" if app.state.stopping else status
        response.status_code = 200 if status == "ok" else 503
        return Health(status=status, waiting=load.waiting, writing=load.writing)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **some(401)})
    async def counts() -> Response:
        """Counts for Prometheus."""
        content, media_type = metrics.render()
        return Response(content, media_type=media_type)

    @app.get("/", include_in_schema=False)
    async def home() -> Response:
        return page.home(serving.names, app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def reference() -> Response:
        return page.reference(app.openapi())

    app.openapi = lambda: described(app, serving.keyed)  # type: ignore[method-assign]
    return app


STREAMED = {
    "description": "The answer, or its pieces where `stream` is true.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


async def streamed(
    assembly: Assembly, first: Event, events: AsyncGenerator[Event, None]
) -> AsyncGenerator[bytes, None]:
    """A stream's body; an error in the middle is its last event."""

    async def all_events() -> AsyncGenerator[Event, None]:
        yield first
        async for event in events:
            yield event

    async with aclosing(events), aclosing(all_events()) as each, aclosing(assembly.chunks(each)) as chunks:
        try:
            async for chunk in chunks:
                yield chunk
            yield DONE
        except ApiError as error:
            yield server_sent(error.body())
        except Exception:
            log.exception("an answer failed on the way")
            yield server_sent(ApiError(500, "the server failed; its log has the reason").body())


async def within(events: AsyncGenerator[T, None], seconds: float) -> AsyncGenerator[T, None]:
    """The same events, as long as they come within that many seconds in all.

    Raises:
        ApiError: once they are over.
    """
    end = asyncio.get_running_loop().time() + seconds
    async with aclosing(events):
        while True:
            left = end - asyncio.get_running_loop().time()
            try:
                event = await asyncio.wait_for(anext(events), max(left, 0))
            except StopAsyncIteration:
                return
            except asyncio.TimeoutError as error:
                raise ApiError(504, f"the answer was not done within {seconds:g} seconds, the limit") from error
            yield event


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which is given up where the client goes away.

    Raises:
        ClientGone: if it did.
    """
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for other in (watch, task):
            other.cancel()
        await asyncio.gather(watch, task, return_exceptions=True)


class ClientGone(Exception):
    """Nobody waits for this answer any more."""


def add_error_handlers(app: FastAPI) -> None:
    """Makes every error one of OpenAI's form."""
    handler = app.exception_handler

    @handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return explained(error).response()

    @handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        told = ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        if error.status_code == 404:
            told = ApiError(404, f"there is no {request.method} {request.url.path}", code="not_found")
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
            told = ApiError(405, message, headers=dict(error.headers or {}))
        return told.response()

    @handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed; its log has the reason").response()


def explained(error: RequestValidationError) -> ApiError:
    """What is wrong with a request, in one line: the deepest of the places that pydantic names."""
    # Of a union each branch complains; the one that was meant got furthest, or has more to say than a wrong type.
    told = error.errors()
    found = max(told, key=lambda e: (len(e["loc"]), e["type"] not in ("list_type", "string_type")), default=None)
    if found is None:
        return ApiError(400, "the request is not valid")
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {found.get('ctx', {}).get('error', found['msg'])}")
    path = list(places(found["loc"][1:], error.body))
    place, message = ".".join(path), found["msg"].removeprefix("Value error, ")
    if not path and found["type"] != "value_error":
        message = "the body must be a JSON object, sent as application/json"
    elif found["type"] == "unsupported":
        return ApiError(400, f"this server does not support {place}", param=place)
    elif path[-1:] == ["content"] and found["type"] in ("list_type", "string_type"):
        message = "must be a text or a list of parts"
    elif found["type"] in ("too_short", "string_too_short"):  # all that have such a limit need one at least
        message = "is empty"
    return ApiError(400, f"{place}: {message}" if place else message, param=place or None)


def places(loc: Sequence[str | int], body: Any) -> Iterator[str]:
    """The steps of pydantic's place that a body has too: fields and indices, not the branches of unions."""
    for at, step in enumerate(loc):
        missing = at == len(loc) - 1 and isinstance(step, str) and step.isidentifier()
        if isinstance(body, list) and isinstance(step, int):
            body = body[step]
        elif isinstance(body, dict) and (step in body or missing):
            body = body.get(step)
        else:
            continue
        yield str(step)


def some(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The descriptions of these errors."""
    return {code: ERRORS[code] for code in codes}


def described(app: FastAPI, keyed: bool) -> dict[str, Any]:
    """The OpenAPI page: FastAPI's own, with our errors in place of its 422."""
    if app.openapi_schema is None:
        found = FastAPI.openapi(app)
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = found["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        if keyed:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"key": []}]
            found["paths"]["/health"]["get"]["security"] = []
        app.openapi_schema = found
    return app.openapi_schema
