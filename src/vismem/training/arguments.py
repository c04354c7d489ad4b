"""Training arguments: transformers' `TrainingArguments` plus the settings of this method.

One dataclass serves all stages. A settings file has values for all stages and a section per stage; `key=value` on the
command line overrides both (`settings.py`). Precedence: command line, file's section, file, preset's section, preset.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
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

AT_LEAST_0 = ["learning_rate", "weight_decay", "max_grad_norm", "dataloader_num_workers", "max_bad_rows", "micro_batch"]
AT_LEAST_0 += ["clip_ratio", "kl_coef", "target_kl", "penalty_coef", "end_rate", "importance_sampling_cap", "gaze_coef"]
AT_LEAST_0 += ["choice_coef", "redraws"]
AT_LEAST_1 = ["per_device_train_batch_size", "gradient_accumulation_steps", "inner_iterations", "max_new_tokens"]
AT_LEAST_1 += ["kl_horizon"]
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
        injection_places: `"delimiter"`, `"anywhere"`, or `"delimiter-then-anywhere"`: delimiters in the first half. In
            stage I also `"named"`: where the row's `completion` has invocations, else at delimiters.
        injection_schedules: number of invocation schedules per prompt; a trajectory is compared only with those of the
            same schedule. 0 gives each trajectory its own schedule and compares all (stage I).
        redraws: how often to decode a prompt again, with other seeds, while all its trajectories earn the same.
        replace_rate: probability that an injected invocation replaces the delimiter before it, as a sampled one does
            (warm-up).
        gaze_coef: weight of the loss that teaches the choice of `memory_init="attended"` the base's gaze (warm-up).
        choice_coef: weight of the sampled choices in stage I's objective.
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
    injection_places: Literal["delimiter", "anywhere", "delimiter-then-anywhere", "named"] = "delimiter-then-anywhere"
    injection_schedules: int = 0
    redraws: int = 0
    replace_rate: float = 0.5
    gaze_coef: float = 1.0
    choice_coef: float = 1.0
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
        group, levels, known = self.group_size, trainer_log_levels, integrations.INTEGRATION_TO_CALLBACK
        rules: list[tuple[str, Callable[[Any], bool], Sequence[str]]] = [
            ("0 or more", lambda value: value >= 0, AT_LEAST_0),
            ("1 or more", lambda value: value >= 1, AT_LEAST_1),
            ("2 or more: a group of one has zero advantage", lambda value: value >= 2, ["group_size"]),
            (
                "more than 0",
                lambda value: value > 0,
                ["num_train_epochs", "logging_steps", "save_steps", "temperature"],
            ),
            ("between 0 and 1", lambda value: 0 <= value <= 1, ["injection_rate", "anywhere_rate", "replace_rate"]),
            ("from 0 to 4294967295", lambda value: value is None or 0 <= value < 2**32, ["seed", "data_seed"]),
            (
                f"0, a divisor of group_size ({group}) or a multiple of it",
                lambda value: not value or group % value == 0 or value % group == 0,
                ["micro_batch"],
            ),
            (
                f"0, or a divisor of group_size ({group}) that leaves 2 or more to each schedule",
                lambda value: not value or (value > 0 and group % value == 0 and group // value >= 2),
                ["injection_schedules"],
            ),
            (f"one of {', '.join(levels)}", lambda value: value in levels, ["log_level", "log_level_replica"]),
            (f"none, all or some of {', '.join(known)}", lambda value: {*(value or ())} <= {*known}, ["report_to"]),
        ]
        for rule, holds, names in rules:
            for name in names:
                if not holds(getattr(self, name)):
                    raise SettingsError(f"{name} must be {rule}, got {format_value(getattr(self, name))}")
        for reporter in self.report_to or ():
            if not getattr(integrations, f"is_{reporter}_available", lambda: True)():
                raise SettingsError(f"report_to={reporter} needs the package {reporter}, which is not installed")
        if self.inner_iterations > 1 and self.streaming:
            raise SettingsError("inner_iterations > 1 needs data that can be read again; set streaming=false")
        if self.inner_iterations > 1 and self.save_strategy == "steps" and self.save_steps % self.inner_iterations:
            raise SettingsError(f"save_steps must be a multiple of inner_iterations ({self.inner_iterations})")
        self.memory_config()
        if self.streaming and self.max_steps <= 0:
            raise SettingsError("streaming data has no length: set max_steps")

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
