"""One answer in the making: what its prompt shows, how its tokens are drawn, when it ends, what it has so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process

from vismem.backbones import Image, Patches
from vismem.config import KINDS, VisMemConfig
from vismem.decoding.policies import Policy
from vismem.decoding.rng import Draws
from vismem.decoding.trace import Invocation, Rollout, Top, VisMemOutput

# Processors that look at scores alone: rows of different lengths and prompts can go through them together.
BLIND = (
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
)


# They build a `torch.distributions.Categorical`, which refuses the whole batch for one row that is not finite.
ALL_OR_NONE = (logits_process.EtaLogitsWarper, logits_process.TopHLogitsWarper)


class NonFiniteError(ArithmeticError):
    """A row has no finite scores to draw its next token from: NaN or infinity in its inputs, memory or logits.

    Args:
        message: what is not finite, and at which token.
        rows: of `generate`, the indices of the rows that failed.
        output: of `generate`, what it would have returned; the rows that failed end where they did.
    """

    def __init__(self, message: str, rows: Sequence[int] = (), output: VisMemOutput | Tensor | None = None) -> None:
        super().__init__(message)
        self.rows, self.output = list(rows), output


class FiniteRows(logits_process.LogitsProcessor):
    """Applies a processor to the rows that have finite scores, and leaves the others as they are.

    Args:
        inner: the processor; sees zeros in place of a row that is left.
    """

    def __init__(self, inner: logits_process.LogitsProcessor) -> None:
        self.inner = inner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.amax(-1, keepdim=True).isfinite()  # -inf beside a finite score is no fault
        return torch.where(finite, self.inner(input_ids, scores.where(finite, 0.0)), scores)


@dataclass
class Sight:
    """What one prompt shows: its images, encoded for the short former when first looked at, and shared by copies."""

    visual: Tensor
    images: list[Image]
    patches: list[Patches] | None = None


@dataclass(eq=False)
class Settings:
    """How some rows are written; made by transformers out of one `generate` call.

    Args:
        policy: who decides on invocations.
        config: the generation config.
        processors: logits processors.
        criteria: stopping criteria but for the end tokens and the length.
        ends: ids that end an answer.
        budget: tokens to sample at most.
        delimiters: gives the ids after which a phrase ends; called only where a policy needs them.
        pad: id of the pad token.
        generator: where sampling draws from for rows without a seed of their own; None is torch's global one.
        record: keep what training needs of a rollout.
        streamer: as in transformers' `generate`.
    """

    policy: Policy
    config: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    ends: frozenset[int]
    budget: int
    delimiters: Callable[[], frozenset[int]]
    pad: int
    generator: torch.Generator | None = None
    record: bool = False
    streamer: Any = None
    blind: bool = field(init=False)
    key: Any = field(init=False)

    def __post_init__(self) -> None:
        bare = [p.inner if isinstance(p, FiniteRows) else p for p in self.processors]
        self.blind = all(type(processor) in BLIND for processor in bare)
        # Rows of like settings are drawn together; what cannot be compared is alike with itself only.
        alike = tuple((type(p), *map(plain, vars(p).values())) for p in bare) if self.blind else id(self)
        self.key = (alike, bool(self.config.do_sample), self.policy.samples, self.policy.injects)

    @property
    def keeps_scores(self) -> bool:
        """Whether scores or logits are part of the output."""
        return bool(self.config.return_dict_in_generate and (self.config.output_scores or self.config.output_logits))


@dataclass(eq=False)
class Row:
    """One answer in the making.

    Args:
        index: its row in the output.
        slot: its row in the tensors of the reading under way.
        prompt: ids [L] of its prompt as processors see it.
        sight: what its prompt shows; None once the row is done.
        tokens: the new tokens, sampled or put in.
        queue: vectors [n, d] still to be fed, or None where only the last sampled token is.
        states: for each token of the current segment, the states [n, d] of the step that produced it, and the slot.
        segment: where in `tokens` the current segment starts.
        sampled, gap: tokens sampled in all, and since the last invocation.
        draws: its own chance, or None where rows share a generator.
        chosen: for each new token whether it was sampled (True) or put in.
        open: for each new token which kinds the row might have invoked instead, in the order of `KINDS`.
        log_probs: for each new token the log-probability that it was drawn with; None where it was put in.
        top: keep each sampled token's log-probability and those of that many likeliest ones; None keeps nothing.
        tops: for each new token what `top` asks for; None where it was put in.
        tag: its request's, or None.
        error: why the row ended before its time, or None.
    """

    index: int
    slot: int
    prompt: Tensor
    sight: Sight | None
    settings: Settings
    draws: Draws | None = None
    tokens: list[int] = field(default_factory=list)
    invocations: list[Invocation] = field(default_factory=list)
    queue: Tensor | None = None
    states: list[tuple[Tensor, int]] = field(default_factory=list)
    segment: int = 0
    sampled: int = 0
    gap: int = 0
    done: bool = False
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    open: list[list[bool]] = field(default_factory=list)
    log_probs: list[Tensor | None] = field(default_factory=list)
    top: int | None = None
    tops: list[Top | None] = field(default_factory=list)
    tag: Any = None
    error: NonFiniteError | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer, as processors see them."""
        return len(self.prompt) + len(self.tokens)

    @property
    def sighted(self) -> bool:
        return self.sight is not None and bool(self.sight.images)

    @property
    def ended(self) -> bool:
        """Whether the last token ends the answer."""
        return bool(self.tokens) and self.tokens[-1] in self.settings.ends

    @property
    def gone(self) -> bool:
        """Whether the row has left: it has no slot any more."""
        return self.sight is None

    @property
    def at_delimiter(self) -> bool:
        return not self.tokens or self.tokens[-1] in self.settings.delimiters()

    def may_invoke(self, config: VisMemConfig) -> bool:
        """Whether the guards allow an invocation here; the last token of the budget could not make use of one."""
        rested = not self.invocations or self.gap >= config.min_gap
        return rested and len(self.invocations) < config.max_invocations and self.sampled + 1 < self.settings.budget

    def rollout(self) -> Rollout:
        """What training needs of the row; with `record` only."""
        none = torch.zeros((), device=self.prompt.device)
        log_probs = [none if value is None else value.to(none.device) for value in self.log_probs]
        return Rollout(
            tokens=torch.tensor(self.tokens, dtype=torch.long),
            sampled=torch.tensor(self.chosen, dtype=torch.bool),
            allowed=torch.tensor(self.open, dtype=torch.bool).view(-1, len(KINDS)),
            log_probs=torch.stack(log_probs).float().cpu() if log_probs else torch.zeros(0),
            invocations=self.invocations,
        )


def plain(value: Any) -> Any:
    """A setting of a processor as something that can be compared: a tensor's numbers, all digits of them."""
    return str(value.tolist()) if isinstance(value, Tensor) else str(value)


def output(rows: list[Row], settings: Settings) -> VisMemOutput | Tensor:
    """Returns the finished rows of one call as `generate` does.

    Raises:
        NonFiniteError: if a row failed; names those that did, with the first one's reason, and holds the output.
    """
    found = gathered(rows, settings)
    failed = [row for row in rows if row.error is not None]
    if failed:
        numbers = [row.index for row in failed]
        named = ", ".join(map(str, numbers[:8])) + (" and others" if numbers[8:] else "")
        raise NonFiniteError(f"row {named}: {failed[0].error}", numbers, found) from failed[0].error
    return found


def gathered(rows: list[Row], settings: Settings) -> VisMemOutput | Tensor:
    """Returns what rows have written, whether they ended well or not."""
    prompts, longest = torch.stack([row.prompt for row in rows]), max(len(row.tokens) for row in rows)
    answers = [row.tokens + [settings.pad] * (longest - len(row.tokens)) for row in rows]
    sequences = torch.cat([prompts, torch.tensor(answers, dtype=prompts.dtype, device=prompts.device)], dim=1)
    if not settings.config.return_dict_in_generate:
        return sequences

    def columns(name: str) -> tuple[Tensor, ...] | None:
        if not getattr(settings.config, f"output_{name}"):
            return None
        kept = [getattr(row, name) for row in rows]
        width = max((len(entry) for row in kept for entry in row), default=settings.pad + 1)
        blank = torch.full((width,), float("-inf"), device=sequences.device)
        blank[settings.pad] = 0.0

        def at(row: list[Tensor], place: int) -> Tensor:
            if place >= len(row):
                return blank
            return torch.nn.functional.pad(row[place], (0, width - len(row[place])), value=float("-inf"))

        return tuple(torch.stack([at(row, place) for row in kept]) for place in range(longest))

    return VisMemOutput(
        sequences=sequences,
        scores=columns("scores"),
        logits=columns("logits"),
        invocations=[row.invocations for row in rows],
        rollout=[row.rollout() for row in rows] if settings.record else None,
    )
