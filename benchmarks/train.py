"""How fast a memory trains: one update against a plain forward and backward, and rollouts against `generate`.

Each row of the table is one base, number of visual tokens and number of trajectories G of one prompt. Its runs
alternate, round by round, in one process. Updates, all on the same G answers of the same prompt:

    plain     the base's own forward and backward with every parameter trainable, cross-entropy, one row per answer
              with its prompt and image, as in fine-tuning; memory tokens are ordinary words here
    lora      the same with the base frozen except for a LoRA (query and value projections of the language model)
    stage1    what `MemoryTrainer.update` does in stage I: reference log-probabilities, then memories formed in one
              batch, the policy's forward, the loss and its backward
    stage2    the same in stage II, where memories are fixed and the four tokens' rows are trained

Rollouts, all with `NEW_TOKENS` sampled tokens per trajectory:

    generate  the base's own `generate` with `num_return_sequences`
    stage1    with two invocations in every trajectory, at random places and of random kinds
    stage2    with the untrained model's own invocations, at most two
    baseline  the prompt's one greedy answer without memory, which both stages compare with

An update excludes the optimiser's step, which covers the whole base for `plain` and only the memory for the stages.
`benchmarks/README.md` explains what is measured and printed.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from bases import WORK, equipped, prompt
from common import Case, Progress, Spread, add_busy, aligned, drive, machine_facts, parsed, parser, turned, verdicts
from torch import Tensor
from transformers import GenerationConfig

import vismem
from vismem.config import KINDS
from vismem.decoding.policies import Forced, Policy
from vismem.decoding.trace import Rollout
from vismem.memory.adapter import Adapter
from vismem.training import grpo, rollout
from vismem.training.replay import Learner, collate

NEW_TOKENS, INVOCATIONS, GROUP = 96, 2, 16
CLIP_RATIO, KL_COEF = 0.2, 0.015
ALLOWED = {"update": 1.8, "rollout": 1.4}
PARTS = ("formation", "forward", "backward", "reference")
CASES = (
    Case("pocket", 16, GROUP),
    Case("pocket", 64, GROUP),
    Case("qwen-28m", 64, GROUP),
    Case("qwen-28m", 256, GROUP),
    Case("qwen-200m", 64, GROUP),
)


class Stopwatch:
    """Times whole runs, and parts of them by name; waits for the device at both ends.

    Args:
        device: the model's.
        busy: count this process's CPU time instead of wall-clock time.
    """

    def __init__(self, device: torch.device, busy: bool = False) -> None:
        self.device, self.start = device, 0.0
        self.clock = time.process_time if busy else time.perf_counter
        self.parts: dict[str, float] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to a part."""
        start = self.now()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + self.now() - start

    def run(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that `work` takes, and what it returns."""
        gc.collect()
        self.parts = {}
        self.start = self.now()
        found = work()
        return self.now() - self.start, found


# Trajectories.


def settings_for(model: vismem.VisMem, greedy: bool = False) -> GenerationConfig:
    """The trainer's sampling; nothing ends an answer before `NEW_TOKENS` tokens (see `equip`)."""
    return rollout.sampling(model, NEW_TOKENS, None if greedy else 1.0)


def schedule(group: int, seed: int = 0) -> Forced:
    """`INVOCATIONS` in every trajectory, at random places at least four tokens apart, of random kinds."""
    chance, entries = Random(seed), []
    for row in range(group):
        places = sorted(chance.sample(range(0, NEW_TOKENS - 4, 4), INVOCATIONS))
        entries += [(row, place, chance.choice(KINDS)) for place in places]
    return Forced(entries)


def roll(model: vismem.VisMem, inputs: dict[str, Tensor], policy: str | Policy, group: int) -> list[Rollout]:
    """G trajectories of the prompt.

    Raises:
        RuntimeError: if one has not as many sampled tokens as `generate` writes.
    """
    found = rollout.write(model, inputs, policy, settings_for(model), list(range(group)), group)
    counts = {int(one.sampled.sum()) for one in found}
    if counts != {NEW_TOKENS}:
        raise RuntimeError(f"trajectories sampled {sorted(counts)} tokens, not {NEW_TOKENS}; they cannot be compared")
    return found


def as_sampled(rollouts: list[Rollout]) -> list[Rollout]:
    """The same trajectories as if the model had sampled their invocations, as it does in stage II."""
    found = []
    for one in rollouts:
        sampled = one.sampled.clone()
        sampled[[i.position for i in one.invocations]] = True
        found.append(replace(one, sampled=sampled, allowed=torch.ones_like(one.allowed)))
    return found


# Updates.


def plain_rows(model: vismem.VisMem, inputs: dict[str, Tensor], batch: dict[str, Any], group: int) -> dict[str, Any]:
    """The same answers, each a row with prompt, image and labels; memory tokens are read as words."""
    ids, start = batch["input_ids"], batch["prompt_length"]
    marks = {value for name, value in vars(model.base.config).items() if name.endswith("_token_id") and value}
    special = torch.tensor([*model.tokens.ids, *marks], device=ids.device)  # an image token would ask for an image
    answer = torch.arange(ids.shape[1], device=ids.device) >= start
    ids = torch.where(torch.isin(ids, special) & answer, ids[:, start - 1 : start], ids)
    labels = ids.clone()
    labels[:, :start] = -100
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    rows = {name: value.repeat(group, *[1] * (value.dim() - 1)) for name, value in rest.items()}
    if "mm_token_type_ids" in rows:
        rows["mm_token_type_ids"] = F.pad(rows["mm_token_type_ids"], (0, ids.shape[1] - start))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **rows}


def plain(base: torch.nn.Module, rows: dict[str, Any]) -> float:
    """One forward and backward of the base as transformers does it."""
    loss = base(**rows, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


class Updates:
    """One update of each kind on the same answers.

    Args:
        model: the model.
        inputs: the prompt, one row.
        rollouts: G trajectories of it.
        watch: times the parts.
    """

    def __init__(
        self, model: vismem.VisMem, inputs: dict[str, Tensor], rollouts: list[Rollout], watch: Stopwatch
    ) -> None:
        self.model, self.watch, group = model, watch, len(rollouts)
        pad = model.processor.tokenizer.pad_token_id
        self.rollouts = {"stage1": rollouts, "stage2": as_sampled(rollouts)}
        self.batches = {
            stage: collate(inputs, self.rollouts[stage], pad, 1.0, formed=stage == "stage2") for stage in self.rollouts
        }
        self.rows = plain_rows(model, inputs, self.batches["stage1"], group)
        self.learner = Learner(model)
        self.advantages = torch.linspace(-1, 1, group, device=model.device)
        text = model.backbone.language_model
        self.lora = Adapter(text, model.backbone.language_targets, 16, 32, 0.0).to(model.device, model.dtype)

    @contextmanager
    def trainable(self, name: str) -> Iterator[None]:
        """Enables gradients only for what this update trains, and drops them afterwards."""
        model = self.model
        parts = {"stage1": ("builder", "short", "long"), "stage2": ("tokens",)}.get(name, ())
        wanted = [p for part in parts for p in model.parameters_of(part)]
        wanted += list(model.base.parameters()) if name == "plain" else []
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in wanted:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in (*model.parameters(), *self.lora.parameters()):
                parameter.grad = None
            model.base.requires_grad_(False)

    @contextmanager
    def parted(self) -> Iterator[None]:
        """Times the forming of memories separately."""
        model = self.model
        form, encode = model.memory.form, model.memory.short.encode

        def timed(work: Callable) -> Callable:
            def run(*args: Any) -> Any:
                with self.watch.part("formation" if torch.is_grad_enabled() else "formed for the reference"):
                    return work(*args)

            return run

        model.memory.form, model.memory.short.encode = timed(form), timed(encode)
        try:
            yield
        finally:
            del model.memory.form, model.memory.short.encode

    def run(self, name: str) -> tuple[float, dict[str, float]]:
        """Seconds that one update takes, and those of its parts.

        Raises:
            RuntimeError: if its loss is not finite, or its gradient is zero or not finite.
        """
        with self.trainable(name):
            if name == "plain":
                seconds, value = self.watch.run(lambda: plain(self.model.base, self.rows))
            elif name == "lora":
                with self.lora.on():
                    seconds, value = self.watch.run(lambda: plain(self.model.base, self.rows))
            else:
                with self.parted():
                    seconds, value = self.watch.run(lambda: self.ours(name))
            owner = {"plain": self.model.base, "lora": self.lora}.get(name, self.learner)
            gradient = sum(float(p.grad.abs().sum()) for p in owner.parameters() if p.grad is not None)
        if not (abs(value) < float("inf") and 0 < gradient < float("inf")):
            raise RuntimeError(f"{name!r} has loss {value} and gradient size {gradient}; it trains nothing")
        return seconds, self.watch.parts

    def ours(self, stage: str) -> float:
        """As in `MemoryTrainer.update`, with the replayed log-probabilities in place of the old ones."""
        batch, watch = self.batches[stage], self.watch
        trained = [p for p in self.learner.parameters() if p.requires_grad]
        with watch.part("reference"), torch.no_grad():
            kept = [p.detach().clone() for p in trained]  # as the trainer swaps in the stage's start and back
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
            reference = self.learner(batch).log_probs
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        with watch.part("forward"):
            log_probs = self.learner(batch).log_probs
            losses, _ = grpo.grpo_loss(
                log_probs, log_probs.detach(), reference, self.advantages, batch["sampled"], CLIP_RATIO, KL_COEF
            )
            loss = losses.mean()
        with watch.part("backward"):
            loss.backward()
        watch.parts["forward"] -= watch.parts.get("formation", 0.0)
        self.log_probs = log_probs.detach()
        return float(loss.detach())

    def check(self) -> None:
        """Checks that replay reproduces decoding.

        Raises:
            RuntimeError: if stage I's log-probabilities differ from those that decoding recorded.
        """
        with self.trainable("stage1"):
            self.ours("stage1")
        start = self.batches["stage1"]["prompt_length"]
        for row, one in zip(self.log_probs[:, start:].cpu(), self.rollouts["stage1"], strict=True):
            off = float((row[: len(one.tokens)] - one.log_probs)[one.sampled].abs().max())
            if off > (1e-2 if self.model.dtype == torch.float32 else 0.5):
                raise RuntimeError(f"replay is {off:.3g} off decoding's log-probabilities; times cannot be compared")


# Rounds.


@dataclass
class Round:
    """Seconds of every run of one round, the stages' parts, invocations per trajectory, and seconds to read prompts."""

    update: dict[str, float]
    parts: dict[str, dict[str, float]]
    rollout: dict[str, float]
    reading: dict[str, float]
    invocations: dict[str, float]


@contextmanager
def first_forward(base: torch.nn.Module, watch: Stopwatch) -> Iterator[list[float]]:
    """Records when the base's first forward, which reads the prompt, is done."""
    ticks: list[float] = []
    handle = base.model.register_forward_hook(lambda *_: ticks.append(watch.now()) if not ticks else None)
    try:
        yield ticks
    finally:
        handle.remove()


def one_round(model: vismem.VisMem, inputs: dict[str, Tensor], updates: Updates, turn: int = 0) -> Round:
    """Every run once, starting with a different one each turn."""
    group, watch, found = len(updates.advantages), updates.watch, Round({}, {}, {}, {}, {})

    def generate() -> Tensor:
        settings = settings_for(model)
        settings.num_return_sequences, settings.return_dict_in_generate = group, False
        return model.base.generate(**inputs, generation_config=settings)

    runs: dict[str, Callable[[], Any]] = {
        "generate": generate,
        "stage1": lambda: roll(model, inputs, schedule(group), group),
        "stage2": lambda: roll(model, inputs, "learned", group),
        "baseline": lambda: rollout.write(model, inputs, "off", settings_for(model, greedy=True)),
    }
    for name in turned(list(runs), turn):
        torch.manual_seed(turn)
        with first_forward(model.base, watch) as ticks:
            found.rollout[name], made = watch.run(runs[name])
            found.reading[name] = ticks[0] - watch.start
        if name.startswith("stage"):
            found.invocations[name] = sum(len(one.invocations) for one in made) / group
    for name in turned(["plain", "lora", "stage1", "stage2"], turn):
        found.update[name], parts = updates.run(name)
        if name.startswith("stage"):
            found.parts[name] = parts
    return found


# Numbers from times.


@dataclass
class Result:
    """One row's numbers.

    Args:
        model, weights, visual_tokens, batch: the case; `weights` is `"trained"` or `"random"`.
        command, rounds, cpus: how this row was measured, and how many cores the process could use.
        tokens: of a row of the plain update; of the two stages' (slots counted, the prompt shared by G rows).
        parameters: of the base, and of the memory.
        update_s: seconds of one update of each kind.
        update_ratio: `stage1`, `stage2` over `plain` in the same round; `stage1_lora`, `stage2_lora` over `lora`.
        parts: for each stage the share of each part in its update.
        rollout_s: seconds of each kind of rollouts.
        rollouts_per_second: trajectories.
        rollout_ratio: `stage1`, `stage2` over `generate`; `..._baseline` with the answer without memory included,
            `..._decoding` without the time until the prompt is read, on both sides.
        invocations: per trajectory.
    """

    model: str
    weights: str
    visual_tokens: int
    batch: int
    command: str
    rounds: int
    cpus: int
    tokens: dict[str, int]
    parameters: dict[str, int]
    update_s: dict[str, Spread] = field(default_factory=dict)
    update_ratio: dict[str, Spread] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    rollout_s: dict[str, Spread] = field(default_factory=dict)
    rollouts_per_second: dict[str, float] = field(default_factory=dict)
    rollout_ratio: dict[str, Spread] = field(default_factory=dict)
    invocations: dict[str, float] = field(default_factory=dict)


def summarize(
    case: Case, weights: str, model: vismem.VisMem, updates: Updates, rounds: list[Round], command: str
) -> Result:
    """The row's numbers from its rounds."""
    slots = max(sum(i.length for i in one.invocations) for one in updates.rollouts["stage1"])
    length, start = updates.rows["input_ids"].shape[1], updates.batches["stage1"]["prompt_length"]
    affinity = getattr(os, "sched_getaffinity", None)
    memory = [p for part in ("builder", "short", "long", "tokens") for p in model.parameters_of(part)]
    result = Result(
        case.model,
        weights,
        case.visual_tokens,
        case.batch,
        command,
        len(rounds),
        len(affinity(0)) if affinity else os.cpu_count() or 1,
        {"plain_row": length, "prompt": start, "our_row": length - start + slots},
        {"base": sum(p.numel() for p in model.base.parameters()), "memory": sum(p.numel() for p in memory)},
    )
    for name in rounds[0].update:
        result.update_s[name] = Spread.of([r.update[name] for r in rounds], 4)
    for name in rounds[0].rollout:
        result.rollout_s[name] = Spread.of([r.rollout[name] for r in rounds], 4)
    for stage in ("stage1", "stage2"):
        for peer, suffix in (("plain", ""), ("lora", "_lora")):
            ratios = [r.update[stage] / r.update[peer] for r in rounds]
            result.update_ratio[stage + suffix] = Spread.of(ratios, 4)
        shares = {part: [r.parts[stage].get(part, 0.0) / r.update[stage] for r in rounds] for part in PARTS}
        result.parts[stage] = {part: Spread.of(values, 4).median for part, values in shares.items()}
        ratios = {
            "": [r.rollout[stage] / r.rollout["generate"] for r in rounds],
            "_baseline": [(r.rollout[stage] + r.rollout["baseline"]) / r.rollout["generate"] for r in rounds],
            "_decoding": [
                (r.rollout[stage] - r.reading[stage]) / (r.rollout["generate"] - r.reading["generate"]) for r in rounds
            ],
        }
        for suffix, values in ratios.items():
            result.rollout_ratio[stage + suffix] = Spread.of(values, 4)
        result.invocations[stage] = Spread.of([r.invocations[stage] for r in rounds], 3).median
    for name in ("generate", "stage1", "stage2"):
        result.rollouts_per_second[name] = round(case.batch / result.rollout_s[name].median, 3)
    return result


def equip(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[vismem.VisMem, str]:
    """A base of that name with an untrained memory, and where the base's weights come from."""
    model, weights = equipped(name, device, dtype, vismem.VisMemConfig(max_invocations=INVOCATIONS))
    model.memory.float()  # as the trainer keeps what it trains
    model.tokens.float()
    model.base.generation_config.eos_token_id = None  # nothing ends an answer early, here and in the base's generate
    return model, weights


def measure(
    cases: list[Case],
    rounds: int,
    command: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    busy: bool = False,
    cold: bool = False,
) -> Iterator[Result]:
    """Measures `cases` one by one, each with a warm-up round unless `cold`; reports progress on stderr."""
    progress = Progress(cases, [WORK.get(case.model, 1) * (1 + case.visual_tokens / 128) for case in cases], rounds)
    made: dict[str, tuple[vismem.VisMem, str]] = {}
    for index, case in enumerate(cases):
        if case.model not in made:
            made = {case.model: equip(case.model, device, dtype)}
        model, weights = made[case.model]
        inputs, kept = prompt(model.base, case.visual_tokens, 1), []
        updates = Updates(
            model, inputs, roll(model, inputs, schedule(case.batch), case.batch), Stopwatch(model.device, busy)
        )
        updates.check()
        for turn in range(int(cold), rounds + 1):
            progress.say(index, turn)
            found = one_round(model, inputs, updates, turn)
            kept += [found] if turn else []
        yield summarize(case, weights, model, updates, kept, command)


# Results.


def budgets(results: list[Result]) -> list[dict[str, Any]]:
    """Each row's limit and measurement."""
    found = []
    for row in results:
        name = str(Case(row.model, row.visual_tokens, row.batch))
        for stage, title in (("stage1", "stage I"), ("stage2", "stage II")):
            for what, ratios, peer in (
                ("update", row.update_ratio, "a plain forward and backward"),
                ("rollout", row.rollout_ratio, "generate"),
            ):
                measured, allowed = ratios[stage].median, ALLOWED[what]
                entry = {"row": name, "what": f"{what}, {title}, of {peer}'s time", "measured": measured}
                found.append({**entry, "allowed": allowed, "met": measured <= allowed})
    return found


def report(results: list[Result], device: str, dtype: torch.dtype, busy: bool = False) -> dict[str, Any]:
    """The contents of the JSON file."""
    config = vismem.VisMemConfig()
    return {
        "benchmark": "train",
        "machine": machine_facts(device, dtype),
        "setting": {
            "clock": "processor time" if busy else "wall clock",
            "group": GROUP,
            "new_tokens": NEW_TOKENS,
            "invocations": INVOCATIONS,
            "query_length": config.query_length,
            "short_length": config.short_length,
            "long_length": config.long_length,
        },
        "rows": [asdict(result) for result in results],
        "budgets": budgets(results),
    }


def table(results: list[Result]) -> str:
    """The results as two Markdown tables, then the budgets."""
    updates = [["base", "visual", "stage", "plain s", "ours s", "of plain", "of LoRA", *PARTS]]
    rollouts = [["base", "visual", "stage", "generate/s", "ours/s", "of generate", "+ baseline", "decoding", "invoked"]]
    for row in results:
        name = row.model + ("" if row.weights == "trained" else "*")
        for stage, title in (("stage1", "I"), ("stage2", "II")):
            head = [name, str(row.visual_tokens), title]
            seconds, ratio, per_second = row.update_s, row.update_ratio, row.rollouts_per_second
            updates.append(
                [
                    *head,
                    f"{seconds['plain'].median:.2f}",
                    f"{seconds[stage].median:.2f}",
                    f"{ratio[stage].median:.2f}x",
                    f"{ratio[f'{stage}_lora'].median:.2f}x",
                    *(f"{100 * row.parts[stage][part]:.0f} %" for part in PARTS),
                ]
            )
            ratios = (row.rollout_ratio[stage + suffix].median for suffix in ("", "_baseline", "_decoding"))
            rollouts.append(
                [
                    *head,
                    f"{per_second['generate']:.2f}",
                    f"{per_second[stage]:.2f}",
                    *(f"{value:.2f}x" for value in ratios),
                    f"{row.invocations[stage]:.1f}",
                ]
            )
    notes = [
        "",
        f"One update on {GROUP} answers of one prompt with an image, {NEW_TOKENS} sampled tokens and {INVOCATIONS} "
        "invocations each, reference included; plain and LoRA: the base's forward and backward on the same rows.",
        "Rollouts per second, all of a prompt at once; + baseline: with the answer without memory; decoding: without "
        "reading the prompt; invoked: per trajectory. * random weights.",
        "",
    ]
    return "\n".join([*aligned(updates), "", *aligned(rollouts), *notes, *verdicts(budgets(results))])


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the tables, writes the JSON row by row; 0 when done, 1 when runs could not be compared."""
    told = "One training update against a plain forward and backward, and rollouts against generate."
    options = parser("train", told, "taskset -c 0 vismem bench train --quick --only pocket/16", 5, "one round")
    options.add_argument("--cold", action="store_true", help="no warm-up round, for rounds that take minutes")
    add_busy(options)
    args = parsed(options, argv, CASES)
    rounds, dtype = args.rounds or (1 if args.quick else 5), getattr(torch, args.dtype)
    results = measure(args.cases, rounds, args.command, args.device, dtype, args.busy, args.cold)
    return drive("train", args.json, results, lambda found: report(found, args.device, dtype, args.busy), table)


if __name__ == "__main__":
    sys.exit(main())
