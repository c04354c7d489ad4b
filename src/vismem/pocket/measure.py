"""`vismem pocket measure`: does memory help the pocket, and is it the memory? Late questions and withheld rules.

Every condition answers the same questions, greedily, on test-split handwriting. Beside memory stand its bounds
(vanilla; the image shown again; the rule stated) and its controls: untrained memory, the memory of another image, zero
memory, a query set to zero, soft vectors and a LoRA trained on the same examples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch

from vismem.decoding.invocation import Forced
from vismem.memory import Memory, Observation
from vismem.model import VisMem
from vismem.pocket import BASE_PATH, MEMORY_PATH
from vismem.pocket.batches import Encoder
from vismem.pocket.conversations import Conversation, sample_conversation
from vismem.pocket.evaluate import wilson
from vismem.pocket.tasks import score
from vismem.pocket.warmup import formed_by, fresh_model, learner, prompts_of

LATE_TASKS = ("colour", "digit", "row", "sum")
DISTANCES = (1, 2, 4, 6, 8)


@dataclass(frozen=True)
class Condition:
    """One way of answering.

    Args:
        name: in the results.
        learner: trained state to use: `"memory"`, `"soft"`, `"lora"`, or `""` for an untrained memory.
        change: what is done to the memory: one of `CHANGES`, or `""`.
        invoke: kinds invoked before the first token.
        asked: options of `sample_conversation` that this condition changes.
        memory_init: how an untrained memory starts.
    """

    name: str
    learner: str = ""
    change: str = ""
    invoke: tuple[str, ...] = ()
    asked: tuple[tuple[str, object], ...] = ()
    memory_init: str = "pooled"


def conditions(kind: str, shown: tuple[tuple[str, object], ...], shown_name: str) -> tuple[Condition, ...]:
    """Bounds, memory and controls for one kind of memory."""
    invoke = (kind,)
    return (
        Condition("vanilla"),
        Condition(shown_name, asked=shown),
        Condition("memory", "memory", invoke=invoke),
        Condition("memory_untrained", invoke=invoke),
        Condition("memory_untrained_constants", invoke=invoke, memory_init="learned"),
        Condition("memory_of_another", "memory", "another", invoke),
        Condition("memory_zero", "memory", "zero", invoke),
        Condition("query_zero", "memory", "no_query", invoke),
        Condition("soft_vectors", "soft", invoke=invoke),
        Condition("lora_fine_tuned", "lora"),
    )


LATE = conditions("short", (("shown_again", True),), "image_shown_again")
RULES = conditions("long", (("rule", "stated-truth"),), "rule_stated")


@contextmanager
def changed(model: VisMem, change: str) -> Iterator[None]:
    """Does something to every memory while the context lasts: the controls."""
    memory, builder = model.memory, model.memory.builder

    def another(kind: str, seen: list[Observation]) -> torch.Tensor:
        """Each row gets what was formed for its neighbour, of another image and another question."""
        return Memory.form(memory, kind, seen).roll(1, 0)

    def another_image(kind: str, seen: list[Observation]) -> torch.Tensor:
        """Each row's own question, looking at its neighbour's image."""
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
    elif change:
        by_kind: Callable = {"another": lambda kind, seen: (another_image if kind == "short" else another)(kind, seen)}
        with formed_by(model, {"zero": zero, **by_kind}[change]):
            yield
    else:
        yield


@torch.inference_mode()
def answers(model: VisMem, conversations: list[Conversation], invoke: tuple[str, ...], batch_size: int) -> list[str]:
    """Greedy replies, with the kinds of `invoke` put in before the first token."""
    encoder = Encoder(model.processor.tokenizer)
    replies = []
    for start in range(0, len(conversations), batch_size):
        part = conversations[start : start + batch_size]
        inputs = prompts_of(part, encoder)
        policy = Forced([(row, 0, kind) for row in range(len(part)) for kind in invoke])
        longest = max(len(encoder.text(conversation.answer_text)) for conversation in part) + 4
        out = model.generate(**inputs, invocation=policy, max_new_tokens=longest, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        replies += model.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return replies


def questions(name: str, count: int, seed: int, **options) -> list[Conversation]:
    """`count` test-split conversations of one cell, the same for every condition."""
    return [sample_conversation(Random(f"{seed}-{name}-{i}"), "test", **options) for i in range(count)]


def late_cells() -> dict[str, dict]:
    """Late questions: every task at every distance, and right after a full description."""
    cells = {f"{t}/{d}": {"task": t, "distance": d} for t in LATE_TASKS for d in DISTANCES}
    return cells | {f"{t}/after_description": {"task": t, "after_description": True} for t in LATE_TASKS}


def rule_cells() -> dict[str, dict]:
    """Promotion prices with the image in view and the rule withheld."""
    return {"promotion/0": {"task": "promotion", "rule": "hidden-truth"}}


def measure(
    base_path: str | Path = BASE_PATH,
    memory_path: str | Path = MEMORY_PATH,
    work: str | Path | None = None,
    out_json: str | Path | None = "results/pocket_memory.json",
    n: int = 50,
    seed: int = 0,
    batch_size: int = 50,
) -> dict:
    """Measures the shipped memory beside its bounds and controls; writes as it goes, and goes on where it stopped.

    Args:
        base_path, memory_path: the pocket base and its memory.
        work: the warm-up's work folder, for the trained controls; None: `memory_path` with "-work" after its name.
            Conditions whose state is not there are left out and named in the result.
        out_json: where the results go; conditions that an earlier run of the same n and seed left there are kept.
            None writes none.
        n: questions per cell (eight times as many for the one cell of promotions).
        seed, batch_size: of the sample, and of decoding.
    """
    from tqdm import tqdm

    if n < 2:
        raise ValueError(f"n must be 2 or more, not {n}")
    work = Path(work) if work else Path(memory_path).with_name(Path(memory_path).name + "-work")
    weights = [Path(base_path) / "model.safetensors", Path(memory_path) / "vismem.safetensors"]
    results = begin(f"vismem pocket measure --n {n} --seed {seed}", weights, out_json)
    suites = (("late_questions", LATE, late_cells(), n), ("withheld_rules", RULES, rule_cells(), 8 * n))
    progress = tqdm(total=sum(len(kinds) * len(cells) for _, kinds, cells, _ in suites), desc="pocket measure")
    for suite, kinds, cells, count in suites:
        found = results.setdefault(suite, {})
        for condition in kinds:
            if condition.name in found:
                progress.update(len(cells))
                continue
            model = fresh_model(base_path, memory_init=condition.memory_init)
            if condition.learner == "memory":
                model = VisMem.from_pretrained(memory_path, base=model.base, processor=model.processor)
            module, context = learner(model, condition.learner or "memory")
            if condition.learner in ("soft", "lora"):
                state = work / f"{condition.learner}.pt"
                if not state.is_file():
                    results["left_out"].append(f"{suite}/{condition.name}: no {state.name} of a warm-up")
                    progress.update(len(cells))
                    continue
                module.load_state_dict(torch.load(state, weights_only=True)["module"])
            module.eval()
            cell_results, right, total = {}, 0.0, 0
            with context, changed(model, condition.change):
                for name, options in cells.items():
                    asked = questions(f"{suite}-{name}", count, seed, **{**options, **dict(condition.asked)})
                    replies = answers(model, asked, condition.invoke, batch_size)
                    hits = sum(score(c.task, reply, c.answer) for c, reply in zip(asked, replies, strict=True))
                    low, high = wilson(hits, count)
                    cell_results[name] = {
                        "accuracy": round(hits / count, 4),
                        "low": low,
                        "high": high,
                        "n": count,
                    }
                    right, total = right + hits, total + count
                    progress.update()
            low, high = wilson(right, total)
            found[condition.name] = {
                "accuracy": round(right / total, 4),
                "low": low,
                "high": high,
                "n": total,
                "trained_parameters": sum(p.numel() for p in module.parameters()) if condition.learner else 0,
                "cells": cell_results,
            }
            write(results, out_json)
    late, rules = results["late_questions"], results["withheld_rules"]
    results["recovered"] = {
        "late_questions": recovered(pooled(late), "image_shown_again"),
        # One turn after the image, most of it is still within the base's window.
        "late_questions_after_two_turns_or_more": recovered(pooled(late, without="/1"), "image_shown_again"),
        "withheld_rules": recovered(pooled(rules), "rule_stated"),
    }
    write(results, out_json)
    return results


def begin(command: str, weights: list[Path], out_json: str | Path | None) -> dict:
    """The results of an earlier run of the same command on the same weights, to go on from, or a fresh record."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in weights}
    if out_json and Path(out_json).is_file():
        earlier = json.loads(Path(out_json).read_text())
        if earlier.get("command") == command and earlier.get("weights") == digests:
            return {**earlier, "left_out": []}
    what = "accuracy, greedy, test-split handwriting; low/high: 95 % Wilson interval; memory is put in before the reply"
    return {"command": command, "what": what, "weights": digests, "left_out": []}


def write(results: dict, out_json: str | Path | None) -> None:
    """Writes the results, whole or not at all."""
    if out_json:
        path = Path(out_json)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n")
        partial.replace(path)


def pooled(suite: dict, without: str = "never") -> dict[str, float]:
    """Accuracy by condition over its cells, but for those whose name ends with `without`."""
    accuracy = {}
    for name, entry in suite.items():
        cells = [cell for cell_name, cell in entry["cells"].items() if not cell_name.endswith(without)]
        accuracy[name] = sum(cell["accuracy"] * cell["n"] for cell in cells) / sum(cell["n"] for cell in cells)
    return accuracy


def recovered(accuracy: dict[str, float], bound: str) -> dict[str, float]:
    """For every condition the share of the distance from vanilla to the bound that it covers."""
    floor, distance = accuracy["vanilla"], accuracy[bound] - accuracy["vanilla"]
    return {name: round((value - floor) / distance, 3) if distance else 0.0 for name, value in accuracy.items()}
