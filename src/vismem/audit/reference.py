"""The reference pass: intact answers, recorded with all that the audit asks of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from vismem.audit.activations import VISUAL_KEPT, Bank, pooled
from vismem.audit.interventions import Form, formed_by
from vismem.config import Kind
from vismem.decoding.policies import Policy
from vismem.evaluation.answering import KEPT, asked, record_of
from vismem.evaluation.records import Record, RecordFile
from vismem.memory import Observation
from vismem.training.rewards import Rewards


def intact_answers(
    bank: Bank,
    rewards: Rewards,
    store: RecordFile,
    *,
    invocation: str | Policy = "learned",
    batch_size: int = 16,
    max_new_tokens: int = 256,
    seed: int = 0,
    label: str = "",
) -> list[Record]:
    """Answers all rows of a bank and fills it; answers of an earlier run are taken from `store` and the bank's folder.

    Args:
        bank: the rows, and where their entries go.
        rewards: what scores the answers.
        store: the records' file.
        invocation, batch_size, max_new_tokens, seed: as for `vismem.evaluation.answering.answer`.
        label: for the progress bar.

    Returns:
        A record for each row, in their order.
    """
    done = {row.id for row in bank.rows if row.id in store.records and bank.load(row.id)}
    missing = [row for row in bank.rows if row.id not in done]
    bar = tqdm(total=len(bank.rows), initial=len(done), desc=label or "intact", delay=2, mininterval=1)

    def unasked(record: Record) -> None:
        raise ValueError(f"{record.id}: {record.error}")

    with bar, watched(bank) as (queries, shown):
        requests = asked(bank.model, missing, invocation, seed, unasked)
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "record": True}
        for written in bank.model.stream_batch(requests, batch_size, **settings):
            row = bank.row(written.tag)
            own = [queries.pop((row.id, index), None) for index in range(len(written.invocations))]
            bank.add(row.id, written.rollout, own, shown.pop(row.id, bank.model.backbone.embeddings.weight[:0]))
            store.add([record_of(bank.model, row, written, rewards, KEPT)])
            bar.update()
    return [store.records[row.id] for row in bank.rows]


@contextmanager
def watched(bank: Bank) -> Iterator[tuple[dict[tuple[str, int], Tensor], dict[str, Tensor]]]:
    """Notes Q of every invocation, and the visual tokens of every row that invokes, while the context lasts."""
    queries: dict[tuple[str, int], Tensor] = {}
    shown: dict[str, Tensor] = {}

    def wrap(form: Form) -> Form:
        def watching(kind: Kind, seen: list[Observation]) -> Sequence[Any]:
            found = bank.model.memory.builder([one.visual for one in seen], [one.states for one in seen])
            for one, query in zip(seen, found, strict=True):
                queries[one.origin] = query
                shown.setdefault(one.origin[0], pooled(one.visual, VISUAL_KEPT))
            return form(kind, seen)

        return watching

    with formed_by(bank.model, wrap):
        yield queries, shown
