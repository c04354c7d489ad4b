"""Training on tiny models: prompts, settings, and runs to compare."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerCallback

from vismem.cli import main
from vismem.data import Row
from vismem.training.arguments import MemoryTrainingArguments
from vismem.training.checkpoints import last_checkpoint
from vismem.training.replay import Learner
from vismem.training.trainer import MemoryTrainer

STAGES = ("warmup", "stage1", "stage2")
QUESTIONS = ("What is on the table?", "look again!", "Describe the image: it is bright;")
PARTS = ("builder", "short", "long", "tokens")


@pytest.fixture(autouse=True)
def quick():
    """Models this small are fastest on one thread, and garbage collection need not look through all imports."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    torch.set_num_threads(threads)


def rows(count: int = 4) -> list[Row]:
    """Prompts of different lengths, one image each."""
    found = []
    for i in range(count):
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[i % 3]}]}]
        found.append(Row(f"row-{i}", prompt, [tiny.picture(i)], "a red cup", "A red cup, a blue book. Look!", {}))
    return found


def low(prompts, completions, completion_ids, **columns) -> list[float]:
    """The share of tokens with a small id, a value that differs between answers."""
    return [sum(token < 160 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def settings(folder, stage: str = "stage1", **changes) -> MemoryTrainingArguments:
    values = {
        "group_size": 2,
        "max_new_tokens": 8,
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "injection_rate": 1.0,
        "injection_places": "delimiter",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return MemoryTrainingArguments(str(folder), stage=stage, **{**values, **changes})


def equip(family: str, **config):
    """A model that invokes often by itself."""
    model = tiny.equip(family, **{"lora_dropout": 0.0, "min_gap": 1, **config})
    with torch.no_grad():
        for name, parameter in model.tokens.named_parameters():
            if name.endswith("output") or model.tokens.tied:
                parameter.mul_(5)
    return model


def train(model, args, data=None, reward=low, resume=None, callbacks=None) -> MemoryTrainer:
    found = MemoryTrainer(model, args, rows() if data is None else data, reward, callbacks=callbacks)
    found.train(resume_from_checkpoint=resume)
    return found


class Killed(BaseException):
    """Stands in for SIGKILL, which pytest would not survive."""


def killed_at(step: int, patch: pytest.MonkeyPatch, method: str = "_save_rng_state") -> None:
    """Kills trainers from now on at a step: by default in the middle of writing its checkpoint."""
    real = getattr(MemoryTrainer, method)

    def dying(self, *given, **named):
        if self.state.global_step == step:
            raise Killed
        return real(self, *given, **named)

    patch.setattr(MemoryTrainer, method, dying)


def whole_and_resumed(folder: Path, stage: str, fresh: Callable[[], Any], **changes) -> tuple[Any, Any]:
    """A model trained for six steps, and one whose run was killed in the last and resumed from step 4.

    Six rows in batches of two: step 4 is in the middle of the second epoch (with two inner iterations, of the first).
    """
    plan = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-3, "logging_steps": 2}
    plan |= {"lr_scheduler_type": "cosine", "warmup_steps": 1, "max_new_tokens": 6, **changes}
    train(whole := fresh(), settings(folder / "whole", stage, **plan), rows(6))
    cut = folder / "cut"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(6, patch)
        train(fresh(), settings(cut, stage, **plan), rows(6))
    assert sorted(path.name for path in cut.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert last_checkpoint(cut) == str(cut / "checkpoint-4")
    again = fresh()
    with torch.no_grad():  # whatever it starts from, even the reference policy is the checkpoint's
        for parameter in Learner(again).parameters():
            parameter.add_(0.1)
    train(again, settings(cut, stage, **plan), rows(6), resume=last_checkpoint(cut))
    assert not (cut / ".partial").exists() and (cut / "checkpoint-6").is_dir()
    return whole, again


def weights(model) -> dict[str, torch.Tensor]:
    """What can be trained, by name."""
    return {name: p.detach().clone() for name, p in Learner(model).named_parameters()}


def distance(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


class Gradients(TrainerCallback):
    """Keeps the gradients of each update."""

    def __init__(self) -> None:
        self.found: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        self.found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny base, data and a reward as a user has them, in files."""
    found = tmp_path_factory.mktemp("files")
    base, processor = tiny.base_and_processor("idefics3")
    base.save_pretrained(found / "base")
    processor.save_pretrained(found / "base")
    lines = []
    for i in range(4):
        tiny.picture(i).save(found / f"{i}.png")
        lines.append(json.dumps({"prompt": QUESTIONS[i % 3], "images": [f"{i}.png"], "answer": "a red cup, a book"}))
    (found / "data.jsonl").write_text("\n".join(lines) + "\n")
    (found / "reward.py").write_text(
        "def low(completion_ids, **columns):\n"
        "    return [sum(t < 160 for t in ids) / max(len(ids), 1) for ids in completion_ids]\n"
    )
    (found / "settings.yaml").write_text(
        f"preset: pocket\nbase: {found / 'base'}\ndata: {found / 'data.jsonl'}\n"
        f"rewards: {found / 'reward.py'}:low\ndtype: float32\nbf16: false\ngroup_size: 2\nmax_new_tokens: 6\n"
        "per_device_train_batch_size: 2\nmemory: {query_length: 4, short_length: 4, long_length: 4, lora_r: 4}\n"
        "report_to: none\ndisable_tqdm: true\nmax_steps: 2\nsave_steps: 1\nlogging_steps: 1\n"
        "warmup: {max_steps: 2, per_device_train_batch_size: 2}\n"
        "stage1: {max_steps: 2, per_device_train_batch_size: 2}\n"
        "stage2: {max_steps: 2, per_device_train_batch_size: 2}\n"
    )
    return found


def command(*given: str) -> int:
    return main(["train", *given])
