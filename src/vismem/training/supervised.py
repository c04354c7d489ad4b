"""Supervised examples: reference replies with invocations inserted, as a batch for the training forward.

A reply may contain invocations itself, as `<ms_I>` and `<ml_I>` in its text. Otherwise they are inserted at random:
after a delimiter, instead of one, or anywhere. Stages without memory remove them.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from vismem.config import KINDS, Kind
from vismem.decoding.policies import Occurrence
from vismem.decoding.trace import Rollout
from vismem.model import VisMem
from vismem.tokens import MemoryTokens
from vismem.training.arguments import MemoryTrainingArguments
from vismem.training.replay import collate


def with_invocations(
    words: list[int], model: VisMem, args: MemoryTrainingArguments, places: str, rng: Random, *, sighted: bool
) -> tuple[list[int], list[bool]]:
    """A reply's ids with invocations and end tokens, and which of them are words to learn.

    Args:
        words: the reply's ids, its closing token included.
        places: `"delimiter"` or `"anywhere"`.
        rng: of positions and kinds.
        sighted: whether there is an image; short-term memory needs one.
    """
    tokens, config = model.tokens, model.memory_config
    ids: list[int] = []
    learned: list[bool] = []
    kinds = [kind for kind in KINDS if sighted or kind != "short"] if args.plan.invokes != "nobody" else []
    named = any(word in tokens.kind_of for word in words)
    made, gap = 0, config.min_gap

    def invoke(kind: Kind) -> None:
        ids.extend((tokens.invocation_ids[kind], tokens.end_ids[kind]))
        learned.extend((False, False))

    words = [word for word in words if word not in tokens.end_ids.values()]  # added again after each invocation
    for index, word in enumerate(words):
        if word in tokens.kind_of:
            if tokens.kind_of[word] in kinds:
                invoke(tokens.kind_of[word])
            continue
        at_delimiter = not index or words[index - 1] in model.delimiters
        rate = args.anywhere_rate if places == "anywhere" else args.injection_rate
        free = kinds and not named and made < config.max_invocations and gap >= config.min_gap
        if free and (at_delimiter or places == "anywhere") and rng.random() < rate:
            if index and at_delimiter and rng.random() < args.replace_rate:
                ids.pop(), learned.pop()
            invoke(rng.choice(kinds))
            made, gap = made + 1, 0
        ids.append(word)
        learned.append(True)
        gap += 1
    return ids, learned


def named_places(words: list[int], tokens: MemoryTokens) -> dict[Occurrence, list[Kind]]:
    """Where a reply's ids name invocations: for each place the kinds that follow it."""
    found: dict[Occurrence, list[Kind]] = {}
    written: list[int] = []
    for word in words:
        if word in tokens.kind_of:
            place = (written[-1], written.count(written[-1])) if written else (None, 0)
            found.setdefault(place, []).append(tokens.kind_of[word])
        elif word not in tokens.end_ids.values():
            written.append(word)
    return found


def end_of_turn(model: VisMem) -> int | None:
    """The end id that closes an assistant's turn in the base's chat template; None if the base has no end id.

    A base may list several, such as Gemma 3's `<eos>` and `<end_of_turn>`, and write only one of them. A reply that
    ends with another teaches a token that the base never writes there.
    """
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]
    if len(ends) < 2:
        return ends[0] if ends else None
    reply, turns = "a reply", []
    for role, text in (("user", "a question"), ("assistant", reply), ("user", "another")):
        turns.append({"role": role, "content": [{"type": "text", "text": text}]})
    rest = model.processor.apply_chat_template(turns, tokenize=False).partition(reply)[2]
    written = model.processor.tokenizer.encode(rest, add_special_tokens=False)
    return next((token for token in written if token in ends), ends[0])


def supervised_batch(
    model: VisMem,
    prompts: dict[str, Tensor],
    replies: list[str],
    sighted: list[bool],
    rngs: list[Random],
    places: str,
    args: MemoryTrainingArguments,
) -> dict[str, Any]:
    """Prompts and reference replies as arguments of `VisMem.forward`.

    Args:
        prompts: the processor's output for B prompts, padded on the left.
        replies: their reference replies.
        sighted: whether each prompt has an image.
        rngs: one for each row.
    """
    tokenizer, end = model.processor.tokenizer, end_of_turn(model)
    examples = []
    for reply, sees, rng in zip(replies, sighted, rngs, strict=True):
        words = tokenizer.encode(reply, add_special_tokens=False)
        words = [*words, *([] if end is None else [end])][: args.max_new_tokens]  # a truncated reply has no end
        ids, learned = with_invocations(words, model, args, places, rng, sighted=sees)
        tokens, sampled = torch.tensor(ids, dtype=torch.long), torch.tensor(learned, dtype=torch.bool)
        nothing = torch.zeros(len(ids), 2, dtype=torch.bool)
        examples.append(Rollout(tokens, sampled, nothing, torch.zeros(len(ids)), []))
    return collate(prompts, examples, tokenizer.pad_token_id or 0, 1.0, formed=None)
