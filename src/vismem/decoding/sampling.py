"""Sampling: from the last states through logits and processors to each row's next token (Eq. 4).

`decoder.py` decides what a row feeds to the base and when it forms a memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vismem.backbones import Backbone
from vismem.config import KINDS, Kind, VisMemConfig
from vismem.decoding.batch import Batch
from vismem.decoding.cache import on_device
from vismem.decoding.output import NonFiniteError
from vismem.decoding.policies import Counterfactual
from vismem.decoding.rng import inverse_transform
from vismem.decoding.row import Row
from vismem.decoding.trace import Invocation, Top
from vismem.tokens import MemoryTokens

NOT_FINITE = -1  # stands for the token of a row without finite scores


@dataclass
class Sampled:
    """What rows with equal settings sampled together, before the host has seen the tokens.

    Args:
        rows: the rows.
        lines: by `id` of a row, its line in the tensors below.
        tokens: [n].
        logits, scores: [n, V], before and after the processors.
        not_finite: bool [n], lines without finite scores, whose token means nothing.
        allowed: [n, 2], which kinds each line might have invoked.
        log_probs: [n], of the tokens under the distribution they were sampled from; only if a row is recorded.
        tops: before the processors, the log-probabilities of the tokens [n], those of the likeliest [n, k], and their
            ids [n, k]; only if a row asks.
    """

    rows: list[Row]
    lines: dict[int, int]
    tokens: Tensor
    logits: Tensor
    scores: Tensor
    not_finite: Tensor
    allowed: list[list[bool]]
    log_probs: Tensor | None = None
    tops: tuple[Tensor, Tensor, Tensor] | None = None

    def line(self, row: Row) -> int:
        """The row's line in the tensors."""
        return self.lines[id(row)]


class Sampler:
    """Samples next tokens on the device, and adds them to the rows once the host has them.

    Args:
        backbone, tokens, config: of the model.
    """

    def __init__(self, backbone: Backbone, tokens: MemoryTokens, config: VisMemConfig) -> None:
        self.backbone, self.tokens, self.config = backbone, tokens, config

    # On the device.

    def sample(self, batch: Batch, rows: list[Row]) -> tuple[list[Sampled], Callable[[], list[int]]]:
        """Samples a token for each of `rows`, into `batch.next_ids` and `batch.ids`.

        Returns:
            What was sampled, rows with equal settings together; and a function that waits for the tokens and returns
            them by slot, `NOT_FINITE` for a row without finite scores.
        """
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            groups.setdefault((row.settings.sampling_key, row.rng is None), []).append(row)
        logits, sampled = self.backbone.head(batch.hidden), []
        not_finite = torch.zeros_like(batch.next_ids, dtype=torch.bool)
        for members in groups.values():
            if batch.keeps_finished or len(members) == len(logits):  # all lines, as in transformers' own loop
                group = self._sample_group(batch, members, logits, batch.hidden, {id(r): r.slot for r in members})
                batch.next_ids, not_finite = group.tokens, group.not_finite
            else:
                slots = on_device([row.slot for row in members], logits.device)
                lines = {id(row): line for line, row in enumerate(members)}
                group = self._sample_group(batch, members, logits[slots], batch.hidden[slots], lines)
                slots = slots.to(group.tokens.device)
                batch.next_ids = batch.next_ids.index_copy(0, slots, group.tokens)
                not_finite = not_finite.index_copy(0, slots, group.not_finite)
            sampled.append(group)
        batch.write_sampled(rows)
        return sampled, to_host(batch.next_ids.masked_fill(not_finite, NOT_FINITE))

    def _sample_group(
        self, batch: Batch, rows: list[Row], logits: Tensor, hidden: Tensor, lines: dict[int, int]
    ) -> Sampled:
        """Samples for rows with equal settings, from the base's logits [n, V_base] and the states [n, d]."""
        settings, device = rows[0].settings, batch.ids.device
        allowed = [[False, False]] * len(logits)
        if settings.policy.samples:
            logits = self.tokens.extend(logits, hidden).to(dtype=torch.float32, device=device)
            for row in rows:
                if row.may_invoke(self.config):
                    allowed[lines[id(row)]] = [row.sighted, True]
            open_logits = self.tokens.forbid(logits, on_device(allowed, device))
        else:
            logits = open_logits = logits.to(dtype=torch.float32, device=device, copy=True)
            if settings.policy.injects:
                # Processors look tokens up by id, so the width must hold ours; only the base's width is sampled from.
                wide = torch.nn.functional.pad(
                    logits, (0, self.tokens.vocabulary - logits.shape[-1]), value=float("-inf")
                )
                open_logits = self.tokens.forbid(wide, torch.zeros(len(wide), 2, dtype=torch.bool, device=device))
        scores = process(batch, rows, lines, open_logits)
        candidates = scores if settings.policy.samples else scores[:, : logits.shape[-1]]
        not_finite = ~candidates.amax(-1).isfinite()  # NaN, +inf, or nothing but -inf
        if not settings.config.do_sample:
            tokens = candidates.argmax(-1)
        elif rows[0].rng is not None:
            uniform = [0.0] * len(logits)
            for row in rows:
                uniform[lines[id(row)]] = 0.0 if row.rng is None else row.rng[row.sampled]
            tokens = inverse_transform(candidates.softmax(-1), on_device(uniform, device, torch.float64))
        else:
            # multinomial asserts on the device that probabilities are finite, which would end every row.
            probabilities = candidates.softmax(-1).masked_fill(not_finite[:, None], 1.0)
            tokens = torch.multinomial(probabilities, 1, generator=settings.generator).squeeze(1)
        found = Sampled(rows, lines, tokens, logits, scores, not_finite, allowed)
        if any(row.settings.record for row in rows):
            found.log_probs = candidates.gather(1, tokens[:, None]).squeeze(1) - candidates.logsumexp(-1)
        most = max((row.record.top for row in rows if row.record.top is not None), default=None)
        if most is not None:
            log_probs = open_logits.log_softmax(-1)
            likeliest = log_probs.topk(min(most, logits.shape[-1]))
            found.tops = (log_probs.gather(1, tokens[:, None]).squeeze(1), *likeliest)
        return found

    # On the host.

    def settle(self, batch: Batch, sampled: Sampled, tokens: list[int]) -> list[tuple[Row, Kind]]:
        """Adds sampled tokens to their rows; a row without finite scores ends with an error.

        Args:
            batch: the rows' batch.
            sampled: what was sampled.
            tokens: by slot.

        Returns:
            The rows that invoke memory, with the kind.
        """
        invoking: list[tuple[Row, Kind]] = []
        for row in sampled.rows:
            token, line, policy = tokens[row.slot], sampled.line(row), row.settings.policy
            if token == NOT_FINITE:
                row.error, row.done = NonFiniteError(self._diagnose(batch, row, sampled.logits[line])), True
                continue
            kind = self.tokens.kind_of.get(token) if policy.samples else None
            if kind is not None and isinstance(policy, Counterfactual):  # the other kind is invoked (Eq. 15)
                kind = KINDS[1 - KINDS.index(kind)]
                token = self.tokens.invocation_ids[kind]
                batch.ids[row.slot, row.length] = token
            row.sampled += 1
            row.gap += 1
            row.keep_scores(sampled.logits[line], sampled.scores[line])
            log_prob = None if sampled.log_probs is None else sampled.log_probs[line]
            row.append(token, batch.hidden, log_prob, sampled.allowed[line])
            if row.record.top is not None and sampled.tops is not None:
                own, best, ids = (part[line] for part in sampled.tops)
                likeliest = list(zip(ids.tolist(), best.tolist(), strict=True))
                row.record.tops.append(Top(float(own), likeliest[: row.record.top]))
            if kind is not None:
                row.invocations.append(Invocation(kind, len(row.tokens) - 1, 0, forced=False))
                row.gap = 0
                invoking.append((row, kind))
            row.done = row.sampled >= row.settings.budget or token in row.settings.eos_ids
        check_criteria(batch, sampled, {id(row) for row, _ in invoking})
        return invoking

    def _diagnose(self, batch: Batch, row: Row, logits: Tensor) -> str:
        """Says what in a row is not finite, given the logits [V] its next token was to be sampled from."""
        advice = "look for NaN or infinity in its image tensors, or load the base in a dtype with more range (float32)"
        where = f"at its token {row.sampled}"
        last = row.invocations[-1] if row.invocations else None
        if last is not None and last.memory is not None and not last.memory.isfinite().all():
            return f"its {last.kind}-term memory is not finite {where}: check the memory's weights, or {advice}"
        if not batch.hidden[row.slot].isfinite().all():
            return f"its hidden states are not finite {where}: {advice}"
        if (logits.isnan() | logits.isposinf()).any():
            return f"its logits are not finite {where}: {advice}"
        return f"the logits processors left it no finite score {where}: check them, suppressed tokens and temperature"


def process(batch: Batch, rows: list[Row], lines: dict[int, int], logits: Tensor) -> Tensor:
    """Scores [n, V] of rows with equal settings: each row at its own length, among the rows of its call."""
    settings = rows[0].settings
    if not settings.processors:
        return logits
    if settings.ignores_ids:
        return settings.processors(batch.ids[: len(logits)], logits)
    lengths = {row.length for row in rows}
    if batch.keeps_finished and len(lengths) == 1:
        return settings.processors(batch.ids[:, : lengths.pop()], logits)
    scores = logits.clone()
    for length in lengths:
        found = settings.processors(*batch.call_view(settings, length, lines, logits))
        members = [(lines[id(row)], row.index) for row in rows if row.length == length]
        line, index = on_device(members, logits.device).unbind(1)
        scores[line] = found[index]
    return scores


def check_criteria(batch: Batch, sampled: Sampled, invoking: set[int]) -> None:
    """Ends rows by the stopping criteria that need more than the last token, unless they have just invoked."""
    for settings in {id(row.settings): row.settings for row in sampled.rows}.values():
        if not settings.criteria:
            continue
        members = [row for row in sampled.rows if row.settings is settings and row.error is None]
        for length in {row.length for row in members}:
            verdict = settings.criteria(*batch.call_view(settings, length, sampled.lines, sampled.scores)).tolist()
            for row in members:
                if row.length == length and verdict[row.index] and id(row) not in invoking:
                    row.done = True


def to_host(tokens: Tensor) -> Callable[[], list[int]]:
    """Sends tokens to the host; the function returned waits for them, and for nothing started later."""
    if tokens.device.type != "cuda":
        return tokens.tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return wait
