"""How fast `VisMem.generate` decodes compared with transformers' `generate` on the same base, and what a memory costs.

Each row of the table is one base, number of visual tokens and batch. Its runs alternate, round by round, in one
process, on one prompt, with a fixed number of greedy tokens:

    base      the base's own `generate`
    off       memory off
    on        invocation "learned", never invoked
    none      `Forced([])`, which the next two are compared with
    forced    `Forced`: in every row of the batch, after each `SEGMENT` tokens, one of `KINDS_IN_ORDER`
    scattered `Forced`, batches only: one invocation in every row, each row at its own step

"on" never invokes because the output rows of the four tokens are zero: an invocation token's logit is 0, which greedy
decoding never picks. The engine does all that it does with a trained memory (keeps states, widens the logits, computes
the four, applies the guards), and the run fails if its tokens differ from the base's.

A clock among the logits processors, the same object in every run, records when each token is sampled. Time per token is
(last - first) / (tokens - 1), so it excludes reading the prompt. The cost of an invocation is the time of the `SEGMENT`
tokens from it on, less the same tokens' time in "none", in units of the base's time per token: it includes formation,
the forward that reads the memory, and the longer cache afterwards.

`benchmarks/README.md` explains what is measured and printed.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from bases import FAMILIES, WORK, equipped, prompts, silence
from common import (
    Case,
    Clock,
    Progress,
    Spread,
    add_busy,
    aligned,
    drive,
    machine_facts,
    parsed,
    parser,
    turned,
    verdicts,
)
from torch import Tensor
from transformers import LogitsProcessorList

import vismem
from vismem.decoding.policies import Forced

SEGMENT = 16
KINDS_IN_ORDER = ("short", "short", "long", "short", "long")

# Steps that an invocation adds in the public VisMem code, one CPU thread, fp32; and the share of them allowed here.
PUBLIC_CODE = {
    ("qwen-200m", 64): {"short": 14.7, "long": 15.8, "share": 0.7},
    ("qwen-28m", 256): {"short": 27.6, "long": 28.7, "share": 0.5},
}
ALLOWED_RATIO = 1.05
CASES = (
    *(Case("pocket", tokens, batch) for tokens in (64, 256) for batch in (1, 8)),
    *(Case("qwen-28m", 256, batch) for batch in (1, 8)),
    *(Case("qwen-200m", tokens, batch) for tokens in (64, 256) for batch in (1, 8)),
    *(Case(f"tiny-{family}", 0, batch) for family in FAMILIES for batch in (1, 8)),
)


# The runs.


@dataclass
class Run:
    """One timed generation: when it began, when each token was sampled, when it ended, and its tokens."""

    ticks: list[float]
    sequences: Tensor

    @property
    def first(self) -> float:
        """Seconds to the first token: everything before decoding."""
        return self.ticks[1] - self.ticks[0]

    @property
    def per_token(self) -> float:
        """Seconds per token after the first."""
        return (self.ticks[-2] - self.ticks[1]) / (len(self.ticks) - 3)

    @property
    def total(self) -> float:
        """Seconds after the first token, to the end."""
        return self.ticks[-1] - self.ticks[1]

    def span(self, step: int) -> float:
        """Seconds from sampling token `step - 1` until `SEGMENT` more are sampled."""
        return self.ticks[step + SEGMENT] - self.ticks[step]


def timed(
    generate: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    tokens: int,
    end: list[int],
    busy: bool = False,
    **kwargs: Any,
) -> Run:
    """Runs `generate` greedily for exactly `tokens` tokens, never one of `end`, with a clock in its processors."""
    clock = Clock(inputs["input_ids"].device, busy)
    gc.collect()
    clock.tick()
    sequences = generate(
        **inputs,
        max_new_tokens=tokens,
        suppress_tokens=end,
        do_sample=False,
        logits_processor=LogitsProcessorList([clock]),
        **kwargs,
    )
    clock.tick()
    return Run(clock.ticks, sequences)


def schedules(batch: int) -> tuple[int, dict[str, list[tuple[int, int, str]]]]:
    """New tokens of every run, and the schedules of "forced" and "scattered"."""
    steps = [SEGMENT * (index + 1) for index in range(len(KINDS_IN_ORDER))]
    forced = [(row, step, kind) for step, kind in zip(steps, KINDS_IN_ORDER, strict=True) for row in range(batch)]
    tokens = steps[-1] + SEGMENT
    spacing = max((tokens - 2 * SEGMENT) // batch, 1)
    scattered = [(row, SEGMENT + row * spacing, ("short", "long")[row % 2]) for row in range(batch)]
    return tokens, {"forced": forced, "scattered": scattered}


def one_round(model: vismem.VisMem, inputs: dict[str, Tensor], turn: int = 0, busy: bool = False) -> dict[str, Run]:
    """Every run once, starting with a different one each turn.

    Raises:
        RuntimeError: if a run without invocations writes other tokens than the base.
    """
    batch = len(inputs["input_ids"])
    tokens, plans = schedules(batch)
    runs: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
        "base": (model.base.generate, {}),
        "off": (model.generate, {"invocation": "off"}),
        "on": (model.generate, {"invocation": "learned"}),
        "none": (model.generate, {"invocation": Forced([])}),
        "forced": (model.generate, {"invocation": Forced(plans["forced"])}),
    }
    if batch > 1:
        runs["scattered"] = (model.generate, {"invocation": Forced(plans["scattered"])})
    # Neither the end token, nor the base's unused rows that are now the four tokens'.
    tokens_in_table = [index for index in model.tokens.ids if index < model.tokens.base_vocabulary]
    end = [model.base.generation_config.eos_token_id, *tokens_in_table]
    done = {name: timed(runs[name][0], inputs, tokens, end, busy, **runs[name][1]) for name in turned(list(runs), turn)}
    for name in ("off", "on", "none"):
        if not torch.equal(done[name].sequences, done["base"].sequences):
            raise RuntimeError(f"{name!r} wrote other tokens than the base; the times cannot be compared")
    return done


# Numbers from times.


@dataclass
class Result:
    """One row's numbers.

    Args:
        model, weights, visual_tokens, batch: the case; `weights` is `"trained"` or `"random"`.
        parameters: of the base, and of its vision encoder and text model alone; of the memory.
        token_ms: time per token of base, off and on.
        first_token_ms: time to the first token, likewise.
        ratio: time per token of off and on over the base's in the same round; `first_off`, `first_on` likewise.
        invocation_steps: what an invocation adds, in the base's decode steps: `short_first` (encodes the image's
            patches), `short` (later ones on the same image), `long`; `scattered`: one in each row, per invocation.
        gigabytes_per_second: text weights (with the head) that the base reads in a step, over its time.
    """

    model: str
    weights: str
    visual_tokens: int
    batch: int
    parameters: dict[str, int]
    token_ms: dict[str, Spread] = field(default_factory=dict)
    first_token_ms: dict[str, Spread] = field(default_factory=dict)
    ratio: dict[str, Spread] = field(default_factory=dict)
    invocation_steps: dict[str, Spread] = field(default_factory=dict)
    gigabytes_per_second: float = 0.0


def step_time(runs: dict[str, Run]) -> float:
    """A decode step of the base, in seconds."""
    return runs["base"].per_token


def invocation_costs(
    rounds: list[dict[str, Run]], batch: int, unit: Callable[[dict[str, Run]], float] = step_time
) -> dict[str, list[float]]:
    """What invocations added in each round, in decode steps of the base, or in another unit of time."""
    costs: dict[str, list[float]] = {}
    for runs in rounds:
        for index, kind in enumerate(KINDS_IN_ORDER):
            step = SEGMENT * (index + 1)
            name = "short_first" if index == KINDS_IN_ORDER.index("short") else kind
            costs.setdefault(name, []).append((runs["forced"].span(step) - runs["none"].span(step)) / unit(runs))
        if "scattered" in runs:
            extra = runs["scattered"].total - runs["none"].total
            costs.setdefault("scattered", []).append(extra / batch / unit(runs))
    return costs


def summarize(case: Case, weights: str, model: vismem.VisMem, rounds: list[dict[str, Run]]) -> Result:
    """The row's numbers from its rounds."""
    backbone, compared = model.backbone, ("base", "off", "on")

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    parameters = {
        "base": count(model.base),
        "vision": count(backbone.tower),
        "text": count(backbone.language_model),
        "memory": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }
    result = Result(case.model, weights, case.visual_tokens, case.batch, parameters)
    for name in compared:
        result.token_ms[name] = Spread.of([1e3 * runs[name].per_token for runs in rounds])
        result.first_token_ms[name] = Spread.of([1e3 * runs[name].first for runs in rounds])
    for name in compared[1:]:
        result.ratio[name] = Spread.of([runs[name].per_token / runs["base"].per_token for runs in rounds], 4)
        result.ratio[f"first_{name}"] = Spread.of([runs[name].first / runs["base"].first for runs in rounds], 4)
    for name, samples in invocation_costs(rounds, case.batch).items():
        result.invocation_steps[name] = Spread.of(samples, 2)
    read = parameters["text"] - backbone.embeddings.weight.numel() + backbone.head.weight.numel()
    seconds = result.token_ms["base"].median / 1e3
    result.gigabytes_per_second = round(read * backbone.head.weight.element_size() / seconds / 1e9, 1)
    return result


def equip(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[vismem.VisMem, str]:
    """A base of that name with the default memory, ready to measure, and where its weights come from."""
    model, weights = equipped(name, device, dtype)
    silence(model)
    return model, weights


def measure(
    cases: list[Case], rounds: int, device: str = "cpu", dtype: torch.dtype = torch.float32, busy: bool = False
) -> Iterator[Result]:
    """Measures `cases` one by one, each with a warm-up round; reports progress on stderr."""
    progress = Progress(cases, [WORK.get(case.model, 1) * (1 + case.batch / 8) for case in cases], rounds)
    made: dict[str, tuple[vismem.VisMem, str]] = {}
    for index, case in enumerate(cases):
        if case.model not in made:
            made = {case.model: equip(case.model, device, dtype)}
        model, weights = made[case.model]
        inputs, kept = prompts(model, case.visual_tokens, case.batch), []
        for turn in range(rounds + 1):
            progress.say(index, turn)
            runs = one_round(model, inputs, turn, busy)
            kept += [runs] if turn else []
        yield summarize(case, weights, model, kept)


# Results.


def budgets(results: list[Result]) -> list[dict[str, Any]]:
    """Each row's limit and measurement, for rows with a budget."""
    found = []

    def add(row: Result, what: str, measured: float, allowed: float) -> None:
        name = str(Case(row.model, row.visual_tokens, row.batch))
        met = measured <= allowed
        found.append({"row": name, "what": what, "measured": measured, "allowed": round(allowed, 2), "met": met})

    for row in results:
        for name in ("off", "on"):
            add(row, f"time per token, {name}, of generate's", row.ratio[name].median, ALLOWED_RATIO)
        public = PUBLIC_CODE.get((row.model, row.visual_tokens))
        if public and row.batch == 1:
            for name in ("short_first", "short", "long"):
                allowed = public["share"] * public[name.removesuffix("_first")]
                add(row, f"steps for an invocation, {name}", row.invocation_steps[name].median, allowed)
    return found


def report(results: list[Result], device: str, dtype: torch.dtype, rounds: int, busy: bool = False) -> dict[str, Any]:
    """The contents of the JSON file."""
    config = vismem.VisMemConfig()
    return {
        "benchmark": "decode",
        "machine": machine_facts(device, dtype),
        "setting": {
            "rounds": rounds,
            "clock": "processor time" if busy else "wall clock",
            "new_tokens": schedules(1)[0],
            "segment": SEGMENT,
            "query_length": config.query_length,
            "short_length": config.short_length,
            "long_length": config.long_length,
        },
        "rows": [asdict(result) for result in results],
        "public_code_steps": [
            {"model": model, "visual_tokens": tokens, "short": steps["short"], "long": steps["long"]}
            for (model, tokens), steps in PUBLIC_CODE.items()
        ],
        "budgets": budgets(results),
    }


def table(results: list[Result]) -> str:
    """The results as a Markdown table, then the budgets."""
    head = [
        "base",
        "visual",
        "batch",
        "generate ms",
        "off",
        "on",
        "tokens/s",
        "1st short",
        "short",
        "long",
        "scattered",
    ]
    lines = [head]
    for row in results:
        steps = row.invocation_steps
        generate, on = row.token_ms["base"].median, row.token_ms["on"].median
        lines.append(
            [
                row.model + ("" if row.weights == "trained" else "*"),
                str(row.visual_tokens),
                str(row.batch),
                f"{generate:.2f}",
                f"{row.ratio['off'].median:.3f}x",
                f"{row.ratio['on'].median:.3f}x",
                f"{row.batch / on * 1e3:.1f}",
                *(f"{steps[name].median:.1f}" if name in steps else "" for name in ("short_first", "short", "long")),
                f"{steps['scattered'].median:.1f}" if "scattered" in steps else "",
            ]
        )
    config = vismem.VisMemConfig()
    notes = [
        "",
        "generate: per token, by the base's own generate; off, on: time per token relative to it (on: never invoked).",
        f"1st short, short, long: what an invocation of {config.short_length} or {config.long_length} vectors adds, "
        "in steps of generate, in every row of the batch at once;",
        "scattered: the same per invocation when every row invokes at a different step. * random weights.",
        "",
    ]
    return "\n".join([*aligned(lines), *notes, *verdicts(budgets(results))])


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table, writes the JSON; 0 when done, 1 when the runs could not be compared."""
    told = "Decoding speed against transformers' generate, and the cost of a memory invocation."
    options = parser("decode", told, "vismem bench decode --quick --only qwen-28m/256/1", 8, "two rounds")
    add_busy(options)
    args = parsed(options, argv, CASES)
    rounds, dtype = args.rounds or (2 if args.quick else 8), getattr(torch, args.dtype)
    results = measure(args.cases, rounds, args.device, dtype, args.busy)

    def reported(found: list[Result]) -> dict[str, Any]:
        return report(found, args.device, dtype, rounds, args.busy)

    return drive("decode", args.json, results, reported, table)


if __name__ == "__main__":
    sys.exit(main())
