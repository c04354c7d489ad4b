"""A soak test of `vismem serve` on loopback: mixed requests, clients that hang up, bad bodies, and leaks.

The server runs the pocket model in its own process. The number of clients and the number and time of requests are
bounded. Requests of all kinds run first, while the server's memory, threads and files are sampled; then the same good
ones, alternately with many clients and one at a time. Exits with 1 if anything failed that was not the client's fault,
or kept growing.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch
from common import machine_facts
from PIL import Image

KEY = "soak"
LONGEST = 120.0  # seconds per request
MAX_BODY = 1  # MiB
LONG = 1000  # requests; a shorter soak ends while the server is warming up, so growth is not judged
WARM = 0.2  # share of the soak before growth is measured
CLIENTS = 16
BAD = [
    "malformed",
    "oversized",
    "broken image",
    "wrong key",
    "unknown field",
    "too many choices",
    "remote image",
    "route",
]
EXPECTED = {"oversized": 413, "wrong key": 401, "remote image": 403, "route": 404}  # all other bad ones: 400
TEXTS = [
    "What colour is the tag at row 2, column 3?",
    "Describe the shelf.",
    "What does row 1 cost with its promotion?",
]


# Requests.


class Kinds:
    """Draws requests, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random, self.kinds = random.Random(seed), Counter()
        shelf = Image.open(Path(__file__).resolve().parent.parent / "examples" / "shelf.png").convert("RGB")
        self.pictures = [uri(shelf.rotate(90 * turn)) for turn in range(4)]

    def draw(self) -> tuple[str, dict[str, Any]]:
        """A kind - "good", "abort" or one of `BAD` - and the body."""
        lot = self.random.random()
        kind = self.random.choice(BAD) if lot < 0.05 else "abort" if lot < 0.15 else "good"
        body = self.good()
        if kind == "broken image":
            body["messages"] = turn("What is it?", [self.pictures[0][: self.random.randrange(30, 120)]])
        elif kind == "unknown field":
            body["no_such_field"] = 1
        elif kind == "too many choices":
            body["n"] = 100
        elif kind == "remote image":
            body["messages"] = turn("What is it?", ["https://127.0.0.1:9/picture.png"])
        return kind, body

    def good(self) -> dict[str, Any]:
        """A valid request."""
        choose = self.random.choice
        count = choose([0, 1, 1, 1, 2, 3])
        pictures = [choose(self.pictures) for _ in range(count)]
        body: dict[str, Any] = {
            "model": "pocket",
            "messages": turn(choose(TEXTS), pictures),
            "max_tokens": choose([4, 4, 16, 16, 48]),
            "temperature": choose([0, 0.8]),
            "seed": self.random.randrange(3),
            "stream": self.random.random() < 0.5,
            "vismem": {"invocation": choose(["learned", "learned", "off", "short@0" if count else "long@0", "long@2"])},
        }
        if self.random.random() < 0.1:
            body["n"] = 2
        if self.random.random() < 0.15:
            body.update(logprobs=True, top_logprobs=2)
        if self.random.random() < 0.1:
            body["stop"] = ["Row 2"]
        return body


def uri(picture: Image.Image) -> str:
    held = io.BytesIO()
    picture.save(held, format="png")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def turn(text: str, pictures: list[str]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# Clients.


class Soak:
    """Sends requests and records the outcomes."""

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self.client, self.random = client, random.Random(seed + 1)
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []  # failures that were not the client's fault
        self.texts: dict[str, list[str]] = {}
        self.differing, self.compared, self.tokens = 0, 0, 0

    async def ask(self, kind: str, body: dict[str, Any]) -> tuple[float, float | None]:
        """Sends one and checks the response; returns seconds to its end, and to the first text if streamed."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(LONGEST) if hasattr(asyncio, "timeout") else Unbounded():
                if kind == "good":
                    first = await (self.streamed(body) if body["stream"] else self.whole(body))
                    self.outcomes["good"] += 1
                    return time.monotonic() - began, first and first - began
                await (self.abort(body) if kind == "abort" else self.bad(kind, body))
                self.outcomes[kind] += 1
        except (AssertionError, KeyError, ValueError, httpx.HTTPError, TimeoutError) as error:
            self.faults.append(f"{kind}: {type(error).__name__}: {error}"[:300])
        return time.monotonic() - began, None

    async def whole(self, body: dict[str, Any]) -> None:
        answer = await self.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        found = answer.json()
        choices = found["choices"]
        assert len(choices) == body.get("n", 1) and all(choice["finish_reason"] for choice in choices)
        assert all(bool(choice.get("logprobs")) == ("logprobs" in body) for choice in choices)
        self.tokens += found["usage"]["completion_tokens"]
        self.compare(body, [choice["message"]["content"] for choice in choices])

    async def streamed(self, body: dict[str, Any]) -> float | None:
        first, texts, ended, last = None, [""] * body.get("n", 1), set(), ""
        body = {**body, "stream_options": {"include_usage": True}}
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200, f"{answer.status_code} {await answer.aread()!r}"
            async for line in answer.aiter_lines():
                if not line:
                    continue
                last = line.removeprefix("data: ")
                if last == "[DONE]":
                    continue
                chunk = json.loads(last)
                assert "error" not in chunk, last
                for choice in chunk["choices"]:
                    text = choice["delta"].get("content") or ""
                    first = first or (time.monotonic() if text else None)
                    texts[choice["index"]] += text
                    if choice["finish_reason"]:
                        ended.add(choice["index"])
                if not chunk["choices"]:
                    self.tokens += chunk["usage"]["completion_tokens"]
        assert last == "[DONE]" and len(ended) == len(texts), f"the stream ended with {last!r}"
        self.compare(body, texts)
        return first

    def compare(self, body: dict[str, Any], texts: list[str]) -> None:
        """The same request must give the same words, whatever ran beside it, streamed or not."""
        key = json.dumps(
            {name: body[name] for name in sorted(body) if not name.startswith(("stream", "logprobs", "top_"))}
        )
        if key in self.texts:
            self.compared += 1
            self.differing += self.texts[key] != texts
        self.texts[key] = texts

    async def abort(self, body: dict[str, Any]) -> None:
        """Hangs up: on a stream after some lines, otherwise after some milliseconds."""
        if body["stream"]:
            left = self.random.randrange(1, 8)
            async with self.client.stream("POST", "/v1/chat/completions", json={**body, "max_tokens": 48}) as answer:
                assert answer.status_code == 200, answer.status_code
                async for _ in answer.aiter_lines():
                    left -= 1
                    if not left:
                        return
        else:
            asked = asyncio.ensure_future(self.client.post("/v1/chat/completions", json={**body, "max_tokens": 48}))
            await asyncio.wait({asked}, timeout=self.random.uniform(0, 0.1))
            if not asked.cancel():
                assert asked.result().status_code == 200, asked.result().text
            await asyncio.gather(asked, return_exceptions=True)

    async def bad(self, kind: str, body: dict[str, Any]) -> None:
        """A request that must be refused with an error in OpenAI's format."""
        content, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        if kind == "malformed":
            content = content[: len(content) // 2]
        elif kind == "oversized":
            content = content + b" " * (MAX_BODY * 2**20 + 1)
        elif kind == "wrong key":
            headers["Authorization"] = "Bearer wrong"
        path = "/v1/no-such-route" if kind == "route" else "/v1/chat/completions"
        try:
            answer = await self.client.post(path, content=content, headers=headers)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            if kind != "oversized":
                raise
            self.outcomes["oversized: hung up before the answer was read"] += 1
            return
        wanted = EXPECTED.get(kind, 400)
        assert answer.status_code == wanted, f"{answer.status_code} instead of {wanted}: {answer.text}"
        assert answer.json()["error"]["message"], answer.text

    async def at_rest(self) -> bool:
        """Waits until the server reports no rows; it soon cancels those of clients who left."""
        for _ in range(100):
            health = (await self.client.get("/health")).json()
            if not health["waiting"] and not health["writing"]:
                return True
            await asyncio.sleep(0.1)
        return False


class Unbounded:
    """For Python 3.10, which has no `asyncio.timeout`; httpx has its own."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


async def worked(
    soak: Soak, requests: list[tuple[str, dict]], clients: int
) -> list[tuple[str, bool, float, float | None]]:
    """Sends the requests from that many clients; returns kind, whether it streamed, and seconds of each."""
    left, found = iter(requests), []

    async def client() -> None:
        for kind, body in left:
            found.append((kind, body["stream"], *await soak.ask(kind, body)))

    await asyncio.gather(*(client() for _ in range(clients)))
    return found


# The server.


def counts(pid: int) -> dict[str, float]:
    """Resident memory in MB, threads and open files of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "threads": int(status["Threads"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


async def watch(pid: int, samples: list[dict], done: list, every: float) -> None:
    began = time.monotonic()
    while True:
        samples.append({"seconds": round(time.monotonic() - began, 1), "requests": len(done), **counts(pid)})
        await asyncio.sleep(every)


def start(log: Path, replicas: int) -> tuple[subprocess.Popen, str]:
    """The server's process and address."""
    command = [sys.executable, "-m", "vismem", "serve", "--port", "0", "--max-body", f"{MAX_BODY}", "--device", "cpu"]
    command += ["--replicas", f"{replicas}"] if replicas > 1 else []
    quiet = {"VISMEM_API_KEY": KEY, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env={**os.environ, **quiet}
    )
    line = process.stdout.readline()
    if "http://" not in line:
        process.kill()
        raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
    return process, "http://" + line.split("http://")[1].split("/v1")[0].strip()


def stopped(process: subprocess.Popen) -> dict[str, float]:
    """Stops the server with SIGTERM."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    return {"status": status, "seconds": round(time.monotonic() - began, 2)}


# The soak.


def spread(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {"n": len(seconds)}
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {
        "n": len(seconds),
        "p50_ms": round(1000 * statistics.median(seconds), 1),
        "p95_ms": round(1000 * cuts[18], 1),
    }


async def run(address: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    kinds = Kinds(args.seed)
    rounds = 4
    each = max(args.requests // 50, 4)  # requests per round of the comparison
    mixed = args.requests - 2 * rounds * each
    limits = httpx.Limits(max_connections=args.clients + 4, max_keepalive_connections=args.clients)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=address, timeout=LONGEST, limits=limits, headers=headers) as client:
        soak, samples, done = Soak(client, args.seed), [], []
        resting: list[dict[str, float]] = []
        watching = asyncio.ensure_future(watch(pid, samples, done, args.every))
        began = time.monotonic()
        warm = int(mixed * WARM)
        for count in (warm, *[(mixed - warm) // 4] * 3, mixed - warm - 3 * ((mixed - warm) // 4)):
            done += await worked(soak, [kinds.draw() for _ in range(count)], args.clients)
            assert await soak.at_rest(), "abandoned rows were not cancelled"
            await asyncio.sleep(1 if args.requests >= LONG else 0.1)
            resting.append(counts(pid))
            print(
                f"{len(done)} requests, {len(soak.faults)} faults, at rest {resting[-1]}", file=sys.stderr, flush=True
            )
        seconds = time.monotonic() - began
        watching.cancel()
        compared: dict[str, list[float]] = {"many": [], "one": []}
        latency: dict[str, list] = {"many": [], "one": []}
        for index in range(rounds):
            requests = [("good", kinds.good()) for _ in range(each)]
            for name in ("many", "one") if index % 2 else ("one", "many"):
                began = time.monotonic()
                latency[name] += await worked(soak, requests, args.clients if name == "many" else 1)
                compared[name].append(round(each / (time.monotonic() - began), 2))
        metrics = (await client.get("/metrics")).text
        assert await soak.at_rest(), "abandoned rows were not cancelled"
    return {
        "requests": len(done) + 2 * rounds * each,
        "clients": args.clients,
        "soak_seconds": round(seconds, 1),
        "outcomes": dict(sorted(soak.outcomes.items())),
        "faults": soak.faults,
        "same_request_again": {"compared": soak.compared, "differing": soak.differing},
        "completion_tokens": soak.tokens,
        "good": spread([took for kind, _, took, _ in done if kind == "good"]),
        "first_text": spread([first for *_, first in done if first is not None]),
        "requests_per_second": {"soak": round(len(done) / seconds, 2), **compared},
        "times_faster": round(
            statistics.median(a / b for a, b in zip(compared["many"], compared["one"], strict=True)), 2
        ),
        "latency": {name: spread([took for _, _, took, _ in found]) for name, found in latency.items()},
        "latency_first_text": {
            name: spread([first for *_, first in found if first is not None]) for name, found in latency.items()
        },
        "at_rest": resting,
        "samples": samples,
        "refused": [line for line in metrics.splitlines() if line.startswith("vismem_refused_total")],
    }


def grown(resting: list[dict[str, float]]) -> list[str]:
    """What grew at rest since the warm-up: by more than 5 % of memory, any thread, or some files."""
    first, last = resting[0], resting[-1]
    allowed = {"rss_mb": 0.05 * first["rss_mb"], "threads": 0, "files": 2}
    return [
        f"{name} grew from {first[name]:g} to {last[name]:g}"
        for name, more in allowed.items()
        if last[name] - first[name] > more
    ]


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="vismem bench serve", description=__doc__)
    options.add_argument("--requests", type=int, default=5000, help="in total (default 5000; 60 or more)")
    options.add_argument("--clients", type=int, default=CLIENTS, help=f"at a time (default {CLIENTS})")
    options.add_argument("--replicas", type=int, default=1, help="replicas of the model (default 1)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--every", type=float, default=5.0, help="seconds between two samples (default 5)")
    options.add_argument("--json", type=Path, help="where to write (default results/serve_soak.json, if 5000 or more)")
    args = options.parse_args(argv)
    if args.requests < 60 or args.clients < 1 or args.replicas < 1:
        options.error("--requests must be 60 or more, --clients and --replicas 1 or more")
    path = args.json or (Path("results/serve_soak.json") if args.requests >= 5000 else None)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process, address = start(log, args.replicas)
        try:
            found = asyncio.run(run(address, process.pid, args))
        finally:
            ended = stopped(process)
        said = log.read_text().splitlines()
    found = {"machine": machine_facts("cpu", torch.float32), "replicas": args.replicas, **found}
    found.update(shutdown=ended, grown=grown(found["at_rest"]), log=said[:50], log_lines=len(said))
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [*found["faults"], *(found["grown"] if args.requests >= LONG else [])]
    if ended["status"] != 0:
        wrong.append(f"the server ended with {ended['status']}")
    if any("Traceback" in line for line in said):
        wrong.append("the server's log has a traceback")
    rates = found["requests_per_second"]
    print(f"{found['requests']} requests in {found['soak_seconds']:g} s and the comparison, {len(wrong)} faults")
    print(f"good answers {found['good']}, first text {found['first_text']}")
    print(
        f"requests/s with {args.clients} clients {rates['many']}, one at a time {rates['one']}: "
        f"{found['times_faster']} times as many"
    )
    for fault in wrong[:20]:
        print(f"fault: {fault}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
