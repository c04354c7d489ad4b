"""easy-VQA: coloured shapes on 64x64 pictures with short questions, from the package of that name.

Its train split joins the base's training, its test split is one of the base's scores.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np

from vismem.data.images import open_image


def _package() -> Any:
    try:
        import easy_vqa
    except ImportError as error:
        raise ValueError("easy-VQA needs its package: pip install 'vismem[pocket]'") from error
    return easy_vqa


@lru_cache(maxsize=2)
def questions(split: str) -> dict[int, list[tuple[str, str]]]:
    """For each image number of a split, in order, its (question, answer) pairs."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    by_image = defaultdict(list)
    for text, answer, image in zip(*getattr(_package(), f"get_{split}_questions")(), strict=True):
        by_image[image].append((text, answer))
    return dict(sorted(by_image.items()))


@lru_cache(maxsize=2)
def _paths(split: str) -> dict[int, str]:
    return getattr(_package(), f"get_{split}_image_paths")()


@lru_cache(maxsize=8192)
def picture(split: str, image: int) -> np.ndarray:
    """An image of a split: uint8 [64, 64, 3]."""
    return np.asarray(open_image(_paths(split)[image]))


def sample_image(rng: Random, split: str) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """A random image of a split with all its (question, answer) pairs."""
    image = rng.choice(list(questions(split)))
    return picture(split, image), questions(split)[image]
