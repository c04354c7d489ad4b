"""LoRA baselines: ordinary PEFT adapters on the base's language model, to compare memory with.

The adapters are transformers' and peft's (`add_adapter`, `LoraConfig`). This module places them on the query and value
projections of the language model, at the rank of the memory's own adapters, and saves and loads them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from transformers import PreTrainedModel

from vismem import files
from vismem.backbones import Backbone
from vismem.bundled import POCKET
from vismem.checkpoint import check_finite, recorded_name
from vismem.config import VisMemConfig
from vismem.model import VisMem
from vismem.training.stages import ADAPTER_FILE

NAME = "default"  # peft's default adapter name
CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILE, "adapter_model.safetensors"
CONFIG_SHA256 = "config_sha256"  # in the weights' metadata
PREFIX = "base_model.model."  # of every tensor's name in an adapter's file


class LanguageAdapter(nn.Module):
    """The LoRA weights of a base as a separate module; both share the same parameters.

    Args:
        base: a base with an adapter.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for name, layer in lora_layers(base).items():
            parts = {"down": layer.lora_A, "up": layer.lora_B, "dropout": layer.lora_dropout}
            self.layers[name.replace(".", "/")] = nn.ModuleDict({part: held[NAME] for part, held in parts.items()})


def lora_layers(base: PreTrainedModel) -> dict[str, LoraLayer]:
    """The base's layers with the adapter, by name."""
    return {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer) and NAME in m.lora_A}


def lora_config(backbone: Backbone, config: VisMemConfig) -> LoraConfig:
    """LoRA on the language model's query and value projections, with the memory's rank, scale and dropout.

    Layers are selected by a pattern, because a vision tower may have layers of the same name.
    """
    root = next(name for name, module in backbone.base.named_modules() if module is backbone.language_model)
    within = f"{re.escape(root)}\\." if root else ""
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=f"{within}.*\\.({'|'.join(backbone.language_targets)})",
    )


def adapter_of(model: VisMem) -> LanguageAdapter:
    """The base's adapter in float32: the existing one, or a new one, which does not yet change outputs."""
    if not lora_layers(model.base):
        model.base.add_adapter(lora_config(model.backbone, model.memory_config))
    return LanguageAdapter(model.base).float().eval()


def save_adapter(base: PreTrainedModel, folder: str | Path) -> None:
    """Saves `adapter_config.json` and `adapter_model.safetensors`, readable by `load_adapter` and peft.

    A base loaded from a folder is recorded by its absolute path. A save that is killed leaves the old adapter or the
    new one: the weights' metadata holds the checksum of their config.

    Raises:
        DiskFullError: if the disk is full.
    """
    folder = Path(folder)
    state = get_peft_model_state_dict(base, adapter_name=NAME, save_embedding_layers=False)
    state = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config, name = copy.deepcopy(cast("dict[str, LoraConfig]", base.peft_config)[NAME]), recorded_name(base)
    local = name != POCKET and bool(name) and Path(name).expanduser().is_dir()
    config.base_model_name_or_path = os.path.abspath(Path(name).expanduser()) if local else name
    config.inference_mode = True
    with TemporaryDirectory() as temporary:
        config.save_pretrained(temporary)
        content = (Path(temporary) / CONFIG_FILE).read_bytes()
    weights = serialize(state, metadata={"format": "pt", CONFIG_SHA256: hashlib.sha256(content).hexdigest()})
    files.write_pair((folder / WEIGHTS_FILE, weights), (folder / CONFIG_FILE, content), _fits(folder))


def _fits(folder: Path) -> Callable[[bytes], bool]:
    """A function that tells whether a config's content belongs to the weights currently in the folder."""

    def fits(content: bytes) -> bool:
        try:
            with safe_open(folder / WEIGHTS_FILE, "pt") as file:
                expected = (file.metadata() or {}).get(CONFIG_SHA256)
        except (OSError, SafetensorError):
            return False
        return expected == hashlib.sha256(content).hexdigest()

    return fits


def _config_of(folder: Path) -> bytes | None:
    """Reads the config of the adapter in a folder, even after a save was killed; None if there is none."""
    return files.read_matching(folder / CONFIG_FILE, _fits(folder))


def find_adapter(folder: str | Path) -> str | Path:
    """The folder of an adapter: `folder` itself, or the only one below it; a hub name is returned unchanged."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return folder
    if _config_of(path) is not None:
        return path
    found = [place for place in files.folders_with(path, WEIGHTS_FILE) if _config_of(place) is not None]
    if len(found) > 1:
        raise ValueError(f"{folder} holds several adapters; name one of {', '.join(map(str, found))}")
    if not found:
        raise ValueError(f"{folder} is not a LoRA adapter: it has no {CONFIG_FILE}; name a run's adapter/ folder")
    return found[0]


def read_config(folder: str | Path) -> LoraConfig:
    """Reads an adapter's config from a folder or the hub."""
    place = find_adapter(folder)
    try:
        if isinstance(place, Path):
            config = PeftConfig.from_peft_type(**json.loads(_config_of(place) or b""))
        else:
            config = PeftConfig.from_pretrained(place)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"no adapter {folder}: it cannot be read from a folder or the hub ({reason})") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder} is an adapter of type {config.peft_type.value}; only LoRA is supported")
    return config


def load_adapter(model: VisMem | PreTrainedModel, folder: str | Path) -> None:
    """Loads a saved adapter onto a base in float32, replacing any existing one.

    To combine it with memory, equip the base first and load the adapter last.

    Args:
        model: a base, or a model with memory. With `invocation="off"` the latter answers as base plus adapter.
        folder: an adapter's folder, a run's folder containing one adapter, or a hub name.

    Raises:
        ValueError: if it is not a LoRA adapter, was made for another base, or has non-finite tensors.

    Example:
        >>> load_adapter(model, "runs/sft/adapter")
        >>> model.generate(**inputs, invocation="off")
    """
    base = model.base if isinstance(model, VisMem) else model
    config, place = read_config(folder), find_adapter(folder)
    state = {name.removeprefix(PREFIX): t for name, t in load_peft_weights(str(place), device="cpu").items()}
    check_fit(state, base, f"adapter {folder}, made for {config.base_model_name_or_path or 'another base'},")
    check_finite(state, f"adapter {folder}")
    ranks = {len(tensor) for name, tensor in state.items() if ".lora_A." in name}
    if odd_ranks := {config.r, *(config.rank_pattern or {}).values()} - ranks:
        raise ValueError(f"adapter {folder} does not match its {CONFIG_FILE}: no tensor has rank {max(odd_ranks)}")
    if lora_layers(base):
        base.delete_adapter(NAME)
    config.inference_mode = False
    base.add_adapter(config)
    LanguageAdapter(base).float()
    made = {name.replace(f".{NAME}.", "."): t.shape for name, t in base.state_dict().items() if ".lora_" in name}
    if odd := made.items() ^ {(name, t.shape) for name, t in state.items()}:
        base.delete_adapter(NAME)
        raise ValueError(f"adapter {folder} does not match its {CONFIG_FILE}: tensor {min(odd)[0]} differs")
    set_peft_model_state_dict(base, state, NAME)
    base.eval().requires_grad_(False)


def check_fit(state: dict[str, Tensor], base: PreTrainedModel, what: str) -> None:
    """Raises ValueError if an adapter's tensors do not match linear layers of `base`."""
    modules = dict(base.named_modules())
    for name, tensor in state.items():
        layer, _, part = name.partition(".lora_")
        side, axis = ("in_features", 1) if part.startswith("A") else ("out_features", 0)
        size = getattr(modules.get(layer), side, None)
        if size != tensor.shape[axis]:
            found = f"that has {size} {side}" if size else "which has no such linear layer"
            raise ValueError(f"{what} does not fit {recorded_name(base) or type(base).__name__}: {layer}, {found}")


@contextmanager
def without_adapter(base: PreTrainedModel) -> Iterator[None]:
    """Disables the adapter within the context."""
    trained = [p for p in base.parameters() if p.requires_grad]  # peft freezes on disabling, and unfreezes later
    base.disable_adapters()
    try:
        yield
    finally:
        base.enable_adapters()
        base.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
