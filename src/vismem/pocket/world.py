"""The pocket world: shelves of 4x4 items with handwritten prices, coloured tags and promotion labels.

A `Scene` is plain data; `render_array` draws it as a 64x64 picture, one 16x16 block an item. Prices are real
handwritten digits (scikit-learn's `load_digits`); train and test scenes use different handwriting. `tasks.py` has the
questions about a scene. `PROMOTION_RULES` says which label stands for which rule; the base was never told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import TypeVar

import numpy as np
from PIL import Image

T = TypeVar("T")

SIDE = 4  # items in a row, rows in a shelf
CELL = 16  # pixels an item; two 8-pixel patches, so one visual token after the 2x2 pixel shuffle
IMAGE_SIZE = SIDE * CELL
NOISE = 5.0  # standard deviation of a photograph's pixels
TEST_SHARE = 4  # every fourth handwritten digit belongs to the test split

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 45, 42),
    "orange": (245, 150, 30),
    "green": (45, 160, 60),
    "blue": (40, 90, 215),
    "purple": (145, 60, 175),
    "black": (30, 30, 34),
}

SHAPES: dict[str, tuple[str, ...]] = {
    "square": ("111111", "111111", "111111", "111111", "111111", "111111"),
    "triangle": ("000000", "001100", "001100", "011110", "011110", "111111"),
    "cross": ("001100", "001100", "111111", "111111", "001100", "001100"),
    "ring": ("011110", "110011", "100001", "100001", "110011", "011110"),
}

# A label is the design of the shelf's front edge under a row: (first colour, second colour, pattern).
LABELS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], str]] = {
    "striped": ((205, 30, 45), (255, 255, 255), "striped"),
    "dotted": ((255, 255, 255), (30, 80, 200), "dotted"),
    "checked": ((20, 20, 20), (250, 250, 250), "checked"),
    "gold": ((242, 190, 20), (242, 190, 20), "plain"),
    "mint": ((70, 205, 170), (70, 205, 170), "plain"),
    "dark": ((52, 38, 70), (52, 38, 70), "plain"),
}

COLOUR_NAMES, SHAPE_NAMES, LABEL_NAMES = tuple(COLOURS), tuple(SHAPES), tuple(LABELS)


@dataclass(frozen=True)
class Rule:
    """A promotion on a row of four prices: what (`action`) happens to which item (`target`)."""

    target: str  # first, second, third, last or each
    action: str  # free, double, plus 1, plus 2 or plus 3

    @property
    def words(self) -> str:
        return f"{self.target} {self.action}"

    def apply(self, prices: Sequence[int]) -> list[int]:
        """Four prices -> four prices after the promotion."""
        places = {"first": [0], "second": [1], "third": [2], "last": [3], "each": [0, 1, 2, 3]}[self.target]
        paid = list(prices)
        for i in places:
            if self.action == "free":
                paid[i] = 0
            else:
                paid[i] += paid[i] if self.action == "double" else int(self.action.removeprefix("plus "))
        return paid


RULES: tuple[Rule, ...] = tuple(
    Rule(target, action)
    for target in ("first", "second", "third", "last", "each")
    for action in ("free", "double", "plus 1", "plus 2", "plus 3")
    if (target, action) != ("each", "free")
)

# The knowledge that the base never gets: which label means which rule. Long-term memory has to supply it.
PROMOTION_RULES: dict[str, Rule] = {
    "striped": Rule("first", "free"),
    "dotted": Rule("last", "double"),
    "checked": Rule("second", "free"),
    "gold": Rule("each", "plus 1"),
    "mint": Rule("third", "double"),
    "dark": Rule("last", "plus 3"),
}


@dataclass(frozen=True)
class Scene:
    """One shelf. The four grids are indexed [row][column], `labels` [row]; `seed` fixes jitter and noise."""

    prices: tuple[tuple[int, ...], ...]
    digits: tuple[tuple[int, ...], ...]  # indices into load_digits
    colours: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    seed: int

    def tag(self, row: int, column: int) -> str:
        return f"{self.colours[row][column]} {self.shapes[row][column]}"


@lru_cache(maxsize=1)
def load_handwriting() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: images [1797, 8, 8] in 0..1 and their values [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the pocket world needs scikit-learn: pip install 'vismem[pocket]'") from error
    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target


@lru_cache(maxsize=2)
def digit_indices(split: str) -> dict[int, tuple[int, ...]]:
    """For each value 0-9, the indices of the handwritten digits of a split ("train" or "test")."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    values = load_handwriting()[1]
    chosen = [i for i in range(len(values)) if (i % TEST_SHARE == 0) == (split == "test")]
    return {value: tuple(i for i in chosen if values[i] == value) for value in range(10)}


def _grid(draw: Callable[[], T]) -> tuple[tuple[T, ...], ...]:
    return tuple(tuple(draw() for _ in range(SIDE)) for _ in range(SIDE))


def _tags(rng: Random, names: tuple[str, ...], tidy: float) -> tuple[tuple[str, ...], ...]:
    """Random tags for all cells or, with probability `tidy`, the same in a row, in a column or everywhere."""
    if rng.random() >= tidy:
        return _grid(lambda: rng.choice(names))
    drawn = [rng.choice(names) for _ in range(SIDE)]
    layout = rng.choice(("rows", "columns", "all"))
    by_layout = {"rows": lambda r, _: drawn[r], "columns": lambda _, c: drawn[c], "all": lambda *_: drawn[0]}
    return tuple(tuple(by_layout[layout](r, c) for c in range(SIDE)) for r in range(SIDE))


def sample_scene(rng: Random, split: str = "train", tidy: float = 0.0) -> Scene:
    """A random shelf whose handwriting comes from `split`; the four rows carry four different labels.

    `tidy` is the share of shelves whose colours are the same in rows, columns or everywhere, and, independently, of
    those whose shapes are. From these the base learns to name a tag before it can tell sixteen of them apart.
    """
    indices = digit_indices(split)
    prices = _grid(lambda: rng.randrange(10))
    return Scene(
        prices=prices,
        digits=tuple(tuple(rng.choice(indices[value]) for value in row) for row in prices),
        colours=_tags(rng, COLOUR_NAMES, tidy),
        shapes=_tags(rng, SHAPE_NAMES, tidy),
        labels=tuple(rng.sample(LABEL_NAMES, SIDE)),
        seed=rng.randrange(2**31),
    )


def change_one_price(scene: Scene, row: int, column: int, rng: Random, split: str) -> Scene:
    """The same shelf photographed again (new jitter and noise) after one price has changed."""
    old = scene.prices[row][column]
    new = rng.choice([value for value in range(10) if value != old])
    index = rng.choice(digit_indices(split)[new])

    def put(grid: tuple[tuple[int, ...], ...], value: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(value if (r, c) == (row, column) else grid[r][c] for c in range(SIDE)) for r in range(SIDE))

    seed = rng.randrange(2**31)
    return replace(scene, prices=put(scene.prices, new), digits=put(scene.digits, index), seed=seed)


def handwritten(index: int) -> Image.Image:
    """A handwritten digit as a picture of 32x32 pixels."""
    pixels = (load_handwriting()[0][index] * 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)


@lru_cache(maxsize=65536)
def ink(index: int, turn: int, size: int) -> np.ndarray:
    """A handwritten digit as ink coverage [size, size] in 0..1, rotated by `turn` degrees."""
    picture = (
        handwritten(index).rotate(turn, resample=Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BOX)
    )
    return np.asarray(picture, dtype=np.float32) / 255


@lru_cache(maxsize=8)
def _edge(label: str) -> np.ndarray:
    """The shelf's front edge in a label's design: [3, 64, 3]."""
    first, second, pattern = LABELS[label]
    y, x = np.mgrid[0:3, 0:IMAGE_SIZE]
    where = {
        "striped": (x // 2) % 2 == 1,
        "dotted": ((x % 4) < 2) & (y == 1) | ((x % 4) < 1),
        "checked": (x // 2 + y // 2) % 2 == 1,
        "plain": np.zeros_like(x, dtype=bool),
    }[pattern]
    return np.where(where[..., None], np.array(second), np.array(first)).astype(np.float32)


@lru_cache(maxsize=4)
def _shape_mask(shape: str) -> np.ndarray:
    return np.array([[pixel == "1" for pixel in line] for line in SHAPES[shape]])


def render_array(scene: Scene, ink: Callable[[int, int, int], np.ndarray] = ink) -> np.ndarray:
    """Draws a scene: uint8 array [64, 64, 3]. The same scene gives the same picture, pixel for pixel.

    `ink` draws a digit, from its index, the degrees it is rotated by and its size.
    """
    rng = np.random.default_rng(scene.seed)
    light = rng.uniform(0.94, 1.04)
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:] = (244, 236, 222)
    jitter = rng.integers(0, 2, size=(SIDE, SIDE, 2))
    turns = rng.integers(-8, 9, size=(SIDE, SIDE))
    for row in range(SIDE):
        top = row * CELL
        for column in range(SIDE):
            left, (dy, ty) = column * CELL, jitter[row, column]
            drawn = ink(scene.digits[row][column], int(turns[row, column]), 11)[..., None]
            block = canvas[top + dy : top + dy + 11, left + 5 : left + 16]
            block *= 1 - drawn
            block += drawn * np.array((28, 32, 60), dtype=np.float32)
            corner = canvas[top + 1 + 4 * ty : top + 7 + 4 * ty, left : left + 6]
            corner[_shape_mask(scene.shapes[row][column])] = COLOURS[scene.colours[row][column]]
        canvas[top + CELL - 3 : top + CELL] = _edge(scene.labels[row])
    photograph = canvas * light + rng.normal(0, NOISE, canvas.shape)
    return np.clip(photograph, 0, 255).astype(np.uint8)
