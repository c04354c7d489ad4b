"""Conversations as training tensors: token ids, loss weights, images and what the cells of a scene hold.

The ids are those that the processor's chat template gives (a test says so). With `rng`, some images are shown again
inside replies and some stray delimiters are slipped in, so that the base takes neither amiss.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from vismem.pocket.conversations import Conversation
from vismem.pocket.tokenizer import ASSISTANT, DELIMITERS, END, FAKE, GLOBAL, IMAGE, IMAGE_TOKENS, USER
from vismem.pocket.world import COLOUR_NAMES, LABEL_NAMES, SHAPE_NAMES, SIDE, Scene

# How much a reply counts in the loss by turns since its image: old evidence is mostly noise to learn from.
AGE_WEIGHTS = (1.0, 1.0, 0.5, 0.25)
CELL_SIZES = (10, len(COLOUR_NAMES), len(SHAPE_NAMES), len(LABEL_NAMES), SIDE, SIDE)  # + row, column


@dataclass
class Encoded:
    """One conversation. `weights[i]` is the loss weight of predicting `ids[i]`; `shown[j]` is the picture behind the
    j-th run of image tokens."""

    ids: list[int]
    weights: list[float]
    shown: list[int]


class Encoder:
    """Turns conversations into `Encoded`, with the tokenizer's special ids at hand."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        get = tokenizer.convert_tokens_to_ids
        self.user, self.assistant, self.end, self.image = get(USER), get(ASSISTANT), get(END), get(IMAGE)
        self.fake, self.overview = get(FAKE), get(GLOBAL)
        self.delimiters = [self.text(delimiter)[0] for delimiter in DELIMITERS]

    def text(self, text: str) -> list[int]:
        if text not in self.cache:
            if len(self.cache) > 200_000:
                self.cache.clear()
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]

    def image_block(self) -> list[int]:
        """What the processor puts in an image's place: 19 ids, 16 of them visual."""
        return [self.fake, self.overview, *[self.image] * IMAGE_TOKENS, self.fake]

    def encode(self, conversation: Conversation, rng: Random | None = None, limit: int = 320) -> Encoded:
        """All turns with their replies; with `rng`, augmented; no turn begins after `limit` tokens."""
        out = Encoded([], [], [])
        pair = False
        for turn in conversation.turns:
            if len(out.ids) > limit:
                break
            self._add(out, [self.user], 0.0)
            if rng and rng.random() < 0.04:
                self._add(out, [rng.choice(self.delimiters)], 0.0)
            for part in turn.user:
                if isinstance(part, int):
                    self._add(out, self.image_block(), 0.0)
                    out.shown.append(part)
                else:
                    self._add(out, self.text(part), 0.0)
            pair = sum(isinstance(part, int) for part in turn.user) > 1 or (pair and turn.since != 0)
            self._add(out, [self.end, self.assistant], 0.0)
            weight = AGE_WEIGHTS[min(turn.since or 0, len(AGE_WEIGHTS) - 1)]
            self._add_reply(out, self.text(turn.question.reply), weight, turn.since, pair, rng)
        return out

    def _add(self, out: Encoded, ids: list[int], weight: float) -> None:
        out.ids += ids
        out.weights += [weight] * len(ids)

    def _add_reply(self, out: Encoded, reply: list[int], weight: float, since, pair: bool, rng) -> None:
        """The reply and its end token; maybe with its image again at its start or after a sentence."""
        breaks: set[int] = set()
        if rng and out.shown and not pair and since is not None:
            if rng.random() < (0.6 if since else 0.1):
                breaks.add(0)
            stops = [i + 1 for i, token in enumerate(reply[:-1]) if token == self.delimiters[0]]
            if stops and rng.random() < 0.25:
                breaks.update(stops if rng.random() < 0.4 else [rng.choice(stops)])
        for place, token in enumerate(reply):
            if place in breaks:
                self._look_again(out, rng)
                weight = 1.0
            elif rng and rng.random() < (0.06 if place == 0 else 0.004):
                self._add(out, [rng.choice(self.delimiters)], 0.0)
            self._add(out, [token], weight)
        self._add(out, [self.end], weight)

    def _look_again(self, out: Encoded, rng: Random) -> None:
        """The latest image once more: as the processor writes it, or bare between two delimiters."""
        if rng.random() < 0.3:
            self._add(out, self.image_block(), 0.0)
        else:
            mark = rng.choice(self.delimiters)
            last = mark if rng.random() < 0.7 else rng.choice(self.delimiters)
            self._add(out, [mark, *[self.image] * IMAGE_TOKENS, last], 0.0)
        out.shown.append(out.shown[-1])


@dataclass
class Batch:
    """ids and weights [B, L] (padded right), pixels [U, 3, 64, 64] (each picture once), shown [runs] into pixels,
    cells [U, 16, 6] (digit, colour, shape, label, row, column; -100 where a picture is no shelf)."""

    ids: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor
    shown: torch.Tensor
    cells: torch.Tensor
    mask: torch.Tensor | None = None  # packed rows only: additive [B, 1, L, L], and
    positions: torch.Tensor | None = None  # positions [B, L]


def cell_labels(scene: Scene | None) -> np.ndarray:
    """What each cell holds, [16, 6], in the order of the visual tokens (row by row)."""
    if scene is None:
        return np.full((SIDE * SIDE, 6), -100)
    return np.array(
        [
            (
                scene.prices[r][c],
                COLOUR_NAMES.index(scene.colours[r][c]),
                SHAPE_NAMES.index(scene.shapes[r][c]),
                LABEL_NAMES.index(scene.labels[r]),
                r,
                c,
            )
            for r in range(SIDE)
            for c in range(SIDE)
        ]
    )


def normalise(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [U, 64, 64, 3] -> float [U, 3, 64, 64], as the processor does (mean 0.5, deviation 0.5)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def collate(conversations: list[Conversation], encoded: list[Encoded], pad: int) -> Batch:
    """Encoded conversations as one batch."""
    length = max(len(one.ids) for one in encoded)
    ids = torch.full((len(encoded), length), pad)
    weights = torch.zeros(len(encoded), length)
    pictures, cells, shown = [], [], []
    for i, (conversation, one) in enumerate(zip(conversations, encoded, strict=True)):
        ids[i, : len(one.ids)] = torch.tensor(one.ids)
        weights[i, : len(one.ids)] = torch.tensor(one.weights)
        shown += [len(pictures) + index for index in one.shown]
        pictures += conversation.pictures
        cells += [cell_labels(scene) for scene in conversation.scenes]
    pixels, cells = stack_pictures(pictures, cells)
    return Batch(ids, weights, pixels, torch.tensor(shown, dtype=torch.long), cells)


def stack_pictures(pictures: list[np.ndarray], cells: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and their cells' labels as tensors [U, 3, 64, 64] and [U, 16, 6]; U may be 0."""
    if not pictures:
        return torch.zeros(0, 3, 64, 64), torch.zeros(0, SIDE * SIDE, len(CELL_SIZES), dtype=torch.long)
    return normalise(np.stack(pictures)), torch.from_numpy(np.stack(cells))


def prompt_batch(prompts: list[list[int]], pictures: list[list[np.ndarray]], pad: int, dtype: torch.dtype) -> dict:
    """Prompts as the processor would batch them: `input_ids`, `attention_mask` [B, P] padded on the left, and where any
    row has a picture `pixel_values` [B, most, 3, 64, 64], zero where a row has fewer."""
    longest, most = max(map(len, prompts)), max(map(len, pictures))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    pixels = torch.zeros(len(prompts), most, 3, 64, 64)
    for row, (prompt, shown) in enumerate(zip(prompts, pictures, strict=True)):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
        if shown:
            pixels[row, : len(shown)] = normalise(np.stack(shown))
    return {"input_ids": ids, "attention_mask": mask, **({"pixel_values": pixels.to(dtype)} if most else {})}
