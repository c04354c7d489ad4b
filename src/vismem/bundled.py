"""The pocket model that ships with the package: its name, and where its files are."""

from __future__ import annotations

from pathlib import Path

POCKET = "pocket"
WEIGHTS = Path(__file__).parent / "pocket" / "weights"
BASE_PATH, MEMORY_PATH = WEIGHTS / "base", WEIGHTS / "memory"


def is_pocket(name: str) -> bool:
    """Whether a base's name means the pocket model, also as recorded on another machine."""
    return name == POCKET or Path(name).parts[-4:] == ("vismem", *BASE_PATH.parts[-3:])
