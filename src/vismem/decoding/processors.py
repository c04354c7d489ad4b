"""Logits processors of transformers, made fit for memory: they never count memory tokens as words of the text.

Also says which processors rows of different lengths and prompts may share, and keeps a row of NaN from failing a batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

# Look at scores alone, so rows of different lengths and prompts can go through them together.
IGNORES_IDS = (
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
)
# Build a `torch.distributions.Categorical`, which refuses the whole batch for one row that is not finite.
NEEDS_FINITE_ROWS = (logits_process.EtaLogitsWarper, logits_process.TopHLogitsWarper)
PENALTIES = (
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
)
MATCHES_SEQUENCES = (
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,  # and of bad words
)


class FiniteRows(logits_process.LogitsProcessor):
    """Applies a processor to the rows with finite scores and leaves the others unchanged.

    Args:
        inner: the processor; sees zeros instead of the rows that are not finite.
    """

    def __init__(self, inner: logits_process.LogitsProcessor) -> None:
        self.inner = inner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.amax(-1, keepdim=True).isfinite()  # -inf beside a finite score is no fault
        return torch.where(finite, self.inner(input_ids, scores.where(finite, 0.0)), scores)


class WordsOnly(logits_process.LogitsProcessor):
    """Applies a processor to the words of the text, without the four memory tokens.

    A memory token repeats nothing: penalties leave its logit unchanged, and n-grams reach across it.

    Args:
        inner: the processor.
        ids: of the four tokens.
    """

    def __init__(self, inner: logits_process.LogitsProcessor, ids: list[int]) -> None:
        self.inner, self.ids = inner, torch.tensor(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.ids = self.ids.to(scores.device)
        if isinstance(self.inner, MATCHES_SEQUENCES):  # memory tokens first, so that words stay adjacent
            is_memory = torch.isin(input_ids, self.ids)
            input_ids = input_ids.gather(1, is_memory.int().argsort(dim=1, descending=True, stable=True))
        found = self.inner(input_ids, scores)
        if isinstance(self.inner, PENALTIES):
            found = found.index_copy(1, self.ids, scores[:, self.ids])
        return found


def adapt(processors: LogitsProcessorList, memory_ids: list[int], prompts: int, copies: int) -> LogitsProcessorList:
    """Returns the processors of a `generate` call as memory decoding needs them.

    Args:
        processors: as transformers made them.
        memory_ids: of the four tokens; empty with memory off.
        prompts: number of prompts B.
        copies: answers per prompt; processors that hold each prompt's padding get B * copies rows.
    """
    found = LogitsProcessorList()
    for each in processors:
        padding = getattr(each, "prompt_ignore_length", None)
        if isinstance(padding, Tensor) and len(padding) == prompts:
            each = copy.copy(each)
            each.prompt_ignore_length = padding.repeat_interleave(copies)
        if memory_ids and isinstance(each, PENALTIES + MATCHES_SEQUENCES):
            each = WordsOnly(each, memory_ids)
        if isinstance(each, NEEDS_FINITE_ROWS):
            each = FiniteRows(each)
        found.append(each)
    return found


def signature(processors: LogitsProcessorList) -> tuple[Any, ...] | None:
    """A key, equal for lists of processors whose rows can be processed together; None if a list cannot be shared."""
    bare = [each.inner if isinstance(each, FiniteRows) else each for each in processors]
    if any(type(each) not in IGNORES_IDS for each in bare):
        return None
    return tuple((type(each), *map(plain, vars(each).values())) for each in bare)


def plain(value: Any) -> str:
    """A setting as text that can be compared; a tensor with all its digits."""
    return str(value.tolist()) if isinstance(value, Tensor) else str(value)
