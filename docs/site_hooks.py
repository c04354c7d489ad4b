"""Hooks of mkdocs: pages from outside `docs/`, links, equations, help texts, figures.

- `README.md` is the home page; `GUESTS` lists it and the other pages that live outside `docs/`.
- A link to a file outside `docs/` becomes a link to its page (`GUESTS`), to the object in the API reference
  (`src/vismem/memory/builder.py#QueryBuilder`), or to a copy of the file (`DATA`); otherwise only its text stays.
- Equations become MathML, which browsers render without a script.
- `<!-- help: vismem ask -->` becomes the output of that command's `--help`.
- `<!-- not run: reason -->` before a code block becomes a visible note.
- Figures of `drawing.py` are inlined, so that they follow the page's colour scheme.
- The search index is also written as a script, for pages opened from a folder.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from contextlib import redirect_stdout
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GUESTS = {  # pages whose files are outside docs/
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
DATA = ("results/", "examples/", "configs/", "LICENSE")  # may be copied into the site
COPIES = "files/"
CODE = re.compile(r"(^```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<image>!?)\[(?P<words>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")
IMAGE = re.compile(r'(?P<before><img [^>]*src=")(?P<target>[^"]+)"')
EQUATION = re.compile(r'<(?P<tag>div|span) class="arithmatex">(?P<tex>.*?)</(?P=tag)>', re.DOTALL)
HELP = re.compile(r"^<!-- help: vismem ?(?P<command>[^>]*?) -->$", re.MULTILINE)
NOT_RUN = re.compile(r"^<!-- not run: (?P<reason>.+?) -->$", re.MULTILINE)
DRAWN = re.compile(r'<img alt="(?P<alt>[^"]*)" src="(?P<file>[^"]*images/[a-z_]+\.svg)"[^>]*>')


def on_files(files, config):
    """Adds the pages from outside `docs/`, and copies of the data that pages link to."""
    for name, uri in GUESTS.items():
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    for file in list(files.documentation_pages()):
        for found in links(file.content_string):
            name = name_of(found["target"], file.src_uri)
            copied = COPIES + name if name else ""
            if name and is_data(name) and files.get_file_from_path(copied) is None:
                files.append(File.generated(config, copied, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites one page's text."""
    uri = page.file.src_uri
    markdown = HELP.sub(lambda found: help_of(found["command"]), markdown)
    parts = CODE.split(markdown)
    parts[::2] = [with_links(part, uri) for part in parts[::2]]
    return NOT_RUN.sub(r'<p class="not-run">Not run by the tests: \g<reason>.</p>\n', "".join(parts))


def on_page_content(html, page, config, files):
    """Inlines figures and converts equations."""
    html = EQUATION.sub(lambda found: mathml(found["tag"], found["tex"]), html)
    return DRAWN.sub(lambda found: figure(found, page.file.src_uri), html)


@event_priority(-100)  # after the search has written its own
def on_post_build(config):
    """Writes the search index as the script that the theme loads without a server."""
    folder = Path(config.site_dir) / "search"
    index = (folder / "search_index.json").read_text(encoding="utf-8")
    (folder / "search_index.js").write_text(f"var __index = {index}", encoding="utf-8")


# Links.


def links(markdown: str) -> list[re.Match]:
    """Returns the links and images of a page that may be files: neither in code nor on the web."""
    text = CODE.split(markdown)[::2]
    found = [match for part in text for pattern in (LINK, IMAGE) for match in pattern.finditer(part)]
    return [match for match in found if match["target"] and ":" not in match["target"]]


def name_of(target: str, uri: str) -> str:
    """Returns the path of a link's target from the repository's root, or "" if there is no such file."""
    home = next((ROOT / Path(name).parent for name, guest in GUESTS.items() if guest == uri), DOCS / Path(uri).parent)
    path = Path(os.path.normpath(home / target))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) and path.exists() else ""


def is_data(name: str) -> bool:
    """Returns whether the site may have a copy of a file."""
    return name.startswith(DATA) and (ROOT / name).is_file()


def place_of(name: str) -> str:
    """Returns where a file is in the site, or "" if it is not there."""
    if name in GUESTS:
        return GUESTS[name]
    return COPIES + name if is_data(name) else name.removeprefix("docs/") if name.startswith("docs/") else ""


def with_links(text: str, uri: str) -> str:
    """Returns a part of a page with the site's links."""

    def relative(place: str) -> str:
        return posixpath.relpath(place, posixpath.dirname(uri) or ".")

    def link(found: re.Match) -> str:
        target, anchor = found["target"], found["anchor"] or ""
        name = "" if not target or ":" in target else name_of(target, uri)
        if not name:
            return found[0]
        if place := place_of(name):
            return f"{found['image']}[{found['words']}]({relative(place)}{anchor})"
        if name.startswith("src/") and name.endswith(".py"):
            identifier = module(name) + anchor.replace("#", ".")
            return f'<autoref optional identifier="{identifier}">{found["words"]}</autoref>'
        return found["words"]

    def image(found: re.Match) -> str:
        place = place_of(name_of(found["target"], uri))
        return f'{found["before"]}{relative(place)}"' if place else found[0]

    return IMAGE.sub(image, LINK.sub(link, text))


def module(name: str) -> str:
    """Returns the module of a file below `src/`."""
    return name.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# Equations, help and figures.


def mathml(tag: str, tex: str) -> str:
    """Returns an equation of arithmatex as MathML, in a frame that scrolls where the page is narrower."""
    display = "block" if tag == "div" else "inline"
    return f'<{tag} class="equation">{convert(unescape(tex).strip()[2:-2].strip(), display=display)}</{tag}>'


def help_of(command: str) -> str:
    """Returns the output of `vismem COMMAND --help` as a text block."""
    from vismem.cli import main

    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "88"
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            code = main([*command.split(), "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    if code:
        raise ValueError(f"vismem {command} --help ended with {code}")
    return f"```text\n{printed.getvalue().rstrip()}\n```"


def figure(found: re.Match, uri: str) -> str:
    """Returns the SVG of a figure of `drawing.py`, in a frame that scrolls where the page is narrower."""
    path = DOCS / Path(os.path.normpath(Path(uri).parent / found["file"]))
    drawn = path.read_text(encoding="utf-8") if path.is_file() else ""
    if 'class="figure"' not in drawn:
        return found[0]
    return f'<span class="figure-frame" tabindex="0">{" ".join(drawn.split())}</span>'
