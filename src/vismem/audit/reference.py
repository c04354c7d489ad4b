"""The reference pass: writes intact answers and stores everything that the audit needs of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from vismem.audit.activations import VISUAL_KEPT, ActivationStore, pooled
from vismem.audit.interventions import Form, formed_by, origin_of
from vismem.config import Kind
from vismem.decoding.policies import Policy
from vismem.evaluation.answering import KEPT, record_of, requests_for
from vismem.evaluation.records import Record, RecordFile
from vismem.memory import Observation
from vismem.training.rewards import Rewards


def intact_answers(
    activations: ActivationStore,
    rewards: Rewards,
    store: RecordFile,
    *,
    invocation: str | Policy = "learned",
    batch_size: int = 16,
    max_new_tokens: int = 256,
    seed: int = 0,
    label: str = "",
) -> list[Record]:
    """Answers all rows and fills the store; reuses answers of an earlier run.

    The keywords are those of `vismem.evaluation.answering.answer`. Returns a record for each row, in order.
    """
    done = {row.id for row in activations.rows if row.id in store.records and activations.load(row.id)}
    missing = [row for row in activations.rows if row.id not in done]
    bar = tqdm(total=len(activations.rows), initial=len(done), desc=label or "intact", delay=2, mininterval=1)

    def fail(record: Record) -> None:
        raise ValueError(f"{record.id}: {record.error}")

    with bar, recorded_queries(activations) as (queries, shown):
        requests = requests_for(activations.model, missing, invocation, seed, fail)
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens, "record": True}
        for written in activations.model.stream_batch(requests, batch_size, **settings):
            row = activations.row(written.tag)
            own = [queries.pop((row.id, index), None) for index in range(len(written.invocations))]
            activations.add(
                row.id, written.rollout, own, shown.pop(row.id, activations.model.backbone.embeddings.weight[:0])
            )
            store.add([record_of(activations.model, row, written, rewards, KEPT)])
            bar.update()
    return [store.records[row.id] for row in activations.rows]


@contextmanager
def recorded_queries(activations: ActivationStore) -> Iterator[tuple[dict[tuple[str, int], Tensor], dict[str, Tensor]]]:
    """Records Q of every invocation, and the visual tokens of every row that invokes, while the context lasts."""
    queries: dict[tuple[str, int], Tensor] = {}
    shown: dict[str, Tensor] = {}

    def wrap(form: Form) -> Form:
        def recording(kind: Kind, seen: list[Observation]) -> Tensor | Sequence[Tensor]:
            found = activations.model.memory.builder([one.visual for one in seen], [one.states for one in seen])
            for one, query in zip(seen, found, strict=True):
                queries[origin_of(one)] = query
                shown.setdefault(origin_of(one)[0], pooled(one.visual, VISUAL_KEPT))
            return form(kind, seen)

        return recording

    with formed_by(activations.model, wrap):
        yield queries, shown
