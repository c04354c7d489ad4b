"""The report: one self-contained HTML page with verdicts, plots, tables and some answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vismem import files
from vismem.analysis.heatmaps import data_url
from vismem.analysis.templates import templates_of
from vismem.audit import plots
from vismem.audit.activations import ActivationStore
from vismem.audit.names import INTACT, KINDS_IN_WORDS, WORDS
from vismem.audit.verdicts import percent, points
from vismem.data import Row
from vismem.evaluation.records import Record

SHOWN = 4  # example answers
SIDE = 192  # pixels of a picture's longer side at most


def write_report(
    found: Mapping[str, Any], activations: ActivationStore, answers: Mapping[str, Mapping[str, Record]], out: Path
) -> None:
    """Writes `report.html` into the audit's folder `out`, which has `maps.json`.

    `found` has the contents of `audit.json`, `answers` the records by condition and id.
    """
    environment = templates_of("vismem.audit")
    environment.filters |= {"percent": percent, "points": points, "nats": nats, "cosine": cosine, "glued": glued}
    page = environment.get_template("report.html").render(
        found=found,
        plots=plots,
        names=KINDS_IN_WORDS,
        words=WORDS,
        examples=examples(activations, answers),
        gaze={kind: each for kind, each in found["gaze"].items() if each["n"]},
        probes={kind: each for kind, each in found["probes"].items() if each.get("families")},
        maps=json.loads((out / "maps.json").read_text(encoding="utf-8"))["maps"],
        about={name: found["settings"].get(name) for name in ("base", "checkpoint", "data")},
    )
    files.write_text(out / "report.html", page)


def examples(activations: ActivationStore, answers: Mapping[str, Mapping[str, Record]]) -> list[dict[str, Any]]:
    """Some questions whose answers change when memory is replaced, those that change most first."""
    intact = answers[INTACT]
    others = {name: records for name, records in answers.items() if name != INTACT}

    def changes(row_id: str) -> int:
        own = intact[row_id].reply
        return sum(records[row_id].reply != own for records in others.values() if row_id in records)

    order = sorted((i for i in intact if intact[i].invocations), key=lambda i: (-intact[i].score, -changes(i)))
    return [
        {
            "question": activations.question[row_id],
            "answer": activations.row(row_id).answer,
            "pictures": [picture(image) for image in activations.row(row_id).images],
            "late": turns_after_image(activations.row(row_id)),
            "invoked": [one["kind"] for one in intact[row_id].invocations],
            "replies": [
                {"name": name, "reply": records[row_id].reply, "right": records[row_id].score > 0}
                for name, records in {INTACT: intact, **others}.items()
                if row_id in records
            ],
        }
        for row_id in order[:SHOWN]
    ]


def turns_after_image(row: Row) -> int:
    """How many user messages follow the one that last showed an image."""
    count = 0
    for message in reversed(row.prompt):
        if any(part["type"] == "image" for part in message["content"]):
            return count
        count += message["role"] == "user"
    return 0


def picture(image: Any) -> str:
    """A small copy of a picture as a `data:` URL."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    return data_url(small)


def glued(text: str) -> str:
    """The text with non-breaking spaces inside numbers, units and intervals."""
    text = re.sub(r"(\d) (%|points|\[)", "\\1\u00a0\\2", text)
    text = re.sub(r"(%|points) \[", "\\1\u00a0[", text)
    return re.sub(r"(\[[-\d.]+,) ", "\\1\u00a0", text).replace("n = ", "n\u00a0=\u00a0")


def nats(estimate: Mapping[str, float]) -> str:
    """A KL with its interval."""
    return f"{estimate['value']:.3g} [{max(estimate['low'], 0):.2g}, {estimate['high']:.2g}]"


def cosine(spread: Mapping[str, float]) -> str:
    """A mean cosine with its interval."""
    return f"{spread['mean']:.3f} [{spread['low']:.3f}, {spread['high']:.3f}]"
