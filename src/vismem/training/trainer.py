"""`MemoryTrainer`: the stages on transformers' `Trainer` - warm-up, memory formation (I), memory invocation (II).

The Trainer keeps loops, schedules, checkpoints, precision and processes; here is what one update does: write
trajectories, score them, compare them within their groups, and replay them for a gradient. The mathematics is in
`grpo.py`, decoding in `rollout.py`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random as PythonRandom
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from vismem.data import Row, prompt_inputs, reward_columns
from vismem.decoding.invocation import Policy, Random
from vismem.decoding.trace import Rollout
from vismem.model import VisMem
from vismem.training import grpo
from vismem.training.arguments import MemoryTrainingArguments
from vismem.training.replay import Learner, collate, without_memory
from vismem.training.rewards import Rewards, load_rewards
from vismem.training.rollout import counterfactuals, sampling, seed_of, write
from vismem.training.supervised import supervised_batch

log = logging.getLogger(__name__)

TRAINED = {"warmup": ("builder", "short", "long"), "stage1": ("builder", "short", "long"), "stage2": ("tokens",)}
BINS = 5  # of the histogram of where in an answer memory is invoked


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is not a finite number any more."""


@dataclass
class Experience:
    """One batch of prompts and what was made of them.

    Args:
        rows: the prompts, B.
        prompts: the processor's output for them.
        rollouts: B * G, those of a prompt one after another.
        advantages: float [B * G].
        trained: bool [B], False for prompts that there is nothing to learn from.
        old, reference: log-probabilities of each rollout's micro-batch, filled in at its first update.
    """

    rows: list[Row]
    prompts: dict[str, Tensor]
    rollouts: list[Rollout]
    advantages: Tensor
    trained: list[bool]
    old: dict[int, Tensor] = field(default_factory=dict)
    reference: dict[int, Tensor] = field(default_factory=dict)


class PromptSampler(Sampler[int]):
    """Rows in an order that depends on seed and epoch alone, each stretch of `chunk` rows `repeats` times.

    A chunk is what all processes read for one update; repeated, it serves several inner iterations. The last one is
    filled up from the start of the order, so that every update has whole batches, on any number of processes.
    """

    def __init__(self, length: int, chunk: int, repeats: int, seed: int, shuffle: bool = True) -> None:
        self.length, self.chunk, self.repeats, self.seed, self.shuffle = length, chunk, repeats, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.length // self.chunk) * self.chunk * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.length))
        if self.shuffle:
            PythonRandom(f"{self.seed}-{self.epoch}").shuffle(order)
        for start in range(0, self.length, self.chunk):
            for _ in range(self.repeats):
                yield from (order[index % self.length] for index in range(start, start + self.chunk))


class MemoryTrainer(Trainer):
    """Trains one stage of a memory.

    Args:
        model: the model whose memory is trained; its base stays as it is, bit for bit.
        args: of the stage.
        train_dataset: `Row`s, as `vismem.data.load_dataset_rows` gives them.
        reward_funcs: a function of TRL's signature, a name, an import path, or a list of them; by default those that
            `args.rewards` names.
        callbacks, optimizers: as in transformers.

    Example:
        >>> args = MemoryTrainingArguments("runs/one", stage="stage1", learning_rate=5e-5, max_steps=100)
        >>> MemoryTrainer(model, args, rows, reward_funcs="exact").train()
    """

    sampler: PromptSampler | None = None

    def __init__(
        self,
        model: VisMem,
        args: MemoryTrainingArguments,
        train_dataset: Dataset,
        reward_funcs: str | Callable | list | None = None,
        **kwargs: Any,
    ) -> None:
        self.vismem = model
        model.memory.float()
        model.tokens.float()
        for part in ("builder", "short", "long", "tokens"):
            for parameter in model.parameters_of(part):
                parameter.requires_grad_(part in TRAINED[args.stage])
        super().__init__(Learner(model), args, data_collator=list, train_dataset=train_dataset, **kwargs)
        if getattr(model.base, "hf_device_map", None) is None and not getattr(model.base, "is_quantized", False):
            model.base.to(args.device)
        spec = args.rewards if reward_funcs is None else reward_funcs
        self.rewards: Rewards | None = None if args.stage == "warmup" else load_rewards(as_list(spec))
        self.numbers: set[tuple[nn.Module, str]] = set()
        if self.is_fsdp_enabled:
            self.make_shardable()
        self.kl = grpo.AdaptiveKL(args.kl_coef, args.target_kl, args.kl_horizon)
        self.start = {name: p.detach().clone() for name, p in self.trained()}
        self.baselines: dict[str, float] = {}
        self.figures: dict[str, list[float]] = defaultdict(list)
        self.held: list[Experience] = []
        self.current: list[Row] = []
        self.phase = ""
        self.divergence = torch.zeros(2)  # of this update so far, and from how many trajectories

    def make_shardable(self) -> None:
        """Gives parameters that are one number a dimension, as FSDP2 shards none without; `gathered` takes it back."""
        for module in self.learner.modules():
            for name, p in module._parameters.items():
                if p is not None and not p.dim():
                    module._parameters[name] = nn.Parameter(p.detach()[None], requires_grad=p.requires_grad)
                    self.numbers.add((module, name))

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """What this stage trains, by name."""
        return [(name, p) for name, p in self.learner.named_parameters() if p.requires_grad]

    @property
    def learner(self) -> Learner:
        """The learner without what accelerate wraps around it."""
        return self.accelerator.unwrap_model(self.model)

    # What the Trainer asks for.

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if not hasattr(dataset, "__len__"):
            return None
        args = self.args
        chunk = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        shuffle = args.train_sampling_strategy != "sequential"
        self.sampler = PromptSampler(len(dataset), chunk, args.inner_iterations, seed, shuffle)
        return self.sampler

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        # On several processes a run that goes on in the middle of an epoch would not reach the sampler otherwise.
        if self.sampler is not None:
            self.sampler.set_epoch(named["epoch"])
        super()._run_epoch(*positional, **named)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group of parameters; in stage II the end tokens' rows are a second one, at a lower rate."""
        if self.optimizer is None:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args)
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            ends = [p for n, p in named if n.rpartition(".")[2] in ("end", "end_output")]
            rest = [p for n, p in named if n.rpartition(".")[2] not in ("end", "end_output")]
            groups = [{"params": rest, "weight_decay": self.args.weight_decay}]
            if ends:
                rate = options["lr"] * self.args.end_rate
                groups.append({"params": ends, "lr": rate, "weight_decay": self.args.weight_decay})
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: list[Row], num_items_in_batch: Any = None) -> Tensor:
        """One batch of prompts: trajectories and their gradient, or the warm-up's examples and theirs."""
        args, step = self.args, self.state.global_step
        self.learner.train(args.stage == "warmup")  # dropout would make replay another policy than the rollout's
        self.vismem.base.eval()
        self.current = inputs
        try:
            with self.compute_loss_context_manager():
                if args.stage == "warmup":
                    return self.supervised_update(model, inputs)
                full = len(self.held) >= self.current_gradient_accumulation_steps
                repeated = step % args.inner_iterations and full
                if full and not repeated:
                    self.held = []
                if repeated:
                    experience = self.held.pop(0)
                else:
                    with self.whole(), torch.no_grad():
                        experience = self.experience(inputs)
                self.held.append(experience)
                return self.update(model, experience)
        except torch.OutOfMemoryError as error:
            lower = {"update": "micro_batch (or set gradient_checkpointing=true)"}.get(
                self.phase, "per_device_train_batch_size, group_size or max_new_tokens"
            )
            raise RuntimeError(f"out of memory in the {self.phase} of step {step}; lower {lower}") from error

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Notes how long a phase of the update takes."""
        self.phase, start = phase, time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.figures[f"time/{phase}"].append(time.perf_counter() - start)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Holds the trained parameters unsharded, for use outside the learner's forward."""
        sharded = [m for m in self.model_wrapped.modules() if hasattr(m, "unshard")]
        for module in sharded:
            module.unshard()
        try:
            yield
        finally:
            for module in sharded:
                module.reshard()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole tensors in the places of sharded parameters, as `state_dict` gives shards even in `whole`."""
        places = [(m, name, p) for m in self.learner.modules() for name, p in m._parameters.items()]
        sharded = [(m, name, p) for m, name, p in places if hasattr(p, "full_tensor")]
        try:
            for module, name, parameter in sharded:
                whole = parameter.full_tensor()
                whole = whole[0] if (module, name) in self.numbers else whole
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
            yield
        finally:
            for module, name, parameter in sharded:
                module._parameters[name] = parameter

    # Experience: trajectories, scores, advantages.

    def policy(self, seeds: list[int]) -> str | Policy:
        """Who invokes memory in this stage's rollouts: chance in stage I, the model in stage II (Eq. 7-8)."""
        if self.args.stage == "stage2":
            return "learned"
        places = self.places()
        rate = self.args.injection_rate if places == "delimiter" else self.args.anywhere_rate
        return Random(rate, places, seed=seeds)

    def places(self) -> str:
        """Where invocations are put in at this step."""
        if self.args.injection_places != "delimiter-then-anywhere":
            return self.args.injection_places
        return "delimiter" if self.state.global_step * 2 < self.state.max_steps else "anywhere"

    def experience(self, rows: list[Row]) -> Experience:
        """Writes and scores G trajectories for each prompt, and compares them within their group."""
        args, group, model = self.args, self.args.group_size, self.vismem
        prompts = self.inputs(rows)
        seeds = [seed_of(args.seed, self.state.global_step, row.id, copy) for row in rows for copy in range(group)]
        settings = sampling(model, args.max_new_tokens, args.temperature)
        with self.timed("rollout"):
            rollouts = write(model, prompts, self.policy(seeds), settings, seeds, group)
        texts = [self.text(rollout) for rollout in rollouts]
        scores = self.score(rows, rollouts, texts, "train")
        base = self.baseline(rows, prompts)
        gained = scores - base.repeat_interleave(group)
        returns = gained.clone()
        invoked = torch.tensor([bool(rollout.invocations) for rollout in rollouts])
        if args.stage == "stage2":
            swapped = scores.clone()
            with self.timed("counterfactual"):
                sighted = [bool(row.images) for row in rows]
                turned = counterfactuals(model, prompts, rollouts, group, sighted, settings, [s + 1 for s in seeds])
            if turned:
                index = list(turned)
                found = [turned[i] for i in index]
                there = [rows[i // group] for i in index]
                swapped[index] = self.score(there, found, [self.text(r) for r in found], "swapped")
            wrong_kind = grpo.type_penalty(scores, swapped, invoked)
            harmful = grpo.negative_penalty(scores, invoked, group)
            returns = gained - args.penalty_coef * (wrong_kind + harmful)
            self.note("penalties/type", wrong_kind)
            self.note("penalties/negative", harmful)
        advantages, spread = grpo.group_advantages(returns, group)
        best, groups = sum(self.rewards.weights), scores.view(-1, group)
        solved = (groups.amin(1) >= best - 1e-6) & (base >= best - 1e-6)
        trained = [not (args.skip_solved and bool(done)) for done in solved]
        self.note("reward", scores)
        self.note("reward_std", groups.std(1))
        self.note("baseline", base)
        self.note("improvement", gained)
        self.note("advantage_std", spread)
        self.note("frac_reward_zero_std", (spread == 0).float())
        self.note("frac_solved", solved.float())
        self.describe(rollouts)
        self.keep_samples(rows, rollouts, scores, base)
        return Experience(rows, prompts, rollouts, advantages, trained)

    def inputs(self, rows: list[Row]) -> dict[str, Tensor]:
        """The processor's output for these prompts, on the base's device and in its dtype."""
        found = prompt_inputs(self.vismem.processor, rows)
        device, dtype = self.vismem.device, self.vismem.dtype
        return {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in found.items()}

    def text(self, rollout: Rollout) -> str:
        """The words of an answer, as rewards read them."""
        return self.vismem.processor.tokenizer.decode(rollout.tokens, skip_special_tokens=True)

    def score(self, rows: list[Row], rollouts: list[Rollout], texts: list[str], what: str) -> Tensor:
        """S of every answer, float [n]; `rows` are the prompts, each for as many answers as come to it."""
        each = len(texts) // len(rows)
        rows = [row for row in rows for _ in range(each)]
        columns: dict[str, Any] = reward_columns(rows)
        columns |= {"completion_ids": [r.tokens.tolist() for r in rollouts], "trainer_state": self.state}
        replies = [[{"role": "assistant", "content": text}] for text in texts]
        with self.timed("reward"):
            result = self.rewards([row.prompt for row in rows], replies, columns)
        if what == "train":
            for name, part in zip(result.names, result.parts.unbind(1), strict=True):
                self.note(f"rewards/{name}", part[~part.isnan()])
        return result.total.float()

    def baseline(self, rows: list[Row], prompts: dict[str, Tensor]) -> Tensor:
        """S(tau_base), float [B]: the answer without memory. The base never changes, so each prompt has it once."""
        args = self.args
        if args.baseline == "off":
            return torch.zeros(len(rows))
        missing = [row for row in rows if row.id not in self.baselines]
        if missing:
            with self.timed("baseline"):
                sampled = args.baseline == "sample"
                settings = sampling(self.vismem, args.max_new_tokens, args.temperature if sampled else None)
                seeds = [seed_of(args.seed, "baseline", row.id) for row in missing] if sampled else None
                inputs = prompts if len(missing) == len(rows) else self.inputs(missing)
                rollouts = write(self.vismem, inputs, "off", settings, seeds)
            scores = self.score(missing, rollouts, [self.text(r) for r in rollouts], "baseline")
            self.baselines.update(zip((row.id for row in missing), scores.tolist(), strict=True))
        return torch.tensor([self.baselines[row.id] for row in rows])

    # The update.

    def micro_batches(self, experience: Experience) -> list[tuple[list[int], list[int]]]:
        """Prompts and rollouts of each forward and backward, solved prompts left out."""
        group = self.args.group_size
        prompts = [p for p, wanted in enumerate(experience.trained) if wanted]
        size = self.args.micro_batch or max(1, len(prompts)) * group
        if size >= group:
            width = size // group
            chunks = [prompts[i : i + width] for i in range(0, len(prompts), width)]
            return [(chunk, [p * group + c for p in chunk for c in range(group)]) for chunk in chunks]
        return [([p], list(range(p * group + c, p * group + c + size))) for p in prompts for c in range(0, group, size)]

    def update(self, model: nn.Module, experience: Experience) -> Tensor:
        """Replays the trajectories and adds up the gradient of their loss; returns the loss."""
        args = self.args
        total, tokens, figures = torch.zeros(()), 0, defaultdict(float)
        with self.timed("update"):
            chunks = self.micro_batches(experience)
            turns = self.turns(len(chunks))
            for number in range(turns):
                prompts, index = chunks[number] if number < len(chunks) else ([], [])
                batch = self.replayed(experience, prompts, index) if index else None
                if args.kl_coef and number not in experience.reference:
                    experience.reference[number] = self.reference_log_probs(batch)
                with contextlib.nullcontext() if number + 1 == turns else self.accelerator.no_sync(model):
                    log_probs = model(batch)
                    if batch is None:  # nothing to learn here, but other processes wait for this one's gradient
                        self.accelerator.backward(log_probs)
                        continue
                    old = experience.old.setdefault(number, log_probs.detach())
                    sampled = batch["sampled"].to(log_probs.device)
                    losses, found = grpo.grpo_loss(
                        log_probs,
                        old,
                        experience.reference.get(number),
                        experience.advantages[index].to(log_probs.device),
                        sampled,
                        args.clip_ratio,
                        self.kl.coef,
                    )
                    # All trajectories of the batch share the mean, skipped ones as zeros, on every process alike.
                    loss = losses.sum() / (len(experience.rows) * args.group_size)
                    self.check_finite(loss, experience.rows)
                    self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
                total += loss.detach().cpu()
                tokens += int(sampled.sum())
                for name, values in found.items():
                    figures[name] += float(values.sum())
        count = sum(len(index) for _, index in chunks)
        for name in ("kl", "clip_share"):
            self.figures[name].append(figures[name] / max(count, 1))
        self.figures["kl_coef"].append(self.kl.coef)
        self.divergence += torch.tensor([figures["kl"], count])
        if self.accelerator.sync_gradients:  # once an update, however many batches it has
            total_kl, trajectories = self.accelerator.reduce(self.divergence.to(args.device)).tolist()
            self.divergence = torch.zeros(2)
            if args.kl_coef and trajectories:
                self.kl.update(total_kl / trajectories)
        written = sum(len(rollout.tokens) for rollout in experience.rollouts)
        spent = sum(v[-1] for k, v in self.figures.items() if k.startswith("time/") and v)
        self.figures["tokens_per_second"].append(written / max(spent, 1e-9))
        return (total / self.current_gradient_accumulation_steps).to(args.device)

    def turns(self, count: int) -> int:
        """Forwards and backwards of this update: as many on every process where each gathers shards."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            count = int(self.accelerator.gather(torch.tensor([count], device=self.args.device)).max())
        return max(count, 1)

    def replayed(self, experience: Experience, prompts: list[int], index: list[int]) -> dict[str, Any]:
        """A micro-batch's trajectories as arguments of the training forward."""
        whole = len(prompts) == len(experience.rows)
        inputs = experience.prompts if whole else self.inputs([experience.rows[p] for p in prompts])
        pad = self.vismem.processor.tokenizer.pad_token_id or 0
        rollouts = [experience.rollouts[i] for i in index]
        return collate(inputs, rollouts, pad, self.args.stage == "stage2", self.args.temperature)

    @torch.no_grad()
    def reference_log_probs(self, batch: dict[str, Any] | None) -> Tensor:
        """Log-probabilities [n, L] under the stage's reference: its starting parameters, or the base alone."""
        model = self.learner.forward  # past what is wrapped around it, which would shard the parameters again
        if self.args.reference == "no_memory" and batch is not None:
            tokens = torch.tensor(self.vismem.tokens._ids, device=batch["input_ids"].device)
            bare, order = without_memory(batch, tokens)
            found = torch.zeros(batch["input_ids"].shape, device=order.device)
            with self.whole():
                found = found.scatter(1, order, model(bare))
                # What has no counterpart there is compared with itself: no divergence.
                return torch.where(torch.isin(batch["input_ids"], tokens), model(batch), found)
        with self.whole(), self.starting():
            return model(batch)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Puts the stage's starting parameters in place while the context lasts."""
        kept = {name: p.detach().clone() for name, p in self.trained()}
        try:
            with torch.no_grad():
                for name, p in self.trained():
                    p.copy_(self.start[name])
            yield
        finally:
            with torch.no_grad():
                for name, p in self.trained():
                    p.copy_(kept[name])

    def supervised_update(self, model: nn.Module, rows: list[Row]) -> Tensor:
        """The warm-up: cross-entropy of the reference replies with memories put into them."""
        args, size = self.args, self.args.micro_batch or len(rows)
        total = torch.zeros(())
        with self.timed("update"):
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                rngs = [PythonRandom(f"{args.seed}-{self.state.global_step}-{row.id}") for row in part]
                sighted, replies = [bool(row.images) for row in part], [row.completion for row in part]
                batch = supervised_batch(self.vismem, self.inputs(part), replies, sighted, rngs, self.places(), args)
                with contextlib.nullcontext() if start + size >= len(rows) else self.accelerator.no_sync(model):
                    log_probs = model(batch)
                    losses = -grpo.trajectory_mean(log_probs, batch["sampled"].to(log_probs.device))
                    loss = losses.sum() / len(rows)
                    self.check_finite(loss, part)
                    self.accelerator.backward(loss / self.current_gradient_accumulation_steps)
                total += loss.detach().cpu()
        return (total / self.current_gradient_accumulation_steps).to(args.device)

    def check_finite(self, value: Tensor, rows: list[Row]) -> None:
        """Stops at a loss or gradient that is no number, and says where and what to go back to."""
        if torch.isfinite(value.detach()).all():
            return
        last = last_checkpoint(self.args.output_dir)
        raise TrainingDivergedError(
            f"loss or gradient is {float(value.detach().sum())} at step {self.state.global_step}, rows "
            f"{', '.join(row.id for row in rows[:8])}; last good checkpoint: {last or 'none yet'}. "
            "Lower learning_rate or max_grad_norm and go on from there with --resume"
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self.check_finite(torch.as_tensor(norm), self.current)
        return norm

    # What is logged.

    def note(self, name: str, values: Tensor) -> None:
        """Keeps the mean of some figures until they are logged."""
        if len(values):
            self.figures[name].append(float(values.float().mean()))

    def describe(self, rollouts: list[Rollout]) -> None:
        """How long the answers are, and how often, where and with which kind they invoke memory."""
        lengths = torch.tensor([int(rollout.sampled.sum()) for rollout in rollouts])
        self.note("completions/mean_length", lengths)
        delimiters = sum(int(t) in self.vismem.delimiters for rollout in rollouts for t in rollout.tokens.tolist())
        found = [(r, i) for r in rollouts for i in r.invocations]
        self.note("invocations/rate", torch.tensor([float(len(r.invocations)) for r in rollouts]))
        self.note("invocations/answers", torch.tensor([float(bool(r.invocations)) for r in rollouts]))
        for kind in ("short", "long"):
            self.note(
                f"invocations/{kind}", torch.tensor([sum(i.kind == kind for i in r.invocations) for r in rollouts])
            )
        sampled = sum(not i.forced for _, i in found)
        self.figures["invocations/per_delimiter"].append(len(found) / max(delimiters + sampled, 1))
        places = [min(int(BINS * i.position / max(len(r.tokens), 1)), BINS - 1) for r, i in found]
        for part in range(BINS):
            self.figures[f"invocations/position_{part}"].append(places.count(part) / max(len(places), 1))

    def keep_samples(self, rows: list[Row], rollouts: list[Rollout], scores: Tensor, base: Tensor) -> None:
        """Appends sample completions, memory marks in them, to `completions.jsonl`."""
        args = self.args
        due = self.state.global_step % max(int(args.logging_steps), 1) == 0
        if not (due and args.log_completions and self.is_world_process_zero()):
            return
        decode = self.vismem.processor.tokenizer.decode
        lines = []
        for prompt in range(min(args.log_completions, len(rows))):
            index = prompt * args.group_size
            text = decode(rollouts[index].tokens, skip_special_tokens=False)
            said = [part["text"] for part in rows[prompt].prompt[-1]["content"] if part.get("type") == "text"]
            entry = {"step": self.state.global_step, "id": rows[prompt].id, "question": " ".join(said)}
            entry |= {"completion": text, "answer": rows[prompt].answer, "reward": round(float(scores[index]), 4)}
            lines.append(json.dumps(entry | {"baseline": round(float(base[prompt]), 4)}, ensure_ascii=False))
        with open(os.path.join(args.output_dir, "completions.jsonl"), "a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of what was noted since the last time, over all processes."""
        if self.figures and "loss" in logs:
            means = [{name: sum(values) / len(values) for name, values in self.figures.items() if values}]
            everyone = gather_object(means) if self.args.world_size > 1 else means
            for name in sorted({name for found in everyone for name in found}):  # not every process has every figure
                values = [found[name] for found in everyone if name in found]
                logs[name] = round(sum(values) / len(values), 6)
            self.figures.clear()
        super().log(logs, start_time)

    # Checkpoints: written aside and renamed when whole, so that a half-written one is never taken for one.

    def _get_output_dir(self, trial: Any) -> str:
        return self.staging or super()._get_output_dir(trial)

    staging = ""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name, target = f"checkpoint-{self.state.global_step}", Path(self.args.output_dir)
        staging = target / ".partial"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            state = {"kl_coef": self.kl.coef, "baselines": self.baselines}
            own = staging / name / f"memory_state_{self.args.process_index}.pt"
            torch.save({**state, "start": {n: p.cpu() for n, p in self.start.items()}}, own)
            self.accelerator.wait_for_everyone()
        finally:
            self.staging = ""
        if self.args.should_save:
            shutil.rmtree(target / name, ignore_errors=True)
            for file in (staging / name).rglob("*"):
                if file.is_file():
                    with open(file, "rb+") as handle:
                        os.fsync(handle.fileno())
            os.replace(staging / name, target / name)
            shutil.rmtree(staging, ignore_errors=True)
            limit = self.args.save_total_limit
            rotate_checkpoints(output_dir=str(target), save_total_limit=limit, use_mtime=False)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        own = Path(resume_from_checkpoint) / f"memory_state_{self.args.process_index}.pt"
        if not own.is_file():  # saved by fewer processes
            own = own.with_name("memory_state_0.pt")
        if own.is_file():
            state = torch.load(own, weights_only=True)
            self.kl.coef, self.baselines = state["kl_coef"], state["baselines"]
            for name, value in state["start"].items():
                self.start[name].copy_(value)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The learner's weights, for going on, and the settings in words."""
        import safetensors.torch

        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {n: t.detach().cpu().contiguous() for n, t in (state_dict or self.learner.state_dict()).items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.dumps(self.args.to_dict(), indent=2, default=str, sort_keys=True)
        (folder / "training_args.json").write_text(settings + "\n", encoding="utf-8")

    def save_memory(self, folder: str | Path) -> None:
        """Writes the memory as `VisMem.from_pretrained` reads it, whole or not at all."""
        folder = Path(folder)
        with self.gathered():
            if self.args.should_save:
                partial = folder.with_name(folder.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)
                self.vismem.save_pretrained(partial)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(partial, folder)
        self.accelerator.wait_for_everyone()


def as_list(spec: Any) -> list:
    """A single reward as a list of one."""
    return list(spec) if isinstance(spec, (list, tuple)) else [spec]


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a run, or None."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    numbered = [(int(path.name.partition("-")[2]), path) for path in found if path.name.partition("-")[2].isdigit()]
    return str(max(numbered)[1]) if numbered else None
