"""Training on two processes over gloo, on the CPU: the same update as on one, and a resumed run."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import multi
import pytest
import torch
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from forked import Forked
from safetensors.torch import load_file

import vismem
from vismem.checkpoint import WEIGHTS_FILE

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

CONFIGS = Path(__file__).parents[2] / "configs"
PLAN = {"rows": 6, "group_size": 2, "optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "max_new_tokens": 6}


def launch(launcher: Callable[[list[str]], None], folder: Path, plan: dict, **environment: str) -> list[dict]:
    """Runs `multi.py` on two processes and returns what each recorded.

    The launcher is forked, and forks the two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = [str(Path(multi.__file__)), str(folder), json.dumps(plan)]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with Forked(launcher, script, **settings, **environment) as process:
        _, errors = process.rest()
        assert process.wait() == 0, errors[-4000:]
    return [json.loads((folder / f"facts_{rank}.json").read_text()) for rank in (0, 1)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(script: list[str]) -> None:
    """`torchrun`, with its processes forked from it."""
    address = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    torch.distributed.run.main(["--nproc_per_node=2", *address, "--run_path", "--start_method=fork", *script])


def accelerate(script: list[str]) -> None:
    """`accelerate launch`, which leaves the start of processes to torchrun."""
    given = [f"--config_file={CONFIGS / 'cpu-2.yaml'}", f"--main_process_port={free_port()}", *script]
    args = launch_command_parser().parse_args(given)
    args.run_path, args.start_method = True, "fork"
    launch_command(args)


def alone(folder: Path, plan: dict) -> dict:
    """The same run in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        multi.main(folder, plan)
    finally:
        torch.set_num_threads(threads)
    return json.loads((folder / "facts_0.json").read_text())


def distance(one: Path, other: Path) -> float:
    first, second = load_file(one / "memory" / WEIGHTS_FILE), load_file(other / "memory" / WEIGHTS_FILE)
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


@pytest.mark.parametrize(
    ("stage", "family", "target"), [("stage1", "idefics3", 0.14), ("stage2", "qwen2_5_vl", 0.0019)]
)
def test_two_processes_train_as_one(stage, family, target, tmp_path):
    """Three updates of four prompts: the second fills up an epoch of five, the third begins the next.

    In the third the divergence is about what the controller aims at, so its coefficient follows from the exact value.
    """
    plan = {**PLAN, "rows": 5, "stage": stage, "family": family, "max_steps": 3, "target_kl": target}
    single = alone(tmp_path / "one", {**plan, "per_device_train_batch_size": 4})
    both = launch(accelerate, tmp_path / "two", {**plan, "per_device_train_batch_size": 2})
    assert [facts["world"] for facts in both] == [2, 2]
    half = 2 * PLAN["group_size"]
    order = [(rank, index) for step in range(3) for rank in (0, 1) for index in range(step * half, (step + 1) * half)]
    assert [both[rank]["written"][index] for rank, index in order] == single[
        "written"
    ]  # the same prompts, and for each the same tokens
    for ours, theirs in zip(both[0]["history"][:3], single["history"][:3], strict=True):
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert both[0]["kl_coef"] == both[1]["kl_coef"] == pytest.approx(single["kl_coef"], rel=1e-4)
    assert abs(single["history"][2]["kl"] / target - 1) < 0.1
    alone(tmp_path / "start", {**plan, "per_device_train_batch_size": 4, "learning_rate": 0.0, "max_steps": 1})
    moved = distance(tmp_path / "one", tmp_path / "start")
    assert moved > 1e-3
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-3 * moved


def test_two_processes_stay_in_step_over_bad_rows(tmp_path):
    """Each replaces the bad rows that it meets: one in the first process' share, then one in the second's."""
    plan = {**PLAN, "rows": 8, "stage": "stage1", "family": "qwen2_5_vl", "max_steps": 2, "bad": [1, 6]}
    plan["memory_init"] = "attended"  # looks are sampled, too
    plan["train_sampling_strategy"] = "sequential"
    single = alone(tmp_path / "one", {**plan, "per_device_train_batch_size": 4})
    both = launch(torchrun, tmp_path / "two", {**plan, "per_device_train_batch_size": 2})
    half = 2 * PLAN["group_size"]
    order = [(rank, index) for step in (0, 1) for rank in (0, 1) for index in range(step * half, (step + 1) * half)]
    assert [both[rank]["written"][index] for rank, index in order] == single["written"]
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-5


def test_two_processes_resume(tmp_path):
    """From a checkpoint in the middle of the second epoch, with sampled looks."""
    plan = {**PLAN, "stage": "stage1", "family": "idefics3", "per_device_train_batch_size": 2, "max_steps": 4}
    plan["memory_init"] = "attended"
    plan |= {"optim": "adamw_torch", "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 3}
    whole = launch(torchrun, tmp_path / "whole", plan)
    saved = tmp_path / "whole" / "run" / "checkpoint-3"
    again = launch(torchrun, tmp_path / "again", {**plan, "resume": str(saved)})
    assert [facts["written"] for facts in again] == [facts["written"][-4:] for facts in whole]
    assert distance(tmp_path / "whole", tmp_path / "again") == 0


def test_sharded_training_gives_the_same_memory(tmp_path):
    """FSDP2 as in `configs/fsdp2.yaml`: the same memory as one process makes, and checkpoints."""
    plan = {**PLAN, "stage": "stage1", "family": "idefics3", "max_steps": 2, "micro_batch": 2}
    plan["memory_init"] = "attended"
    plan |= {"save_strategy": "steps", "save_steps": 1}
    options = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
    environment = {name.upper(): str(value).lower() for name, value in options.items()}
    environment |= {name.upper(): value for name, value in options.items() if isinstance(value, str)}
    environment["ACCELERATE_USE_FSDP"] = "true"
    single = alone(tmp_path / "one", {**plan, "per_device_train_batch_size": 4})
    both = launch(torchrun, tmp_path / "two", {**plan, "per_device_train_batch_size": 2}, **environment)
    assert min(facts["sharded"] for facts in both) > 20
    assert both[0]["written"] and both[0]["kl_coef"] == pytest.approx(single["kl_coef"], rel=1e-5)
    alone(tmp_path / "start", {**plan, "per_device_train_batch_size": 4, "learning_rate": 0.0, "max_steps": 1})
    moved = distance(tmp_path / "one", tmp_path / "start")
    assert moved > 1e-3
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-3 * moved
    base, processor = multi.training_runs.tiny.base_and_processor("idefics3")
    assert vismem.VisMem.from_pretrained(tmp_path / "two" / "memory", base=base, processor=processor)
