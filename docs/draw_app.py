"""Draws the pictures of docs/app.md: the viewer on the pocket model, as a browser shows it.

Starts a viewer and clicks through it: python docs/draw_app.py
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from vismem.app.chat import Chat
from vismem.app.web import uploads, web
from vismem.loading import load_model, silence_libraries
from vismem.serving.lifespan import Server, address_of, config_of, listening_socket

CHIP = ".vm-answer .vm-chip"


@contextmanager
def viewer() -> Iterator[str]:
    """Serves the pocket model's viewer; gives its address."""
    silence_libraries(False)
    with uploads():
        chat, bound = Chat(load_model(device="cpu")), listening_socket("127.0.0.1", 0)
        server = Server(config_of(web(chat, "127.0.0.1"), grace=1))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
        thread.start()
        try:
            yield address_of(bound)
        finally:
            server.should_exit = True
            thread.join()
            chat.close()


def opened(browser: Browser, address: str, size: tuple[int, int], scheme: str = "light", scale: float = 1.0) -> Page:
    """The page, with nothing asked yet."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, device_scale_factor=scale
    )
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(".ui-card")
    page.wait_for_selector(".ui-more")
    return page


def example(page: Page, number: int) -> None:
    """Picks an example and waits for its answer."""
    page.click(f"[data-example='{number}']")
    written(page, 1)


def written(page: Page, turns: int) -> None:
    page.wait_for_function(
        f"document.querySelectorAll('.ui-turn').length === {turns} && !document.querySelector('[aria-busy]')"
    )


def chip(page: Page, number: int, within: str = "") -> None:
    """Opens a chip's panel."""
    page.locator(f"{within} {CHIP}").nth(number).click()
    page.wait_for_selector("#ui-right .vm-panel")


def shot(page: Page, path: Path) -> None:
    """A screenshot, in 256 colours."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(800)
    few_colours(Image.open(BytesIO(page.screenshot())).convert("RGB")).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    page.context.close()


def few_colours(image: Image.Image) -> Image.Image:
    """The image in 256 colours: half of them near the most frequent ones, half so that none is far from its own."""
    palette = Image.new("P", (1, 1))
    halves = [
        image.quantize(128, method, kmeans=3) for method in (Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE)
    ]
    palette.putpalette([value for half in halves for value in half.getpalette()[: 3 * 128]])
    return image.quantize(palette=palette, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    out = parser.parse_args().out
    wide, high, narrow = (1360, 850), (1360, 980), (360, 740)
    with viewer() as address, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        shot(opened(browser, address, wide), out / "app-light.png")

        page = opened(browser, address, high)
        example(page, 1)
        chip(page, 0)
        shot(page, out / "app-short.png")

        page = opened(browser, address, wide)
        example(page, 1)
        chip(page, 1)
        page.locator("#ui-right .vm-mirror").scroll_into_view_if_needed()
        shot(page, out / "app-long.png")

        page = opened(browser, address, high)
        example(page, 1)
        page.check("#ui-compare input")
        page.click(".ui-pill >> nth=1")
        written(page, 2)
        shot(page, out / "app-compare.png")

        page = opened(browser, address, high, "dark")
        example(page, 3)
        chip(page, 2)
        shot(page, out / "app-dark.png")

        page = opened(browser, address, narrow, scale=1.5)
        example(page, 1)
        page.evaluate("scrollTo(0, 0)")
        shot(page, out / "app-narrow.png")
        browser.close()


if __name__ == "__main__":
    main()
