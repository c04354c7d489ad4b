"""Finds learning rates for the pocket's baselines: trains each at several rates and scores held-out questions.

Reuses finished runs in `--runs`. Training and questions use seed 0, which is reserved for choosing settings; reported
results use other seeds.

    python benchmarks/baseline_rates.py --runs runs/rates --out results/pocket/baseline_rates.json
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import transformers

import vismem
from vismem.evaluation.answering import answer
from vismem.evaluation.intervals import bootstrap_mean
from vismem.pocket import load_base
from vismem.pocket.suites import rows
from vismem.training.arguments import load_settings
from vismem.training.baselines import load_adapter
from vismem.training.run import train

# By name: the step, its settings on top of the preset, and the rates. Soft prompts are trained by the warm-up.
BASELINES = {
    "sft": ("sft", ["max_steps=150"], ["5e-4", "1e-3", "2e-3", "4e-3", "8e-3"]),
    "grpo": ("grpo", ["max_steps=125"], ["1e-3", "2e-3", "4e-3", "8e-3"]),
    "soft": ("warmup", ["max_steps=150", "memory.content=soft"], ["5e-3", "2e-2", "1e-1", "3e-1"]),
}
SUITES = {"rules": 12, "both": 12, "late": 6, "in_view": 8, "strange": 6}  # questions per cell


def measure(folder: Path | None) -> dict[str, dict]:
    """Accuracy by suite with its interval, and their mean, for an adapter, a memory placed by hand, or the base."""
    base, processor = load_base()
    base.set_attn_implementation("eager")
    if folder is not None and folder.name == "memory":
        model, invocation = vismem.VisMem.from_pretrained(folder, base=base, processor=processor), "placed"
    else:
        model, invocation = vismem.VisMem(base, processor, vismem.VisMemConfig.preset("pocket")), "off"
        if folder is not None:
            load_adapter(model, folder)
    found = {}
    for suite, n in SUITES.items():
        asked = rows(suite, n=n, seed=0)
        records = answer(model, asked, ["pocket"], invocation=invocation, max_new_tokens=48, label=suite)
        mean, low, high = bootstrap_mean([record.score for record in records])
        found[suite] = {"accuracy": round(mean, 3), "low": round(low, 3), "high": round(high, 3), "n": len(asked)}
    found["mean"] = round(sum(found[suite]["accuracy"] for suite in SUITES) / len(SUITES), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    found = {**machine, "transformers": transformers.__version__, "base": measure(None)}
    for name, (step, settings, rates) in BASELINES.items():
        for rate in rates:
            changes = [*settings, f"learning_rate={rate}", f"output_dir={options.runs / f'{name}_{rate}'}"]
            common = ["preset=pocket", "seed=0", "save_steps=1000", "report_to=none"]
            result = train(step, load_settings(None, [*common, *changes]), resume=True)
            found.setdefault(name, {})[rate] = measure(result)
            print(name, rate, json.dumps(found[name][rate]), flush=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
