"""Lets visitors ask only about files they uploaded, not about others on this machine.

Gradio copies every file named in a request to a place it serves. It checks the names only in pages that it launched
itself; this page is mounted into another application, so they are checked here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

log = logging.getLogger(__name__)
INVALID_EVENT = "The page sent an invalid request: reload it."


class Blocks(gr.Blocks):
    """A gradio page whose events accept uploaded files only."""

    # Not in gradio's documented interface, but the one place all inputs go through; tested with gradio 6.31.0.
    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **named: Any) -> list[Any]:
        """An event's inputs. Raises gr.Error if one is invalid or names a file that was not uploaded."""
        folder = os.path.realpath(get_upload_folder())
        for path in paths(inputs):
            if not isinstance(path, str) or "\0" in path or not inside(path, folder):
                raise gr.Error("That file was not uploaded to this page: upload it again.", print_exception=False)
        try:
            return await super().preprocess_data(block_fn, inputs, *more, **named)
        except Exception as error:  # components raise errors of any type, and gradio would print the traceback
            debugging = log.isEnabledFor(logging.DEBUG)
            log.warning("invalid event %s: %s", block_fn.name, type(error).__name__, exc_info=debugging)
            message = error.message if isinstance(error, gr.Error) else INVALID_EVENT
            raise gr.Error(message, print_exception=False) from None


def paths(value: Any) -> Iterator[Any]:
    """Every file path in what a browser sent, at any depth."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from paths(each)


def inside(path: str, folder: str) -> bool:
    """Whether a file is in the folder once symbolic links are resolved."""
    return os.path.realpath(path).startswith(folder + os.sep)
