"""The documentation site: it builds, its links work, it loads nothing from elsewhere, and it fits the screen."""

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
    assert len(pages) > 25
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
def test_figures_equations_links_and_help_are_in_the_pages(site):
    home, method = ((site / f"{name}.html").read_text(encoding="utf-8") for name in ("index", "method"))
    assert home.count('<svg xmlns="http://www.w3.org/2000/svg" class="figure"') == 1
    assert method.count('<svg xmlns="http://www.w3.org/2000/svg" class="figure"') == 2
    assert method.count('display="block"') >= 11 and "$$" not in method and "arithmatex" not in method
    assert 'href="api/memory.html#vismem.memory.builder.QueryBuilder' in method
    assert "autoref" not in re.sub(r'class="[^"]*"', "", method)
    helps = (site / "cli.html").read_text(encoding="utf-8")
    assert "<!-- help" not in helps and "usage: vismem ask" in helps
    for page in (site / "api").glob("*.html"):  # the docstrings' examples are code, not nested quotations
        assert "<blockquote" not in page.read_text(encoding="utf-8"), page


@pytest.fixture
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if chromium is None:
        pytest.skip("needs Chromium on the PATH")
    with playwright.sync_playwright() as play:
        launched = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def address(site):
    """The site, served."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@OF_THE_SITE
def test_the_site_in_a_browser(site, browser, address):
    """Search works without a network, the page has a dark theme, and no request leaves this machine."""
    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"{address}index.html")
    search(page, "counterfactual", "training.html")
    page.keyboard.press("Escape")
    page.click("label[title='Switch to the dark page']")
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []
    requested.clear()
    page.goto((site / "faq.html").as_uri())  # opened from the folder, without a server
    search(page, "retrieval", "faq.html")
    assert [url for url in requested if not url.startswith(("file:", "data:", "blob:"))] == []


OVERFLOWING = """() => [...document.querySelectorAll('pre > code')]
    .filter(code => code.scrollWidth > code.clientWidth || code.scrollHeight > code.clientHeight)
    .map(code => code.textContent.trim().split('\\n')[0])"""


@OF_THE_SITE
def test_pages_and_code_fit_a_wide_and_a_narrow_screen(site, browser, address):
    page = browser.new_page(color_scheme="light")
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        page.goto(address + name, wait_until="domcontentloaded")
        for width in (1400, 390):
            page.set_viewport_size({"width": width, "height": 900})
            for _ in range(50):  # the theme moves its drawer first
                if fits := page.evaluate("document.documentElement.scrollWidth") == width:
                    break
                page.wait_for_timeout(100)
            assert fits, f"{name} is wider than {width} px"
            assert page.evaluate(OVERFLOWING) == [], f"{name}: code is cut off at {width} px"


@OF_THE_SITE
def test_the_home_page_shows_a_picture_in_its_first_screen(browser, address):
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
    page.goto(f"{address}index.html")
    figure = page.locator("article .figure-frame").first.bounding_box()
    assert figure["y"] + figure["height"] / 2 < 900
    assert page.get_by_text("No trained memory of a real-size model exists yet").bounding_box()["y"] < 900


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
