"""The decoder: a queue of pending input vectors per row, fed to the base in step.

Each forward feeds `w = min over unfinished rows of len(queue)` positions of every row; a row whose queue is empty
samples its next token. An invocation puts `[invocation, m_1..m_N, end]` into its row's queue, so one row alone reads
a memory in one forward, and in a batch some rows read memory while others write, with no padding and no holes in the
cache. Rows may enter and leave between steps if the cache lets them (`cache.py`).

On a GPU, with slots, the next forward starts before the host has seen the token that it reads; if that token invokes
memory, the row's last column is taken back. So while rows write words the device never waits for the host.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vismem.backbones import Backbone
from vismem.backbones.base import CACHE_NAMES
from vismem.config import KINDS, Kind, VisMemConfig
from vismem.decoding.batch import Batch
from vismem.decoding.cache import Aligned, Slots
from vismem.decoding.policies import Counterfactual, Opening, check_rows
from vismem.decoding.prepare import Prepared
from vismem.decoding.rng import RowRng
from vismem.decoding.row import DecodingSettings, PromptImages, Row
from vismem.decoding.sampling import Sampler
from vismem.decoding.trace import Invocation
from vismem.memory import Memory, Observation, SoftMemory
from vismem.memory.choice import sampled_blocks
from vismem.tokens import MemoryTokens


@dataclass
class Prompts:
    """Prompts that were read, each once.

    Args:
        ids: [B, L].
        cache, mask, position: what reading left; see `cache.Aligned`.
        hidden: the last states [B, d].
        images: of each prompt.
    """

    ids: Tensor
    cache: DynamicCache
    mask: Tensor | None
    position: Tensor
    hidden: Tensor
    images: list[PromptImages]


class Decoder:
    """Writes rows: reads their prompts, then one token of every row per `step`.

    Args:
        backbone, tokens, memory, config: of the model.
        slots: where keys and values lie; without slots the rows of one call continue their prompts' own cache.

    Attributes:
        batch: the rows in progress.
        cache: their keys and values.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: MemoryTokens,
        memory: Memory | SoftMemory,
        config: VisMemConfig,
        slots: Slots | None = None,
    ) -> None:
        self.backbone, self.tokens, self.memory, self.config = backbone, tokens, memory, config
        self.cache: Aligned | Slots = Aligned() if slots is None else slots
        self.batch = Batch(keeps_finished=self.cache.keeps_finished)
        self.sampler = Sampler(backbone, tokens, config)
        if slots is not None:
            slots.user = weakref.ref(self)

    @property
    def rows(self) -> list[Row]:
        """The unfinished rows."""
        return self.batch.rows

    # Rows enter.

    def read_prompts(self, call: Prepared) -> Prompts:
        """Reads the prompts of a call in one forward."""
        base, ids, kwargs = self.backbone.base, call.input_ids, call.kwargs
        features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        inputs = base.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
        inputs.pop("logits_to_keep", None)
        inputs["use_cache"] = True
        given = [inputs.pop(name, None) for name in CACHE_NAMES]
        cache = next((each for each in given if each is not None), None)
        if cache is None:
            cache = DynamicCache(config=base.config.get_text_config())
        if self.tokens.present(ids):  # memory tokens of earlier turns: rows that the base's table lacks
            inputs["inputs_embeds"], inputs["input_ids"] = self.tokens.embed(inputs["input_ids"]), None
        visual = self.backbone.visual_states(ids == self.backbone.image_token_id, features)
        hidden = self.backbone.read(cache=cache, **inputs)[:, -1]
        position = inputs.get("position_ids")
        if position is None:
            position = torch.full((len(ids), 1), ids.shape[1] - 1, device=ids.device)
        images = [PromptImages(states, each) for states, each in zip(visual, call.images, strict=True)]
        return Prompts(ids, cache, inputs.get("attention_mask"), position[..., -1:], hidden, images)

    def enter(
        self, prompts: Prompts, settings: DecodingSettings, copies: int = 1, seeds: list[int] | None = None
    ) -> list[Row]:
        """Makes `copies` rows of every prompt, or one for each opening of a counterfactual.

        Raises:
            ValueError: if there are not as many seeds as rows, or the policy does not fit the rows.
        """
        settings.policy = copy.copy(settings.policy)  # the same object may decide for other rows right now
        settings.policy.start()
        openings = settings.policy.openings if isinstance(settings.policy, Counterfactual) else ()
        sources = [opening.prompt for opening in openings]
        sources = sources or [prompt for prompt in range(len(prompts.ids)) for _ in range(copies)]
        if seeds is not None and len(seeds) != len(sources):
            raise ValueError(
                f"seed has {len(seeds)} entries for {len(sources)} rows; give one seed for each output row"
            )
        rows = [
            Row(index, index, prompts.ids[source], settings, prompts.images[source])
            for index, source in enumerate(sources)
        ]
        for row, seed in zip(rows, seeds or (), strict=False):
            row.rng = RowRng(seed)
        check_rows(settings.policy, rows)
        slots = self.cache.place(prompts.cache, prompts.mask, prompts.position, sources)
        for row, slot in zip(rows, slots, strict=True):
            row.slot = slot
        self.batch.insert(rows, self.cache.width, prompts.hidden[sources], prompts.ids[sources])
        if openings:
            self._continue(rows, openings)
        return rows

    def _continue(self, rows: list[Row], openings: tuple[Opening, ...]) -> None:
        """Queues for each row the words of its opening and the invocation after them; nothing is decoded again."""
        for row, opening in zip(rows, openings, strict=True):
            for token in opening.tokens:
                self.batch.append(row, token)
            row.sampled = len(opening.tokens)
        for kind in KINDS:
            members = [(row, opening) for row, opening in zip(rows, openings, strict=True) if opening.kind == kind]
            for row, _ in members:
                self.batch.append(row, self.tokens.invocation_ids[kind])
                row.invocations.append(Invocation(kind, len(row.tokens) - 1, 0, forced=False))
                row.sampled, row.gap = row.sampled + 1, 0
            if members:
                self.remember(kind, [row for row, _ in members], [opening.states for _, opening in members])
            for row, opening in members:
                if opening.tokens and row.queue is not None:
                    words = torch.tensor(opening.tokens, device=self.batch.ids.device)
                    row.queue = torch.cat([self.tokens.embed(words), row.queue])

    # One step.

    def step(self) -> list[Row]:
        """Every row with an empty queue invokes or samples; memories are formed; the base is fed; ended rows leave.

        Returns:
            The rows that ended in this step; failed rows have an `error`.
        """
        ready = [row for row in self.rows if row.queue is None]
        invoking = self.inject(ready)
        injected = {id(row) for row, _ in invoking}
        sampling = [row for row in ready if id(row) not in injected]
        sampled, wait = self.sampler.sample(self.batch, sampling) if sampling else ([], list)
        ahead = None
        if self.cache.ahead and not invoking and any(row.sampled + 1 < row.settings.budget for row in sampling):
            ahead = self.feed()  # before the host has seen the tokens
        tokens = wait()
        for group in sampled:
            invoking += self.sampler.settle(self.batch, group, tokens)
        if ahead is not None:
            for row, _ in invoking:
                self.cache.retract(row.slot)
        for kind in KINDS:
            rows = [row for row, wanted in invoking if wanted == kind]
            if rows:
                self.remember(kind, rows)
        if ahead is not None:
            self.batch.hidden = ahead
        ended = [row for row in self.rows if row.done]
        if ended:
            self.leave(ended)
        if ahead is None and self.rows:
            self.batch.hidden = self.feed()
        return ended

    def inject(self, ready: list[Row]) -> list[tuple[Row, Kind]]:
        """Inserts the invocations that the rows' policies want here."""
        found = []
        for row in ready:
            policy = row.settings.policy
            if not policy.injects or (policy.guarded and not row.may_invoke(self.config)):
                continue
            kind = policy.inject(row)
            if kind is not None:
                self._insert(row, self.tokens.invocation_ids[kind])
                row.invocations.append(Invocation(kind, len(row.tokens) - 1, 0, forced=True))
                row.gap = 0
                found.append((row, kind))
        return found

    def feed(self) -> Tensor:
        """Feeds w positions of every unfinished row and returns the states [n, d] after them."""
        batch = self.batch
        queues = [(row, row.queue) for row in batch.rows if row.queue is not None]
        width = min(len(queue) for _, queue in queues) if len(queues) == len(batch.rows) else 1
        words = torch.where(batch.next_ids < self.tokens.base_vocabulary, batch.next_ids, 0)  # memory is in the queues
        inputs = self.backbone.embeddings(words)[:, None]  # [n, 1, d]
        if queues:
            inputs = inputs.repeat(1, width, 1)
            for row, queue in queues:
                inputs[row.slot] = queue[:width]
                row.queue = queue[width:] if len(queue) > width else None
        return self.cache.read(self.backbone, inputs, [row.slot for row in batch.rows])

    # Memory.

    def remember(self, kind: Kind, rows: list[Row], states: list[Tensor] | None = None) -> None:
        """Forms one memory per row and queues `[invocation, memory, end]`; the end token joins the answer (Eq. 5-6).

        Args:
            kind: of the memories.
            rows: the invoking rows.
            states: their observed states [z, d], if known from another decode.
        """
        forming = [at for at, row in enumerate(rows) if kind in row.settings.policy.forms]
        memories: list[Tensor | None] = [None] * len(rows)
        if forming:
            observed = [self.observe(rows[at], kind, None if states is None else states[at]) for at in forming]
            vectors, choices = self.memory.form(kind, observed)
            for at, seen, memory, choice in zip(forming, observed, vectors, choices, strict=True):
                memories[at] = memory
                rows[at].invocations[-1].choice = None if choice is None else choice.detach()
                if rows[at].settings.record:
                    rows[at].invocations[-1].states = seen.states
        first, last = self.tokens.row(kind, "invocation")[None], self.tokens.row(kind, "end")[None]
        for row, memory in zip(rows, memories, strict=True):
            row.queue = torch.cat([first, last] if memory is None else [first, memory.to(first), last])
            row.invocations[-1].length = 0 if memory is None else len(memory)
            row.invocations[-1].memory = memory
            self._insert(row, self.tokens.end_ids[kind])
            row.segment_start, row.states = len(row.tokens), []

    def observe(self, row: Row, kind: Kind, states: Tensor | None = None) -> Observation:
        """What the row's query is built from: its visual states, and the segment that the invocation token ends."""
        images = row.images
        assert images is not None  # the row is in the batch
        if kind == "short" and images.patches is None:
            images.patches = list(self.memory.short.encode(images.images))
        if states is None:
            states = torch.stack([hidden[slot] for hidden, slot in row.states])
        segment = self.tokens.embed(self.batch.ids[row.slot, len(row.prompt) + row.segment_start : row.length])
        number, sampler = len(row.invocations) - 1, None
        if row.settings.sample_blocks:
            generator = row.settings.generator if row.rng is None else row.rng.of_invocation(number)
            sampler = partial(sampled_blocks, generator=generator)
        return Observation(images.visual, states, segment, images.patches or [], (row.tag, number), sampler=sampler)

    def _insert(self, row: Row, token: int) -> None:
        self.batch.append(row, token)
        row.keep_certain(token, self.tokens.vocabulary)

    # Rows leave.

    def leave(self, rows: list[Row]) -> None:
        """Removes rows from the batch and the cache, finished or cancelled."""
        self.batch.remove(rows)
        self.batch.reorder(self.cache.drop([row.slot for row in rows]))
