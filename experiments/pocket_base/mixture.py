"""The language stage's training data: packed questions first, then conversations; reading tasks before the rest."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from pocket_base.architecture import WINDOW
from pocket_base.batches import Batch, Encoder, collate
from pocket_base.conversations import sample_training_conversation
from pocket_base.packing import collate_rows, pack


def training_batches(tokenizer, recipe, start: int) -> Iterator[Batch]:
    """Endless batches for `build.Recipe`, from step `start` on. Each pool depends on (seed, step) alone."""
    encoder, pad = Encoder(tokenizer), tokenizer.pad_token_id
    step = start
    while True:
        rng = Random(f"{recipe.seed}-{step}")
        done = step / recipe.language_steps
        early = done < recipe.early_share
        packed = recipe.packed_share if done < recipe.reading_share else recipe.packed_share_later
        if rng.random() < packed:
            pool = _packed_batches(rng, encoder, recipe.tokens, early, pad)
        else:
            pool = _conversation_batches(rng, encoder, recipe.tokens, early, pad)
        for batch in pool:
            yield batch
            step += 1


def _packed_batches(rng: Random, encoder: Encoder, tokens: int, early: bool, pad: int) -> list[Batch]:
    return [
        collate_rows([pack(rng, encoder, early) for _ in range(max(tokens // 256, 1))], pad, WINDOW) for _ in range(4)
    ]


def _conversation_batches(rng: Random, encoder: Encoder, tokens: int, early: bool, pad: int) -> list[Batch]:
    """Groups conversations of similar length, so that there is little padding."""
    pool = [sample_training_conversation(rng, early) for _ in range(48)]
    pairs = [(conversation, encoder.encode(conversation, rng)) for conversation in pool]
    pairs.sort(key=lambda pair: len(pair[1].ids), reverse=rng.random() < 0.5)
    groups, group = [], []
    for pair in pairs:
        longest = max(len(one[1].ids) for one in (*group, pair))
        if group and longest * (len(group) + 1) > tokens:
            groups.append(group)
            group = []
        group.append(pair)
    if len(group) > 6 or not groups:  # a small remainder would be a noisy step
        groups.append(group)
    rng.shuffle(groups)
    return [collate([pair[0] for pair in group], [pair[1] for pair in group], pad) for group in groups]
