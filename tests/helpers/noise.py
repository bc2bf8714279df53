"""Noise as pictures: the same on every machine, where PIL's own differs from run to run."""

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of uniform noise; equal calls, equal pictures."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
