"""Interventions: every memory that a model forms is replaced by another thing of the same shape.

Which vectors stand in depends on the seed, the row and the number of the invocation, never on the batch: other rows
come from the bank. While words are decoded, `replaced` puts itself before `model.memory.form`; for answers that are
read again, `stand_ins` gives the same vectors. Where nothing can stand in (a row without an image has no other image)
the memory stays as it is, and `possible` says so beforehand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vismem.audit.activations import Bank
from vismem.audit.names import INTERVENTIONS
from vismem.config import KINDS, Kind
from vismem.memory import Observation
from vismem.model import VisMem
from vismem.training.rollout import seed_of

Form = Callable[[Kind, list[Observation]], Sequence[Tensor]]
Found = list["Tensor | None"]


@dataclass(frozen=True)
class Intervention:
    """What is put in the place of which memories.

    Args:
        name: one of `INTERVENTIONS`.
        kinds: kinds of memory that are replaced; the others stay.
    """

    name: str
    kinds: tuple[Kind, ...] = KINDS

    def __post_init__(self) -> None:
        if self.name not in INTERVENTIONS:
            raise ValueError(f"unknown intervention {self.name!r}; there are {', '.join(INTERVENTIONS)}")

    @property
    def label(self) -> str:
        """A name for files and tables: `"zeros"`, or `"zeros-long"` where one kind alone is replaced."""
        return self.name if self.kinds == KINDS else f"{self.name}-{self.kinds[0]}"


def zeros(bank: Bank, form: Form, kind: Kind, seen: list[Observation]) -> Found:
    """Vectors of zeros."""
    return [torch.zeros_like(memory) for memory in form(kind, seen)]


def mean(bank: Bank, form: Form, kind: Kind, seen: list[Observation]) -> Found:
    """The mean memory of the kind, slot by slot, over the answers about other images."""
    found = [bank.mean(kind, one.origin[0]) for one in seen]
    return [None if m is None else m.to(one.states) for m, one in zip(found, seen, strict=True)]


def noise(bank: Bank, form: Form, kind: Kind, seen: list[Observation]) -> Found:
    """Random directions, every vector as long as the one that it replaces."""

    def drawn(memory: Tensor, generator: torch.Generator) -> Tensor:
        random = torch.randn(memory.shape, generator=generator)
        random *= memory.float().cpu().norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)
        return random.to(memory)

    return [drawn(m, chance(bank, "noise", one)) for m, one in zip(form(kind, seen), seen, strict=True)]


def another_image(bank: Bank, form: Form, kind: Kind, seen: list[Observation]) -> Found:
    """What the row would have recalled before another row's image: its visual states and patches, the own words.

    The observed states stay the row's own, and they are of a model that has seen its own image.
    """

    def elsewhere(one: Observation, other: str) -> Observation:
        sight = bank.sight(other)
        return dataclasses.replace(one, visual=sight.visual, patches=sight.patches)

    return _formed(form, kind, [(one, bank.other_image(one.origin[0]), elsewhere) for one in seen])


def another_question(bank: Bank, form: Form, kind: Kind, seen: list[Observation]) -> Found:
    """What the row would have recalled with another question in mind, before its own image.

    States and words are those of an answer to another question about the same image, or, where there is none, of
    another row's answer, whose states have seen that row's image.
    """

    def otherwise(one: Observation, other: tuple[str, int]) -> Observation:
        states, segment = bank.recalled(*other)
        return dataclasses.replace(one, states=states, segment=segment)

    return _formed(form, kind, [(one, bank.other_question(one.origin[0], kind), otherwise) for one in seen])


def other_kind(bank: Bank, form: Form, kind: Kind, seen: list[Observation]) -> Found:
    """What the other former makes of the same moment, brought to the number of vectors of the replaced kind.

    Evenly spaced vectors are taken where there are too many, and vectors are repeated where there are too few: so
    both ends of the memory are in it, nothing foreign is, and the length alone can have no effect.
    """
    other = KINDS[1 - KINDS.index(kind)]
    sights = [bank.sight(one.origin[0]) for one in seen]
    able = [(o, s if s.patches or other == "long" else None) for o, s in zip(seen, sights, strict=True)]
    found = _formed(form, other, [(o, s, lambda o, s: dataclasses.replace(o, patches=s.patches)) for o, s in able])
    length = bank.model.memory_config.length(kind)
    return [None if memory is None else resampled(memory, length) for memory in found]


def shuffled(bank: Bank, form: Form, kind: Kind, seen: list[Observation]) -> Found:
    """The memory's own vectors in another order."""

    def order(count: int, generator: torch.Generator) -> Tensor:
        found = torch.randperm(count, generator=generator)
        return found if count < 2 or (found != torch.arange(count)).any() else found.roll(1)

    memories = form(kind, seen)
    return [m[order(len(m), chance(bank, "shuffled", o)).to(m.device)] for m, o in zip(memories, seen, strict=True)]


STAND_INS: dict[str, Callable[[Bank, Form, Kind, list[Observation]], Found]] = {
    each.__name__: each for each in (zeros, mean, noise, another_image, another_question, other_kind, shuffled)
}


def possible(bank: Bank, intervention: Intervention, row_id: str) -> bool:
    """Whether something can stand in for every memory of a row's intact answer that the intervention means."""
    invocations = bank.entries[row_id].rollout.invocations
    kinds = {one.kind for one in invocations if one.length and one.kind in intervention.kinds}
    asked: dict[str, Callable[[Kind], bool]] = {
        "mean": lambda kind: bank.mean(kind, row_id) is not None,
        "another_image": lambda kind: bank.other_image(row_id) is not None,
        "another_question": lambda kind: bank.other_question(row_id, kind) is not None,
        "other_kind": lambda kind: kind == "short" or bool(bank.image[row_id]),
    }
    return bool(kinds) and all(asked.get(intervention.name, lambda kind: True)(kind) for kind in kinds)


@torch.no_grad()
def stand_ins(bank: Bank, form: Form, name: str, kind: Kind, seen: list[Observation]) -> Found:
    """What stands in for the memories of `kind` that `form` makes of these observations.

    Args:
        bank: the rows.
        form: what forms memories when nothing is replaced.
        name: one of `INTERVENTIONS`.
        kind: of the memories that are replaced.
        seen: observations with their `origin`.

    Returns:
        For each observation vectors [N, d], or None where nothing can stand in.

    Raises:
        ValueError: if an observation does not say whose it is, or the bank does not know its row.
    """
    for one in seen:
        if one.origin is None or one.origin[0] is None:
            raise ValueError("a memory is to be replaced of a row without a name; decode through requests with tags")
        bank.row(one.origin[0])
    return STAND_INS[name](bank, form, kind, seen)


@contextmanager
def replaced(bank: Bank, intervention: Intervention) -> Iterator[None]:
    """Replaces memories of the bank's model while the context lasts, wherever they are formed.

    Example:
        >>> with replaced(bank, Intervention("zeros")):
        ...     records = answer(model, rows, rewards)
    """

    def wrap(form: Form) -> Form:
        def other(kind: Kind, seen: list[Observation]) -> Sequence[Tensor]:
            if kind not in intervention.kinds:
                return form(kind, seen)
            found = stand_ins(bank, form, intervention.name, kind, seen)
            missing = [index for index, memory in enumerate(found) if memory is None]
            own = form(kind, [seen[index] for index in missing]) if missing else []
            for index, memory in zip(missing, own, strict=True):
                found[index] = memory
            return found

        return other

    with formed_by(bank.model, wrap):
        yield


@contextmanager
def formed_by(model: VisMem, wrap: Callable[[Form], Form]) -> Iterator[None]:
    """Lets `wrap(form)` form the model's memories while the context lasts, `form` being what formed them before."""
    memory, known = model.memory, vars(model.memory)
    before = known.get("form")  # of an outer context
    memory.form = wrap(memory.form)
    try:
        yield
    finally:
        if before is None:
            del memory.form
        else:
            memory.form = before


def chance(bank: Bank, name: str, one: Observation) -> torch.Generator:
    """A row's own chance, the same in every batch."""
    return torch.Generator().manual_seed(seed_of(bank.seed, name, *one.origin))


def resampled(memory: Tensor, length: int) -> Tensor:
    """Vectors [n, d] as [length, d]: evenly spaced ones of them, or some of them again.

    Example:
        >>> resampled(torch.arange(4.0)[:, None], 2).flatten()
        tensor([0., 3.])
    """
    return memory[torch.linspace(0, len(memory) - 1, length).round().long().to(memory.device)]


def _formed(form: Form, kind: Kind, wanted: list[tuple[Observation, object, Callable[..., Any]]]) -> Found:
    """Memories of changed observations, in one batch; None where there is nothing to change to."""
    changed = [change(one, other) for one, other, change in wanted if other is not None]
    memories = iter(form(kind, changed) if changed else [])
    return [None if other is None else next(memories) for _, other, _ in wanted]
