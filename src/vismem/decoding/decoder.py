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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vismem.backbones import Backbone, Image
from vismem.backbones.base import CACHE_NAMES
from vismem.config import KINDS, Kind, VisMemConfig
from vismem.decoding.cache import Aligned, Slots, on_device
from vismem.decoding.policies import Opening, Policy
from vismem.decoding.rng import Draws
from vismem.decoding.row import Row, Settings, Sight
from vismem.decoding.sampling import BROKEN, Drawing, look
from vismem.decoding.trace import Invocation
from vismem.memory import Memory, Observation, SoftMemory
from vismem.tokens import MemoryTokens


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


class Decoder(Drawing):
    """Rows in the making, and the step that writes each one's next token.

    Args:
        backbone, tokens, memory, config: of the model that has the memory.
        slots: where keys and values lie; without it the first prompts' own cache is gone on with (`Aligned`).
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: MemoryTokens,
        memory: Memory | SoftMemory,
        config: VisMemConfig,
        slots: Slots | None = None,
    ) -> None:
        super().__init__(backbone, tokens, config, slots)
        self.memory = memory
        if slots is not None:
            slots.user = weakref.ref(self)

    # Rows enter.

    def read_prompts(self, base: Any, input_ids: Tensor, kwargs: dict[str, Any], images: list[list[Image]]) -> Prompts:
        """Reads a batch of prompts as transformers prepared it."""
        features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        inputs = base.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        inputs.pop("logits_to_keep", None)
        inputs["use_cache"] = True
        found = [inputs.pop(name, None) for name in CACHE_NAMES]
        cache = next((each for each in found if each is not None), None)
        if cache is None:
            cache = DynamicCache(config=base.config.get_text_config())
        if self.tokens.present(input_ids):  # memory tokens of earlier turns: rows that the base's table lacks
            inputs["inputs_embeds"], inputs["input_ids"] = self.tokens.embed(inputs["input_ids"]), None
        visual = self.backbone.visual_states(input_ids == self.backbone.image_token_id, features)
        hidden = self.backbone.read(cache=cache, **inputs)[:, -1]
        position = inputs.get("position_ids")
        if position is None:
            position = torch.full((len(input_ids), 1), input_ids.shape[1] - 1, device=input_ids.device)
        sights = [Sight(v, i) for v, i in zip(visual, images, strict=True)]
        return Prompts(input_ids, cache, inputs.get("attention_mask"), position[..., -1:], hidden, sights)

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
            The rows that ended in this step; those that failed have an `error`.
        """
        ready = [row for row in self.rows if row.queue is None]
        invoking = self.inject(ready)
        put_in = {id(row) for row, _ in invoking}
        drawing = [row for row in ready if id(row) not in put_in]
        drawn = self.draw(drawing) if drawing else []
        sampled, fed = look(self.next.masked_fill(self.broken, BROKEN)) if drawn else list, None
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
        origin = (row.tag, len(row.invocations) - 1)
        return Observation(row.sight.visual, states, segment, row.sight.patches or [], origin)

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


def widened(known: Tensor | None, width: int, lines: list[int], values: Tensor) -> Tensor:
    """A table of `width` lines: those known so far, and `values` in `lines`; shorter lines are filled up with zeros."""
    shape = list(values.shape)
    shape[0] = width
    if values.dim() > 1 and known is not None:
        shape[1] = max(values.shape[1], known.shape[1])
    found = values.new_zeros(shape)
    if known is not None:
        there: tuple[Any, ...] = (slice(len(known)), *map(slice, known.shape[1:]))
        found[there] = known
    new: tuple[Any, ...] = (lines, *map(slice, values.shape[1:]))
    found[new] = values
    return found


def check_schedule(policy: Policy, rows: list[Row]) -> None:
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
