"""Checks of the base and the processor before memory is added."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn


def check_base(base: Any) -> None:
    """Checks that `base` is a loaded, unwrapped model; the error says what to pass instead.

    Raises:
        ValueError: for a path, a wrapper (peft, `torch.compile`, data parallel, a pipeline), a model that has memory or
            an adapter, or one without an output head.
    """
    if isinstance(base, (str, Path)):
        raise ValueError(
            f"base must be a loaded model, not the name or path {str(base)!r}: pass "
            f"AutoModelForImageTextToText.from_pretrained({str(base)!r})"
        )
    kind = type(base).__name__
    if not isinstance(base, nn.Module):
        inner = ": pass its .model and its .processor" if isinstance(getattr(base, "model", None), nn.Module) else ""
        raise ValueError(f"base must be a loaded model, not a {kind}{inner}")
    if "_orig_mod" in dict(base.named_children()):
        raise ValueError(
            "base is wrapped by torch.compile: pass base._orig_mod, and generate(cache_implementation='static', "
            "compile_config=CompileConfig()) to compile decoding"
        )
    if isinstance(base, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"base is wrapped in {kind}: pass base.module")
    if hasattr(base, "memory_config"):
        raise ValueError("base has memory already: pass its .base")
    # peft is slow to import; if nobody did, nothing can be wrapped by it.
    peft, tuners = sys.modules.get("peft"), sys.modules.get("peft.tuners.tuners_utils")
    wrapped = peft is not None and isinstance(base, (peft.PeftModel, peft.PeftMixedModel))
    if wrapped or (tuners is not None and any(isinstance(part, tuners.BaseTunerLayer) for part in base.modules())):
        merge = "pass base.merge_and_unload()" if wrapped else "merge it with peft's merge_and_unload()"
        raise ValueError(
            f"the base has a LoRA adapter already: equip it with memory first, then add the adapter, or {merge}"
        )


def check_head(base: Any) -> None:
    """Raises ValueError for a model without an output head."""
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"base is a {type(base).__name__}, which has no output head: load it with "
            "AutoModelForImageTextToText.from_pretrained"
        )


def check_processor(processor: Any) -> None:
    """Raises ValueError for anything but a processor with a tokenizer."""
    if getattr(processor, "tokenizer", None) is None:
        found = repr(processor) if isinstance(processor, (str, Path)) else f"a {type(processor).__name__}"
        raise ValueError(
            f"processor must be the base's whole processor (AutoProcessor.from_pretrained), not {found}: "
            "memory needs its tokenizer and its image processor"
        )
