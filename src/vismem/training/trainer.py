"""`MemoryTrainer`: every stage on transformers' `Trainer`: warm-up, formation (I), invocation (II) and baselines.

The Trainer handles loops, schedules, precision and processes. This file is the update: collect experience
(`experience.py`), replay its trajectories (`replay.py`), and take the gradient of their loss (`grpo.py`).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerState

from vismem import files
from vismem.data import Row
from vismem.decoding.output import NonFiniteError
from vismem.model import VisMem
from vismem.training import grpo
from vismem.training.arguments import NO_EVALUATION, MemoryTrainingArguments
from vismem.training.baselines import adapter_of, without_adapter
from vismem.training.checkpoints import (
    STATE,
    CheckpointingTrainer,
    drop_newer,
    last_checkpoint,
    newest_checkpoint,
    verify,
)
from vismem.training.experience import Collector, Experience, inputs_of
from vismem.training.metrics import Metrics, Samples
from vismem.training.replay import Learner, collate, decoded_log_probs, without_memory
from vismem.training.rewards import load_rewards
from vismem.training.rows import training_rows
from vismem.training.sampler import PromptSampler
from vismem.training.sharding import make_shardable, whole
from vismem.training.supervised import supervised_batch
from vismem.training.watch import SignalWatch

EVALUATION = ("eval_dataset", "compute_metrics", "preprocess_logits_for_metrics")  # of transformers' trainer
FIXED = ("data_collator", "compute_loss_func", "model_init")  # likewise, but fixed by the method


class TrainingDivergedError(RuntimeError):
    """The loss, the gradient or a rollout's scores are not finite."""


class MemoryTrainer(CheckpointingTrainer):
    """Trains one stage of a memory, or a baseline: an adapter of the base's language model.

    Args:
        model: the model whose memory is trained; its base does not change, bit for bit. A baseline trains the base's
            adapter further, or adds a new one.
        args: of the stage.
        train_dataset: a `datasets.Dataset` or `IterableDataset`, a list of dictionaries, a file name, or `Row`s; read
            by `vismem.data.load_dataset_rows`.
        reward_funcs: a function with TRL's signature, a name, an import path, or a list of them; by default
            `args.rewards`.
        callbacks, optimizers: as in transformers.

    Raises:
        ValueError: for an argument that training does not use, such as `eval_dataset`.

    Example:
        >>> args = MemoryTrainingArguments("runs/one", stage="stage1", learning_rate=5e-5, max_steps=100)
        >>> MemoryTrainer(model, args, rows, reward_funcs="exact").train()
    """

    sampler: PromptSampler | None = None

    def __init__(
        self,
        model: VisMem,
        args: MemoryTrainingArguments,
        train_dataset: Any,
        reward_funcs: str | Callable[..., Any] | list[str | Callable[..., Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if any(kwargs.get(name) is not None for name in EVALUATION):
            raise ValueError(NO_EVALUATION)
        if own := sorted(name for name in FIXED if kwargs.pop(name, None) is not None):
            raise ValueError(f"MemoryTrainer has its own {own[0]}; leave it out")
        self.vismem, self.history = model, model.history
        rows = training_rows(train_dataset, args, model)
        model.memory.float()
        model.tokens.float()
        model.base.requires_grad_(False)
        adapter = adapter_of(model).requires_grad_(True) if args.plan.adapts else None
        for part in ("builder", "short", "long", "tokens"):
            for parameter in model.parameters_of(part):
                parameter.requires_grad_(part in args.plan.trains)
        super().__init__(
            Learner(model, adapter), args, data_collator=cast(Any, list), train_dataset=cast(Any, rows), **kwargs
        )
        if getattr(model.base, "hf_device_map", None) is None and not getattr(model.base, "is_quantized", False):
            model.base.to(args.device)
        if self.is_deepspeed_enabled:  # its engine steps at each backward, and an update has several
            raise ValueError("DeepSpeed is not supported; configs/fsdp2.yaml shards what is trained without it")
        self.numbers = make_shardable(self.learner) if self.is_fsdp_enabled else set()
        self.kl = grpo.AdaptiveKL(args.kl_coef, args.target_kl, args.kl_horizon)
        self.start = {name: p.detach().clone() for name, p in self.trained()}
        self.metrics, self.samples = Metrics(), Samples(str(args.output_dir))
        self.watch = SignalWatch(self, invokes=args.plan.invokes in ("chance", "model"))
        self.add_callback(self.watch)
        self.collector: Collector | None = None
        if not args.plan.supervised:
            rewards = load_rewards(args.rewards if reward_funcs is None else reward_funcs)
            samples = self.samples if self.is_world_process_zero() else None
            self.collector = Collector(model, args, rewards, self.metrics, samples)
        self.held: list[Experience] = []  # of this update's batches, for further inner iterations
        self.current: list[Row] = []
        self.divergence = torch.zeros(2)  # sum over this update so far, and its number of trajectories

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters with their names."""
        return [(name, p) for name, p in self.learner.named_parameters() if p.requires_grad]

    # Called by the Trainer.

    def train(  # transformers' signature
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Trains; leaves the model in evaluation mode, with this stage in its `history`.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest whole one of `output_dir`, if there
                is one.
            *args, **kwargs: as in transformers.

        Raises:
            ValueError: if this trainer has trained before, or `output_dir` holds a run and none is resumed.
            FolderInUseError: if another run writes into `output_dir`.
            DiskFullError: if there is no room; names the newest checkpoint.
            DamagedCheckpointError: if a file of the checkpoint is damaged.
        """
        folder, main = Path(str(self.args.output_dir)), self.is_world_process_zero()
        with files.locked(folder) if main else contextlib.nullcontext():
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_checkpoint(folder)
            elif not resume_from_checkpoint:
                self.refuse_old_run(folder)
            step = 0
            if resume_from_checkpoint:
                verify(Path(resume_from_checkpoint))
                step = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / STATE)).global_step
            self.accelerator.wait_for_everyone()  # before anything is written that others look for
            if main:
                if resume_from_checkpoint:
                    drop_newer(folder, step)
                self.samples.forget_from(step)
            self.accelerator.wait_for_everyone()
            self.earlier, self.restored = 0.0, None
            try:
                with self.naming_checkpoint():
                    output = super().train(resume_from_checkpoint or None, *args, **kwargs)
                self.vismem.history = (*self.history, self.summary())
                return output
            finally:
                self.learner.eval()

    def refuse_old_run(self, folder: Path) -> None:
        """Raises ValueError if training from scratch would overwrite an earlier run."""
        if self.state.global_step:
            raise ValueError("this trainer has trained already: make a new one, with another output_dir")
        if newest_checkpoint(folder) or (folder / self.args.plan.result).exists():
            raise ValueError(
                f"{folder} holds a run already: continue it with train(resume_from_checkpoint=True), "
                "or choose another output_dir"
            )

    def evaluate(self, *_args: Any, **_kwargs: Any) -> Any:
        """Not supported: use `vismem eval`."""
        raise ValueError(NO_EVALUATION)

    predict = evaluate

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        if not hasattr(dataset, "__len__"):
            return None
        args = self.args
        chunk = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        shuffle = args.train_sampling_strategy != "sequential"
        self.sampler = PromptSampler(len(dataset), chunk, args.inner_iterations, seed, shuffle=shuffle)
        return self.sampler

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        self.restore_sums(named["start_time"])
        # On several processes the sampler would otherwise not learn of an epoch that is resumed in the middle.
        if self.sampler is not None:
            self.sampler.set_epoch(named["epoch"])
        super()._run_epoch(*positional, **named)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group; in stage II the end tokens' rows are a second one with a lower rate."""
        if self.optimizer is None:
            trained: Any = model or self.model
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args)
            named = [(n, p) for n, p in trained.named_parameters() if p.requires_grad]
            ends = [p for n, p in named if n.rpartition(".")[2] in ("end", "end_output")]
            rest = [p for n, p in named if n.rpartition(".")[2] not in ("end", "end_output")]
            groups = [{"params": rest, "weight_decay": self.args.weight_decay}]
            if ends:
                rate = options["lr"] * self.args.end_rate
                groups.append({"params": ends, "lr": rate, "weight_decay": self.args.weight_decay})
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:  # noqa: ARG002
        """One batch of prompts: trajectories and their gradient, or supervised examples and theirs."""
        args, step = self.args, self.state.global_step
        self.vismem.base.eval()
        self.learner.train(args.plan.supervised)  # with dropout, replay would be a different policy than the rollout
        self.current = inputs
        try:
            with self.compute_loss_context_manager():
                if self.collector is None:
                    return self.supervised_update(model, inputs)
                full = len(self.held) >= self.current_gradient_accumulation_steps
                if full and step % args.inner_iterations:
                    experience = self.held.pop(0)
                else:
                    self.held = [] if full else self.held
                    with whole(self.model_wrapped):
                        experience = self.collector.collect(inputs, step, self.places(), self.state)
                self.held.append(experience)
                return self.update(model, experience)
        except NonFiniteError as error:
            raise self.diverged(f"an answer could not be sampled ({error})", inputs) from error
        except torch.OutOfMemoryError as error:
            lower = "per_device_train_batch_size, group_size or max_new_tokens"
            lower = "micro_batch (or set gradient_checkpointing=true)" if self.metrics.phase == "update" else lower
            raise RuntimeError(f"out of memory in the {self.metrics.phase} of step {step}; lower {lower}") from error

    def places(self) -> str:
        """Where invocations are inserted at this step (Eq. 7: after delimiters first, then anywhere)."""
        if self.args.injection_places != "delimiter-then-anywhere":
            return self.args.injection_places
        return "delimiter" if self.state.global_step * 2 < self.state.max_steps else "anywhere"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of all metrics since the last log, over all processes."""
        if "loss" in logs:
            logs.update(self.metrics.means(self.args.world_size))
        super().log(logs, start_time)

    # The update.

    def micro_batches(self, experience: Experience) -> list[tuple[list[int], list[int]]]:
        """Prompts and rollouts of each forward and backward pass, without solved prompts."""
        group = self.args.group_size
        prompts = [p for p, wanted in enumerate(experience.trained) if wanted]
        size = self.args.micro_batch or max(1, len(prompts)) * group
        if size >= group:
            width = size // group
            chunks = [prompts[i : i + width] for i in range(0, len(prompts), width)]
            return [(chunk, [p * group + c for p in chunk for c in range(group)]) for chunk in chunks]
        return [([p], list(range(p * group + c, p * group + c + size))) for p in prompts for c in range(0, group, size)]

    def update(self, model: nn.Module, experience: Experience) -> Tensor:
        """Replays the trajectories, accumulates the gradient of their loss, and returns the loss."""
        args, metrics = self.args, self.metrics
        self.watch.note(experience)
        total = torch.zeros(())
        sums: defaultdict[str, float] = defaultdict(float)
        with metrics.timed("update"):
            chunks = self.micro_batches(experience)
            turns = self.turns(len(chunks))
            for number in range(turns):
                prompts, index = chunks[number] if number < len(chunks) else ([], [])
                batch = self.replayed(experience, prompts, index) if index else None
                if args.kl_coef and number not in experience.reference:
                    experience.reference[number] = self.reference_log_probs(batch)
                with contextlib.nullcontext() if number + 1 == turns else self.accelerator.no_sync(model):
                    log_probs = model(batch).log_probs
                    if batch is None:  # no trajectory left, but other processes wait for this gradient
                        self.accelerator.backward(log_probs)
                        continue
                    sampled = batch["sampled"].to(log_probs.device)
                    decoded = decoded_log_probs([experience.rollouts[i] for i in index], sampled)
                    if number not in experience.old:
                        experience.old[number] = log_probs.detach()
                        gap = (log_probs.detach() - decoded).abs()[sampled]
                        metrics.note("sampling/logp_difference/mean", gap)
                        metrics.note("sampling/logp_difference/max", gap.amax(0, keepdim=True) if len(gap) else gap)
                    old, cap = experience.old[number], args.importance_sampling_cap
                    losses, found = grpo.grpo_loss(
                        log_probs,
                        old,
                        experience.reference.get(number),
                        experience.advantages[index].to(log_probs.device),
                        sampled,
                        args.clip_ratio,
                        self.kl.coef,
                        grpo.importance_weights(old, decoded, cap) if cap else None,
                    )
                    # The mean is over all trajectories of the batch, skipped ones as zeros, on every process.
                    loss = losses.sum() / len(experience.rollouts)
                    self.backward(loss, experience.rows)
                total += loss.detach().cpu()
                for name, values in found.items():
                    sums[name] += float(values.sum())
        count = sum(len(index) for _, index in chunks)
        for name in ("kl", "clip_share"):
            metrics.add(name, sums[name] / max(count, 1))
        metrics.add("kl_coef", self.kl.coef)
        self.divergence += torch.tensor([sums["kl"], count])
        if self.accelerator.sync_gradients:  # once per update
            divergence, trajectories = self.accelerator.reduce(self.divergence.to(args.device)).tolist()
            self.divergence = torch.zeros(2)
            if args.kl_coef and trajectories:
                warming_up = self.state.global_step < args.get_warmup_steps(self.state.max_steps)
                self.kl.update(divergence / trajectories, can_decrease=not warming_up)
        written = sum(len(rollout.tokens) for rollout in experience.rollouts)
        metrics.add("tokens_per_second", written / max(metrics.spent, 1e-9))
        metrics.spent = 0.0
        return (total / self.current_gradient_accumulation_steps).to(args.device)

    def supervised_update(self, model: nn.Module, rows: list[Row]) -> Tensor:
        """Cross-entropy of the reference replies, which contain memories in the warm-up."""
        args, size = self.args, self.args.micro_batch or len(rows)
        total = torch.zeros(())
        with self.metrics.timed("update"):
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                rngs = [Random(f"{args.seed}-{self.state.global_step}-{row.id}") for row in part]
                sighted, replies = [bool(row.images) for row in part], [row.completion for row in part]
                prompts = inputs_of(self.vismem, part)
                batch = supervised_batch(self.vismem, prompts, replies, sighted, rngs, self.places(), args)
                with contextlib.nullcontext() if start + size >= len(rows) else self.accelerator.no_sync(model):
                    found = model({**batch, "gaze": bool(args.gaze_coef)})
                    losses = -grpo.trajectory_mean(found.log_probs, batch["sampled"].to(found.log_probs.device))
                    if found.gaze.requires_grad and found.gaze.dim():
                        self.metrics.note("gaze", found.gaze.detach())
                        losses = losses + args.gaze_coef * found.gaze.to(losses.device)
                    loss = losses.sum() / len(rows)
                    self.backward(loss, part)
                total += loss.detach().cpu()
        return (total / self.current_gradient_accumulation_steps).to(args.device)

    def backward(self, loss: Tensor, rows: list[Row]) -> None:
        """Adds the gradient of a micro-batch's share of the loss."""
        self.check_finite(loss, rows)
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps)

    def turns(self, count: int) -> int:
        """Number of forward and backward passes of this update; the same on every process if they gather shards."""
        if self.is_fsdp_enabled:
            count = int(self.accelerator.gather(torch.tensor([count], device=self.args.device)).max())
        return max(count, 1)

    def replayed(self, experience: Experience, prompts: list[int], index: list[int]) -> dict[str, Any]:
        """A micro-batch's trajectories as arguments of the training forward."""
        everything = len(prompts) == len(experience.rows)
        rows = [experience.rows[prompt] for prompt in prompts]
        inputs = experience.prompts if everything else inputs_of(self.vismem, rows)
        pad = self.vismem.processor.tokenizer.pad_token_id or 0
        rollouts = [experience.rollouts[i] for i in index]
        return collate(inputs, rollouts, pad, self.args.temperature, formed=not self.args.plan.forms)

    @torch.no_grad()
    def reference_log_probs(self, batch: dict[str, Any] | None) -> Tensor:
        """Log-probabilities [n, L] under the stage's reference: its starting parameters, or the base alone."""
        model = self.learner.forward  # not the wrapper, which would shard the parameters again
        if self.args.reference == "no_memory" and self.args.plan.adapts:
            with without_adapter(self.vismem.base):
                return model(batch).log_probs
        if self.args.reference == "no_memory" and batch is not None:
            tokens = torch.tensor(self.vismem.tokens.ids, device=batch["input_ids"].device)
            bare, order = without_memory(batch, tokens)
            found = torch.zeros(batch["input_ids"].shape, device=order.device)
            with whole(self.model_wrapped):
                found = found.scatter(1, order, model(bare).log_probs)
                # Tokens without a counterpart are compared with themselves: no divergence.
                return torch.where(torch.isin(batch["input_ids"], tokens), model(batch).log_probs, found)
        with whole(self.model_wrapped), self.starting():
            return model(batch).log_probs

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Restores the stage's starting parameters inside the context."""
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

    def check_finite(self, value: Tensor, rows: list[Row]) -> None:
        """Raises TrainingDivergedError for a loss or gradient that is not finite."""
        if not torch.isfinite(value.detach()).all():
            raise self.diverged(f"loss or gradient is {float(value.detach().sum())}", rows)

    def diverged(self, what: str, rows: list[Row]) -> TrainingDivergedError:
        """The error that stops a run: what is not finite, for which rows, and the newest checkpoint."""
        last = newest_checkpoint(str(self.args.output_dir))
        return TrainingDivergedError(
            f"{what} at step {self.state.global_step}, rows "
            f"{', '.join(row.id for row in rows[:8])}; last good checkpoint: {last or 'none yet'}. "
            "Lower learning_rate or max_grad_norm and continue from there with --resume"
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self.check_finite(torch.as_tensor(norm), self.current)
        if self.args.plan.supervised:
            self.watch.note_gradient(float(norm))
        return norm
