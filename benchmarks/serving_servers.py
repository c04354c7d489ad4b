"""The smallest streaming server on each ground that was compared, all around the same pretended model.

`serving_comparison.py` starts this file in an environment that has the one library it needs, and not this package. The
pretended model is a batch that goes forward one step at a time: a step sleeps for `--tick` milliseconds and gives every
row the time at which it was written. What became of each row goes to `--record`, a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time

MOST_TOKENS = 100_000
PACE = 0.002  # seconds between two messages of a replica, where tokens are gathered


class Batch:
    """Rows that are written together; `begin`, `cancel` and `step` may be called by one thread at a time."""

    def __init__(self, tick: float, record: str) -> None:
        self.tick, self.record, self.rows, self.lock = tick, record, {}, threading.Lock()

    def begin(self, name: object, tokens: int, listener=None) -> None:
        with self.lock:
            self.rows[name] = [0, min(tokens, MOST_TOKENS), listener]

    def cancel(self, name: object) -> None:
        with self.lock:
            if name in self.rows:
                self.end(name, "cancelled")

    def end(self, name: object, how: str) -> None:
        written, asked, _ = self.rows.pop(name)
        with open(self.record, "a") as file:
            file.write(json.dumps({"written": written, "asked": asked, "end": how, "time": time.monotonic()}) + "\n")

    def step(self) -> list[tuple[object, float | None, object]]:
        """One token of every row: its name, when it was written (None: the row is over), its listener."""
        time.sleep(self.tick)
        news = []
        with self.lock:
            for name, row in list(self.rows.items()):
                row[0] += 1
                news.append((name, time.monotonic(), row[2]))
                if row[0] == row[1]:
                    news.append((name, None, row[2]))
                    self.end(name, "done")
        return news


class Stepper:
    """A batch with a thread of its own, as this project's worker."""

    def __init__(self, tick: float, record: str) -> None:
        self.batch = Batch(tick, record)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            if not self.batch.rows:
                time.sleep(0.0005)
                continue
            for _, when, listener in self.batch.step():
                listener(when)

    async def answer(self, tokens: int):
        """Times of a row's tokens; the row is given up when nobody listens any more."""
        loop, queue, name = asyncio.get_running_loop(), asyncio.Queue(), object()
        self.batch.begin(name, tokens, lambda when: loop.call_soon_threadsafe(queue.put_nowait, when))
        try:
            while (when := await queue.get()) is not None:
                yield when
        finally:
            self.batch.cancel(name)


def event(when: float) -> str:
    return f"data: {when!r}\n\n"


def application(answer):
    """The FastAPI page in front of anything that streams."""
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    app = FastAPI()

    @app.get("/health")
    async def health():
        return {}

    @app.post("/predict")
    async def predict(asked: dict):

        async def lines():
            stream = answer(asked["tokens"])
            try:
                async for when in stream:
                    yield event(when)
            finally:
                await stream.aclose()

        return StreamingResponse(lines(), media_type="text/event-stream")

    return app


def serve_fastapi(port: int, tick: float, record: str) -> None:
    import uvicorn

    stepper = Stepper(tick, record)
    uvicorn.run(application(stepper.answer), host="127.0.0.1", port=port, log_level="warning")


try:
    import litserve
    from litserve.loops import ContinuousBatchingLoop, Output
    from litserve.utils import LitAPIStatus
except ImportError:
    pass
else:

    class Rows(litserve.LitAPI):  # at the top of a module: LitServe pickles it into a process of its own
        def __init__(self, tick: float, record: str) -> None:
            super().__init__(stream=True, loop=ContinuousBatchingLoop(no_pending_requests=False))
            self.settings = tick, record

        def setup(self, device):
            self.batch = Batch(*self.settings)

        def add_request(self, name, request):
            self.batch.begin(name, request["tokens"])

        def has_capacity(self):
            return len(self.batch.rows) < 256

        def has_active_requests(self):
            return bool(self.batch.rows)

        def step(self, _):
            more, done = LitAPIStatus.OK, LitAPIStatus.FINISH_STREAMING
            return [
                Output(name, "" if when is None else event(when), done if when is None else more)
                for name, when, _ in self.batch.step()
            ]

        def encode_response(self, output):
            return output


def serve_litserve(port: int, tick: float, record: str) -> None:
    server = litserve.LitServer(Rows(tick, record), accelerator="cpu", devices=1, max_payload_size=2**20, timeout=60)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


def ray_is_quiet(port: int) -> None:
    import os

    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_SERVE_LOG_TO_STDERR="0", RAY_DEDUP_LOGS="0")
    import ray
    from ray import serve

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        logging_level="error",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly" if port else "NoServer"})


def serve_ray(port: int, tick: float, record: str) -> None:
    """Ray Serve's own HTTP proxy in front of a replica with a page in it."""
    ray_is_quiet(port)
    from ray import serve

    def page():
        stepper = Stepper(tick, record)
        return application(stepper.answer)

    @serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    @serve.ingress(page)
    class Rows:
        pass

    serve.run(Rows.bind(), route_prefix="/", logging_config={"enable_access_log": False})
    threading.Event().wait()


def serve_front(port: int, tick: float, record: str, gathered: bool = False) -> None:
    """A page in this process, and a replica of Ray Serve behind a handle; `gathered` sends what piled up since."""
    ray_is_quiet(0)
    import uvicorn
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
    class Rows:
        def __init__(self):
            self.stepper = Stepper(tick, record)

        async def answer(self, tokens: int):
            if not gathered:
                async for when in self.stepper.answer(tokens):
                    yield when
                return
            queue = asyncio.Queue()

            async def read():
                async for when in self.stepper.answer(tokens):
                    queue.put_nowait(when)
                queue.put_nowait(None)

            task = asyncio.ensure_future(read())
            try:
                last = False
                while not last:
                    found = [await queue.get()]
                    while not queue.empty():
                        found.append(queue.get_nowait())
                    last = found[-1] is None
                    yield [when for when in found if when is not None]
                    await asyncio.sleep(PACE * len(self.stepper.batch.rows))
            finally:
                task.cancel()

    handle = serve.run(Rows.bind(), route_prefix=None, logging_config={"enable_access_log": False})
    method = handle.options(stream=True).answer

    async def answer(tokens: int):
        stream = method.remote(tokens)
        try:
            async for found in stream:
                for when in found if gathered else [found]:
                    yield when
        finally:
            stream.cancel()

    uvicorn.run(application(answer), host="127.0.0.1", port=port, log_level="warning")


def serve_gathered(port: int, tick: float, record: str) -> None:
    serve_front(port, tick, record, gathered=True)


if __name__ == "__main__":
    found = {name.removeprefix("serve_"): function for name, function in globals().items() if name.startswith("serve_")}
    options = argparse.ArgumentParser()
    options.add_argument("ground", choices=found)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--tick", type=float, required=True, help="milliseconds of a step")
    options.add_argument("--record", required=True)
    args = options.parse_args()
    found[args.ground](args.port, args.tick / 1000, args.record)
