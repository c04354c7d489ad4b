"""Names of the interventions and their labels. Imports no torch, so that command lines stay fast."""

from __future__ import annotations

INTACT, OFF = "intact", "off"
CONTENT_FREE = ("zeros", "mean", "noise")  # the same number of vectors, without content of the row
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
