"""The default precision of training: measured on a CPU, known for a GPU.

Processors without bfloat16 instructions multiply bfloat16 matrices many times more slowly than float32 ones. A resumed
run keeps the precision of its checkpoint, so that it ends like a run without interruption.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from vismem.training.checkpoints import last_checkpoint

log = logging.getLogger(__name__)


def choose_precision(args: TrainingArguments, *, bf16: bool | None, dtype: str | None) -> dict[str, Any]:
    """`bf16` and the base's `dtype`, chosen where they are None; the same on every process of the run.

    They are those of the run's newest checkpoint; without one a CPU trains in the dtype it multiplies faster, and a GPU
    in bfloat16 if it supports that.
    """
    found: list[Any] = [None]
    if args.process_index == 0:
        on_cpu, folder = args.device.type == "cpu", str(args.output_dir)
        file = Path(last_checkpoint(folder) or folder) / "training_args.json"
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if bf16 is None and earlier:
            bf16 = bool(earlier["bf16"])
            if bf16 and on_cpu and not bfloat16_is_faster():
                log.warning("continuing in bfloat16, as the run started, although float32 is faster on this processor")
        elif bf16 is None and on_cpu:
            bf16 = dtype == "bfloat16" or bfloat16_is_faster()
        elif bf16 is None:
            bf16 = args.device.type != "cuda" or torch.cuda.is_bf16_supported()
        default = "bfloat16" if bf16 or not on_cpu else "float32"
        found = [{"bf16": bf16, "dtype": dtype or earlier.get("dtype") or default}]
    if args.world_size > 1:
        broadcast_object_list(found)
    return found[0]


@cache
def bfloat16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones; measured once, and logged."""
    bfloat16, float32 = (speed(dtype) for dtype in (torch.bfloat16, torch.float32))
    chosen = "bfloat16" if bfloat16 > float32 else "float32"
    log.info("bfloat16: %.1f GFLOP/s, float32: %.1f: training in %s", bfloat16, float32, chosen)
    return bfloat16 > float32


def speed(dtype: torch.dtype, size: int = 256) -> float:
    """Billions of operations per second in the product of two square matrices; takes some milliseconds."""
    matrix, times = torch.ones(size, size, dtype=dtype), []
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:]) / 1e9  # the first one warms up
