"""Invocation policies: who decides that memory is invoked, and which of the model's own invocations count (Eq. 4).

Policies know token ids and counters, no model. The decoder asks two things: may the model sample invocation tokens
(`samples`), and should one be inserted before this row's next token (`inject`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vismem.config import KINDS, Kind
from vismem.deprecation import renamed

if TYPE_CHECKING:
    from torch import Tensor


class RowState(Protocol):
    """A row as a policy sees it.

    Attributes:
        index: index of the output row.
        sampled: number of tokens the row has sampled so far.
        sighted: whether the row has an image.
        at_delimiter: whether the row's last token ends a phrase; the start of the answer counts as such.
        tokens: the row's new tokens so far, sampled or inserted.
    """

    @property
    def index(self) -> int: ...

    @property
    def sampled(self) -> int: ...

    @property
    def sighted(self) -> bool: ...

    @property
    def at_delimiter(self) -> bool: ...

    @property
    def tokens(self) -> list[int]: ...


class Policy(Protocol):
    """What the decoder asks of an invocation policy; a policy of your own needs no base class.

    Attributes:
        samples: whether the model may sample invocation tokens itself.
        injects: whether `inject` can ever return anything but None.
        forms: kinds that form a memory; a sampled token of another kind forms nothing, and decoding continues.
        guarded: whether `max_invocations` and `min_gap` also limit what `inject` inserts.
    """

    @property
    def samples(self) -> bool: ...

    @property
    def injects(self) -> bool: ...

    @property
    def forms(self) -> tuple[Kind, ...]: ...

    @property
    def guarded(self) -> bool: ...

    def start(self) -> None:
        """Called at the start of every decode, on a shallow copy of the object that was given.

        Create the state of one decode here instead of emptying it, so that concurrent decodes do not share it.
        """

    def inject(self, row: RowState) -> Kind | None:
        """The kind to insert before `row` samples, or None. Asked again after each memory until it returns None."""


@dataclass(frozen=True)
class Learned:
    """The model invokes memory when it samples an invocation token (the default)."""

    samples: bool = True
    injects: bool = False
    forms: tuple[Kind, ...] = KINDS
    guarded: bool = True

    def start(self) -> None:
        """Keeps no state."""

    def inject(self, row: RowState) -> Kind | None:  # noqa: ARG002
        """Never inserts an invocation."""
        return None


@dataclass(frozen=True)
class Only(Learned):
    """As `Learned`, but only one kind forms memory; the other kind's token forms nothing (note to Tab. 9)."""

    kind: Kind = "short"

    def __post_init__(self) -> None:
        object.__setattr__(self, "forms", (self.kind,))


@dataclass(frozen=True)
class Off(Learned):
    """No memory at all: the base's tokens, one for one."""

    samples: bool = False
    forms: tuple[Kind, ...] = ()


@dataclass
class Random:
    """Inserts invocations at random, both kinds equally likely (Tab. 3); the model samples none itself.

    Each row has its own generator, so its invocations do not depend on its neighbours. On a row without an image a
    short-term invocation is left out.

    Args:
        rate: probability of an invocation at each place, 0 to 1.
        where: `"delimiter"` (the start of the answer and after each phrase) or `"anywhere"` (before every token).
        seed: one seed, or one for each output row (numbers, or strings as `random.Random` takes them).
        kinds: kinds to choose from.
    """

    rate: float
    where: Literal["delimiter", "anywhere"] = "delimiter"
    seed: int | Sequence[int | str] = 0
    kinds: tuple[Kind, ...] = KINDS
    samples: bool = field(default=False, init=False)
    injects: bool = field(default=True, init=False)
    forms: tuple[Kind, ...] = field(default=KINDS, init=False)
    guarded: bool = field(default=True, init=False)
    _generators: dict[int, random.Random] = field(default_factory=dict, init=False, repr=False)
    _asked: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"Random(rate=...) must lie between 0 and 1, got {self.rate!r}")
        if self.where not in ("delimiter", "anywhere"):
            raise ValueError(f"Random(where=...) must be 'delimiter' or 'anywhere', got {self.where!r}")

    def apart(self, rows: int) -> Random:
        """The policy of `rows` rows; row i draws as the only row of a call with seed `seed + i` would."""
        assert isinstance(self.seed, int)
        return replace(self, seed=[f"{self.seed + row}-0" for row in range(rows)])

    def start(self) -> None:
        """Forgets all draws."""
        self._generators, self._asked = {}, {}

    def inject(self, row: RowState) -> Kind | None:
        """A random kind with probability `rate`, once per place."""
        if self._asked.get(row.index) == row.sampled or (self.where == "delimiter" and not row.at_delimiter):
            return None
        self._asked[row.index] = row.sampled
        if row.index not in self._generators:
            own = f"{self.seed}-{row.index}" if isinstance(self.seed, int) else self.seed[row.index]
            self._generators[row.index] = random.Random(own)
        generator = self._generators[row.index]
        if generator.random() >= self.rate:
            return None
        kind = generator.choice(self.kinds)
        return kind if row.sighted or kind != "short" else None


@dataclass
class Forced:
    """Inserts invocations by a schedule of `(row, step, kind)`; the model samples none itself.

    The invocation is inserted before the row samples token number `step` (0-based, sampled tokens only). Several at
    one step follow each other in the order given.

    Args:
        schedule: the triples. A short-term one for a row without an image is refused when decoding starts.
    """

    schedule: Iterable[tuple[int, int, Kind]]
    samples: bool = field(default=False, init=False)
    injects: bool = field(default=True, init=False)  # False for an empty schedule, which is the base alone
    forms: tuple[Kind, ...] = field(default=KINDS, init=False)
    guarded: bool = field(default=False, init=False)
    _pending: dict[tuple[int, int], list[Kind]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        entries: list[Any] = [tuple(entry) for entry in self.schedule]
        self.schedule = entries
        self.injects = bool(entries)
        for entry in entries:
            if len(entry) != 3 or not all(isinstance(n, int) and n >= 0 for n in entry[:2]) or entry[2] not in KINDS:
                raise ValueError(f"Forced takes (row, step, 'short' or 'long') with row and step >= 0, got {entry!r}")

    def start(self) -> None:
        """Makes all of the schedule pending."""
        self._pending = {}
        for row, step, kind in self.schedule:
            self._pending.setdefault((row, step), []).append(kind)

    def inject(self, row: RowState) -> Kind | None:
        """The next kind that is pending at this row and step."""
        kinds = self._pending.get((row.index, row.sampled))
        return kinds.pop(0) if kinds else None

    def swapped(self) -> Forced:
        """The same schedule with kinds exchanged, the counterfactual of stage II."""
        other: dict[Kind, Kind] = {"short": "long", "long": "short"}
        return Forced([(row, step, other[kind]) for row, step, kind in self.schedule])


@dataclass
class After:
    """Inserts an invocation after the answer has written a marker token for the n-th time; the model samples none.

    Separates what memory holds from when the model would invoke it.

    Args:
        mark: id of the marker token.
        plan: kinds by n, which counts from 1. A short-term one is left out on rows without an image.
    """

    mark: int
    plan: dict[int, Kind]
    samples: bool = field(default=False, init=False)
    injects: bool = field(default=True, init=False)
    forms: tuple[Kind, ...] = field(default=KINDS, init=False)
    guarded: bool = field(default=False, init=False)
    _met: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def start(self) -> None:
        """Forgets which markers were seen."""
        self._met = {}

    def inject(self, row: RowState) -> Kind | None:
        """The planned kind, once after each marker."""
        count = row.tokens.count(self.mark)
        if not row.tokens or row.tokens[-1] != self.mark or self._met.get(row.index) == count:
            return None
        self._met[row.index] = count
        kind = self.plan.get(count)
        return kind if row.sighted or kind != "short" else None


Occurrence = tuple[int | None, int]  # a token and which occurrence of it, from 1; (None, 0) is the start


@dataclass
class Named:
    """Inserts each row's invocations where its reference reply names them: after the same occurrence of a token.

    Args:
        places: for each row its kinds by place; empty for a row that names none.
        otherwise: the policy of rows that name none.
    """

    places: Sequence[dict[Occurrence, list[Kind]]]
    otherwise: Random
    samples: bool = field(default=False, init=False)
    injects: bool = field(default=True, init=False)
    forms: tuple[Kind, ...] = field(default=KINDS, init=False)
    guarded: bool = field(default=True, init=False)
    _pending: list[dict[Occurrence, list[Kind]]] = field(default_factory=list, init=False, repr=False)

    def start(self) -> None:
        """Makes all places pending."""
        self.otherwise = replace(self.otherwise)
        self.otherwise.start()
        self._pending = [{place: list(kinds) for place, kinds in row.items()} for row in self.places]

    def inject(self, row: RowState) -> Kind | None:
        """The next kind of the place that the row has come to."""
        if not self.places[row.index]:
            return self.otherwise.inject(row)
        last = row.tokens[-1] if row.tokens else None
        kinds = self._pending[row.index].get((last, row.tokens.count(last) if last is not None else 0))
        kind = kinds.pop(0) if kinds else None
        return kind if row.sighted or kind != "short" else None


@dataclass(frozen=True)
class Opening:
    """How a row of a counterfactual starts.

    Args:
        prompt: index of its prompt in the batch.
        tokens: the words written before the invocation.
        kind: of the invocation that follows them.
        states: the observed states [z, d] of that invocation, from the rollout it is taken from.
    """

    prompt: int
    tokens: tuple[int, ...]
    kind: Kind
    states: Tensor


@dataclass(frozen=True)
class Counterfactual(Learned):
    """Answers up to their first invocation, kinds swapped from there on (tau_rev of Eq. 15).

    Every row starts with its opening, whose words are read and not decoded again; wherever the model then samples one
    kind's invocation token, the other kind is invoked.
    """

    openings: tuple[Opening, ...] = ()


NAMES: dict[str, Policy] = {"learned": Learned(), "off": Off(), "short": Only(kind="short"), "long": Only(kind="long")}
SPELLINGS = "learned, off, short, long, random:RATE[@anywhere], or a schedule such as short@0,long@12"


def policy_of(invocation: str | Policy) -> Policy:
    """The policy that `generate(invocation=...)` means: a name or an object of this module.

    Raises:
        ValueError: if the name is unknown.
    """
    if isinstance(invocation, str):
        if invocation not in NAMES:
            raise ValueError(f"unknown invocation {invocation!r}; choose from {', '.join(NAMES)}, Random and Forced")
        return NAMES[invocation]
    if not hasattr(invocation, "inject"):
        raise ValueError(f"invocation must be a name or a policy of vismem.invocation, got {invocation!r}")
    return invocation


def read_policy(text: str, seed: int = 0) -> str | Policy:
    """The policy that a text means, as on the command line and in settings.

    Args:
        text: a name, `random:RATE` (at delimiters), `random:RATE@anywhere`, or a schedule `kind@step,kind@step`.
        seed: of a random policy.

    Returns:
        What `VisMem.generate(invocation=...)` takes.

    Raises:
        ValueError: if it is none of these.

    Example:
        >>> read_policy("short@0,long@12").schedule
        [(0, 0, 'short'), (0, 12, 'long')]
    """
    if text in NAMES:
        return text
    try:
        if text.startswith("random:"):
            rate, _, where = text.removeprefix("random:").partition("@")
            places: Any = where or "delimiter"  # Random checks it
            return Random(float(rate), places, seed)
        entries: list[Any] = [entry.strip().split("@") for entry in text.split(",")]
        if all(len(e) == 2 and e[0] in KINDS and e[1].isascii() and e[1].isdigit() for e in entries):
            return Forced([(0, int(step), kind) for kind, step in entries])
    except ValueError as error:
        if text.startswith("random:") and "Random(" in str(error):
            rule = "a rate from 0 to 1, and delimiter or anywhere after the @"
            raise ValueError(f"{text!r} is not a random policy: give {rule}") from error
    raise ValueError(f"unknown policy {text!r}; choose from {SPELLINGS}")


def schedule_of(policy: str | Policy) -> list[tuple[int, int, Kind]]:
    """The schedule of a `Forced` policy; empty for any other."""
    return list(policy.schedule) if isinstance(policy, Forced) else []


def check_rows(policy: Policy, rows: Sequence[RowState]) -> None:
    """Checks that a policy fits the rows of a call.

    Raises:
        ValueError: if `Random` has too few seeds, or `Forced` names a row that does not exist or asks for short-term
            memory in a row without an image.
    """
    if isinstance(policy, Random) and not isinstance(policy.seed, int) and len(policy.seed) < len(rows):
        raise ValueError(
            f"Random has {len(policy.seed)} seeds for {len(rows)} rows; give one seed for each output row, or one "
            "number"
        )
    for index, step, kind in schedule_of(policy):
        if index >= len(rows):
            raise ValueError(f"Forced names row {index}, but the batch has {len(rows)} (rows count from 0)")
        if kind == "short" and not rows[index].sighted:
            raise ValueError(
                f"Forced asks for short-term memory in row {index} at step {step}, but that row has no image"
            )


__getattr__ = renamed(__name__, {"Place": "RowState"})
