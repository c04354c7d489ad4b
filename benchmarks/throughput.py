"""How many answers per second a live batch gives, and the memory they take: `stream_batch` against `generate`.

Three kinds of rows, BASE/SORT/BATCH, all decoded greedily to their full length:

stream  A list of requests: image prompts, each with its own answer length. Runs, interleaved round by round:
            generate    transformers' `generate` on chunks of BATCH requests, each until its longest answer is done
            off         `stream_batch` with memory off
            on          with memory "learned", never invoked (the four tokens' output rows are zero)
            few, often  with invocations at random places, about 0.2 and 1.0 of each kind per answer
            continuous  transformers' own continuous batching, which takes only text
            text        `stream_batch` with memory off on the same text prompts
long    Answers of `LONG` tokens: `generate` with its dynamic cache, and ours in slots, memory off and on. Time per
        token at several places, and how much the process grew.
memory  Peaks of resident memory while one batch is answered, in a separate process as in memory.py.

Answers without invocations must equal the base's. `benchmarks/README.md` explains the output.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random as Chance
from typing import Any

import torch
from bases import WORK, equipped, prompt, silence
from common import Clock, Progress, Spread, add_busy, aligned, drive, machine_facts, parsed, parser, turned, verdicts
from memory import SETTINGS, peak, status
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList

import vismem
from vismem.config import KINDS
from vismem.decoding.cache import Slots
from vismem.decoding.policies import Policy, Random
from vismem.decoding.prepare import Layout

BATCHES = (1, 2, 4, 8, 16, 32, 64)
VISUAL_TOKENS, SHORTEST, LONGEST = 64, 8, 96
FEWEST, TURNOVERS = 16, 2  # at least so many requests, and so many times the batch
RATES = {"few": 0.2, "often": 1.0}  # invocations of each kind per answer
LONG, MARKS, WINDOW = 2048, (128, 512, 1024, 2048), 64
MEMORY_TOKENS, MEMORY_BATCHES = 32, (1, 4, 16, 64)
ALLOWED_RATIO, ALLOWED_GROWTH = 1.05, 1.0
PEERS = {"off": "generate", "on": "generate", "few": "generate", "often": "generate", "text": "continuous"}


@dataclass(frozen=True)
class Case:
    """One row: a base by name, what is measured, and the batch."""

    model: str
    part: str
    batch: int

    def __str__(self) -> str:
        return f"{self.model}/{self.part}/{self.batch}"

    @property
    def work(self) -> float:
        """Its relative time."""
        each = {"stream": 6 + self.batch / 5, "long": 8 + self.batch, "memory": 1 + self.batch / 8}
        return WORK.get(self.model, 1) * each[self.part]


CASES = tuple(
    Case(model, part, batch)
    for model in ("pocket", "qwen-28m")
    for part, batches in (("stream", BATCHES), ("memory", MEMORY_BATCHES), ("long", (1, 8)))
    for batch in batches
)


# Requests and their answers.


@dataclass
class Asked:
    """One request: the processor's output, and its answer's number of tokens."""

    inputs: dict[str, Tensor]
    tokens: int


@dataclass
class Done:
    """Seconds for all requests, their tokens, and the invocations of each kind."""

    seconds: float
    answers: list[list[int]]
    invocations: dict[str, int] = field(default_factory=dict)


def requests(base: Any, batch: int, text: bool = False) -> list[Asked]:
    """Requests for one row of the table; a larger batch adds to those of a smaller one."""
    chance, found = Chance(0), []
    for seed in range(max(FEWEST, TURNOVERS * batch)):
        inputs = prompt(base, VISUAL_TOKENS, 1, seed)
        if text:
            words = inputs["input_ids"][:, VISUAL_TOKENS:]
            words = words.repeat(1, -(-inputs["input_ids"].shape[1] // words.shape[1]))
            marks = [value for name, value in vars(base.config).items() if name.endswith("_token_id") and value]
            words = words[~torch.isin(words, torch.tensor(marks, device=words.device))][None]
            inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
        found.append(Asked(inputs, chance.randint(SHORTEST, LONGEST)))
    return found


def timed(device: torch.device, busy: bool, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes, and what it returns."""
    gc.collect()
    clock = Clock(device, busy)
    clock.tick()
    found = work()
    clock.tick()
    first, last = clock.ticks
    return last - first, found


def generate(model: vismem.VisMem, asked: list[Asked], batch: int, busy: bool) -> Done:
    """transformers' `generate` in static batches."""

    def work() -> list[list[int]]:
        answers = []
        for start in range(0, len(asked), batch):
            chunk = asked[start : start + batch]
            inputs = {name: torch.cat([one.inputs[name] for one in chunk]) for name in chunk[0].inputs}
            longest = max(one.tokens for one in chunk)
            new = model.base.generate(**inputs, max_new_tokens=longest, do_sample=False)[:, -longest:].tolist()
            answers += [row[: one.tokens] for row, one in zip(new, chunk, strict=True)]
        return answers

    return Done(*timed(model.device, busy, work))


def policies(name: str, asked: list[Asked]) -> list[str | Policy]:
    """Each request's invocation policy."""
    if name not in RATES:
        return ["learned" if name == "on" else "off"] * len(asked)
    mean = statistics.mean(one.tokens for one in asked)
    return [Random(len(KINDS) * RATES[name] / mean, "anywhere", seed) for seed in range(len(asked))]


def stream(model: vismem.VisMem, asked: list[Asked], batch: int, name: str, busy: bool) -> Done:
    """`stream_batch` under the policies with this name."""
    sources = [
        vismem.Request(one.inputs, policy, generation={"max_new_tokens": one.tokens, "do_sample": False}, tag=index)
        for index, (one, policy) in enumerate(zip(asked, policies(name, asked), strict=True))
    ]
    seconds, answers = timed(model.device, busy, lambda: list(model.stream_batch(sources, batch)))
    made = [invocation.kind for answer in answers for invocation in answer.invocations]
    answers.sort(key=lambda answer: answer.tag)
    return Done(seconds, [answer.tokens for answer in answers], {kind: made.count(kind) for kind in KINDS})


def continuous(model: vismem.VisMem, asked: list[Asked], batch: int, busy: bool) -> Done:
    """transformers' own continuous batching; the time excludes its start-up."""
    base, ids = model.base, [one.inputs["input_ids"][0].tolist() for one in asked]
    settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=LONGEST)
    limits = ContinuousBatchingConfig(max_requests_per_batch=batch, num_blocks=2 * batch + 4)

    def work() -> list[list[int]]:
        names = [manager.add_request(row, max_new_tokens=one.tokens) for row, one in zip(ids, asked, strict=True)]
        found: dict[str, list[int]] = {}
        while len(found) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped by itself; leave that row out (--only)")
        return [found[name] for name in names]

    with base.continuous_batching_context_manager(settings, continuous_batching_config=limits) as manager:
        return Done(*timed(model.device, busy, work))


def stream_round(model: vismem.VisMem, asked: dict[str, list[Asked]], batch: int, turn: int, busy: bool) -> dict:
    """Every run of a stream once, starting with a different one each turn.

    Args:
        asked: the requests by `"images"` and `"text"`.
    """
    runs: dict[str, Callable[[], Done]] = {"generate": lambda: generate(model, asked["images"], batch, busy)}
    for name in ("off", "on", *RATES):
        runs[name] = lambda name=name: stream(model, asked["images"], batch, name, busy)
    runs["continuous"] = lambda: continuous(model, asked["text"], batch, busy)
    runs["text"] = lambda: stream(model, asked["text"], batch, "off", busy)
    return {name: runs[name]() for name in turned(list(runs), turn)}


def differing(done: dict[str, Done], exact: bool) -> dict[str, int]:
    """How many answers of the runs without invocations differ from the base's.

    Raises:
        RuntimeError: if one does and arithmetic is `exact` enough to compare.
    """
    found = {}
    for name in ("off", "on", "text"):
        pairs = zip(done[name].answers, done[PEERS[name]].answers, strict=True)
        found[name] = sum(ours != theirs for ours, theirs in pairs)
        if exact and found[name]:
            raise RuntimeError(
                f"{name!r} wrote {found[name]} answers that differ from {PEERS[name]!r}; the times cannot be compared"
            )
    return found


@dataclass
class Stream:
    """One stream's numbers.

    Args:
        row, model, weights, batch: the case; `weights` is `"trained"` or `"random"`.
        command, rounds, cpus: how this row was measured, and how many cores the process could use.
        requests, tokens: how many, and their answers' tokens in total.
        useful: share of the places in `generate`'s static batches that belong to an answer.
        seconds: of every run; `ratio`: over its peer's in the same round.
        tokens_per_second, rows_per_second: by the median; memory tokens are not counted.
        invocations: of each kind per answer.
        differing: answers without invocations that differ from the peer's.
    """

    row: str
    model: str
    weights: str
    batch: int
    command: str
    rounds: int
    cpus: int
    requests: int
    tokens: int
    useful: float
    seconds: dict[str, Spread] = field(default_factory=dict)
    ratio: dict[str, Spread] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    rows_per_second: dict[str, float] = field(default_factory=dict)
    invocations: dict[str, dict[str, float]] = field(default_factory=dict)
    differing: dict[str, int] = field(default_factory=dict)


def summarize_stream(
    case: Case, weights: str, command: str, asked: list[Asked], rounds: list[dict[str, Done]], exact: bool = True
) -> Stream:
    """A stream's numbers from its rounds."""
    total, places = sum(one.tokens for one in asked), 0
    for start in range(0, len(asked), case.batch):
        chunk = asked[start : start + case.batch]
        places += len(chunk) * max(one.tokens for one in chunk)
    useful = round(total / places, 3)
    found = Stream(str(case), case.model, weights, case.batch, command, len(rounds), cpus(), len(asked), total, useful)
    for name in rounds[0]:
        found.seconds[name] = Spread.of([done[name].seconds for done in rounds], 4)
        found.tokens_per_second[name] = round(total / found.seconds[name].median, 2)
        found.rows_per_second[name] = round(len(asked) / found.seconds[name].median, 3)
    for name, peer in PEERS.items():
        found.ratio[name] = Spread.of([done[name].seconds / done[peer].seconds for done in rounds], 4)
    for name in RATES:
        counts = rounds[0][name].invocations
        found.invocations[name] = {kind: round(count / len(asked), 3) for kind, count in counts.items()}
    found.differing = differing(rounds[0], exact)
    return found


# Long answers.


class Watch(Clock):
    """A clock that also records the process's resident memory."""

    def __init__(self, device: torch.device, busy: bool = False) -> None:
        super().__init__(device, busy)
        self.resident: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.resident.append(resident())
        return super().__call__(input_ids, scores)


def resident() -> int:
    """Resident bytes of this process; 0 if the system does not report them."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.is_file() else 0


def column_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one row's keys and values in one column, of all layers."""
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * size * dtype.itemsize


def long_round(model: vismem.VisMem, inputs: dict[str, Tensor], turn: int, busy: bool) -> dict[str, Watch]:
    """Every long answer once."""
    ours = {"cache_implementation": "static"}
    runs: dict[str, tuple[Callable, dict[str, Any]]] = {
        "generate": (model.base.generate, {}),
        "off": (model.generate, {**ours, "invocation": "off"}),
        "on": (model.generate, {**ours, "invocation": "learned"}),
    }
    found, written = {}, {}
    for name in turned(list(runs), turn):
        work, keywords = runs[name]
        gc.collect()
        found[name] = Watch(model.device, busy)
        processors = LogitsProcessorList([found[name]])
        written[name] = work(**inputs, max_new_tokens=LONG, do_sample=False, logits_processor=processors, **keywords)
    for name in ("off", "on"):
        same = int((written[name] == written["generate"]).all(1).sum())
        if same < len(written[name]) and model.dtype == torch.float32 and model.device.type == "cpu":
            raise RuntimeError(f"{name!r} wrote {len(written[name]) - same} long answers that differ from the base's")
    return found


@dataclass
class Long:
    """Numbers of long answers.

    Args:
        token_ms: for each run and place, the median time of the `WINDOW` tokens before it.
        ratio: of ours over `generate`'s in the same round.
        grown_mb: how much the process grew from the first mark to the last; `cache_mb`, the part that is new keys and
            values (0 for ours, whose slots were allocated before).
        column_bytes: bytes of keys and values per row and column.
    """

    row: str
    model: str
    weights: str
    batch: int
    command: str
    rounds: int
    cpus: int
    column_bytes: int
    token_ms: dict[str, dict[str, Spread]] = field(default_factory=dict)
    ratio: dict[str, dict[str, Spread]] = field(default_factory=dict)
    grown_mb: dict[str, Spread] = field(default_factory=dict)
    cache_mb: dict[str, float] = field(default_factory=dict)


def summarize_long(
    case: Case, weights: str, command: str, model: vismem.VisMem, rounds: list[dict[str, Watch]]
) -> Long:
    """Numbers of long answers from their rounds."""
    each = column_bytes(model.config, model.dtype)
    found = Long(str(case), case.model, weights, case.batch, command, len(rounds), cpus(), each)
    window = getattr(model.config.get_text_config(), "sliding_window", None)  # generate keeps no more than this
    grown = (0 if window and window < MARKS[0] else LONG - MARKS[0]) * each * case.batch

    def at(watch: Watch, mark: int) -> float:
        ticks = watch.ticks[max(mark - WINDOW, 0) : mark]
        return 1e3 * statistics.median(b - a for a, b in pairwise(ticks))

    for name in rounds[0]:
        samples = [[at(done[name], mark) for done in rounds] for mark in MARKS]
        found.token_ms[name] = {str(mark): Spread.of(each) for mark, each in zip(MARKS, samples, strict=True)}
        sizes = [(done[name].resident[-1] - done[name].resident[MARKS[0]]) / 1e6 for done in rounds]
        found.grown_mb[name] = Spread.of(sizes, 2)
        found.cache_mb[name] = round(grown / 1e6, 2) if name == "generate" else 0.0
    for name in ("off", "on"):
        found.ratio[name] = {
            str(mark): Spread.of([at(done[name], mark) / at(done["generate"], mark) for done in rounds], 4)
            for mark in MARKS
        }
    return found


# Memory.


@dataclass
class Memory:
    """Peaks of one batch.

    Args:
        peak_mb: of the process while the batch was answered, less what it held before, for each run.
        slots_mb: our slots' keys and values.
        column_bytes, columns: bytes of one row's keys and values per column, and how many columns a slot has.
    """

    row: str
    model: str
    weights: str
    batch: int
    command: str
    peak_mb: dict[str, float]
    slots_mb: float
    column_bytes: int
    columns: int


def peaks(name: str, batch: int) -> dict[str, Any]:
    """A batch's peaks; needs its own process, whose freed memory returns to the system."""
    torch.set_num_threads(1)
    model, weights = equip(name)
    asked = requests(model.base, batch)[:batch]
    for one in asked:
        one.tokens = MEMORY_TOKENS
    few = [Asked(asked[0].inputs, 2)]
    found, before = {}, 0
    with laid_out() as slots:
        for run, work in (("generate", generate), ("off", stream), ("on", stream)):
            more = (False,) if work is generate else (run, False)
            work(model, few, 1, *more)  # the libraries' own buffers
            slots.clear()
            gc.collect()
            before = status("VmRSS")
            found[run] = round((peak(lambda work=work, more=more: work(model, asked, batch, *more)) - before) / 1e6, 1)
    layers = [(layer.keys, layer.values) for layer in slots[0].cache.layers]
    size, columns = sum(buffer.nbytes for pair in layers for buffer in pair), layers[0][0].shape[2]
    sizes = {"slots_mb": round(size / 1e6, 2), "column_bytes": size // batch // columns, "columns": columns}
    return {"weights": weights, "peak_mb": found, **sizes}


@contextmanager
def laid_out() -> Iterator[list[Slots]]:
    """Collects the slots allocated while the context lasts."""
    made, lay_out = [], Layout.slots

    def slots(self: Layout, *args: Any, **kwargs: Any) -> Slots:
        made.append(lay_out(self, *args, **kwargs))
        return made[-1]

    Layout.slots = slots
    try:
        yield made
    finally:
        Layout.slots = lay_out


def measure_memory(case: Case, command: str) -> Memory:
    """Peaks of a case, measured in a separate process."""
    words = [sys.executable, __file__, "--here", case.model, str(case.batch)]
    done = subprocess.run(words, env={**os.environ, **SETTINGS}, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return Memory(str(case), case.model, batch=case.batch, command=command, **found)


# The run.


def cpus() -> int:
    """How many cores the process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def equip(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[vismem.VisMem, str]:
    """A base of that name whose memory is never invoked and whose answers end only at their length."""
    model, weights = equipped(name, device, dtype)
    silence(model)
    model.base.generation_config.eos_token_id = None
    return model, weights


def measure(
    cases: list[Case], rounds: int, command: str, device: str, dtype: torch.dtype, busy: bool
) -> Iterator[Stream | Long | Memory]:
    """Measures `cases` one by one; a few short answers warm each one up."""
    progress, exact = Progress(cases, [case.work for case in cases], rounds), dtype == torch.float32 and device == "cpu"
    made: dict[str, tuple[vismem.VisMem, str]] = {}
    for index, case in enumerate(cases):
        progress.say(index, 0)
        if case.part == "memory":
            if sys.platform == "linux" and device == "cpu":
                yield measure_memory(case, command)
            continue
        if case.model not in made:
            made = {case.model: equip(case.model, device, dtype)}
        model, weights = made[case.model]
        asked = {kind: requests(model.base, case.batch, kind == "text") for kind in ("images", "text")}
        kept: list = []
        if case.part == "stream":
            few = {kind: [Asked(one.inputs, 4) for one in found[: case.batch]] for kind, found in asked.items()}
            stream_round(model, few, case.batch, 0, busy)
        for turn in range(1, rounds + 1):
            progress.say(index, turn)
            if case.part == "stream":
                kept.append(stream_round(model, asked, case.batch, turn, busy))
            else:
                kept.append(long_round(model, prompt(model.base, VISUAL_TOKENS, case.batch), turn, busy))
        if case.part == "stream":
            yield summarize_stream(case, weights, command, asked["images"], kept, exact)
        else:
            yield summarize_long(case, weights, command, model, kept)


# Results.


def budgets(results: list[Stream | Long | Memory]) -> list[dict[str, Any]]:
    """Each row's limit and measurement."""
    found = []

    def add(row: str, what: str, measured: float, allowed: float) -> None:
        found.append({"row": row, "what": what, "measured": measured, "allowed": allowed, "met": measured <= allowed})

    for one in results:
        if isinstance(one, Stream):
            for name in ("off", "on"):
                add(one.row, f"time, {name}, of static batches'", one.ratio[name].median, ALLOWED_RATIO)
            add(one.row, "time, text, of continuous batching's", one.ratio["text"].median, ALLOWED_RATIO)
        elif isinstance(one, Long):
            for name in ("off", "on"):
                last = str(MARKS[-1])
                add(one.row, f"time per token at {last}, {name}, of generate's", one.ratio[name][last].median, 1.05)
            add(one.row, "growth beyond the cache in MB, off", one.grown_mb["off"].median, ALLOWED_GROWTH)
    return found


def report(results: list, device: str, dtype: torch.dtype, busy: bool) -> dict[str, Any]:
    """The contents of the JSON file."""
    return {
        "benchmark": "throughput",
        "machine": machine_facts(device, dtype),
        "setting": {
            "clock": "processor time" if busy else "wall clock",
            "visual_tokens": VISUAL_TOKENS,
            "answer_tokens": [SHORTEST, LONGEST],
            "invocations": RATES,
            "long_tokens": LONG,
            "memory_tokens": MEMORY_TOKENS,
        },
        "rows": [asdict(one) for one in results],
        "budgets": budgets(results),
    }


def table(results: list) -> str:
    """The results as a Markdown table for each kind of row, then the budgets."""
    streams = [["base", "batch", "generate tok/s", "off", "on", "few", "often", "continuous tok/s", "text"]]
    longs = [["base", "batch", "run", *(f"ms at {mark}" for mark in MARKS), "grown MB", "of it cache"]]
    memories = [["base", "batch", "generate MB", "off", "on", "slots", "bytes a column"]]
    for one in results:
        head = [one.model + ("" if one.weights == "trained" else "*"), str(one.batch)]
        if isinstance(one, Stream):
            faster = {name: f"{1 / one.ratio[name].median:.2f}x" for name in PEERS}
            ours = [faster[name] for name in ("off", "on", *RATES)]
            theirs = (f"{one.tokens_per_second[name]:.0f}" for name in ("generate", "continuous"))
            streams.append([*head, next(theirs), *ours, next(theirs), faster["text"]])
        elif isinstance(one, Long):
            for name, places in one.token_ms.items():
                times = [f"{places[str(mark)].median:.2f}" for mark in MARKS]
                longs.append([*head, name, *times, f"{one.grown_mb[name].median:.1f}", f"{one.cache_mb[name]:.1f}"])
        else:
            sizes = [f"{one.peak_mb[name]:.0f}" for name in ("generate", "off", "on")]
            memories.append([*head, *sizes, f"{one.slots_mb:.1f}", str(one.column_bytes)])
    tables = [[*aligned(lines), ""] for lines in (streams, longs, memories) if len(lines) > 1]
    notes = [
        "tok/s: tokens of answers per second, prompts read included; the rest of the first table: how many times as",
        "fast as generate (text: as continuous batching). grown: of the process, from the first place on. MB: peaks.",
        "* random weights.",
        "",
    ]
    return "\n".join([line for lines in tables for line in lines] + notes + verdicts(budgets(results)))


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the tables, writes the JSON row by row; 0 when done, 1 when runs could not be compared."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["--here"]:  # one case of memory, in this process
        print(json.dumps(peaks(given[1], int(given[2]))))
        return 0
    told = "Answers per second of a live batch against generate in static batches; long answers; memory per row."
    options = parser("throughput", told, "taskset -c 1 vismem bench throughput --only pocket/stream/8", 1, "one round")
    add_busy(options)
    args = parsed(options, argv, CASES)
    rounds, dtype = args.rounds or 1, getattr(torch, args.dtype)
    results = measure(args.cases, rounds, args.command, args.device, dtype, args.busy)
    return drive("throughput", args.json, results, lambda found: report(found, args.device, dtype, args.busy), table)


if __name__ == "__main__":
    sys.exit(main())
