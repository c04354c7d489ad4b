"""Many questions about one image packed in one row: each attends to the image and itself, not to the others.

The base learns to read images from these rows, which hold about three times as many replies per token as conversations.
Conversations teach it to keep images apart, to lose them and to be shown them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch

from pocket_base import drills
from pocket_base.batches import Batch, Encoded, Encoder, cell_labels, stack_pictures
from pocket_base.conversations import EARLY_WEIGHTS, TIDY, TRAINING_WEIGHTS, easy_vqa_question, training_rule
from pocket_base.handwriting import render_varied
from vismem.pocket import easyvqa
from vismem.pocket.tasks import ask, compare, difference
from vismem.pocket.world import SIDE, Scene, change_one_price, sample_scene

DRILLS = 0.4  # of the rows: sums and promotions on prices in words, cheap practice for the replies' steps


@dataclass
class Row:
    """One packed row. Block 0 is the shared image, blocks 1.. the questions; `positions` restart in each."""

    pictures: list[np.ndarray]
    scenes: list[Scene | None]
    encoded: Encoded = field(default_factory=Encoded)
    blocks: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)


def _content(rng: Random, early: bool):
    """Pictures, their scenes, and a source of questions about them."""
    kind = rng.random()
    if kind < DRILLS and not early:
        return [], [], lambda: drills.sample(rng)
    kind = rng.random()
    if kind < 0.1:
        picture, pairs = easyvqa.sample_image(rng, "train")

        def draw():
            return easy_vqa_question(*rng.choice(pairs))

        return [picture], [None], draw
    first = sample_scene(rng, tidy=TIDY)
    if kind < 0.17 and not early:
        changed = rng.random() < 0.25
        if changed:
            second = change_one_price(first, rng.randrange(SIDE), rng.randrange(SIDE), rng, "train")
        else:
            second = sample_scene(rng)
        pictures = [render_varied(scene) for scene in (first, second)]
        return pictures, [first, second], lambda: (difference if changed else compare)(first, second, rng)
    weights = {**(EARLY_WEIGHTS if early else TRAINING_WEIGHTS), "describe": 0.5}
    tasks, shares = tuple(weights), tuple(weights.values())

    def draw():
        return ask(first, rng, rng.choices(tasks, shares)[0], training_rule(rng))

    return [render_varied(first)], [first], draw


def pack(rng: Random, encoder: Encoder, early: bool, length: int = 256) -> Row:
    """One row of about `length` tokens."""
    pictures, scenes, draw = _content(rng, early)
    row = Row(pictures, scenes)
    out = row.encoded
    out.add([encoder.user] + encoder.image_block() * len(pictures))
    for picture in range(len(pictures)):
        out.show(picture)
    prefix = len(out.ids)
    row.blocks, row.positions = [0] * prefix, list(range(prefix))
    again = 0 if len(pictures) == 1 else None
    block = 0
    while len(out.ids) < length - 12 and (len(pictures) < 2 or block < 6):
        question, block, start = draw(), block + 1, len(out.ids)
        out.add([*encoder.text(question.text), encoder.end, encoder.assistant])
        encoder.add_reply(out, question, again=again, rng=rng)
        added = len(out.ids) - start
        row.blocks += [block] * added
        row.positions += range(prefix, prefix + added)
    return row


def collate_rows(rows: list[Row], pad: int, window: int) -> Batch:
    """Packed rows as a batch with an additive mask [B, 1, L, L] that keeps blocks apart and holds the window."""
    length = max(len(row.blocks) for row in rows)
    ids, weights = torch.full((len(rows), length), pad), torch.zeros(len(rows), length)
    blocks = torch.full((len(rows), length), -1)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    pictures, cells, visual = [], [], []
    for i, row in enumerate(rows):
        n = len(row.blocks)
        ids[i, :n], weights[i, :n] = torch.tensor(row.encoded.ids), torch.tensor(row.encoded.weights)
        blocks[i, :n], positions[i, :n] = torch.tensor(row.blocks), torch.tensor(row.positions)
        visual += row.encoded.visual(len(pictures))
        pictures += row.pictures
        cells += [cell_labels(scene) for scene in row.scenes]
    order = torch.arange(length)
    same = (blocks[:, :, None] == blocks[:, None, :]) | (blocks[:, None, :] == 0)
    near = positions[:, :, None] - positions[:, None, :] < window
    allowed = same & near & (order[:, None] >= order[None, :])
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)[:, None]
    pixels, cells = stack_pictures(pictures, cells)
    return Batch(ids, weights, pixels, torch.tensor(visual, dtype=torch.long), cells, mask, positions)
