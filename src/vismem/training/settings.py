"""Training settings from a file and `key=value`: presets, sections, and other libraries' names.

Nothing imports torch or transformers, so mistakes are reported immediately. `arguments.py` turns the result into
`MemoryTrainingArguments`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from vismem.config import PRESETS as MEMORY_PRESETS
from vismem.config import VisMemConfig
from vismem.settings import (
    SettingsError,
    check,
    check_preset,
    format_value,
    hints_from_source,
    kind_of,
    read_changes,
    read_file,
)
from vismem.training.stages import BASELINES, STAGES

SECTIONS = (*STAGES, *BASELINES)  # of a settings file

# The paper's hyperparameters (section 4.1 and Tab. 4), and ones that train the pocket model in minutes on a laptop.
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
        # Baselines: the hyperparameters of the warm-up and of stage I.
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
        "attn_implementation": "eager",  # the fastest for training on a CPU
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.98,
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


# Names in TRL, peft, LLaMA-Factory, ms-swift and earlier transformers -> the name here, or advice.
_LORA = "a memory has no such setting; `vismem train sft` trains an adapter, with the rank and scale of memory.lora_r"
_SAMPLING = "trajectories are sampled with `temperature` only"
_NO_TRUNCATION = "prompts are never truncated; remove rows that are too long"
OTHER_NAMES = {
    **dict.fromkeys(("model", "model_name", "model_name_or_path", "model_id", "model_path", "base_model"), "base"),
    **dict.fromkeys(("torch_dtype", "model_dtype", "infer_dtype"), "dtype"),
    **dict.fromkeys(("attn_impl", "flash_attn"), "attn_implementation"),
    "model_init_kwargs": "set dtype, attn_implementation and trust_remote_code directly",
    **dict.fromkeys(("adapter_name_or_path", "adapters", "memory_path"), "checkpoint"),
    **dict.fromkeys(("dataset", "dataset_name", "dataset_path", "train_file", "train_files"), "data"),
    **dict.fromkeys(("dataset_train_split", "dataset_split"), "split"),
    "dataset_streaming": "streaming",
    **dict.fromkeys(("max_samples", "max_train_samples"), "max_rows"),
    **dict.fromkeys(("reward_funcs", "reward_functions", "reward_fn", "reward_model"), "rewards"),
    "reward_weights": "give each reward its weight: rewards: [{name: exact, weight: 0.5}]",
    **dict.fromkeys(("num_generations", "num_return_sequences", "rollout_n", "n_samples_per_prompt"), "group_size"),
    **dict.fromkeys(("max_completion_length", "response_length", "max_response_length"), "max_new_tokens"),
    **dict.fromkeys(("max_prompt_length", "cutoff_len", "max_length", "max_seq_length", "truncation"), _NO_TRUNCATION),
    **dict.fromkeys(("beta", "kl_beta", "init_kl_coef", "kl_loss_coef"), "kl_coef"),
    "target": "target_kl",
    "horizon": "kl_horizon",
    **dict.fromkeys(("epsilon", "cliprange", "clip_range", "epsilon_low", "epsilon_high", "eps_clip"), "clip_ratio"),
    **dict.fromkeys(("num_iterations", "num_ppo_epochs", "ppo_epochs", "mu", "mini_batch_epochs"), "inner_iterations"),
    **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty"), _SAMPLING),
    **dict.fromkeys(("num_completions_to_print", "log_completions_num"), "log_completions"),
    **dict.fromkeys(("per_device_batch_size", "batch_size", "train_batch_size"), "per_device_train_batch_size"),
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "micro_batch",
    **dict.fromkeys(("lr", "actor_lr"), "learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "total_epochs"), "num_train_epochs"),
    **dict.fromkeys(("steps", "total_training_steps", "num_steps"), "max_steps"),
    "warmup_ratio": "it is called warmup_steps here; a number below 1 is a fraction of all steps",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy",
    **dict.fromkeys(("no_cuda", "cpu"), "use_cpu"),
    "logging_dir": "set output_dir; TensorBoard files go to its runs subfolder",
    "overwrite_output_dir": "a run's folder is never overwritten; choose another output_dir, or resume with --resume",
    **dict.fromkeys(("lora_r", "lora_rank", "r", "rank"), "memory.lora_r"),
    "lora_alpha": "memory.lora_alpha",
    "lora_dropout": "memory.lora_dropout",
    **dict.fromkeys(
        ("use_peft", "peft_config", "lora_target", "lora_target_modules", "target_modules", "finetuning_type"),
        _LORA,
    ),
    **dict.fromkeys(("use_vllm", "vllm_mode"), "trajectories are generated by vismem's own decoder"),
}


@cache
def own_kinds() -> dict[str, Any]:
    """Types of the settings that `MemoryTrainingArguments` adds to transformers'."""
    hints = hints_from_source(Path(__file__).with_name("arguments.py"), "MemoryTrainingArguments")
    return {name: kind_of(hint) for name, hint in hints.items()}


@cache
def kinds() -> dict[str, Any]:
    """Types of all settings of a stage, including those of the installed transformers."""
    found = find_spec("transformers")
    if found is None or found.origin is None:
        raise ImportError("training needs transformers", name="transformers")
    folder = Path(found.origin).parent
    enums = [folder / "trainer_utils.py", folder / "debug_utils.py"]
    hints = hints_from_source(folder / "training_args.py", "TrainingArguments", enums)
    return {**{name: kind_of(hint) for name, hint in hints.items()}, **own_kinds()}


@cache
def memory_kinds() -> dict[str, Any]:
    """Types of the settings of `memory`."""
    return {"preset": str, **{name: kind_of(hint) for name, hint in get_type_hints(VisMemConfig).items()}}


def load_settings(path: str | Path | None, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Reads a settings file, and `key=value` and `stage.key=value` overrides with values in YAML.

    Raises:
        SettingsError: if the file is not a YAML mapping, a name is unknown (suggests the name here, or the nearest
            one), or a value has the wrong type.
        OSError: if the file cannot be read.
    """
    return [check_layer(read_file(path)), check_layer(read_changes(overrides))]


def check_layer(layer: Any, where: str = "") -> dict[str, Any]:
    """Checks the names and types of a layer of settings and its sections; `where` prefixes names in messages."""
    if not isinstance(layer, Mapping):
        raise SettingsError(f"{where.rstrip('.')} must be a mapping of settings, got {format_value(layer)}")
    found = _section(general(layer), where)
    if "preset" in layer:
        found["preset"] = check_preset(layer["preset"], PRESETS, where and f"{where.rstrip('.')}: ")
    for section in SECTIONS:
        if layer.get(section) is not None:
            found[section] = _section(layer[section], f"{where}{section}.")
    return found


def general(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer without its sections and its preset."""
    return {name: value for name, value in layer.items() if name not in (*SECTIONS, "preset")}


def _section(values: Any, section: str) -> dict[str, Any]:
    found = check(values, kinds(), section, OTHER_NAMES)
    if isinstance(found.get("memory"), str):
        found["memory"] = {"preset": found["memory"]}
    if found.get("memory") is not None:
        found["memory"] = check(found["memory"], memory_kinds(), f"{section}memory.")
    return found


def values_for(stage: str, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the settings of one stage: the preset, then each layer, each with its section for the stage."""
    layers = [check_layer(layer) for layer in layers]
    preset = next((layer["preset"] for layer in reversed(layers) if "preset" in layer), "paper")
    values: dict[str, Any] = {}
    for layer in (PRESETS[preset], *layers):
        for source in (general(layer), layer.get(stage) or {}):
            memory = {**(values.get("memory") or {}), **(source.get("memory") or {})}
            values.update({**source, "memory": memory})
    memory_config(values["memory"])
    return values


def memory_config(values: Mapping[str, Any] | str | None) -> VisMemConfig:
    """The config of a new memory. Raises SettingsError for an unknown preset or field, or an invalid value."""
    given = check({"preset": values} if isinstance(values, str) else values or {}, memory_kinds(), "memory.")
    name = check_preset(given.pop("preset", "paper"), MEMORY_PRESETS, "memory: ")
    try:
        return VisMemConfig.preset(name, **given)
    except ValueError as error:
        raise SettingsError(str(error).replace("VisMemConfig.", "memory.")) from error
