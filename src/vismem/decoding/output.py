"""What `generate` returns for finished rows, and the error for rows whose numbers are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vismem.decoding.trace import VisMemOutput

if TYPE_CHECKING:
    from vismem.decoding.row import DecodingSettings, Row


class NonFiniteError(ArithmeticError):
    """A row has no finite scores to sample from: its inputs, memory or logits hold NaN or infinity.

    Args:
        message: what is not finite, and at which token.
        rows: in `generate`, the indices of the rows that failed.
        output: in `generate`, what it would have returned; the failed rows end where they failed.
    """

    def __init__(self, message: str, rows: Sequence[int] = (), output: VisMemOutput | Tensor | None = None) -> None:
        super().__init__(message)
        self.rows, self.output = list(rows), output


def collect(rows: list[Row], settings: DecodingSettings) -> VisMemOutput | Tensor:
    """Returns the finished rows of one call as `generate` does.

    Raises:
        NonFiniteError: if a row failed; names all that did, gives the first one's reason, and holds the output.
    """
    output = assemble(rows, settings)
    failed = [row for row in rows if row.error is not None]
    if failed:
        numbers = [row.index for row in failed]
        named = ", ".join(map(str, numbers[:8])) + (" and others" if numbers[8:] else "")
        raise NonFiniteError(f"row {named}: {failed[0].error}", numbers, output) from failed[0].error
    return output


def assemble(rows: list[Row], settings: DecodingSettings) -> VisMemOutput | Tensor:
    """Returns what rows have written so far, whether they ended well or not."""
    prompts, longest = torch.stack([row.prompt for row in rows]), max(len(row.tokens) for row in rows)
    answers = [row.tokens + [settings.pad] * (longest - len(row.tokens)) for row in rows]
    sequences = torch.cat([prompts, torch.tensor(answers, dtype=prompts.dtype, device=prompts.device)], dim=1)
    config, pad, device = settings.config, settings.pad, sequences.device
    if not config.return_dict_in_generate:
        return sequences
    scores, logits = [row.record.scores for row in rows], [row.record.logits for row in rows]
    return VisMemOutput(
        sequences=sequences,
        scores=columns(scores, longest, pad, device) if config.output_scores else None,
        logits=columns(logits, longest, pad, device) if config.output_logits else None,
        invocations=[row.invocations for row in rows],
        rollout=[row.rollout() for row in rows] if settings.record else None,
    )


def columns(kept: list[list[Tensor]], longest: int, pad: int, device: torch.device) -> tuple[Tensor, ...]:
    """For each of the `longest` positions the scores [rows, V]; after a row's end the pad token is certain."""
    width = max((len(entry) for row in kept for entry in row), default=pad + 1)
    blank = torch.full((width,), float("-inf"), device=device)
    blank[pad] = 0.0

    def at(row: list[Tensor], position: int) -> Tensor:
        if position >= len(row):
            return blank
        return torch.nn.functional.pad(row[position], (0, width - len(row[position])), value=float("-inf"))

    return tuple(torch.stack([at(row, position) for row in kept]) for position in range(longest))
