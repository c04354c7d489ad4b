"""`vismem app`: serves the viewer of `vismem.app` to a browser, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import webbrowser
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from vismem.cli.model_options import add_model_options, load
from vismem.cli.parsing import CommandError, command_parser, echo, say, whole

FIRST_PORT, PORTS = 7860, 100  # the first port to try, and how many
PASSWORD_VARIABLE = "VISMEM_APP_PASSWORD"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "vismem app",
        "Opens the model in your browser: ask about images, and click an invocation of memory to see what happened.",
        "vismem app --checkpoint runs/shelves/stage2/memory --port 8000",
    )
    page = parser.add_argument_group("page")
    page.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this computer only)",
    )
    page.add_argument(
        "--port",
        type=whole(0, 65535),
        metavar="N",
        help=f"port to listen on, 0 for any free one (default: the first free one from {FIRST_PORT})",
    )
    page.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help=f"file with the visitors' password; or set {PASSWORD_VARIABLE} (default: no password)",
    )
    browser = page.add_mutually_exclusive_group()
    browser.add_argument(
        "--open", action="store_true", default=None, help="open the page in your browser (default: if there is one)"
    )
    browser.add_argument("--no-browser", action="store_false", dest="open", help="only print the address")
    add_model_options(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    for name in ("gradio", "jinja2"):
        if find_spec(name) is None:
            raise CommandError(f'the viewer needs {name}: pip install "vismem[app]"')

    from vismem.serving.guards import is_loopback
    from vismem.serving.lifespan import Server, address_of, config_of, serve

    password = read_password(options.password_file, os.environ)
    bound = free_socket(options.host, options.port)  # fails before the model is loaded
    loaded = load(options)

    from vismem.app.chat import Chat
    from vismem.app.web import uploads, web

    with uploads():
        chat = Chat(loaded)
        try:
            address, here = address_of(bound), bound.getsockname()[0]
            server = Server(config_of(web(chat, here, password), grace=1), on_stop=chat.leave_all)
            if password is None and not is_loopback(here):
                say(f"note: without --password-file, anyone who can reach {here} can use the viewer")
            echo(f"VisMem is at {address} - Ctrl-C stops it")
            if has_browser() if options.open is None else options.open:
                webbrowser.open(address)
            serve(server, bound)
        finally:
            chat.close()
    return 0


def read_password(file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The viewer's password, or None. Raises CommandError if the file cannot be read, or the password is empty."""
    password = environ.get(PASSWORD_VARIABLE)
    if file is not None:
        try:
            password = file.read_text("utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CommandError(f"cannot read the viewer's password from {file}: {reason}") from None
    if password is not None and not password.strip():
        raise CommandError(f"the viewer's password in {file or PASSWORD_VARIABLE} is empty")
    return None if password is None else password.strip()


def has_browser() -> bool:
    """Whether a graphical browser is likely."""
    if sys.platform in ("darwin", "win32"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def free_socket(host: str, port: int | None) -> socket.socket:
    """A listening socket at that port; None is the first free one. Raises ValueError if it cannot be used."""
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
