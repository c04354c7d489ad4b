"""Checkpoints: a JSON record, a safetensors file with the trained weights, and a model card.

The base is named, not copied, and nothing is unpickled. The record holds the weights' checksum and the base's sizes,
so loading refuses a damaged file or a different base, and says what differs. A save that is killed leaves the old
memory or the new one, never a mix.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor, nn

from vismem import files, hub
from vismem.backbones import backbone_of
from vismem.bundled import BASE_PATH, POCKET, is_pocket
from vismem.card import model_card
from vismem.config import VisMemConfig

if TYPE_CHECKING:
    from vismem.model import VisMem

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "vismem_config.json", "vismem.safetensors", "README.md"
FORMAT = 1


@dataclass(frozen=True)
class BaseFacts:
    """The properties of a base that a memory depends on."""

    model_type: str
    hidden_size: int
    vision_size: int
    vocabulary: int

    def __str__(self) -> str:
        return (
            f"{self.model_type} (hidden size {self.hidden_size}, vision size {self.vision_size}, "
            f"vocabulary {self.vocabulary})"
        )


@dataclass(frozen=True)
class CheckpointRecord:
    """The content of `vismem_config.json`.

    Args:
        config: the memory's config.
        base_name: the base's name: a hub repository, a folder, or `"pocket"`.
        base: the properties that the base must have.
        token_ids: ids of the four memory tokens.
        sha256: checksum of the weights.
        base_folders: for a base in a local folder, its absolute path and its path relative to the memory's folder.
        history: the memory's training stages, oldest first, with their metrics.
    """

    config: VisMemConfig
    base_name: str
    base: BaseFacts
    token_ids: dict[str, int]
    sha256: str
    base_folders: tuple[str, ...] = ()
    history: tuple[dict[str, Any], ...] = ()


def facts_of(base: nn.Module) -> BaseFacts:
    """Reads a base model's facts."""
    backbone = backbone_of(base)
    rows = backbone.embeddings.weight.shape[0]
    return BaseFacts(backbone.model_type, backbone.hidden_size, backbone.vision_size, rows)


def recorded_name(base: nn.Module) -> str:
    """The base's name as a checkpoint records it; the pocket model has the same name on every machine."""
    name: str = getattr(base, "name_or_path", "")
    return POCKET if name and is_pocket(name) else name


def base_folders(base_name: str, folder: Path) -> list[str]:
    """For a base loaded from a folder, its absolute path and its path relative to the memory's `folder`."""
    if base_name in ("", POCKET) or not Path(base_name).expanduser().is_dir():
        return []
    absolute = os.path.abspath(Path(base_name).expanduser())
    try:
        return [absolute, Path(os.path.relpath(absolute, os.path.abspath(folder))).as_posix()]
    except ValueError:  # on another drive
        return [absolute]


def base_location(record: CheckpointRecord, folder: Path) -> str:
    """Where to load a memory's base from: an existing folder, or else the recorded name.

    Raises:
        OSError: if the base was in a local folder that is not found; names the folders tried.
    """
    if record.base_name == POCKET:
        return str(BASE_PATH)
    candidates = [folder / path for path in record.base_folders]  # joining keeps an absolute path
    candidates.append(Path(record.base_name).expanduser())
    for path in candidates:
        if (path / "config.json").is_file():
            return str(path)
    if record.base_folders:
        tried = ", ".join(dict.fromkeys(os.path.abspath(path) for path in candidates))
        raise OSError(
            f"the base {record.base_name} of memory {folder} is in none of {tried}; "
            "pass its path as base= (--base on the command line)"
        )
    return record.base_name


def token_ids(model: VisMem) -> dict[str, int]:
    """The ids of the model's four memory tokens, by `"short_invocation"`, `"short_end"`, ..."""
    tables = {"invocation": model.tokens.invocation_ids, "end": model.tokens.end_ids}
    return {f"{kind}_{part}": index for part, table in tables.items() for kind, index in table.items()}


def trained_state(model: VisMem) -> dict[str, Tensor]:
    """The tensors in a checkpoint: `memory.*` and `tokens.*`."""
    parts = {"memory": model.memory, "tokens": model.tokens}
    return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}


def save(model: VisMem, folder: Path, name: str = "", tags: tuple[str, ...] = ()) -> None:
    """Saves a checkpoint to `folder`; killed at any point, it leaves the old checkpoint or the new one.

    Args:
        model, folder: what to save, and where.
        name, tags: for the model card; the name defaults to the folder.

    Raises:
        ValueError: if `folder` is a file, or a tensor is not finite.
        DiskFullError: if the disk is full.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; save_pretrained needs a folder")
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in trained_state(model).items()}
    weights = serialize(state, metadata={"format": "pt"})
    check_finite(state, f"the memory is not saved to {folder}")
    base_name, facts = recorded_name(model.base), facts_of(model.base)
    record = {
        "format": FORMAT,
        "config": model.memory_config.to_dict(),
        "base_name": base_name,
        "base_folders": base_folders(base_name, folder),
        "base": asdict(facts),
        "token_ids": token_ids(model),
        "history": list(model.history),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    record["record_sha256"] = digest(record)
    content = (json.dumps(record, indent=2) + "\n").encode()
    files.write_pair((folder / WEIGHTS_FILE, weights), (folder / CONFIG_FILE, content), partial(_fits, folder))
    files.write_text(folder / CARD_FILE, model_card(model, name or folder.as_posix(), base_name, facts, tags))


def _fits(folder: Path, record: bytes) -> bool:
    """Whether a record's content belongs to the weights currently in the folder."""
    try:
        expected = json.loads(record)["sha256"]
    except (ValueError, KeyError, TypeError):
        return False
    return (folder / WEIGHTS_FILE).is_file() and files.sha256(folder / WEIGHTS_FILE) == expected


def _record_of(folder: Path) -> bytes | None:
    """Reads a folder's record, even after a save was killed; None if there is none."""
    return files.read_matching(folder / CONFIG_FILE, partial(_fits, folder))


def digest(record: dict[str, Any]) -> str:
    """The checksum of a record's values, independent of their order and layout in the file."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def locate(
    name: str | Path,
    revision: str | None = None,
    token: str | None = None,
    say: Callable[[str], None] = hub.silent,
) -> Path:
    """The local folder of a memory; downloads it from the hub if necessary.

    Args:
        name: a memory's folder, a folder containing exactly one (such as a run's), or a hub repository.
        revision, token: for the hub.
        say: receives notes, such as that a download starts or the memory is in a subfolder.

    Raises:
        LoadError: if there is no such folder or repository, or the folder contains no memory or several.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        found = find_memory(folder)
        if found != folder:
            say(f"note: the memory of {name} is {found}")
        return found
    repository, local = hub.find(str(name), CONFIG_FILE, "checkpoint", say, revision=revision, token=token)
    try:
        patterns = [CONFIG_FILE, WEIGHTS_FILE]
        return Path(
            snapshot_download(
                repository, revision=revision, token=token, local_files_only=local, allow_patterns=patterns
            )
        )
    except Exception as error:  # the client raises many types
        reason = str(error).strip().splitlines()[0]
        raise hub.LoadError(f"cannot download checkpoint {name} from the hub ({reason})") from error


def find_memory(folder: Path) -> Path:
    """`folder` itself, or the only memory up to two levels below it, such as that of a run.

    Raises:
        LoadError: if there is no memory, or several; names them.
    """
    if _record_of(folder) is not None:
        return folder
    found = [path for path in files.folders_with(folder, WEIGHTS_FILE) if _record_of(path) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise hub.LoadError(f"{folder} holds several memories; name one of {', '.join(map(str, found))}")
    hint = ""
    if files.partial_path(folder / CONFIG_FILE).is_file() or files.partial_path(folder / WEIGHTS_FILE).is_file():
        hint = "; a save into it was interrupted, so save the memory again"
    elif (folder / "trainer_state.json").is_file():
        hint = f"; it is a training checkpoint; its run writes the memory to {folder.parent / 'memory'} at the end"
    raise hub.LoadError(f"{folder} is not a VisMem checkpoint: it has no {CONFIG_FILE}{hint}")


def read_record(folder: Path) -> CheckpointRecord:
    """Reads and checks `vismem_config.json`.

    Raises:
        OSError: if it is missing.
        ValueError: if `save` did not write it.
    """
    path, content = folder / CONFIG_FILE, _record_of(folder)
    if content is None:
        raise OSError(f"{folder} is not a VisMem checkpoint: it has no {CONFIG_FILE}")
    try:
        values: dict[str, Any] = json.loads(content.decode())
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']} is not {FORMAT}, the one this version reads")
        if values.pop("record_sha256") != digest(values):
            raise ValueError("its checksum does not match; to change settings, change them on the model and save it")
        return CheckpointRecord(
            VisMemConfig.from_dict(values["config"]),
            str(values["base_name"]),
            BaseFacts(**values["base"]),
            {str(name): int(index) for name, index in values["token_ids"].items()},
            str(values["sha256"]),
            tuple(map(str, values.get("base_folders", ()))),
            tuple(dict(stage) for stage in values.get("history", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged or not a VisMem record: {reason}") from error


def read_checkpoint(folder: Path, base: nn.Module) -> tuple[CheckpointRecord, dict[str, Tensor]]:
    """Reads a record and its weights, even while another process saves to the folder, and checks that they fit.

    Raises:
        OSError: if either is missing.
        ValueError: if `save` did not write the record, the weights do not match it, or it was made for another base.
    """
    path, before = folder / WEIGHTS_FILE, None
    while True:
        record = read_record(folder)
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise OSError(f"{folder} is not a complete checkpoint: it has no {WEIGHTS_FILE}") from error
        sums = (record.sha256, hashlib.sha256(content).hexdigest())
        if sums[0] == sums[1]:
            break
        if sums == before:  # the same twice: no save in between
            raise ValueError(f"{path} is damaged: it does not match the checksum in {CONFIG_FILE}; get the file again")
        before = sums
    found = facts_of(base)
    if found != record.base:
        raise ValueError(
            f"checkpoint {folder} was made for {record.base_name}, a {record.base}; "
            f"it does not fit {base.name_or_path or type(base).__name__}, a {found}"
        )
    try:
        state = deserialize(content)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise ValueError(f"{path} is damaged: it is not a complete safetensors file ({error})") from error
    check_sizes(state, path, record.config, found.hidden_size, backbone_of(base).merge)
    return record, state


def check_sizes(state: Mapping[str, Tensor], path: Path, config: VisMemConfig, hidden_size: int, merge: int) -> None:
    """Compares a config's sizes with the tensors, before anything of these sizes is allocated.

    Args:
        state, path: the tensors, and their file for messages.
        config: saved with them.
        hidden_size, merge: of the base; its projector merges m * m memory positions into one vector.

    Raises:
        ValueError: if they differ; names the field, both values and the file.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def size(name: str, axis: int) -> int | None:
        shape = shapes.get(f"memory.{name}", ())
        return shape[axis] if axis < len(shape) else None

    short = size("short.memory_init", 0)
    pooled, attended = (f"memory.short.{name}" in shapes for name in ("query_mix", "choice.mix"))
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


def load_weights(model: VisMem, state: dict[str, Tensor], folder: Path, record: CheckpointRecord) -> None:
    """Copies a checkpoint's tensors into an equipped model.

    Raises:
        ValueError: if the tensors or the token ids differ, or a tensor is not floating point, or not finite in the
            dtype it is loaded in.
    """
    path = folder / WEIGHTS_FILE
    if token_ids(model) != record.token_ids:
        raise ValueError(
            f"checkpoint {folder} was made for a tokenizer with memory tokens {record.token_ids}; "
            f"this one has {token_ids(model)}"
        )
    expected = trained_state(model)
    odd = sorted(set(state) ^ set(expected)) or [n for n, t in state.items() if t.shape != expected[n].shape]
    if odd:
        raise ValueError(f"{path} does not match its {CONFIG_FILE}: tensor {odd[0]} differs")
    check_finite(state, str(path))
    state = {name: tensor.to(expected[name].dtype) for name, tensor in state.items()}
    check_finite(state, f"{path}, loaded as {str(next(iter(state.values())).dtype).removeprefix('torch.')}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(state[name])


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError if a tensor is not floating point or not finite; names the tensor and `what`, its source."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{what}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, not floating point")
        values = tensor if tensor.itemsize > 1 else tensor.float()
        if not torch.isfinite(values).all():
            count = int((~torch.isfinite(values)).sum())
            raise ValueError(f"{what}: tensor {name} has {count} values that are not finite (NaN or infinity)")
