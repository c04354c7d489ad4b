"""The decoder: a queue of pending input vectors per row, fed to the base in step.

Each forward feeds `w = min over unfinished rows of len(queue)` positions of every row; a row whose queue ran empty
samples its next token. An invocation puts `[invocation, m_1..m_N, end]` into its row's queue, so one row alone reads
a memory in one forward, and in a batch some rows read memory while others write, with no padding and no holes in the
cache. Rows may enter and leave between steps, where the cache lets them (`cache.py`).

On a GPU the next forward is begun before the host has seen the token that it reads; where that token turns out to
invoke memory, the row's last column is taken back. So while rows write words the device does not wait for the host.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vismem.backbones import Backbone, Image
from vismem.config import KINDS, Kind, VisMemConfig
from vismem.decoding.cache import Aligned, Slots, on_device
from vismem.decoding.chance import Draws, pick
from vismem.decoding.invocation import Opening
from vismem.decoding.rows import Row, Settings, Sight
from vismem.decoding.trace import Invocation
from vismem.memory import Memory, Observation
from vismem.tokens import MemoryTokens

CHUNK = 64  # tokens that the table of ids grows by


@dataclass
class Prompts:
    """Prompts that were read, each once.

    Args:
        ids: [B, L].
        cache, mask, position: what reading left; see `cache.Aligned`.
        hidden: the last states [B, d].
        sights: what each shows.
    """

    ids: Tensor
    cache: DynamicCache
    mask: Tensor | None
    position: Tensor
    hidden: Tensor
    sights: list[Sight]


@dataclass
class Drawn:
    """Rows that drew a token together, before the host has seen it.

    Args:
        rows: the rows.
        slots: the slots that the tensors hold, or None where they hold every slot.
        raw, scores: [n, V], before and after processors.
        log_probs: [n] of the tokens, where rows are recorded.
        allowed: [n], which kinds each might have invoked.
    """

    rows: list[Row]
    slots: list[int] | None
    raw: Tensor
    scores: Tensor
    log_probs: Tensor | None = None
    allowed: list[list[bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        places = range(len(self.raw)) if self.slots is None else {slot: at for at, slot in enumerate(self.slots)}
        self.places = [(row, places[row.slot]) for row in self.rows]  # each row's line in the tensors


class Decoder:
    """Rows in the making, and the step that writes each one's next token.

    Args:
        backbone, tokens, memory, config: of the model that has the memory.
        slots: where keys and values lie; without it the first prompts' own cache is gone on with (`Aligned`).
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: MemoryTokens,
        memory: Memory,
        config: VisMemConfig,
        slots: Slots | None = None,
    ) -> None:
        self.backbone, self.tokens, self.memory, self.config = backbone, tokens, memory, config
        self.cache: Aligned | Slots | None = slots
        if slots is not None:
            slots.user = weakref.ref(self)
        self.rows: list[Row] = []  # unfinished
        self.calls: dict[int, list[Row]] = {}  # by their settings, all rows of the calls that are under way
        # One line for each slot of the next reading:
        self.hidden: Tensor | None = None  # [n, d], the states to sample from
        self.next: Tensor | None = None  # [n], the tokens to read
        self.ids: Tensor | None = None  # [n, longest], prompts and answers, each from the left

    # Rows enter.

    def read_prompts(self, base, input_ids: Tensor, kwargs: dict, images: list[list[Image]]) -> Prompts:
        """Reads a batch of prompts as transformers prepared it."""
        features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        inputs = base.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        inputs.pop("logits_to_keep", None)
        inputs["use_cache"] = True
        if inputs.get("past_key_values") is None:
            inputs["past_key_values"] = DynamicCache(config=base.config.get_text_config())
        if self.tokens.present(input_ids):  # memory tokens of earlier turns: rows that the base's table lacks
            inputs["inputs_embeds"], inputs["input_ids"] = self.tokens.embed(inputs["input_ids"]), None
        visual = self.backbone.visual_states(input_ids == self.backbone.image_token_id, features)
        hidden = self.backbone.read(**inputs)[:, -1]
        position = inputs.get("position_ids")
        if position is None:
            position = torch.full((len(input_ids), 1), input_ids.shape[1] - 1, device=input_ids.device)
        sights = [Sight(v, i) for v, i in zip(visual, images, strict=True)]
        cache, mask = inputs["past_key_values"], inputs.get("attention_mask")
        return Prompts(input_ids, cache, mask, position[..., -1:], hidden, sights)

    def enter(self, prompts: Prompts, settings: Settings, copies: int = 1, seeds: list[int] | None = None) -> list[Row]:
        """Makes `copies` rows of every prompt, or one for each opening of a counterfactual.

        Raises:
            ValueError: if there are not as many seeds as rows, or the policy's schedule does not fit them.
        """
        settings.policy = copy.copy(settings.policy)  # the same object may decide for other rows just now
        settings.policy.start()
        openings = getattr(settings.policy, "openings", ())
        sources = [o.prompt for o in openings] or [p for p in range(len(prompts.ids)) for _ in range(copies)]
        if seeds is not None and len(seeds) != len(sources):
            raise ValueError(
                f"seed has {len(seeds)} entries for {len(sources)} rows; give one seed for each output row"
            )
        draws = [None] * len(sources) if seeds is None else [Draws(seed) for seed in seeds]
        rows = [
            Row(index, index, prompts.ids[source], prompts.sights[source], settings, own)
            for index, (source, own) in enumerate(zip(sources, draws, strict=True))
        ]
        check_schedule(settings.policy, rows)
        ids, hidden, pads = prompts.ids, prompts.hidden, prompts.ids.new_full((len(rows),), settings.pad)
        if isinstance(self.cache, Slots):
            slots = self.cache.place(prompts.cache, prompts.mask, prompts.position, sources)
            for row, slot in zip(rows, slots, strict=True):
                row.slot = slot
            width = self.cache.width
            self.hidden = widened(self.hidden, width, slots, hidden[sources])
            self.next = widened(self.next, width, slots, pads)
            self.ids = widened(self.ids, width, slots, ids[sources])
        else:
            position, mask = prompts.position, prompts.mask
            if sources != list(range(len(ids))):
                index = torch.tensor(sources, device=ids.device)
                prompts.cache.batch_select_indices(index)
                ids, hidden, position = ids[index], hidden[index], position.index_select(-2, index)
                mask = None if mask is None else mask[index]
            self.cache = Aligned(prompts.cache, mask, position)
            self.hidden, self.next, self.ids = hidden, pads, ids
        self.rows += rows
        self.calls[id(settings)] = rows
        if openings:
            self.resume(rows, openings)
        return rows

    def resume(self, rows: list[Row], openings: list[Opening]) -> None:
        """Lets rows start with words already written and an invocation after them, all waiting in their queues."""
        for row, opening in zip(rows, openings, strict=True):
            for token in opening.tokens:
                self.put(row, token)
            row.sampled = len(opening.tokens)
        for kind in KINDS:
            members = [(row, opening) for row, opening in zip(rows, openings, strict=True) if opening.kind == kind]
            for row, _ in members:
                self.put(row, self.tokens.invocation_ids[kind])
                row.invocations.append(Invocation(kind, len(row.tokens) - 1, 0, forced=False))
                row.sampled, row.gap = row.sampled + 1, 0
            if members:
                self.remember(kind, [row for row, _ in members], [opening.states for _, opening in members])
            for row, opening in members:
                if opening.tokens:
                    words = torch.tensor(opening.tokens, device=self.ids.device)
                    row.queue = torch.cat([self.tokens.embed(words), row.queue])

    # One step.

    def step(self) -> list[Row]:
        """Lets every row whose queue is empty invoke or sample, forms memories, feeds the base; rows that ended leave.

        Returns:
            The rows that ended in this step.
        """
        ready = [row for row in self.rows if row.queue is None]
        invoking = self.inject(ready)
        put_in = {id(row) for row, _ in invoking}
        drawing = [row for row in ready if id(row) not in put_in]
        drawn = self.draw(drawing) if drawing else []
        sampled, fed = look(self.next), None
        if self.cache.ahead and not invoking and any(row.sampled + 1 < row.settings.budget for row in drawing):
            fed = self.feed()
        if drawn:
            values = sampled()
            invoking += [found for group in drawn for found in self.settle(group, values)]
        if fed is not None:
            for row, _ in invoking:
                self.cache.retract(row.slot)
        for kind in KINDS:
            rows = [row for row, wanted in invoking if wanted == kind]
            if rows:
                self.remember(kind, rows)
        if fed is not None:
            self.hidden = fed
        ended = [row for row in self.rows if row.done]
        if ended:
            self.leave(ended)
        if fed is None and self.rows:
            self.hidden = self.feed()
        return ended

    def inject(self, ready: list[Row]) -> list[tuple[Row, Kind]]:
        """Invocations that the rows' policies put in here."""
        found = []
        for row in ready:
            policy = row.settings.policy
            if not policy.injects or (policy.guarded and not row.may_invoke(self.config)):
                continue
            kind = policy.inject(row)
            if kind is not None:
                token = self.tokens.invocation_ids[kind]
                self.put(row, token)
                self.certain(row, token)
                row.invocations.append(Invocation(kind, len(row.tokens) - 1, 0, forced=True))
                row.gap = 0
                found.append((row, kind))
        return found

    def draw(self, rows: list[Row]) -> list[Drawn]:
        """Draws each row's next token into `next` and `ids`, on the device; rows of like settings together."""
        groups: dict = {}
        for row in rows:
            groups.setdefault((row.settings.key, row.draws is None), []).append(row)
        logits, drawn = self.backbone.head(self.hidden), []
        for members in groups.values():
            raw, hidden, slots = logits, self.hidden, None
            # All slots go along where they can, as in transformers' own loop.
            if not self.cache.stays and len(members) < len(logits):
                slots = [row.slot for row in members]
                index = on_device(slots, logits.device)
                raw, hidden = logits[index], hidden[index]
            if members[0].settings.policy.samples:
                raw = self.tokens.extend(raw, hidden)
            raw = raw.to(dtype=torch.float32, device=self.ids.device, copy=True)
            group = Drawn(members, slots, raw, raw)
            tokens = self.draw_group(group)
            whole = slots is None
            self.next = tokens if whole else self.next.index_copy(0, on_device(slots, tokens.device), tokens)
            drawn.append(group)
        self.write(rows)
        return drawn

    def draw_group(self, group: Drawn) -> Tensor:
        """Tokens [n] for a group; fills in what they were drawn from."""
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
        if not settings.config.do_sample:
            tokens = drawn.argmax(-1)
        elif group.rows[0].draws is not None:
            uniform = [0.0] * len(raw)
            for row, at in places:
                uniform[at] = row.draws[row.sampled]
            tokens = pick(torch.softmax(drawn, dim=-1), on_device(uniform, raw.device, torch.float64))
        else:
            tokens = torch.multinomial(torch.softmax(drawn, dim=-1), 1, generator=settings.generator).squeeze(1)
        if any(row.settings.record for row in group.rows):
            group.log_probs = drawn.gather(1, tokens[:, None]).squeeze(1) - drawn.logsumexp(-1)
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
        """Takes note of the tokens that a group drew. Returns the rows that invoke, with the kind."""
        invoking = []
        for row, at in group.places:
            token, settings = values[row.slot], row.settings
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
            members = [row for row in group.rows if row.settings is settings]
            for length in {row.length for row in members}:
                verdict = settings.criteria(*self.of_call(settings, length, group, group.scores)).tolist()
                for row in members:
                    if row.length == length and verdict[row.index] and id(row) not in invoking:
                        row.done = True

    def feed(self) -> Tensor:
        """Feeds w positions of every unfinished row and returns the states [n, d] after them."""
        queued = [row for row in self.rows if row.queue is not None]
        width = min(len(row.queue) for row in queued) if len(queued) == len(self.rows) else 1
        inputs = self.backbone.embeddings(self.safe(self.next))[:, None]  # [n, 1, d]
        if queued:
            inputs = inputs.repeat(1, width, 1)
            for row in queued:
                inputs[row.slot] = row.queue[:width]
                row.queue = row.queue[width:] if len(row.queue) > width else None
        return self.cache.read(self.backbone, inputs, [row.slot for row in self.rows])

    # Memory.

    def remember(self, kind: Kind, rows: list[Row], states: list[Tensor] | None = None) -> None:
        """Forms one memory for each row and queues `[invocation, memory, end]`; the end token joins the answer.

        `states` are the rows' observed states where they are known from another decode.
        """
        given = dict(zip(map(id, rows), states or [None] * len(rows), strict=True))
        forming = [row for row in rows if kind in row.settings.policy.forms]
        formed: dict[int, Tensor] = {}
        if forming:
            seen = [self.observe(row, kind, given[id(row)]) for row in forming]
            formed = dict(zip(map(id, forming), self.memory.form(kind, seen), strict=True))
            for row, observation in zip(forming, seen, strict=True):
                if row.settings.record:
                    row.invocations[-1].states = observation.states
        first, last = self.tokens.row(kind, "invocation")[None], self.tokens.row(kind, "end")[None]
        for row in rows:
            memory = formed.get(id(row))
            slots = [] if memory is None else [memory.to(first)]
            row.queue = torch.cat([first, *slots, last])
            row.invocations[-1].length = 0 if memory is None else len(memory)
            row.invocations[-1].memory = memory
            self.put(row, self.tokens.end_ids[kind])
            self.certain(row, self.tokens.end_ids[kind])
            row.segment, row.states = len(row.tokens), []

    def observe(self, row: Row, kind: Kind, states: Tensor | None) -> Observation:
        """What the row has in mind: its visual states, and the segment that the invocation token ends."""
        if kind == "short" and row.sight.patches is None:
            row.sight.patches = self.memory.short.encode(row.sight.images)
        if states is None:
            states = torch.stack([hidden[slot] for hidden, slot in row.states])
        segment = self.tokens.embed(self.ids[row.slot, len(row.prompt) + row.segment : row.length])
        return Observation(row.sight.visual, states, segment, row.sight.patches or [])

    # Notes.

    def put(self, row: Row, token: int) -> None:
        """Puts a token into the row's answer that it did not sample."""
        if row.length >= self.ids.shape[1]:
            more = self.ids.new_full((len(self.ids), CHUNK), row.settings.pad)
            self.ids = torch.cat([self.ids, more], dim=1)
        self.ids[row.slot, row.length] = token
        self.note(row, token, None, [False, False])

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

    # Rows leave.

    def leave(self, rows: list[Row]) -> None:
        """Takes rows out, finished or given up."""
        gone = {id(row) for row in rows}
        self.rows = [row for row in self.rows if id(row) not in gone]
        for row in rows:
            row.states, row.queue, row.sight = [], None, None  # what a finished answer need not hold on to
        under_way = {id(row.settings) for row in self.rows}
        self.calls = {call: members for call, members in self.calls.items() if call in under_way}
        slots = [row.slot for row in rows]
        if self.cache.stays:
            self.next[slots] = rows[0].settings.pad
            return
        order = self.cache.drop(slots)
        if order == list(range(len(self.ids))):
            return
        index = on_device(order, self.ids.device, torch.long)
        self.hidden, self.next, self.ids = self.hidden[index.to(self.hidden.device)], self.next[index], self.ids[index]
        place = {old: new for new, old in enumerate(order)}
        for row in self.rows:
            row.slot = place[row.slot]

    def safe(self, ids: Tensor) -> Tensor:
        """Ids [n] that the base's table has; vectors of memory tokens come from the queues."""
        return torch.where(ids < self.tokens.base_vocabulary, ids, 0)


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


def widened(known: Tensor | None, width: int, lines: list[int], values: Tensor) -> Tensor:
    """A table of `width` lines: those known so far, and `values` in `lines`; shorter lines are filled up with zeros."""
    shape = list(values.shape)
    shape[0] = width
    if values.dim() > 1 and known is not None:
        shape[1] = max(values.shape[1], known.shape[1])
    found = values.new_zeros(shape)
    if known is not None:
        found[(slice(len(known)), *map(slice, known.shape[1:]))] = known
    found[(lines, *map(slice, values.shape[1:]))] = values
    return found


def check_schedule(policy, rows: list[Row]) -> None:
    """Refuses a schedule that names a row that is not there, or asks a blind row to look; and too few seeds."""
    seeds = getattr(policy, "seed", None)
    if isinstance(seeds, Sequence) and len(seeds) < len(rows):
        raise ValueError(
            f"Random has {len(seeds)} seeds for {len(rows)} rows; give one seed for each output row, or one number"
        )
    for index, step, kind in getattr(policy, "schedule", ()):
        if index >= len(rows):
            raise ValueError(f"Forced names row {index}, but the batch has {len(rows)} (rows count from 0)")
        if kind == "short" and not rows[index].sighted:
            raise ValueError(
                f"Forced asks for short-term memory in row {index} at step {step}, but that row has no image"
            )
