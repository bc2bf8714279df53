"""Pictures to pixel values: padded to a square, resized to one tile, normalised. PIL and NumPy only."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class HaploImageProcessor(BaseImageProcessor):
    """One square tile per picture: padded with the mean colour, bicubic resize to `image_size` pixels."""

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 336,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """A picture or a list of pictures → pixel_values [N, 3, image_size, image_size] float32."""
        pictures = images if isinstance(images, (list, tuple)) else [images]
        pixels = np.stack([self._tile(self._rgb(picture)) for picture in pictures])
        return BatchFeature({"pixel_values": torch.from_numpy(pixels) if return_tensors == "pt" else pixels})

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    @staticmethod
    def _rgb(picture: Any) -> Image.Image:
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        if not isinstance(picture, Image.Image):
            raise ValueError(f"expected a PIL image or an array of pixels, found {type(picture).__name__}")
        if 0 in picture.size:
            raise ValueError(f"a picture of {picture.size[0]}x{picture.size[1]} pixels is empty")
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            # White paper behind what is transparent, as most viewers show it.
            shown = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
        return picture if picture.mode == "RGB" else picture.convert("RGB")

    def _tile(self, picture: Image.Image) -> np.ndarray:
        side = max(picture.size)
        if picture.size != (side, side):
            fill = tuple(round(255 * mean) for mean in self.image_mean)
            square = Image.new("RGB", (side, side), fill)
            square.paste(picture, ((side - picture.size[0]) // 2, (side - picture.size[1]) // 2))
            picture = square
        if side != self.image_size:
            picture = picture.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture, dtype=np.float32) / 255.0
        pixels = (pixels - np.float32(self.image_mean)) / np.float32(self.image_std)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
