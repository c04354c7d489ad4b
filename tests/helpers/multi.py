"""One process of a training run on several, as `test_distributed.py` starts them: trains a stage on a tiny model.

Arguments: a folder for results, and the run's settings as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import training_runs
from PIL import Image

import vismem.training.experience as experience
from vismem.data import Row
from vismem.training.replay import Learner


def fsdp_on_cpu() -> None:
    """Lets accelerate, which shards only on accelerators, shard on the CPU too; the sharding itself is PyTorch's."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    real = AcceleratorState.__init__

    def with_fsdp(self, *given, fsdp_plugin=None, **named):
        real(self, *given, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def main(folder: Path, plan: dict) -> None:
    plan = dict(plan)
    stage, family, count = plan.pop("stage"), plan.pop("family"), plan.pop("rows")
    resume, rank = plan.pop("resume", None), int(os.environ.get("RANK", "0"))
    rows = with_bad_rows(training_runs.rows(count), plan.pop("bad", ()))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        fsdp_on_cpu()
    written, write = [], experience.write

    def kept(model, inputs, policy, config, seeds=None, copies=1, **named):
        found = write(model, inputs, policy, config, seeds, copies, **named)
        if copies > 1:
            written.extend(rollout.tokens.tolist() for rollout in found)
        return found

    experience.write = kept
    try:
        record(folder, plan, stage, family, rows, resume, rank, written, plan.pop("memory_init", "pooled"))
    finally:
        experience.write = write


def with_bad_rows(rows: list[Row], bad: Sequence[int]) -> list[Row]:
    """The rows, those at `bad` with a picture that Qwen's processor refuses."""
    tall = Image.new("RGB", (1, 300))
    return [replace(row, images=[tall]) if index in bad else row for index, row in enumerate(rows)]


def record(folder, plan, stage, family, rows, resume, rank, written, memory_init) -> None:
    """Trains, and records the memory and what to compare the processes by."""
    torch.manual_seed(7)
    model = training_runs.equip(family, lora_dropout=0.0, memory_init=memory_init)
    base = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    args = training_runs.settings(folder / "run", stage, **plan)
    done = training_runs.train(model, args, rows, resume=resume)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.base.state_dict().items())
    model.base.name_or_path = "tiny"
    done.save_memory(folder / "memory")
    sharded = sum(hasattr(p, "full_tensor") for p in Learner(model).parameters())
    facts = {"world": args.world_size, "sharded": sharded, "written": written, "history": done.state.log_history}
    facts["kl_coef"] = done.kl.coef
    (folder / f"facts_{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
