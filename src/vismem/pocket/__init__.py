"""The pocket VLM: a 3.4 M parameter Idefics3 with local attention, trained from scratch on a world of its own.

Small enough to ship in the package and to run offline in seconds on a laptop; real enough to lose an image during
a long conversation. `load_base` gives the model and its processor; the world and the build are in this folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vismem.bundled import BASE_PATH, MEMORY_PATH

if TYPE_CHECKING:
    import torch


__all__ = ["BASE_PATH", "MEMORY_PATH", "load_base"]


def load_base(dtype: str | torch.dtype = "float32", path: str | Path = BASE_PATH) -> tuple[Any, Any]:
    """Load the pocket VLM.

    Args:
        dtype: the parameters' type, a `torch.dtype` or its name; the file itself holds bfloat16.
        path: an ordinary Hugging Face folder.

    Returns:
        `(model, processor)`: an `Idefics3ForConditionalGeneration` in evaluation mode and its processor.

    Example:
        >>> model, processor = load_base()
    """
    from transformers import AutoProcessor, Idefics3ForConditionalGeneration

    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"no pocket model in {path}; `vismem pocket build` makes one")
    model = Idefics3ForConditionalGeneration.from_pretrained(path, dtype=dtype)
    return model.eval(), AutoProcessor.from_pretrained(path)
