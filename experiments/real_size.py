"""One warm-up update with the gaze teacher and one update of stage I with sampled looks, on a base of real size.

The base is Qwen2.5-VL-3B by its own config, with random bfloat16 weights; the prompt has 1,024 visual tokens. Nothing
can be learned from random weights: this shows that both updates run on a CPU, in what time and in how much memory,
beside the estimate of `vismem info`. Linux only; needs about 16 GB and bfloat16 instructions to end within minutes.

    python experiments/real_size.py --out results/real_size.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "src" / "vismem" / "cli" / "configs" / "Qwen2.5-VL-3B.json"
VISUAL, WORDS, ANSWER, ROWS = 1024, 32, 64, 2


def timed(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """What `work` returns, its seconds, and the peak of resident memory meanwhile."""
    from memory import peak

    found: list[Any] = []
    begun = time.perf_counter()
    most = peak(lambda: found.append(work()))
    return found[0], round(time.perf_counter() - begun, 1), most


def random_base(layers: int | None) -> tuple[Any, Any]:
    """The base with random weights, and a tokenizer of its vocabulary."""
    import torch
    from bases import word_tokenizer
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = Qwen2_5_VLConfig.from_pretrained(CONFIG)
    if layers:
        config.text_config.num_hidden_layers = layers
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    with no_init_weights():
        base = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    base.tie_weights()
    return base, SimpleNamespace(tokenizer=word_tokenizer(config.get_text_config().vocab_size))


def measure(layers: int | None) -> dict[str, Any]:
    """Both updates."""
    import torch
    from bases import prompt
    from memory import status

    import vismem
    from vismem.decoding.policies import Forced
    from vismem.estimates import Load, read_shape, training
    from vismem.training import grpo
    from vismem.training.replay import Learner, chosen_blocks, collate
    from vismem.training.rollout import sampling, write

    before = status("VmRSS")
    base, processor = random_base(layers)
    model = vismem.VisMem(base, processor, vismem.VisMemConfig(memory_init="attended"))
    base.requires_grad_(False)
    model.memory.float(), model.tokens.float()
    model.gradient_checkpointing_enable()
    parts = {part: sum(p.numel() for p in model.parameters_of(part)) for part in ("builder", "short", "long", "tokens")}
    trained = list(model.memory.parameters())
    optimizer, learner = torch.optim.AdamW(trained, lr=1e-5), Learner(model)
    inputs = prompt(base, VISUAL, 1)
    shape, config = read_shape(model.backbone), model.memory_config
    found: dict[str, Any] = {"base": CONFIG.stem, "parameters": shape.parameters, "memory": sum(parts.values())}
    found |= {"visual_tokens": VISUAL, "prompt_tokens": inputs["input_ids"].shape[1] - VISUAL, "answer_tokens": ANSWER}
    found |= {"threads": torch.get_num_threads(), "layers": layers or "all"}

    def step(loss: Any) -> float:
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def estimate(stage: str, prompts: int, group: int) -> int:
        load = Load(VISUAL, found["prompt_tokens"], ANSWER, 2, prompts, group, prompts * group)
        told = training(shape, parts, config, load, stage, checkpointing=True)
        kept = sum(told[name] for name in ("weights", "memory", "optimizer", "start"))
        return kept + max(sum(told["rollout"].values()) if group > 1 else 0, sum(told["update"].values()))

    # The warm-up: a reply of random words with two looks, whose places the data names.
    rng, short = Random(0), [model.tokens.invocation_ids["short"], model.tokens.end_ids["short"]]
    words = [rng.randrange(1000, 2000) for _ in range(ANSWER)]
    reply = torch.tensor([[*words[:8], *short, *words[8:40], *short, *words[40:]]])
    ids = torch.cat([inputs["input_ids"], reply], 1)
    sampled = torch.cat([torch.zeros_like(inputs["input_ids"]), ~torch.isin(reply, torch.tensor(short))], 1).bool()
    call = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "sampled": sampled, "gaze": True}
    call["prompt_length"] = inputs["input_ids"].shape[1]

    def warm_up() -> dict[str, float]:
        replayed = learner(call)
        loss = -grpo.trajectory_mean(replayed.log_probs, sampled).mean() + replayed.gaze.mean()
        return {"loss": float(loss.detach()), "gaze": float(replayed.gaze.mean().detach()), "norm": step(loss)}

    values, seconds, most = timed(warm_up)
    found["warmup"] = {**values, "seconds": seconds, "peak": most - before, "estimate": estimate("warmup", 1, 1)}
    print(json.dumps(found["warmup"]), file=sys.stderr, flush=True)

    # Stage I: trajectories with a sampled look each, replayed with their own blocks.
    policy = Forced([(row, at, "short") for row in range(ROWS) for at in (8, 24)])

    def roll() -> Any:
        return write(model, inputs, policy, sampling(model, ANSWER, 1.0), list(range(ROWS)), ROWS, sample_blocks=True)

    rollouts, seconds, most = timed(roll)
    found["rollout"] = {"seconds": seconds, "peak": most - before, "tokens": sum(len(r.tokens) for r in rollouts)}
    batch, advantages = collate(inputs, rollouts, 0, 1.0, formed=False), torch.tensor([1.0, -1.0])

    def stage_one() -> dict[str, float]:
        replayed = learner(batch)
        old, taken = replayed.detach(), chosen_blocks(rollouts, torch.device("cpu"))
        losses, _ = grpo.grpo_loss(replayed.log_probs, old.log_probs, None, advantages, batch["sampled"], 0.2, 0.0)
        looks, _ = grpo.grpo_loss(replayed.choices, old.choices, None, advantages, taken, 0.2, 0.0)
        decoded = torch.cat([i.choice.log_probs for r in rollouts for i in r.invocations])
        gap = float((old.choices[taken] - decoded).abs().max())
        return {"choice_gap": gap, "norm": step((losses + config.short_length * looks).mean())}

    values, seconds, most = timed(stage_one)
    found["stage1"] = {**values, "seconds": seconds, "peak": most - before, "estimate": estimate("stage1", 1, ROWS)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "real_size.json")
    parser.add_argument("--layers", type=int, help="that many layers of the language model only, to try it out")
    options = parser.parse_args()
    sys.path.append(str(ROOT / "benchmarks"))
    from memory import SETTINGS

    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SETTINGS})
    import torch
    from decode import machine_facts

    found = {"command": "python experiments/real_size.py", "machine": machine_facts("cpu", torch.bfloat16)}
    found |= measure(options.layers)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
