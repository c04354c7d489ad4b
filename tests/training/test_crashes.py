"""Training that is killed, stopped, out of disk or damaged: it resumes as if undisturbed, or says what is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import Killed, equip, folder, killed_at, low, quick, rows, settings, train

from vismem import VisMem, files
from vismem.checkpoint import CARD_FILE, WEIGHTS_FILE
from vismem.cli import main
from vismem.training.checkpoints import (
    MANIFEST,
    DamagedCheckpointError,
    last_checkpoint,
)
from vismem.training.rewards import RewardError
from vismem.training.trainer import MemoryTrainer

__all__ = ["folder", "quick"]  # fixtures
CONFIG = {
    "preset": "pocket",
    "dtype": "float32",
    "bf16": False,
    "group_size": 2,
    "max_new_tokens": 6,
    "per_device_train_batch_size": 2,
    "memory": {"query_length": 4, "short_length": 4, "long_length": 4, "lora_r": 4},
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 4,
    "save_steps": 1,
    "logging_steps": 3,
    "stage1": {"max_steps": 4, "per_device_train_batch_size": 2},
    "sft": {"max_steps": 1, "per_device_train_batch_size": 2},
}


@pytest.fixture(scope="module")
def work(folder) -> Path:
    """Files: a tiny base, a reward, settings, and data with line separators in its text."""
    lines = [
        {"prompt": f"Row {i},\u2028\x85gold\x1c?", "images": [f"{i}.png"], "answer": "a red\u2029 cup"}
        for i in range(4)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    own = {"base": str(folder / "base"), "data": str(folder / "data.jsonl"), "rewards": f"{folder / 'reward.py'}:low"}
    (folder / "settings.yaml").write_text(json.dumps({**CONFIG, **own}))
    return folder


def command(work: Path, out: Path, *more: str, stage: str = "stage1") -> int:
    return main(["train", stage, str(work / "settings.yaml"), f"output_dir={out}", *more])


def without_times(log: list[dict]) -> list[dict]:
    timed = ("time/", "tokens_per_second", "train_runtime", "train_samples", "train_steps")
    return [{name: v for name, v in entry.items() if not name.startswith(timed)} for entry in log]


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory) -> Path:
    """An uninterrupted run; read-only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert command(work, out) == 0
    return out


@pytest.mark.parametrize("kill", [1, 3, 4], ids=["before-the-first-checkpoint", "between-two-logs", "at-the-end"])
def test_a_resumed_run_equals_an_uninterrupted_one(work, whole, tmp_path, monkeypatch, capsys, kill):
    with monkeypatch.context() as patch:
        killed_at(kill, patch, "save_result" if kill == 4 else "_save_rng_state")
        with pytest.raises(Killed):
            command(work, tmp_path / "cut")
    with (tmp_path / "cut" / "completions.jsonl").open("ab") as file:
        file.write('{"step": 9, "completion": "Z\u00fc'.encode()[:-1])  # cut within a character
    assert command(work, tmp_path / "cut", "--resume") == 0
    capsys.readouterr()
    cut = tmp_path / "cut"
    assert (cut / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes() != b""
    for name in (WEIGHTS_FILE, "vismem_config.json", CARD_FILE):
        same = (cut / "memory" / name).read_bytes() == (whole / "memory" / name).read_bytes()
        assert same or name == CARD_FILE  # which names its own folder
    logs = [json.loads((run / "log.json").read_text())["log"] for run in (whole, cut)]
    assert without_times(logs[0]) == without_times(logs[1])
    assert logs[0][-1]["train_loss"] == logs[1][-1]["train_loss"] and "train_loss" in logs[0][-1]
    entry = VisMem.from_pretrained(cut).history[0]
    assert entry["stage"] == "stage1" and entry["steps"] == 4 and entry["rewards"] == ["low"]
    assert entry["figures"]["reward"] == [log["reward"] for log in logs[0] if "reward" in log][-1]


@pytest.fixture(scope="module")
def stopped(work, tmp_path_factory) -> Path:
    """A run killed after its third checkpoint; tests copy it."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(4, patch)
        with pytest.raises(Killed):
            command(work, out, "save_total_limit=3")
    assert [path.name for path in sorted(out.glob("checkpoint-*"))] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    assert not (out / ".partial").exists()
    return out


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(work, whole, stopped, tmp_path, caplog, capsys):
    names = sorted(path.name for path in (stopped / "checkpoint-3").iterdir() if path.is_file())
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "memory_state_0.pt", MANIFEST} <= set(names)
    for name in names:
        run = tmp_path / name
        shutil.copytree(stopped, run)
        flip(run / "checkpoint-3" / name)
        caplog.clear()
        assert last_checkpoint(run) == str(run / "checkpoint-2")
        assert name == MANIFEST or f"checkpoint-3/{name} is damaged" in caplog.text
        with pytest.raises(DamagedCheckpointError, match="checkpoint-3"):
            trainer = MemoryTrainer(equip("idefics3"), settings(run), rows(), low)
            trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert command(work, run, "--resume") == 0
    found = [(path / "memory" / WEIGHTS_FILE).read_bytes() for path in (run, whole)]
    assert found[0] == found[1] and (run / "unused-checkpoint-3").is_dir()
    run = tmp_path / "none"
    shutil.copytree(stopped, run)
    for path in run.glob("checkpoint-*"):
        (path / "optimizer.pt").unlink()
    capsys.readouterr()
    assert command(work, run, "--resume") == 1
    assert "checkpoint-3/optimizer.pt is damaged or missing" in capsys.readouterr().err


def test_a_checkpoint_without_checksums_resumes_with_a_warning(work, stopped, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for path in run.glob(f"checkpoint-*/{MANIFEST}"):
        path.unlink()
    assert command(work, run, "--resume") == 0
    assert f"checkpoint-3 has no {MANIFEST}" in caplog.text


def test_a_second_save_at_a_step_leaves_the_first(tmp_path):
    trainer = train(equip("idefics3"), settings(tmp_path, save_strategy="steps", save_steps=1))
    before = (tmp_path / "checkpoint-1" / MANIFEST).stat()
    trainer._save_checkpoint(trainer.model, None)
    assert (tmp_path / "checkpoint-1" / MANIFEST).stat() == before
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1") and not (tmp_path / ".partial").exists()


@pytest.mark.parametrize("broken", ["", "[]", '{"steps": 4}', "no memory", "no files", "other memory", "flipped"])
def test_done_counts_only_with_an_intact_result(work, whole, tmp_path, caplog, broken):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    weights = (run / "memory" / WEIGHTS_FILE).read_bytes()
    done, record = run / "done.json", json.loads((run / "done.json").read_text())
    assert record["steps"] == 4 and set(record["files"]) == {WEIGHTS_FILE, "vismem_config.json"}
    if broken == "no memory":
        shutil.rmtree(run / "memory")
    elif broken == "other memory":
        del record["files"]
        done.write_text(json.dumps(record))
        (run / "memory" / "vismem_config.json").unlink()
    elif broken == "no files":
        done.write_text(json.dumps({**record, "files": {}}))
        flip(run / "memory" / WEIGHTS_FILE)
    elif broken == "flipped":
        flip(run / "memory" / WEIGHTS_FILE)
    else:
        done.write_text(broken)
    caplog.clear()
    assert command(work, run, "--resume") == 0
    assert "done.json marks stage1 as done, but" in caplog.text
    assert (run / "memory" / WEIGHTS_FILE).read_bytes() == weights
    VisMem.from_pretrained(run)
    (run / "memory" / CARD_FILE).write_text("my own words")
    assert command(work, run, "--resume") == 0
    assert (run / "memory" / CARD_FILE).read_text() == "my own words"


# Foreign code that ends the program.

ENDINGS = ["sys.exit(0)", "sys.exit('bye')", "raise GeneratorExit"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("where", ["call", "import"])
def test_a_reward_that_exits_the_program_fails(work, tmp_path, capsys, ending, where):
    head, inside = (ending, "pass") if where == "import" else ("", ending)
    (tmp_path / "ends.py").write_text(f"import sys\n{head}\ndef low(completions, **others):\n    {inside}\n")
    code = command(work, tmp_path / "run", f"rewards={tmp_path / 'ends.py'}:low", stage="stage1")
    assert code == (2 if where == "import" else 1)  # found with the settings, or while training
    last = capsys.readouterr().err.strip().splitlines()[-1]
    kind = "GeneratorExit" if "Generator" in ending else "SystemExit"
    assert last.startswith("vismem: error: ") and kind in last
    assert ("cannot import" if where == "import" else "the reward 'low' failed at row data.jsonl:") in last
    assert not (tmp_path / "run" / "memory").exists()


def test_a_judge_that_exits_the_program_fails(tmp_path):
    (tmp_path / "judge.py").write_text("import sys\ndef ends(*given):\n    sys.exit(0)\n")
    with pytest.raises(RewardError, match="SystemExit"):
        train(equip("idefics3"), settings(tmp_path), reward={"name": "judge", "function": f"{tmp_path}/judge.py:ends"})


# One run in a folder.


def test_a_second_run_into_a_folder_is_refused(work, stopped, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    code = f"import time, vismem.files as f\nwith f.locked({str(run)!r}):\n    print(1, flush=True)\n    time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        assert command(work, run, "--resume") == 1
        err = capsys.readouterr().err.strip().splitlines()
        assert f"{run} is in use by another run (process {other.pid} on " in err[-1]
        with pytest.raises(files.FolderInUseError):
            train(equip("idefics3"), settings(run))
        before = sorted(path.name for path in run.iterdir())
    finally:
        other.kill()
        other.wait()
    assert {"checkpoint-1", "checkpoint-2", "checkpoint-3"} <= set(before)
    assert command(work, run, "--resume") == 0  # the kernel has dropped the dead run's lock


# A full disk.


@pytest.mark.parametrize("place", ["checkpoint", "completions", "memory"])
def test_a_full_disk_names_the_last_good_checkpoint(work, tmp_path, monkeypatch, capsys, place):
    run = tmp_path / "run"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        if place == "checkpoint":
            real = torch.save

            def save(value, path, *given, **named):
                if Path(str(path)).parts[-2:] == ("checkpoint-3", "optimizer.pt"):
                    Path(path).write_bytes(b"half")
                    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0") from None
                real(value, path, *given, **named)

            patch.setattr(torch, "save", save)
            patch.setattr(files, "sync", lambda path: (_ for _ in ()).throw(full) if path.name[:5] == "probe" else None)
        elif place == "completions":
            patch.setattr("vismem.training.metrics.jsonl.append", lambda *given: (_ for _ in ()).throw(full))
        else:
            patch.setattr("vismem.files.write_pair", lambda *given: (_ for _ in ()).throw(full))
        assert command(work, run) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vismem: error")]
    last = {"checkpoint": str(run / "checkpoint-2"), "completions": "none yet", "memory": str(run / "checkpoint-4")}
    assert "no space left on /" in line and f"last good checkpoint: {last[place]}. " in line and "--resume" in line
    assert not (run / ".partial").exists() and not list(run.rglob("*.partial"))
    assert command(work, run, "--resume") == 0


# Ctrl-C and SIGTERM.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 2])
def test_a_stopped_run_says_how_to_resume(work, tmp_path, monkeypatch, capsys, number, step):
    run, real = tmp_path / "run", MemoryTrainer.training_step
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def stopped(self, *given, **named):
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
            time.sleep(1)
        return real(self, *given, **named)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(MemoryTrainer, "training_step", stopped)
            assert command(work, run) == 128 + number
    finally:
        signal.signal(signal.SIGINT, ours)
    assert signal.getsignal(signal.SIGTERM) is before
    last = capsys.readouterr().err.strip().splitlines()[-1]
    word = "interrupted" if number == signal.SIGINT else "terminated"
    told = f"--resume continues stage1 from step 2 ({run / 'checkpoint-2'})" if step else "has no checkpoint yet"
    assert last.startswith(f"vismem: {word}; ") and told in last


def test_a_run_starts_from_the_memory_below_a_runs_folder(work, whole, tmp_path):
    assert command(work, tmp_path / "next", f"checkpoint={whole}", "max_steps=1", "stage1.max_steps=1") == 0
    assert [entry["steps"] for entry in VisMem.from_pretrained(tmp_path / "next").history] == [4, 1]
    assert command(work, tmp_path / "sft", stage="sft") == 0
    assert command(work, tmp_path / "sft2", f"checkpoint={tmp_path / 'sft'}", stage="sft") == 0
