"""How rows draw their next tokens: from logits through processors to an entry in each row's answer.

What a row feeds to the base, and when it forms a memory, is the decoder's matter (`engine.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vismem.backbones import Backbone
from vismem.config import KINDS, Kind, VisMemConfig
from vismem.decoding.cache import Aligned, Slots, on_device
from vismem.decoding.rng import pick
from vismem.decoding.row import NonFiniteError, Row, Settings
from vismem.decoding.trace import Invocation, Top
from vismem.tokens import MemoryTokens

BROKEN = -1  # in the place of the token of a row that has no finite scores
CHUNK = 64  # tokens that the table of ids grows by


@dataclass
class Drawn:
    """Rows that drew a token together, before the host has seen it.

    Args:
        rows: the rows.
        slots: the slots that the tensors hold, or None where they hold every slot.
        raw, scores: [n, V], before and after processors.
        broken: bool [n], rows without finite scores, whose token means nothing.
        log_probs: [n] of the tokens, where rows are recorded.
        allowed: [n], which kinds each might have invoked.
        tops: log-probabilities before processors, of the tokens [n], and the likeliest, [n, k] and their ids [n, k].
    """

    rows: list[Row]
    slots: list[int] | None
    raw: Tensor
    scores: Tensor
    broken: Tensor | None = None
    log_probs: Tensor | None = None
    allowed: list[list[bool]] = field(default_factory=list)
    tops: tuple[Tensor, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        places = range(len(self.raw)) if self.slots is None else {slot: at for at, slot in enumerate(self.slots)}
        self.places = [(row, places[row.slot]) for row in self.rows]  # each row's line in the tensors


class Drawing:
    """The half of the decoder that draws tokens and notes them; holds what there is of each row under way.

    Args:
        backbone, tokens, config: of the model that has the memory.
        cache: where keys and values lie, where that is known from the start.
    """

    def __init__(
        self, backbone: Backbone, tokens: MemoryTokens, config: VisMemConfig, cache: Aligned | Slots | None
    ) -> None:
        self.backbone, self.tokens, self.config, self.cache = backbone, tokens, config, cache
        self.rows: list[Row] = []  # unfinished
        self.calls: dict[int, list[Row]] = {}  # by their settings, all rows of the calls that are under way
        # One line for each slot of the next reading:
        self.hidden: Tensor | None = None  # [n, d], the states to sample from
        self.next: Tensor | None = None  # [n], the tokens to read
        self.broken: Tensor | None = None  # bool [n], rows whose scores were not finite when they were last drawn from
        self.ids: Tensor | None = None  # [n, longest], prompts and answers, each from the left

    def draw(self, rows: list[Row]) -> list[Drawn]:
        """Draws each row's next token into `next` and `ids`, on the device; rows of like settings together.

        Rows without finite scores get some token of the vocabulary, and are marked in `broken`.
        """
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            groups.setdefault((row.settings.key, row.draws is None), []).append(row)
        logits, drawn = self.backbone.head(self.hidden), []
        self.broken = torch.zeros_like(self.next, dtype=torch.bool)
        for members in groups.values():
            raw, hidden, slots = logits, self.hidden, None
            # All slots go along where they can, as in transformers' own loop.
            if not self.cache.stays and len(members) < len(logits):
                slots = [row.slot for row in members]
                index = on_device(slots, logits.device)
                raw, hidden = logits[index], hidden[index]
            if members[0].settings.policy.samples:
                raw = self.tokens.extend(raw, hidden).to(dtype=torch.float32, device=self.ids.device)
            else:
                raw = raw.to(dtype=torch.float32, device=self.ids.device, copy=True)
            group = Drawn(members, slots, raw, raw)
            tokens = self.draw_group(group)
            if slots is None:
                self.next, self.broken = tokens, group.broken
            else:
                index = on_device(slots, tokens.device)
                self.next = self.next.index_copy(0, index, tokens)
                self.broken = self.broken.index_copy(0, index, group.broken)
            drawn.append(group)
        self.write(rows)
        return drawn

    def draw_group(self, group: Drawn) -> Tensor:
        """Returns tokens [n] for a group, and fills in what they were drawn from."""
        settings, raw, places = group.rows[0].settings, group.raw, group.places
        logits, width = raw, raw.shape[-1]
        group.allowed = [[False, False]] * len(raw)
        if settings.policy.samples:
            for row, at in places:
                if row.may_invoke(self.config):
                    group.allowed[at] = [row.sighted, True]
            logits = self.tokens.forbid(raw, on_device(group.allowed, raw.device))
        elif settings.policy.injects:
            # Processors look tokens up by id, so the width must hold ours; drawn from is the base's width alone.
            wide = torch.nn.functional.pad(raw, (0, self.tokens.vocabulary - width), value=float("-inf"))
            logits = self.tokens.forbid(wide, torch.zeros(len(raw), 2, dtype=torch.bool, device=raw.device))
        group.scores = self.processed(group, logits)
        drawn = group.scores if settings.policy.samples else group.scores[:, :width]
        group.broken = ~drawn.amax(-1).isfinite()  # NaN, +inf, or nothing but -inf
        if not settings.config.do_sample:
            tokens = drawn.argmax(-1)
        elif group.rows[0].draws is not None:
            uniform = [0.0] * len(raw)
            for row, at in places:
                uniform[at] = row.draws[row.sampled]
            tokens = pick(torch.softmax(drawn, dim=-1), on_device(uniform, raw.device, torch.float64))
        else:
            # multinomial asserts on the device that probabilities are finite, and so ends every row.
            probabilities = torch.softmax(drawn, dim=-1).masked_fill(group.broken[:, None], 1.0)
            tokens = torch.multinomial(probabilities, 1, generator=settings.generator).squeeze(1)
        if any(row.settings.record for row in group.rows):
            group.log_probs = drawn.gather(1, tokens[:, None]).squeeze(1) - drawn.logsumexp(-1)
        most = max((row.top for row in group.rows if row.top is not None), default=None)
        if most is not None:
            log_probs = logits.log_softmax(-1)
            group.tops = log_probs.gather(1, tokens[:, None]).squeeze(1), *log_probs.topk(min(most, width))
        return tokens

    def processed(self, group: Drawn, logits: Tensor) -> Tensor:
        """Scores [n, V]: each row is processed at its own length, among the rows of its call."""
        settings = group.rows[0].settings
        if not settings.processors:
            return logits
        if settings.blind:
            return settings.processors(self.ids[: len(logits)], logits)  # the ids are not looked at
        lengths = {row.length for row in group.rows}
        if self.cache.stays and len(lengths) == 1:
            return settings.processors(self.ids[:, : lengths.pop()], logits)
        scores = logits.clone()
        for length in lengths:
            found = settings.processors(*self.of_call(settings, length, group, logits))
            members = [(at, row.index) for row, at in group.places if row.length == length]
            lines, rows = on_device(members, logits.device).unbind(1)
            scores[lines] = found[rows]
        return scores

    def of_call(self, settings: Settings, length: int, group: Drawn, values: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [R, length] and values [R, V] of all R rows of a call, in their order, as in transformers' own loop.

        Rows that ended are padded. Rows that draw no token now have values too, but they mean nothing.
        """
        if self.cache.stays:
            return self.ids[:, :length], values.clone()
        rows, places = self.calls[id(settings)], {id(row): at for row, at in group.places}
        order = on_device([places.get(id(row), 0) for row in rows], values.device)
        return torch.stack([self.line(row, length) for row in rows]), values[order]

    def line(self, row: Row, length: int) -> Tensor:
        """Ids [length] of a row, unfinished or not: its prompt and answer, cut off or padded."""
        if not row.gone:
            return self.ids[row.slot, :length]
        words = torch.cat([row.prompt, on_device(row.tokens, row.prompt.device, torch.long)])[:length]
        return torch.nn.functional.pad(words, (0, length - len(words)), value=row.settings.pad)

    def write(self, rows: list[Row]) -> None:
        """Enters the tokens just drawn into `ids`."""
        longest = max(row.length for row in rows)
        if longest >= self.ids.shape[1]:
            more = self.ids.new_full((len(self.ids), max(longest + 1 - self.ids.shape[1], CHUNK)), rows[0].settings.pad)
            self.ids = torch.cat([self.ids, more], dim=1)
        slots, places = on_device([[row.slot, row.length] for row in rows], self.ids.device).unbind(1)
        self.ids[slots, places] = self.next[slots]

    def settle(self, group: Drawn, values: list[int]) -> list[tuple[Row, Kind]]:
        """Takes note of the tokens that a group drew; a row whose value is `BROKEN` ends with an error.

        Returns:
            The rows that invoke, with the kind.
        """
        invoking = []
        for row, at in group.places:
            token, settings = values[row.slot], row.settings
            if token == BROKEN:
                row.error, row.done = NonFiniteError(self.diagnosis(row, group.raw[at])), True
                continue
            kind = self.tokens.kind_of.get(token) if settings.policy.samples else None
            if kind is not None and getattr(settings.policy, "swaps", False):
                kind = KINDS[1 - KINDS.index(kind)]
                token = self.tokens.invocation_ids[kind]
                self.ids[row.slot, row.length] = token
            row.sampled += 1
            row.gap += 1
            if settings.keeps_scores:
                self.keep(row, group.raw[at], group.scores[at])
            self.note(row, token, None if group.log_probs is None else group.log_probs[at], group.allowed[at])
            if row.top is not None:
                own, best, ids = (part[at].tolist() for part in group.tops)
                row.tops.append(Top(own, list(zip(ids, best, strict=True))[: row.top]))
            if kind is not None:
                row.invocations.append(Invocation(kind, len(row.tokens) - 1, 0, forced=False))
                row.gap = 0
                invoking.append((row, kind))
            row.done = row.sampled >= settings.budget or token in settings.ends
        self.stop(group, {id(row) for row, _ in invoking})
        return invoking

    def stop(self, group: Drawn, invoking: set[int]) -> None:
        """Asks the stopping criteria that need more than the last token; an invocation ends no answer by them."""
        for settings in {id(row.settings): row.settings for row in group.rows}.values():
            if not settings.criteria:
                continue
            members = [row for row in group.rows if row.settings is settings and row.error is None]
            for length in {row.length for row in members}:
                verdict = settings.criteria(*self.of_call(settings, length, group, group.scores)).tolist()
                for row in members:
                    if row.length == length and verdict[row.index] and id(row) not in invoking:
                        row.done = True

    def diagnosis(self, row: Row, logits: Tensor) -> str:
        """Says what of a row is not finite, given the logits [V] that its next token was to be drawn from."""
        advice = "look for NaN or infinity in its image tensors, or load the base in a dtype of more range (float32)"
        where = f"at its token number {row.sampled}"
        memory = row.invocations[-1] if row.invocations else None
        if memory is not None and memory.memory is not None and not memory.memory.isfinite().all():
            return f"its {memory.kind}-term memory is not finite {where}: check the memory's weights, or {advice}"
        if not self.hidden[row.slot].isfinite().all():
            return f"its hidden states are not finite {where}: {advice}"
        if (logits.isnan() | logits.isposinf()).any():
            return f"its logits are not finite {where}: {advice}"
        return f"the logits processors left it no finite score {where}: check them, suppressed tokens and temperature"

    # Notes.

    def put(self, row: Row, token: int) -> None:
        """Puts a token into the row's answer that it did not sample."""
        if row.length >= self.ids.shape[1]:
            more = self.ids.new_full((len(self.ids), CHUNK), row.settings.pad)
            self.ids = torch.cat([self.ids, more], dim=1)
        self.ids[row.slot, row.length] = token
        self.note(row, token, None, [False, False])
        if row.top is not None:
            row.tops.append(None)

    def note(self, row: Row, token: int, log_prob: Tensor | None, allowed: list[bool]) -> None:
        """Appends a token to the row's answer, with what it was drawn with; `log_prob` is None where it was put in."""
        row.tokens.append(token)
        if row.settings.policy.samples or row.settings.policy.injects:
            row.states.append((self.hidden, row.slot))
        if row.settings.record:
            row.chosen.append(log_prob is not None)
            row.open.append(list(allowed))
            row.log_probs.append(log_prob)
        if row.settings.streamer is not None:
            row.settings.streamer.put(torch.tensor([token]))

    def certain(self, row: Row, token: int) -> None:
        """Keeps, where scores are kept, that a token was put in: it was certain."""
        if row.settings.keeps_scores:
            scores = torch.full((self.tokens.vocabulary,), float("-inf"), device=self.ids.device)
            scores[token] = 0.0
            self.keep(row, scores, scores)

    def keep(self, row: Row, logits: Tensor, scores: Tensor) -> None:
        """Keeps what a token was drawn from, as far as the output wants it."""
        if row.settings.config.output_scores:
            row.scores.append(scores)
        if row.settings.config.output_logits:
            row.logits.append(logits)


def look(tokens: Tensor) -> Callable[[], list[int]]:
    """Sends tokens to the host; the function returned waits for them, and for nothing that was begun later."""
    if tokens.device.type != "cuda":
        return tokens.tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def wait() -> list[int]:
        there.synchronize()
        return host.tolist()

    return wait
