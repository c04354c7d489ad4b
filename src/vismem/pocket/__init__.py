"""The pocket VLM: a 3.4 M parameter Idefics3 with local attention, trained from scratch on a synthetic world.

Small enough to ship in the package and to run offline in seconds on a laptop; real enough to lose an image during
a long conversation. `load_base` loads the model and its processor; the world, its training rows and its suites of
questions are in this folder, how the model was trained is in `experiments/pocket_base` of the source checkout.
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
        dtype: of the parameters, a `torch.dtype` or its name; the file holds bfloat16.
        path: a Hugging Face model folder.

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
