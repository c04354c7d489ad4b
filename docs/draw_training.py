"""Draws a training run's curves: reward, improvement over the base, divergence and invocation rate, by seed.

python docs/draw_training.py results/pocket_training docs/images/pocket_training.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PANELS = (
    ("reward", "reward of the trajectories"),
    ("improvement", "improvement over the answer without memory"),
    ("kl", "divergence from the stage's start, per token"),
    ("invocations/rate", "invocations per answer"),
)
TITLES = {"stage1": "Stage I: what memory holds", "stage2": "Stage II: when to invoke it"}


def smooth(values: list[float], share: float = 0.6) -> list[float]:
    """A running mean that leans on the past."""
    out: list[float] = []
    for value in values:
        out.append(value if not out else share * out[-1] + (1 - share) * value)
    return out


def draw(folder: Path, target: Path) -> None:
    """Draws every `STAGE_seedN.json` (a trainer's log history) of a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "vismem"}
    )
    figure, axes = plt.subplots(2, 4, figsize=(13, 5), constrained_layout=True)
    for row, stage in zip(axes, TITLES, strict=True):
        for axis, (name, title) in zip(row, PANELS, strict=True):
            for file in sorted(folder.glob(f"{stage}_seed*.json")):
                entries = [entry for entry in json.loads(file.read_text())["log"] if name in entry]
                steps, values = [entry["step"] for entry in entries], [entry[name] for entry in entries]
                line = axis.plot(steps, smooth(values), label=file.stem.partition("_")[2].replace("seed", "seed "))[0]
                axis.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)
            axis.set_title(title, fontsize=9)
            axis.grid(alpha=0.2)
        row[0].set_ylabel(TITLES[stage])
        row[0].legend(frameon=False, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("update")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
