"""The FastAPI application: routes, errors in OpenAI's format, timeouts, and cancellation when a client disconnects.

It runs inside the guards of `guards.py`, and answers with a `ChatEngine`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from vismem import __version__
from vismem.serving import page, protocol
from vismem.serving.engine import ChatEngine
from vismem.serving.errors import ApiError, internal_error, stopping
from vismem.serving.metrics import Metrics
from vismem.serving.protocol import ChatChunk, ChatCompletion, ChatRequest, Health, Model, Models
from vismem.serving.responses import event, server_sent, whole

T = TypeVar("T")
log = logging.getLogger(__name__)
VANILLA = ":vanilla"  # suffix of the model name for the base without memory
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": protocol.Error, "description": text}
    for code, text in {
        400: "The request is not valid, or this model cannot take it.",
        401: "The API key is missing or wrong.",
        403: "The image's host, the Host header or the Origin is not allowed.",
        404: "There is no such model or route.",
        408: "The request did not arrive in time.",
        413: "The body or an image is too large.",
        415: "The body is not JSON, or is compressed.",
        429: "Too many requests are waiting.",
        500: "The model failed.",
        503: "The server is stopping, or out of memory.",
        504: "The answer took too long.",
    }.items()
}


@dataclass(frozen=True)
class ServingConfig:
    """How a server answers.

    Args:
        name: the model's name; with the suffix `:vanilla` it is the base without memory.
        invocation: the policy of requests that name none.
        answer_timeout: seconds for an answer, including the time it waits.
        requires_key: whether the OpenAPI schema says that an API key is needed.
    """

    name: str
    invocation: str = "learned"
    answer_timeout: float = 300.0
    requires_key: bool = False

    @property
    def names(self) -> list[str]:
        """The values accepted as `model`."""
        return [self.name, self.name + VANILLA]

    def invocation_for(self, request: ChatRequest) -> str:
        """The policy for a request.

        Raises:
            ApiError: if there is no such model, or the vanilla one is asked to invoke memory.
        """
        if request.model not in self.names:
            raise self.no_such_model(request.model, param="model")
        wanted = request.vismem.invocation
        if request.model == self.name:
            return wanted or self.invocation
        if wanted not in (None, "off"):
            raise ApiError(400, f"{request.model} has no memory to invoke; ask {self.name}", param="vismem.invocation")
        return "off"

    def no_such_model(self, name: str, param: str | None = None) -> ApiError:
        """The error for an unknown model name."""
        names = ", ".join(self.names)
        return ApiError(404, f"no model {name!r}; there are {names}", param=param, code="model_not_found")


def application(engine: ChatEngine, config: ServingConfig, metrics: Metrics | None = None) -> FastAPI:
    """The application, without its guards.

    Args:
        engine: answers the requests.
        config: how.
        metrics: created if not given.
    """
    metrics = metrics or Metrics(engine.load)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await engine.close()

    app = FastAPI(
        title="VisMem",
        version=__version__,
        description="OpenAI-compatible chat completions from a vision-language model with latent vision memory.",
        docs_url=None,  # FastAPI's own page loads scripts from another host
        redoc_url=None,
        redirect_slashes=False,  # the redirect would go wherever the Host header says
        lifespan=lifespan,
    )
    app.state.stopping = False  # set by whoever runs the server
    add_error_handlers(app)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses={**ERRORS, 200: STREAMED})
    async def chat_completions(request: Request, body: ChatRequest) -> Response | ChatCompletion:
        """Answers a conversation with images, whole or as server-sent events."""
        body.vismem.invocation = config.invocation_for(body)
        if app.state.stopping or not engine.ready():
            raise stopping()
        chunks = metrics.watch(answered(request, engine.answer(body), config.answer_timeout))
        if not body.stream:
            return await while_connected(request, whole(chunks, body))
        events = server_sent(chunks, body)
        first = await while_connected(request, anext(events))  # a refused request gets its own HTTP status
        return StreamingResponse(streamed(first, events), media_type="text/event-stream")

    @app.get("/v1/models", responses=errors(401))
    async def models() -> Models:
        """Lists the models: this one, and its base without memory."""
        return Models(data=[Model(id=name, created=created) for name in config.names])

    @app.get("/v1/models/{name:path}", responses=errors(401, 404))
    async def model(name: str) -> Model:
        """Describes a model."""
        if name not in config.names:
            raise config.no_such_model(name)
        return Model(id=name, created=created)

    @app.get(
        "/health",
        response_model=Health,
        responses={503: {"model": Health, "description": "Requests are not accepted."}},
    )
    async def health(response: Response) -> Health:
        """Reports whether requests are accepted."""
        load = engine.load()
        status: Literal["ok", "stopping", "failed"] = "ok" if engine.ready() else "failed"
        if app.state.stopping:
            status = "stopping"
        response.status_code = 200 if status == "ok" else 503
        return Health(status=status, waiting=load.waiting, writing=load.writing)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **errors(401)})
    async def counts() -> Response:
        """Metrics for Prometheus."""
        content, media_type = metrics.render()
        return Response(content, media_type=media_type)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def home() -> Response:
        return page.home(config.names, app.openapi())

    @app.api_route("/docs/", methods=["GET", "HEAD"], include_in_schema=False)
    @app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def reference() -> Response:
        return page.reference(app.openapi())

    correct_schema(app.openapi(), requires_key=config.requires_key)
    return app


STREAMED = {
    "description": "The answer, or its chunks if `stream` is true.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


async def streamed(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The body of a stream. An error after its start becomes the last event."""
    async with aclosing(events):
        try:
            yield first
            async for each in events:
                yield each
        except ApiError as error:
            yield event(error.body())
        except Exception:
            log.exception("a streamed answer failed")
            yield event(internal_error().body())


async def answered(
    request: Request, chunks: AsyncGenerator[ChatChunk, None], seconds: float
) -> AsyncGenerator[ChatChunk, None]:
    """Yields the chunks, and stores their token counts in the request's state for the access log.

    Raises:
        ApiError: if they take longer than `seconds`.
    """
    end = anyio.current_time() + seconds
    async with aclosing(chunks):
        while True:
            try:
                with anyio.fail_after(end - anyio.current_time()):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise ApiError(504, f"the answer was not done within {seconds:g} seconds, the limit") from error
            request.state.usage = chunk.usage
            yield chunk


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Awaits `work`, and cancels it if the client disconnects.

    Raises:
        ClientDisconnectedError: if it did.
    """
    task = asyncio.ensure_future(work)

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        for other in (watch, task):
            other.cancel()
        await asyncio.gather(watch, task, return_exceptions=True)


class ClientDisconnectedError(Exception):
    """The client disconnected before the answer was complete."""


def add_error_handlers(app: FastAPI) -> None:
    """Gives every error OpenAI's format."""
    handler = app.exception_handler

    @handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> Response:
        return error.response()

    @handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        return validation_error(error).response()

    @handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 404:
            return ApiError(404, f"there is no {request.method} {request.url.path}").response()
        message = str(error.detail)
        if error.status_code == 405:
            message = f"{request.url.path} does not accept {request.method}"
        return ApiError(error.status_code, message, headers=headers).response()

    @handler(ClientDisconnectedError)
    async def client_disconnected(_request: Request, _error: ClientDisconnectedError) -> Response:
        return Response(status_code=499)  # only for the log

    @handler(Exception)
    async def failed(_request: Request, _error: Exception) -> Response:
        return internal_error().response()


def validation_error(error: RequestValidationError) -> ApiError:
    """What is wrong with a request, in one line: the most specific of pydantic's errors."""
    # Every branch of a union reports errors; the intended branch got furthest, or has more to say than a wrong type.
    found = max(
        error.errors(),
        key=lambda each: (len(each["loc"]), each["type"] not in ("list_type", "string_type")),
        default=None,
    )
    if found is None:
        return ApiError(400, "the request is not valid")
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {found.get('ctx', {}).get('error', found['msg'])}")
    path = list(body_path(found["loc"][1:], error.body))
    field, message = ".".join(path), found["msg"].removeprefix("Value error, ")
    if not path and found["type"] != "value_error":
        message = "the body must be a JSON object, sent as application/json"
    elif found["type"] == "unsupported":
        return ApiError(400, f"this server does not support {field}", param=field)
    elif path[-1:] == ["content"] and found["type"] in ("list_type", "string_type"):
        message = "must be a string or a list of parts"
    elif found["type"] in ("union_tag_invalid", "union_tag_not_found", "model_attributes_type"):
        message = "a part must be of type text or image_url"
    elif found["type"] in ("too_short", "string_too_short"):  # every minimum length in the schema is 1
        message = "is empty"
    return ApiError(400, f"{field}: {message}" if field else message, param=field or None)


def body_path(loc: Sequence[str | int], body: Any) -> Iterator[str]:
    """The steps of pydantic's location that exist in the body: fields and indices, not the branches of unions."""
    for at, step in enumerate(loc):
        missing = at == len(loc) - 1 and isinstance(step, str) and step.isidentifier()
        if isinstance(body, list) and isinstance(step, int):
            body = body[step]
        elif isinstance(body, dict) and (step in body or missing):
            body = body.get(step)
        else:
            continue
        yield str(step)


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI descriptions of these errors."""
    return {code: ERRORS[code] for code in codes}


def correct_schema(schema: dict[str, Any], *, requires_key: bool) -> None:
    """Removes FastAPI's own error, 422, from the OpenAPI schema and adds the API key."""
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    if requires_key:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        schema["paths"]["/health"]["get"]["security"] = []
