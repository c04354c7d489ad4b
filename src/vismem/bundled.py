"""The pocket model that ships with the package: its name and its files."""

from __future__ import annotations

from pathlib import Path

POCKET = "pocket"
WEIGHTS = Path(__file__).parent / "pocket" / "weights"
BASE_PATH, MEMORY_PATH = WEIGHTS / "base", WEIGHTS / "memory"


def is_pocket(name: str) -> bool:
    """Whether a base's name refers to the pocket model, even by its path on another machine."""
    return name == POCKET or Path(name).expanduser().resolve().parts[-4:] == ("vismem", *BASE_PATH.parts[-3:])
