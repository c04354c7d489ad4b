"""The model card of a memory: `README.md` with the hub's front matter, the run's figures, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vismem.escaping import visible

if TYPE_CHECKING:
    from vismem.model import VisMem

FIGURES = ("reward", "baseline", "improvement", "loss")  # of a stage, as they are logged
CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")  # a hub repository's folder on this machine

USE = """```python
import vismem
from PIL import Image

model = vismem.VisMem.from_pretrained({arguments})
picture = Image.new("RGB", (256, 256), "red")  # or Image.open("photo.jpg")
content = [{{"type": "image", "image": picture}}, {{"type": "text", "text": "What is in the picture?"}}]
inputs = model.processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
out = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=256, return_dict_in_generate=True)
answer = out.sequences[0, inputs["input_ids"].shape[1]:]
print(model.processor.decode(answer, skip_special_tokens=True))
print(out.invocations)
```"""


def model_card(model: VisMem, name: str, base: str, facts: str, trained: int, tags: Sequence[str] = ()) -> str:
    """The text of a memory's `README.md`.

    Args:
        model: the memory with its base.
        name: what the memory is loaded by: its folder, or its repository on the hub.
        base: the base's name: a hub repository, a folder, `"pocket"`, or empty.
        facts: the base's family and sizes, in words.
        trained: number of trained parameters.
        tags: besides those that every memory has.
    """
    config, hub = model.memory_config, hub_name(base)
    shown = cell(hub or Path(base).name or facts.partition(" ")[0])
    total = sum(parameter.numel() for parameter in model.base.parameters())
    front: dict[str, Any] = {"library_name": "vismem", "pipeline_tag": "image-text-to-text"}
    if hub:
        front |= {"base_model": hub, "base_model_relation": "adapter"}
    front["tags"] = list(dict.fromkeys(["vismem", "latent-memory", facts.partition(" ")[0], *tags]))
    made = [
        ("query vectors K", config.query_length),
        ("LoRA", f"r {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout}, query and value"),
        ("start of memory", config.memory_init),
    ]
    if config.content == "soft":
        made = [("content", "learned constants (soft prompts), the same for every image and question")]
    rows: list[tuple[str, Any]] = [
        ("base", f"`{shown}`, {facts}"),
        ("short-term vectors N_s", config.short_length),
        ("long-term vectors N_l", config.long_length),
        *made,
        ("parameters of the memory", f"{trained:,} ({100 * trained / total:.2f} % of the base)"),
    ]
    quoted = visible(json.dumps(name, ensure_ascii=False))
    arguments = quoted if base else f"{quoted}, base=base, processor=processor"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# Latent vision memory for {shown}",
        "Short-term and long-term latent vision memory ([VisMem](https://arxiv.org/abs/2511.11007)) for a frozen\n"
        "vision-language model. These files hold the memory only; the base is loaded by its name and is not changed.",
        "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]),
        "## Training",
        training(model.history),
        "## Use",
        USE.format(arguments=arguments),
    ]
    if base and not hub and base != "pocket":
        parts.append("The base was loaded from a folder. Elsewhere, pass your copy of it as `base=` and `processor=`.")
    return "\n\n".join(parts) + "\n"


def training(history: Sequence[dict[str, Any]]) -> str:
    """A table of the training stages behind a memory, with the figures that each logged last."""
    if not history:
        return "This memory has not been trained."
    names = [name for name in FIGURES if any(name in stage.get("figures", {}) for stage in history)]
    lines = [["stage", "steps", "seed", "data", "rewards", *names]]
    for stage in history:
        plain = [cell(stage.get(name, "")) for name in ("stage", "steps", "seed", "data")]
        figures = stage.get("figures", {})
        values = [f"{figures[name]:.4g}" if name in figures else "" for name in names]
        lines.append([*plain, cell(", ".join(stage.get("rewards", ()))), *values])
    shown = ["| " + " | ".join(line) + " |" for line in lines]
    table = "\n".join([shown[0], "|" + "---|" * len(lines[0]), *shown[1:]])
    return f"{table}\n\nFigures are the last that were logged in training, on training prompts."


def cell(value: object) -> str:
    """A value as text that does not break a line or a table."""
    return visible(str(value)).replace("|", "\\|")


def hub_name(base: str) -> str:
    """The hub repository that a base's name means, or an empty string."""
    if found := CACHED.search(Path(base).as_posix()):
        return f"{found[1]}/{found[2]}"
    if base.count("/") != 1 or Path(base).expanduser().is_dir():
        return ""
    try:
        validate_repo_id(base)
    except HFValidationError:
        return ""
    return base
