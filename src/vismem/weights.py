"""What a file of weights must be before it is believed: of the sizes that its config says, floating and finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from vismem.config import VisMemConfig


def read_state(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        content: of the file.
        path: where it was read from, for the message.

    Raises:
        ValueError: if it is no whole safetensors file.
    """
    try:
        return load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise ValueError(f"{path} is damaged: it is no whole safetensors file ({error})") from error


def check_sizes(state: Mapping[str, Tensor], path: Path, config: VisMemConfig, hidden_size: int, merge: int) -> None:
    """Holds the sizes that a config gives against the tensors, before anything of these sizes is made.

    Args:
        state: the tensors of `vismem.safetensors`.
        path: of that file, for the message.
        config: read from beside it.
        hidden_size: of the base.
        merge: m, of the base: its projector turns m * m memory positions into one vector.

    Raises:
        ValueError: where they differ; names the field, both values and the file.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def size(name: str, axis: int) -> int | None:
        shape = shapes.get(f"memory.{name}", ())
        return shape[axis] if axis < len(shape) else None

    short, pooled = size("short.memory_init", 0), "memory.short.query_mix" in shapes
    found: dict[str, int | None]
    if config.content == "soft":
        found = {"short_length": size("short.vectors", 0), "long_length": size("long.vectors", 0)}
    else:
        blocks = {name.split(".")[3] for name in shapes if name.startswith("memory.builder.blocks.")}
        ranks = {shape[0] for name, shape in shapes.items() if shape and name.endswith(".down.weight")}
        found = {
            "query_length": size("builder.query_init", 0),
            "builder_layers": len(blocks),
            "builder_width": size("builder.query_init", 1),
            "short_length": None if short is None else short // merge**2,
            "long_length": size("long.memory_init", 0),
            "lora_r": min(ranks, key=lambda rank: rank == config.lora_r, default=None),
        }
    for name, value in found.items():
        said = config.inner_width(hidden_size) if name == "builder_width" else getattr(config, name)
        if said != value:
            held = "no such tensor" if value is None else value
            raise ValueError(f"{path} does not match its config: {name} is {said} there, and {held} in the weights")
    if config.content == "formed" and pooled != (config.memory_init == "pooled"):
        raise ValueError(f"{path} does not match its config: memory_init is {config.memory_init!r} there")


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError for a tensor that is not floating or not finite; names it and `what` it is in."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{what}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, not floating")
        values = tensor if tensor.itemsize > 1 else tensor.float()
        if not torch.isfinite(values).all():
            count = int((~torch.isfinite(values)).sum())
            raise ValueError(f"{what}: tensor {name} has {count} values that are not finite (NaN or infinity)")
