"""A base of real size on one GPU: tokens per second, share of the memory's bandwidth, cost of memory in an answer.

The base has the paper's shape (Qwen2.5-VL-7B unless `--model` says otherwise) and random weights in bfloat16, made on
the device. Everything is measured in one process, for batches of 1, 8 and 64, in this order for each batch:

    speed     Six runs, interleaved round by round: transformers' `generate` and ours with memory off and on (never
              invoked), each with the dynamic cache and with a static one whose step is compiled.
    cost      What an invocation adds, of each kind, as in decode.py. Batches of 1 and 8.
    overhead  What memory adds to a set of answers, some of which invoke it. Batches of 1 and 8.

Events in the device's stream record the times, so it never waits for the clock. A row that fails, or for which no time
is left (`--minutes`), is reported as not measured, and the others go on. `benchmarks/README.md` explains the output.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random as Chance
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from bases import SPECIAL, prompt, random_qwen, silence, word_tokenizer
from common import Clock, Spread, aligned, machine_facts, turned, verdicts, write
from decode import Run, invocation_costs, schedules, timed
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, CompileConfig
from transformers.initialization import no_init_weights

import vismem
from vismem.cli.meta import CONFIGS
from vismem.decoding.policies import Forced
from vismem.decoding.prepare import COMPILED

BATCHES = (1, 8, 64)
COSTLY = (1, 8)  # batches for which invocations are measured
TOKENS, LONGEST, ANSWERS = 64, 256, 8
RATES = {
    0.13: 1,
    0.26: 2,
}  # invocations of each kind per answer in the paper's figures; of `ANSWERS`, how many have one
LENGTHS = (128, 256)
LEAST_SHARE, MOST_OVERHEAD = 0.8, 8.0
END = [SPECIAL.index("<end>")]


# The base.


def tiny() -> tuple[Any, Any]:
    """A base for which all of this runs on a CPU in seconds."""
    return random_qwen(512, 128, 2, 256, (128, 2, 256), tied=False)


def real(name: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A base of that config with random weights, made on the device in `dtype`.

    Args:
        name: a file's name in the package's configs, without `.json`, or the path of a config.

    Raises:
        ValueError: if there is no such config, or prompts cannot be made for its family.
    """
    path = next((p for p in (CONFIGS / f"{name}.json", Path(name)) if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("Qwen2.5*.json")))
        raise ValueError(f"--model {name}: there is no such config; there are {known}, tiny, and files of your own")
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"--model {name}: prompts are made for qwen2_5_vl only, not for {config.model_type}")
    with torch.device(device), no_init_weights():
        base = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    for key, parameter in base.named_parameters():
        value = parameter.data
        if value.dim() > 1:
            value.normal_(0, 0.02)
        else:
            value.fill_(0.0 if key.endswith("bias") else 1.0)
    base.tie_weights()
    base.generation_config.pad_token_id = SPECIAL.index("<pad>")
    return base, SimpleNamespace(tokenizer=word_tokenizer(config.get_text_config().vocab_size))


def equip(name: str, device: str, dtype: torch.dtype) -> vismem.VisMem:
    """The base with an untrained memory that is never invoked; nothing ends an answer early."""
    torch.manual_seed(0)
    base, processor = tiny() if name == "tiny" else real(name, device, dtype)
    model = vismem.VisMem(base.to(device, dtype).eval(), processor, vismem.VisMemConfig()).eval()
    model.base.generation_config.eos_token_id = None
    silence(model)
    return model


# What a step reads.


def read_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second of a plain read: the best of 20 sums over `size` bytes of float32."""
    block, best = torch.ones(size // 4, device=device), float("inf")
    for _ in range(20):
        clock = Clock(device)
        clock.tick()
        block.sum()
        clock.tick()
        first, last = clock.ticks
        best = min(best, last - first)
    return size / best


def step_bytes(model: vismem.VisMem, batch: int, columns: float) -> float:
    """Bytes that a step must read: text layers, norm and head, keys and values of `columns` in every row."""
    backbone, text = model.backbone, model.config.get_text_config()
    weights = sum(p.numel() for p in backbone.language_model.parameters()) - backbone.embeddings.weight.numel()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * size * columns * batch
    return (weights + backbone.head.weight.numel() + cached) * backbone.head.weight.element_size()


# Rows.


@dataclass
class Speed:
    """One run's numbers.

    Args:
        row, batch, run: names and batch of the run.
        token_ms, first_token_ms: time per token after the first, on average over a run, and to the first.
        steady_ms: the median time of a token within a run.
        tokens_per_second: of the whole batch, by the median.
        compile_s: extra time of the first call: compiling, and everything else that is done once.
        gigabytes_per_second: bytes that a step must read, over its time.
        share: of the measured bandwidth; `nominal_share`: of the nominal one.
        same: share of the tokens that are `generate`'s with the dynamic cache; rounding differs between kernels.
    """

    row: str
    batch: int
    run: str
    token_ms: Spread
    steady_ms: Spread
    first_token_ms: Spread
    tokens_per_second: float
    compile_s: float
    gigabytes_per_second: float
    share: float
    nominal_share: float
    same: float


@dataclass
class Cost:
    """What an invocation adds, in every row of the batch at once: milliseconds and steps, by kind."""

    row: str
    batch: int
    cache: str
    ms: dict[str, Spread]
    steps: dict[str, Spread]


@dataclass
class Overhead:
    """What memory adds to answers of `tokens` tokens, in percent of the time after the first token, memory off.

    Args:
        computed: by the paper's rate of each kind per answer: from the costs of single invocations and the difference
            between on and off.
        measured: by the measured rate: a set of answers with that many invocations against the same with none.
    """

    row: str
    batch: int
    tokens: int
    computed: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)


class Bench:
    """All measurements of one call, kept as they come.

    Args:
        model: the model.
        visual_tokens, rounds: of every prompt; of every comparison.
        bandwidth, nominal: bytes per second, measured and nominal.
        seconds: time limit for everything.
        keep: called whenever there are new rows.
    """

    def __init__(
        self,
        model: vismem.VisMem,
        visual_tokens: int,
        rounds: int,
        bandwidth: float,
        nominal: float,
        seconds: float,
        keep: Callable[[Bench], None],
    ) -> None:
        self.model, self.visual_tokens, self.rounds = model, visual_tokens, rounds
        self.bandwidth, self.nominal, self.keep = bandwidth, nominal, keep
        self.began, self.seconds = time.monotonic(), seconds
        self.rows: dict[str, Speed | Cost | Overhead] = {}
        self.missed: dict[str, str] = {}  # rows that were not measured, and why
        # On a CPU nothing is compiled unless asked for.
        self.static: dict[str, dict[str, Any]] = {"generate": {}, "ours": {}}
        if model.device.type != "cuda":
            for whose in self.static:
                config = CompileConfig(backend="eager", mode=None)
                config._compile_all_devices = True
                self.static[whose] = {"compile_config": config}

    def attempt(self, row: str, work: Callable[[], Any]) -> Any:
        """Runs one measurement if there is time; on failure records why and returns None."""
        spent = time.monotonic() - self.began
        print(f"{spent:5.0f} s  {row}", file=sys.stderr, flush=True)
        if spent > self.seconds:
            self.missed[row] = "no time left"
            return None
        try:
            return work()
        except Exception as error:  # devices and compilers raise anything; the other rows are still worth having
            reason = next(iter(str(error).strip().splitlines()), "")
            self.missed[row] = f"{type(error).__name__}: {reason}"[:300]
            gc.collect()
            return None

    def add(self, row: Speed | Cost | Overhead) -> None:
        self.rows[row.row] = row
        self.keep(self)

    def runs(self) -> dict[str, tuple[Callable[..., Tensor], dict[str, Any]]]:
        """The six runs of a speed comparison."""
        found: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {}
        for cache in ("dynamic", "static"):
            told = {whose: self.settings(cache, whose) for whose in self.static}
            found[f"generate {cache}"] = (self.model.base.generate, told["generate"])
            for name, policy in (("off", "off"), ("on", "learned")):
                found[f"{name} {cache}"] = (self.model.generate, {**told["ours"], "invocation": policy})
        return found

    def settings(self, cache: str, whose: str = "ours") -> dict[str, Any]:
        """Generation keywords that ask for a cache."""
        return {} if cache == "dynamic" else {"cache_implementation": "static", **self.static[whose]}

    def speed(self, batch: int) -> None:
        """The six runs of one batch."""
        inputs = prompt(self.model.base, self.visual_tokens, batch)
        self.forget_compiled()
        runs, first = {}, {}
        for name, (work, keywords) in self.runs().items():
            # The longest answer comes first, so that what is compiled for it fits the later ones.
            tokens = LONGEST if "static" in name else TOKENS
            began = time.monotonic()
            if self.attempt(f"{batch}/{name}", lambda w=work, t=tokens, k=keywords: timed(w, inputs, t, END, **k)):
                runs[name], first[name] = (work, keywords), (time.monotonic() - began, tokens)
        rounds: list[dict[str, Run]] = []
        for turn in range(self.rounds):
            done = {}
            for name in turned(list(runs), turn):
                work, keywords = runs[name]
                run = self.attempt(f"{batch}/{name}", lambda w=work, k=keywords: timed(w, inputs, TOKENS, END, **k))
                if run is not None:
                    done[name] = run
            rounds.append(done)
        for name in runs:
            found = [done[name] for done in rounds if name in done]
            if found:
                self.missed.pop(f"{batch}/{name}", None)
                self.add(self.speed_row(batch, name, found, first[name], rounds[0].get("generate dynamic"), inputs))

    def speed_row(
        self, batch: int, name: str, runs: list[Run], first: tuple[float, int], plain: Run | None, inputs: dict
    ) -> Speed:
        """A row from its runs; `first` holds the first call's seconds and tokens, `plain` is generate's run."""
        token = Spread.of([1e3 * run.per_token for run in runs], 4)
        steady = Spread.of([1e3 * median(b - a for a, b in pairwise(run.ticks[1:-1])) for run in runs], 4)
        start = Spread.of([1e3 * run.first for run in runs], 3)
        length = inputs["input_ids"].shape[1]
        seconds = token.median / 1e3
        rate = step_bytes(self.model, batch, length + TOKENS / 2) / seconds
        same = 0.0 if plain is None else float((runs[0].sequences == plain.sequences)[:, length:].float().mean())
        return Speed(
            f"{batch}/{name}",
            batch,
            name,
            token,
            steady,
            start,
            round(batch / seconds, 1),
            round(max(first[0] - start.median / 1e3 - first[1] * seconds, 0.0), 2),
            round(rate / 1e9, 1),
            round(rate / self.bandwidth, 4),
            round(rate / self.nominal, 4),
            round(same, 4),
        )

    def forget_compiled(self) -> None:
        """Drops what was compiled for another batch, ours and transformers', so that each batch has its own graph."""
        COMPILED.pop(self.model.base, None)
        self.model.base.__dict__.pop("_compiled_call", None)
        torch._dynamo.reset()
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def cost(self, batch: int) -> None:
        """What an invocation costs, with either cache."""
        inputs = prompt(self.model.base, self.visual_tokens, batch)
        tokens, plans = schedules(batch)
        policies = {"none": Forced([]), "forced": Forced(plans["forced"])}
        for cache in ("static", "dynamic"):
            row, settings = f"{batch}/cost {cache}", self.settings(cache)

            def one_round(turn: int, settings: dict[str, Any] = settings) -> dict[str, Run]:
                done = {
                    name: timed(self.model.generate, inputs, tokens, END, invocation=policies[name], **settings)
                    for name in turned(list(policies), turn)
                }
                return {**done, "base": done["none"]}

            done = [self.attempt(row, lambda turn=turn: one_round(turn)) for turn in range(self.rounds + 1)]
            rounds = [runs for runs in done[1:] if runs is not None]  # the first warms up
            if rounds:
                self.missed.pop(row, None)
                steps = invocation_costs(rounds, batch)
                ms = invocation_costs(rounds, batch, lambda runs: 1e-3)
                spreads = [{name: Spread.of(values) for name, values in found.items()} for found in (ms, steps)]
                self.add(Cost(row, batch, cache, *spreads))

    def overhead(self, batch: int) -> None:
        """What memory adds to sets of answers, compiled."""
        asked = [prompt(self.model.base, self.visual_tokens, batch, seed) for seed in range(ANSWERS // batch)]
        for tokens in LENGTHS:
            row = f"{batch}/overhead {tokens}"
            found = Overhead(row, batch, tokens, self.computed(batch, tokens))
            plans = {"0": None, **{str(count / ANSWERS): schedule(count, tokens) for count in RATES.values()}}
            seconds: dict[str, list[float]] = {name: [] for name in plans}
            for turn in range(self.rounds if batch > 1 else 1):  # at batch 1, every answer is a sample
                for name in turned(list(plans), turn):
                    took = self.attempt(row, lambda n=tokens, plan=plans[name]: self.answers(asked, n, plan))
                    if took is not None:
                        seconds[name].append(took)
            off = self.rows.get(f"{batch}/off static")
            if off is not None and all(seconds.values()):
                self.missed.pop(row, None)
                whole = {name: median(values) for name, values in seconds.items()}
                writing = whole["0"] - len(asked) * off.first_token_ms.median / 1e3
                for name in list(plans)[1:]:
                    found.measured[name] = round(100 * (whole[name] - whole["0"]) / writing, 2)
            if found.computed or found.measured:
                self.add(found)

    def answers(self, asked: list[dict[str, Tensor]], tokens: int, plan: list[tuple[int, int, str]] | None) -> float:
        """Seconds for all answers, one batch after another."""
        clock = Clock(self.model.device)
        gc.collect()
        clock.tick()
        for index, inputs in enumerate(asked):
            rows = range(index * len(inputs["input_ids"]), (index + 1) * len(inputs["input_ids"]))
            policy = "off" if plan is None else Forced([(r - rows[0], s, k) for r, s, k in plan if r in rows])
            keywords = {**self.settings("static"), "max_new_tokens": tokens, "do_sample": False}
            self.model.generate(**inputs, invocation=policy, **keywords)
        clock.tick()
        first, last = clock.ticks
        return last - first

    def computed(self, batch: int, tokens: int) -> dict[str, float]:
        """Percent that memory adds at the paper's rates, from single costs; empty if one is missing."""
        off, on = (self.rows.get(f"{batch}/{name} static") for name in ("off", "on"))
        alone = self.rows.get("1/cost static")  # in a batch, rows invoke at different steps
        if off is None or on is None or alone is None:
            return {}
        each = alone.ms["short_first"].median + alone.ms["long"].median
        whole, extra = off.token_ms.median * tokens, (on.token_ms.median - off.token_ms.median) * tokens
        return {str(rate): round(100 * (extra + batch * rate * each) / whole, 2) for rate in RATES}

    def all(self, batches: Iterable[int]) -> None:
        """Everything, batch by batch."""
        for batch in batches:
            self.speed(batch)
            if batch in COSTLY:
                self.cost(batch)
                self.overhead(batch)


def schedule(count: int, tokens: int) -> list[tuple[int, int, str]]:
    """Invocations in `count` of `ANSWERS` answers for each kind, in different answers, at random places."""
    chance = Chance(0)
    rows = chance.sample(range(ANSWERS), 2 * count)
    return [(r, chance.randrange(8, tokens - 16), ("short", "long")[i % 2]) for i, r in enumerate(rows)]


# Results.


def budgets(rows: list[Speed | Cost | Overhead]) -> list[dict[str, Any]]:
    """Targets and measurements."""
    found = []
    for one in rows:
        if isinstance(one, Speed) and one.batch == 1 and one.run in ("off static", "on static"):
            entry = {"row": one.row, "what": "share of the bandwidth measured", "measured": one.share}
            found.append({**entry, "allowed": LEAST_SHARE, "met": one.share >= LEAST_SHARE, "least": True})
        if isinstance(one, Overhead):
            for what in ("computed", "measured"):
                for rate, percent in getattr(one, what).items():
                    entry = {"row": one.row, "what": f"% more, {rate} of each kind, {what}", "measured": percent}
                    found.append({**entry, "allowed": MOST_OVERHEAD, "met": percent <= MOST_OVERHEAD})
    return found


def report(bench: Bench, args: argparse.Namespace, build_s: float) -> dict[str, Any]:
    """The contents of the JSON file."""
    model, rows = bench.model, list(bench.rows.values())
    count = {
        "base": sum(p.numel() for p in model.base.parameters()),
        "memory": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    return {
        "benchmark": "gpu",
        "machine": machine_facts(args.device, getattr(torch, args.dtype)),
        "setting": {
            "model": args.model,
            "parameters": count,
            "visual_tokens": args.visual_tokens,
            "tokens": TOKENS,
            "rounds": args.rounds,
            "build_s": round(build_s, 1),
            "seconds": round(time.monotonic() - bench.began, 1),
            "bandwidth": {"measured": round(bench.bandwidth / 1e9, 1), "nominal": round(bench.nominal / 1e9, 1)},
        },
        "rows": [asdict(row) for row in rows],
        "missed": bench.missed,
        "budgets": budgets(rows),
    }


def table(bench: Bench) -> str:
    """The results as Markdown tables, then what was not measured, then the targets."""
    rows = list(bench.rows.values())
    speeds = [
        ["batch", "run", "ms/token", "median", "tokens/s", "first ms", "GB/s", "share", "nominal", "compile s", "same"]
    ]
    costs = [["batch", "cache", *(f"{kind} {u}" for kind in ("1st short", "short", "long") for u in ("ms", "steps"))]]
    overheads = [["batch", "tokens", "how", "of each kind", "% more"]]
    for one in rows:
        if isinstance(one, Speed):
            line = [f"{one.token_ms.median:.2f}", f"{one.steady_ms.median:.2f}", f"{one.tokens_per_second:.0f}"]
            line += [f"{one.first_token_ms.median:.0f}"]
            line += [f"{one.gigabytes_per_second:.0f}", f"{100 * one.share:.0f} %", f"{100 * one.nominal_share:.0f} %"]
            speeds.append([str(one.batch), one.run, *line, f"{one.compile_s:.0f}", f"{100 * one.same:.0f} %"])
        elif isinstance(one, Cost):
            kinds = ("short_first", "short", "long")
            pairs = [f"{spreads[kind].median:.1f}" for kind in kinds for spreads in (one.ms, one.steps)]
            costs.append([str(one.batch), one.cache, *pairs])
        else:
            for how in ("computed", "measured"):
                for rate, percent in getattr(one, how).items():
                    overheads.append([str(one.batch), str(one.tokens), how, rate, f"{percent:.1f}"])
    tables = [[*aligned(lines), ""] for lines in (speeds, costs, overheads) if len(lines) > 1]
    told = [f"bandwidth: {bench.bandwidth / 1e9:.0f} GB/s measured, {bench.nominal / 1e9:.0f} nominal", ""]
    missed = [f"not measured  {row}: {reason}" for row, reason in bench.missed.items()]
    return "\n".join([line for lines in tables for line in lines] + told + missed + verdicts(budgets(rows)))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vismem bench gpu",
        description="A base of real size with random weights on one GPU: speed, bandwidth, cost of memory.",
        epilog="example: vismem bench gpu --model Qwen2.5-VL-7B --bandwidth 4800",
    )
    told = "name of a config in the package, or a config file, or 'tiny' (default Qwen2.5-VL-7B)"
    parser.add_argument("--model", default="Qwen2.5-VL-7B", help=told)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try it with --model tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=4800,
        metavar="GB/S",
        help="the device's nominal bandwidth (default 4800, an H200)",
    )
    told = f"batches (default {' '.join(map(str, BATCHES))}); others in the file stay"
    parser.add_argument("--batches", type=int, nargs="+", choices=BATCHES, default=BATCHES, help=told)
    parser.add_argument("--visual-tokens", type=int, default=256, metavar="N", help="of every prompt (default 256)")
    parser.add_argument("--rounds", type=int, default=3, help="of every comparison (default 3)")
    parser.add_argument("--minutes", type=float, default=8.5, help="start no run after this many (default 8.5)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write (default results/bench_gpu.json)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {args.rounds}")
    if args.bandwidth <= 0:
        parser.error(f"--bandwidth must be above 0, got {args.bandwidth:g}")
    if args.json is None and args.device != "cpu":
        args.json = Path("results/bench_gpu.json")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measures, writes row by row, prints the tables; returns 1 without a device or if a row could not be measured."""
    args = arguments(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        how = "to try it on a CPU, add --device cpu --model tiny"
        print(f"vismem bench gpu: needs a CUDA device, and torch finds none; {how}", file=sys.stderr)
        return 1
    transformers.logging.set_verbosity_error()
    began = time.monotonic()
    try:
        model = equip(args.model, args.device, getattr(torch, args.dtype))
    except ValueError as error:
        print(f"vismem bench gpu: {error}", file=sys.stderr)
        return 1
    bandwidth = read_bandwidth(model.device, 2**32 if model.device.type == "cuda" else 2**24)
    build_s = time.monotonic() - began

    def keep(bench: Bench) -> None:
        if args.json is not None:
            write(args.json, report(bench, args, build_s))

    seconds = 60 * args.minutes - build_s
    bench = Bench(model, args.visual_tokens, args.rounds, bandwidth, 1e9 * args.bandwidth, seconds, keep)
    bench.all(args.batches)
    keep(bench)
    print(table(bench))
    if bench.missed:
        print(f"vismem bench gpu: {len(bench.missed)} rows were not measured, see above", file=sys.stderr)
    return 1 if bench.missed else 0


if __name__ == "__main__":
    sys.exit(main())
