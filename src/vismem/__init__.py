"""VisMem: short-term and long-term latent vision memory for any vision-language model (arXiv 2511.11007)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vismem import deprecation

if TYPE_CHECKING:
    from vismem import invocation
    from vismem.config import VisMemConfig
    from vismem.decoding.output import NonFiniteError
    from vismem.decoding.queue import Answer, Request, RequestQueue
    from vismem.decoding.trace import Invocation, VisMemOutput
    from vismem.loading import load
    from vismem.model import VisMem

deprecation.install()

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Invocation",
    "NonFiniteError",
    "Request",
    "RequestQueue",
    "VisMem",
    "VisMemConfig",
    "VisMemOutput",
    "invocation",
    "load",
]

# Imported when first asked for, so that `vismem --help` does not wait for torch.
_HOMES = {
    "Answer": "vismem.decoding.queue",
    "Invocation": "vismem.decoding.trace",
    "NonFiniteError": "vismem.decoding.output",
    "Request": "vismem.decoding.queue",
    "RequestQueue": "vismem.decoding.queue",
    "VisMem": "vismem.model",
    "VisMemConfig": "vismem.config",
    "VisMemOutput": "vismem.decoding.trace",
    "load": "vismem.loading",
}


if not TYPE_CHECKING:  # or a misspelt name would have a type

    def __getattr__(name: str) -> Any:
        if name == "invocation":
            return import_module("vismem.invocation")
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'vismem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
