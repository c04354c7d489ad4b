"""Experience: what the RL stages learn from - trajectories of a batch of prompts, scored and compared (Eq. 7-8, 12).

Everything here is without gradient. Decoding is in `rollout.py`, the rewards in `rewards/`; what an update makes of
an experience is the trainer's matter.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vismem.data import Row, prompt_inputs, reward_columns
from vismem.decoding.policies import Policy, Random
from vismem.decoding.prepare import check_length
from vismem.decoding.trace import Rollout
from vismem.model import VisMem
from vismem.training import grpo
from vismem.training.arguments import MemoryTrainingArguments
from vismem.training.baselines import without_adapter
from vismem.training.metrics import Figures, Samples
from vismem.training.rewards import Rewards
from vismem.training.rollout import counterfactuals, sampling, seed_of, write


@dataclass
class Experience:
    """One batch of prompts and what was made of them.

    Args:
        rows: the prompts, B.
        prompts: the processor's output for them.
        rollouts: B * G, those of a prompt one after another.
        advantages: float [B * G].
        trained: bool [B], False for prompts that there is nothing to learn from.
        old, reference: log-probabilities of each micro-batch, filled in at its first update.
    """

    rows: list[Row]
    prompts: dict[str, Tensor]
    rollouts: list[Rollout]
    advantages: Tensor
    trained: list[bool]
    old: dict[int, Tensor] = field(default_factory=dict)
    reference: dict[int, Tensor] = field(default_factory=dict)


class Collector:
    """Makes experiences of prompts.

    Args:
        model: the policy and its memory.
        args: of the stage.
        rewards: what scores the answers.
        figures: where the figures go.
        samples: where sample completions go; None on all processes but the first.
    """

    def __init__(
        self,
        model: VisMem,
        args: MemoryTrainingArguments,
        rewards: Rewards,
        figures: Figures,
        samples: Samples | None,
    ) -> None:
        self.model, self.args, self.rewards, self.figures, self.samples = model, args, rewards, figures, samples
        self.baselines: dict[str, float] = {}

    @torch.no_grad()
    def collect(self, rows: list[Row], step: int, places: str, state: Any = None) -> Experience:
        """Writes and scores G trajectories for each prompt, and compares them within their group.

        Args:
            rows: the prompts.
            step: number of the update; with the row's id it makes the seeds.
            places: where stage I puts invocations in: `"delimiter"` or `"anywhere"`.
            state: the Trainer's state, handed on to the rewards.
        """
        args, group, figures = self.args, self.args.group_size, self.figures
        prompts = inputs_of(self.model, rows)
        seeds = [seed_of(args.seed, step, row.id, copy) for row in rows for copy in range(group)]
        settings = sampling(self.model, args.max_new_tokens, args.temperature)
        with figures.timed("rollout"):
            rollouts = write(self.model, prompts, self.policy(places, seeds), settings, seeds, group)
        scores = self.score(rows, rollouts, state, noted=True)
        base = self.baseline(rows, prompts, state)
        returns = gained = scores - base.repeat_interleave(group)
        if args.plan.invokes == "model":
            with figures.timed("counterfactual"):
                sighted = [bool(row.images) for row in rows]
                # The same seeds: token k of tau_rev draws the random number that token k of tau drew, so that the
                # penalty measures the kind of memory and not the luck of another draw.
                turned = counterfactuals(self.model, prompts, rollouts, group, sighted, settings, seeds)
            swapped = scores.clone()
            if turned:
                swapped[list(turned)] = self.score([rows[i // group] for i in turned], list(turned.values()), state)
            invoked = torch.tensor([bool(rollout.invocations) for rollout in rollouts])
            found = grpo.invocation_returns(scores, base, swapped, invoked, group, args.penalty_coef)
            returns = found.total
            figures.note("penalties/type", found.type_penalty)
            figures.note("penalties/negative", found.negative_penalty)
        advantages, spread = grpo.group_advantages(returns, group)
        best, groups = sum(self.rewards.weights), scores.view(-1, group)
        solved = (spread == 0) & (groups[:, 0] >= best - 1e-6) & (base >= best - 1e-6)
        for name, values in {
            "reward": scores,
            "reward_std": groups.std(1),
            "baseline": base,
            "improvement": gained,
            "return_std": spread,
            "advantage_std": advantages.view(-1, group).std(1),
            "frac_reward_zero_std": (spread == 0).float(),
            "frac_solved": solved.float(),
        }.items():
            figures.note(name, values)
        figures.describe(rollouts, self.model.delimiters)
        count = min(args.log_completions, len(rows))
        if self.samples is not None and count and step % max(int(args.logging_steps), 1) == 0:
            decode, first = self.model.processor.tokenizer.decode, range(0, count * group, group)
            texts = [decode(rollouts[i].tokens, skip_special_tokens=False) for i in first]
            rewards, bases = scores[::group][:count].tolist(), base[:count].tolist()
            self.samples.keep(step, rows[:count], texts, rewards, bases)
        trained = [not (args.skip_solved and done) for done in solved.tolist()]
        return Experience(rows, prompts, rollouts, advantages, trained)

    def policy(self, places: Any, seeds: list[int]) -> str | Policy:
        """Who invokes memory in this stage's rollouts: chance in stage I, the model in stage II, or nobody."""
        if self.args.plan.invokes == "model":
            return "learned"
        if self.args.plan.invokes == "nobody":
            # Not "off": where the base's table is wider than its vocabulary it may write the four tokens' ids itself.
            return Random(0.0, seed=seeds)
        rate = self.args.injection_rate if places == "delimiter" else self.args.anywhere_rate
        return Random(rate, places, seed=seeds)

    def score(self, rows: list[Row], rollouts: list[Rollout], state: Any, noted: bool = False) -> Tensor:
        """S of every answer, float [n]; `rows` are the prompts, each for as many answers as come to it.

        With `noted`, every reward's own mean is kept among the figures.
        """
        tokenizer = self.model.processor.tokenizer
        rows = [row for row in rows for _ in range(len(rollouts) // len(rows))]
        texts = [tokenizer.decode(rollout.tokens, skip_special_tokens=True) for rollout in rollouts]
        ids = [rollout.tokens.tolist() for rollout in rollouts]
        columns = {**reward_columns(rows), "completion_ids": ids, "trainer_state": state}
        replies = [[{"role": "assistant", "content": text}] for text in texts]
        with self.figures.timed("reward"):
            result = self.rewards([row.prompt for row in rows], replies, columns)
        for name, part in zip(result.names, result.parts.unbind(1), strict=True):
            if noted:
                self.figures.note(f"rewards/{name}", part[~part.isnan()])
        return result.total.float()

    def baseline(self, rows: list[Row], prompts: dict[str, Tensor], state: Any) -> Tensor:
        """S(tau_base), float [B]: the answer of the base alone. It never changes, so each prompt has it once."""
        args = self.args
        if args.baseline == "off":
            return torch.zeros(len(rows))
        missing = [row for row in rows if row.id not in self.baselines]
        if missing:
            with self.figures.timed("baseline"):
                sampled = args.baseline == "sample"
                settings = sampling(self.model, args.max_new_tokens, args.temperature if sampled else None)
                seeds = [seed_of(args.seed, "baseline", row.id) for row in missing] if sampled else None
                inputs = prompts if len(missing) == len(rows) else inputs_of(self.model, missing)
                with without_adapter(self.model.base) if args.plan.adapts else nullcontext():
                    rollouts = write(self.model, inputs, "off", settings, seeds)
            scores = self.score(missing, rollouts, state)
            self.baselines.update(zip((row.id for row in missing), scores.tolist(), strict=True))
        return torch.tensor([self.baselines[row.id] for row in rows])


def inputs_of(model: VisMem, rows: list[Row]) -> dict[str, Tensor]:
    """The processor's output for these prompts, on the base's device and in its dtype.

    Raises:
        ValueError: if a row cannot be encoded, or its prompt is longer than the base's context; names the row.
    """
    found = prompt_inputs(model.processor, rows)
    for row, length in zip(rows, found["attention_mask"].sum(1).tolist(), strict=True):
        check_length(model.base, length, f"the prompt of {row.id}")
    return {n: t.to(model.device, model.dtype if t.is_floating_point() else None) for n, t in found.items()}
