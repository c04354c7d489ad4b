"""`vismem app`: a page in the browser to ask the model, watch memory being invoked, and look into each invocation.

The page is `vismem.app`'s; here are its options, its address, and its end.
"""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from vismem.cli.model_options import add_model_options, load
from vismem.cli.parsing import Failure, Parser, command_parser, echo, say, whole

FIRST_PORT, PORTS = 7860, 100  # where a free port is looked for, and how many are tried
PASSWORD_VARIABLE = "VISMEM_APP_PASSWORD"


def parser() -> Parser:
    found = command_parser(
        "vismem app",
        "Shows the model in your browser: ask about images, and click where memory was invoked to see what happened.",
        "vismem app --checkpoint runs/shelves/stage2/memory --port 8000",
    )
    page = found.add_argument_group("page")
    page.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen (default: 127.0.0.1, this computer alone)",
    )
    page.add_argument(
        "--port",
        type=whole(0, 65535),
        metavar="N",
        help=f"port to listen on, 0 for any (default: the first free one from {FIRST_PORT} on)",
    )
    page.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help=f"a file with the password that visitors must know; or {PASSWORD_VARIABLE} (default: none is asked for)",
    )
    browser = page.add_mutually_exclusive_group()
    browser.add_argument(
        "--open", action="store_true", default=None, help="open the page in your browser (default: where there is one)"
    )
    browser.add_argument("--no-browser", action="store_false", dest="open", help="only print the address")
    add_model_options(found)
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    return parser().parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    for name in ("gradio", "jinja2"):
        if find_spec(name) is None:
            raise Failure(f'the viewer needs {name}: pip install "vismem[app]"')

    from vismem.serving.checks import is_loopback
    from vismem.serving.lifespan import Server, address_of, config_of, serve

    password = read_password(options.password_file, os.environ)
    bound = free_socket(options.host, options.port)  # before a model is loaded
    loaded = load(options)

    from vismem.app.chat import Chat
    from vismem.app.web import uploads, web

    with uploads():
        chat = Chat(loaded)
        try:
            address, here = address_of(bound), bound.getsockname()[0]
            server = Server(config_of(web(chat, here, password), grace=1), on_stop=chat.leave_all)
            if password is None and not is_loopback(here):
                say(f"note: without --password-file, whoever reaches {here} can ask")
            echo(f"VisMem is at {address} - Ctrl-C stops it")
            if has_browser() if options.open is None else options.open:
                webbrowser.open(address)
            serve(server, bound)
        finally:
            chat.close()
    return 0


def read_password(file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The password of the viewer, or None where none is wanted.

    Raises:
        Failure: if the file cannot be read, or the password is empty.
    """
    found = environ.get(PASSWORD_VARIABLE)
    if file is not None:
        try:
            found = file.read_text("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise Failure(f"cannot read the viewer's password from {file}: {reason}") from None
    if found is not None and not found.strip():
        raise Failure(f"the viewer's password in {file or PASSWORD_VARIABLE} is empty; write one there")
    return None if found is None else found.strip()


def has_browser() -> bool:
    """Whether there is likely to be a browser with a window."""
    if sys.platform in ("darwin", "win32"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def free_socket(host: str, port: int | None):
    """A listening socket at that port, or at the first free one.

    Raises:
        ValueError: if there is none.
    """
    from vismem.serving.lifespan import listening_socket

    if port is not None:
        return listening_socket(host, port)
    for each in range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            return listening_socket(host, each)
        except ValueError as error:
            if "in use" not in str(error):
                raise
    return listening_socket(host, 0)
