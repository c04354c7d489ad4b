"""The reference pass: writes intact answers and stores everything that the audit needs of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vismem.audit.activations import VISUAL_KEPT, ActivationStore, pooled
from vismem.audit.interventions import Form, formed_by, origin_of
from vismem.config import Kind
from vismem.decoding.queue import Answer
from vismem.evaluation.answering import answer
from vismem.evaluation.records import Record, RecordFile
from vismem.memory import Observation
from vismem.training.rewards import Rewards


def intact_answers(
    activations: ActivationStore, rewards: Rewards, store: RecordFile, **generation: Any
) -> list[Record]:
    """Answers all rows and fills the store; reuses answers of an earlier run.

    Keywords and result are those of `vismem.evaluation.answering.answer`.
    """
    for row in activations.rows:
        if not activations.load(row.id):
            store.records.pop(row.id, None)
    with recorded_queries(activations) as (queries, visual):

        def keep(row_id: str, written: Answer) -> None:
            if written.error is not None:
                raise ValueError(f"{row_id}: {written.error}")
            own = [queries.pop((row_id, index), None) for index in range(len(written.invocations))]
            nothing = activations.model.backbone.embeddings.weight[:0]
            activations.add(row_id, written.rollout, own, visual.pop(row_id, nothing))

        settings: dict[str, Any] = {"store": store, "on_answer": keep, "record": True, **generation}
        return answer(activations.model, activations.rows, rewards, **settings)


@contextmanager
def recorded_queries(activations: ActivationStore) -> Iterator[tuple[dict[tuple[str, int], Tensor], dict[str, Tensor]]]:
    """Records Q of every invocation, and the visual tokens of every row that invokes, while the context lasts."""
    queries: dict[tuple[str, int], Tensor] = {}
    visual: dict[str, Tensor] = {}

    def wrap(form: Form) -> Form:
        def recording(kind: Kind, seen: list[Observation]) -> Tensor | Sequence[Tensor]:
            found = activations.model.memory.builder([one.visual for one in seen], [one.states for one in seen])
            for one, query in zip(seen, found, strict=True):
                queries[origin_of(one)] = query
                visual.setdefault(origin_of(one)[0], pooled(one.visual, VISUAL_KEPT))
            return form(kind, seen)

        return recording

    with formed_by(activations.model, wrap):
        yield queries, visual
