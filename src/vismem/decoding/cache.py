"""Where the keys and values of rows in the making lie, and how the base reads on from them.

`Aligned` is transformers' dynamic cache: all rows end in one column and stay until the last is done, as in the base's
own `generate`, whose numbers it gives bit for bit. `Slots` are buffers laid out once, a slot for each row, every row at
its own length: rows come and go, nothing grows, nothing moves, and one step is one graph that can be compiled.
"""

from __future__ import annotations

import weakref
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from vismem.backbones import Backbone

BLOCK = 64  # columns that slots grow by; compiled ones by four, since each new number of columns is compiled anew
AHEAD = {"cuda"}  # devices that work on while the host looks at a token: its reading is begun before


class Aligned:
    """A dynamic cache [B, heads, columns, head_dim]: every reading adds the same number of columns to all rows.

    Args:
        cache, mask, position: what reading the prompts left: the cache, the mask [B, L] over its columns or None, and
            the last position ids [..., B, 1].
    """

    ahead = False  # a forward cannot be taken back for one row alone

    def __init__(self, cache: DynamicCache, mask: Tensor | None, position: Tensor) -> None:
        self.cache, self.mask, self.position = cache, mask, position

    @classmethod
    def of(cls, cache: DynamicCache, mask: Tensor | None, position: Tensor, sources: list[int]) -> Aligned:
        """The cache of rows of which each continues the prompt that `sources` names."""
        if sources == list(range(position.shape[-2])):
            return cls(cache, mask, position)
        index = torch.tensor(sources, device=position.device)
        cache.batch_select_indices(index)
        return cls(cache, None if mask is None else mask[index], position.index_select(-2, index))

    def read(self, backbone: Backbone, inputs: Tensor, rows: list[int]) -> Tensor:
        """Reads `inputs` [B, w, d] after all rows and returns the states [B, d] at their end."""
        width = inputs.shape[1]
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), width)], dim=1)
        positions = self.position + torch.arange(1, width + 1, device=self.position.device)
        self.position = positions[..., -1:]
        return backbone.read(
            inputs_embeds=inputs,
            attention_mask=self.mask,
            position_ids=positions,
            cache=self.cache,
            use_cache=True,
        )[:, -1]


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values [slots, heads, columns, head_dim], written at every row's own columns."""

    is_compileable = True

    def __init__(self, slots: Slots, is_sliding: bool) -> None:
        super().__init__()
        self.slots, self.is_sliding = slots, is_sliding

    @torch.inference_mode(False)  # slots outlive the call that they are made in
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, _, size = states.shape
            shape = (self.slots.rows, heads, self.slots.columns, size)
            buffer = torch.zeros(shape, dtype=states.dtype, device=states.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(buffer)  # a graph may then write into it where it lies
            setattr(self, name, buffer)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        where, end = self.slots.where.to(key_states.device), self.slots.end
        begin = self.slots.begin if self.is_sliding else 0
        found = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            part = buffer[: len(states)]
            part.scatter_(2, where[:, None, :, None].expand_as(states), states)
            found.append(part[:, :, begin:end])
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.end, 0

    def get_seq_length(self) -> int:
        return self.slots.end

    def get_max_length(self) -> int:
        return self.slots.columns


class Slots:
    """Buffers for at most `rows` rows of at most `columns` columns.

    Uncompiled, the rows in use are the first `width` slots and readings take just the columns that are filled; a row
    that leaves has its place taken by the last one. Compiled, all slots and columns are read always, so that every
    step is the same graph, and a row that leaves only frees its slot.

    Args:
        config: the base's text config.
        rows, columns: how many slots, and how long; the columns grow by themselves where they do not suffice.
        compiled: how to compile a reading (`torch.compile`'s keywords), or None.
        device: where the base's first layer lies.

    Raises:
        ValueError: if the base has layers that slots cannot hold.
    """

    def __init__(
        self,
        config: Any,
        rows: int,
        columns: int,
        device: torch.device,
        compiled: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.rows, self.device, self.compiled = config, rows, device, compiled
        self.block = BLOCK if compiled is None else 4 * BLOCK
        self.columns = -(-columns // self.block) * self.block
        self.ahead = device.type in AHEAD
        self.lengths = [0] * rows  # columns that each slot has filled
        self.taken: list[bool] = [False] * rows
        self.window = getattr(config, "sliding_window", None)
        plain = "full_attention" if self.window is None else "sliding_attention"
        types = getattr(config, "layer_types", None) or [plain] * config.num_hidden_layers
        self.types = set(types)
        if unknown := sorted(self.types - {"full_attention", "sliding_attention"}):
            raise ValueError(
                f"slots hold full and sliding attention, and this base has layers of type {unknown[0]!r}: leave out "
                "cache_implementation='static', or decode by `generate` instead of a queue"
            )
        self.cache = Cache(layers=[SlotLayer(self, kind == "sliding_attention") for kind in types])
        self.offset: Tensor | None = None  # [..., rows, 1]: position ids less columns
        self.where: Tensor | None = None  # [n, w]: the columns of the reading under way
        self.user: weakref.ref[Any] | None = None  # the decoder whose rows lie here
        self.begin = self.end = 0  # columns that are read: up to `end`, and in sliding layers from `begin` on
        self.widest = 0  # columns that the widest reading so far wrote, also into slots without a row
        self._step = self._read
        if compiled is not None:
            # A function of its own: what torch compiled for other slots counts against its limit for a function.
            own = FunctionType(Slots._read.__code__.replace(), globals())
            self._step = torch.compile(MethodType(own, self), **compiled)

    @property
    def width(self) -> int:
        """How many slots a reading takes."""
        return self.rows if self.compiled is not None else sum(self.taken)

    @property
    def in_use(self) -> bool:
        """Whether another decoder may still go on with what lies here."""
        return self.user is not None and self.user() is not None

    def clear(self) -> None:
        """Lets all rows leave."""
        for slot, taken in enumerate(self.taken):
            if taken:
                self.wipe(slot, self.lengths[slot] + 1)
        self.lengths, self.taken, self.offset = [0] * self.rows, [False] * self.rows, None

    def wipe(self, slot: int, columns: int) -> None:
        """Zeros the first columns of a slot.

        Masking does not hide what a row left behind: a NaN or an infinity there times an attention weight of 0 is NaN.
        """
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keys[slot, :, :columns] = 0
                layer.values[slot, :, :columns] = 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def place(self, cache: DynamicCache, mask: Tensor | None, position: Tensor, sources: list[int]) -> list[int]:
        """Gives every row of `sources`, which names its prompt, a slot with that prompt's columns, padding left out.

        Args:
            cache, mask, position: what reading the prompts left; see `Aligned`.
            sources: one for each new row.

        Returns:
            The slots.
        """
        slots = [slot for slot, taken in enumerate(self.taken) if not taken][: len(sources)]
        columns = cache.layers[0].get_seq_length()
        real = torch.ones(position.shape[-2], columns, dtype=torch.bool) if mask is None else mask.bool().cpu()
        lengths = real.sum(1).tolist()
        self.reserve(max(lengths) + 1)
        if self.offset is None:
            shape = (*position.shape[:-2], self.rows, 1)
            self.offset = torch.zeros(shape, dtype=position.dtype, device=position.device)
        # After its prompt a row counts on by one for each column, so the difference stays what it is here.
        offset = position - (torch.tensor(lengths, device=position.device)[:, None] - 1)
        self.offset[..., slots, :] = offset[..., sources, :]
        if self.compiled is not None:  # free slots are read along
            for slot in slots:
                self.wipe(slot, self.widest)
        for layer, read in zip(self.cache.layers, cache.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(read.keys, read.values)
            for slot, source in zip(slots, sources, strict=True):
                kept = real[source, -read.keys.shape[2] :].to(read.keys.device)  # a sliding layer keeps the last ones
                start, stop = lengths[source] - int(kept.sum()), lengths[source]
                layer.keys[slot, :, start:stop] = read.keys[source][:, kept]
                layer.values[slot, :, start:stop] = read.values[source][:, kept]
        for slot, source in zip(slots, sources, strict=True):
            self.taken[slot], self.lengths[slot] = True, lengths[source]
        return slots

    def read(self, backbone: Backbone, inputs: Tensor, rows: list[int]) -> Tensor:
        """Reads `inputs` [width, w, d] after the slots in `rows` and returns the states [width, d] at their end."""
        width = inputs.shape[1]
        self.widest = max(self.widest, width)
        self.reserve(max(self.lengths) + width)
        lengths = self.lengths[: self.width]
        self.begin, self.end = 0, self.columns
        if self.compiled is None:
            self.begin, self.end = max(min(lengths) + 1 - (self.window or 2**31), 0), max(lengths) + width
        self.where = on_device(lengths, self.device)[:, None] + torch.arange(width, device=self.device)
        for slot in rows:
            self.lengths[slot] += width
        if self.compiled is None or width > 1:
            return self._read(backbone, inputs)
        torch.compiler.cudagraph_mark_step_begin()
        return self._step(backbone, inputs).clone()  # the next replay of the graph writes over it

    def _read(self, backbone: Backbone, inputs: Tensor) -> Tensor:
        offset = self.offset[..., : len(inputs), :]
        return backbone.read(
            inputs_embeds=inputs,
            attention_mask=self.masks(self.where),
            position_ids=offset + self.where.to(offset.device),
            cache=self.cache,
            use_cache=True,
        )[:, -1]

    def masks(self, where: Tensor) -> Tensor | dict[str, Tensor]:
        """Which columns each position sees: bool [n, 1, w, end], for each type of layer where there are several."""
        columns, now = torch.arange(self.end, device=where.device), where[:, None, :, None]
        masks = {"full_attention": columns <= now}
        if "sliding_attention" in self.types:
            near = masks["full_attention"] & (columns > now - self.window)
            masks["sliding_attention"] = near[..., self.begin :]
        if self.config._attn_implementation == "eager":
            least = torch.finfo(self.cache.layers[0].keys.dtype).min
            masks = {kind: torch.where(mask, 0.0, least) for kind, mask in masks.items()}
        return {kind: masks[kind] for kind in self.types} if len(self.types) > 1 else masks[next(iter(self.types))]

    def retract(self, slot: int) -> None:
        """Takes the last column of a row back; what stands in it is written over."""
        self.lengths[slot] -= 1

    def drop(self, slots: list[int]) -> list[int]:
        """Lets rows leave, with their keys and values.

        Returns:
            For each slot of the next reading, the slot whose row now lies there.
        """
        order = list(range(self.width))
        for slot in sorted(slots, reverse=True):
            self.wipe(slot, self.lengths[slot] + 1)  # one more, as the last column may have been taken back
            if self.compiled is None:
                last, length = len(order) - 1, self.lengths[len(order) - 1]
                if slot != last:
                    for layer in self.cache.layers:
                        layer.keys[slot, :, :length] = layer.keys[last, :, :length]
                        layer.values[slot, :, :length] = layer.values[last, :, :length]
                    self.wipe(last, length + 1)
                    self.offset[..., slot, :] = self.offset[..., last, :]
                    self.lengths[slot], order[slot] = length, order[last]
                order.pop()
                slot = last
            self.taken[slot], self.lengths[slot] = False, 0
        return order

    @torch.inference_mode(False)
    @torch.no_grad()
    def reserve(self, columns: int) -> None:
        """Grows the buffers where rows are to be longer than what was laid out."""
        if columns <= self.columns:
            return
        more = -(-(columns - self.columns) // self.block) * self.block
        for layer in self.cache.layers:
            if layer.is_initialized:
                for name in ("keys", "values"):
                    grown = torch.nn.functional.pad(getattr(layer, name), (0, 0, 0, more))
                    torch._dynamo.mark_static_address(grown)
                    setattr(layer, name, grown)
        self.columns += more


def on_device(values: list[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Plain numbers as a tensor there, sent without waiting for what the device is doing."""
    found = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return found.to(device)
    return found.pin_memory().to(device, non_blocking=True)
