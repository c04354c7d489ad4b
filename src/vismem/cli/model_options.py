"""The options that name a model, and the model that they mean; loading itself is `vismem.loading`'s."""

from __future__ import annotations

import argparse

from vismem.cli.parsing import Misuse, say
from vismem.loading import DTYPES, Loaded, UnknownDeviceError, load_model, silence_libraries

__all__ = ["Loaded", "add_model_options", "load", "silence_libraries"]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a model; `load` reads them."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint", metavar="NAME", help="a memory: a folder or a hub repository (default: pocket's)"
    )
    group.add_argument("--base", metavar="NAME", help="a base model: a folder, a hub repository, or `pocket`")
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: a GPU where there is one)"
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the base's own)")
    group.add_argument("--trust-remote-code", action="store_true", help="let a hub repository run its own code")


def load(options: argparse.Namespace) -> Loaded:
    """Loads the base and equips it with its memory.

    Raises:
        Misuse: if the device has no such name.
        ValueError, OSError: if something is missing, damaged, or does not fit together; one line each.
    """
    silence_libraries(debug=options.debug)
    try:
        return load_model(
            options.checkpoint, options.base, options.device, options.dtype, options.trust_remote_code, say
        )
    except UnknownDeviceError as error:
        raise Misuse(str(error)) from error
