"""What mkdocs is told to do besides building pages: links out of `docs/`, help texts, figures, marks of code.

- A link to a file outside of `docs/` leads to that file's page where it has one (`GUESTS`), to the object in the API's
  pages where it is a module, to a copy of the file in the site where it is data; otherwise only its words stay.
- `<!-- help: vismem ask -->` becomes what that command prints with `--help`.
- `<!-- not run: reason -->` before a code block becomes a line that says so.
- In `paper-to-code.md` names of objects lead to their place in the API's pages.
- The index of the search is written as a script too, for pages that are opened from a folder.
- Figures of `drawing.py` are put into the page, so that they follow its light or dark side.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
from contextlib import redirect_stdout
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GUESTS = {  # pages whose files lie elsewhere, since they are read there too
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
DATA = ("results/", "examples/", "configs/", "LICENSE")  # what may be copied into the site
COPIES = "files/"
CODE = re.compile(r"(^```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<image>!?)\[(?P<words>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")
HELP = re.compile(r"^<!-- help: vismem ?(?P<command>[^>]*?) -->$", re.MULTILINE)
NOT_RUN = re.compile(r"^<!-- not run: (?P<reason>.+?) -->$", re.MULTILINE)
MAPPED = re.compile(r"(?P<file>`(?P<path>[a-z_0-9/]+\.py)`) \| (?P<names>`[^|]+`) \|$", re.MULTILINE)
DRAWN = re.compile(r'<img alt="(?P<alt>[^"]*)" src="(?P<file>[^"]*images/[a-z_]+\.svg)"[^>]*>')


def on_files(files, config):
    """Adds the pages that lie elsewhere, and copies of the data that pages link to."""
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
    if uri == "paper-to-code.md":
        markdown = MAPPED.sub(lambda found: f"{found['file']} | {referred(found['path'], found['names'])} |", markdown)
    parts = CODE.split(markdown)
    parts[::2] = [with_links(part, uri) for part in parts[::2]]
    return NOT_RUN.sub(r'<p class="not-run">Not run by the tests: \g<reason>.</p>\n', "".join(parts))


def on_page_content(html, page, config, files):
    """Puts figures into the page."""
    return DRAWN.sub(lambda found: figure(found, page.file.src_uri), html)


@event_priority(-100)  # after the search has written its own
def on_post_build(config):
    """Writes the search's index once more, as the script that the theme loads where there is no server."""
    folder = Path(config.site_dir) / "search"
    index = (folder / "search_index.json").read_text(encoding="utf-8")
    (folder / "search_index.js").write_text(f"var __index = {index}", encoding="utf-8")


# Links.


def links(markdown: str) -> list[re.Match]:
    """The links of a page that may be files: neither of code nor of the web."""
    found = [match for part in CODE.split(markdown)[::2] for match in LINK.finditer(part)]
    return [match for match in found if match["target"] and ":" not in match["target"]]


def name_of(target: str, uri: str) -> str:
    """The path from the root of the repository that a page's link means; empty where it means nothing there."""
    home = next((Path(name).parent for name, guest in GUESTS.items() if guest == uri and name != "README.md"), None)
    base = DOCS / Path(uri).parent if home is None else ROOT / home
    path = Path(os.path.normpath(base / target))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) and path.exists() else ""


def is_data(name: str) -> bool:
    """Whether a file is one that the site may have a copy of."""
    return name.startswith(DATA) and (ROOT / name).is_file()


def with_links(text: str, uri: str) -> str:
    """A part of a page with its links as the site has them."""

    def replaced(found: re.Match) -> str:
        target = found["target"]
        name = "" if not target or ":" in target else name_of(target, uri)
        if not name:
            return found[0]
        if name.startswith("docs/"):
            place = name.removeprefix("docs/")
        elif name in GUESTS:
            place = GUESTS[name]
        elif is_data(name):
            place = COPIES + name
        elif name.startswith("src/") and name.endswith(".py"):
            return f'<autoref optional identifier="{module(name)}">{found["words"]}</autoref>'
        else:
            return found["words"]
        where = posixpath.relpath(place, posixpath.dirname(uri) or ".")
        return f"{found['image']}[{found['words']}]({where}{found['anchor'] or ''})"

    return LINK.sub(replaced, text)


def module(name: str) -> str:
    """The module of a file, named from the root of the repository or from `src/vismem/`."""
    path = name.removeprefix("src/").removeprefix("vismem/").removesuffix(".py").removesuffix("/__init__")
    return "vismem" if path == "__init__" else f"vismem.{path.replace('/', '.')}"


def referred(path: str, names: str) -> str:
    """Names of objects of one file, each leading to its place in the API's pages where it has one."""
    home = module(path)
    return re.sub(
        r"`([A-Za-z_][\w.]*)`",
        lambda found: f'<autoref optional identifier="{home}.{found[1]}"><code>{found[1]}</code></autoref>',
        names,
    )


# Help and figures.


def help_of(command: str) -> str:
    """What `vismem COMMAND --help` prints, as a block of text."""
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
    """A drawn figure's own SVG, in a frame that scrolls where the page is narrower; any other picture as it is."""
    path = DOCS / Path(os.path.normpath(Path(uri).parent / found["file"]))
    drawn = path.read_text(encoding="utf-8") if path.is_file() else ""
    if 'class="figure"' not in drawn:
        return found[0]
    return f'<span class="figure-frame" tabindex="0">{" ".join(drawn.split())}</span>'
