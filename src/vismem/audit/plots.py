"""The report's plots as SVG that inherits the page's text colour, for light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vismem.audit.names import WORDS

INK = "#010203"  # becomes the page's text colour
COLOURS = ("#3b82c4", "#e07b39", "#3fa06b", "#b85c9e", "#c9a227", "#7a6fc9")
WIDE = 4.3  # inches: about a phone's width at the page's text size
STYLE: Any = {  # matplotlib's stubs want literal names
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def canvas(height: float) -> Figure:
    """An empty figure of this height in inches."""
    return Figure(figsize=(WIDE, height), layout="constrained")


def svg(figure: Figure, name: str) -> str:
    """The figure as SVG for embedding into HTML; `name` is its label for screen readers."""
    file = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


@rc_context(STYLE)
def effects(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Accuracy and share of changed answers for every replacement."""
    tested = sorted((row for row in rows if row["n"]), key=lambda row: row["name"] == "off")
    figure, intact = canvas(0.9 + 0.24 * (len(tested) + 1)), tested[0]["intact"]
    left, right = figure.subplots(1, 2, sharey=True)
    lines = [("intact", intact, None)]
    lines += [(row["name"], row["accuracy"], row["flips"]) for row in tested]
    for place, (_, accuracy, flips) in enumerate(lines):
        dot(left, accuracy, place, COLOURS[0])
        if flips is not None:
            dot(right, flips, place, COLOURS[1])
    left.axvline(100 * intact["value"], color=COLOURS[0], alpha=0.4, lw=1, ls=":")
    left.set_yticks(range(len(lines)), [WORDS[name] for name, _, _ in lines])
    left.set_ylim(len(lines) - 0.5, -0.5)
    left.set_xlabel("accuracy, %")
    right.set_xlabel("answers that change, %")
    for axes in (left, right):
        axes.set_xlim(-4, 104)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    return svg(figure, f"accuracy and changed answers, {name}")


@rc_context(STYLE)
def shifts(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """KL of the next tokens for every replacement, on a logarithmic axis."""
    tested = [row for row in rows if row.get("kl_first")]
    figure, floor = canvas(0.9 + 0.24 * len(tested)), 1e-4
    axes = figure.subplots()
    for place, row in enumerate(tested):
        for key, up, colour in (("kl_first", -0.12, COLOURS[2]), ("kl_rest", 0.12, COLOURS[3])):
            if row.get(key):
                value, low, high = (max(row[key][part], floor) for part in ("value", "low", "high"))
                axes.plot([low, high], [place + up] * 2, color=colour, lw=1.5)
                axes.plot(value, place + up, "o", color=colour, ms=4)
    axes.set_xscale("log")
    axes.set_xlim(left=floor * 0.8)
    axes.set_yticks(range(len(tested)), [WORDS[row["name"]] for row in tested])
    axes.set_ylim(len(tested) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("KL(intact || replaced), nats")
    marks = [axes.plot([], [], "o", color=colour, ms=4)[0] for colour in COLOURS[2:4]]
    figure.legend(marks, ["first token after it", "mean over the rest"], loc="outside upper right", ncols=2)
    return svg(figure, f"KL of the next tokens, {name}")


@rc_context(STYLE)
def attention(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """Attention of later tokens by layer, to the slots and to everything else."""
    figure = canvas(1.9 * len(kinds) + 0.4)
    for axes, (kind, found) in zip(np.atleast_1d(figure.subplots(len(kinds), 1)), kinds.items(), strict=True):
        layers = range(1, found["layers"] + 1)
        parts = list(found["by_layer"])
        values = [[100 * layer["value"] for layer in found["by_layer"][part]] for part in parts]
        axes.stackplot(layers, values, labels=parts, colors=COLOURS, alpha=0.85)
        axes.set_xlim(1, found["layers"])
        axes.set_ylim(0, 100)
        axes.set_xticks(layers if len(layers) < 13 else range(1, len(layers) + 1, -(-len(layers) // 12)))
        axes.set_ylabel("attention, %")
        axes.set_xlabel(f"layer (after {kind} memory)")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure, "attention by layer")


@rc_context(STYLE)
def probes(families: Mapping[str, Mapping[str, Any]], kind: str) -> str:
    """Accuracies of the probes by family and source."""
    figure = canvas(0.9 + 0.34 * len(families))
    axes = figure.subplots()
    sources = ("memory", "visual tokens", "query", "memory shuffled")
    for place, family in enumerate(families.values()):
        for number, source in enumerate(sources):
            if source in family:
                up = (number - 1.5) * 0.17
                dot(axes, family[source], place + up, COLOURS[number], hollow=source.endswith("shuffled"))
        chance = 100 * family["chance"]["value"]
        axes.plot([chance, chance], [place - 0.4, place + 0.4], color=INK, lw=1, alpha=0.6)
    axes.set_yticks(range(len(families)), list(families))
    axes.set_ylim(len(families) - 0.5, -0.5)
    axes.set_xlim(0, 102)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("accuracy, %; the vertical line is chance")
    marks = [
        axes.plot([], [], "o", color=colour, ms=4, mfc="none" if source.endswith("shuffled") else colour)[0]
        for source, colour in zip(sources, COLOURS, strict=False)
    ]
    figure.legend(marks, [*sources[:3], "shuffled"], loc="outside upper center", ncols=4)
    return svg(figure, f"probes of {kind} memory")


@rc_context(STYLE)
def similarity(kind: str, pairs: Mapping[str, Mapping[str, Any]], bins: Sequence[float]) -> str:
    """Distribution of the cosines of two memories, by what the two have in common."""
    figure = canvas(2.2)
    middle = (np.array(bins[1:]) + np.array(bins[:-1])) / 2
    for axes, how in zip(figure.subplots(1, 2), ("raw", "centred"), strict=True):
        for number, pair in enumerate(pairs.values()):
            counts = np.array(pair[how]["counts"], dtype=float)
            axes.fill_between(middle, counts / counts.max(), color=COLOURS[number], alpha=0.45, lw=0)
            axes.axvline(pair[how]["mean"], color=COLOURS[number], lw=1)
        seen = [middle[place] for pair in pairs.values() for place in np.flatnonzero(pair[how]["counts"])]
        axes.set_xlim(max(min(seen) - 0.05, -1), min(max(seen) + 0.05, 1))
        axes.set_yticks([])
        axes.set_xlabel(f"cosine, {how}")
    patches = [axes.fill_between([], [], color=COLOURS[number], alpha=0.45) for number in range(len(pairs))]
    figure.legend(patches, list(pairs), loc="outside upper center", ncols=1 if len(pairs) > 2 else 2)
    return svg(figure, f"similarity of {kind} memories")


@rc_context(STYLE)
def scatter(name: str, found: Mapping[str, Any]) -> str:
    """A two-dimensional map of memories."""
    figure = canvas(3.4)
    axes = figure.subplots()
    points, values = np.array(found["points"]), found["values"]
    labels = sorted({value for value in values if value is not None}, key=natural)
    palette = (*COLOURS, "#6b7280", "#d1495b", "#2a9d8f", "#8d6e63", "#90be6d", "#577590")
    rest = np.array([value is None for value in values])
    if rest.any():
        axes.scatter(points[rest, 0], points[rest, 1], s=7, color="#888888", alpha=0.4, lw=0)
    for number, label in enumerate(labels):
        own = np.array([value == label for value in values])
        colour = palette[number % len(palette)]
        axes.scatter(points[own, 0], points[own, 1], s=9, color=colour, alpha=0.8, lw=0, label=label)
    across, up = ["t-SNE 1", "t-SNE 2"]
    if "shown" in found:
        across, up = (f"component {n} ({100 * part:.0f} % of variance)" for n, part in enumerate(found["shown"], 1))
    axes.set(xlabel=across, ylabel=up, xticks=[], yticks=[])
    if labels:
        axes.legend(title=found["colour"], loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.6)
    return svg(figure, f"map of memories, {name}")


def dot(axes: Axes, estimate: Mapping[str, float], place: float, colour: str, *, hollow: bool = False) -> None:
    """Plots a share with its interval, in per cent."""
    axes.plot([100 * estimate["low"], 100 * estimate["high"]], [place, place], color=colour, lw=1.5)
    axes.plot(100 * estimate["value"], place, "o", color=colour, ms=4, mfc="none" if hollow else colour)


def natural(text: str) -> list[Any]:
    """Sort key that puts "image 10" after "image 9"."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]
