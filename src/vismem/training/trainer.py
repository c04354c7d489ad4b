"""`MemoryTrainer`: every stage on transformers' `Trainer`: warm-up, formation (I), invocation (II) and baselines.

The Trainer handles loops, schedules, precision and processes; `checkpoints.py` its files. This file is the update:
collect experience (`experience.py`), replay its trajectories (`replay.py`), and take the gradient of their loss
(`grpo.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from vismem.data import Row
from vismem.decoding.output import NonFiniteError
from vismem.decoding.prepare import context_of
from vismem.model import VisMem
from vismem.training import grpo
from vismem.training.arguments import NO_EVALUATION, MemoryTrainingArguments
from vismem.training.baselines import adapter_of, without_adapter
from vismem.training.checkpoints import CheckpointingTrainer, newest_checkpoint
from vismem.training.experience import Collector, Experience, inputs_of
from vismem.training.metrics import Metrics, Samples, SignalWatch
from vismem.training.replay import Learner, Replayed, chosen_blocks, collate, decoded_log_probs, without_memory
from vismem.training.rewards import load_rewards
from vismem.training.rows import PromptSampler, check_row, load_rows
from vismem.training.sharding import make_shardable, whole
from vismem.training.supervised import supervised_batch

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

    def __init__(
        self,
        model: VisMem,
        args: MemoryTrainingArguments,
        train_dataset: Any,
        reward_funcs: str | Callable[..., Any] | list[str | Callable[..., Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in (*EVALUATION, *FIXED):
            if kwargs.pop(name, None) is not None:
                own = f"MemoryTrainer has its own {name}; leave it out"
                raise ValueError(NO_EVALUATION if name in EVALUATION else own)
        if train_dataset is None:
            raise ValueError("MemoryTrainer needs a train_dataset: a file's name, a datasets.Dataset, a list, or rows")
        check = partial(check_row, model.processor, context_of(model.base), supervised=args.plan.supervised)
        rows = load_rows(args, train_dataset).checked(check)
        model.memory.float()
        model.tokens.float()
        model.base.requires_grad_(False)
        adapter = adapter_of(model).requires_grad_(True) if args.plan.adapts else None
        for part in ("builder", "short", "long", "tokens"):
            for parameter in model.parameters_of(part):
                parameter.requires_grad_(part in args.plan.trains)
        self.vismem, self.history = model, model.history
        super().__init__(
            Learner(model, adapter), args, data_collator=cast(Any, list), train_dataset=cast(Any, rows), **kwargs
        )
        if getattr(model.base, "hf_device_map", None) is None and not getattr(model.base, "is_quantized", False):
            model.base.to(args.device)
        if self.is_deepspeed_enabled:  # its engine steps at each backward, and an update has several
            raise ValueError("DeepSpeed is not supported; configs/fsdp2.yaml shards what is trained without it")
        self.scalars = make_shardable(self.learner) if self.is_fsdp_enabled else set()
        self.kl = grpo.AdaptiveKL(args.kl_coef, args.target_kl, args.kl_horizon)
        self.start = {name: p.detach().clone() for name, p in self.trained()}
        self.metrics, self.samples = Metrics(), Samples(args.folder)
        self.watch = SignalWatch(self.accelerator.reduce)
        self.add_callback(self.watch)
        self.collector = None
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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group; in stage II the end tokens' rows are a second one with a lower rate."""
        if self.optimizer is None:
            trained: Any = model or self.model
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args)
            ends: dict[bool, list[nn.Parameter]] = {False: [], True: []}
            for name, p in trained.named_parameters():
                if p.requires_grad:
                    ends[name.rpartition(".")[2] in ("end", "end_output")].append(p)
            groups = [{"params": ends[False]}, {"params": ends[True], "lr": options["lr"] * self.args.end_rate}]
            groups = [{**group, "weight_decay": self.args.weight_decay} for group in groups if group["params"]]
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:  # noqa: ARG002
        """One batch of prompts: trajectories and their gradient, or supervised examples and theirs."""
        self.vismem.base.eval()
        self.learner.train(self.args.plan.supervised)  # with dropout, replay would be a different policy
        self.current = inputs
        try:
            with self.compute_loss_context_manager():
                if self.collector is None:
                    return self.supervised_update(model, inputs)
                return self.update(model, self.experience(self.collector, inputs))
        except NonFiniteError as error:
            raise self.diverged(f"an answer could not be sampled ({error})", inputs) from error
        except torch.OutOfMemoryError as error:
            phase, lower = self.metrics.phase, "per_device_train_batch_size, group_size or max_new_tokens"
            if phase == "update":
                lower = "micro_batch (or set gradient_checkpointing=true)"
            raise RuntimeError(
                f"out of memory in the {phase} of step {self.state.global_step}; lower {lower}"
            ) from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of all metrics since the last log, over all processes."""
        if "loss" in logs:
            logs.update(self.metrics.means(self.args.world_size))
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self.check_finite(torch.as_tensor(norm), self.current)
        if self.args.plan.supervised:
            self.watch.add("gradient", float(norm))
        return norm

    # The update.

    def experience(self, collector: Collector, rows: list[Row]) -> Experience:
        """Trajectories of these prompts: new ones, or in a further inner iteration those of the iteration before."""
        step = self.state.global_step
        full = len(self.held) >= self.current_gradient_accumulation_steps
        if full and step % self.args.inner_iterations:
            experience = self.held.pop(0)
        else:
            self.held = [] if full else self.held
            with whole(self.model_wrapped):
                experience = collector.collect(rows, step, self.places(), self.state)
        self.held.append(experience)
        return experience

    def places(self) -> str:
        """Where invocations are inserted at this step (Eq. 7: after delimiters first, then anywhere)."""
        if self.args.injection_places != "delimiter-then-anywhere":
            return self.args.injection_places
        return "delimiter" if self.state.global_step * 2 < self.state.max_steps else "anywhere"

    def update(self, model: nn.Module, experience: Experience) -> Tensor:
        """Replays the trajectories, accumulates the gradient of their loss, and returns the loss (Eq. 12-15)."""
        args, metrics, rollouts = self.args, self.metrics, experience.rollouts
        total, kl, clip_share = torch.zeros(()), 0.0, 0.0
        self.watch.add("spread", float(experience.advantages.abs().sum()))
        if args.plan.invokes != "nobody":
            self.watch.add("invocations", sum(len(rollout.invocations) for rollout in rollouts))
        with metrics.timed("update"):
            micro_batches = self.micro_batches(experience)
            for number, index in enumerate(micro_batches):
                batch = self.replayed(experience, index) if index else None
                if args.kl_coef and number not in experience.reference:
                    experience.reference[number] = self.reference_log_probs(batch)
                with self.synchronised(model, last=number + 1 == len(micro_batches)):
                    replayed = model(batch)
                    if batch is None:  # no trajectory left, but other processes wait for this gradient
                        self.accelerator.backward(replayed.log_probs)
                        continue
                    losses, found = self.losses(replayed, batch["sampled"], experience, number, index)
                    # The mean is over all trajectories of the batch, skipped ones as zeros, on every process.
                    loss = losses.sum() / len(rollouts)
                    self.backward(loss, experience.rows)
                total += loss.detach().cpu()
                kl += float(found["kl"].sum())
                clip_share += float(found["clip_share"].sum())
        count = sum(map(len, micro_batches))
        metrics.add("kl", kl / max(count, 1))
        metrics.add("clip_share", clip_share / max(count, 1))
        metrics.add("kl_coef", self.kl.coef)
        self.divergence += torch.tensor([kl, count])
        if self.accelerator.sync_gradients:
            self.update_kl()
        metrics.add("tokens_per_second", sum(len(rollout.tokens) for rollout in rollouts) / max(metrics.spent, 1e-9))
        metrics.spent = 0.0
        return (total / self.current_gradient_accumulation_steps).to(args.device)

    def micro_batches(self, experience: Experience) -> list[list[int]]:
        """Indices of the rollouts of each forward and backward pass, without those of solved prompts.

        There is at least one. If processes gather shards, each has the same number, and the last may be empty.
        """
        group = self.args.group_size
        index = [p * group + copy for p, wanted in enumerate(experience.trained) if wanted for copy in range(group)]
        size = self.args.micro_batch or max(len(index), 1)
        found = [index[start : start + size] for start in range(0, len(index), size)]
        count = len(found)
        if self.is_fsdp_enabled:
            count = int(self.accelerator.gather(torch.tensor([count], device=self.args.device)).max())
        return found + [[]] * (max(count, 1) - len(found))

    def replayed(self, experience: Experience, index: list[int]) -> dict[str, Any]:
        """A micro-batch's trajectories as arguments of the training forward."""
        prompts = sorted({i // self.args.group_size for i in index})
        inputs = experience.prompts
        if len(prompts) < len(experience.rows):
            inputs = inputs_of(self.vismem, [experience.rows[prompt] for prompt in prompts])
        pad = self.vismem.processor.tokenizer.pad_token_id or 0
        rollouts = [experience.rollouts[i] for i in index]
        return collate(inputs, rollouts, pad, self.args.temperature, formed=not self.args.plan.forms)

    def losses(
        self, replayed: Replayed, sampled: Tensor, experience: Experience, number: int, index: list[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`grpo.grpo_loss` of micro-batch `number`, whose rollouts are at `index`.

        Sampled blocks of short memories are actions too, with a surrogate and a divergence of their own: `choice_coef`
        times their sum over an invocation's N_s vectors, averaged over a trajectory's invocations.
        """
        args, rollouts = self.args, [experience.rollouts[i] for i in index]
        log_probs, sampled = replayed.log_probs, sampled.to(replayed.log_probs.device)
        decoded = decoded_log_probs(rollouts, sampled)
        if number not in experience.old:
            experience.old[number] = replayed.detach()
            gap = (log_probs.detach() - decoded).abs()[sampled]
            self.metrics.add("sampling/logp_difference/mean", gap)
            self.metrics.add("sampling/logp_difference/max", gap.max() if len(gap) else gap)
        old, reference, cap = experience.old[number], experience.reference.get(number), args.importance_sampling_cap
        advantages = experience.advantages[index].to(log_probs.device)
        losses, found = grpo.grpo_loss(
            log_probs,
            old.log_probs,
            None if reference is None else reference.log_probs,
            advantages,
            sampled,
            args.clip_ratio,
            self.kl.coef,
            grpo.importance_weights(old.log_probs, decoded, cap) if cap else None,
        )
        if replayed.choices.shape[-1]:
            of_choices, more = grpo.grpo_loss(
                replayed.choices,
                old.choices,
                None if reference is None else reference.choices,
                advantages,
                chosen_blocks(rollouts, log_probs.device),
                args.clip_ratio,
                self.kl.coef,
            )
            losses = losses + args.choice_coef * self.vismem.memory_config.short_length * of_choices
            for name, values in more.items():
                self.metrics.add(f"choice/{name}", values)
        return losses, found

    def update_kl(self) -> None:
        """Moves the KL coefficient by the mean divergence of the update's trajectories on all processes."""
        divergence, trajectories = self.accelerator.reduce(self.divergence.to(self.args.device)).tolist()
        self.divergence = torch.zeros(2)
        if self.args.kl_coef and trajectories:
            warming_up = self.state.global_step < self.args.get_warmup_steps(self.state.max_steps)
            self.kl.update(divergence / trajectories, can_decrease=not warming_up)

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
                with self.synchronised(model, last=start + size >= len(rows)):
                    replayed = model({**batch, "gaze": args.plan.forms and args.gaze_coef > 0})
                    losses = -grpo.trajectory_mean(replayed.log_probs, batch["sampled"].to(replayed.log_probs.device))
                    if replayed.gaze.dim():
                        self.metrics.add("gaze", replayed.gaze.detach())
                        losses = losses + args.gaze_coef * replayed.gaze
                    loss = losses.sum() / len(rows)
                    self.backward(loss, part)
                total += loss.detach().cpu()
        return (total / self.current_gradient_accumulation_steps).to(args.device)

    def synchronised(self, model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Processes share their gradients in the last micro-batch only."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor, rows: list[Row]) -> None:
        """Adds the gradient of a micro-batch's share of the loss."""
        self.check_finite(loss, rows)
        self.accelerator.backward(loss / self.current_gradient_accumulation_steps)

    @torch.no_grad()
    def reference_log_probs(self, batch: dict[str, Any] | None) -> Replayed:
        """Log-probabilities under the stage's reference: its starting parameters, or the base alone."""
        model = self.learner.forward  # not the wrapper, which would shard the parameters again
        if self.args.reference == "no_memory" and self.args.plan.adapts:
            with without_adapter(self.vismem.base):
                return model(batch)
        if self.args.reference == "no_memory" and batch is not None:
            tokens = torch.tensor(self.vismem.tokens.ids, device=batch["input_ids"].device)
            bare, order = without_memory(batch, tokens)
            found = torch.zeros(batch["input_ids"].shape, device=order.device)
            with whole(self.model_wrapped):
                own, bare_log_probs = model(batch), model(bare).log_probs
                found = found.scatter(1, order, bare_log_probs)
                # Tokens without a counterpart, and blocks, are compared with themselves: no divergence.
                return own._replace(log_probs=torch.where(torch.isin(batch["input_ids"], tokens), own.log_probs, found))
        with whole(self.model_wrapped), self.starting():
            return model(batch)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Restores the stage's starting parameters inside the context; without gradient."""
        kept = {name: p.detach().clone() for name, p in self.trained()}
        try:
            for name, p in self.trained():
                p.copy_(self.start[name])
            yield
        finally:
            for name, p in self.trained():
                p.copy_(kept[name])

    # Errors.

    def check_finite(self, value: Tensor, rows: list[Row]) -> None:
        """Raises TrainingDivergedError for a loss or gradient that is not finite."""
        if not torch.isfinite(value.detach()).all():
            raise self.diverged(f"loss or gradient is {float(value.detach().sum())}", rows)

    def diverged(self, what: str, rows: list[Row]) -> TrainingDivergedError:
        """The error that stops a run: what is not finite, for which rows, and the newest checkpoint."""
        last = newest_checkpoint(self.args.folder)
        return TrainingDivergedError(
            f"{what} at step {self.state.global_step}, rows "
            f"{', '.join(row.id for row in rows[:8])}; last good checkpoint: {last or 'none yet'}. "
            "Lower learning_rate or max_grad_norm and continue from there with --resume"
        )
