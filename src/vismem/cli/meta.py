"""A base that is only a config: its size, its memory's size, and estimates of the memory it needs to run.

Base and memory are built on torch's meta device, which holds shapes and no data. The configs of the paper's bases are
in `configs/`, one small JSON file each.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vismem.cli.parsing import CommandError, whole
from vismem.config import Kind, VisMemConfig
from vismem.estimates import Load, Shape, inference, read_shape, training
from vismem.loading import silence_libraries

if TYPE_CHECKING:
    from vismem.backbones import Backbone

CONFIGS = Path(__file__).parent / "configs"
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "*.pt", "*.gguf")  # a folder with one of these is a whole base
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BATCHES = (1, 8)
STAGES = {"warmup": "warm-up", "stage1": "stage I", "stage2": "stage II"}


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Adds options for the workload that the estimates assume; their names are those of `Load`."""
    group = parser.add_argument_group("estimates (for a base that is only a config)")
    meanings = {
        "visual_tokens": "image tokens in each prompt",
        "prompt_tokens": "text tokens in each prompt",
        "answer_tokens": "tokens in each answer",
        "invocations": "memory invocations in each answer, half of each kind",
        "prompts": "prompts in a training batch",
        "group_size": "answers to each prompt in stages I and II",
        "micro_batch": "trajectories in each forward and backward pass",
    }
    for name, meaning in meanings.items():
        low, default = (0 if name == "invocations" else 1), getattr(Load, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=whole(low, 10**6),
            default=default,
            metavar="N",
            help=f"{meaning} (default: {default})",
        )


def config_alone(name: str | None) -> Path | None:
    """The config file that `--base` names if it names no weights: a JSON file, or a folder with just a config."""
    path = Path(name or "").expanduser()
    if path.is_file() and path.suffix == ".json":
        return path
    config = path / "config.json"
    if name and config.is_file() and not any(found for pattern in WEIGHTS for found in path.glob(pattern)):
        return config
    return None


def build_base(path: Path) -> Backbone:
    """The base that a config file describes, on the meta device."""
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

    from vismem.backbones import backbone_of
    from vismem.cli.remote_base import MODEL_TYPE, RemoteBase

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda fields: SimpleNamespace(**fields))
        known = config.model_type in CONFIG_MAPPING
    except (ValueError, AttributeError, TypeError) as error:
        raise CommandError(f"{path} is not a base's config: it must be JSON with a model_type") from error
    try:
        if known:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        backbone_of(SimpleNamespace(config=config))  # an unknown family is refused before anything is built
        with torch.device("meta"):
            remote = config.model_type == MODEL_TYPE
            return backbone_of(RemoteBase(config) if remote else AutoModelForImageTextToText.from_config(config))
    except Exception as error:
        raise CommandError(f"cannot count the base of {path}: {error}") from error


def memory_parameters(backbone: Backbone, config: VisMemConfig) -> dict[str, int]:
    """Trainable parameters by part of a memory on a base; all are on the meta device."""
    import torch

    from vismem.memory import memory_of
    from vismem.tokens import MemoryTokens

    with torch.device("meta"):
        memory = memory_of(backbone, config)
        ids: dict[Kind, int] = {"short": 0, "long": 1}  # any will do
        tokens = MemoryTokens(backbone.embeddings, backbone.head, ids, ids, delimiter=0, noise=0.0)
    parts = {"builder": memory.builder, "short": memory.short, "long": memory.long, "tokens": tokens}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def describe(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The facts of a base and an untrained memory of the paper's lengths, in plain values."""
    silence_libraries(debug=options.debug)
    backbone, config = build_base(path), VisMemConfig.preset("paper")
    shape = read_shape(backbone)
    record = json.loads(path.read_text(encoding="utf-8"))
    dtype = options.dtype if options.dtype != "auto" else record.get("dtype") or record.get("torch_dtype")
    dtype = dtype if dtype in BYTES else "bfloat16"
    workload = {field.name: getattr(options, field.name) for field in fields(Load) if field.name != "bytes_each"}
    load, parts = Load(**workload, bytes_each=BYTES[dtype]), memory_parameters(backbone, config)
    total = sum(parts.values())
    return {
        "base": {
            "name": record.get("_name_or_path") or str(path.parent if path.name == "config.json" else path),
            "family": shape.family,
            "parameters": shape.parameters,
            "bytes": shape.parameters * load.bytes_each,
            "hidden_size": shape.language.hidden,
        },
        "memory": {
            "checkpoint": None,
            "trained": False,
            "parameters": {**parts, "total": total},
            "share": total / shape.parameters,
            "bytes": total * load.bytes_each,
            "lengths": {"query": config.query_length, "short": config.short_length, "long": config.long_length},
        },
        "tokens": {},  # without a tokenizer there are no ids
        "dtype": dtype,
        "device": None,
        "estimates": estimates(shape, parts, config, load),
    }


def estimates(shape: Shape, parts: dict[str, int], config: VisMemConfig, load: Load) -> dict[str, Any]:
    """Peak memory in bytes, part by part, and the assumed workload."""
    return {
        "assumptions": asdict(load),
        "inference": {str(rows): inference(shape, parts, config, load, rows) for rows in BATCHES},
        **{
            stage: {
                name: training(shape, parts, config, load, stage, checkpointing=checkpointing)
                for name, checkpointing in (("plain", False), ("gradient_checkpointing", True))
            }
            for stage in STAGES
        },
    }


def paper(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The facts of every config in a folder, by default those of the paper's bases, smallest of a family first."""
    folder = Path(options.paper).expanduser() if options.paper else CONFIGS
    if not folder.is_dir():
        raise CommandError(f"--paper {options.paper}: no such folder; name one with configs, or leave the name out")
    found = [*folder.glob("*.json"), *folder.glob("*/config.json")]
    if not found:
        raise CommandError(f"--paper {options.paper}: the folder has neither NAME.json nor NAME/config.json")
    facts = [describe(path, options) for path in found]
    return sorted(facts, key=lambda each: (each["base"]["family"], each["base"]["parameters"]))


# As text.


def workload_line(load: dict[str, Any]) -> str:
    return (
        f"{load['visual_tokens']} visual + {load['prompt_tokens']} prompt + {load['answer_tokens']} answer tokens, "
        f"{load['invocations']} invocations; training: {load['prompts']} prompts x {load['group_size']} answers, "
        f"micro-batch {load['micro_batch']}"
    )


def estimate_lines(found: dict[str, Any]) -> list[str]:
    """The estimates of one base as lines: the assumed workload, then a total and its largest parts for each case."""
    cases = {f"answer {rows}": parts for rows, parts in found["inference"].items()}
    for stage, name in STAGES.items():
        cases[name] = found[stage]["plain"]
        cases[f"{name}, checkpointing"] = found[stage]["gradient_checkpointing"]
    return [
        "estimated peaks of memory with fused attention, without allocator and device context",
        f"  {workload_line(found['assumptions'])}",
        *(case_line(name, parts) for name, parts in cases.items()),
    ]


def case_line(name: str, parts: dict[str, Any]) -> str:
    moment = parts[parts["widest"]] if "widest" in parts else {}
    single = {part: value for part, value in {**parts, **moment}.items() if isinstance(value, int) and part != "total"}
    largest = sorted(single.items(), key=lambda item: -item[1])[:4]
    named = ", ".join(f"{part.replace('_', ' ')} {value / 1e9:.2f}" for part, value in largest)
    when = f" in the {parts['widest']}" if "widest" in parts else ""
    return f"  {name:<24}{parts['total'] / 1e9:>8.2f} GB{when}: {named}"


def paper_table(rows: list[dict[str, Any]]) -> str:
    """One line for each base: parameters in millions, share, and peaks in GB."""
    head = ("base", "params", "builder", "short", "long", "tokens", "share", "file", "b1", "b8", "warm-up", "I", "II")
    lines = [head]
    for facts in rows:
        base, memory, found = facts["base"], facts["memory"], facts["estimates"]
        peaks = [found["inference"][str(batch)]["total"] for batch in BATCHES]
        peaks += [found[stage]["gradient_checkpointing"]["total"] for stage in STAGES]
        lines.append(
            (
                base["name"].rpartition("/")[2],
                f"{base['parameters'] / 1e9:.2f} B",
                *(f"{memory['parameters'][part] / 1e6:.2f} M" for part in ("builder", "short", "long", "tokens")),
                f"{100 * memory['share']:.2f} %",
                f"{memory['bytes'] / 1e6:.0f} MB",
                *(f"{peak / 1e9:.1f}" for peak in peaks),
            )
        )
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(f"{cell:{'>' if i else '<'}{wide[i]}}" for i, cell in enumerate(line)) for line in lines]
    large = [facts["base"]["name"] for facts in rows if facts["memory"]["share"] >= 0.01]
    text += [
        "",
        "b1, b8: answering in a batch of 1 and 8; warm-up, I, II: an update with gradient checkpointing; peaks in GB,",
        f"estimated for {workload_line(rows[0]['estimates']['assumptions'])}.",
        f"Not below 1 % of the base: {', '.join(large)}." if large else "All below 1 % of their base.",
    ]
    return "\n".join(line.rstrip() for line in text)
