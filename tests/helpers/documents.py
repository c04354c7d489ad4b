"""Reads the documentation for its tests: blocks of code in the pages, and links in the built site."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
NAMED = re.compile(r"# (\S+\.ya?ml)\n")  # a file's name as a block's first line
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        page, line: where it stands.
        reason: why it is not run; None where it is.
        title: the name of the file that it shows, or None.
    """

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    title: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        named = NAMED.match(match["text"]) if match["language"] == "yaml" else None
        title = match["title"] or (named[1] if named else None)
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(page, line, match["language"], match["text"], match["reason"], title))
    return [block for block in found if block.language in languages]


def name(page: Path) -> str:
    """A page's name, for test ids."""
    return page.relative_to(ROOT).as_posix()


def write_files(folder: Path, page: Path) -> None:
    """Writes what a reader has at hand: the checkout's folders, the picture, and files that pages show."""
    for each in ("examples", "configs"):
        (folder / each).symlink_to(ROOT / each)
    (folder / "shelf.png").symlink_to(ROOT / "examples" / "shelf.png")
    for shown in (*(each for each in PAGES if each != page), page):  # the page's own last, over others of that name
        for block in blocks(shown, "json", "yaml", "python"):
            if block.title:
                (folder / block.title).write_text(block.text, encoding="utf-8")


def command_lines(block: Block) -> Iterator[list[str]]:
    """The words of each command line of a block of bash; handles comments and continued lines."""
    held = ""
    for line in block.text.replace("\\\n", " ").splitlines():
        held = f"{held}\n{line}" if held else line
        try:
            words = shlex.split(held, comments=True)
        except ValueError:  # a quotation goes on
            continue
        held = ""
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if words:
            yield words
    if held:
        raise ValueError(f"{block}: a quotation without an end: {held!r}")


@dataclass
class Links(HTMLParser):
    """What one built page has: ids, links, and what the browser loads for it."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.classes |= set(values.get("class", "").split())
        self.ids |= {values[each] for each in ("id", "name") if values.get(each)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") not in ("prev", "next", "canonical"):
            self.loads.append(values.get("href", ""))
        if tag in LOADING and values.get(LOADING[tag]):
            self.loads.append(values[LOADING[tag]])
        self.loads += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]


def read_site(site: Path) -> dict[Path, Links]:
    """Every page of a built site."""
    found = {}
    for path in sorted(site.rglob("*.html")):
        links = Links()
        links.feed(path.read_text(encoding="utf-8"))
        found[path] = links
    return found


def broken(site: Path, pages: dict[Path, Links]) -> list[str]:
    """The links and loads that lead nowhere, each with its page."""
    found = []
    for path, page in pages.items():
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            place = unquote(parts.path)
            target = site / place.lstrip("/") if place.startswith("/") else path.parent / place if place else path
            target = (target / "index.html" if target.is_dir() else target).resolve()
            if not target.is_file():
                found.append(f"{path.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{path.relative_to(site)}: {link} (no such place on that page)")
    return found
