"""Experience for the RL stages: trajectories of a batch of prompts, scored and compared within groups (Eq. 7-8, 12).

Nothing here needs a gradient. `rollout.py` decodes, `rewards/` scores, and `trainer.py` makes the update.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vismem.data import Row, prompt_inputs, reward_columns
from vismem.decoding.policies import Named, Policy, Random
from vismem.decoding.trace import Rollout
from vismem.model import VisMem
from vismem.training import grpo
from vismem.training.arguments import MemoryTrainingArguments
from vismem.training.baselines import without_adapter
from vismem.training.metrics import Metrics, Samples
from vismem.training.replay import Replayed
from vismem.training.rewards import RewardResult, Rewards
from vismem.training.rollout import counterfactuals, sampling, seed_of, write
from vismem.training.supervised import named_places


@dataclass
class Experience:
    """Trajectories of one batch of prompts, with their advantages.

    Args:
        rows: the prompts, B.
        prompts: the processor's output for them.
        rollouts: B * G, those of one prompt adjacent.
        advantages: float [B * G].
        trained: bool [B], False for prompts that are already solved.
        old, reference: replays by the policy of the first update and by the reference, by micro-batch.
    """

    rows: list[Row]
    prompts: dict[str, Tensor]
    rollouts: list[Rollout]
    advantages: Tensor
    trained: list[bool]
    old: dict[int, Replayed] = field(default_factory=dict)
    reference: dict[int, Replayed] = field(default_factory=dict)


class Collector:
    """Collects experience: decodes, scores and compares trajectories.

    Args:
        model: the policy with its memory.
        args: of the stage.
        rewards: score the answers.
        metrics: receives the metrics.
        samples: receives sample completions; None except on the first process.
    """

    def __init__(
        self,
        model: VisMem,
        args: MemoryTrainingArguments,
        rewards: Rewards,
        metrics: Metrics,
        samples: Samples | None,
    ) -> None:
        self.model, self.args, self.rewards, self.metrics, self.samples = model, args, rewards, metrics, samples
        self.baselines: dict[str, float] = {}

    @torch.no_grad()
    def collect(self, rows: list[Row], step: int, places: str, state: Any = None) -> Experience:
        """Decodes and scores G trajectories per prompt, and compares them within their group.

        Args:
            rows: the prompts.
            step: number of the update; seeds depend on it and on the row's id.
            places: where stage I inserts invocations: `"delimiter"`, `"anywhere"` or `"named"`.
            state: the Trainer's state, passed to the rewards.
        """
        args, group, metrics = self.args, self.args.group_size, self.metrics
        prompts = inputs_of(self.model, rows)
        rollouts, result, seeds = self.drawn_with_spread(rows, prompts, step, places, state)
        for name, part in zip(result.names, result.parts.unbind(1), strict=True):
            metrics.add(f"rewards/{name}", part[~part.isnan()])
        scores, base = result.total, self.baseline(rows, prompts, state)
        settings = sampling(self.model, args.max_new_tokens, args.temperature)
        returns = improvement = scores - base.repeat_interleave(group)
        if args.plan.invokes == "model":
            with metrics.timed("counterfactual"):
                sighted = [bool(row.images) for row in rows]
                # With the same seeds, token k of tau_rev uses the random number of token k of tau: the penalty then
                # measures the kind of memory, not a different draw.
                turned = counterfactuals(self.model, prompts, rollouts, group, sighted, settings, seeds)
            swapped = scores.clone()
            if turned:
                their_rows = [rows[index // group] for index in turned]
                swapped[list(turned)] = self.score(their_rows, list(turned.values()), state).total
            invoked = torch.tensor([bool(rollout.invocations) for rollout in rollouts])
            found = grpo.invocation_returns(scores, base, swapped, invoked, group, args.penalty_coef)
            returns = found.total
            metrics.add("penalties/type", found.type_penalty)
            metrics.add("penalties/negative", found.negative_penalty)
        schedules = max(args.injection_schedules, 1) if args.plan.invokes == "chance" else 1
        advantages, spread = grpo.group_advantages(returns, group // schedules)  # of one schedule
        spread = spread.view(len(rows), -1).amax(1)
        groups, best = scores.view(-1, group), sum(self.rewards.weights) - 1e-6
        solved = (spread == 0) & (groups[:, 0] >= best) & (base >= best)
        for name, values in {
            "reward": scores,
            "reward_std": groups.std(1),
            "baseline": base,
            "improvement": improvement,
            "return_std": spread,
            "advantage_std": advantages.view(-1, group).std(1),
            "frac_reward_zero_std": (spread == 0).float(),
            "frac_solved": solved.float(),
        }.items():
            metrics.add(name, values)
        metrics.describe(rollouts, self.model.delimiters)
        shown = rows[: args.log_completions]
        if self.samples is not None and shown and step % max(int(args.logging_steps), 1) == 0:
            decode = self.model.processor.tokenizer.decode
            texts = [decode(rollouts[i * group].tokens, skip_special_tokens=False) for i in range(len(shown))]
            self.samples.keep(step, shown, texts, groups[: len(shown), 0].tolist(), base[: len(shown)].tolist())
        trained = [not (args.skip_solved and done) for done in solved.tolist()]
        return Experience(rows, prompts, rollouts, advantages, trained)

    def drawn_with_spread(
        self, rows: list[Row], prompts: dict[str, Tensor], step: int, places: str, state: Any
    ) -> tuple[list[Rollout], RewardResult, list[int]]:
        """What `draw` gives; prompts whose trajectories all earned the same are drawn again, up to `redraws` times."""
        group = self.args.group_size
        rollouts, result, seeds = self.draw(rows, prompts, step, places, state)
        for attempt in range(1, self.args.redraws + 1):
            flat = [i for i, scores in enumerate(result.total.view(-1, group)) if scores.max() == scores.min()]
            self.metrics.add("frac_redrawn", len(flat) / len(rows))
            if not flat:
                break
            some = [rows[i] for i in flat]
            again = self.draw(some, inputs_of(self.model, some), step, places, state, attempt)
            index = [i * group + copy for i in flat for copy in range(group)]
            for at, rollout, seed in zip(index, again[0], again[2], strict=True):
                rollouts[at], seeds[at] = rollout, seed
            result.total[index], result.parts[index] = again[1].total, again[1].parts
        return rollouts, result, seeds

    def draw(
        self, rows: list[Row], prompts: dict[str, Tensor], step: int, places: str, state: Any, attempt: int = 0
    ) -> tuple[list[Rollout], RewardResult, list[int]]:
        """G trajectories of each prompt with their rewards and seeds; another `attempt` draws others."""
        args, group, attempts = self.args, self.args.group_size, (attempt,) if attempt else ()
        seeds = [seed_of(args.seed, step, row.id, copy, *attempts) for row in rows for copy in range(group)]
        settings = sampling(self.model, args.max_new_tokens, args.temperature)
        with self.metrics.timed("rollout"):
            policy = self.policy(places, rows, seeds)
            rollouts = write(self.model, prompts, policy, settings, seeds, group, sample_blocks=args.plan.forms)
        return rollouts, self.score(rows, rollouts, state), seeds

    def policy(self, places: Any, rows: list[Row], seeds: list[int]) -> str | Policy:
        """The policy of this stage's rollouts: chance invokes in stage I, the model in stage II, or nobody."""
        args, group = self.args, self.args.group_size
        if args.plan.invokes == "model":
            return "learned"
        share = group // (args.injection_schedules or group)  # copies that share a schedule
        seeds = [seeds[index // share * share] for index in range(len(seeds))]
        if args.plan.invokes == "nobody":
            # Not "off": a base whose table is wider than its vocabulary could then sample the four tokens' ids.
            return Random(0.0, seed=seeds)
        if places == "anywhere":
            return Random(args.anywhere_rate, places, seed=seeds)
        at_delimiters = Random(args.injection_rate, "delimiter", seed=seeds)
        if places == "delimiter":
            return at_delimiters
        tokenizer, tokens = self.model.processor.tokenizer, self.model.tokens
        replies = [tokenizer.encode(row.completion, add_special_tokens=False) for row in rows]
        return Named([named_places(reply, tokens) for reply in replies for _ in range(group)], at_delimiters)

    def score(self, rows: list[Row], rollouts: list[Rollout], state: Any) -> RewardResult:
        """Scores S of all answers; `rows` are the prompts, each with the same number of answers."""
        tokenizer = self.model.processor.tokenizer
        rows = [row for row in rows for _ in range(len(rollouts) // len(rows))]
        texts = [tokenizer.decode(rollout.tokens, skip_special_tokens=True) for rollout in rollouts]
        ids = [rollout.tokens.tolist() for rollout in rollouts]
        columns = {**reward_columns(rows), "completion_ids": ids, "trainer_state": state}
        replies = [[{"role": "assistant", "content": text}] for text in texts]
        with self.metrics.timed("reward"):
            return self.rewards([row.prompt for row in rows], replies, columns)

    def baseline(self, rows: list[Row], prompts: dict[str, Tensor], state: Any) -> Tensor:
        """S(tau_base), float [B]: scores of the base's own answers, computed once per prompt as they never change."""
        args = self.args
        if args.baseline == "off":
            return torch.zeros(len(rows))
        missing = [row for row in rows if row.id not in self.baselines]
        if missing:
            with self.metrics.timed("baseline"):
                sampled = args.baseline == "sample"
                settings = sampling(self.model, args.max_new_tokens, args.temperature if sampled else None)
                seeds = [seed_of(args.seed, "baseline", row.id) for row in missing] if sampled else None
                inputs = prompts if len(missing) == len(rows) else inputs_of(self.model, missing)
                with without_adapter(self.model.base) if args.plan.adapts else nullcontext():
                    rollouts = write(self.model, inputs, "off", settings, seeds)
            scores = self.score(missing, rollouts, state).total.tolist()
            self.baselines.update({row.id: score for row, score in zip(missing, scores, strict=True)})
        return torch.tensor([self.baselines[row.id] for row in rows])


def inputs_of(model: VisMem, rows: list[Row]) -> dict[str, Tensor]:
    """The processor's output for the prompts, on the base's device and in its dtype.

    Raises:
        ValueError: if a row cannot be encoded; names the rows.
    """
    return model.move_inputs(prompt_inputs(model.processor, rows))
