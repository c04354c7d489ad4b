"""Keys and values of the rows in progress, and how the base continues from them.

`Aligned` is transformers' dynamic cache: all rows end in the same column and stay until the last is done, so its
numbers are those of the base's own `generate`, bit for bit. `Slots` are buffers allocated once, one slot per row, each
row at its own length: rows come and go, and one step is one graph that can be compiled.
"""

from __future__ import annotations

import weakref
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from vismem.backbones import Backbone

BLOCK = 64  # columns that slots grow by; compiled ones by four blocks, as each new size is compiled
AHEAD = {"cuda"}  # devices that run asynchronously: the next forward starts before the host has seen the token


class Aligned:
    """A dynamic cache [B, heads, columns, head_dim] for the rows of one call: all rows grow by the same columns."""

    keeps_finished = True  # a finished row keeps its line, as in transformers' own loop
    ahead = False  # a forward cannot be taken back for one row alone
    width = 0

    def place(self, cache: DynamicCache, mask: Tensor | None, position: Tensor, sources: list[int]) -> list[int]:
        """Takes over the cache of the prompts; arguments and result as in `Slots.place`."""
        self.cache, self.mask, self.position, self.width = cache, mask, position, len(sources)
        if sources != list(range(position.shape[-2])):
            index = torch.tensor(sources, device=position.device)
            cache.batch_select_indices(index)
            self.mask, self.position = None if mask is None else mask[index], position.index_select(-2, index)
        return list(range(len(sources)))

    def read(self, backbone: Backbone, inputs: Tensor, _slots: list[int]) -> Tensor:
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

    def retract(self, slot: int) -> None:
        """Never called, as `ahead` is False."""
        raise NotImplementedError("a dynamic cache cannot take a column back for one row")

    def drop(self, slots: list[int]) -> list[int]:
        """Keeps all rows in place; result as in `Slots.drop`."""
        del slots
        return list(range(self.width))


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values [slots, heads, columns, head_dim], written at every row's own columns."""

    is_compileable = True
    keys: Tensor
    values: Tensor

    def __init__(self, slots: Slots, *, is_sliding: bool) -> None:
        super().__init__()
        self.slots, self.is_sliding = slots, is_sliding

    @torch.inference_mode(False)  # slots outlive the call they are made in
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, _, size = states.shape
            shape = (self.slots.rows, heads, self.slots.columns, size)
            buffer = torch.zeros(shape, dtype=states.dtype, device=states.device)
            if not torch.compiler.is_compiling():
                # A graph may then write into it in place; torch 2.14 has no public name for this.
                torch._dynamo.mark_static_address(buffer)  # noqa: SLF001
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

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        return self.slots.end, 0

    def get_seq_length(self) -> int:
        return self.slots.end

    def get_max_length(self) -> int:
        return self.slots.columns


class Slots:
    """Buffers for at most `rows` rows of at most `columns` columns.

    Uncompiled, the rows in use are the first `width` slots, and a forward reads the filled columns only; the last row
    takes the slot of a row that leaves. Compiled, every forward reads all slots and columns, so that every step is the
    same graph, and a row that leaves only frees its slot.

    Args:
        config: the base's text config.
        rows, columns: number and length of the slots; they grow when a row needs more columns.
        compiled: keywords of `torch.compile`, or None.
        device: of the base's first layer.

    Raises:
        ValueError: if the base has layers that slots cannot hold.
    """

    keeps_finished = False  # rows leave as they finish

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
        self.lengths = [0] * rows  # filled columns of each slot
        self.taken: list[bool] = [False] * rows
        self.window: Any = getattr(config, "sliding_window", None)
        plain = "full_attention" if self.window is None else "sliding_attention"
        types = getattr(config, "layer_types", None) or [plain] * config.num_hidden_layers
        self.types = set(types)
        if unknown := sorted(self.types - {"full_attention", "sliding_attention"}):
            raise ValueError(
                f"slots hold full and sliding attention, and this base has layers of type {unknown[0]!r}: leave out "
                "cache_implementation='static', or decode with `generate` instead of a queue"
            )
        self.layers = [SlotLayer(self, is_sliding=kind == "sliding_attention") for kind in types]
        self.cache = Cache(layers=list(self.layers))
        self.offset = torch.zeros(0)  # once a row is placed [..., rows, 1]: position ids minus columns
        self.where = torch.zeros(0, 0, dtype=torch.long)  # [n, w]: the columns that the current forward writes
        self.user: weakref.ref[Any] | None = None  # the decoder whose rows these are
        self.begin = self.end = 0  # columns read: up to `end`, in sliding layers from `begin`
        self.widest = 0  # columns that the widest forward so far wrote, also into free slots
        self._step = self._read
        if compiled is not None:
            # A function of our own, as torch limits how often it compiles one function.
            own = FunctionType(Slots._read.__code__.replace(), globals())
            self._step = torch.compile(MethodType(own, self), **compiled)

    @property
    def width(self) -> int:
        """Number of slots that a forward reads."""
        return self.rows if self.compiled is not None else sum(self.taken)

    @property
    def in_use(self) -> bool:
        """Whether another decoder may still use these slots."""
        return self.user is not None and self.user() is not None

    def clear(self) -> None:
        """Removes all rows."""
        for slot, taken in enumerate(self.taken):
            if taken:
                self.wipe(slot, self.lengths[slot] + 1)
        self.lengths, self.taken, self.offset = [0] * self.rows, [False] * self.rows, torch.zeros(0)

    def wipe(self, slot: int, columns: int) -> None:
        """Zeros the first columns of a slot.

        Masking alone is not enough: NaN or infinity times an attention weight of 0 is NaN.
        """
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[slot, :, :columns] = 0
                layer.values[slot, :, :columns] = 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def place(self, cache: DynamicCache, mask: Tensor | None, position: Tensor, sources: list[int]) -> list[int]:
        """Gives each new row a slot, and copies its prompt's columns into it without padding.

        Args:
            cache, mask, position: what reading the prompts left; see `Aligned`.
            sources: for each new row, the index of its prompt.

        Returns:
            The slots.
        """
        slots = [slot for slot, taken in enumerate(self.taken) if not taken][: len(sources)]
        layers: list[Any] = list(cache.layers)
        columns = layers[0].get_seq_length()
        real = torch.ones(position.shape[-2], columns, dtype=torch.bool) if mask is None else mask.bool().cpu()
        lengths = real.sum(1).tolist()
        self.reserve(max(lengths) + 1)
        if not self.offset.numel():
            shape = (*position.shape[:-2], self.rows, 1)
            self.offset = torch.zeros(shape, dtype=position.dtype, device=position.device)
        # After the prompt, positions and columns both count by one, so their difference stays constant.
        offset = position - (torch.tensor(lengths, device=position.device)[:, None] - 1)
        self.offset[..., slots, :] = offset[..., sources, :]
        if self.compiled is not None:  # free slots are read too
            for slot in slots:
                self.wipe(slot, self.widest)
        for layer, read in zip(self.layers, layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(read.keys, read.values)
            for slot, source in zip(slots, sources, strict=True):
                kept = real[source, -read.keys.shape[2] :].to(
                    read.keys.device
                )  # a sliding layer keeps the last columns
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
        return self._step(backbone, inputs).clone()  # the next replay of the graph overwrites it

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
        """Which columns each position attends to: bool [n, 1, w, end]; by layer type if the base has several."""
        columns, now = torch.arange(self.end, device=where.device), where[:, None, :, None]
        masks = {"full_attention": columns <= now}
        if "sliding_attention" in self.types:
            near = masks["full_attention"] & (columns > now - self.window)
            masks["sliding_attention"] = near[..., self.begin :]
        if self.config._attn_implementation == "eager":  # noqa: SLF001  # no public name in transformers 5.23
            least = torch.finfo(self.layers[0].keys.dtype).min
            masks = {kind: torch.where(mask, 0.0, least) for kind, mask in masks.items()}
        return {kind: masks[kind] for kind in self.types} if len(self.types) > 1 else masks[next(iter(self.types))]

    def retract(self, slot: int) -> None:
        """Takes back the last column of a row; the next forward overwrites it."""
        self.lengths[slot] -= 1

    def drop(self, slots: list[int]) -> list[int]:
        """Removes rows with their keys and values.

        Returns:
            For each slot of the next forward, the slot its row was in before.
        """
        order = list(range(self.width))
        for slot in sorted(slots, reverse=True):
            self.wipe(slot, self.lengths[slot] + 1)  # plus one: the last column may have been taken back
            if self.compiled is None:
                last, length = len(order) - 1, self.lengths[len(order) - 1]
                if slot != last:
                    for layer in self.layers:
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
        """Grows the buffers if rows need more columns than were allocated."""
        if columns <= self.columns:
            return
        more = -(-(columns - self.columns) // self.block) * self.block
        for layer in self.layers:
            if layer.is_initialized:
                for name in ("keys", "values"):
                    grown = torch.nn.functional.pad(getattr(layer, name), (0, 0, 0, more))
                    torch._dynamo.mark_static_address(grown)  # noqa: SLF001
                    setattr(layer, name, grown)
        self.columns += more


def on_device(values: list[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor on `device`, copied without waiting for the device."""
    found = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return found.to(device)
    return found.pin_memory().to(device, non_blocking=True)
