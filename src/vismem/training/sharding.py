"""Parameters sharded by FSDP2: prepared for it, and gathered where they are used or saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Parameter = tuple[nn.Module, str]  # the module that holds it, and its name there


def make_shardable(learner: nn.Module) -> set[Parameter]:
    """Gives scalar parameters a dimension, without which FSDP2 cannot shard them; returns which they are."""
    scalars = set()
    for module in learner.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if not p.dim():
                module.register_parameter(name, nn.Parameter(p.detach()[None], requires_grad=p.requires_grad))
                scalars.add((module, name))
    return scalars


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Keeps a wrapped model's parameters unsharded inside the context, for use outside its forward."""
    sharded: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


@contextmanager
def gathered(learner: nn.Module, scalars: set[Parameter]) -> Iterator[None]:
    """Replaces sharded parameters with whole tensors, as `state_dict` returns shards even inside `whole`."""
    places = [(module, name, p) for module in learner.modules() for name, p in module.named_parameters(recurse=False)]
    sharded: list[tuple[nn.Module, str, Any]] = [each for each in places if hasattr(each[2], "full_tensor")]
    try:
        for module, name, parameter in sharded:
            tensor = parameter.full_tensor()
            tensor = tensor[0] if (module, name) in scalars else tensor
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        yield
    finally:
        for module, name, parameter in sharded:
            module.register_parameter(name, parameter)
