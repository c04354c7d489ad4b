"""Checkpoints: a JSON record, one safetensors file with what was trained, and a model card; the base only by name.

None of them is unpickled. Weights carry a checksum, and the record names the base they were made for, so a damaged file
or another base is refused with one line that names both sides. A save that is killed leaves the old memory or the new
one, never a mix. The model card is in `card.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save as serialize
from torch import nn

from vismem import files
from vismem.backbones import backbone_of
from vismem.bundled import BASE_PATH, POCKET
from vismem.card import model_card
from vismem.config import VisMemConfig
from vismem.weights import check_finite, check_sizes, read_state

if TYPE_CHECKING:
    from vismem.model import VisMem

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "vismem_config.json", "vismem.safetensors", "README.md"
FORMAT = 1


@dataclass(frozen=True)
class BaseFacts:
    """What a memory needs its base to be."""

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
class Record:
    """What `vismem_config.json` says.

    Args:
        config: of the memory.
        base_name: the base's name as it was given: a hub repository, a folder, or `"pocket"`.
        base: what the base must be.
        token_ids: of the four tokens.
        sha256: checksum of the weights.
        base_folders: where the base was, if it was a folder: its absolute path, and its path from the memory's folder.
        history: the training stages behind the weights, oldest first, with their figures.
    """

    config: VisMemConfig
    base_name: str
    base: BaseFacts
    token_ids: dict[str, int]
    sha256: str
    base_folders: tuple[str, ...] = ()
    history: tuple[dict[str, Any], ...] = ()


def facts_of(base: nn.Module) -> BaseFacts:
    """The facts of a base model that a memory depends on."""
    backbone = backbone_of(base)
    rows = backbone.embeddings.weight.shape[0]
    return BaseFacts(backbone.model_type, backbone.hidden_size, backbone.vision_size, rows)


def recorded_name(base: nn.Module) -> str:
    """The name by which a checkpoint remembers its base; the pocket model's is the same on every machine."""
    name: str = getattr(base, "name_or_path", "")
    return POCKET if name and Path(name).expanduser().resolve() == BASE_PATH.resolve() else name


def base_folders(base: nn.Module, folder: Path) -> list[str]:
    """The absolute path of a base that was loaded from a folder, and its path from the memory's `folder`."""
    name = recorded_name(base)
    if not name or name == POCKET or not Path(name).expanduser().is_dir():
        return []
    absolute = os.path.abspath(Path(name).expanduser())
    try:
        return [absolute, Path(os.path.relpath(absolute, os.path.abspath(folder))).as_posix()]
    except ValueError:  # on another drive
        return [absolute]


def base_location(record: Record, folder: Path) -> str:
    """Where to load a memory's base from: a folder that is there, or else the recorded name.

    Args:
        record: of the memory.
        folder: of the memory.

    Raises:
        OSError: if the base was a folder and is in none of the places where it could be; names them.
    """
    if record.base_name == POCKET:
        return str(BASE_PATH)
    places = [folder / place for place in record.base_folders]  # an absolute path stays as it is
    places.append(Path(record.base_name).expanduser())
    for place in places:
        if (place / "config.json").is_file():
            return str(place)
    if record.base_folders:
        tried = ", ".join(dict.fromkeys(os.path.normpath(os.path.abspath(place)) for place in places))
        raise OSError(
            f"the base {record.base_name} of memory {folder} is in none of {tried}; "
            "say where it is with base= (--base on the command line)"
        )
    return record.base_name


def token_ids(model: VisMem) -> dict[str, int]:
    """Id of each of the model's four tokens, by `"short_invocation"`, `"short_end"`, ..."""
    tables = {"invocation": model.tokens.invocation_ids, "end": model.tokens.end_ids}
    return {f"{kind}_{part}": index for part, table in tables.items() for kind, index in table.items()}


def trained_state(model: VisMem) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint holds: `memory.*` and `tokens.*`."""
    parts = {"memory": model.memory, "tokens": model.tokens}
    return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}


def save(model: VisMem, folder: Path, name: str = "", tags: tuple[str, ...] = ()) -> None:
    """Writes a checkpoint of `model` into `folder`.

    Killed at any moment, it leaves one whole memory: the one that was there, or the new one.

    Args:
        model: the model.
        folder: made if it is not there.
        name: what the model card calls the memory; by default the folder.
        tags: further tags of the model card.

    Raises:
        ValueError: if `folder` is a file. DiskFullError: if there is no room.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; save_pretrained needs a folder")
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in trained_state(model).items()}
    weights = serialize(state, metadata={"format": "pt"})
    check_finite(state, f"the memory is not saved to {folder}")
    record = {
        "format": FORMAT,
        "config": model.memory_config.to_dict(),
        "base_name": recorded_name(model.base),
        "base_folders": base_folders(model.base, folder),
        "base": asdict(facts_of(model.base)),
        "token_ids": token_ids(model),
        "history": list(model.history),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    record["record_sha256"] = digest(record)
    content = (json.dumps(record, indent=2) + "\n").encode()
    files.write_pair((folder / WEIGHTS_FILE, weights), (folder / CONFIG_FILE, content), _fits(folder))
    trained = sum(tensor.numel() for tensor in state.values())
    base_name, facts = recorded_name(model.base), str(facts_of(model.base))
    card = model_card(model, name or folder.as_posix(), base_name, facts, trained, tags)
    files.write_text(folder / CARD_FILE, card)


def _fits(folder: Path) -> Callable[[bytes], bool]:
    """Whether a record is that of the weights which are in the folder now."""

    def fits(content: bytes) -> bool:
        try:
            named = json.loads(content)["sha256"]
        except (ValueError, KeyError, TypeError):
            return False
        return (folder / WEIGHTS_FILE).is_file() and files.sha256(folder / WEIGHTS_FILE) == named

    return fits


def _record_of(folder: Path) -> bytes | None:
    """The record of the memory in a folder, also after a save that was killed; None if there is none."""
    return files.matching(folder / CONFIG_FILE, _fits(folder))


def digest(record: dict[str, Any]) -> str:
    """The checksum of a record's values, whatever their order or layout in the file."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def locate(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of a checkpoint: that of `name`, or a download of the hub repository of that name.

    Args:
        name: a memory's folder, a folder with one memory in it, such as a run's, or a hub repository.
        revision, token: for the hub.

    Raises:
        OSError: if there is no such folder and no such repository can be had, or the folder has no memory or several.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return find_memory(folder)
    looks_local = folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1
    if looks_local:
        raise OSError(f"no checkpoint at {name}: there is no such folder")
    try:
        patterns = [CONFIG_FILE, WEIGHTS_FILE]
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"no checkpoint {name}: no such folder, and it cannot be had from the hub ({reason})") from error


def find_memory(folder: Path) -> Path:
    """`folder` itself, or the one folder with a memory up to two levels below it: a run's, or that of its last stage.

    Raises:
        OSError: if there is no memory, or there are several; names them.
    """
    if _record_of(folder) is not None:
        return folder
    found = [place for place in files.folders_with(folder, WEIGHTS_FILE) if _record_of(place) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise OSError(f"{folder} holds several memories; name one of {', '.join(map(str, found))}")
    hint = ""
    if files.partial_path(folder / CONFIG_FILE).is_file() or files.partial_path(folder / WEIGHTS_FILE).is_file():
        hint = "; a save into it was stopped before it was whole, so save the memory again"
    elif (folder / "trainer_state.json").is_file():
        hint = f"; a run resumes from it, and writes its memory to {folder.parent / 'memory'} at the end"
    raise OSError(f"{folder} is not a VisMem checkpoint: it has no {CONFIG_FILE}{hint}")


def read_record(folder: Path) -> Record:
    """Reads and checks `vismem_config.json`.

    Raises:
        OSError: if it is missing. ValueError: if it is not what `save` writes.
    """
    path, content = folder / CONFIG_FILE, _record_of(folder)
    if content is None:
        raise OSError(f"{folder} is not a VisMem checkpoint: it has no {CONFIG_FILE}")
    try:
        values: dict[str, Any] = json.loads(content.decode())
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']} is not {FORMAT}, the one this version reads")
        if values.pop("record_sha256") != digest(values):
            raise ValueError("its checksum does not fit; change settings on the model and save it again")
        return Record(
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


def read_whole(folder: Path) -> tuple[Record, bytes]:
    """Reads the record and the weights of one save, also while another process saves into the folder.

    Raises:
        OSError: if either is missing.
        ValueError: if the record is not what `save` writes, or the checksum of the weights is not the one in it.
    """
    path, before = folder / WEIGHTS_FILE, None
    while True:
        record = read_record(folder)
        try:
            weights = path.read_bytes()
        except FileNotFoundError as error:
            raise OSError(f"{folder} is not a whole checkpoint: it has no {WEIGHTS_FILE}") from error
        found = (record.sha256, hashlib.sha256(weights).hexdigest())
        if found[0] == found[1]:
            return record, weights
        if found == before:  # not changed by a save between the two reads
            raise ValueError(f"{path} is damaged: its checksum is not the one in {CONFIG_FILE}; get the file again")
        before = found


def check_base(record: Record, base: nn.Module, folder: Path) -> None:
    """Raises ValueError if a checkpoint was made for another kind of base; names both."""
    found = facts_of(base)
    if found != record.base:
        raise ValueError(
            f"checkpoint {folder} was made for {record.base_name}, a {record.base}; "
            f"it does not fit {base.name_or_path or type(base).__name__}, a {found}"
        )


def read_weights(weights: bytes, folder: Path, record: Record, base: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors in the bytes of `vismem.safetensors`.

    Raises:
        ValueError: if it is no safetensors file, or its tensors do not have the sizes that the record gives.
    """
    path = folder / WEIGHTS_FILE
    state = read_state(weights, path)
    check_sizes(state, path, record.config, record.base.hidden_size, backbone_of(base).merge)
    return state


def load_weights(model: VisMem, state: dict[str, torch.Tensor], folder: Path, record: Record) -> None:
    """Copies a checkpoint's tensors into an equipped model.

    Raises:
        ValueError: if the tensors or the token ids differ, or a tensor is not floating, or not finite in the dtype that
            it is loaded in.
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
