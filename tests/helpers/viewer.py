"""Fixtures that serve the viewer from this process and open it in a real browser."""

from __future__ import annotations

import asyncio
import shutil
import threading
from contextlib import contextmanager

import pytest

pytest.importorskip("gradio", reason="the viewer's extra is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect, sync_playwright

from vismem.app.chat import Chat
from vismem.app.examples import examples
from vismem.app.web import uploads, web
from vismem.loading import load_model
from vismem.serving.lifespan import Server, address_of, config_of, listening_socket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MARKS = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH"),
    pytest.mark.xdist_group("viewer"),  # one server and one browser
]
BOUND = 60  # seconds after which a test gives up
WIDE, NARROW = {"width": 1360, "height": 860}, {"width": 360, "height": 740}
CHIP, PANEL = ".vm-answer .vm-chip", "#ui-right .vm-panel"
expect.set_options(timeout=BOUND * 1000)


@pytest.fixture(scope="module")
def chat():
    made = Chat(load_model(device="cpu"))
    yield made
    made.close()


@contextmanager
def served(app):
    """Serves an application; yields its address."""
    bound = listening_socket("127.0.0.1", 0)
    server = Server(config_of(app, grace=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    yield address_of(bound)
    server.should_exit = True
    thread.join(BOUND)
    bound.close()


@pytest.fixture(scope="module")
def address(chat):
    """Address of the served viewer."""
    with uploads(), served(web(chat, "127.0.0.1")) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def visits(browser, address):
    """Opens the page as a new visitor; fails at the end on console errors or requests to other hosts."""
    contexts, wrong = [], []

    def opened(size=WIDE, **settings):
        context = browser.new_context(viewport=size, accept_downloads=True, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(BOUND * 1000)
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if elsewhere(request.url) else None)
        page.goto(address)
        expect(page.locator(".ui-card")).to_have_count(len(examples()))
        return page

    def elsewhere(url):
        return not url.startswith((f"{address}/", "data:", "blob:"))

    yield opened
    for context in contexts:
        context.close()
    assert not wrong, wrong


@pytest.fixture
def visit(browser, address):
    """`visits` for one test."""
    with visits(browser, address) as opened:
        yield opened


def ask(page, question):
    page.locator("#ui-composer textarea").fill(question)
    page.keyboard.press("Enter")


def written(page, turns=1):
    """Waits until that many turns are finished."""
    expect(page.locator(".ui-turn:has(.ui-facts)")).to_have_count(turns)
    expect(page.locator("[aria-busy]")).to_have_count(0)
