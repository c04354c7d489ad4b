"""The page as an ASGI application, with its theme and its exports.

Nothing goes to another host: the theme uses system fonts, gradio's analytics are off, and headers set in `guards.py`
keep the browser from loading anything else.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
os.environ["GRADIO_RUN_HISTORY"] = "False"  # otherwise visitors could store runs on a hub with the owner's token

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from vismem.app import rendering
from vismem.app.chat import Chat
from vismem.app.export import exported
from vismem.app.guards import guarded
from vismem.app.page import build
from vismem.app.panels import CSS

MAX_FILE = "64mb"  # per file
SANS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace"]


def theme() -> gr.themes.Base:
    """Gradio's components in this page's colours, which `page.css` defines for light and dark."""
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        font=SANS,
        font_mono=MONO,
        radius_size=gr.themes.sizes.radius_md,
    )
    light: dict[str, str] = {
        "body_background_fill": "var(--ui-ground)",
        "background_fill_primary": "var(--ui-card)",
        "background_fill_secondary": "var(--ui-well)",
        "block_background_fill": "transparent",
        "block_border_width": "0px",
        "block_label_text_color": "var(--ui-faint)",
        "block_title_text_color": "var(--ui-ink)",
        "block_info_text_color": "var(--ui-faint)",
        "body_text_color": "var(--ui-ink)",
        "body_text_color_subdued": "var(--ui-faint)",
        "border_color_primary": "var(--ui-line)",
        "input_background_fill": "var(--ui-card)",
        "input_border_color": "var(--ui-line)",
        "input_placeholder_color": "var(--ui-faint)",
        "color_accent": "var(--ui-short)",
        "slider_color": "var(--ui-short)",
        "checkbox_background_color_selected": "var(--ui-short)",
        "checkbox_border_color_selected": "var(--ui-short)",
    }
    valid = set(vars(base))
    dark = {f"{name}_dark": value for name, value in light.items() if f"{name}_dark" in valid}
    return base.set(**light, **dark)


def web(chat: Chat, address: str, password: str | None = None) -> ASGIApp:
    """The page as an ASGI application, which also serves exports.

    Args:
        chat: answers the questions.
        address: where it listens. On loopback it accepts only loopback host names; other origins are always refused.
        password: that visitors must enter; by default none.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/export/{key}")
    async def export(key: str) -> Response:
        conversation = chat.by_key(key)
        if conversation is None:
            return PlainTextResponse(
                "This conversation is gone: it was closed, or a new one was started.", status_code=404
            )
        headers = {"Content-Disposition": 'attachment; filename="vismem-conversation.html"'}
        return HTMLResponse(await asyncio.to_thread(exported, chat, conversation), headers=headers)

    # In <head>, where gradio does not rewrite it; the fragments' rules are nested to take precedence over its resets.
    style = f":root {{ {CSS} }}\n{rendering.static('page.css')}"
    gr.mount_gradio_app(
        app,
        build(chat),
        path="",
        theme=theme(),
        head=f"<style>{style}</style>",
        footer_links=[],
        show_error=False,
        max_file_size=MAX_FILE,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
    )
    return guarded(app, address, password)


@contextmanager
def uploads() -> Iterator[Path]:
    """A temporary folder for uploads; deleted on exit."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="vismem-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before
