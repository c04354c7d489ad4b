"""The model card of a memory: `README.md` with the hub's front matter, training metrics and a usage example."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vismem.escaping import visible
from vismem.hub import repository_of

if TYPE_CHECKING:
    from vismem.checkpoint import BaseFacts
    from vismem.model import VisMem

METRICS = ("reward", "baseline", "improvement", "loss")  # logged by a stage

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


def model_card(model: VisMem, name: str, base: str, facts: BaseFacts, tags: Sequence[str] = ()) -> str:
    """The text of a memory's `README.md`.

    Args:
        model: the memory with its base.
        name: the folder or hub repository that the memory is loaded from.
        base, facts: the base's name (a hub repository, a folder, `"pocket"`, or empty), and its sizes.
        tags: additional tags.
    """
    config, hub, family = model.memory_config, repository_of(base), facts.model_type
    shown = cell(hub or Path(base).name or family)
    total = sum(parameter.numel() for parameter in model.base.parameters())
    trained = sum(parameter.numel() for part in (model.memory, model.tokens) for parameter in part.parameters())
    front: dict[str, Any] = {"library_name": "vismem", "pipeline_tag": "image-text-to-text"}
    if hub:
        front |= {"base_model": hub, "base_model_relation": "adapter"}
    front["tags"] = list(dict.fromkeys(["vismem", "latent-memory", family, *tags]))
    settings: list[tuple[str, Any]] = [
        ("query vectors K", config.query_length),
        ("LoRA", f"r {config.lora_r}, alpha {config.lora_alpha}, dropout {config.lora_dropout}, query and value"),
        ("start of memory", config.memory_init),
    ]
    if config.content == "soft":
        settings = [("content", "learned constants (soft prompts), the same for every image and question")]
    rows = [
        ("", ""),
        ("---", "---"),
        ("base", f"`{shown}`, {facts}"),
        ("short-term vectors N_s", config.short_length),
        ("long-term vectors N_l", config.long_length),
        *settings,
        ("parameters of the memory", f"{trained:,} ({100 * trained / total:.2f} % of the base)"),
    ]
    quoted = visible(json.dumps(name, ensure_ascii=False))
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# Latent vision memory for {shown}",
        "Short-term and long-term latent vision memory ([VisMem](https://arxiv.org/abs/2511.11007)) for a frozen\n"
        "vision-language model. These files hold only the memory; the base is loaded by name and stays unchanged.",
        table(rows),
        "## Training",
        training(model.history),
        "## Use",
        USE.format(arguments=quoted if base else f"{quoted}, base=base, processor=processor"),
    ]
    if base and not hub and base != "pocket":
        parts.append(
            "The base was loaded from a local folder. On another machine, pass your copy as `base=` and `processor=`."
        )
    return "\n\n".join(parts) + "\n"


def training(history: Sequence[dict[str, Any]]) -> str:
    """A table of the memory's training stages, with the last metrics each one logged."""
    if not history:
        return "This memory has not been trained."
    names = [name for name in METRICS if any(name in stage.get("figures", {}) for stage in history)]
    head = ["stage", "steps", "seed", "data", "rewards", *names]
    lines = [head, ["---"] * len(head)]
    for stage in history:
        plain = [cell(stage.get(name, "")) for name in ("stage", "steps", "seed", "data")]
        metrics = stage.get("figures", {})
        values = [f"{metrics[name]:.4g}" if name in metrics else "" for name in names]
        lines.append([*plain, cell(", ".join(stage.get("rewards", ()))), *values])
    return f"{table(lines)}\n\nMetrics are the last ones logged during training, on training prompts."


def table(rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first row is the head."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def cell(value: object) -> str:
    """A value as text that does not break a line or a table cell."""
    return visible(str(value)).replace("|", "\\|")
