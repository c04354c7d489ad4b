"""Trained parameters that FSDP2 keeps in shards: made fit for it, and held whole where they are used or saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

Place = tuple[nn.Module, str]


def make_shardable(learner: nn.Module) -> set[Place]:
    """Gives parameters that are one number a dimension, as FSDP2 shards none without; returns where they are."""
    numbers = set()
    for module in learner.modules():
        for name, p in module._parameters.items():
            if p is not None and not p.dim():
                module._parameters[name] = nn.Parameter(p.detach()[None], requires_grad=p.requires_grad)
                numbers.add((module, name))
    return numbers


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Holds a wrapped model's parameters unsharded, for use outside its forward; without shards, does nothing."""
    sharded = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


@contextmanager
def gathered(learner: nn.Module, numbers: set[Place]) -> Iterator[None]:
    """Puts whole tensors in the places of sharded parameters, as `state_dict` gives shards even within `whole`."""
    places = [(module, name, p) for module in learner.modules() for name, p in module._parameters.items()]
    sharded = [(module, name, p) for module, name, p in places if hasattr(p, "full_tensor")]
    try:
        for module, name, parameter in sharded:
            tensor = parameter.full_tensor()
            tensor = tensor[0] if (module, name) in numbers else tensor
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter
