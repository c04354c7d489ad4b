"""Kills and resumes `vismem train` again and again, and compares its memory with that of an undisturbed run.

Not collected by pytest, as it takes minutes. Each stage is trained on a tiny model (CPU, fp32) in a process of its own,
which is killed with SIGKILL at random moments (seeded), half of them while a checkpoint is being written, and started
again with `--resume` until it is done. The two memories must be equal bit for bit. Processes are forked from one that
has imported everything and done nothing else, as imports would take most of the time.

    python tests/slow/resume_after_kill.py --out results/resume_after_kill.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess as Process
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

STAGES = ("warmup", "stage1", "stage2")
STEPS = 10


def make_files(folder: Path) -> Path:
    """A tiny base, pictures, questions, a reward and settings; returns the settings' path."""
    import tiny

    base, processor = tiny.base_and_processor("idefics3")
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    lines = []
    for i in range(7):  # not whole batches
        tiny.picture(i).save(folder / f"{i}.png")
        question = ("What is on the table?", "look again!")[i % 2]
        lines.append(json.dumps({"prompt": question, "images": [f"{i}.png"], "answer": "a red cup, a blue book."}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reward.py").write_text(
        "def low(completion_ids, **columns):\n"
        "    return [sum(t < 160 for t in ids) / max(len(ids), 1) for ids in completion_ids]\n"
    )
    settings = {
        "preset": "pocket",
        "base": str(folder / "base"),
        "data": str(folder / "data.jsonl"),
        "rewards": f"{folder / 'reward.py'}:low",
        "memory": {"query_length": 4, "short_length": 4, "long_length": 4, "lora_r": 4, "lora_dropout": 0.1},
        "dtype": "float32",
        "bf16": False,
        "group_size": 4,
        "max_new_tokens": 8,
        "save_steps": 1,
        "save_total_limit": 2,
        "logging_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        **{stage: {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 5e-3} for stage in STAGES},
    }
    path = folder / "settings.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def begin(stage: str, settings: Path, output: Path, resume: bool) -> None:
    """Runs the command in a process, with its output in a log."""
    with open(output.with_suffix(".log"), "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from vismem.cli import main as vismem

    given = ["train", stage, str(settings), f"output_dir={output}", *(["--resume"] if resume else [])]
    sys.exit(vismem(given))


def start(stage: str, settings: Path, output: Path, resume: bool) -> Process:
    process = get_context("fork").Process(target=begin, args=(stage, settings, output, resume))
    process.start()
    return process


def finish(process: Process, output: Path) -> None:
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"training failed:\n{output.with_suffix('.log').read_text()[-3000:]}")


def newest(output: Path) -> int:
    """Number of the newest checkpoint, 0 without one."""
    names = [path.name.partition("-")[2] for path in output.glob("checkpoint-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def kill(process: Process, output: Path, chance: random.Random, writing: bool, reach: int) -> str | None:
    """Kills the run once it is past `reach`: while it writes a checkpoint, or some time later. None if it was done."""
    pause = chance.random() * 0.6
    while newest(output) < reach:
        if not process.is_alive():
            return None
        time.sleep(0.002)
    if writing:
        while not any((output / ".partial").glob("checkpoint-*/*")):
            if not process.is_alive():
                return None
            time.sleep(0.0002)
    else:
        time.sleep(pause)
    if not process.is_alive():
        return None
    process.kill()  # SIGKILL
    process.join()
    half = any((output / ".partial").glob("checkpoint-*/*"))
    return "while writing a checkpoint" if half else "between checkpoints"


def run(stage: str, settings: Path, folder: Path, kills: int, chance: random.Random) -> dict:
    began = time.time()
    peace, killed = folder / f"{stage}-peace", folder / f"{stage}-killed"
    finish(start(stage, settings, peace, False), peace)
    found = []
    for number in range(kills):
        process = start(stage, settings, killed, number > 0)
        reach = min(newest(killed) + chance.randrange(1, 3), STEPS - 1) if number else chance.randrange(0, 2)
        where = kill(process, killed, chance, number % 2 == 1, reach)
        if where is None:
            break
        found.append({"after_step": newest(killed), "moment": where})
        print(f"  {stage}: killed after step {found[-1]['after_step']}, {where}", flush=True)
    finish(start(stage, settings, killed, True), killed)
    weights = [(path / "memory" / "vismem.safetensors").read_bytes() for path in (peace, killed)]
    untouched = not any((killed / ".partial").glob("*"))
    seconds = round(time.time() - began)
    return {"kills": found, "equal": weights[0] == weights[1], "nothing_left_behind": untouched, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5, help="kills of each stage (5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    options = parser.parse_args()
    for name, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}.items():
        os.environ[name] = value
    import tiny  # noqa: F401
    import torch
    import transformers

    import vismem.cli.train
    import vismem.training.run  # noqa: F401

    chance, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="vismem-kill-"))
    try:
        settings = folder / "settings.yaml"
        files = get_context("fork").Process(target=make_files, args=(folder,))
        files.start()
        files.join()
        stages = {}
        for stage in options.stages:
            stages[stage] = run(stage, settings, folder, options.kills, chance)
            print(f"{stage}: {'equal, bit for bit' if stages[stage]['equal'] else 'DIFFERENT'}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    machine = {"processor": platform.machine(), "cpus": os.cpu_count(), **versions}
    command = f"python tests/slow/resume_after_kill.py --kills {options.kills} --seed {options.seed}"
    result = {"command": command, "machine": machine, "steps": STEPS, "save_steps": 1, "stages": stages}
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    fine = all(len(found["kills"]) >= min(5, options.kills) and found["equal"] for found in stages.values())
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
