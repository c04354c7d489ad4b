"""Plots `results/pocket_base.json`: accuracy by distance from the image, and the scores in view."""

from __future__ import annotations

from pathlib import Path

from vismem import files

STYLES = {
    "once": ("image shown once", "#c0392b", "o"),
    "again": ("image shown again with the question", "#2471a3", "s"),
    "inside": ("image again inside the reply", "#1e8449", "^"),
}
TITLES = {"colour": "tag colour", "shape": "tag shape", "digit": "one price", "label": "label of a row"}
TITLES |= {"row": "a row's prices", "sum": "sum of a row", "promotion": "promotion, rule stated"}


def draw(results: dict, path: Path) -> None:
    """Write the plot of `evaluate`'s results to `path` (PNG)."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the plot needs matplotlib: pip install 'vismem[pocket]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(15, 7.4), layout="constrained")
    for axis, (task, by_shown) in zip(axes.flat, results["distance"].items(), strict=False):
        for shown, by_distance in by_shown.items():
            points = {int(d): cell for d, cell in by_distance.items()}
            if shown == "once":
                points[0] = results["in_view"][task]
            distances = sorted(points)
            name, colour, marker = STYLES[shown]
            axis.plot(
                distances,
                [points[d]["accuracy"] for d in distances],
                color=colour,
                marker=marker,
                markersize=4,
                label=name,
            )
            axis.fill_between(
                distances,
                [points[d]["low"] for d in distances],
                [points[d]["high"] for d in distances],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        axis.set(title=TITLES.get(task, task), ylim=(0, 1.02), xticks=range(9))
        axis.grid(alpha=0.3)
    for axis in axes[1, :3]:
        axis.set_xlabel("turns since the image was first shown")
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    _bars(axes.flat[7], results)
    figure.suptitle(
        f"The pocket VLM loses its image: {results['parameters'] / 1e6:.1f} M parameters, sliding window of "
        f"{results['sliding_window']} tokens, n = {results['n']} a point, 95 % intervals",
        fontsize=13,
    )
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)


def _bars(axis, results: dict) -> None:
    """The other scores: tasks in view, promotions by what is known, easy-VQA."""
    rows = {name.replace("_", " "): cell for name, cell in results["in_view"].items() if name not in TITLES}
    rows["promotion, rule stated"] = results["promotion"]["stated-truth"]
    rows["promotion, rule noted"] = results["promotion"]["noted-truth"]
    rows["promotion, not stated"] = results["promotion"]["hidden-truth"]
    rows["easy-VQA test"] = results["easy_vqa"]
    names = list(rows)[::-1]
    values = [rows[name]["accuracy"] for name in names]
    errors = [
        [rows[n]["accuracy"] - rows[n]["low"] for n in names],
        [rows[n]["high"] - rows[n]["accuracy"] for n in names],
    ]
    axis.barh(names, values, xerr=errors, color="#5d6d7e", error_kw={"linewidth": 1})
    place = names.index("promotion, not stated")
    chance = results["promotion_chance"]
    axis.plot([chance, chance], [place - 0.45, place + 0.45], color="#c0392b", linewidth=2)
    axis.set(title="image in view (red: chance)", xlim=(0, 1.02), xlabel="accuracy")
    axis.grid(axis="x", alpha=0.3)
