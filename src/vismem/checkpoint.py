"""Checkpoints: a JSON record, one safetensors file with what was trained, and a model card; the base only by name.

None of them is unpickled. Weights carry a checksum, and the record names the base they were made for, so a damaged file
or another base is refused with one line that names both sides.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn

from vismem.backbones import backbone_of
from vismem.config import VisMemConfig
from vismem.pocket import BASE_PATH
from vismem.weights import check_finite, check_sizes

if TYPE_CHECKING:
    from vismem.model import VisMem

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "vismem_config.json", "vismem.safetensors", "README.md"
FORMAT = 1
POCKET = "pocket"  # the base that comes with the package


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
    """What `vismem_config.json` says."""

    config: VisMemConfig
    base_name: str
    base: BaseFacts
    token_ids: dict[str, int]
    sha256: str


def facts_of(base: nn.Module) -> BaseFacts:
    """The facts of a base model that a memory depends on."""
    backbone = backbone_of(base)
    rows = backbone.embeddings.weight.shape[0]
    return BaseFacts(backbone.model_type, backbone.hidden_size, backbone.vision_size, rows)


def recorded_name(base: nn.Module) -> str:
    """The name by which a checkpoint remembers its base; the pocket model's is the same on every machine."""
    name: str = getattr(base, "name_or_path", "")
    return POCKET if name and Path(name).expanduser().resolve() == BASE_PATH.resolve() else name


def base_location(name: str) -> str:
    """Where the base of that recorded name is to be loaded from."""
    return str(BASE_PATH) if name == POCKET else name


def token_ids(model: VisMem) -> dict[str, int]:
    """Id of each of the model's four tokens, by `"short_invocation"`, `"short_end"`, ..."""
    tables = {"invocation": model.tokens.invocation_ids, "end": model.tokens.end_ids}
    return {f"{kind}_{part}": index for part, table in tables.items() for kind, index in table.items()}


def trained_state(model: VisMem) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint holds: `memory.*` and `tokens.*`."""
    parts = {"memory": model.memory, "tokens": model.tokens}
    return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}


def save(model: VisMem, folder: Path) -> None:
    """Writes a checkpoint of `model` into `folder`, each file whole or not at all."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; save_pretrained needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_state(model).items()}
    weights = serialize(state, metadata={"format": "pt"})
    check_finite(state, f"the memory is not saved to {folder}")
    record = {
        "format": FORMAT,
        "config": model.memory_config.to_dict(),
        "base_name": recorded_name(model.base),
        "base": asdict(facts_of(model.base)),
        "token_ids": token_ids(model),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    record["record_sha256"] = digest(record)
    _write(folder / WEIGHTS_FILE, weights)
    _write(folder / CONFIG_FILE, (json.dumps(record, indent=2) + "\n").encode())
    _write(folder / CARD_FILE, model_card(model).encode())


def digest(record: dict[str, Any]) -> str:
    """The checksum of a record's values, whatever their order or layout in the file."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def locate(name: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """The local folder of a checkpoint: `name` itself, or a download of the hub repository of that name.

    Raises:
        OSError: if there is no such folder and no such repository can be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    looks_local = folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1
    if looks_local:
        raise OSError(f"no checkpoint at {name}: there is no such folder")
    try:
        patterns = [CONFIG_FILE, WEIGHTS_FILE]
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"no checkpoint {name}: no such folder, and it cannot be had from the hub ({reason})") from error


def read_record(folder: Path) -> Record:
    """Reads and checks `vismem_config.json`.

    Raises:
        OSError: if it is missing. ValueError: if it is not what `save` writes.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise OSError(f"{folder} is not a VisMem checkpoint: it has no {CONFIG_FILE}")
    try:
        values: dict[str, Any] = json.loads(path.read_bytes().decode())
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
        )
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged or not a VisMem record: {reason}") from error


def check_base(record: Record, base: nn.Module, folder: Path) -> None:
    """Checks that a checkpoint fits `base`, and that its weights have the sizes that its record gives.

    Raises:
        OSError: if there are no weights.
        ValueError: if `base` is of another kind, naming both, or the checksum of the weights or a size differs.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise OSError(f"{folder} is not a whole checkpoint: it has no {WEIGHTS_FILE}")
    found = facts_of(base)
    if found != record.base:
        raise ValueError(
            f"checkpoint {folder} was made for {record.base_name}, a {record.base}; "
            f"it does not fit {base.name_or_path or type(base).__name__}, a {found}"
        )
    if hashlib.sha256(path.read_bytes()).hexdigest() != record.sha256:
        raise ValueError(f"{path} is damaged: its checksum is not the one in {CONFIG_FILE}; get the file again")
    check_sizes(path, record.config, found.hidden_size, backbone_of(base).merge)


def load_weights(model: VisMem, folder: Path, record: Record) -> None:
    """Loads `vismem.safetensors` into an equipped model.

    Raises:
        ValueError: if its tensors or the token ids differ, or a tensor is not floating, or not finite in the dtype that
            it is loaded in.
    """
    path = folder / WEIGHTS_FILE
    if token_ids(model) != record.token_ids:
        raise ValueError(
            f"checkpoint {folder} was made for a tokenizer with memory tokens {record.token_ids}; "
            f"this one has {token_ids(model)}"
        )
    state, expected = load_file(path), trained_state(model)
    odd = sorted(set(state) ^ set(expected)) or [n for n, t in state.items() if t.shape != expected[n].shape]
    if odd:
        raise ValueError(f"{path} does not match its {CONFIG_FILE}: tensor {odd[0]} differs")
    check_finite(state, str(path))
    state = {name: tensor.to(expected[name].dtype) for name, tensor in state.items()}
    check_finite(state, f"{path}, loaded as {str(next(iter(state.values())).dtype).removeprefix('torch.')}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(state[name])


def model_card(model: VisMem) -> str:
    """The README.md of a checkpoint, with the front matter that the hub reads."""
    config, facts = model.memory_config, facts_of(model.base)
    name = recorded_name(model.base) or facts.model_type
    trained = sum(tensor.numel() for tensor in trained_state(model).values())
    total = sum(parameter.numel() for parameter in model.base.parameters())
    made = f"""| query vectors K | {config.query_length} |
| LoRA | r {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout}, query and value projections |
| start of memory | {config.memory_init} |"""
    if config.content == "soft":
        made = "| content | learned constants (soft prompts), the same for every image and question |"
    base_line = f"base_model: {name}\n" if name.count("/") == 1 else ""  # only a hub repository can be linked
    return f"""---
library_name: vismem
pipeline_tag: image-text-to-text
{base_line}tags:
- vismem
- latent-memory
- {facts.model_type}
---

# Latent vision memory for {Path(name).name}

Short-term and long-term latent vision memory ([VisMem](https://arxiv.org/abs/2511.11007)) for a frozen
vision-language model. These files hold the memory only; the base is loaded by its name and is not changed.

| | |
|---|---|
| base | `{Path(name).name}`, {facts} |
| short-term vectors N_s | {config.short_length} |
| long-term vectors N_l | {config.long_length} |
{made}
| parameters of the memory | {trained:,} ({100 * trained / total:.2f} % of the base) |

```python
import vismem

model = vismem.VisMem.from_pretrained("path/to/this/folder")
out = model.generate(**inputs, max_new_tokens=256, return_dict_in_generate=True)
print(out.invocations)
```
"""
