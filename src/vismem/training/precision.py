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

SIZE, ROUNDS = 256, 5  # size and number of the products; some milliseconds in all


def choose_precision(args: TrainingArguments, *, bf16: bool | None, dtype: str | None) -> dict[str, Any]:
    """Chooses `bf16` and `dtype` if the settings leave them open; the same on every process of the run.

    Values that are set stay. Others are those of the run's newest checkpoint; without one a CPU trains in the dtype it
    multiplies faster, and a GPU in bfloat16 if it supports that.

    Args:
        args: of the run.
        bf16: whether to compute in bfloat16; None to choose.
        dtype: of the base's weights; None to choose.
    """
    found: list[Any] = [_choice(args, bf16=bf16, dtype=dtype) if args.process_index == 0 else None]
    if args.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def _choice(args: TrainingArguments, *, bf16: bool | None, dtype: str | None) -> dict[str, Any]:
    earlier = _recorded(str(args.output_dir))
    on_cpu = args.device.type == "cpu"
    if bf16 is None and earlier:
        bf16 = bool(earlier["bf16"])
        if bf16 and on_cpu and not bfloat16_is_faster():
            log.warning("training goes on in bfloat16, as it began, though float32 is faster on this processor")
    elif bf16 is None and on_cpu:
        bf16 = dtype == "bfloat16" or bfloat16_is_faster()
    elif bf16 is None:
        bf16 = args.device.type != "cuda" or torch.cuda.is_bf16_supported()
    return {"bf16": bf16, "dtype": dtype or earlier.get("dtype") or ("bfloat16" if bf16 or not on_cpu else "float32")}


def _recorded(output_dir: str) -> dict[str, Any]:
    """The settings of a run's newest checkpoint; empty if there is none."""
    file = Path(last_checkpoint(output_dir) or output_dir) / "training_args.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@cache
def bfloat16_is_faster() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones; measured once, and logged."""
    bfloat16, float32 = (speed(dtype) for dtype in (torch.bfloat16, torch.float32))
    chosen = "bfloat16" if bfloat16 > float32 else "float32"
    log.info("bfloat16: %.1f GFLOP/s, float32: %.1f: training in %s", bfloat16, float32, chosen)
    return bfloat16 > float32


def speed(dtype: torch.dtype) -> float:
    """Billions of operations per second in the product of two matrices [256, 256], the median of a few."""
    left, right = torch.ones(SIZE, SIZE, dtype=dtype), torch.ones(SIZE, SIZE, dtype=dtype)
    left @ right  # warm-up
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return 2 * SIZE**3 / statistics.median(times) / 1e9
