"""Interventions: replace each memory that a model forms by something else of the same shape.

A replacement depends on the seed, the row and the index of the invocation, never on the batch: other rows' content
comes from the activation store. `replaced` wraps `model.memory.form` while answers are decoded; `stand_ins` gives the
same vectors for answers that are read again. Where no replacement exists (a row without an image has no other image)
the memory stays; `possible` tells in advance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vismem.audit.activations import ActivationStore
from vismem.audit.names import INTERVENTIONS
from vismem.config import KINDS, Kind
from vismem.memory import Choice, Formed, Observation
from vismem.model import VisMem
from vismem.training.rollout import seed_of

Form = Callable[[Kind, list[Observation]], "Tensor | Sequence[Tensor]"]
Replacements = list["Tensor | None"]  # None where there is no replacement


@dataclass(frozen=True)
class Intervention:
    """Which memories are replaced by what.

    Args:
        name: one of `INTERVENTIONS`.
        kinds: kinds of memory to replace; the others stay.
    """

    name: str
    kinds: tuple[Kind, ...] = KINDS

    def __post_init__(self) -> None:
        if self.name not in INTERVENTIONS:
            raise ValueError(f"unknown intervention {self.name!r}; there are {', '.join(INTERVENTIONS)}")

    @property
    def label(self) -> str:
        """Name for files and tables: `"zeros"`, or `"zeros-long"` if only one kind is replaced."""
        return self.name if self.kinds == KINDS else f"{self.name}-{self.kinds[0]}"


def zeros(_activations: ActivationStore, form: Form, kind: Kind, seen: list[Observation]) -> Replacements:
    """Vectors of zeros."""
    return [torch.zeros_like(memory) for memory in form(kind, seen)]


def mean(activations: ActivationStore, _form: Form, kind: Kind, seen: list[Observation]) -> Replacements:
    """The kind's mean memory, slot by slot, over the answers about other images."""
    found = [activations.mean(kind, origin_of(one)[0]) for one in seen]
    return [None if m is None else m.to(one.states) for m, one in zip(found, seen, strict=True)]


def noise(activations: ActivationStore, form: Form, kind: Kind, seen: list[Observation]) -> Replacements:
    """Random directions, each vector with the norm of the one it replaces."""
    found: Replacements = []
    for memory, one in zip(form(kind, seen), seen, strict=True):
        random = torch.randn(memory.shape, generator=generator_for(activations, "noise", one))
        random *= memory.float().cpu().norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)
        found.append(random.to(memory))
    return found


def another_image(activations: ActivationStore, form: Form, kind: Kind, seen: list[Observation]) -> Replacements:
    """Memory formed with another row's visual states and patches, and this row's text.

    The observed states stay the row's own and still depend on its own image.
    """

    def changed(one: Observation) -> Observation | None:
        other = activations.other_image(origin_of(one)[0])
        if other is None:
            return None
        images = activations.encoded_images(other)
        return replace(one, visual=images.visual, patches=images.patches)

    return _form_known(form, kind, map(changed, seen))


def another_question(activations: ActivationStore, form: Form, kind: Kind, seen: list[Observation]) -> Replacements:
    """Memory formed with this row's image, and the states and segment of another question's answer.

    The other question is about the same image if there is one, otherwise about another image, on which its states
    depend.
    """

    def changed(one: Observation) -> Observation | None:
        other = activations.other_question(origin_of(one)[0], kind)
        if other is None:
            return None
        states, segment = activations.states_and_segment(*other)
        return replace(one, states=states, segment=segment)

    return _form_known(form, kind, map(changed, seen))


def other_kind(activations: ActivationStore, form: Form, kind: Kind, seen: list[Observation]) -> Replacements:
    """The other former's memory of the same observation, resampled to the replaced kind's length.

    Evenly spaced vectors are dropped or repeated, so the length itself has no effect and nothing foreign is added.
    """
    other = KINDS[1 - KINDS.index(kind)]

    def changed(one: Observation) -> Observation | None:
        patches = activations.encoded_images(origin_of(one)[0]).patches
        return replace(one, patches=patches) if patches or other == "long" else None

    length = activations.model.memory_config.length(kind)
    return [None if m is None else resampled(m, length) for m in _form_known(form, other, map(changed, seen))]


def shuffled(activations: ActivationStore, form: Form, kind: Kind, seen: list[Observation]) -> Replacements:
    """The memory's own vectors in another order."""
    found: Replacements = []
    for memory, one in zip(form(kind, seen), seen, strict=True):
        order = torch.randperm(len(memory), generator=generator_for(activations, "shuffled", one))
        if (order == torch.arange(len(memory))).all():
            order = order.roll(1)
        found.append(memory[order.to(memory.device)])
    return found


STAND_INS: dict[str, Callable[[ActivationStore, Form, Kind, list[Observation]], Replacements]] = {
    each.__name__: each for each in (zeros, mean, noise, another_image, another_question, other_kind, shuffled)
}


def possible(activations: ActivationStore, intervention: Intervention, row_id: str) -> bool:
    """Whether the intervention can replace every memory of its kinds in a row's intact answer."""
    invocations = activations.entries[row_id].rollout.invocations
    kinds = {one.kind for one in invocations if one.length and one.kind in intervention.kinds}
    name, has_image = intervention.name, bool(activations.image[row_id])

    def has_replacement(kind: Kind) -> bool:
        if name == "mean":
            return activations.mean(kind, row_id) is not None
        if name == "another_image":
            return activations.other_image(row_id) is not None
        if name == "another_question":
            return activations.other_question(row_id, kind) is not None
        return name != "other_kind" or kind == "short" or has_image

    return bool(kinds) and all(map(has_replacement, kinds))


def former_of(model: VisMem) -> Form:
    """What forms the model's memories."""
    return lambda kind, seen: model.memory.form(kind, seen).vectors


@torch.no_grad()
def stand_ins(activations: ActivationStore, form: Form, name: str, kind: Kind, seen: list[Observation]) -> Replacements:
    """Replacements for the memories of `kind` that `form` makes of these observations, None where there is none.

    Raises:
        ValueError: if an observation has no origin, or its row is unknown.
    """
    for one in seen:
        activations.row(origin_of(one)[0])
    return STAND_INS[name](activations, form, kind, seen)


@contextmanager
def replaced(activations: ActivationStore, intervention: Intervention) -> Iterator[None]:
    """Replaces memories of the store's model while the context lasts, wherever they are formed.

    Example:
        >>> with replaced(activations, Intervention("zeros")):
        ...     records = answer(model, rows, rewards)
    """

    def wrap(form: Form) -> Form:
        def other(kind: Kind, seen: list[Observation]) -> Tensor | Sequence[Tensor]:
            if kind not in intervention.kinds:
                return form(kind, seen)
            found = stand_ins(activations, form, intervention.name, kind, seen)
            missing = [one for one, memory in zip(seen, found, strict=True) if memory is None]
            own = iter(form(kind, missing) if missing else [])
            return [next(own) if memory is None else memory for memory in found]

        return other

    with formed_by(activations.model, wrap):
        yield


@contextmanager
def formed_by(model: VisMem, wrap: Callable[[Form], Form]) -> Iterator[None]:
    """Forms the model's memories with `wrap(form)` while the context lasts; `form` is what formed them before."""
    memory: Any = model.memory
    before, inner = vars(memory).get("form"), memory.form  # `before` is of an outer context

    def formed(kind: Kind, seen: list[Observation]) -> Formed:
        chosen: dict[int, Choice | None] = {}

        def form(kind: Kind, seen: list[Observation]) -> Tensor:
            found: Formed = inner(kind, seen)
            chosen.update(zip(map(id, seen), found.choices, strict=True))
            return found.vectors

        memories: Any = wrap(form)(kind, seen)
        return Formed(memories, [chosen.get(id(one)) for one in seen])

    memory.form = formed
    try:
        yield
    finally:
        if before is None:
            del memory.form
        else:
            memory.form = before


def origin_of(one: Observation) -> tuple[str, int]:
    """The row's id and the invocation's index. Raises ValueError if the observation has none."""
    if one.origin is None or one.origin[0] is None:
        raise ValueError("cannot replace the memory of a row without a name; decode through requests with tags")
    return one.origin


def generator_for(activations: ActivationStore, name: str, one: Observation) -> torch.Generator:
    """A generator that depends on the row and invocation alone."""
    return torch.Generator().manual_seed(seed_of(activations.seed, name, *origin_of(one)))


def resampled(memory: Tensor, length: int) -> Tensor:
    """Resamples vectors [n, d] to [length, d], dropping or repeating evenly spaced ones.

    Example:
        >>> resampled(torch.arange(4.0)[:, None], 2).flatten()
        tensor([0., 3.])
    """
    return memory[torch.linspace(0, len(memory) - 1, length).round().long().to(memory.device)]


def _form_known(form: Form, kind: Kind, seen: Iterable[Observation | None]) -> Replacements:
    """Memories of some observations, formed in one batch; None for None."""
    wanted = list(seen)
    known = [one for one in wanted if one is not None]
    memories = iter(form(kind, known) if known else [])
    return [None if one is None else next(memories) for one in wanted]
