"""Of all files on this computer, a visitor can ask about those that were dropped into the page, and no others.

Gradio copies every file that a request names to where it can be fetched. It looks at the names only in pages that it
launched itself, and this one is part of another application, so here is where they are looked at.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

log = logging.getLogger(__name__)
UNREADABLE = "The page said something that cannot be read: load it again."


class Blocks(gr.Blocks):
    """Gradio's page, whose events take no file but what was uploaded."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *more: Any, **named: Any) -> list[Any]:
        """What an event's function gets. Raises gr.Error if it cannot be read, or a file in it was not uploaded."""
        folder = os.path.realpath(get_upload_folder())
        for path in paths(inputs):
            if not isinstance(path, str) or "\0" in path or not inside(path, folder):
                raise gr.Error("That file was not dropped into this page: drop it in again.", print_exception=False)
        try:
            return await super().preprocess_data(block_fn, inputs, *more, **named)
        except Exception as error:  # gradio's parts raise what they like, and gradio prints where
            debugging = log.isEnabledFor(logging.DEBUG)
            log.warning("the event %s cannot be read: %s", block_fn.name, type(error).__name__, exc_info=debugging)
            said = error.message if isinstance(error, gr.Error) else UNREADABLE
            raise gr.Error(said, print_exception=False) from None


def paths(value: Any) -> Iterator[Any]:
    """Every file's path in what a browser sent, however deep."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from paths(each)


def inside(path: str, folder: str) -> bool:
    """Whether a file lies in the folder, by whatever links its name goes."""
    return os.path.realpath(path).startswith(folder + os.sep)
