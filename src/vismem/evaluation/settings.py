"""Settings of an evaluation: what is compared, on which questions, and what each table varies; presets and YAML files.

A file and `key=value` on the command line have the same names; `lengths.short_length=[4, 8]` sets one inside a section.
Which value wins: command line, file, preset, default. The names are checked here, so that a wrong one is reported
before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from vismem.bundled import POCKET
from vismem.decoding.policies import read_policy
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
        task: instead of `data`, a task of lmms-eval, with lmms-eval's own score.
        ability: the group of columns that it belongs to.
        rewards: what scores the answers (docs/rewards.md).
        split: of a hub data set.
        subtask: the column that tells its sub-tasks.
        limit: the first so many questions only.
        max_new_tokens: where it is not the evaluation's.
        columns: names of the data's columns that differ, from ours to theirs.
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
        checkpoint: a memory, or an adapter of the language model; `{seed}` in it stands for each seed. Without one, and
            without `train`, the base alone answers.
        train: instead of `checkpoint`, steps of `vismem train` that make it, each going on from the one before:
            mappings with `step` and settings.
        invocation: as on the command line; by default learned where there is a memory, else off.
        bound: pocket only: the prompt gives what memory would have to supply.
    """

    name: str
    checkpoint: str = ""
    train: Sequence[Mapping[str, Any]] = ()
    invocation: str = ""
    bound: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint and self.train:
            raise SettingsError(f"method {self.name!r} has both checkpoint and train; give one of them")
        for step in self.train:
            if not isinstance(step, Mapping) or step.get("step") not in STEPS:
                named = ", ".join(STEPS)
                raise SettingsError(
                    f"method {self.name!r}: every entry of train needs a `step`, one of {named}, "
                    f"got {format_value(step)}"
                )
        if self.invocation not in ("", "placed"):
            try:
                read_policy(self.invocation)
            except ValueError as error:
                raise SettingsError(f"method {self.name!r}: invocation: {error}") from error

    @property
    def adapts(self) -> bool:
        """Whether it is an adapter of the language model, so that there is no memory to invoke."""
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
        """Who invokes memory: as said, or else the model where there is a memory, and nobody where there is none."""
        return self.invocation or ("learned" if self.remembers else "off")

    @property
    def seeded(self) -> bool:
        """Whether there is one of it for each seed."""
        return bool(self.train) or "{seed}" in self.checkpoint


@dataclass(frozen=True)
class Settings:
    """An evaluation.

    Args:
        output_dir: where answers, tables and plots go.
        runs_dir: where trained methods go; `output_dir/runs` by default.
        base: model name or folder; `"pocket"` is the packaged one.
        dtype, attn_implementation, device, trust_remote_code: how it is loaded.
        methods: what is compared.
        benchmarks: on what.
        memory: name of the method that the other tables vary; by default the last one with a memory.
        training: settings of all training steps, as a file of `vismem train` has them.
        seeds: of methods that are trained, or whose checkpoint has `{seed}` in it.
        batch_size: answers written together.
        max_new_tokens: sampled tokens per answer at most.
        limit: the first so many questions of each benchmark.
        n, question_seed: pocket only: questions per cell, and which ones.
        invocation: table `invocation`: `rates`, per cents of random invocation, and `benchmarks` by name (all).
        partial: table `partial`: `data` (name to data), and `methods` and `benchmarks` of its own.
        continual: table `continual`: `stages` (name, data and settings of each), `methods`, `benchmarks`.
        lengths: table `lengths`: values of `query_length`, `short_length`, `long_length`, the `train` steps that each
            is trained with, `invocation`, `benchmarks`.
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
                raise SettingsError(f"{name}: names must differ, got {', '.join(twice)}")
        for name in ("batch_size", "max_new_tokens", "n", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SettingsError(f"{name} must be a whole number, 1 or more, got {format_value(value)}")
        if not self.seeds:
            raise SettingsError("seeds must be a list of whole numbers, got an empty one")
        if self.memory and self.memory not in [method.name for method in self.methods]:
            raise SettingsError(f"memory={self.memory!r} is none of the methods")

    @property
    def runs(self) -> Path:
        """Where trained methods go."""
        return Path(self.runs_dir) if self.runs_dir else Path(self.output_dir) / "runs"

    def of(self, section: Mapping[str, Any]) -> tuple[tuple[Method, ...], tuple[Benchmark, ...]]:
        """Methods and benchmarks of a table that has its own section; the evaluation's where that says none."""
        methods = methods_of(section["methods"]) if section.get("methods") else self.methods
        benchmarks = benchmarks_of(section["benchmarks"]) if section.get("benchmarks") else self.benchmarks
        return methods, benchmarks

    def ours(self) -> Method:
        """The method with the memory that is looked at.

        Raises:
            ValueError: if no method has a memory.
        """
        with_memory = [m for m in self.methods if m.name == self.memory] if self.memory else []
        with_memory = with_memory or [m for m in self.methods if m.remembers]
        if not with_memory:
            raise SettingsError("no method has a memory to look at: give one a checkpoint or train")
        return with_memory[-1]


def pocket_benchmark(suite: str, **more: Any) -> dict[str, Any]:
    from vismem.pocket.suites import SUITES

    ability = SUITES[suite].ability
    return {"name": suite, "data": f"pocket:{suite}", "ability": ability, "rewards": ["pocket"], **more}


def pocket() -> dict[str, Any]:
    """The preset `pocket`: the whole of it on the model in the package."""
    warmup, sft = {"step": "warmup"}, {"step": "sft", "data": "pocket:warmup"}
    # Rates as benchmarks/baseline_rates.py found them; the memory's own are the preset's of `vismem train`.
    soft = {"step": "all", "memory": {"content": "soft"}}
    soft |= {"warmup": {"learning_rate": 0.1}, "stage1": {"learning_rate": 0.01}}
    memory = {"name": "VisMem", "invocation": "placed"}
    suites = ("late", "strange", "rules_first", "rules_second", "in_view")
    after = [pocket_benchmark(name, limit=64) for name in suites]
    stages = {
        "late": {"data": "pocket:late", "max_steps": 80},
        "strange": {"data": "pocket:strange", "max_steps": 80},
        "rules_first": {"data": "pocket:rules_first", "max_steps": 160},
        "rules_second": {"data": "pocket:rules_second", "max_steps": 160},
    }
    return {
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
            {"name": "LoRA, supervised", "train": [{**sft, "max_steps": 445}]},
            {
                "name": "LoRA, supervised then GRPO",
                "train": [{**sft, "max_steps": 320}, {"step": "grpo", "data": "pocket:stage2", "max_steps": 125}],
            },
            {"name": "soft vectors", "train": [soft]},
            {"name": "VisMem", "train": [{"step": "all"}]},
        ],
        "benchmarks": [
            pocket_benchmark("late", subtask="task"),
            pocket_benchmark("strange", subtask="cell"),
            pocket_benchmark("in_view", subtask="cell"),
            pocket_benchmark("easy_vqa"),
            pocket_benchmark("rules"),
            pocket_benchmark("both", subtask="distance"),
            pocket_benchmark("pairs"),
            pocket_benchmark("describe", subtask="cell", max_new_tokens=128),
        ],
        "invocation": {"benchmarks": ["late", "in_view", "rules", "both"]},
        "partial": {
            "data": {"full": "pocket:warmup", "partial": "pocket:partial"},
            "methods": [
                {**memory, "train": [warmup]},
                {"name": "LoRA, supervised", "train": [{**sft, "max_steps": 320}]},
            ],
            "benchmarks": after,
        },
        "continual": {
            "stages": stages,
            "methods": [{**memory, "train": [warmup]}, {"name": "LoRA, supervised", "train": [sft]}],
            "benchmarks": after,
        },
        "lengths": {
            "query_length": [2, 8],
            "short_length": [8, 16],
            "long_length": [4, 16],
            "train": [{**warmup, "max_steps": 100}],
            "invocation": "placed",
            "benchmarks": [pocket_benchmark(name, limit=64) for name in ("late", "rules", "both")],
        },
        "latency": {"questions": 8, "rounds": 3, "clock": "processor"},
    }


PRESETS = {"pocket": pocket, "none": dict}
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


def load_settings(path: str | Path | None, overrides: Sequence[str]) -> Settings:
    """Settings of a file and of `key=value`, over those of the preset that either names.

    Raises:
        SettingsError: if the file is not a YAML mapping, a name is unknown (the nearest one is named), or a value has
            the wrong type or is out of range.
        OSError: if the file cannot be read.
    """
    given = merged(read_file(path), read_changes(overrides))
    preset = check_preset(given.pop("preset", "none"), PRESETS)
    checked_values(given)  # before a preset loads what it is made of
    return settings_of(merged(PRESETS[preset](), given))


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`one` with the values of `other`; mappings inside are merged alike, lists are replaced."""
    found = dict(one)
    for name, value in other.items():
        both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
        found[name] = merged(found[name], value) if both else value
    return found


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Settings of plain values. Raises SettingsError for an unknown name, a wrong type or a value out of range."""
    return Settings(**checked_values(values))


def checked_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Settings` that are given, of the types that they ask for. Raises SettingsError."""
    plain = {name: value for name, value in values.items() if name not in ("methods", "benchmarks")}
    found = check(plain, kinds(Settings))
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
    return found


@cache
def kinds(of: type) -> dict[str, Any]:
    """Types of the settings that a dataclass has as fields."""
    return {name: kind_of(hint) for name, hint in get_type_hints(of).items()}


def methods_of(entries: Sequence[Any]) -> tuple[Method, ...]:
    """Methods of plain values."""
    made = tuple(_made(Method, entry, "method") for entry in entries)
    for method in made:
        for number, step in enumerate(method.train):
            check_step(step, f"method {method.name!r}: train[{number}]")
    return made


def benchmarks_of(entries: Sequence[Any]) -> tuple[Benchmark, ...]:
    """Benchmarks of plain values."""
    return tuple(_made(Benchmark, entry, "benchmark") for entry in entries)


def check_step(step: Mapping[str, Any], where: str) -> None:
    """Refuses a step of training whose settings `vismem train` would not take."""
    check_layer({name: value for name, value in step.items() if name != "step"}, f"{where}.")


def _made(kind: type, entry: Any, what: str) -> Any:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise SettingsError(f"a {what} must be a mapping with a `name`, got {format_value(entry)}")
    return kind(**check(entry, kinds(kind), f"{what} {entry['name']!r}: "))
