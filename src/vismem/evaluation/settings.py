"""Settings of an evaluation from presets, YAML files and `key=value` overrides.

An override may set a value inside a section: `lengths.short_length=[4, 8]`. The command line takes precedence over the
file, the file over the preset. All names and types are checked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from vismem.bundled import POCKET
from vismem.decoding.policies import read_policy
from vismem.deprecation import renamed
from vismem.settings import SettingsError, check, check_preset, convert, format_value, kind_of, read_changes, read_file
from vismem.training.settings import check_layer
from vismem.training.stages import ADAPTER_FILE, BASELINES, STAGES

STEPS = ("all", *STAGES, *BASELINES)  # of `vismem train`
ABILITIES = ("understanding", "reasoning", "generation")


@dataclass(frozen=True)
class Benchmark:
    """Questions with a score.

    Args:
        name: its column in the tables.
        data: a JSON Lines file, a folder or a hub name (docs/data.md), or a suite of the pocket world: `"pocket:late"`.
        task: a task of lmms-eval instead of `data`, with its own score.
        ability: the group of columns that it belongs to.
        rewards: score the answers (docs/rewards.md).
        split: of a hub data set.
        subtask: column with the sub-task.
        limit: use only the first `limit` questions.
        max_new_tokens: overrides the evaluation's.
        columns: renamed columns, from our name to the data's.
    """

    name: str
    data: str = ""
    task: str = ""
    ability: str = ""
    rewards: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = ("exact",)
    split: str = "test"
    subtask: str = ""
    limit: int | None = None
    max_new_tokens: int | None = None
    columns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if bool(self.data) == bool(self.task):
            raise SettingsError(f"benchmark {self.name!r} must have either data=FILE or task=LMMS_EVAL_TASK")
        for name in ("limit", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingsError(f"benchmark {self.name!r}: {name} must be 1 or more, got {value}")


@dataclass(frozen=True)
class Method:
    """A way of answering.

    Args:
        name: its row in the tables.
        checkpoint: a memory, or an adapter of the language model; `{seed}` in it is replaced by each seed. Without
            `checkpoint` and `train` the base answers alone.
        train: training steps instead of `checkpoint`, each continuing from the one before: mappings with `step` (of
            `vismem train`) and settings.
        invocation: as on the command line; by default learned if there is a memory, else off.
        bound: pocket only: an upper bound whose prompt contains what memory would have to supply.
    """

    name: str
    checkpoint: str = ""
    train: Sequence[Mapping[str, Any]] = ()
    invocation: str = ""
    bound: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint and self.train:
            raise SettingsError(f"method {self.name!r} has both checkpoint and train; give one of them")
        for number, step in enumerate(self.train):
            check_step(step, f"method {self.name!r}: train[{number}]")
        if self.invocation not in ("", "placed"):
            try:
                read_policy(self.invocation)
            except ValueError as error:
                raise SettingsError(f"method {self.name!r}: invocation: {error}") from error

    @property
    def adapts(self) -> bool:
        """Whether it is an adapter of the language model, without memory."""
        if self.train:
            return self.train[-1]["step"] in BASELINES
        place = Path(self.checkpoint.replace("{seed}", "*"), ADAPTER_FILE)
        return bool(self.checkpoint) and any(Path(place.anchor or ".").glob(str(place.relative_to(place.anchor))))

    @property
    def remembers(self) -> bool:
        """Whether it has a memory."""
        return bool(self.checkpoint or self.train) and not self.adapts

    @property
    def policy(self) -> str:
        """The invocation, or its default: learned with memory, off without."""
        return self.invocation or ("learned" if self.remembers else "off")

    @property
    def seeded(self) -> bool:
        """Whether there is one for each seed."""
        return bool(self.train) or "{seed}" in self.checkpoint


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Args:
        output_dir: folder for answers, tables and plots.
        runs_dir: folder for trained methods; by default `output_dir/runs`.
        base: model name or folder; `"pocket"` is the packaged one.
        dtype, attn_implementation, device, trust_remote_code: how to load it.
        methods: methods to compare.
        benchmarks: benchmarks to compare them on.
        memory: name of the method that the other tables vary; by default the last one with a memory.
        training: settings of all training steps, as in a file of `vismem train`.
        seeds: of methods that are trained or have `{seed}` in their checkpoint.
        batch_size: answers written together.
        max_new_tokens: maximum number of sampled tokens per answer.
        limit: use only the first `limit` questions of each benchmark.
        n, question_seed: pocket only: questions per cell, and their seed.
        invocation: table `invocation`: `rates` of random invocation in per cent, and names of `benchmarks` (all).
        partial: table `partial`: `data` (name to data), and its own `methods` and `benchmarks`.
        continual: table `continual`: `stages` (data and settings by name), `methods`, `benchmarks`.
        lengths: table `lengths`: values of `query_length`, `short_length`, `long_length`, the `train` steps for each,
            `invocation`, `benchmarks`.
        latency: table `latency` and the times of `invocation`: `questions`, `rounds`, `clock` (`wall` or `processor`).
    """

    output_dir: str = ""
    runs_dir: str = ""
    base: str = ""
    dtype: str = "auto"
    attn_implementation: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    methods: tuple[Method, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    memory: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 16
    max_new_tokens: int = 256
    limit: int | None = None
    n: int = 12
    question_seed: int = 1
    invocation: Mapping[str, Any] = field(default_factory=dict)
    partial: Mapping[str, Any] = field(default_factory=dict)
    continual: Mapping[str, Any] = field(default_factory=dict)
    lengths: Mapping[str, Any] = field(default_factory=dict)
    latency: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("methods", "benchmarks"):
            twice = [each.name for each in getattr(self, name)]
            if len(set(twice)) < len(twice):
                raise SettingsError(f"{name}: names must be unique, got {', '.join(twice)}")
        for name in ("batch_size", "max_new_tokens", "n", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingsError(f"{name} must be a whole number, 1 or more, got {format_value(value)}")
        if not self.seeds:
            raise SettingsError("seeds must be a list of whole numbers, got an empty one")
        if self.memory and self.memory not in [method.name for method in self.methods]:
            raise SettingsError(f"memory={self.memory!r} is not one of the methods")

    @property
    def runs(self) -> Path:
        """Folder for trained methods."""
        return Path(self.runs_dir) if self.runs_dir else Path(self.output_dir) / "runs"

    def of(self, section: Mapping[str, Any]) -> tuple[tuple[Method, ...], tuple[Benchmark, ...]]:
        """Methods and benchmarks of a table's own section, by default the evaluation's."""
        methods = methods_of(section["methods"]) if section.get("methods") else self.methods
        benchmarks = benchmarks_of(section["benchmarks"]) if section.get("benchmarks") else self.benchmarks
        return methods, benchmarks

    def ours(self) -> Method:
        """The method whose memory the tables vary.

        Raises:
            SettingsError: if no method has a memory.
        """
        with_memory = [m for m in self.methods if m.name == self.memory] if self.memory else []
        with_memory = with_memory or [m for m in self.methods if m.remembers]
        if not with_memory:
            raise SettingsError("no method has a memory; give one checkpoint or train")
        return with_memory[-1]


def suite(name: str, **more: Any) -> dict[str, Any]:
    """The benchmark of a suite of the pocket world."""
    reasoning = ("rules", "rules_first", "rules_second", "both", "pairs")
    ability = "generation" if name == "describe" else "reasoning" if name in reasoning else "understanding"
    return {"name": name, "data": f"pocket:{name}", "ability": ability, "rewards": ["pocket"], **more}


WARMUP, SFT = {"step": "warmup"}, {"step": "sft", "data": "pocket:warmup"}
# Learning rates found with benchmarks/baseline_rates.py; the memory's are the preset's of `vismem train`.
SOFT = {
    "step": "all",
    "memory": {"content": "soft"},
    "warmup": {"learning_rate": 0.1},
    "stage1": {"learning_rate": 0.01},
}
PLACED = {"name": "VisMem", "invocation": "placed", "train": [WARMUP]}
STAGED = [suite(name, limit=64) for name in ("late", "strange", "rules_first", "rules_second", "in_view")]
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "pocket": {  # all tables on the packaged model
        "output_dir": "results/evaluation",
        "runs_dir": "runs/evaluation",
        "base": POCKET,
        "dtype": "float32",
        "training": {"preset": POCKET},
        "seeds": [0, 1, 2],
        "n": 8,
        "batch_size": 48,
        "max_new_tokens": 48,
        "methods": [
            {"name": "vanilla"},
            {"name": "bound", "bound": True},
            {"name": "LoRA, supervised", "train": [{**SFT, "max_steps": 445}]},
            {
                "name": "LoRA, supervised then GRPO",
                "train": [{**SFT, "max_steps": 320}, {"step": "grpo", "data": "pocket:stage2", "max_steps": 125}],
            },
            {"name": "soft vectors", "train": [SOFT]},
            {"name": "VisMem", "train": [{"step": "all"}]},
        ],
        "benchmarks": [
            suite("late", subtask="task"),
            suite("strange", subtask="cell"),
            suite("in_view", subtask="cell"),
            suite("easy_vqa"),
            suite("rules"),
            suite("both", subtask="distance"),
            suite("pairs"),
            suite("describe", subtask="cell", max_new_tokens=128),
        ],
        "invocation": {"benchmarks": ["late", "in_view", "rules", "both"]},
        "partial": {
            "data": {"full": "pocket:warmup", "partial": "pocket:partial"},
            "methods": [PLACED, {"name": "LoRA, supervised", "train": [{**SFT, "max_steps": 320}]}],
            "benchmarks": STAGED,
        },
        "continual": {
            "stages": {
                "late": {"data": "pocket:late", "max_steps": 80},
                "strange": {"data": "pocket:strange", "max_steps": 80},
                "rules_first": {"data": "pocket:rules_first", "max_steps": 160},
                "rules_second": {"data": "pocket:rules_second", "max_steps": 160},
            },
            "methods": [PLACED, {"name": "LoRA, supervised", "train": [SFT]}],
            "benchmarks": STAGED,
        },
        "lengths": {
            "query_length": [2, 8],
            "short_length": [8, 16],
            "long_length": [4, 16],
            "train": [{**WARMUP, "max_steps": 100}],
            "invocation": "placed",
            "benchmarks": [suite(name, limit=64) for name in ("late", "rules", "both")],
        },
        "latency": {"questions": 8, "rounds": 3, "clock": "processor"},
    },
}
SECTIONS: dict[str, dict[str, Any]] = {
    "invocation": {"rates": list[float], "benchmarks": list[str]},
    "partial": {"data": dict[str, str], "methods": list[Any], "benchmarks": list[Any]},
    "continual": {"stages": dict[str, Any], "methods": list[Any], "benchmarks": list[Any]},
    "lengths": {
        **dict.fromkeys(("query_length", "short_length", "long_length"), list[int]),
        "train": list[dict[str, Any]],
        "invocation": str,
        "benchmarks": list[Any],
    },
    "latency": {"questions": int, "rounds": int, "clock": Literal["wall", "processor"]},
}


def load_settings(path: str | Path | None, overrides: Sequence[str]) -> EvaluationSettings:
    """Settings from a file and `key=value` overrides, on top of the preset that either names.

    Raises:
        SettingsError: if the file is not a YAML mapping, a name is unknown (suggests the nearest one), or a value has
            the wrong type or is out of range.
        OSError: if the file cannot be read.
    """
    given = merge(read_file(path), read_changes(overrides))
    preset = check_preset(given.pop("preset", "none"), PRESETS)
    return settings_of(merge(PRESETS[preset], given))


def merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`one` updated with `other`, recursively for mappings; lists are replaced."""
    found = dict(one)
    for name, value in other.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = merge(found[name], value) if both else value
    return found


def settings_of(values: Mapping[str, Any]) -> EvaluationSettings:
    """Settings of plain values. Raises SettingsError for an unknown name, a wrong type or a value out of range."""
    plain = {name: value for name, value in values.items() if name not in ("methods", "benchmarks")}
    found = check(plain, types_of(EvaluationSettings))
    for name, make in (("methods", methods_of), ("benchmarks", benchmarks_of)):
        if values.get(name) is not None:
            found[name] = make(convert(values[name], list[Any], name))
    check_layer(found.get("training") or {}, "training.")
    for section, names in SECTIONS.items():
        own = check(found.get(section) or {}, {name: kind_of(hint) for name, hint in names.items()}, f"{section}.")
        methods_of(own.get("methods") or ())
        if section != "invocation":
            benchmarks_of(own.get("benchmarks") or ())
        for number, step in enumerate(own.get("train") or ()):
            check_step(step, f"{section}.train[{number}]")
        for name, stage in (own.get("stages") or {}).items():
            check_layer(stage, f"{section}.stages.{name}.")
    return EvaluationSettings(**found)


@cache
def types_of(settings: type) -> dict[str, Any]:
    """Types of a dataclass's fields, for `check`."""
    return {name: kind_of(hint) for name, hint in get_type_hints(settings).items()}


def methods_of(entries: Sequence[Any]) -> tuple[Method, ...]:
    """Methods from plain values."""
    return tuple(_made(Method, entry, "method") for entry in entries)


def benchmarks_of(entries: Sequence[Any]) -> tuple[Benchmark, ...]:
    """Benchmarks from plain values."""
    return tuple(_made(Benchmark, entry, "benchmark") for entry in entries)


def check_step(step: Any, where: str) -> None:
    """Raises SettingsError if `vismem train` would reject a training step's settings."""
    if not isinstance(step, Mapping) or step.get("step") not in STEPS:
        raise SettingsError(f"{where} needs a `step`, one of {', '.join(STEPS)}, got {format_value(step)}")
    check_layer({name: value for name, value in step.items() if name != "step"}, f"{where}.")


def _made(kind: type, entry: Any, what: str) -> Any:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise SettingsError(f"a {what} must be a mapping with a `name`, got {format_value(entry)}")
    return kind(**check(entry, types_of(kind), f"{what} {entry['name']!r}: "))


__getattr__ = renamed(__name__, {"Settings": "EvaluationSettings"})
