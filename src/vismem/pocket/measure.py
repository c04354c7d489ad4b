"""`vismem pocket measure`: what a memory does for the pocket, beside its bounds and controls.

Five suites of questions, greedy, on test-split handwriting: late ones (the image has left the window), late ones on
pictures of a kind that the base never saw, ones in view, totals whose label's rule is withheld, and such totals late,
where both memories are needed. Every condition of a suite answers the same questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random as PythonRandom

import torch

from vismem.config import KINDS, Kind, VisMemConfig
from vismem.decoding.invocation import Policy, Random, policy_of
from vismem.decoding.trace import Invocation
from vismem.memory import Memory, Observation
from vismem.model import VisMem
from vismem.pocket import BASE_PATH, MEMORY_PATH, load_base
from vismem.pocket.batches import Encoder, prompt_batch
from vismem.pocket.conversations import Conversation, sample_conversation
from vismem.pocket.evaluate import wilson
from vismem.pocket.practice import disturbed
from vismem.pocket.tasks import score

LATE_TASKS = ("colour", "digit", "row", "sum")
DISTANCES = (2, 4, 6, 8)
STRANGE = ("noise", "blur", "rotation")
RATES = (25, 50, 75, 100)


@dataclass
class Placed:
    """Puts invocations in where a reply wants them: after its n-th colon, by a plan of n and kind.

    With it, what memory holds is measured apart from when the model invokes it.
    """

    plan: dict[int, Kind]
    colon: int
    samples: bool = False
    injects: bool = True
    forms: tuple[Kind, ...] = KINDS
    guarded: bool = False

    def start(self) -> None:
        self.seen: dict[int, int] = {}

    def inject(self, place) -> Kind | None:
        colons = sum(token == self.colon for token in place.tokens)
        if not place.tokens or place.tokens[-1] != self.colon or self.seen.get(place.index) == colons:
            return None
        self.seen[place.index] = colons
        return self.plan.get(colons)


@dataclass(frozen=True)
class Condition:
    """One way of answering.

    Args:
        invocation: as `generate` takes it; `"random_25"` and the like: per cent of the delimiters; `"placed"`: where
            the suite's plan puts them.
        change: what is done to every memory: one of `CHANGES`, or `""`.
        asked: options of `sample_conversation` that this condition changes: the bounds.
    """

    invocation: str = "off"
    change: str = ""
    asked: tuple[tuple[str, object], ...] = ()

    def policy(self, plan: dict[int, Kind], colon: int) -> Policy:
        """The policy; `plan` and `colon` are what `"placed"` needs."""
        name, _, rate = self.invocation.partition("_")
        if name == "placed":
            return Placed(plan, colon)
        return Random(int(rate) / 100) if name == "random" else policy_of(self.invocation)


LEARNED, PLACED = Condition("learned"), Condition("placed")
KINDS_ALONE = {"short_only": Condition("short"), "long_only": Condition("long")}
BY_CHANCE = {f"random_{rate}": Condition(f"random_{rate}") for rate in RATES}
CONTROLS = {
    "memory_of_another_image": Condition("learned", "another"),
    "memory_zero": Condition("learned", "zero"),
    "query_zero": Condition("learned", "no_query"),
}


@dataclass(frozen=True)
class Suite:
    """Questions by cell, and the conditions that answer them.

    Args:
        cells: from a cell's name to the options of `sample_conversation`, `disturb` among them.
        bound: the condition that memory is held against; it needs no memory.
        conditions: the others that need none come first.
        share: questions per cell, relative to `n`.
        plan: where `"placed"` puts invocations.
    """

    cells: dict[str, dict]
    bound: tuple[str, Condition] | None
    conditions: dict[str, Condition]
    share: int = 1
    plan: tuple[tuple[int, Kind], ...] = ((1, "short"),)


SHOWN_AGAIN = ("image_shown_again", Condition(asked=(("shown_again", True),)))
STATED = ("rule_stated", Condition(asked=(("rule", "stated-truth"),)))
BOTH_SHOWN = ("shown_again_and_stated", Condition(asked=(("shown_again", True), ("rule", "stated-truth"))))
SUITES = {
    "late": Suite(
        {f"{t}/{d}": {"task": t, "distance": d} for t in LATE_TASKS for d in DISTANCES}
        | {f"{t}/after_description": {"task": t, "after_description": True} for t in LATE_TASKS},
        SHOWN_AGAIN,
        {"learned": LEARNED, "placed": PLACED, **KINDS_ALONE, **BY_CHANCE, **CONTROLS},
    ),
    "strange": Suite(
        {f"{k}/{t}": {"task": t, "distance": 4, "disturb": k} for k in STRANGE for t in LATE_TASKS},
        SHOWN_AGAIN,
        {"learned": LEARNED, "placed": PLACED},
        share=2,
    ),
    "in_view": Suite(
        {t: {"task": t} for t in ("colour", "shape", "digit", "label", "item", "row", "column", "sum", "basket")},
        None,
        {"learned": LEARNED},
        share=2,
    ),
    "rules": Suite(
        {"promotion": {"task": "promotion", "rule": "hidden-truth"}},
        STATED,
        {"learned": LEARNED, "placed": PLACED, **KINDS_ALONE, **CONTROLS},
        share=12,
        # A recalled rule takes the room in the window that the picture had, so a look belongs to it.
        plan=((1, "short"), (2, "long")),
    ),
    "both": Suite(
        {f"promotion/{d}": {"task": "promotion", "rule": "hidden-truth", "distance": d} for d in (2, 4, 6)},
        BOTH_SHOWN,
        {"learned": LEARNED, "placed": PLACED, **KINDS_ALONE, **BY_CHANCE},
        share=4,
        plan=((1, "short"), (2, "long")),
    ),
}


def questions(cell: str, count: int, seed: int, disturb: str = "", **options) -> list[Conversation]:
    """`count` test-split conversations of one cell, the same for every condition."""
    found = []
    for index in range(count):
        conversation = sample_conversation(PythonRandom(f"{seed}-{cell}-{index}"), "test", **options)
        if disturb:
            conversation = disturbed(conversation, disturb, PythonRandom(f"{seed}-{cell}-{index}-{disturb}"))
        found.append(conversation)
    return found


def prompts_of(conversations: list[Conversation], encoder: Encoder, dtype: torch.dtype) -> dict:
    """The conversations' prompts up to where the reply starts, as the processor would give them."""
    prompts, pictures = [], []
    for conversation in conversations:
        encoded = encoder.encode(conversation, limit=1_000_000)
        prompts.append(encoded.ids[: -len(encoder.text(conversation.answer_text)) - 1])
        pictures.append([conversation.pictures[index] for index in encoded.shown])
    return prompt_batch(prompts, pictures, encoder.tokenizer.pad_token_id, dtype)


@torch.inference_mode()
def answers(
    model: VisMem, conversations: list[Conversation], policy: Policy, batch_size: int
) -> tuple[list[str], list[list[Invocation]], int]:
    """Greedy replies, their invocations, and how many delimiters (places for an invocation) they have in all."""
    tokenizer, replies, invocations, delimiters = model.processor.tokenizer, [], [], 0
    encoder = Encoder(tokenizer)
    for start in range(0, len(conversations), batch_size):
        part = conversations[start : start + batch_size]
        inputs = prompts_of(part, encoder, model.dtype)
        longest = max(len(encoder.text(conversation.answer_text)) for conversation in part) + 4
        out = model.generate(
            **inputs, invocation=policy, max_new_tokens=longest, do_sample=False, return_dict_in_generate=True
        )
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        replies += tokenizer.batch_decode(new, skip_special_tokens=True)
        invocations += out.invocations
        delimiters += sum(int(token) in model.delimiters for token in new.flatten().tolist())
    sampled = sum(not invocation.forced for row in invocations for invocation in row)
    return replies, invocations, delimiters + sampled


def answered(model: VisMem, suite: str, condition: Condition, n: int, seed: int, batch_size: int) -> dict:
    """One condition's accuracy over a suite, by cell and in all, and how often it invoked which memory."""
    cells, right, total = {}, 0.0, 0
    kinds, places = {"short": 0, "long": 0}, 0
    plan, colon = dict(SUITES[suite].plan), model.processor.tokenizer.encode("1:", add_special_tokens=False)[-1]
    with changed(model, condition.change):
        for name, options in SUITES[suite].cells.items():
            count = n * SUITES[suite].share
            asked = questions(f"{suite}-{name}", count, seed, **{**options, **dict(condition.asked)})
            policy = condition.policy(plan, colon)
            replies, invocations, delimiters = answers(model, asked, policy, batch_size)
            hits = sum(score(c.task, reply, c.answer) for c, reply in zip(asked, replies, strict=True))
            cells[name] = round(hits / count, 4)
            right, total, places = right + hits, total + count, places + delimiters
            for kind in kinds:
                kinds[kind] += sum(invocation.kind == kind for row in invocations for invocation in row)
    low, high = wilson(right, total)
    found = {"accuracy": round(right / total, 4), "low": low, "high": high, "n": total, "cells": cells}
    if condition.invocation != "off":
        found["invocations_per_answer"] = {kind: round(count / total, 3) for kind, count in kinds.items()}
        found["invocations_per_delimiter"] = round(sum(kinds.values()) / max(places, 1), 3)
    return found


@contextmanager
def formed_by(model: VisMem, form: Callable) -> Iterator[None]:
    """Replaces `model.memory.form` by `form(kind, observations)` while the context lasts."""
    model.memory.form = form
    try:
        yield
    finally:
        del model.memory.form


@contextmanager
def changed(model: VisMem, change: str) -> Iterator[None]:
    """Does something to every memory while the context lasts: the controls."""
    memory, builder = model.memory, model.memory.builder

    def another(kind: str, seen: list[Observation]) -> torch.Tensor:
        """Each row's own question, looking at its neighbour's image; of long memory, what its neighbour recalled."""
        if kind == "long":
            return Memory.form(memory, kind, seen).roll(1, 0)
        rolled = [replace(o, visual=p.visual, patches=p.patches) for o, p in zip(seen, seen[-1:] + seen, strict=False)]
        return Memory.form(memory, kind, rolled)

    def zero(kind: str, seen: list[Observation]) -> torch.Tensor:
        return torch.zeros_like(Memory.form(memory, kind, seen))

    if change == "no_query":
        handle = builder.register_forward_hook(lambda _module, _inputs, query: torch.zeros_like(query))
        try:
            yield
        finally:
            handle.remove()
    else:
        with formed_by(model, {"another": another, "zero": zero}[change]) if change else nullcontext():
            yield


def load(base_path: str | Path, memory_path: str | Path | None, **config) -> VisMem:
    """The pocket base with a trained memory, or with an untrained one that is always the same."""
    base, processor = load_base(path=base_path)
    if memory_path is not None:
        return VisMem.from_pretrained(memory_path, base=base, processor=processor)
    torch.manual_seed(0)
    return VisMem(base, processor, VisMemConfig.preset("pocket", **config)).eval()


def measure(
    memory_path: str | Path | None = MEMORY_PATH,
    base_path: str | Path = BASE_PATH,
    out_json: str | Path | None = "results/pocket/stage2_seed0.json",
    suites: Iterable[str] = tuple(SUITES),
    conditions: Iterable[str] = (),
    n: int = 25,
    seed: int = 1,
    batch_size: int = 50,
    **config,
) -> dict:
    """Measures one memory; writes as it goes, and goes on where it stopped.

    Args:
        memory_path: the memory's folder; None for an untrained one.
        base_path: the pocket base.
        out_json: where the results go; what an earlier run with the same n, seed and weights left there is kept.
        suites: names of `SUITES`.
        conditions: only these conditions; all by default.
        n: questions per cell of the suites with share 1.
        seed: of the questions.
        batch_size: of decoding.
        **config: fields of `VisMemConfig` for an untrained memory.

    Returns:
        The results: for each suite and condition its accuracy, with its 95 % Wilson interval, and its invocations.
    """
    from tqdm import tqdm

    if n < 2:
        raise ValueError(f"n must be 2 or more, not {n}")
    suites, conditions = tuple(suites), tuple(conditions)
    for name in suites:
        if name not in SUITES:
            raise ValueError(f"unknown suite {name!r}; there are {', '.join(SUITES)}")
    files = [Path(base_path) / "model.safetensors"]
    files += [Path(memory_path) / "vismem.safetensors"] if memory_path is not None else []
    changes = "".join(f" --{name.replace('_', '-')} {value}" for name, value in config.items())
    results = begin(f"vismem pocket measure --n {n} --seed {seed}{changes}", files, out_json)
    todo = []
    for name in suites:
        suite = SUITES[name]
        everything = {"vanilla": Condition(), **dict([suite.bound] if suite.bound else []), **suite.conditions}
        todo += [(name, c, everything[c]) for c in everything if not conditions or c in conditions]
    model = load(base_path, memory_path, **config)
    for suite, name, condition in tqdm(todo, desc="pocket measure", mininterval=5):
        found = results["suites"].setdefault(suite, {})
        if name not in found:
            found[name] = answered(model, suite, condition, n, seed, batch_size)
            write(results, out_json)
    results["recovered"] = {suite: recovered(suite, results["suites"][suite]) for suite in results["suites"]}
    write(results, out_json)
    return results


def begin(command: str, weights: list[Path], out_json: str | Path | None) -> dict:
    """The results of an earlier run of the same command on the same weights, to go on from, or a fresh record."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in weights}
    if out_json and Path(out_json).is_file():
        earlier = json.loads(Path(out_json).read_text())
        if earlier.get("command") == command and earlier.get("weights") == digests:
            return earlier
    what = "accuracy, greedy, test-split handwriting; low/high: 95 % Wilson interval"
    return {"command": command, "what": what, "weights": digests, "suites": {}}


def write(results: dict, out_json: str | Path | None) -> None:
    """Writes the results, whole or not at all."""
    if out_json:
        path = Path(out_json)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(path)


def recovered(name: str, suite: dict) -> dict[str, float]:
    """For every condition the share of the distance from vanilla to the suite's bound that it covers."""
    bound = SUITES[name].bound
    if bound is None or "vanilla" not in suite or bound[0] not in suite:
        return {}
    floor = suite["vanilla"]["accuracy"]
    distance = suite[bound[0]]["accuracy"] - floor
    return {c: round((v["accuracy"] - floor) / distance, 3) if distance else 0.0 for c, v in suite.items()}
