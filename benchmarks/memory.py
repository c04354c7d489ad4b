"""How far off are the estimates of `vismem info`? Peaks of a process's resident memory against `vismem.estimates`.

One process for each base, on the CPU, in float32. Freed memory returns to the system at once (glibc maps every larger
block separately), so the peak that Linux records (VmHWM, reset before each case) is that of live memory. What the
process holds before the base is built is subtracted; a much smaller base goes through every case first, so that this
includes the libraries' code and buffers. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "PASSIVE"}
OUT = Path(__file__).resolve().parent.parent / "results" / "info_memory.json"
BASES = ("qwen-28m", "qwen-200m")
ROWS = 8  # answers to the one prompt in the RL stages, replayed in one micro-batch


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak(work: Any) -> int:
    """Peak of resident memory while `work` runs."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return status("VmHWM")


def measure(name: str, visual_tokens: int) -> list[dict[str, Any]]:
    """All cases of one base; needs its own process."""
    import torch
    from bases import BASES as KNOWN
    from bases import prompt, random_qwen
    from train import INVOCATIONS, NEW_TOKENS, as_sampled, equip, roll, schedule

    from vismem.decoding.policies import Forced
    from vismem.estimates import TRAINED, Load, inference, read_shape, training
    from vismem.training.replay import Learner, collate

    torch.set_num_threads(1)
    if name != "tiny":
        KNOWN["tiny"] = lambda: random_qwen(512, 128, 2, 256, (128, 2, 256), tied=True)
        measure("tiny", 64)
    gc.collect()
    before = status("VmRSS")
    torch.manual_seed(0)
    model, _ = equip(name)
    base, config, shape = model.base, model.memory_config, read_shape(model.backbone)
    inputs = prompt(base, visual_tokens, 1)
    words = inputs["input_ids"].shape[1] - visual_tokens
    load = Load(visual_tokens, words, NEW_TOKENS, INVOCATIONS, 1, ROWS, ROWS, 4)
    parts = {part: sum(p.numel() for p in model.parameters_of(part)) for part in (*TRAINED["stage1"], "tokens")}
    found = []

    def note(case: str, measured: int, estimated: int) -> None:
        measured -= before
        found.append({"model": name, "case": case, "measured": measured, "estimated": estimated})
        print(f"{name} {case}: {measured / 1e6:.0f} MB, estimated {estimated / 1e6:.0f}", file=sys.stderr, flush=True)

    for rows in (1, 8):
        asked = prompt(base, visual_tokens, rows)
        policy = Forced([(row, step, kind) for row in range(rows) for step, kind in ((8, "short"), (48, "long"))])
        settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}

        def answer(asked: dict = asked, policy: Any = policy, settings: dict = settings) -> None:
            with torch.no_grad():
                model.generate(**asked, invocation=policy, **settings)

        note(f"answer {rows}", peak(answer), inference(shape, parts, config, load, rows)["total"])
        del asked, answer

    for stage in ("stage1", "stage2"):
        trained = [p for part in TRAINED[stage] for p in model.parameters_of(part)]
        model.memory.requires_grad_(False), model.tokens.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=1e-6)
        start = [p.detach().clone() for p in trained]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # allocates its moments
        optimizer.zero_grad()
        kept: list = []

        def rollout(kept: list = kept) -> None:
            kept[:] = roll(model, inputs, schedule(ROWS), ROWS)

        measured = {"rollout": peak(rollout)}
        batch = collate(inputs, as_sampled(kept), 0, 1.0, formed=stage == "stage2")
        learner = Learner(model)

        def update(batch: dict = batch, optimizer: Any = optimizer, learner: Any = learner) -> None:
            (learner(batch).log_probs.sum() / ROWS).backward()
            optimizer.step()
            optimizer.zero_grad()

        for checkpointing in (False, True):
            model.gradient_checkpointing_enable(enable=checkpointing)
            measured["update"] = peak(update)
            told = training(shape, parts, config, load, stage, checkpointing=checkpointing)
            steady = sum(told[name] for name in ("weights", "memory", "optimizer", "start"))
            if not checkpointing:
                note(f"{stage} rollout", measured["rollout"], steady + sum(told["rollout"].values()))
            mode = ", checkpointing" if checkpointing else ""
            note(f"{stage} update{mode}", measured["update"], steady + sum(told["update"].values()))
        model.gradient_checkpointing_enable(enable=False)
        del optimizer, start, kept, batch, learner, rollout, update
    facts = {"parameters": shape.parameters, "memory": sum(parts.values()), "visual_tokens": visual_tokens}
    facts |= {"prompt_tokens": words, "answer_tokens": NEW_TOKENS, "invocations": INVOCATIONS, "rows": ROWS}
    return [{**facts, **each, "ratio": round(each["estimated"] / each["measured"], 3)} for each in found]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=BASES, default=BASES, help="bases to measure (default: all)")
    parser.add_argument("--visual-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--here", help=argparse.SUPPRESS)  # one base, in this process
    options = parser.parse_args(argv)
    if options.here:
        print(json.dumps(measure(options.here, options.visual_tokens)))
        return
    rows = []
    for name in options.only:
        words = [sys.executable, __file__, "--here", name, "--visual-tokens", str(options.visual_tokens)]
        done = subprocess.run(words, env={**os.environ, **SETTINGS}, stdout=subprocess.PIPE, check=True, text=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    import torch
    from decode import machine_facts

    torch.set_num_threads(1)
    machine, rounds = machine_facts("cpu", torch.float32), 1
    facts = {"benchmark": "memory", "machine": machine, "rounds": rounds, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['model']:<10} {row['case']:<30} {row['measured'] / 1e6:>8.0f} {row['estimated'] / 1e6:>8.0f} MB",
            end="",
        )
        print(f"  estimated / measured {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
