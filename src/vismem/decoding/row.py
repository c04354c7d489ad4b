"""One answer in progress (`Row`), the settings it is written with, and what its output keeps of each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from vismem.backbones import Image, Patches
from vismem.config import KINDS, VisMemConfig
from vismem.decoding.output import NonFiniteError
from vismem.decoding.policies import Policy
from vismem.decoding.processors import signature
from vismem.decoding.rng import RowRng
from vismem.decoding.trace import Invocation, Rollout, Top


@dataclass
class PromptImages:
    """A prompt's images. Encoded for the short former at the first short-term invocation; shared by copies.

    Args:
        visual: visual states [y, d], the projector's outputs.
        images: as the backbone reads them.
        patches: keys and values of the patches, once encoded.
    """

    visual: Tensor
    images: list[Image]
    patches: list[Patches] | None = None


@dataclass(eq=False)
class DecodingSettings:
    """How the rows of one `generate` call are decoded, as transformers prepared it.

    Args:
        policy: who decides on invocations.
        config: the generation config.
        processors: logits processors.
        criteria: stopping criteria other than end tokens and length.
        eos_ids: ids that end an answer.
        budget: maximum number of sampled tokens.
        delimiters: returns the ids that end a phrase; called only if a policy asks.
        pad: id of the pad token.
        generator: for sampling rows without a seed of their own; None is torch's global one.
        record: keep what training needs of a rollout.
        sample_blocks: sample the blocks that short memory starts from, with `memory_init="attended"`.
        streamer: as in transformers' `generate`.
    """

    policy: Policy
    config: GenerationConfig
    processors: Any  # a LogitsProcessorList, whose types ask for LongTensor and FloatTensor
    criteria: StoppingCriteriaList
    eos_ids: frozenset[int]
    budget: int
    delimiters: Callable[[], frozenset[int]]
    pad: int
    generator: torch.Generator | None = None
    record: bool = False
    sample_blocks: bool = False
    streamer: Any = None
    ignores_ids: bool = field(init=False)  # whether the processors look at scores alone
    sampling_key: Any = field(init=False)  # equal for rows that can be sampled together

    def __post_init__(self) -> None:
        shared = signature(self.processors)
        self.ignores_ids = shared is not None
        settings = id(self) if shared is None else shared
        self.sampling_key = (settings, bool(self.config.do_sample), self.policy.samples, self.policy.injects)

    @property
    def memory_on(self) -> bool:
        """Whether memory can be invoked at all."""
        return self.policy.samples or self.policy.injects


@dataclass
class Record:
    """What the output keeps of each new token, besides its id.

    Args:
        top: how many of the likeliest tokens to keep per sampled token; None keeps nothing.
        tops: what `top` asks for; None for inserted tokens.
        sampled: whether the token was sampled (True) or inserted.
        allowed: which kinds the row might have invoked instead, in the order of `KINDS`.
        log_probs: under the distribution the token was sampled from; None for inserted tokens.
        scores, logits: [V], after and before the processors.
    """

    top: int | None = None
    tops: list[Top | None] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    allowed: list[list[bool]] = field(default_factory=list)
    log_probs: list[Tensor | None] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Row:
    """One answer in progress. Policies see it as a `RowState`.

    Args:
        index: its row in the output.
        slot: its row in the tensors of the next forward.
        prompt: ids [L] of its prompt, as processors see them.
        settings: of its `generate` call.
        images: of its prompt; None once the row has left the batch.
        rng: its own random numbers, or None if the rows share a generator.
        tokens: the new tokens, sampled or inserted.
        queue: vectors [n, d] still to be fed, or None if only the last sampled token is.
        states: for each token of the current segment, the states [n, d] of the step that produced it, and the slot.
        segment_start: where in `tokens` the current segment starts.
        sampled, gap: tokens sampled in all, and since the last invocation.
        done: whether the answer has ended.
        error: why the row failed, or None.
        tag: its request's, or None.
    """

    index: int
    slot: int
    prompt: Tensor
    settings: DecodingSettings
    images: PromptImages | None
    rng: RowRng | None = None
    tokens: list[int] = field(default_factory=list)
    invocations: list[Invocation] = field(default_factory=list)
    queue: Tensor | None = None
    states: list[tuple[Tensor, int]] = field(default_factory=list)
    segment_start: int = 0
    sampled: int = 0
    gap: int = 0
    done: bool = False
    error: NonFiniteError | None = None
    tag: Any = None
    record: Record = field(default_factory=Record)

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer, as processors see them."""
        return len(self.prompt) + len(self.tokens)

    @property
    def sighted(self) -> bool:
        """Whether the prompt has an image."""
        return self.images is not None and bool(self.images.images)

    @property
    def at_delimiter(self) -> bool:
        """Whether the last token ends a phrase; the start of the answer counts as such."""
        return not self.tokens or self.tokens[-1] in self.settings.delimiters()

    @property
    def ended_by_eos(self) -> bool:
        """Whether the last token is an end token."""
        return bool(self.tokens) and self.tokens[-1] in self.settings.eos_ids

    @property
    def left(self) -> bool:
        """Whether the row has left the batch and has no slot any more."""
        return self.images is None

    def may_invoke(self, config: VisMemConfig) -> bool:
        """Whether the guards allow an invocation here; the last token of the budget could not use one."""
        rested = not self.invocations or self.gap >= config.min_gap
        return rested and len(self.invocations) < config.max_invocations and self.sampled + 1 < self.settings.budget

    def append(
        self, token: int, states: Tensor, log_prob: Tensor | None = None, allowed: list[bool] | None = None
    ) -> None:
        """Appends a token.

        Args:
            token: its id.
            states: [n, d], the last states of all slots before it.
            log_prob: of the sampled token; None if it was inserted.
            allowed: which kinds might have been invoked instead; none for an inserted token.
        """
        self.tokens.append(token)
        if self.settings.memory_on:
            self.states.append((states, self.slot))
        if self.settings.record:
            self.record.sampled.append(log_prob is not None)
            self.record.allowed.append(list(allowed or [False, False]))
            self.record.log_probs.append(log_prob)
        if self.settings.streamer is not None:
            self.settings.streamer.put(torch.tensor([token]))

    def keep_scores(self, logits: Tensor, scores: Tensor) -> None:
        """Keeps logits and scores [V] of a token, if the output includes them."""
        if not self.settings.config.return_dict_in_generate:
            return
        if self.settings.config.output_scores:
            self.record.scores.append(scores)
        if self.settings.config.output_logits:
            self.record.logits.append(logits)

    def keep_certain(self, token: int, vocabulary: int) -> None:
        """Keeps scores of an inserted token: 0 for itself and -inf elsewhere."""
        config = self.settings.config
        if config.return_dict_in_generate and (config.output_scores or config.output_logits):
            scores = torch.full((vocabulary,), float("-inf"), device=self.prompt.device)
            scores[token] = 0.0
            self.keep_scores(scores, scores)

    def rollout(self) -> Rollout:
        """What training needs of the answer; with `record=True` only."""
        zero, record = torch.zeros((), device=self.prompt.device), self.record
        log_probs = [zero if value is None else value.to(zero.device) for value in record.log_probs]
        return Rollout(
            tokens=torch.tensor(self.tokens, dtype=torch.long),
            sampled=torch.tensor(record.sampled, dtype=torch.bool),
            allowed=torch.tensor(record.allowed, dtype=torch.bool).view(-1, len(KINDS)),
            log_probs=torch.stack(log_probs).float().cpu() if log_probs else torch.zeros(0),
            invocations=self.invocations,
        )
