"""Two replicas of the pocket model under Ray Serve: same answers as one engine, failures, and shutdown."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import os
import tempfile
import time
from contextlib import aclosing
from logging.handlers import BufferingHandler
from pathlib import Path
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("ray") is None or not Path("/proc/net/tcp").exists():
    pytest.skip("needs Ray Serve (vismem[replicas]) and Linux's /proc", allow_module_level=True)

from vismem.loading import LoadError, load_model
from vismem.serving.engine import Engine, Load
from vismem.serving.errors import ApiError
from vismem.serving.protocol import ChatRequest
from vismem.serving.replicas import Cluster, Replica, batched, start_replicas

pytestmark = pytest.mark.xdist_group("replicas")  # one cluster for all
PICTURE = {"type": "image_url", "image_url": "data:,"}
SETTINGS = {"batch_size": 2, "suppress_tokens": [3]}  # never an end, so that answers are as long as they may be
SMALL = 80 * 2**20  # bytes of shared memory


def ask(tokens: int = 12, *content: object, invocation: str = "learned", **more: object) -> ChatRequest:
    turn = {"role": "user", "content": content or "Describe the shelf."}
    settings = {"max_tokens": tokens, "temperature": 1.0, "seed": 0, "vismem": {"invocation": invocation}, **more}
    return ChatRequest(model="pocket", messages=[turn], **settings)


async def read(engine, asked: ChatRequest) -> tuple[list[str], list[object]]:
    """The texts of all choices, and what else their chunks have."""
    texts, others = [""] * asked.n, []
    async for chunk in engine.answer(asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            others.append((choice.logprobs, choice.vismem, choice.finish_reason, chunk.vismem))
    return texts, [*others, chunk.usage]


async def until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def begun(engine, tokens: int = 3000):
    """A long answer that is being written."""
    events = engine.answer(ask(tokens))
    while not (await anext(events)).choices[0].delta.content:
        pass
    return events


def family() -> set[int]:
    """All processes that descend from this one and have not ended."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, todo = set(), [os.getpid()]
    while todo:
        children = parents.get(todo.pop(), [])
        found.update(children)
        todo += children
    return found


def listening(pids: set[int]) -> set[str]:
    """The addresses, in the kernel's spelling, that these processes listen on."""
    sockets = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(entry))
            except OSError:
                continue
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


@pytest.fixture(scope="module")
def engine():
    earlier = family()
    found = start_replicas({"device": "cpu"}, 2, threads=1, object_store=SMALL, max_waiting=1, **SETTINGS)
    found.processes = family() - earlier
    yield found
    asyncio.run(found.close())


@pytest.fixture(scope="module")
def local():
    found = Engine(load_model(device="cpu").model, max_waiting=1, **SETTINGS)
    yield found
    asyncio.run(found.close())


def test_replicas_give_the_same_answers_as_one_engine(engine, local):
    asked = [ask(seed=seed, logprobs=True, top_logprobs=1, invocation="long@2") for seed in range(4)]
    asked.append(ask(n=2, seed=9, stop="mint"))

    async def both():
        for one in asked:
            assert await read(engine, one) == await read(local, one)
        texts, (first, *_, last, _) = await read(engine, asked[0])
        assert texts[0] and first[-1].invocation == "long@2" and last[2] == "length"

    asyncio.run(both())


def test_both_replicas_work_and_the_load_is_their_sum(engine):
    async def run():
        held = [await begun(engine) for _ in range(4)]  # two rows each: with one of them alone, two would wait
        assert [replica.rows for replica in engine.replicas] == [2, 2]
        assert engine.load().writing == 4 and engine.load().waiting == 0
        assert engine.ready()
        for events in held:
            await events.aclose()
        assert engine.load().writing == engine.load().waiting == 0

    asyncio.run(run())


def test_an_abandoned_answer_frees_its_row(engine):
    async def run():
        for _ in range(3):  # leftovers of a round would delay the next, and two on one replica each other
            held = await asyncio.wait_for(asyncio.gather(*(begun(engine) for _ in range(4))), 8)
            for events in held:
                await events.aclose()
        end = time.monotonic() + 20
        for index in range(2):
            while max([update.writing async for update in engine.cluster.methods[index](ask(4))]) > 1:
                assert time.monotonic() < end

    asyncio.run(run())


def test_a_full_queue_is_refused_by_the_server(engine):
    async def run():
        held = [await begun(engine) for _ in range(4)]
        waiting = [asyncio.ensure_future(read(engine, ask(seed=1))) for _ in range(2)]
        await until(lambda: engine.load().waiting == 2)
        with pytest.raises(ApiError, match="too many requests") as caught:
            await read(engine, ask())
        assert caught.value.status == 429 and caught.value.headers == {"Retry-After": "1"}
        for events in held:
            await events.aclose()
        first, second = await asyncio.gather(*waiting)
        assert first == second

    asyncio.run(run())


def test_errors_of_a_replica_arrive_unchanged(engine, local):
    def told_by(which, asked: ChatRequest) -> dict:
        with pytest.raises(ApiError) as caught:
            asyncio.run(read(which, asked))
        return vars(caught.value)

    for asked in (
        ask(n=3),
        ask(n=100),
        ask(10**6),
        ask(4, PICTURE),
    ):
        assert told_by(engine, asked) == told_by(local, asked)


def test_an_unexpected_error_of_a_replica_stays_in_its_log(caplog):
    async def broken(_):
        raise ZeroDivisionError("secret")
        yield

    replica = Replica.__new__(Replica)
    replica.engine = SimpleNamespace(answer=broken, load=lambda: Load(0, 0))
    replica.running, replica.warnings = 0, BufferingHandler(9)

    async def run():
        return [update async for update in replica.answer(ask())]

    (update,) = asyncio.run(run())
    assert update.error.message == "the server failed; its log has the reason" and "secret" in caplog.text


def test_events_are_batched_and_closing_closes_the_answer():
    closed = []

    async def events(error: bool):
        try:
            for number in range(5):
                yield number
                await asyncio.sleep(0)
            if error:
                raise ApiError(503, "over")
            await asyncio.sleep(60)
        finally:
            closed.append(error)

    async def run():
        found = [each async for each in batched(events(True), lambda: 0.05)]
        assert found[0][0][0] == 0 and len(found) < 5
        assert [number for numbers, _ in found for number in numbers] == list(range(5))
        assert [error is None for _, error in found] == [True] * (len(found) - 1) + [False]
        async with aclosing(batched(events(False), lambda: 0.0)) as parts:
            await anext(parts)
        assert closed == [True, False]

    asyncio.run(run())


def test_the_server_survives_the_death_of_a_replica(engine):
    import ray

    async def run():
        held = [await begun(engine), await begun(engine)]
        assert [replica.rows for replica in engine.replicas] == [1, 1]
        victim = f"SERVE_REPLICA::{engine.cluster.apps[0]}#"
        actors = [each for each in ray.util.list_named_actors(all_namespaces=True) if each["name"].startswith(victim)]
        ray.kill(ray.get_actor(**actors[0]))
        ends = []
        for events in held:
            try:
                for _ in range(20):
                    await asyncio.wait_for(anext(events), 30)
                ends.append(None)
            except ApiError as error:
                ends.append(error)
        assert sorted(error is None for error in ends) == [False, True]
        (died,) = (error for error in ends if error is not None)
        assert died.status == 503 and "died" in died.message
        for events in held:
            await events.aclose()
        # New answers come at once from the remaining replica, later also from the dead one's replacement.
        for seed in range(4):
            assert (await read(engine, ask(seed=seed)))[0][0]
        assert engine.load().writing == engine.load().waiting == 0
        await until(lambda: all(replica.running for replica in engine.replicas))
        held = [await begun(engine), await begun(engine)]
        assert engine.load().writing == 2
        for events in held:
            await events.aclose()

    asyncio.run(run())


def test_nothing_listens_beyond_loopback(engine):
    assert listening(engine.processes | {os.getpid()}) <= {
        "0100007F",
        "0000000000000000FFFF00000100007F",
        "0" * 24 + "01000000",
    }


def test_replicas_that_cannot_start_say_why(engine):
    from ray import serve

    other = copy.copy(engine.cluster)
    other.name = "other"
    with pytest.raises(LoadError, match="2 replicas with 1 GPUs each need more than the 0 that Ray has"):
        other.deploy({"device": "cpu"}, 1, {}, 2, 1)
    with pytest.raises(LoadError, match="no-such-folder"):
        other.deploy({"device": "cpu", "checkpoint": "/no-such-folder"}, 1, {}, 1, None)
    serve.delete(*other.apps)
    assert engine.ready()


def test_close_is_graceful_and_leaves_nothing_behind(engine):
    import ray

    async def run():
        short, long = asyncio.ensure_future(read(engine, ask(30))), await begun(engine)
        await until(lambda: engine.load().writing == 2)
        closing = asyncio.ensure_future(engine.close(finish_within=3))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="stopping") as caught:
            await read(engine, ask())
        assert caught.value.status == 503 and not engine.ready()
        assert (await short)[0][0]
        with pytest.raises(ApiError, match="stopping"):
            async for _ in long:
                pass
        await closing

    folder = Path(engine.cluster.folder)
    assert folder.is_dir()
    asyncio.run(run())
    assert not folder.exists()
    asyncio.run(until(lambda: not engine.processes & family(), 20))
    assert not any(engine.cluster.running()) and not ray.is_initialized()  # a late call starts no other cluster


def test_start_errors_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match="1 replica or more, got 0"):
        start_replicas({}, 0)
    clusters = []

    def fails(cluster, *_):
        assert Path(cluster.folder).is_dir() and "RAY_AUTH_TOKEN" in os.environ
        clusters.append(cluster)
        raise LoadError("no replica")

    with monkeypatch.context() as patch:  # instead of another Ray, which takes long to start
        patch.setattr(Cluster, "_connect", lambda *_: None)
        patch.setattr(Cluster, "deploy", fails)
        patch.setattr("ray.shutdown", lambda: clusters.append("shut down"))
        with pytest.raises(LoadError, match="no replica"):
            start_replicas({"device": "cpu"}, 2, object_store=SMALL)
    cluster, last = clusters
    assert last == "shut down" and not Path(cluster.folder).exists() and "RAY_AUTH_TOKEN" not in os.environ
    with pytest.raises(LoadError, match=r"cannot use Ray at 127\.0\.0\.1:9: "):
        start_replicas({"device": "cpu"}, 2, address="127.0.0.1:9")


def test_a_start_that_fails_is_one_line_and_leaves_nothing(monkeypatch):
    def timeout(*_):
        raise Exception("The current node timed out during startup.")  # as Ray 2.60 does

    import ray  # noqa: F401 - sets variables

    before, folders = dict(os.environ), set(Path(tempfile.gettempdir()).glob("vismem-ray-*"))
    monkeypatch.setattr(Cluster, "deploy", timeout)
    with monkeypatch.context() as patch, pytest.raises(Exception, match="timed out during startup"):
        patch.setattr(Cluster, "_connect", lambda *_: None)
        start_replicas({}, 2)
    monkeypatch.setattr(Cluster, "_connect", timeout)
    with pytest.raises(LoadError, match="cannot use Ray at this machine: The current node timed out"):
        start_replicas({}, 2)
    assert set(Path(tempfile.gettempdir()).glob("vismem-ray-*")) == folders
    assert dict(os.environ) == before
