"""Settings: what YAML and command lines mean, what is refused in one line, and that nothing of it needs torch."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import get_type_hints

import pytest
from transformers import TrainingArguments

from vismem.cli import main
from vismem.config import SettingsError, VisMemConfig
from vismem.evaluation.settings import load_settings as evaluation_settings
from vismem.settings import MOST_BYTES, check, describe, read_changes, read_file
from vismem.training import precision
from vismem.training.arguments import MemoryTrainingArguments, arguments_for
from vismem.training.settings import OTHER_NAMES, PRESETS, SECTIONS, check_layer, kinds, load_settings, values_for


def read(tmp_path: Path, content: str | bytes) -> dict:
    file = tmp_path / "settings.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_file(file)


def test_values_follow_yaml_1_2(tmp_path):
    text = (
        "a: off\nb: no\nc: yes\nd: on\ne: true\nf: 5e-5\ng: 1_000\nh: 0x1F\ni: 0o17\nj: 010\nk: 2024-01-01\n"
        "l: 12:30:45\nm: ~\nn:\no: 1.\np: -.5\nq: 'off'\nr: [no, 1e3]\ns: {off: y}\nt: NULL\nu: '5'\nv: 1__0\n"
    )
    numbers = [5e-5, 1000, 31, 15, 10]
    texts = ["2024-01-01", "12:30:45", None, None, 1.0, -0.5, "off", ["no", 1000.0], {"off": "y"}, None, "5", "1__0"]
    assert list(read(tmp_path, text).values()) == ["off", "no", "yes", "on", True, *numbers, *texts]
    assert read(tmp_path, "\ufeffa: 1\r\nb: &x [1]\r\nc: *x\r\n") == {"a": 1, "b": [1], "c": [1]}
    assert read(tmp_path, "# nothing\n") == read(tmp_path, "") == {}


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bomb(10), "with its aliases expanded it has more than 10,000 values"),
        ("a: &a [*a]", "nested more than 32 deep"),
        ("a: &a {b: *a}", "nested more than 32 deep"),
        ("a: " + "[" * 5000, "nested more than 32 deep"),
        ("a: " + "{b: " * 5000, "nested more than 32 deep"),
        ("a: " + "- " * 5000, "not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "line 3: a is set twice (first in line 1)"),
        ("a:\n  b: 1\n  b: 1\n", "line 3: b is set twice (first in line 2)"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "merge keys (<<) are not part of YAML 1.2"),
        ("1: 2", "the name of a setting must be text, got 1"),
        ("null: 2", "the name of a setting must be text, got null"),
        ("true: 2", "the name of a setting must be text, got true"),
        ("? [a, b]\n: 2", "the name of a setting must be text, got ['a', 'b']"),
        ("a: !!python/object/apply:os.system [ls]", "the tag tag:yaml.org,2002:python/object/apply:os.system is not"),
        ("a: !mine 5", "the tag !mine is not supported"),
        ("a: !!binary aGk=", "binary is not supported"),
        ("a: !!int five", "'five' is not of the type int"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a:\t[1]\n\tb: 2", "line 1: while scanning for the next token found character"),
        ("a: [1, 2", "not valid YAML"),
        ("a: *b", "undefined alias"),
        ("a: b: c", "mapping values are not allowed here"),
        ("- a\n- b\n", "must hold a mapping of settings, got ['a', 'b']"),
        ("just text", "must hold a mapping of settings, got 'just text'"),
        ("5", "must hold a mapping of settings, got 5"),
        (b"a: caf\xe9", "is not UTF-8 text: byte 0xe9 in line 1"),
        (b"a: 1\nb: \xff\xfe", "is not UTF-8 text: byte 0xff in line 2"),
        ("a: 1".encode("utf-16"), "is not UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n\x00", "is not UTF-8 text"),
        ("a: \x00", "not valid YAML"),
        ("a: \x1b[31m", "not valid YAML"),
        ("a: " + "x" * MOST_BYTES, "is larger than 256 KiB"),
        ("a: " + "9" * 5000, "is not of the type int"),
        ("a: 0x" + "f" * 5000, "is not of the type int"),
    ],
)
def test_unusable_files_give_one_line(tmp_path, content, said):
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, content)
    assert said in str(caught.value) and "settings.yaml" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["a", "=1", ".a=1", "a.=1", "a..b=1", " =1", ""])
def test_changes_have_a_key_and_a_value(text):
    with pytest.raises(SettingsError, match="is not of the form key=value"):
        read_changes([text])


def test_changes_go_into_sections():
    assert read_changes(["a=1", "b.c=2", "b.d.e=off", "a=3"]) == {"a": 3, "b": {"c": 2, "d": {"e": "off"}}}
    assert read_changes(["memory=pocket", "memory.lora_r=4"]) == {"memory": {"preset": "pocket", "lora_r": 4}}
    with pytest.raises(SettingsError, match=r"a\.b is set inside a, which is set to 1"):
        read_changes(["a=1", "a.b=2"])
    assert read_changes(["a=exp #3", "b= #x ", "c='1 #2' # 3", "d=[1] # 2"]) == {
        "a": "exp #3",  # no comments on the command line
        "b": "#x",
        "c": "1 #2",
        "d": [1],
    }
    with pytest.raises(SettingsError, match="the value of data is not valid YAML"):
        read_changes(["data=*.jsonl"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("preset=[pocket]", "unknown preset ['pocket']; choose from paper, pocket"),
        ("data=5", "data must be text, got 5"),
        ("base={a: 1}", "base must be text, got {'a': 1}"),
        ("rewards=3", "rewards must be text or a mapping or a list of texts or mappings, got 3"),
        ("rewards=[[exact]]", "rewards must be text or a mapping or a list of texts or mappings, got [['exact']]"),
        ("memory=[8]", "memory must be a mapping or text or null, got [8]"),
        ("memory.short_length=eight", "memory.short_length must be a whole number, got 'eight'"),
        ("memory.delimiters=5", "memory.delimiters must be a list of texts, got 5"),
        ("memory.content=hard", "memory.content must be one of formed, soft, got 'hard'"),
        ("memory=off", "memory: unknown preset 'off'; choose from paper, paper-table4, pocket"),
        ("memory.preset=4", "memory.preset must be text, got 4"),
        ("memory.lenght=5", "unknown setting memory.lenght; the settings are preset, query_length, "),
        ("stage2.memory.short_length=true", "stage2.memory.short_length must be a whole number, got true"),
        ("learning_rate=fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate=.nan", "learning_rate must be a number, got nan"),
        ("learning_rate=.inf", "learning_rate must be a number, got inf"),
        ("learning_rate=1e999", "learning_rate must be a number, got inf"),
        ("learning_rate=true", "learning_rate must be a number, got true"),
        ("learning_rate=[1e-5]", "learning_rate must be a number, got [1e-05]"),
        ("max_steps=1.5", "max_steps must be a whole number, got 1.5"),
        ("max_steps=1e30", "max_steps must be a whole number, got 1e+30"),
        ("max_rows=all", "max_rows must be a whole number or null, got 'all'"),
        ("logging_steps={}", "logging_steps must be a number, got {}"),
        ("report_to=5", "report_to must be text or a list of texts or null, got 5"),
        ("save_strategy=sometimes", "save_strategy must be one of no, steps, epoch, best, got 'sometimes'"),
        ("save_strategy=false", "save_strategy must be one of no, steps, epoch, best, got false"),
        ("lr_scheduler_type=x", "lr_scheduler_type must be one of linear, cosine,"),
        ("optim=y", "optim must be one of adamw_torch, "),
        ("hub_strategy=1", "hub_strategy must be one of end, "),
        ("train_sampling_strategy=often", "train_sampling_strategy must be one of random, sequential,"),
        ("ddp_backend=smoke", "ddp_backend must be one of nccl, gloo, mpi, "),
        ("lr_scheduler_kwargs=[1]", "lr_scheduler_kwargs must be a mapping or text or null, got [1]"),
        ("baseline=false", "baseline must be one of greedy, sample, off, got false"),
        ("dtype=bf16", "dtype must be one of auto, float32, bfloat16, float16, got 'bf16'"),
        ("bf16=1", "bf16 must be true or false, got 1"),
        ("bf16=perhaps", "bf16 must be true or false, got 'perhaps'"),
        ("warmup=5", "warmup must be a mapping of settings, got 5"),
        ("stage1=[a]", "stage1 must be a mapping of settings, got ['a']"),
        ("stage1.preset=pocket", "unknown setting stage1.preset"),
        ("stage1.stage2.seed=1", "unknown setting stage1.stage2"),
        ("'on'=2", "unknown setting 'on'"),
    ],
)
def test_wrong_types_and_names_give_one_line(change, said):
    with pytest.raises(SettingsError) as caught:
        values_for("stage1", load_settings(None, [change]))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_unambiguous_spellings_are_accepted():
    found = check_layer(read_changes(["use_cpu=yes", "strict=Off", "max_steps=1e3", "group_size='8'", "seed=1_000"]))
    assert found == {"use_cpu": True, "strict": False, "max_steps": 1000, "group_size": 8, "seed": 1000}
    assert check_layer(read_changes(["learning_rate='5e-5'", "warmup=", "checkpoint=null"])) == {
        "learning_rate": 5e-5,
        "checkpoint": None,
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("num_generations=4", "group_size"),
        ("stage1.num_generations=4", "group_size"),
        ("model_name_or_path=x", "base"),
        ("max_completion_length=4", "max_new_tokens"),
        ("beta=0.1", "kl_coef"),
        ("epsilon=0.1", "clip_ratio"),
        ("num_iterations=2", "inner_iterations"),
        ("dataset_name=x", "data"),
        ("reward_funcs=x", "rewards"),
        ("torch_dtype=x", "dtype"),
        ("lora_r=8", "memory.lora_r"),
        ("per_device_batch_size=8", "per_device_train_batch_size"),
        ("warmup_ratio=0.1", "warmup_steps"),
    ],
)
def test_names_of_other_libraries_are_translated(change, said):
    with pytest.raises(SettingsError, match=f"it is called {re.escape(said)} here"):
        load_settings(None, [change])
    with pytest.raises(SettingsError, match="prompts are never truncated"):
        load_settings(None, ["max_prompt_length=512"])


def test_other_libraries_names_map_to_existing_settings():
    for name, ours in OTHER_NAMES.items():
        assert name not in kinds(), f"{name} is a setting here"
        if re.fullmatch(r"[a-z_.0-9]+", ours):
            section, _, field = ours.rpartition(".")
            assert field in ({each.name for each in dataclasses.fields(VisMemConfig)} if section else kinds()), ours


def test_types_read_from_source_match_the_class():
    """Names and types are read without importing torch; this compares them with the classes."""
    assert set(kinds()) == {field.name for field in dataclasses.fields(MemoryTrainingArguments)}
    for name, hint in get_type_hints(TrainingArguments).items():
        members = [each for each in getattr(hint, "__args__", ()) if isinstance(each, type) and issubclass(each, Enum)]
        if name in kinds() and members:
            assert describe(kinds()[name]).startswith("one of " + ", ".join(str(m.value) for m in members[0])), name
    for name, kind in {"bf16": "true or false", "seed": "a whole number", "learning_rate": "a number"}.items():
        assert describe(kinds()[name]) == kind
    for preset in PRESETS.values():
        assert check_layer({name: value for name, value in preset.items() if name != "preset"})
    args = TrainingArguments("x", use_cpu=True, report_to=[])
    plain = {name: value for name, value in args.to_dict().items() if name not in ("debug", "parallelism_config")}
    check({name: value for name, value in plain.items() if name in kinds()}, kinds())  # as --show prints them


def documented() -> list[tuple[str, str]]:
    """Every `setting=value` and `setting: value` quoted as code in the docs."""
    found = []
    for page in sorted(Path("docs").resolve().parent.joinpath("docs").glob("*.md")):
        for code in re.findall(r"`([a-z0-9_.]+(?:=|: )[^`\s]+)`", page.read_text(encoding="utf-8")):
            name, value = re.split("=|: ", code, maxsplit=1)
            section, _, key = name.rpartition(".")
            known = key in kinds() if section in ("", *SECTIONS) else section == "memory"
            if known and not re.fullmatch(r"[A-Z_/]+|.*(FILE|FOLDER|NAME|\.\.\.).*", value):
                found.append((page.name, f"{name}={value}"))
    return found


def test_every_documented_setting_is_valid():
    pages = documented()
    assert len(pages) > 20
    for page, change in pages:
        if change not in ("group_size=1", "micro_batch=5"):  # shown as refused
            values_for("stage1", load_settings(None, [change])), page
    for name, value, expected in (
        ("baseline", "off", "off"),
        ("save_strategy", "no", "no"),
        ("eval_strategy", "no", "no"),
        ("attn_implementation", "sdpa", "sdpa"),
        ("memory", "paper-table4", {"preset": "paper-table4"}),
    ):
        assert values_for("stage1", load_settings(None, [f"{name}={value}"]))[name] == expected
    for row in Path("docs/configuration.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 5 and (name := cells[0].strip("`")) in kinds():
            for cell in cells[1:4]:
                for value in re.findall(r"^`?([a-z0-9_.-]+)`?$", cell):
                    if value not in ("none", "all"):
                        values_for("stage1", load_settings(None, [f"{name}={value}"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "stage1", "lerning_rate=1"], "did you mean learning_rate"),
        (["train", "all", "preset=pocket", "stage2.data=5", "output_dir=x"], "stage2.data must be text"),
        (["eval", "tables", "main", "methds=1"], "did you mean methods"),
        (["eval", "tables", "main", "training.num_generations=1"], "group_size"),
    ],
)
def test_mistakes_exit_with_2_without_importing_torch(words, said):
    code = (
        "import sys\nfrom vismem.cli import main\n"
        f"code = main({words!r})\nassert not {{'torch', 'transformers'}} & set(sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed=-1", "seed must be from 0 to 4294967295, got -1"),
        ("learning_rate=-1", "learning_rate must be 0 or more, got -1"),
        ("per_device_train_batch_size=0", "per_device_train_batch_size must be 1 or more, got 0"),
        ("report_to=paper", "report_to must be none, all or some of"),
        ("log_level=loud", "log_level must be one of"),
        ("eval_strategy=epoch load_best_model_at_end=true", "save and eval strategy to match"),
    ],
)
def test_values_out_of_range_exit_with_2(capsys, tmp_path, change, said):
    command = ["train", "stage1", "preset=pocket", "bf16=false", "dtype=float32", f"output_dir={tmp_path / 'run'}"]
    assert main([*command, *change.split()]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vismem")]
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("methods=5", "methods must be a list of"),
        ("methods=[5]", "a method must be a mapping with a `name`, got 5"),
        ("methods=[{name: 5}]", "a method must be a mapping with a `name`"),
        ("methods=[{name: a, invocation: sometimes}]", "method 'a': invocation: unknown policy"),
        ("methods=[{name: a, invocation: off}]", ""),
        ("methods=[{name: a, train: [{step: stage9}]}]", "needs a `step`, one of all, warmup"),
        ("methods=[{name: a, train: [{step: sft, lerning_rate: 1}]}]", "did you mean learning_rate"),
        ("methods=[{name: a, bound: 1}]", "method 'a': bound must be true or false, got 1"),
        ("benchmarks=[{name: a, data: 5}]", "benchmark 'a': data must be text, got 5"),
        ("benchmarks=[{name: a, data: x, limit: 0}]", "limit must be 1 or more, got 0"),
        ("batch_size=many", "batch_size must be a whole number, got 'many'"),
        ("n=true", "n must be a whole number, got true"),
        ("limit=-1", "limit must be a whole number, 1 or more, got -1"),
        ("seeds=[a]", "seeds must be a list of whole numbers, got ['a']"),
        ("seeds=3", "seeds must be a list of whole numbers, got 3"),
        ("output_dir=5", "output_dir must be text, got 5"),
        ("latency.clock=sand", "latency.clock must be one of wall, processor, got 'sand'"),
        ("lengths.short_length=4", "lengths.short_length must be a list of whole numbers, got 4"),
        ("continual.stages={a: {data: 5}}", "continual.stages.a.data must be text, got 5"),
        ("training.preset=nobody", "training: unknown preset 'nobody'"),
        ("training=5", "training must be a mapping, got 5"),
        ("partial=[1]", "partial must be a mapping, got [1]"),
    ],
)
def test_evaluation_settings_are_checked_too(change, said):
    if not said:
        assert evaluation_settings(None, [change]).methods[0].invocation == "off"
        return
    with pytest.raises(SettingsError) as caught:
        evaluation_settings(None, [change])
    assert said in str(caught.value) and "\n" not in str(caught.value)


# Defaults.


@pytest.mark.parametrize("faster", [True, False])
def test_a_cpu_trains_in_the_faster_dtype(monkeypatch, tmp_path, faster):
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda: faster)

    def made(*changes: str) -> tuple[bool, str]:
        layers = load_settings(None, ["preset=pocket", f"output_dir={tmp_path / 'run'}", *changes])
        args = arguments_for("stage1", layers, report_to="none")
        return args.bf16, args.dtype

    assert made() == (faster, "bfloat16" if faster else "float32")
    assert made("bf16=true") == (True, "bfloat16")
    assert made("bf16=false") == (False, "float32")
    assert made("bf16=false", "dtype=bfloat16") == (False, "bfloat16")
    assert made("dtype=bfloat16") == (True, "bfloat16")
    assert made("preset=paper", "use_cpu=true") == made()
    # A resumed run keeps its checkpoint's dtype.
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "training_args.json").write_text('{"bf16": true, "dtype": "bfloat16"}')
    assert made() == (True, "bfloat16")
    (checkpoint / "training_args.json").write_text('{"bf16": false, "dtype": "float32"}')
    assert made() == (False, "float32")
    assert made("bf16=true", "dtype=bfloat16") == (True, "bfloat16")


def test_the_speeds_are_measured():
    assert all(precision.speed(dtype) > 0 for dtype in (precision.torch.float32, precision.torch.bfloat16))


def test_runs_are_named_after_folder_and_stage(monkeypatch):
    layers = [{"preset": "pocket", "bf16": False, "dtype": "float32", "report_to": "none"}]
    assert arguments_for("stage1", layers, output_dir="runs/shelves").run_name == "shelves-stage1"
    args = arguments_for("stage2", layers, output_dir="runs/shelves/stage2")
    assert (args.run_name, args.project) == ("shelves-stage2", "vismem")
    named = [{**layers[0], "run_name": "mine", "project": "ours"}]
    args = arguments_for("stage2", named, output_dir="runs/shelves/stage2")
    assert (args.run_name, args.project) == ("mine", "ours")
