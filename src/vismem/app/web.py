"""The page as a web application: its looks, its exports, and what keeps it on this machine.

No font, script or count goes to another host: the theme has system fonts only, gradio's analytics are off, and the
browser is told to refuse everything that is not the page's own.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vismem.app import rendering
from vismem.app.page import build
from vismem.app.panels import CSS
from vismem.app.sharing import exported
from vismem.app.studio import Studio
from vismem.serving.checks import Check, Hosts, Origins, digest, hosts_for
from vismem.serving.errors import ApiError

LARGEST_FILE = "64mb"  # of an upload
SANS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace"]
OWN = "'self' data: blob: 'unsafe-inline' 'unsafe-eval'"  # gradio's scripts are inline, and make functions
HEADERS = {
    "Content-Security-Policy": f"default-src {OWN}; frame-ancestors 'self'; form-action 'self'; base-uri 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def theme() -> gr.themes.Base:
    """Gradio's own parts in this page's colours, which `page.css` defines for light and dark."""
    found = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        font=SANS,
        font_mono=MONO,
        radius_size=gr.themes.sizes.radius_md,
    )
    plain: dict[str, str] = {
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
    valid = set(vars(found))
    both = {f"{name}_dark": value for name, value in plain.items() if f"{name}_dark" in valid}
    return found.set(**plain, **both)


class OwnName(Hosts):
    """Refuses to be called by another name than this computer's own."""

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Hosts`."""
        return ApiError(403, "the viewer does not answer to that name") if super().wrong(scope, headers) else None


class OwnPages(Origins):
    """Refuses what a web page of another origin makes the browser send."""

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Origins`."""
        return ApiError(403, "other pages may not use the viewer") if super().wrong(scope, headers) else None


class Password(Check):
    """Asks for a password, as HTTP's Basic authentication does; any name goes with it."""

    def __init__(self, app: ASGIApp, password: str) -> None:
        super().__init__(app)
        self.digest = digest(password.encode())

    def wrong(self, scope: Scope, headers: Headers) -> ApiError | None:
        """See `Check`."""
        given = headers.getlist("authorization")
        scheme, _, coded = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        try:
            found = base64.b64decode(coded.strip(), validate=True).partition(b":")[2]
        except ValueError:
            found = b""
        if hmac.compare_digest(digest(found), self.digest) and scheme.lower() == "basic":
            return None
        asking = {"WWW-Authenticate": 'Basic realm="VisMem", charset="UTF-8"'}
        return ApiError(401, "the viewer needs its password; any user name goes with it", headers=asking)


class Sealed:
    """Tells browsers to load nothing from elsewhere, and to show the page in no other site's frame."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, sealed)


def web(studio: Studio, address: str, password: str | None = None) -> ASGIApp:
    """The page as a web application, with the place that exports are fetched from.

    Args:
        studio: what it is a page of.
        address: where it listens. On loopback it answers to loopback's names alone, and nowhere to other sites' pages.
        password: what visitors must know, if there is one.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/export/{key}")
    async def export(key: str) -> Response:
        for conversation in list(studio.visitors.values()):
            if conversation.key == key:
                name = {"Content-Disposition": 'attachment; filename="vismem-conversation.html"'}
                return HTMLResponse(await asyncio.to_thread(exported, studio, conversation), headers=name)
        return PlainTextResponse("This conversation is gone: it was closed, or begun anew.", status_code=404)

    # As a style of our own, which gradio does not rewrite; the fragments' rules are nested, to outweigh its resets.
    style = f":root {{ {CSS} }}\n{rendering.static('page.css')}"
    gr.mount_gradio_app(
        app,
        build(studio),
        path="",
        theme=theme(),
        head=f"<style>{style}</style>",
        footer_links=[],
        show_error=False,
        max_file_size=LARGEST_FILE,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
    )
    hosts = hosts_for(address)
    guarded = OwnPages(app if password is None else Password(app, password))
    return Sealed(guarded if hosts is None else OwnName(guarded, hosts))


@contextmanager
def uploads() -> Iterator[Path]:
    """A folder for what is dropped into the page; it is gone afterwards."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="vismem-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before
