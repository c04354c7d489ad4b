"""The live batch: rows in progress, and the tensors that hold one line for each slot of the next forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vismem.decoding.cache import on_device
from vismem.decoding.row import DecodingSettings, Row

CHUNK = 64  # columns that the table of ids grows by


class Batch:
    """Rows in progress and their tensors.

    Attributes:
        rows: the unfinished rows.
        calls: by `id` of their settings, all rows of the calls in progress, finished rows among them.
        hidden: [n, d], the states to sample from.
        next_ids: [n], the tokens to feed next.
        ids: [n, longest], prompts and answers, aligned on the left.
        keeps_finished: whether finished rows keep their line, as in transformers' own loop.
    """

    def __init__(self, *, keeps_finished: bool) -> None:
        self.rows: list[Row] = []
        self.calls: dict[int, list[Row]] = {}
        self.hidden = torch.zeros(0, 0)
        self.next_ids = torch.zeros(0, dtype=torch.long)
        self.ids = torch.zeros(0, 0, dtype=torch.long)
        self.keeps_finished = keeps_finished

    # Rows enter and leave.

    def insert(self, rows: list[Row], width: int, hidden: Tensor, ids: Tensor) -> None:
        """Adds the rows of a call.

        Args:
            rows: the rows, with their slots.
            width: number of slots from now on.
            hidden: [n, d], the states after their prompts.
            ids: [n, L], their prompts.
        """
        slots, pads = [row.slot for row in rows], ids.new_full((len(rows),), rows[0].settings.pad)
        self.hidden = with_lines(self.hidden, width, slots, hidden)
        self.next_ids = with_lines(self.next_ids, width, slots, pads)
        self.ids = with_lines(self.ids, width, slots, ids)
        self.rows += rows
        self.calls[id(rows[0].settings)] = rows

    def remove(self, rows: list[Row]) -> None:
        """Removes rows, and frees what finished answers do not need; their lines stay."""
        removed = {id(row) for row in rows}
        self.rows = [row for row in self.rows if id(row) not in removed]
        for row in rows:
            row.states, row.queue, row.images = [], None, None
        in_progress = {id(row.settings) for row in self.rows}
        self.calls = {call: members for call, members in self.calls.items() if call in in_progress}
        if self.keeps_finished:
            self.next_ids[[row.slot for row in rows]] = rows[0].settings.pad

    def reorder(self, order: list[int]) -> None:
        """Keeps line `order[i]` as line i."""
        if order == list(range(len(self.ids))):
            return
        index = on_device(order, self.ids.device, torch.long)
        self.hidden = self.hidden[index.to(self.hidden.device)]
        self.next_ids, self.ids = self.next_ids[index], self.ids[index]
        slots = {old: new for new, old in enumerate(order)}
        for row in self.rows:
            row.slot = slots[row.slot]

    # Tokens.

    def append(self, row: Row, token: int) -> None:
        """Appends a token that was not sampled to a row's answer."""
        self._reserve(row.length, row.settings.pad)
        self.ids[row.slot, row.length] = token
        row.append(token, self.hidden)
        if row.record.top is not None:
            row.record.tops.append(None)

    def write_sampled(self, rows: list[Row]) -> None:
        """Writes the tokens in `next_ids` into `ids`, without waiting for the device."""
        self._reserve(max(row.length for row in rows), rows[0].settings.pad)
        slots, columns = on_device([[row.slot, row.length] for row in rows], self.ids.device).unbind(1)
        self.ids[slots, columns] = self.next_ids[slots]

    def _reserve(self, column: int, pad: int) -> None:
        if column >= self.ids.shape[1]:
            more = self.ids.new_full((len(self.ids), max(column + 1 - self.ids.shape[1], CHUNK)), pad)
            self.ids = torch.cat([self.ids, more], dim=1)

    def ids_of(self, row: Row, length: int) -> Tensor:
        """The first `length` ids of a row, finished or not; a shorter answer is padded."""
        if not row.left:
            return self.ids[row.slot, :length]
        ids = torch.cat([row.prompt, on_device(row.tokens, row.prompt.device, torch.long)])[:length]
        return torch.nn.functional.pad(ids, (0, length - len(ids)), value=row.settings.pad)

    def call_view(
        self, settings: DecodingSettings, length: int, lines: dict[int, int], values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All R rows of a call in their order, as processors and criteria see them in transformers' own loop.

        Args:
            settings: of the call.
            length: of the ids.
            lines: by `id` of a row, its line in `values`. Rows without one get the values of line 0, which mean
                nothing.
            values: [n, V].

        Returns:
            Ids [R, length] and values [R, V].
        """
        if self.keeps_finished:
            return self.ids[:, :length], values.clone()
        rows = self.calls[id(settings)]
        index = on_device([lines.get(id(row), 0) for row in rows], values.device)
        return torch.stack([self.ids_of(row, length) for row in rows]), values[index]


def with_lines(table: Tensor, height: int, lines: list[int], values: Tensor) -> Tensor:
    """Returns `table` with `height` lines and `values` in `lines`; shorter lines are padded with zeros."""
    shape = list(values.shape)
    shape[0] = height
    if values.dim() > 1:
        shape[1] = max(values.shape[1], table.shape[1])
    found = values.new_zeros(shape)
    if len(table):
        known: tuple[Any, ...] = (slice(len(table)), *map(slice, table.shape[1:]))
        found[known] = table
    new: tuple[Any, ...] = (lines, *map(slice, values.shape[1:]))
    found[new] = values
    return found
