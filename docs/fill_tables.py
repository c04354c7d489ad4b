"""Inserts the tables of `results/` into `evidence.md`, each between `<!-- table FILE -->` and `<!-- end -->`.

python docs/fill_tables.py
"""

from __future__ import annotations

import re
from pathlib import Path

from vismem.evaluation.tables.layout import grid, read

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "docs" / "evidence.md",)
PLACE = re.compile(r"(<!-- table (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Returns a page with the tables of `results/`."""
    return PLACE.sub(lambda found: f"{found[1]}\n{grid(read(ROOT / found['file']))}\n\n{found[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page)
