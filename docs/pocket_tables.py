"""Prints the tables of docs/training.md from the pocket's measurements: accuracy by stage and condition, over seeds.

python docs/pocket_tables.py results/pocket
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

SUITES = {
    "late": "late questions",
    "rules": "rule withheld, image in view",
    "both": "rule withheld, late",
    "strange": "late, strange pictures",
    "in_view": "in view",
}
BOUNDS = {
    "late": "image_shown_again",
    "rules": "rule_stated",
    "both": "shown_again_and_stated",
    "strange": "image_shown_again",
}
STAGES = ("untrained", "warmup", "stage1", "stage2")


def load(folder: Path) -> dict[str, list[dict]]:
    """The files by what was measured, `stage2_seed0.json` under `stage2`."""
    found: dict[str, list[dict]] = {}
    for file in sorted(folder.glob("*.json")):
        found.setdefault(file.stem.partition("_seed")[0], []).append(json.loads(file.read_text())["suites"])
    return found


def cell(runs: list[dict], suite: str, condition: str) -> str:
    """Mean over seeds, and the lowest and highest where there are several."""
    values = [run[suite][condition]["accuracy"] for run in runs if condition in run.get(suite, {})]
    if not values:
        return ""
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def stages(runs: dict[str, list[dict]]) -> str:
    """Each step's contribution: vanilla, the steps, the bound; the model decides when to invoke."""
    everything = [run for group in runs.values() for run in group]
    rows = []

    def once(suite: str, condition: str) -> str:
        """A condition without memory, which every file that has it has alike."""
        return cell([run for run in everything if condition in run.get(suite, {})][:1], suite, condition)

    for suite, title in SUITES.items():
        shown = [r for r in everything if suite in r]
        for condition in ("placed", "learned"):
            if not any(condition in run[suite] for run in shown):
                continue
            steps = [cell(runs.get(stage, []), suite, condition) for stage in STAGES]
            bound = once(suite, BOUNDS[suite]) if suite in BOUNDS else ""
            rows.append([title, condition, once(suite, "vanilla"), *steps, bound])
    return table(["questions", "invocation", "vanilla", *STAGES, "bound"], rows)


def conditions(runs: list[dict], suite: str) -> str:
    """All conditions of a suite for one stage, with their invocations and the share of the way to the bound."""
    names = list(dict.fromkeys(name for run in runs for name in run.get(suite, {})))
    rows = []
    for name in names:
        found = [run[suite][name] for run in runs if name in run.get(suite, {})]
        counts = [sum(f["invocations_per_answer"].values()) for f in found if "invocations_per_answer" in f]
        places = [f["invocations_per_delimiter"] for f in found if "invocations_per_delimiter" in f]
        way = ""
        if suite in BOUNDS:
            bounds = [
                [run[suite][c]["accuracy"] for run in runs if c in run[suite]] for c in ("vanilla", BOUNDS[suite])
            ]
            floor, top = map(mean, bounds)  # neither has a memory, so one seed says it for all
            way = f"{(mean(f['accuracy'] for f in found) - floor) / (top - floor):.2f}"
        often = [f"{mean(values):.2f}" if values else "" for values in (counts, places)]
        rows.append([name.replace("_", " "), cell(runs, suite, name), way, *often])
    return table(["condition", "accuracy", "of the way", "invocations per answer", "per delimiter"], rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = load(Path(sys.argv[1]))
    print("### By stage\n\n" + stages(found))
    for suite, title in SUITES.items():
        if any(suite in run for run in found.get("stage2", [])):
            print(f"\n### After stage II: {title}\n\n" + conditions(found["stage2"], suite))
    chance = [[stage, cell(found.get(stage, []), "late", "random_50")] for stage in STAGES[1:]]
    print("\n### Memories put in at random\n\n" + table(["after", "late questions, at half of the delimiters"], chance))
    lengths = {name: runs for name, runs in found.items() if name.startswith("length")}
    if lengths:
        rows = [
            [*name.removeprefix("length").split("_"), cell(runs, "late", "placed")] for name, runs in lengths.items()
        ]
        rows.sort(key=lambda row: int(row[0]))
        print("\n### Length of short memory\n\n" + table(["N_s", "warm-up", "late questions, placed"], rows))
