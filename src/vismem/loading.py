"""A base and its memory by name - a folder, the hub or the package - without noise and without waiting for a network.

With nothing named it is the pocket model with its shipped memory. A base without a memory gets an untrained one,
always the same. Command lines and the plug-in for lmms-eval name models this way; what goes wrong is one clear line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vismem.config import VisMemConfig
from vismem.pocket import BASE_PATH, MEMORY_PATH

if TYPE_CHECKING:
    import torch

    from vismem.model import VisMem

POCKET = "pocket"  # the name of the model that comes with the package
NETWORK_TIMEOUT = 5  # seconds; huggingface_hub's own retries take half a minute
DTYPES = ("auto", "float32", "bfloat16", "float16")


class CannotLoad(ValueError):
    """What was named cannot be had, is damaged, or does not fit together."""


class UnknownDevice(ValueError):
    """No device has that name on any machine."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to write, and what it was asked for by.

    Args:
        model: the `VisMem`.
        base, checkpoint: names to show; None for an untrained memory.
    """

    model: VisMem
    base: str
    checkpoint: str | None


def load_model(
    checkpoint: str | None = None,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda note: None,
) -> Loaded:
    """Loads a base and equips it with its memory.

    Args:
        checkpoint: a memory: a folder or a hub repository; by default the pocket model's, or an untrained one.
        base: a base model: a folder, a hub repository, or `"pocket"`; by default the checkpoint's, or the pocket model.
        device: `"auto"` is the first GPU, or else the CPU.
        dtype: one of `DTYPES`; `"auto"` is the base's own.
        trust_remote_code: let a hub repository run its own code.
        say: is told of downloads, and that a memory is untrained.

    Raises:
        UnknownDevice: if the device has no such name.
        CannotLoad, ValueError, OSError: if something is missing, damaged, or does not fit together; one line each.
    """
    import torch

    from vismem import VisMem
    from vismem import checkpoint as files

    where = device_of(device)
    folder, base_name, shown = None, base or POCKET, checkpoint
    place = base_name
    if checkpoint is not None:
        folder = checkpoint_folder(checkpoint, say)
        record = files.read_record(folder)
        base_name = base or record.base_name
        place = base or files.base_location(record, folder)
    elif is_pocket(base_name) and (MEMORY_PATH / files.CONFIG_FILE).is_file():
        folder, shown = MEMORY_PATH, POCKET
    try:
        found, processor = load_base(place, where, dtype, trust_remote_code, say)
    except CannotLoad as error:
        if checkpoint is None or base:
            raise
        raise CannotLoad(
            f"{error}; it is the base of checkpoint {checkpoint}: say where it is with --base (base= in Python)"
        ) from error
    if folder is not None:
        model = VisMem.from_pretrained(folder, base=found, processor=processor)
    else:
        torch.manual_seed(0)  # an untrained memory, but the same one every time
        model = VisMem(found, processor, VisMemConfig.preset("pocket" if is_pocket(base_name) else "paper")).eval()
        say(f"note: no checkpoint for {base_name}: its memory is untrained, a pooled second look at the image")
    return Loaded(model, POCKET if is_pocket(base_name) else base_name, shown)


def load_base(
    name: str, device: Any, dtype: str, trust_remote_code: bool, say: Callable[[str], None]
) -> tuple[Any, Any]:
    """The base and its processor, checked to be of a supported family, whole, and able to chat."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vismem.backbones import backbone_of

    pocket = is_pocket(name)
    if pocket and not (BASE_PATH / "config.json").is_file():
        raise CannotLoad("the pocket model has not been built yet: run `vismem pocket build`, or name another base")
    found, local = (str(BASE_PATH), True) if pocket else locate(name, "config.json", "base", say)
    # Always said, or transformers asks on the terminal.
    common = {"trust_remote_code": trust_remote_code, "local_files_only": local}
    dtype = "float32" if pocket and dtype == "auto" else dtype  # the file is bfloat16 to be small
    try:
        backbone_of(SimpleNamespace(config=AutoConfig.from_pretrained(found, **common)))
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            found,
            dtype=dtype,
            output_loading_info=True,
            device_map=None if device.type == "cpu" else {"": device},
            **common,
        )
        base, report = loaded
        processor = AutoProcessor.from_pretrained(found, **common)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise CannotLoad(f"base {name} does not fit into the memory of {device}") from error
        raise CannotLoad(f"cannot load base {name}: {error}") from error
    missing = sorted([*report["missing_keys"], *report["mismatched_keys"]], key=str)
    if missing:
        raise CannotLoad(f"cannot load base {name}: its files lack {len(missing)} weights, {missing[0]} for one")
    if getattr(processor, "chat_template", None) is None:
        raise CannotLoad(f"base {name} has no chat template, so a question cannot be put to it")
    return base, processor


def checkpoint_folder(name: str, say: Callable[[str], None]) -> Path:
    """The local folder of a memory, which may be the only one below the folder that was named."""
    from vismem import checkpoint

    path = Path(name).expanduser()
    if path.is_dir():
        try:
            found = checkpoint.find_memory(path)
        except OSError as error:
            raise CannotLoad(str(error)) from error
        if found != path:
            say(f"note: the memory of {name} is {found}")
        return found
    place, local = locate(name, checkpoint.CONFIG_FILE, "checkpoint", say)
    if not local:
        return checkpoint.locate(place)
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(place, checkpoint.CONFIG_FILE))).parent


def locate(name: str, file: str, what: str, say: Callable[[str], None]) -> tuple[str, bool]:
    """Where a base or a memory is to be had: its folder or repository, and whether everything is on this machine.

    Asks the hub once, for a few seconds at most; without an answer, what an earlier download left must do.

    Args:
        name: as on the command line.
        file: the file that tells a folder or a repository from any other.
        what: `"base"` or `"checkpoint"`, for the message.
        say: is told that a download begins.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / file).is_file():
            raise CannotLoad(f"{name} is no {what}: the folder has no {file}")
        return str(path), True
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CannotLoad(f"no {what} {name}: there is no such folder, and a hub repository is named like owner/name")

    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, file), str)
    reason = "offline mode is on"
    if not constants.HF_HUB_OFFLINE:
        try:
            get_hf_file_metadata(hf_hub_url(name, file), timeout=NETWORK_TIMEOUT)
            if not cached:
                say(f"note: downloading {name} from the hub")
            return name, False
        except errors.HFValidationError as error:
            raise CannotLoad(
                f"no {what} {name}: there is no such folder, and it cannot be a repository's name"
            ) from error
        except errors.GatedRepoError as error:
            raise CannotLoad(f"{what} {name} is gated: ask for access on its page, then `hf auth login`") from error
        except errors.RepositoryNotFoundError as error:
            raise CannotLoad(f"no {what} {name}: no such folder, and no such repository that you may read") from error
        except errors.EntryNotFoundError as error:
            raise CannotLoad(f"{name} is no {what}: the repository has no {file}") from error
        except Exception:  # no network, or the hub is down; the client's own errors are of many kinds
            reason = "the hub cannot be reached"
    if not cached:
        raise CannotLoad(f"no {what} {name}: no such folder, nothing downloaded earlier, and {reason}")
    return name, True


def is_pocket(name: str) -> bool:
    """Whether a base's name means the pocket model, also as recorded on another machine."""
    return name == POCKET or Path(name).parts[-4:] == ("vismem", *BASE_PATH.parts[-3:])


def device_of(name: str) -> torch.device:
    """The torch device of that name; `"auto"` is the first GPU, or else the CPU."""
    import torch

    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnknownDevice(
            f"unknown device {name!r}; give auto, cpu, cuda, cuda:1, mps or another of torch's"
        ) from error
    if device.type == "meta":
        raise UnknownDevice("device 'meta' holds no numbers; give auto, cpu or a GPU")
    try:
        torch.empty(1, device=device)
    except Exception as error:  # each backend has its own error for a device that is not there
        raise CannotLoad(f"device {name} is not available here") from error
    return device


def quiet_imports() -> None:
    """Keeps off stderr what is said while peft imports bitsandbytes and torchao, where it finds them."""
    for name in ("bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def silence_libraries(debug: bool) -> None:
    """Keeps the libraries' warnings and bars off stderr, but for a download's bar on a terminal."""
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
