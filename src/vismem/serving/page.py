"""Two static pages for browsers: an overview of the server, and the fields of a chat request."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from starlette.responses import HTMLResponse

from vismem import __version__

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
STYLE = (
    "body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 3rem auto; padding: 0 1rem }"
    "code { background: #8882; padding: 0 .2em } td { padding: .2em 1em .2em 0; vertical-align: top }"
)


def home(names: Sequence[str], schema: dict[str, Any]) -> HTMLResponse:
    """The overview page.

    Args:
        names: of the served models.
        schema: the OpenAPI schema.
    """
    models = "".join(f"<li><code>{escape(name)}</code></li>" for name in names)
    return page(
        f"<h1>VisMem {escape(__version__)}</h1>"
        f"<p>{escape(schema['info']['description'])} "
        "Point an OpenAI client at this address, path <code>/v1</code>.</p>"
        f"<h2>Models</h2><ul>{models}</ul><h2>Paths</h2>{paths(schema)}"
        '<p>Fields: <a href="/docs">/docs</a>. Schema: <a href="/openapi.json">/openapi.json</a>.</p>'
    )


def reference(schema: dict[str, Any]) -> HTMLResponse:
    """The reference page: paths, and the fields of a chat request."""
    default = "As in OpenAI's API."
    fields = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(field.get('description', default))}</td></tr>"
        for name, field in schema["components"]["schemas"]["ChatRequest"]["properties"].items()
    )
    return page(
        f'<p><a href="/">VisMem</a></p><h1>Paths</h1>{paths(schema)}<h1>Fields of a chat request</h1>'
        f"<table>{fields}</table><p>Types and responses are in <a href='/openapi.json'>/openapi.json</a>.</p>"
    )


def paths(schema: dict[str, Any]) -> str:
    """A table of all paths."""
    rows = (
        f"<tr><td><code>{method.upper()} {escape(path)}</code></td><td>{escape(operation['description'])}</td></tr>"
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    )
    return f"<table>{''.join(rows)}</table>"


def page(body: str) -> HTMLResponse:
    """An HTML page."""
    head = f'<meta charset="utf-8"><title>VisMem</title><style>{STYLE}</style>'
    content = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
    return HTMLResponse(content, headers={"Content-Security-Policy": POLICY})
