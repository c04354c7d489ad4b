"""Training arguments: transformers' `TrainingArguments` plus the settings of this method.

One dataclass serves all stages. A settings file has values for all stages and a section per stage; `key=value` on the
command line overrides both (`settings.py`). Precedence: command line, file's section, file, preset's section, preset.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments, integrations
from transformers.training_args import trainer_log_levels

from vismem.config import VisMemConfig
from vismem.settings import Flag, Number, SettingsError, Whole, convert, format_value
from vismem.training.precision import choose_precision
from vismem.training.settings import PRESETS, SECTIONS, kinds, load_settings, memory_config, own_kinds, values_for
from vismem.training.stages import PLANS, STAGES, Plan

__all__ = ["PRESETS", "SECTIONS", "STAGES", "MemoryTrainingArguments", "arguments_for", "load_settings"]

NO_EVALUATION = "training does not evaluate: leave out eval_dataset and eval_strategy, and run `vismem eval` afterwards"


@dataclass
class MemoryTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus what training a memory needs.

    `per_device_train_batch_size` counts prompts; in the RL stages each prompt has `group_size` trajectories.

    Args:
        stage: `"warmup"`, `"stage1"`, `"stage2"`; or a baseline, `"sft"` or `"grpo"`.
        base: model name or folder of the base; `"pocket"` is the packaged one.
        dtype: dtype of the base; trained parameters are always float32.
        attn_implementation: the base's attention implementation, as in transformers; None for its default.
        checkpoint: memory (for a baseline, adapter) to start from; None to start untrained.
        memory: fields of `VisMemConfig` for a new memory, or the name of a preset.
        data: JSONL file, folder or hub name (`docs/data.md`); `"pocket"` for the pocket world, `"pocket:late"` for its
            late questions only.
        split, streaming, strict, max_bad_rows, max_rows: how the data is read.
        columns: maps our column names to the data's where they differ: `{"prompt": "question"}`.
        rewards: reward functions: names, import paths, or mappings with `weight` and options (`docs/rewards.md`).
        group_size: G, trajectories per prompt.
        temperature: sampling temperature, also applied to log-probabilities.
        max_new_tokens: maximum number of sampled tokens per trajectory.
        clip_ratio: epsilon of the surrogate.
        kl_coef, target_kl, kl_horizon: beta, the KL per token that its controller targets, and the controller's
            horizon in steps.
        reference: the reference policy of the KL: the stage's `"start"`, or the base with `"no_memory"`.
        inner_iterations: updates per batch of rollouts.
        importance_sampling_cap: cap of the importance weights between the decode that sampled a token and its replay;
            0 disables them. Useful in low precision, where the two differ.
        penalty_coef: alpha of stage II's penalties.
        injection_rate, anywhere_rate: probability of an injected invocation at each delimiter, and before any token
            (warm-up and stage I).
        injection_places: `"delimiter"`, `"anywhere"`, or `"delimiter-then-anywhere"`: delimiters in the first half.
        replace_rate: probability that an injected invocation replaces the delimiter before it, as a sampled one does
            (warm-up).
        end_rate: learning rate of the end tokens' embeddings, relative to the invocation tokens' (stage II).
        micro_batch: trajectories per forward and backward; 0 for all at once. Must divide `group_size` or be a
            multiple of it.
        baseline: how the answer without memory is decoded: `"greedy"`, `"sample"` or `"off"`.
        skip_solved: skip prompts whose answer without memory and whole group are correct.
        log_completions: number of completions saved at each logging step.
        trust_remote_code: allow code from the base's repository.
    """

    stage: Literal["warmup", "stage1", "stage2", "sft", "grpo"] = "stage1"
    base: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: str | None = None
    checkpoint: str | None = None
    memory: dict[str, Any] | str | None = None
    data: str = ""
    split: str = "train"
    streaming: bool = False
    strict: bool = False
    max_bad_rows: int = 10
    max_rows: int | None = None
    columns: Mapping[str, str] | None = None
    rewards: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = field(default_factory=lambda: ["exact"])
    group_size: int = 16
    temperature: float = 1.0
    max_new_tokens: int = 256
    clip_ratio: float = 0.2
    kl_coef: float = 0.015
    target_kl: float = 0.03
    kl_horizon: int = 10
    reference: Literal["start", "no_memory"] = "start"
    inner_iterations: int = 1
    importance_sampling_cap: float = 0.0
    penalty_coef: float = 0.3
    injection_rate: float = 0.25
    anywhere_rate: float = 0.05
    injection_places: Literal["delimiter", "anywhere", "delimiter-then-anywhere"] = "delimiter-then-anywhere"
    replace_rate: float = 0.5
    end_rate: float = 0.1
    micro_batch: int = 0
    baseline: Literal["greedy", "sample", "off"] = "greedy"
    skip_solved: bool = True
    log_completions: int = 2
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.remove_unused_columns = False
        self.average_tokens_across_devices = False
        self.logging_nan_inf_filter = False
        self.ddp_find_unused_parameters = False
        self.ddp_broadcast_buffers = False
        own = own_kinds()
        for name, kind in kinds().items():  # before the parent derives values from them
            if (name in own and name != "rewards") or kind in (Whole, Number, Flag):
                setattr(self, name, convert(getattr(self, name), kind, name))
        # Each process reads its own share: rows hold images, which accelerate cannot broadcast.
        loading: Any = self.accelerator_config or {}
        self.accelerator_config = {"dispatch_batches": False, **loading}
        try:
            super().__post_init__()
        except (ValueError, TypeError, NotImplementedError, OSError) as error:
            raise SettingsError(" ".join(str(error).split())) from error
        if self.eval_strategy != "no" or self.do_eval or self.eval_on_start or self.load_best_model_at_end:
            raise SettingsError(NO_EVALUATION)
        for name in ("log_level", "log_level_replica"):
            allowed = ", ".join(trainer_log_levels)
            self._require(name, f"one of {allowed}", getattr(self, name) in trainer_log_levels)
        for reporter in self.report_to or ():
            known = ", ".join(integrations.INTEGRATION_TO_CALLBACK)
            self._require(
                "report_to", f"none, all or some of {known}", reporter in integrations.INTEGRATION_TO_CALLBACK
            )
            if not getattr(integrations, f"is_{reporter}_available", lambda: True)():
                raise SettingsError(f"report_to={reporter} needs the package {reporter}, which is not installed")
        for name in ("seed", "data_seed"):
            seed = getattr(self, name)
            self._require(name, "from 0 to 4294967295", seed is None or 0 <= seed < 2**32)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            self._require(name, "1 or more", getattr(self, name) >= 1)
        for name in ("num_train_epochs", "logging_steps", "save_steps"):
            self._require(name, "more than 0", getattr(self, name) > 0)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers"):
            self._require(name, "0 or more", getattr(self, name) >= 0)
        for name in ("inner_iterations", "max_new_tokens", "kl_horizon"):
            self._require(name, "1 or more", getattr(self, name) >= 1)
        self._require("group_size", "2 or more: a group of one has zero advantage", self.group_size >= 2)
        self._require("temperature", "more than 0", self.temperature > 0)
        at_least_0 = ("clip_ratio", "kl_coef", "target_kl", "penalty_coef", "micro_batch", "max_bad_rows", "end_rate")
        for name in (*at_least_0, "importance_sampling_cap"):
            self._require(name, "0 or more", getattr(self, name) >= 0)
        for name in ("injection_rate", "anywhere_rate", "replace_rate"):
            self._require(name, "between 0 and 1", 0 <= getattr(self, name) <= 1)
        group = self.group_size
        fits = not self.micro_batch or group % self.micro_batch == 0 or self.micro_batch % group == 0
        self._require("micro_batch", f"0, a divisor of group_size ({group}) or a multiple of it", fits)
        if self.inner_iterations > 1 and self.streaming:
            raise SettingsError("inner_iterations > 1 needs data that can be read again; set streaming=false")
        if self.inner_iterations > 1 and self.save_strategy == "steps" and self.save_steps % self.inner_iterations:
            raise SettingsError(f"save_steps must be a multiple of inner_iterations ({self.inner_iterations})")
        self.memory_config()
        if self.streaming and self.max_steps <= 0:
            raise SettingsError("streaming data has no length: set max_steps")

    def _require(self, name: str, rule: str, holds: object) -> None:
        if not holds:
            raise SettingsError(f"{name} must be {rule}, got {format_value(getattr(self, name))}")

    @property
    def plan(self) -> Plan:
        """What the stage trains, and how."""
        return PLANS[self.stage]

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(str(self.output_dir))

    @property
    def result(self) -> Path:
        """The folder of the memory or adapter that the stage makes."""
        return self.folder / self.plan.result

    def memory_config(self) -> VisMemConfig:
        """The config of a new memory.

        Raises:
            SettingsError: if the preset or a field is unknown, or a value is out of range.
        """
        return memory_config(self.memory)


def arguments_for(stage: str, layers: Sequence[Mapping[str, Any]], **fixed: Any) -> MemoryTrainingArguments:
    """Builds the arguments of one stage from the preset, each layer and its section for the stage, and `fixed`.

    Sets defaults for the device, the precision (`precision.py`), where metrics are reported, and the run's name,
    `OUTPUT_DIR-STAGE`.

    Raises:
        SettingsError: if a name is unknown, or a value has the wrong type or is out of range.
    """
    defaults = {
        "report_to": "tensorboard" if find_spec("tensorboard") else "none",
        "project": os.environ.get("WANDB_PROJECT", "vismem"),
        "use_cpu": not torch.accelerator.is_available(),
    }
    values = {**defaults, **values_for(stage, layers), **fixed, "stage": stage}
    folder = Path(str(values.get("output_dir") or "")).absolute()
    values.setdefault("run_name", f"{folder.parent.name if folder.name == stage else folder.name}-{stage}")
    if "bf16" not in values or "dtype" not in values:
        args = MemoryTrainingArguments(**{**values, "bf16": False})  # also initializes the process group
        values |= choose_precision(
            args, bf16=False if values.get("fp16") else values.get("bf16"), dtype=values.get("dtype")
        )
    return MemoryTrainingArguments(**values)
