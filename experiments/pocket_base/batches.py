"""Conversations as training tensors: token ids, loss weights, images and the labels of their cells.

The ids equal those of the processor's chat template (tested). With `rng`, replies are augmented so the base can use
what a memory will later insert: looks (the image again, or some of its cells, mostly right after the reply's first
colon), notes (a promotion's rule in words after the label's colon) and stray delimiters. The base is never trained to
predict any of these.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch

from pocket_base.tokenizer import ASSISTANT, DELIMITERS, END, FAKE, GLOBAL, IMAGE, IMAGE_TOKENS, USER
from vismem.pocket.conversations import Conversation
from vismem.pocket.tasks import Question
from vismem.pocket.world import COLOUR_NAMES, LABEL_NAMES, RULES, SHAPE_NAMES, SIDE, Scene

# How much a reply counts in the loss by turns since its image, unless it is shown again: old evidence is mostly noise
# to learn from. The echo always counts in full.
AGE_WEIGHTS = (1.0, 1.0, 0.15, 0.1)
LOOK_SHARES = (0.12, 0.6, 0.75)  # of the replies, by turns since the image
DESCRIPTION_LOOK_SHARE = 0.5  # a description is long enough to lose its image
FULL_LOOK_SHARE = 0.15  # of the looks, as the processor writes an image; the others are bare
PARTIAL_SHARE, PARTIAL_SIZES = 0.25, (2, 4, 8)  # of the bare looks that show some cells only, and how many
NOTE_LENGTH = 16  # tokens at most
STRAY_NOTE_SHARE = 0.04  # of the replies that need no note
ALL_CELLS = tuple(range(SIDE * SIDE))
CELL_SIZES = (10, len(COLOUR_NAMES), len(SHAPE_NAMES), len(LABEL_NAMES), SIDE, SIDE)  # + row, column


@dataclass
class Encoded:
    """One conversation. `weights[i]` is the loss weight of predicting `ids[i]`; `shown[j]` is the picture behind the
    j-th run of image tokens and `cells[j]` says which of its 16 cells the run holds, in reading order."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    cells: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, ids: list[int], weight: float = 0.0) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def show(self, picture: int, cells: tuple[int, ...] = ALL_CELLS) -> None:
        self.shown.append(picture)
        self.cells.append(cells)

    def visual(self, first: int = 0) -> list[int]:
        """For each image token its place among the visual tokens of all pictures, the first of which is `first`."""
        runs = zip(self.shown, self.cells, strict=True)
        return [(first + picture) * len(ALL_CELLS) + cell for picture, cells in runs for cell in cells]


class Encoder:
    """Turns conversations into `Encoded`, with the tokenizer's special ids at hand."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        get = tokenizer.convert_tokens_to_ids
        self.user, self.assistant, self.end, self.image = get(USER), get(ASSISTANT), get(END), get(IMAGE)
        self.fake, self.overview = get(FAKE), get(GLOBAL)
        self.delimiters = [self.text(delimiter)[0] for delimiter in DELIMITERS]
        self.colon = self.text(":")[0]

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
        out = Encoded()
        pair = False
        for turn in conversation.turns:
            if len(out.ids) > limit:
                break
            out.add([self.user])
            if rng and rng.random() < 0.04:
                out.add([rng.choice(self.delimiters)])
            for part in turn.user:
                if isinstance(part, int):
                    out.add(self.image_block())
                    out.show(part)
                else:
                    out.add(self.text(part))
            pair = sum(isinstance(part, int) for part in turn.user) > 1 or (pair and turn.since != 0)
            out.add([self.end, self.assistant])
            again = out.shown[-1] if out.shown and not pair and turn.since is not None else None
            self.add_reply(out, turn.question, turn.since or 0, again, rng)
        return out

    def echo(self, question: Question) -> list[int]:
        """What a reply begins with, up to and including its first colon."""
        return self.text(f"{question.echo}:") if question.echo else []

    def add_reply(
        self, out: Encoded, question: Question, since: int = 0, again: int | None = None, rng: Random | None = None
    ) -> None:
        """The reply and its end token; with `rng`, looks at the picture `again`, notes and stray delimiters in it."""
        reply, echo = self.text(question.reply), len(self.echo(question))
        looks, notes = set(), {}
        if rng:
            looks = self._look_places(question, reply, since, rng) if again is not None else set()
            notes = self._notes(question, reply, rng)
        weight = AGE_WEIGHTS[min(since, len(AGE_WEIGHTS) - 1)]
        for place, token in enumerate([*reply, self.end]):
            if place in looks:
                self._look(out, question, again, rng)
                weight = 1.0
            if place in notes:
                self._insert(out, notes[place], rng)
            elif rng and place not in looks and rng.random() < (0.06 if place == 0 else 0.004):
                out.add([rng.choice(self.delimiters)])
            out.add([token], 1.0 if place < echo else weight)

    def _after(self, reply: list[int], delimiters: list[int]) -> list[int]:
        return [i + 1 for i, token in enumerate(reply[:-1]) if token in delimiters]

    def _look_places(self, question: Question, reply: list[int], since: int, rng: Random) -> set[int]:
        """Where a reply looks again: places in it, none for most replies whose image is in view."""
        if question.task.startswith("describe"):
            if rng.random() >= DESCRIPTION_LOOK_SHARE:
                return set()
            places = self._after(reply, [self.colon if rng.random() < 0.8 else self.delimiters[0]])
            return set(places if rng.random() < 0.6 else rng.sample(places, rng.randrange(1, len(places) + 1)))
        if rng.random() >= LOOK_SHARES[min(since, len(LOOK_SHARES) - 1)]:
            return set()
        where = rng.random()
        if where < 0.8 and question.echo:
            return {len(self.echo(question))}
        return {0 if where < 0.9 else rng.choice([0, *self._after(reply, self.delimiters)])}

    def _look(self, out: Encoded, question: Question, picture: int, rng: Random) -> None:
        """A picture once more: as the processor writes it, or bare, all of it or some cells."""
        if rng.random() < FULL_LOOK_SHARE:
            out.add(self.image_block())
            out.show(picture)
            return
        cells = self._some_cells(question, rng) if rng.random() < PARTIAL_SHARE else ALL_CELLS
        self._insert(out, [self.image] * len(cells), rng)
        out.show(picture, cells)

    def _some_cells(self, question: Question, rng: Random) -> tuple[int, ...]:
        """Cells that the question needs and random others; all of them if those are too many or unknown."""
        needed = {row * SIDE + column for row, column in question.cells}
        sizes = [size for size in PARTIAL_SIZES if size >= len(needed)]
        if not needed or not sizes:
            return ALL_CELLS
        others = [cell for cell in ALL_CELLS if cell not in needed]
        return tuple(sorted([*needed, *rng.sample(others, rng.choice(sizes) - len(needed))]))

    def _notes(self, question: Question, reply: list[int], rng: Random) -> dict[int, list[int]]:
        """Notes and their places: the promotion's own after the label's colon, or now and then one to be ignored."""
        if question.note:
            return {self._after(reply, [self.colon])[1]: self.note(question.note, question.label, rng)}
        if question.label or rng.random() >= STRAY_NOTE_SHARE:
            return {}
        words, label = rng.choice(RULES).words, rng.choice(LABEL_NAMES)
        return {rng.choice([0, *self._after(reply, self.delimiters)]): self.note(words, label, rng)}

    def note(self, words: str, label: str, rng: Random) -> list[int]:
        """A rule in words, one to six times, at most `NOTE_LENGTH` tokens, sometimes with its label before it."""
        once = self.text(f" {label} {words}" if rng.random() < 0.3 else f" {words}")
        return once * min(rng.randrange(1, 7), NOTE_LENGTH // len(once))

    def _insert(self, out: Encoded, ids: list[int], rng: Random) -> None:
        """Ids between two delimiters, as a memory will stand between its two tokens. The opening one replaces the
        delimiter before it (a sampled invocation), or follows it, or that delimiter serves as the opening one."""
        how = rng.random()
        if how < 0.25 and out.ids[-1] in self.delimiters:
            out.ids[-1], out.weights[-1] = self._delimiter(rng), 0.0
        elif how < 0.65:
            out.add([self._delimiter(rng)])
        out.add([*ids, self._delimiter(rng)])

    def _delimiter(self, rng: Random) -> int:
        return self.colon if rng.random() < 0.6 else rng.choice(self.delimiters)


@dataclass
class Batch:
    """ids and weights [B, L] (padded right), pixels [U, 3, 64, 64] (each picture once), visual (for each image token,
    row by row, which of the U * 16 visual tokens it is), cells [U, 16, 6] (digit, colour, shape, label, row, column;
    -100 where a picture is no shelf)."""

    ids: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor
    visual: torch.Tensor
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
    pictures, cells, visual = [], [], []
    for i, (conversation, one) in enumerate(zip(conversations, encoded, strict=True)):
        ids[i, : len(one.ids)] = torch.tensor(one.ids)
        weights[i, : len(one.ids)] = torch.tensor(one.weights)
        visual += one.visual(len(pictures))
        pictures += conversation.pictures
        cells += [cell_labels(scene) for scene in conversation.scenes]
    pixels, cells = stack_pictures(pictures, cells)
    return Batch(ids, weights, pixels, torch.tensor(visual, dtype=torch.long), cells)


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
