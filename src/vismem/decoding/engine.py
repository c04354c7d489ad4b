"""The decoder: a queue of pending input vectors per row, fed to the base in step.

Each forward feeds `w = min over unfinished rows of len(queue)` positions of every row; a row whose queue ran empty
samples its next token. An invocation puts `[invocation, m_1..m_N, end]` into its row's queue, so one row alone reads
a memory in one forward, and in a batch some rows read memory while others write, with no padding and no holes in the
cache. Runs inside the base's own `generate`, which prepares processors, criteria, positions and cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMode, MaxLengthCriteria

from vismem.backbones import Image, Patches
from vismem.config import KINDS, Kind, VisMemConfig
from vismem.decoding.chance import RowDraws
from vismem.decoding.invocation import Opening, Policy
from vismem.decoding.trace import Invocation, Rollout, VisMemOutput
from vismem.memory import Memory, Observation
from vismem.tokens import MemoryTokens


@dataclass
class Sight:
    """What one prompt shows: its images, encoded for the short former when first looked at, and shared by copies."""

    visual: Tensor
    images: list[Image]
    patches: list[Patches] | None = None


@dataclass
class Row:
    """One answer in the making.

    Args:
        index: its row in the output.
        sight: what its prompt shows.
        delimiters: ids after which a phrase ends.
        tokens: the new tokens, sampled or put in.
        queue: vectors [n, d] still to be fed, or None where only the last sampled token is.
        steps: for each token of the current segment, the forward whose hidden state produced it.
        segment: where in `tokens` the current segment starts.
        sampled, gap: tokens sampled in all, and since the last invocation.
        chosen: for each new token whether it was sampled (True) or put in.
        open: for each new token which kinds the row might have invoked instead, in the order of `KINDS`.
        log_probs: for each new token the log-probability that it was drawn with; 0 where it was put in.
    """

    index: int
    sight: Sight
    delimiters: object
    tokens: list[int] = field(default_factory=list)
    invocations: list[Invocation] = field(default_factory=list)
    queue: Tensor | None = None
    steps: list[int] = field(default_factory=list)
    segment: int = 0
    sampled: int = 0
    gap: int = 0
    done: bool = False
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    open: list[list[bool]] = field(default_factory=list)
    log_probs: list[Tensor | None] = field(default_factory=list)

    @property
    def sighted(self) -> bool:
        return bool(self.sight.images)

    @property
    def at_delimiter(self) -> bool:
        return not self.tokens or self.tokens[-1] in self.delimiters()

    def may_invoke(self, config: VisMemConfig, budget: int) -> bool:
        """Whether the guards allow an invocation here; the last token of the budget could not make use of one."""
        rested = not self.invocations or self.gap >= config.min_gap
        return rested and len(self.invocations) < config.max_invocations and self.sampled + 1 < budget


class Decoder:
    """Decodes one batch; made anew for every `generate`, and handed to the base as its decoding method.

    Args:
        backbone, tokens, memory, config: of the model that has the memory.
        delimiters: a function that gives the delimiter ids; called only where a policy needs them.
        policy: who decides on invocations.
        images: each prompt's images.
        copies: answers per prompt (`num_return_sequences`); the prompt is read once and its cache expanded.
        streamer: as in transformers' `generate`.
        chance: where sampling draws from: a generator, one seed for each row, or None for torch's global generator.
        record: keep what training needs of a rollout - see `VisMemOutput` - and the observed states.
    """

    def __init__(
        self,
        backbone,
        tokens: MemoryTokens,
        memory: Memory,
        config: VisMemConfig,
        delimiters,
        policy: Policy,
        images: list[list[Image]],
        copies: int = 1,
        streamer=None,
        chance: torch.Generator | list[int] | None = None,
        record: bool = False,
    ) -> None:
        self.backbone, self.tokens, self.memory, self.config = backbone, tokens, memory, config
        self.delimiters, self.policy, self.images = delimiters, policy, images
        self.copies, self.streamer, self.chance, self.recording = copies, streamer, chance, record
        self.hidden: list[Tensor] = []  # the state [B, d] that each sampling step drew from

    def __call__(
        self,
        base,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs,
    ) -> VisMemOutput | Tensor:
        """The decoding method in the sense of transformers' `generate(custom_generate=...)`."""
        refuse_unsupported(generation_config, model_kwargs)
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        self.budget = min(limits, default=2**31) - input_ids.shape[1]
        self.criteria = StoppingCriteriaList(c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria))
        self.processors, self.settings = logits_processor, generation_config
        self.keep = generation_config.return_dict_in_generate
        self.policy.start()

        openings = getattr(self.policy, "openings", ())
        hidden = self.prefill(base, input_ids, model_kwargs, [o.prompt for o in openings])
        self.check_schedule()
        if openings:
            self.resume(openings)
            hidden = self.feed(base)
        while True:
            self.step(hidden)
            if all(row.done for row in self.rows):
                break
            hidden = self.feed(base)
        if self.streamer is not None:
            self.streamer.end()
        return self.output()

    # Reading the prompt and feeding the queues.

    def prefill(self, base, input_ids: Tensor, kwargs: dict, sources: list[int]) -> Tensor:
        """Reads the prompts once, makes the rows, and returns the last state [B, d] of each.

        `sources` names each row's prompt; without it every prompt has `copies` rows.
        """
        features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        inputs = base.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
        inputs.pop("logits_to_keep", None)
        inputs["use_cache"] = True
        if inputs.get("past_key_values") is None:
            inputs["past_key_values"] = DynamicCache(config=base.config.get_text_config())
        if self.tokens.present(input_ids):  # memory tokens of earlier turns: rows that the base's table lacks
            inputs["inputs_embeds"], inputs["input_ids"] = self.tokens.embed(inputs["input_ids"]), None
        visual = self.backbone.visual_states(input_ids == self.backbone.image_token_id, features)
        hidden = base.model(**inputs).last_hidden_state[:, -1]

        self.cache, self.mask = inputs["past_key_values"], inputs.get("attention_mask")
        sources = sources or [prompt for prompt in range(len(input_ids)) for _ in range(self.copies)]
        self.position = inputs["position_ids"][..., -1:] if inputs.get("position_ids") is not None else None
        if self.position is None:
            self.position = torch.full((len(input_ids), 1), input_ids.shape[1] - 1, device=input_ids.device)
        sights = [Sight(v, i) for v, i in zip(visual, self.images, strict=True)]
        if sources != list(range(len(input_ids))):
            index = torch.tensor(sources, device=input_ids.device)
            self.cache.batch_select_indices(index)
            input_ids, hidden = input_ids[index], hidden[index]
            self.position = self.position.index_select(-2, index)
            self.mask = None if self.mask is None else self.mask[index]
        self.rows = [Row(i, sights[prompt], self.delimiters) for i, prompt in enumerate(sources)]
        self.draws = RowDraws(self.chance, len(sources), input_ids.device) if isinstance(self.chance, list) else None
        pad = self.settings._pad_token_tensor
        self.pad = 0 if pad is None else int(pad.flatten()[0])
        self.ids, self.start = input_ids, input_ids.shape[1]  # [B, prompt + new], left-aligned new tokens
        self.next = input_ids.new_full((len(input_ids),), self.pad)
        return hidden

    def feed(self, base) -> Tensor:
        """Feeds w positions of every row and returns the states [B, d] after them."""
        open_rows = [row for row in self.rows if not row.done]
        width = min(1 if row.queue is None else len(row.queue) for row in open_rows)
        inputs = self.backbone.embeddings(self.next)[:, None]  # [B, 1, d]
        if any(row.queue is not None for row in open_rows):
            inputs = inputs.repeat(1, width, 1)
            for row in open_rows:
                if row.queue is not None:
                    inputs[row.index] = row.queue[:width]
                    row.queue = row.queue[width:] if len(row.queue) > width else None
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), width)], dim=1)
        steps = torch.arange(1, width + 1, device=self.position.device)
        positions = self.position + steps
        self.position = positions[..., -1:]
        outputs = base.model(
            inputs_embeds=inputs,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return outputs.last_hidden_state[:, -1]

    def resume(self, openings: list[Opening]) -> None:
        """Lets every row start with words already written and an invocation after them, all waiting in its queue."""
        for row, opening in zip(self.rows, openings, strict=True):
            for token in opening.tokens:
                self.append(row, token)
            row.sampled = len(opening.tokens)
        for kind in KINDS:
            rows = [(row, opening) for row, opening in zip(self.rows, openings, strict=True) if opening.kind == kind]
            for row, _ in rows:
                self.append(row, self.tokens.invocation_ids[kind])
                self.open(row, kind, forced=False)
                row.sampled += 1
            if rows:
                self.remember(kind, [row for row, _ in rows], [opening.states for _, opening in rows])
            for row, opening in rows:
                if opening.tokens:
                    words = torch.tensor(opening.tokens, device=self.ids.device)
                    row.queue = torch.cat([self.tokens.embed(words), row.queue])

    # One step: put in, sample, form.

    def step(self, hidden: Tensor) -> None:
        """Lets every row whose queue is empty invoke or sample, forms the memories and refills the queues."""
        ready = [row for row in self.rows if not row.done and row.queue is None]
        if self.policy.samples or self.policy.injects:
            self.hidden.append(hidden)
        invoking: list[tuple[Row, Kind]] = []
        if self.policy.injects:
            for row in ready:
                if self.policy.guarded and not row.may_invoke(self.config, self.budget):
                    continue
                kind = self.policy.inject(row)
                if kind is not None:
                    self.append(row, self.tokens.invocation_ids[kind])
                    self.open(row, kind, forced=True)
                    invoking.append((row, kind))
        put_in = {row.index for row, _ in invoking}
        chosen = [row for row in ready if row.index not in put_in]
        if chosen:
            invoking += self.sample(chosen, hidden)
        for kind in KINDS:
            rows = [row for row, wanted in invoking if wanted == kind]
            if rows:
                self.remember(kind, rows)

    def sample(self, rows: list[Row], hidden: Tensor) -> list[tuple[Row, Kind]]:
        """Draws a token for each of `rows` and returns those that drew an invocation, with its kind."""
        raw = self.backbone.head(hidden)
        learned = self.policy.samples
        if learned:
            raw = self.tokens.extend(raw, hidden)
        raw = raw.to(dtype=torch.float32, device=self.ids.device, copy=True)
        logits, allowed = raw, [[False, False]] * len(self.rows)
        if learned:
            allowed = self.allowed(rows)
            logits = self.tokens.forbid(raw, torch.tensor(allowed, device=raw.device))
        elif self.policy.injects:
            # Processors look tokens up by id, so the width must hold ours; drawn from is the base's width alone.
            wide = torch.nn.functional.pad(raw, (0, self.tokens.vocabulary - raw.shape[-1]), value=float("-inf"))
            logits = self.tokens.forbid(wide, torch.zeros(len(raw), 2, dtype=torch.bool, device=raw.device))
        lengths = {self.start + len(row.tokens) for row in rows}
        if len(lengths) == 1:
            scores = self.processors(self.ids[:, : lengths.pop()], logits)
        else:  # each row is processed at its own length, as if it were alone
            scores = logits.clone()
            for length in lengths:
                index = [row.index for row in rows if self.start + len(row.tokens) == length]
                scores[index] = self.processors(self.ids[:, :length], logits.clone())[index]
        drawn = scores if learned else scores[:, : raw.shape[-1]]
        if not self.settings.do_sample:
            self.next = drawn.argmax(-1)
        elif self.draws is not None:
            self.next = self.draws.sample(torch.softmax(drawn, dim=-1), [row.index for row in rows])
        else:
            self.next = torch.multinomial(torch.softmax(drawn, dim=-1), 1, generator=self.chance).squeeze(1)
        log_probs = None
        if self.recording:
            log_probs = drawn.gather(1, self.next[:, None]).squeeze(1) - drawn.logsumexp(-1)
        values = self.next.tolist()
        invoking = []
        for row in rows:
            token = values[row.index]
            row.sampled += 1
            row.gap += 1
            if self.keep:
                self.record(row, raw[row.index], scores[row.index])
            kind = self.tokens.kind_of.get(token) if learned else None
            if kind is not None and getattr(self.policy, "swaps", False):
                kind = KINDS[1 - KINDS.index(kind)]
                token = self.tokens.invocation_ids[kind]
            self.append(row, token, None if log_probs is None else log_probs[row.index], allowed[row.index])
            if kind is not None:
                self.open(row, kind, forced=False)
                invoking.append((row, kind))
                self.next[row.index] = self.pad  # its vector comes from the queue; the base's table has no such row
        self.stop(rows, {row.index for row, _ in invoking}, scores)
        return invoking

    def allowed(self, rows: list[Row]) -> list[list[bool]]:
        """B pairs: which kinds' invocation tokens each row may sample, under the guards."""
        table = [[False, False] for _ in self.rows]
        for row in rows:
            if row.may_invoke(self.config, self.budget):
                table[row.index] = [row.sighted, True]
        return table

    def append(
        self, row: Row, token: int, log_prob: Tensor | None = None, allowed: tuple[bool, bool] = (False, False)
    ) -> None:
        """Writes a token into the row's answer and into `ids`, where the next length is the widest so far.

        `log_prob` and `allowed` are what a sampled token was drawn with; one that was put in has none.
        """
        place = self.start + len(row.tokens)
        if place >= self.ids.shape[1]:
            grown = self.ids.new_full((len(self.ids), max(place + 1 - self.ids.shape[1], 64)), self.pad)
            self.ids = torch.cat([self.ids, grown], dim=1)
        self.ids[row.index, place] = token
        row.tokens.append(token)
        row.steps.append(len(self.hidden) - 1)
        if self.recording:
            row.chosen.append(log_prob is not None)
            row.open.append(list(allowed))
            row.log_probs.append(log_prob)
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))

    def open(self, row: Row, kind: Kind, forced: bool) -> None:
        """Notes an invocation whose token was just appended; its length is filled in when memory is formed."""
        if self.keep and forced:
            self.record(row, None, None, certain=self.tokens.invocation_ids[kind])
        row.invocations.append(Invocation(kind, len(row.tokens) - 1, 0, forced))
        row.gap = 0

    def stop(self, rows: list[Row], invoking: set[int], scores: Tensor) -> None:
        """Marks rows that are done, by the budget of sampled tokens or by the stopping criteria."""
        for length in {self.start + len(row.tokens) for row in rows}:
            group = [row for row in rows if self.start + len(row.tokens) == length]
            verdict = self.criteria(self.ids[:, :length], scores).tolist() if self.criteria else None
            for row in group:
                ended = verdict is not None and verdict[row.index] and row.index not in invoking
                row.done = ended or row.sampled >= self.budget
        if any(row.done for row in rows):
            for row in rows:
                if row.done:
                    self.next[row.index] = self.pad

    def remember(self, kind: Kind, rows: list[Row], states: list[Tensor] | None = None) -> None:
        """Forms one memory for each row and queues `[invocation, memory, end]`; the end token joins the answer.

        `states` are the rows' observed states where they are known from another decode.
        """
        formed: Tensor | list[None] = [None] * len(rows)
        if kind in self.policy.forms:
            given = states or [None] * len(rows)
            seen = [self.observe(row, kind, state) for row, state in zip(rows, given, strict=True)]
            formed = self.memory.form(kind, seen)
            if self.recording:
                for row, observation in zip(rows, seen, strict=True):
                    row.invocations[-1].states = observation.states
        first, last = self.tokens.row(kind, "invocation")[None], self.tokens.row(kind, "end")[None]
        for row, memory in zip(rows, formed, strict=True):
            slots = [] if memory is None else [memory.to(first)]
            row.queue = torch.cat([first, *slots, last])
            row.invocations[-1].length = 0 if memory is None else len(memory)
            row.invocations[-1].memory = memory
            self.append(row, self.tokens.end_ids[kind])
            if self.keep:
                self.record(row, None, None, certain=self.tokens.end_ids[kind])
            row.segment, row.steps = len(row.tokens), []

    def observe(self, row: Row, kind: Kind, states: Tensor | None) -> Observation:
        """What the row has in mind: its visual states, and the segment that the invocation token ends."""
        if kind == "short" and row.sight.patches is None:
            row.sight.patches = self.memory.short.encode(row.sight.images)
        if states is None:
            states = torch.stack([self.hidden[step][row.index] for step in row.steps])
        segment = self.tokens.embed(torch.tensor(row.tokens[row.segment :], device=self.ids.device))
        return Observation(row.sight.visual, states, segment, row.sight.patches or [])

    # What comes out.

    def check_schedule(self) -> None:
        """Refuses a schedule that names a row that is not there, or asks a blind row to look."""
        for index, step, kind in getattr(self.policy, "schedule", ()):
            if index >= len(self.rows):
                raise ValueError(f"Forced names row {index}, but the batch has {len(self.rows)} (rows count from 0)")
            if kind == "short" and not self.rows[index].sighted:
                raise ValueError(
                    f"Forced asks for short-term memory in row {index} at step {step}, but that row has no image"
                )

    def record(self, row: Row, logits: Tensor | None, scores: Tensor | None, certain: int | None = None) -> None:
        """Keeps what the next position's token was drawn from; `certain` for a token that was put in."""
        if certain is not None:
            width = self.tokens.vocabulary
            logits = scores = torch.full((width,), float("-inf"), device=self.ids.device)
            logits[certain] = 0.0
        if self.settings.output_scores:
            row.scores.append(scores)
        if self.settings.output_logits:
            row.logits.append(logits)

    def output(self) -> VisMemOutput | Tensor:
        sequences = self.ids[:, : self.start + max(len(row.tokens) for row in self.rows)]
        if not self.keep:
            return sequences

        def columns(name: str) -> tuple[Tensor, ...] | None:
            if not getattr(self.settings, f"output_{name}"):
                return None
            rows = [getattr(row, name) for row in self.rows]
            width = max(len(entry) for row in rows for entry in row)
            blank = torch.full((width,), float("-inf"), device=self.ids.device)
            blank[self.pad] = 0.0

            def at(row: list[Tensor], place: int) -> Tensor:
                if place >= len(row):
                    return blank
                return torch.nn.functional.pad(row[place], (0, width - len(row[place])), value=float("-inf"))

            longest = max(len(row) for row in rows)
            return tuple(torch.stack([at(row, place) for row in rows]) for place in range(longest))

        return VisMemOutput(
            sequences=sequences,
            scores=columns("scores"),
            logits=columns("logits"),
            invocations=[row.invocations for row in self.rows],
            rollout=[self.recorded(row) for row in self.rows] if self.recording else None,
        )

    def recorded(self, row: Row) -> Rollout:
        """What training needs of a row."""
        none = torch.zeros((), device=self.ids.device)
        return Rollout(
            tokens=torch.tensor(row.tokens),
            sampled=torch.tensor(row.chosen),
            allowed=torch.tensor(row.open),
            log_probs=torch.stack([none if value is None else value for value in row.log_probs]).float().cpu(),
            invocations=row.invocations,
        )


def refuse_unsupported(config: GenerationConfig, kwargs: dict) -> None:
    """Refuses, in one line, what this decoder cannot honour."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"memory decodes greedily or by sampling, not by {mode.value}; set num_beams=1")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(f"{name}=True is not supported by memory decoding; output_scores and output_logits are")
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("a filled past_key_values cannot be continued: memory slots in it have no token ids")
