"""What a server of live rows could stand on: FastAPI alone, LitServe, Ray Serve, and transformers' own server.

It needs libraries that are no dependencies of this package: each ground gets an environment of its own from the package
index (`--environments`, made if missing; half a gigabyte for Ray). What transformers' server does with the pocket model
is asked of the installed one. Figures are for one machine that runs server and clients.
Everything listens on loopback, and all loops are bounded.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
GROUNDS = {  # the environment each runs in
    "fastapi": "fastapi",  # our way: a thread that owns the batch, one process
    "litserve": "litserve",  # its loop for continuous batching
    "ray": "ray",  # Ray Serve's HTTP proxy, one replica with a page in it
    "front": "ray",  # a page in front of one replica of Ray Serve, token by token
    "gathered": "ray",  # the same, with at most 500 messages a second
}
WANTED = {"fastapi": ["fastapi", "uvicorn", "prometheus-client"], "litserve": ["litserve"], "ray": ["ray[serve]"]}
TICK = 5.0  # milliseconds of a step of the pretended model
HEAD = "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"


# Environments and processes.


def environment(folder: Path, name: str) -> dict:
    """Makes an environment if it is missing; how many packages it has, pip and its like apart, and its size."""
    place = folder / name
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *WANTED[name]], check=True)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    packages = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}
    for own in ("pip", "setuptools"):
        packages.pop(own, None)
    files = [path for path in (place / "lib").rglob("*") if path.is_file() and not path.is_symlink()]
    own = [path for path in files if path.relative_to(place / "lib").parts[2].startswith(("pip", "setuptools"))]
    size = sum(path.stat().st_size for path in files) - sum(path.stat().st_size for path in own)
    return {"packages": len(packages), "megabytes": round(size / 1e6, 1), "versions": packages}


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += parents.get(found[-1], [])
    return found


def megabytes(pids: list[int]) -> float:
    """Resident memory, where pages that processes share are counted once."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return round(total / 1024, 1)


def running(pids: list[int]) -> list[int]:
    """Those that have not ended."""
    found = []
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(pid)
        except OSError:
            pass
    return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """A server as a process with its log."""

    def __init__(self, command: list, port: int, log: Path, ready: float = 90.0, **environment: str) -> None:
        self.port, began = port, time.monotonic()
        with log.open("w") as file:
            settings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **environment}
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=settings, start_new_session=True
            )
        while time.monotonic() < began + ready:
            try:
                if asyncio.run(ask(port, "/health", method="GET"))[0] == 200:
                    self.start_seconds = round(time.monotonic() - began, 2)
                    return
            except OSError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"{command} did not come up: {log.read_text()[-2000:]}")

    def stop(self, patience: float = 15.0) -> dict:
        """Asks it to end; what was left after `patience` seconds is killed and counted."""
        pids, began = family(self.process.pid), time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        while (left := running(pids)) and time.monotonic() < began + patience:
            self.process.poll()
            time.sleep(0.02)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return {"seconds": round(time.monotonic() - began, 2), "processes": len(pids), "left": len(left)}


# Clients, as plain as can be so that they take little of the processor.


async def ask(port: int, path: str, body: bytes = b"", method: str = "POST", wait: float = 60.0) -> tuple[int, bytes]:
    """Status and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
    try:
        head = HEAD.replace("POST", method).replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
        writer.write(head.format(path=path, length=len(body)).encode() + body)
        answer = await asyncio.wait_for(reader.read(-1), wait)
    finally:
        writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), rest


async def stream(port: int, tokens: int, hang_up_after: int | None = None) -> tuple[list[float], float]:
    """How long each token was under way, and when the last one came; hangs up after some tokens if told to."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    delays: list[float] = []
    try:
        body = json.dumps({"tokens": tokens}).encode()
        writer.write(HEAD.format(path="/predict", length=len(body)).encode() + body)
        while len(delays) < (hang_up_after or tokens):
            line = await asyncio.wait_for(reader.readline(), 30)
            if not line:
                break
            if line.startswith(b"data: "):
                delays.append(time.monotonic() - float(line[6:]))
    finally:
        writer.close()
    return delays, time.monotonic()


def milliseconds(delays: list[float]) -> dict:
    cuts = statistics.quantiles(delays, n=20)
    return {"p50": round(1000 * statistics.median(delays), 3), "p95": round(1000 * cuts[18], 3), "n": len(delays)}


async def load(port: int, clients: int, each: int, tokens: int) -> tuple[list[float], float]:
    """All delays and the seconds it took: so many clients, each with so many answers one after the other."""

    async def client() -> list[float]:
        return [delay for _ in range(each) for delay in (await stream(port, tokens))[0]]

    began = time.monotonic()
    found = await asyncio.gather(*(client() for _ in range(clients)))
    return [delay for delays in found for delay in delays], time.monotonic() - began


async def announced(port: int, path: str = "/predict") -> str:
    """What it says to a body of 10 MB that is announced and never sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(HEAD.format(path=path, length=10_000_000).encode())
        return (await asyncio.wait_for(reader.readline(), 2)).decode().strip() or "hung up"
    except TimeoutError:
        return "waits for it"
    finally:
        writer.close()


# The grounds.


def measured(ground: str, python: Path, folder: Path) -> dict:
    """One round with one ground."""
    record, port = folder / "record", free_port()
    record.unlink(missing_ok=True)
    script = HERE / "serving_servers.py"
    command = [python, script, ground, "--port", port, "--tick", TICK, "--record", record]
    server = Server([str(part) for part in command], port, folder / f"{ground}.log")
    found: dict = {"start_seconds": server.start_seconds}
    try:
        asyncio.run(load(port, 4, 2, 16))  # warm
        found["megabytes"] = megabytes(family(server.process.pid))
        for clients in (1, 16, 64):
            delays, seconds = asyncio.run(load(port, clients, 2, 64))
            found[f"token_delay_ms_{clients}"] = milliseconds(delays)
            found[f"share_of_possible_{clients}"] = round(2 * 64 * TICK / 1000 / seconds, 3)
        delays, seconds = asyncio.run(load(port, 32, 15, 1))
        found["requests_per_second"] = round(len(delays) / seconds, 1)
        record.unlink()
        found["after_hanging_up"] = asyncio.run(hung_up(port, record))
        found["body_announced"] = asyncio.run(announced(port))
        status, body = asyncio.run(ask(port, "/predict", b"{no json"))
        found["malformed"] = {"status": status, "body": body[:120].decode(errors="replace")}
        found["shutdown"] = asyncio.run(stopped_while_streaming(server))
    finally:
        if running([server.process.pid]):
            server.stop()
    return found


async def hung_up(port: int, record: Path, tries: int = 5) -> dict:
    """Tokens that rows of 400 went on being given after their reader had left at the 20th."""
    ended = [(await stream(port, 400, hang_up_after=20))[1] for _ in range(tries)]
    deadline = time.monotonic() + 10
    lines: list[dict] = []
    while len(lines) < tries and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    extra = [line["written"] - 20 for line in lines]
    return {
        "tokens_more": statistics.median(extra),
        "cancelled": sum(line["end"] == "cancelled" for line in lines),
        "of": len(ended),
    }


async def stopped_while_streaming(server: Server) -> dict:
    """Ends it in the middle of an answer of one second."""
    answer = asyncio.ensure_future(stream(server.port, 200))
    await asyncio.sleep(0.2)
    found = await asyncio.to_thread(server.stop)
    try:
        delays, _ = await answer
    except (OSError, ValueError):
        delays = []
    return {**found, "tokens_of_200": len(delays)}


# transformers' own.


def transformers_serve(folder: Path) -> dict:
    """What its server does with the pocket model, which is a plain Idefics3 to it."""
    from vismem.pocket import BASE_PATH

    port, picture = free_port(), HERE.parent / "examples" / "shelf.png"
    log = folder / "transformers.log"
    command = [Path(sys.executable).parent / "transformers", "serve", BASE_PATH, "--continuous-batching"]
    command += ["--device", "cpu", "--port", port, "--host", "127.0.0.1"]
    server = Server([str(part) for part in command], port, log, HF_HUB_OFFLINE="1")
    data = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()

    def chat(url: str | None, **more: object) -> dict:
        parts: list = [{"type": "text", "text": "Describe the shelf."}]
        if url is not None:
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        return {"model": str(BASE_PATH), "messages": [{"role": "user", "content": parts}], "max_tokens": 64, **more}

    def told(url: str | None, **more: object) -> tuple[int, bytes]:
        return asyncio.run(ask(port, "/v1/chat/completions", json.dumps(chat(url, **more)).encode()))

    def choices(url: str | None, **more: object) -> dict:
        status, body = told(url, **more)
        if status != 200:
            return {"status": status, "body": body[:160].decode(errors="replace")}
        found = json.loads(body)["choices"]
        return {"status": status, "choices": len(found), "logprobs": found[0].get("logprobs") is not None}

    async def at_once(count: int) -> float:
        body, began = json.dumps(chat(data, stream=True)).encode(), time.monotonic()
        await asyncio.gather(*(ask(port, "/v1/chat/completions", body) for _ in range(count)))
        return time.monotonic() - began

    try:
        found: dict = {"version": version("transformers"), "start_seconds": server.start_seconds}
        told(data)
        found["megabytes"] = megabytes(family(server.process.pid))
        found["image"], found["text"] = choices(data), choices(None)
        found["n_2"] = choices(data, n=2)
        found["logprobs"] = choices(data, logprobs=True)
        found["field_of_ours"] = choices(data, vismem={"invocation": "off"})
        found["file_of_the_server"] = choices(str(picture))
        found["malformed"] = dict(
            zip(("status", "body"), asyncio.run(ask(port, "/v1/chat/completions", b"{")), strict=True)
        )
        found["malformed"]["body"] = found["malformed"]["body"][:120].decode()
        found["body_announced"] = asyncio.run(announced(port, "/v1/chat/completions"))
        rounds = [(asyncio.run(at_once(1)), asyncio.run(at_once(4))) for _ in range(5)]
        found["seconds_1"], found["seconds_4"] = (
            round(statistics.median(column), 3) for column in zip(*rounds, strict=True)
        )
        lines = log.read_text().splitlines()
        found["said"] = next((line[-140:] for line in lines if "continuous batching" in line), None)
        return found
    finally:
        found["shutdown"] = server.stop()


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="vismem bench serving_comparison", description=__doc__)
    options.add_argument("--environments", type=Path, help="a folder of environments to use and keep; else a new one")
    options.add_argument("--rounds", type=int, default=3, help="rounds, one ground after the other in each (3)")
    options.add_argument("--json", type=Path, default=Path("results/serving_comparison.json"))
    args = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        environments = args.environments or folder
        found: dict = {
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
            "tick_ms": TICK,
            "environments": {name: environment(environments, name) for name in WANTED},
            "rounds": {ground: [] for ground in GROUNDS},
        }
        for turn in range(args.rounds):
            for ground, name in GROUNDS.items():
                print(f"round {turn + 1}/{args.rounds}: {ground}", file=sys.stderr, flush=True)
                found["rounds"][ground].append(measured(ground, environments / name / "bin" / "python", folder))
        print("transformers serve", file=sys.stderr, flush=True)
        found["transformers"] = transformers_serve(folder)
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    for ground, rounds in found["rounds"].items():
        shown = [f"{rounds[0]['megabytes']:g} MB"]
        for clients in (1, 16, 64):
            median = statistics.median(each[f"token_delay_ms_{clients}"]["p50"] for each in rounds)
            shown.append(f"{median:.2f} ms a token with {clients}")
        shown.append(f"{statistics.median(each['requests_per_second'] for each in rounds):g} requests/s")
        print(f"{ground}: {', '.join(shown)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
