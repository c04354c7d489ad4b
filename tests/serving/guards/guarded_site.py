"""A small application behind the server's guards."""

from __future__ import annotations

import asyncio
import threading

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response, StreamingResponse

from vismem.serving.guards import hosts_for

KEY = "sk-one-of-two-keys"
GUARDS = {
    "keys": [KEY, "sk-the-other-key"],
    "hosts": hosts_for("127.0.0.1", ["model.example.org", "*.lab.example.org"]),
    "origins": ["https://page.example.org"],
    "max_body": 100_000,
    "body_timeout": 0.5,
    "max_held": 250_000,
    "max_commas": 200,
}
AUTH = f"Authorization: Bearer {KEY}"


class Taken(BaseModel):
    """A request of the test's application."""

    model_config = ConfigDict(extra="forbid")
    text: str = ""
    anything: dict[str, object] | list[object] | None = None


class Site:
    """A small application, and what it has seen."""

    def __init__(self) -> None:
        self.bodies: list[int] = []
        self.streaming, self.ended = 0, 0
        self.hold: threading.Event | None = None
        self.app = app = FastAPI()

        @app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/v1/models")
        async def models() -> list[str]:
            return ["one"]

        @app.post("/v1/echo")
        async def echo(request: Request) -> Response:
            body = await request.body()
            self.bodies.append(len(body))
            while self.hold is not None and not self.hold.is_set():
                await asyncio.sleep(0.01)
            return JSONResponse({"bytes": len(body)})

        @app.post("/v1/parsed")
        async def parsed(body: Taken) -> dict[str, int]:
            return {"text": len(body.text)}

        @app.get("/v1/stream")
        async def stream() -> StreamingResponse:
            async def endless():
                self.streaming += 1
                try:
                    while True:
                        yield b"data: " + b"x" * 4096 + b"\n\n"
                        await asyncio.sleep(0)
                finally:
                    self.ended += 1

            return StreamingResponse(endless(), media_type="text/event-stream")

        @app.get("/v1/pause")
        async def pause() -> StreamingResponse:
            async def halves():
                yield b"\0" * 2_000_000
                while self.hold is not None and not self.hold.is_set():
                    await asyncio.sleep(0.01)
                yield b"y"

            return StreamingResponse(halves())

        @app.get("/v1/bytes/{size}")
        async def sized(size: int) -> Response:
            return Response(b"x" * size, media_type="text/plain")
