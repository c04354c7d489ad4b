"""Puts the tables of `results/` into docs/evidence.md, each between `<!-- table FILE -->` and `<!-- end -->`.

python docs/fill_evidence.py
"""

from __future__ import annotations

import re
from pathlib import Path

from vismem.evaluation.tables.layout import grid, read

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "evidence.md"
PLACE = re.compile(r"(<!-- table (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with its tables as `results/` has them."""
    return PLACE.sub(lambda found: f"{found[1]}\n{grid(read(ROOT / found['file']))}\n\n{found[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
