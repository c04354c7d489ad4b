"""The documentation's site: it builds, its links hold, and it loads nothing from elsewhere."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading

import documents
import pytest
from documents import ROOT

OF_THE_SITE = pytest.mark.xdist_group("site")  # built once


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built as `make docs` builds it."""
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    ran = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder.resolve()


@OF_THE_SITE
def test_no_link_or_anchor_is_broken(site):
    pages = documents.read_site(site)
    assert len(pages) > 30
    assert documents.broken(site, pages) == []


@OF_THE_SITE
def test_nothing_is_loaded_from_another_host(site):
    pages = documents.read_site(site)
    foreign = [(path.name, load) for path, page in pages.items() for load in page.loads if re.match(r"(\w+:)?//", load)]
    assert foreign == []
    for style in site.rglob("*.css"):
        asked = re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)", style.read_text(encoding="utf-8"))
        assert asked == [], style
    # The theme's script would fetch a library for these, and for nothing else that this site has.
    assert not any("mermaid" in page.classes for page in pages.values())


@OF_THE_SITE
def test_figures_are_in_the_page_and_help_is_the_commands_own(site):
    concept = (site / "concept.html").read_text(encoding="utf-8")
    assert concept.count('<svg xmlns="http://www.w3.org/2000/svg" class="figure"') == 3
    helps = (site / "cli.html").read_text(encoding="utf-8")
    assert "<!-- help" not in helps and "usage: vismem ask" in helps
    mapped = (site / "paper-to-code.html").read_text(encoding="utf-8")
    assert 'href="api/memory.html#vismem.memory.builder.QueryBuilder"' in mapped
    assert "autoref" not in re.sub(r'class="[^"]*"', "", mapped)
    for page in (site / "api").glob("*.html"):  # the docstrings' examples are code, not quotations in quotations
        assert "<blockquote" not in page.read_text(encoding="utf-8"), page


@OF_THE_SITE
def test_the_site_in_a_browser(site):
    """Search works without a network, the page has a dark side, and no request leaves this machine."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if chromium is None:
        pytest.skip("needs Chromium on the PATH")
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, playwright.sync_playwright() as play:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}/"
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme="light")
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            for name in ("index", "concept", "paper-to-code", "evidence", "cli", "api/training"):
                page.goto(f"{home}{name}.html")
                page.wait_for_selector("article h1")
                assert page.evaluate("document.documentElement.scrollWidth") == 360, f"{name} is wider than the screen"
            page.set_viewport_size({"width": 1280, "height": 800})
            page.goto(f"{home}index.html")
            search(page, "counterfactual", "training.html")
            page.keyboard.press("Escape")
            page.click("label[title='Switch to the dark page']")
            assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
            assert [url for url in asked if not url.startswith((home, "data:", "blob:"))] == []
            asked.clear()
            page.goto((site / "faq.html").as_uri())  # opened from the folder, with no server at all
            search(page, "retrieval", "faq.html")
            assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
        finally:
            browser.close()
            server.shutdown()


def search(page, word: str, found: str) -> None:
    """Types a word into the search, as a reader does, and waits until it names a page."""
    page.click("input.md-search__input")
    page.wait_for_function(
        "document.querySelector('.md-search-result__meta').textContent.trim() != 'Initializing search'"
    )
    page.keyboard.type(word, delay=20)
    page.wait_for_selector(f"a.md-search-result__link[href*='{found}']")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_) -> None:
        pass


def test_the_checker_finds_what_is_broken(tmp_path):
    (tmp_path / "one.html").write_text('<h1 id="top"></h1><a href="two.html#here">a</a><a href="#top">b</a>')
    (tmp_path / "two.html").write_text(
        '<a href="one.html#gone">a</a><a href="three.html">b</a><img src="x.png"><a href="https://a.org">c</a>'
    )
    said = documents.broken(tmp_path, documents.read_site(tmp_path))
    assert [line.partition(" (")[0] for line in said] == [
        "one.html: two.html#here",
        "two.html: one.html#gone",
        "two.html: three.html",
        "two.html: x.png",
    ]
