"""The options that name a model; `vismem.loading` loads it."""

from __future__ import annotations

import argparse

from vismem.cli.parsing import UsageError, say
from vismem.loading import DTYPES, Loaded, UnknownDeviceError, load_model, silence_libraries


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint", metavar="NAME", help="a memory: a folder or a hub repository (default: the pocket model's)"
    )
    group.add_argument("--base", metavar="NAME", help="a base model: a folder, a hub repository, or `pocket`")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if available)")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the base's)")
    group.add_argument("--trust-remote-code", action="store_true", help="let a hub repository run its own code")


def load(options: argparse.Namespace) -> Loaded:
    """Loads the base and its memory. Raises UsageError for an unknown device; others as `load_model`."""
    silence_libraries(debug=options.debug)
    try:
        return load_model(
            options.checkpoint, options.base, options.device, options.dtype, options.trust_remote_code, say
        )
    except UnknownDeviceError as error:
        raise UsageError(str(error)) from error
