"""A plot for each table, made from the table alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vismem import files
from vismem.evaluation.tables.layout import Cell, Table

PALETTE = ("#4d4d4d", "#9c9c9c", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#0072b2", "#d55e00", "#f0e442")
KIND_COLOURS = {"short": "#0072b2", "long": "#d55e00"}


def draw(table: Table, path: Path) -> None:
    """Plots a table into a PNG file, atomically."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = PLOTS.get(table.name, bars)(table, pyplot)
    with files.replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png", metadata={"Software": None})
    pyplot.close(figure)


def percents(cells: Sequence[Cell]) -> tuple[list[float], list[float], list[float]]:
    """Values and both ends of the intervals, in per cent; without an interval, the ends are the value."""
    ends = ((c.value if c.low is None else c.low, c.value if c.high is None else c.high) for c in cells)
    values = [(100 * c.value, 100 * low, 100 * high) for c, (low, high) in zip(cells, ends, strict=True)]
    return [v for v, _, _ in values], [low for _, low, _ in values], [high for _, _, high in values]


def bars(table: Table, pyplot: Any) -> Any:
    """Grouped bars with intervals, one group for each column of shares."""
    columns = [c for c in table.columns if c not in table.units and any(table.cell(r, c) for r in table.rows)]
    rows = [r for r in table.rows if any(table.cell(r, c) for c in columns)]
    per_line = 9
    lines = [columns[i : i + per_line] for i in range(0, len(columns), per_line)]
    figure, axes = pyplot.subplots(
        len(lines), 1, figsize=(13, 3.6 * len(lines) + 0.8), layout="constrained", squeeze=False
    )
    width = 0.84 / max(len(rows), 1)
    for axis, chosen in zip(axes[:, 0], lines, strict=True):
        for number, row in enumerate(rows):
            found = [(place, cell) for place, c in enumerate(chosen) if (cell := table.cell(row, c)) is not None]
            at = [place + (number - (len(rows) - 1) / 2) * width for place, _ in found]
            values, low, high = percents([cell for _, cell in found])
            colour, hatch = PALETTE[number % len(PALETTE)], "//" if number >= len(PALETTE) else None
            axis.bar(at, values, width * 0.94, color=colour, label=row, hatch=hatch)
            spread = [[max(v - end, 0) for v, end in zip(values, low, strict=True)]]
            spread.append([max(end - v, 0) for v, end in zip(values, high, strict=True)])
            axis.errorbar(at, values, yerr=spread, fmt="none", ecolor="#222222", elinewidth=0.8, capsize=1.5)
        axis.set_xticks(range(len(chosen)), [c.replace(", ", "\n") for c in chosen], fontsize=8)
        axis.set(ylim=(min(0.0, axis.get_ylim()[0]), 102), ylabel="per cent", xlim=(-0.6, per_line - 0.4))
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    legend_below(figure, axes[0, 0], ncols=min(len(rows), 4), fontsize=9)
    figure.suptitle(f"{table.title} (95 % intervals)")
    return figure


def legend_below(figure: Any, axis: Any, **style: Any) -> None:
    """One legend below all panels, of the first one's lines."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", frameon=False, **style)


def lengths(table: Table, pyplot: Any) -> Any:
    """One panel for each length and one line for each benchmark."""
    points = {name: sorted(map(tuple, values)) for name, values in table.extra["points"].items()}
    titles = {"query_length": "K, query vectors", "short_length": "N_s, short-term vectors"}
    titles["long_length"] = "N_l, long-term vectors"
    columns = [c for c in table.columns if not c.startswith("average")] or table.columns
    figure, axes = pyplot.subplots(
        1, len(points), figsize=(4.4 * len(points), 3.9), layout="constrained", squeeze=False
    )
    for axis, (name, found) in zip(axes[0], points.items(), strict=True):
        for number, column in enumerate(columns):
            cells = [(value, cell) for value, label in found if (cell := table.cell(label, column)) is not None]
            at, colour = [value for value, _ in cells], PALETTE[(number + 2) % len(PALETTE)]
            values, low, high = percents([cell for _, cell in cells])
            axis.plot(at, values, marker="o", markersize=4, color=colour, label=column)
            axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks([value for value, _ in found], [str(value) for value, _ in found])
        axis.minorticks_off()
        axis.set(title=titles[name], ylim=(0, 102))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("per cent")
    legend_below(figure, axes[0][0], ncols=4)
    figure.suptitle(f"{table.title} (95 % intervals)")
    return figure


def continual(table: Table, pyplot: Any) -> Any:
    """One heat map for each method: benchmarks across, stages down."""
    chains = table.extra["chains"]
    columns = [c for c in table.columns if c != "forgotten" and not c.startswith("average")]
    figure, axes = pyplot.subplots(
        1, len(chains), figsize=(6.2 * len(chains), 4.4), layout="constrained", squeeze=False
    )
    for axis, (method, labels) in zip(axes[0], chains.items(), strict=True):
        rows = [table.rows[0], *labels]
        values = [[100 * cell.value if (cell := table.cell(r, c)) else float("nan") for c in columns] for r in rows]
        axis.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
        axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
        names = ["before", *(f"after {label.partition(', after ')[2]}" for label in labels)]
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.set_title(method)
    figure.suptitle(f"{table.title}: per cent right")
    return figure


def times(table: Table, pyplot: Any) -> Any:
    """Seconds per answer."""
    found = table.extra["times"]
    labels = list(found)[::-1]
    figure, axis = pyplot.subplots(figsize=(8, 0.5 * len(labels) + 1.6), layout="constrained")
    axis.barh(labels, [found[label]["seconds"] for label in labels], color=PALETTE[6])
    for place, label in enumerate(labels):
        axis.text(found[label]["seconds"], place, f" {found[label]['ratio']:.2f}x", va="center", fontsize=9)
    axis.margins(x=0.12)
    axis.set(xlabel="seconds per answer (median); beside it the ratio to the first row", title=table.title)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    return figure


def when(table: Table, pyplot: Any) -> Any:
    """Invocations per answer by kind, and their positions."""
    positions, bins = table.extra["positions"], table.extra["bins"]
    figure = pyplot.figure(figsize=(13, 0.62 * len(table.rows) + 2.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.7))
    axis, base = left.subplots(), [0.0] * len(table.rows)
    rows = table.rows[::-1]
    for kind, colour in KIND_COLOURS.items():
        values = [cell.value if (cell := table.cell(row, f"{kind} per answer")) else 0.0 for row in rows]
        axis.barh(rows, values, left=base, color=colour, label=f"{kind}-term", hatch=None if kind == "short" else "///")
        base = [a + b for a, b in zip(base, values, strict=True)]
    axis.set(xlabel="invocations per answer")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.05), ncols=2)
    axes = right.subplots(len(table.rows), 1, sharex=True, squeeze=False)
    for axis, row in zip(axes[:, 0], table.rows, strict=True):
        under = [0] * bins
        for kind, colour in KIND_COLOURS.items():
            counts = positions[row][kind]
            at = [(i + 0.5) / bins for i in range(bins)]
            axis.bar(at, counts, 0.92 / bins, bottom=under, color=colour, hatch=None if kind == "short" else "///")
            under = [a + b for a, b in zip(under, counts, strict=True)]
        axis.set_ylabel(row, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_yticks([])
        axis.set_xlim(0, 1)
    axes[-1, 0].set_xlabel("place in the answer: 0 its start, 1 its end")
    right.suptitle("where they stand")
    return figure


PLOTS = {"lengths": lengths, "continual": continual, "latency": times, "when": when}
