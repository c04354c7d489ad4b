"""Attention weights of the base's language model, layer by layer, while it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from vismem.backbones import Backbone


def attention_layers(backbone: Backbone) -> list[nn.Module]:
    """The language model's attention modules, layer by layer.

    Raises:
        ValueError: if a layer has no attention.
    """
    layers = getattr(backbone.language_model, "layers", None) or []
    found: list[Any] = [getattr(layer, "self_attn", None) for layer in layers]
    if not found or any(attention is None for attention in found):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        raise ValueError(
            f"the language model of {backbone.model_type} has layers without attention ({kinds}); only layers "
            "with `self_attn` return weights"
        )
    return found


@contextmanager
def eager_attention(backbone: Backbone) -> Iterator[None]:
    """Switches the base's language model to eager attention while the context lasts."""
    # Set on the private attribute, as `set_attn_implementation` does, because that method refuses remote code.
    config: Any = backbone.language_model.config
    before = config._attn_implementation  # noqa: SLF001 - tested with transformers 5.23.0
    config._attn_implementation = "eager"  # noqa: SLF001
    try:
        yield
    finally:
        config._attn_implementation = before  # noqa: SLF001


@contextmanager
def attention_weights(backbone: Backbone, receive: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Runs the language model with eager attention and passes on each layer's weights as it computes them.

    Only the tokens that are read are computed: with a cached prefix, those after it.

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

    with eager_attention(backbone), ExitStack() as stack:
        for index, layer in enumerate(attention_layers(backbone)):
            stack.callback(layer.register_forward_hook(partial(hook, index)).remove)
        yield
