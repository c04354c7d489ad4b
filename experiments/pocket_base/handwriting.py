"""Varied handwriting: gives the base more to train on than scikit-learn's digits."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vismem.pocket.world import Scene, handwritten, render_array


def render_varied(scene: Scene) -> np.ndarray:
    """Draws a scene with each digit's handwriting distorted at random: uint8 array [64, 64, 3]."""
    rng = np.random.default_rng((scene.seed, 1))
    return render_array(scene, lambda index, turn, size: varied_ink(index, turn, size, rng))


def varied_ink(index: int, turn: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """The same digit in another handwriting: stretched, slanted, shifted, thicker or thinner."""
    wide, high = rng.uniform(0.85, 1.2, 2)
    slant, right, down = rng.uniform(-0.25, 0.25), *rng.uniform(-2, 2, 2)
    picture = handwritten(index)
    # maps the new picture's pixels to the old one's, about the centre
    across = (wide, slant, 16 - 16 * (wide + slant) + right)
    along = (0.0, high, 16 - 16 * high + down)
    picture = picture.transform((32, 32), Image.Transform.AFFINE, (*across, *along), Image.Resampling.BILINEAR)
    picture = picture.rotate(turn, resample=Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BOX)
    return (np.asarray(picture, dtype=np.float32) / 255) ** rng.uniform(0.75, 1.3)
