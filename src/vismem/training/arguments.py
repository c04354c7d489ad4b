"""Settings of a training run: transformers' `TrainingArguments` with this method's own, presets, and YAML files.

One dataclass serves all stages. A file holds settings for all of them and a section for each stage; `key=value` on
the command line overrides either. Which value wins: command line, file's section, file, preset's section, preset.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from vismem.config import VisMemConfig
from vismem.data.layouts import check_columns
from vismem.training.stages import BASELINES, PLANS, STAGES, Plan

NO_EVALUATION = "training does not evaluate: leave out eval_dataset and eval_strategy, and run `vismem eval` afterwards"
SECTIONS = (*STAGES, *BASELINES)  # of a file of settings


@dataclass
class MemoryTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and what training a memory needs beside them.

    `per_device_train_batch_size` counts prompts; in the two RL stages every prompt has `group_size` trajectories.

    Args:
        stage: `"warmup"`, `"stage1"`, `"stage2"`; or a baseline, `"sft"` or `"grpo"`.
        base: model name or folder of the base; `"pocket"` is the packaged one.
        dtype: the base's dtype; what is trained is kept in float32 in any case.
        attn_implementation: the base's attention, as transformers names it; None for its own choice.
        checkpoint: memory (of a baseline: adapter) to start from; without one it starts untrained.
        memory: fields of `VisMemConfig` for a new memory, or a preset's name.
        data: JSONL file, folder or hub name (`docs/data.md`); `"pocket"` is the pocket world (`"pocket:late"`: its
            late questions alone).
        split, streaming, strict, max_bad_rows, max_rows: how the data is read.
        columns: names of the data's columns that differ, from ours to theirs: `{"prompt": "question"}`.
        rewards: reward functions: names, import paths, or mappings with `weight` and options (`docs/rewards.md`).
        group_size: G, trajectories per prompt.
        temperature: of sampling; log-probabilities are taken at the same one.
        max_new_tokens: sampled tokens per trajectory at most.
        clip_ratio: epsilon of the surrogate.
        kl_coef, target_kl, kl_horizon: beta, the divergence per token that it is steered to, and how fast.
        reference: what the divergence is taken to: the stage's `"start"`, or the base with `"no_memory"`.
        inner_iterations: updates on each batch of rollouts.
        penalty_coef: alpha of stage II's penalties.
        injection_rate, anywhere_rate: chance of an invocation at each delimiter, and before any token, where
            invocations are put in (warm-up and stage I).
        injection_places: `"delimiter"`, `"anywhere"`, or `"delimiter-then-anywhere"`: delimiters in the first half.
        replace_rate: warm-up: chance that an invocation stands in place of the delimiter before it, as a sampled
            one does.
        end_rate: learning rate of the end tokens' rows, relative to the invocation tokens' (stage II).
        micro_batch: trajectories per forward and backward; 0 for all at once. Must divide `group_size` or be a
            multiple of it.
        baseline: how the answer without memory is written: `"greedy"`, `"sample"` or `"off"`.
        skip_solved: leave out prompts whose answer without memory and whole group are right.
        log_completions: sample completions kept at each logging step.
        trust_remote_code: let the base's repository bring its own code.
    """

    stage: str = "stage1"
    base: str = ""
    dtype: str = "bfloat16"
    attn_implementation: str | None = None
    checkpoint: str | None = None
    memory: Any = None
    data: str = ""
    split: str = "train"
    streaming: bool = False
    strict: bool = False
    max_bad_rows: int = 10
    max_rows: int | None = None
    columns: dict[str, str] | None = None
    rewards: Any = field(default_factory=lambda: ["exact"])
    group_size: int = 16
    temperature: float = 1.0
    max_new_tokens: int = 256
    clip_ratio: float = 0.2
    kl_coef: float = 0.015
    target_kl: float = 0.03
    kl_horizon: int = 10
    reference: str = "start"
    inner_iterations: int = 1
    penalty_coef: float = 0.3
    injection_rate: float = 0.25
    anywhere_rate: float = 0.05
    injection_places: str = "delimiter-then-anywhere"
    replace_rate: float = 0.5
    end_rate: float = 0.1
    micro_batch: int = 0
    baseline: str = "greedy"
    skip_solved: bool = True
    log_completions: int = 2
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.remove_unused_columns = False
        self.average_tokens_across_devices = False
        self.logging_nan_inf_filter = False
        self.ddp_find_unused_parameters = False
        self.ddp_broadcast_buffers = False
        for each in dataclasses.fields(self):  # before anything is computed from them
            value, kind = getattr(self, each.name), getattr(each.type, "__name__", each.type)
            if kind in ("int", "float") and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{each.name} must be a number, got {value!r}")
            if kind == "int" and int(value) != value:
                raise ValueError(f"{each.name} must be a whole number, got {value!r}")
            if kind == "int":
                setattr(self, each.name, int(value))
            if kind == "bool" and not isinstance(value, bool):
                raise ValueError(f"{each.name} must be true or false, got {value!r}")
        # Each process reads its own share: rows hold images, which are not tensors that could be sent around.
        own: Any = self.accelerator_config or {}
        self.accelerator_config = {"dispatch_batches": False, **own}
        super().__post_init__()
        if self.eval_strategy != "no" or self.do_eval or self.eval_on_start or self.load_best_model_at_end:
            raise ValueError(NO_EVALUATION)
        check_columns(self.columns)
        one_of = {
            "stage": tuple(PLANS),
            "dtype": ("auto", "float32", "bfloat16", "float16"),
            "reference": ("start", "no_memory"),
            "baseline": ("greedy", "sample", "off"),
            "injection_places": ("delimiter", "anywhere", "delimiter-then-anywhere"),
        }
        for name, allowed in one_of.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        for name in ("inner_iterations", "max_new_tokens", "kl_horizon"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        self._require("group_size", self.group_size >= 2, "2 or more: one sample has nothing to be better than")
        self._require("temperature", self.temperature > 0, "more than 0")
        for name in ("clip_ratio", "kl_coef", "target_kl", "penalty_coef", "micro_batch", "max_bad_rows", "end_rate"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("injection_rate", "anywhere_rate", "replace_rate"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        group = self.group_size
        fits = not self.micro_batch or group % self.micro_batch == 0 or self.micro_batch % group == 0
        self._require("micro_batch", fits, f"0, a divisor of group_size ({group}) or a multiple of it")
        if self.inner_iterations > 1 and self.streaming:
            raise ValueError("inner_iterations > 1 needs data that can be read again; set streaming=false")
        if self.inner_iterations > 1 and self.save_strategy == "steps" and self.save_steps % self.inner_iterations:
            raise ValueError(f"save_steps must be a multiple of inner_iterations ({self.inner_iterations})")
        self.memory_config()
        if self.streaming and self.max_steps <= 0:
            raise ValueError("streaming data has no length: set max_steps")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def plan(self) -> Plan:
        """What the stage trains, and how."""
        return PLANS[self.stage]

    def memory_config(self) -> VisMemConfig:
        """The configuration of a new memory.

        Raises:
            ValueError: if the preset or a field is unknown, or a value is out of range.
        """
        values = {"preset": self.memory} if isinstance(self.memory, str) else dict(self.memory or {})
        known = [f.name for f in dataclasses.fields(VisMemConfig)]
        for name in values:
            if name not in (*known, "preset"):
                near = difflib.get_close_matches(name, known, 1)
                raise ValueError(f"unknown setting memory.{name}" + (f"; did you mean {near[0]}?" if near else ""))
        return VisMemConfig.preset(values.pop("preset", "paper"), **values)


# The paper's numbers (its section 4.1 and Tab. 4), and what trains the pocket in minutes on a laptop.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "memory": {"preset": "paper"},
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "inner_iterations": 1,
        "group_size": 16,
        "clip_ratio": 0.2,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "bf16": True,
        "logging_steps": 1,
        "save_steps": 50,
        "warmup": {"learning_rate": 5e-5, "warmup_steps": 0.2, "num_train_epochs": 1},
        "stage1": {"learning_rate": 5e-5, "warmup_steps": 0.2, "kl_coef": 0.015, "target_kl": 0.03},
        "stage2": {
            "learning_rate": 1e-5,
            "warmup_steps": 0.1,
            "kl_coef": 0.030,
            "target_kl": 0.05,
            "penalty_coef": 0.3,
        },
        # Baselines: the warm-up's numbers, and those of stage I.
        "sft": {"learning_rate": 5e-5, "warmup_steps": 0.2, "num_train_epochs": 1},
        "grpo": {"learning_rate": 5e-5, "warmup_steps": 0.2, "kl_coef": 0.015, "target_kl": 0.03},
    },
    "pocket": {
        "base": "pocket",
        "data": "pocket",
        "rewards": ["pocket"],
        "memory": {"preset": "pocket"},
        "group_size": 8,
        "max_new_tokens": 48,
        "attn_implementation": "eager",  # the fastest one to train on a CPU
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.98,
        "bf16": True,
        "use_cpu": True,
        "logging_steps": 5,
        "save_steps": 25,
        "save_total_limit": 2,
        "injection_rate": 0.5,
        "warmup": {"per_device_train_batch_size": 16, "learning_rate": 5e-3, "warmup_steps": 0.05, "max_steps": 320},
        "stage1": {
            "per_device_train_batch_size": 6,
            "learning_rate": 5e-4,
            "warmup_steps": 0.1,
            "max_steps": 25,
            "injection_places": "delimiter",
        },
        "stage2": {
            "per_device_train_batch_size": 6,
            "learning_rate": 2e-3,
            "warmup_steps": 0.1,
            "max_steps": 100,
            "kl_coef": 0.030,
            "target_kl": 0.05,
        },
        "sft": {"per_device_train_batch_size": 16, "learning_rate": 4e-3, "warmup_steps": 0.05, "max_steps": 320},
        "grpo": {"per_device_train_batch_size": 6, "learning_rate": 2e-3, "warmup_steps": 0.1, "max_steps": 125},
    },
}


def load_settings(path: str | Path | None, overrides: list[str]) -> list[dict[str, Any]]:
    """A file's settings, and those of `key=value` and `stage.key=value`, whose values are read as YAML.

    Raises:
        ValueError: if the file is not a YAML mapping, or a name is unknown (the nearest one is named).
        OSError: if the file cannot be read.
    """
    settings: dict[str, Any] = read_mapping(path)
    given: dict[str, Any] = {}
    for override in overrides:
        name, value = read_change(override)
        section, _, key = name.rpartition(".")
        target = given.setdefault(section, {}) if section else given
        target[key] = value
    for layer in (settings, given):
        check_names(layer)
    return [settings, given]


def read_mapping(path: str | Path | None) -> dict[str, Any]:
    """The settings of a YAML file; none without a file. Raises ValueError if it holds no mapping."""
    import yaml

    if path is None:
        return {}
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a mapping of settings, not a {type(found).__name__}")
    return found


def read_change(text: str) -> tuple[str, Any]:
    """Name and value of `key=value`, the value read as YAML. Raises ValueError if it is neither."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not of the form key=value")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {name} is not valid YAML: {value!r}") from error


def as_number(value: Any) -> Any:
    """YAML takes 5e-5 for a text; people mean a number, also inside lists and mappings."""
    if isinstance(value, dict):
        return {name: as_number(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [as_number(inner) for inner in value]
    if isinstance(value, str) and value:
        try:
            return float(value) if any(c in "eE" for c in value) and value[0] in "0123456789.+-" else value
        except ValueError:
            return value
    return value


def check_names(settings: dict[str, Any]) -> None:
    """Refuses names that no stage knows."""
    known = {f.name for f in dataclasses.fields(MemoryTrainingArguments)} | {"preset", *SECTIONS}
    sections = {"": settings, **{stage: settings.get(stage) or {} for stage in SECTIONS}}
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise ValueError(f"section {section} must be a mapping of settings")
        for name in values:
            if section == "" and name == "memory":
                continue
            if name not in known or (section and name in (*SECTIONS, "preset")):
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"unknown setting {f'{section}.' if section else ''}{name}{hint}")


def arguments_for(stage: str, layers: list[dict[str, Any]], **fixed: Any) -> MemoryTrainingArguments:
    """The arguments of one stage: the preset, then each layer, and within each what is said of the stage; and `fixed`.

    Raises:
        ValueError: if the preset is unknown or a value is out of range.
    """
    preset = next((layer["preset"] for layer in reversed(layers) if "preset" in layer), "paper")
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    values: dict[str, Any] = {
        "report_to": "tensorboard" if find_spec("tensorboard") else "none",
        "use_cpu": not torch.accelerator.is_available(),
    }
    for layer in (PRESETS[preset], *layers):
        general = {name: value for name, value in layer.items() if name not in (*SECTIONS, "preset")}
        for source in (general, layer.get(stage) or {}):
            merged = {name: as_number(value) for name, value in source.items()}
            if isinstance(merged.get("memory"), str):
                merged["memory"] = {"preset": merged["memory"]}
            if isinstance(merged.get("memory"), dict) and isinstance(values.get("memory"), dict):
                merged["memory"] = {**values["memory"], **merged["memory"]}
            values.update(merged)
    return MemoryTrainingArguments(**{**values, "stage": stage, **fixed})
