"""Checks on weights before they are used: the sizes match the config, the values are floating point and finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from vismem.config import VisMemConfig


def read_state(content: bytes, path: Path) -> dict[str, Tensor]:
    """Parses a safetensors file.

    Args:
        content: the file's bytes.
        path: for error messages.

    Raises:
        ValueError: if it is not a complete safetensors file.
    """
    try:
        return load(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise ValueError(f"{path} is damaged: it is not a complete safetensors file ({error})") from error


def check_sizes(state: Mapping[str, Tensor], path: Path, config: VisMemConfig, hidden_size: int, merge: int) -> None:
    """Compares a config's sizes with the tensors, before anything of these sizes is allocated.

    Args:
        state: the tensors of `vismem.safetensors`.
        path: that file, for error messages.
        config: the config saved with it.
        hidden_size: of the base.
        merge: m of the base; its projector merges m * m memory positions into one vector.

    Raises:
        ValueError: if they differ; names the field, both values and the file.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def size(name: str, axis: int) -> int | None:
        shape = shapes.get(f"memory.{name}", ())
        return shape[axis] if axis < len(shape) else None

    short = size("short.memory_init", 0)
    pooled, attended = ("memory.short." + name in shapes for name in ("query_mix", "choice.mix"))
    init = "attended" if attended else "pooled" if pooled else "learned"
    sizes: dict[str, int | None]
    if config.content == "soft":
        sizes = {"short_length": size("short.vectors", 0), "long_length": size("long.vectors", 0)}
    else:
        blocks = {name.split(".")[3] for name in shapes if name.startswith("memory.builder.blocks.")}
        ranks = {shape[0] for name, shape in shapes.items() if shape and name.endswith(".down.weight")}
        sizes = {
            "query_length": size("builder.query_init", 0),
            "builder_layers": len(blocks),
            "builder_width": size("builder.query_init", 1),
            "short_length": None if short is None else short // merge**2,
            "long_length": size("long.memory_init", 0),
            "lora_r": min(ranks, key=lambda rank: rank == config.lora_r, default=None),
        }
    for name, size_found in sizes.items():
        expected = config.inner_width(hidden_size) if name == "builder_width" else getattr(config, name)
        if expected != size_found:
            in_weights = "the weights have no such tensor" if size_found is None else f"{size_found} in the weights"
            raise ValueError(f"{path} does not match its config: {name} is {expected} in the config, but {in_weights}")
    if config.content == "formed" and init != config.memory_init:
        raise ValueError(f"{path} does not match its config: memory_init is {config.memory_init!r} in the config")


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError if a tensor is not floating point or not finite; names the tensor and `what` contains it."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{what}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, not floating point")
        values = tensor if tensor.itemsize > 1 else tensor.float()
        if not torch.isfinite(values).all():
            count = int((~torch.isfinite(values)).sum())
            raise ValueError(f"{what}: tensor {name} has {count} values that are not finite (NaN or infinity)")
