"""`vismem info`: parameters, lengths and tokens of a base and its memory; for a config alone, estimates as well."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vismem.cli import meta
from vismem.cli.model_options import add_model_options, load
from vismem.cli.parsing import UsageError, command_parser, echo
from vismem.loading import Loaded

if TYPE_CHECKING:
    from torch import Tensor

PARTS = {"builder": "query builder", "short": "short-term former", "long": "long-term former", "tokens": "four tokens"}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "vismem info",
        "Describes a base and its memory: parameters by part, lengths, tokens, bytes. If --base is a config.json, or\n"
        "a folder with one and no weights, nothing is loaded, and peak memory is estimated.",
        "vismem info --base Qwen/Qwen2.5-VL-7B-Instruct --json\n  vismem info --base my-base/config.json\n"
        "  vismem info --paper",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument(
        "--paper", nargs="?", const="", metavar="FOLDER", help="a table of the paper's bases, or of a folder of configs"
    )
    add_model_options(parser)
    meta.add_load_options(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    paper, config = options.paper is not None, meta.config_alone(options.base)
    if paper and options.base:
        raise UsageError("give --paper or --base, not both (see `vismem info --help`)")
    if options.checkpoint and (paper or config):
        raise UsageError(f"--checkpoint needs a base with weights, and {options.base or '--paper'} has only a config")
    if paper:
        rows = meta.paper(options)
        echo(json.dumps(rows) if options.json else meta.paper_table(rows))
        return 0
    facts = meta.describe(config, options) if config else describe(load(options))
    echo(json.dumps(facts) if options.json else table(facts))
    return 0


def describe(loaded: Loaded) -> dict[str, Any]:
    """The facts of a model, in plain values; `--json` prints them as they are."""
    from vismem.tokens import END_TOKENS, INVOCATION_TOKENS

    model, config = loaded.model, loaded.model.memory_config
    base = list(model.base.parameters())
    parts = {part: list(model.parameters_of(part)) for part in PARTS}
    memory = [parameter for parameters in parts.values() for parameter in parameters]
    total, tokens = count(memory), model.tokens
    ids = {INVOCATION_TOKENS[kind]: index for kind, index in tokens.invocation_ids.items()}
    ids |= {END_TOKENS[kind]: index for kind, index in tokens.end_ids.items()}
    return {
        "base": {
            "name": loaded.base,
            "family": model.backbone.model_type,
            "parameters": count(base),
            "bytes": size(base),
            "hidden_size": model.backbone.hidden_size,
        },
        "memory": {
            "checkpoint": loaded.checkpoint,
            "trained": loaded.checkpoint is not None,
            "parameters": {**{part: count(parameters) for part, parameters in parts.items()}, "total": total},
            "share": total / count(base),
            "bytes": size(memory),
            "lengths": {
                "query": config.query_length * (config.content == "formed"),
                "short": config.short_length,
                "long": config.long_length,
            },
        },
        "tokens": dict(sorted(ids.items(), key=lambda item: item[1])),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def table(facts: dict[str, Any]) -> str:
    """The facts as lines to read."""
    base, memory = facts["base"], facts["memory"]
    numbers, lengths = memory["parameters"], memory["lengths"]
    kept = memory["checkpoint"] or "untrained"
    rows = [
        ("base", f"{base['name']}, {base['family']}, hidden size {base['hidden_size']}"),
        ("", amount(base["parameters"], base["bytes"])),
        ("memory", kept),
        ("", f"{amount(numbers['total'], memory['bytes'])}, {100 * memory['share']:.2f} % of the base"),
        *((f"  {part}", f"{numbers[part]:>13,}  {name}") for part, name in PARTS.items()),
        ("lengths", f"{lengths['query']} query, {lengths['short']} short, {lengths['long']} long vectors"),
    ]
    if facts["tokens"]:
        rows.append(("tokens", "  ".join(f"{token} {index}" for token, index in facts["tokens"].items())))
    rows.append(("runs in", f"{facts['dtype']} on {facts['device']}" if facts["device"] else facts["dtype"]))
    lines = [f"{label:<10}{text}" for label, text in rows]
    return "\n".join([*lines, *meta.estimate_lines(facts["estimates"])] if "estimates" in facts else lines)


def amount(parameters: int, number: int) -> str:
    scale = next((unit for unit in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if number >= unit[1]), ("bytes", 1))
    return f"{parameters:>13,}  parameters, {number / scale[1]:.4g} {scale[0]}"


def count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def size(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
