"""Names of what can stand in for a memory, and how they are written; knows no torch, so that command lines can ask."""

from __future__ import annotations

INTACT, OFF = "intact", "off"
CONTENT_FREE = ("zeros", "mean", "noise")  # as many vectors, nothing of this row in them
INTERVENTIONS = (*CONTENT_FREE, "another_image", "another_question", "other_kind", "shuffled")
WORDS = {
    INTACT: "intact memory",
    "zeros": "zeros",
    "mean": "mean memory",
    "noise": "noise of its norm",
    "another_image": "another image's",
    "another_question": "another question's",
    "other_kind": "the other kind's",
    "shuffled": "slots shuffled",
    OFF: "memory off",
}
KINDS_IN_WORDS = {"all": "all memory", "short": "short-term memory", "long": "long-term memory"}
