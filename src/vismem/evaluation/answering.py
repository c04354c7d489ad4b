"""Answers rows: the model writes the answers in one live batch, rewards score them, and a file saves them.

Decoding is greedy by default. Invocation is a name, a policy, or `"placed"`, which follows the row's column `places`.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm

from vismem.data import BadRowError, Row, reward_columns, row_inputs
from vismem.decoding.policies import After, Policy, Random, read_policy
from vismem.decoding.prepare import context_of
from vismem.decoding.queue import Answer, Request
from vismem.escaping import visible
from vismem.evaluation.records import Record, RecordFile
from vismem.model import VisMem
from vismem.tokens import single_token_id
from vismem.training.rewards import Rewards, load_rewards
from vismem.training.rollout import seed_of

log = logging.getLogger(__name__)
KEPT = ("benchmark", "suite", "cell", "ability", "task", "subtask", "distance")  # columns that records keep
PLACED_AFTER = ":"  # the marker that the column `places` counts


def answer(
    model: VisMem,
    rows: Sequence[Row],
    rewards: Any,
    *,
    invocation: str | Policy = "learned",
    batch_size: int = 16,
    max_new_tokens: int = 256,
    seed: int = 0,
    store: RecordFile | None = None,
    label: str = "",
    keep: Sequence[str] = KEPT,
    on_answer: Callable[[str, Answer], object] | None = None,
    **generation: Any,
) -> list[Record]:
    """Answers rows and scores the answers.

    Args:
        model: the model.
        rows: the questions, with distinct ids.
        rewards: names, functions, or the result of `load_rewards`.
        invocation: as in `generate`, or a policy as text such as `"random:0.5"`. A random policy is seeded by each
            row's id, so it does not depend on the batch. `"placed"` invokes memory as each row's column `places` says:
            pairs of n and kind, after the reply's n-th colon.
        batch_size: rows decoded together.
        max_new_tokens: sampled tokens per answer.
        seed: of sampling, with `do_sample`.
        store: a file with the answers of an earlier run; receives the new ones as they come.
        label: for the progress bar.
        keep: columns that the records keep.
        on_answer: called with each new answer and its row's id, before the record is saved.
        **generation: keywords of `generate`.

    Returns:
        A record for each row, in order. A row that cannot be answered has a record with its `error` and the score 0;
        a warning gives their number.

    Raises:
        ValueError: if two rows share an id, `"placed"` is given and a row has no `places`, or no row can be answered.
        RewardError: if a reward fails.
    """
    scorer = rewards if isinstance(rewards, Rewards) else load_rewards(rewards)
    by_id = {row.id: row for row in rows}
    if len(by_id) != len(rows):
        ((twice, _),) = Counter(row.id for row in rows).most_common(1)
        raise ValueError(f"two questions have the id {twice!r}; ids must be unique")
    done = {} if store is None else {i: record for i, record in store.records.items() if i in by_id}
    missing = [row for row in rows if row.id not in done]
    settings = {"do_sample": False, **generation, "max_new_tokens": max_new_tokens}
    with tqdm(total=len(rows), initial=len(done), desc=visible(label or "answers"), delay=2, mininterval=1) as bar:

        def keep_record(record: Record) -> None:
            done[record.id] = record
            if store is not None:
                store.add([record])
            bar.update()

        requests = requests_for(model, missing, invocation, seed, keep_record, keep)
        for written in model.stream_batch(requests, batch_size, **settings):
            if on_answer is not None:
                on_answer(written.tag, written)
            keep_record(record_of(model, by_id[written.tag], written, scorer, keep))
    records = [done[row.id] for row in rows]
    report_failures(records, label or "answers")
    return records


def requests_for(
    model: VisMem,
    rows: Sequence[Row],
    invocation: str | Policy,
    seed: int,
    failed: Callable[[Record], object],
    keep: Sequence[str] = KEPT,
) -> Iterator[Request]:
    """A request for each row, created when the batch has room; `failed` receives records of rows that are rejected."""
    for row in rows:
        try:
            inputs = row_inputs(model.processor, row, context_of(model.base))
        except BadRowError as error:
            failed(Record.failed(row.id, str(error), kept_columns(row, keep)))
            continue
        yield Request(model.move_inputs(inputs), policy_for(model, row, invocation), seed_of(seed, row.id), tag=row.id)


def answerable(model: VisMem, rows: Sequence[Row]) -> tuple[list[Row], list[Record]]:
    """The rows that the model's processor accepts, and an error record for each of the others."""
    found: list[Row] = []
    failed: list[Record] = []
    for row in rows:
        try:
            row_inputs(model.processor, row, context_of(model.base))
            found.append(row)
        except BadRowError as error:
            failed.append(Record.failed(row.id, str(error)))
    return found, failed


def report_failures(records: Sequence[Record], label: str) -> None:
    """Logs a warning about questions without an answer. Raises ValueError if none has one."""
    failed = [record for record in records if record.error]
    if not failed:
        return
    first = f"{failed[0].id}: {failed[0].error}"
    if len(failed) == len(records):
        raise ValueError(f"{label}: none of {len(records)} questions can be answered; the first: {first}")
    log.warning(
        "%s: %d of %d questions failed and count as wrong; the first: %s", label, len(failed), len(records), first
    )


def kept_columns(row: Row, keep: Sequence[str]) -> dict[str, Any]:
    """The row's columns that its record keeps."""
    return {name: row.columns[name] for name in keep if name in row.columns}


def policy_for(model: VisMem, row: Row, invocation: str | Policy) -> str | Policy:
    """The policy of one row, with its own seed and its own `places`."""
    if invocation == "placed":
        if "places" not in row.columns:
            raise ValueError(f"{row.id} has no column `places`, which invocation='placed' needs")
        marker = single_token_id(model.processor.tokenizer, (PLACED_AFTER,))
        return After(marker, {int(n): kind for n, kind in row.columns["places"]})
    policy = read_policy(invocation) if isinstance(invocation, str) else invocation
    if isinstance(policy, Random) and isinstance(policy.seed, int):
        policy = copy.copy(policy)
        policy.seed = seed_of(policy.seed, row.id)
    return policy


def record_of(model: VisMem, row: Row, written: Answer, rewards: Rewards, keep: Sequence[str]) -> Record:
    """The record of one answer: its score, or its error."""
    if written.error is not None:
        return Record.failed(row.id, str(written.error) or type(written.error).__name__, kept_columns(row, keep))
    reply = model.processor.tokenizer.decode(written.tokens, skip_special_tokens=True)
    return Record(
        id=row.id,
        score=scores([row], [reply], [written.tokens], rewards)[0],
        reply=reply,
        tokens=len(written.tokens),
        sampled=written.sampled,
        columns=kept_columns(row, keep),
        **trace_of(model, written),
    )


def trace_of(model: VisMem, written: Answer) -> dict[str, Any]:
    """An answer's `delimiters`, `invocations` and `finish`, as its record has them."""
    chosen = sum(not invocation.forced for invocation in written.invocations)
    return {
        "delimiters": sum(token in model.delimiters for token in written.tokens) + chosen,
        "invocations": [invocation.to_dict() for invocation in written.invocations],
        "finish": str(written.finish),
    }


def scores(rows: Sequence[Row], replies: Sequence[str], tokens: Sequence[list[int]], rewards: Rewards) -> list[float]:
    """The rewards' totals for some replies."""
    completions = [[{"role": "assistant", "content": reply}] for reply in replies]
    columns = {**reward_columns(rows), "completion_ids": list(tokens), "trainer_state": None}
    return rewards([row.prompt for row in rows], completions, columns).total.tolist()
