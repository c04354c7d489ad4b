"""Attention weights of the base's language model, layer by layer, while it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from vismem.backbones import Backbone


@contextmanager
def attention_weights(backbone: Backbone, receive: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Runs the language model with eager attention and passes on each layer's weights as it computes them.

    The weights cover the tokens read: with a cached prefix, those after it.

    Args:
        backbone: of the base.
        receive: called with the layer's index and its weights [n, heads, queries, keys].

    Raises:
        ValueError: if a layer has no attention, or returns no weights.
    """

    def hook(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise ValueError(
                f"layer {layer} of the language model returns no attention weights, even with eager attention"
            )
        receive(layer, weights)

    language: Any = backbone.language_model
    layers = getattr(language, "layers", None) or []
    if not layers or any(getattr(layer, "self_attn", None) is None for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        raise ValueError(
            f"the language model of {backbone.model_type} has layers without attention ({kinds}); only layers "
            "with `self_attn` return weights"
        )
    # Set on the private attribute, as `set_attn_implementation` does, because that method refuses remote code.
    before = language.config._attn_implementation  # noqa: SLF001 - tested with transformers 5.23.0
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.self_attn.register_forward_hook(partial(hook, index)).remove)
        stack.callback(setattr, language.config, "_attn_implementation", before)
        language.config._attn_implementation = "eager"  # noqa: SLF001
        yield
