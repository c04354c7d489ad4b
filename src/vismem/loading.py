"""Loads a base and its memory by name: a folder, a hub repository, or the pocket model that ships with the package.

`vismem.load` is the short way; every error is one line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vismem.bundled import BASE_PATH, MEMORY_PATH, POCKET, is_pocket
from vismem.config import VisMemConfig
from vismem.deprecation import renamed
from vismem.hub import LoadError, find, silent

if TYPE_CHECKING:
    import torch

    from vismem.model import VisMem

DTYPES = ("auto", "float32", "bfloat16", "float16")


class UnknownDeviceError(ValueError):
    """No device has that name on any machine."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, and the names it was loaded by.

    Args:
        model: the `VisMem`.
        base, checkpoint: names to show; `checkpoint` is None for an untrained memory.
    """

    model: VisMem
    base: str
    checkpoint: str | None


def load(
    name: str | Path | None = None,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
) -> VisMem:
    """Loads a model with its memory, ready to answer.

    Args:
        name: a memory or a base, as a folder or a hub repository; by default the pocket model. A base without a
            memory gets an untrained one, always the same.
        base: the base of the memory, if it is not where the memory's record says.
        device: `"auto"` is the first GPU, or else the CPU.
        dtype: `"auto"` (the base's own), `"float32"`, `"bfloat16"` or `"float16"`.
        trust_remote_code: let a hub repository run its own code.

    Raises:
        UnknownDeviceError: if no machine has such a device.
        LoadError, ValueError, OSError: if something is missing, damaged, or does not fit together; one line each.

    Example:
        >>> model = vismem.load()
        >>> model.name_or_path
    """
    memory = None if name in (None, POCKET) else str(name)
    if memory and base is None and (Path(memory).expanduser() / "config.json").is_file():
        memory, base = None, memory
    return load_model(memory, base, device, dtype, trust_remote_code=trust_remote_code).model


def load_model(
    checkpoint: str | None = None,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,  # noqa: FBT001, FBT002  # documented as positional
    say: Callable[[str], None] = silent,
) -> Loaded:
    """Loads a base and equips it with its memory, as the command line does.

    Args:
        checkpoint: a memory, as a folder or a hub repository; by default the pocket model's, or an untrained one.
        base: a base model: a folder, a hub repository, or `"pocket"`; by default the checkpoint's, or the pocket model.
        device, dtype, trust_remote_code: as in `load`.
        say: receives notes, such as that a download starts or a memory is untrained.

    Raises:
        UnknownDeviceError, LoadError, ValueError, OSError: as in `load`.
    """
    import torch

    from vismem import VisMem
    from vismem import checkpoint as files

    where = device_of(device)
    folder, base_name, shown = None, base or POCKET, checkpoint
    place = base_name
    if checkpoint is not None:
        folder = files.locate(checkpoint, say=say)
        record = files.read_record(folder)
        base_name = base or record.base_name
        place = base or files.base_location(record, folder)
    elif is_pocket(base_name) and (MEMORY_PATH / files.CONFIG_FILE).is_file():
        folder, shown = MEMORY_PATH, POCKET
    try:
        found, processor = load_base(place, where, dtype, trust_remote_code=trust_remote_code, say=say)
    except LoadError as error:
        if checkpoint is None or base:
            raise
        raise LoadError(
            f"{error}; it is the base of checkpoint {checkpoint}: say where it is with --base (base= in Python)"
        ) from error
    if folder is not None:
        model = VisMem.from_pretrained(folder, base=found, processor=processor)
    else:
        torch.manual_seed(0)  # an untrained memory, but the same one every time
        model = VisMem(found, processor, VisMemConfig.preset("pocket" if is_pocket(base_name) else "paper")).eval()
        say(f"note: no checkpoint for {base_name}, so its memory is untrained")
    return Loaded(model, POCKET if is_pocket(base_name) else base_name, shown)


def load_base(
    name: str,
    device: torch.device | None = None,
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = silent,
    **options: Any,
) -> tuple[Any, Any]:
    """Loads a base and its processor, of a supported family, with all of its weights.

    Args:
        name: a folder, a hub repository, or `"pocket"`.
        device: where to load it; None is the CPU.
        dtype, trust_remote_code, say: as in `load_model`.
        **options: for `from_pretrained`, such as `attn_implementation`.

    Raises:
        LoadError: if it cannot be found or loaded, lacks weights, or has no chat template.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vismem.backbones import backbone_of

    pocket = is_pocket(name)
    if pocket and not (BASE_PATH / "config.json").is_file():
        raise LoadError("the pocket model has not been built yet: run `vismem pocket build`, or name another base")
    found, local = (str(BASE_PATH), True) if pocket else find(name, "config.json", "base", say)
    # Always passed, or transformers asks on the terminal.
    common = {"trust_remote_code": trust_remote_code, "local_files_only": local}
    dtype = "float32" if pocket and dtype == "auto" else dtype  # the file is bfloat16 to be small
    try:
        backbone_of(SimpleNamespace(config=AutoConfig.from_pretrained(found, **common)))  # before weights are read
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            found,
            dtype=dtype,
            output_loading_info=True,
            device_map=None if device is None or device.type == "cpu" else {"": device},
            **common,
            **options,
        )
        base, report = loaded
        processor = AutoProcessor.from_pretrained(found, **common)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise LoadError(f"base {name} does not fit into the memory of {device}") from error
        raise LoadError(f"cannot load base {name}: {error}") from error
    missing = sorted([*report["missing_keys"], *report["mismatched_keys"]], key=str)
    if missing:
        raise LoadError(f"cannot load base {name}: its files lack {len(missing)} weights, such as {missing[0]}")
    if getattr(processor, "chat_template", None) is None:
        raise LoadError(f"base {name} has no chat template, so it cannot be asked a question")
    return base, processor


def device_of(name: str) -> torch.device:
    """The torch device of that name; `"auto"` is the first GPU, or else the CPU.

    Raises:
        UnknownDeviceError: if no machine has such a device.
        LoadError: if this one does not.
    """
    import torch

    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnknownDeviceError(
            f"unknown device {name!r}; give auto, cpu, cuda, cuda:1, mps or another of torch's"
        ) from error
    if device.type == "meta":
        raise UnknownDeviceError("device 'meta' stores no data; use auto, cpu or a GPU")
    try:
        torch.empty(1, device=device)
    except Exception as error:  # each backend has its own error for a device that is not there
        raise LoadError(f"device {name} is not available here") from error
    return device


def quiet_imports() -> None:
    """Keeps stderr free of what bitsandbytes and torchao log when peft imports them."""
    for name in ("bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def silence_libraries(*, debug: bool) -> None:
    """Keeps the libraries' warnings and progress bars off stderr, except a download's bar on a terminal."""
    import sys

    import huggingface_hub
    import transformers

    if debug:
        return
    quiet_imports()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()


__getattr__ = renamed(__name__, {"CannotLoad": "LoadError", "UnknownDevice": "UnknownDeviceError"})
