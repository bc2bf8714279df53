"""Pictures and video frames to pixel values: laid out in tiles, resized, normalised. PIL and NumPy only."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import logging

from haplovl.model.layout import ImageGrid, Placement, place, place_as_released, place_native
from haplovl.pictures import MAX_PIXELS, ImageError, as_picture

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

logger = logging.get_logger(__name__)


class HaploImageProcessor(BaseImageProcessor):
    """Lays pictures out in square tiles of `image_size` pixels, as haplovl.model.layout says.

    `max_tiles` 1 gives every picture one tile, padded to a square with the mean colour; more tiles show larger
    pictures in detail (any resolution). `tiling` "native" keeps size and shape of a picture, up to `image_size` pixels
    along its long side, and gives every patch a tile of its own (frames of videos are padded to a square as usual).
    "released" repeats what released checkpoints were trained with, by `image_grid_pinpoints` (heights and widths in
    pixels): black and uneven padding, transparency ignored, frames stretched.
    """

    model_input_names = ["pixel_values", "image_grids", "pixel_values_videos", "video_frames"]

    def __init__(
        self,
        image_size: int = 336,
        patch_size: int = 14,
        max_tiles: int = 1,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        tiling: Literal["haplovl", "native", "released"] = "haplovl",
        image_grid_pinpoints: Sequence[Sequence[int]] | None = None,
        max_pixels: int = MAX_PIXELS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if tiling not in ("haplovl", "native", "released"):
            raise ValueError(f"tiling is '{tiling}'; expected 'haplovl', 'native' or 'released'")
        self.image_size = image_size
        self.patch_size = patch_size
        self.max_tiles = max_tiles
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.tiling = tiling
        self.image_grid_pinpoints = [list(point) for point in image_grid_pinpoints or []]
        if tiling == "released":
            self._check_pinpoints()
        self.max_pixels = max_pixels

    def _check_pinpoints(self) -> None:
        side = self.image_size
        for point in self.image_grid_pinpoints or [[]]:
            if len(point) != 2 or not all(type(n) is int and n > 0 and n % side == 0 for n in point):
                raise ValueError(
                    f"image_grid_pinpoints is {self.image_grid_pinpoints}; expected heights and widths that are "
                    f"multiples of image_size {side}"
                )

    def place(self, height: int, width: int) -> Placement:
        """The layout of a picture of this size.

        Raises:
            ImageError: (a ValueError) none of the model's image_grid_pinpoints fits.
        """
        if self.tiling == "haplovl":
            return place(height, width, self.image_size, self.patch_size, self.max_tiles)
        if self.tiling == "native":
            return place_native(height, width, self.image_size, self.patch_size)
        if placed := self._place_as_released(height, width):
            return placed
        # No token would be left: shrunk until one row of patches is, which fits any arrangement of tiles.
        limit = self.image_size // self.patch_size
        placed = self._place_as_released(min(height, width * limit), min(width, height * limit))
        if placed is None:
            raise ImageError(f"a picture of {width}x{height} pixels fits none of the model's image_grid_pinpoints")
        return replace(placed, shrunk=True)

    def _place_as_released(self, height: int, width: int) -> Placement | None:
        points = self.image_grid_pinpoints
        return place_as_released(height, width, self.image_size, self.patch_size, points, self.max_tiles)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """A picture or a list of pictures → pixel_values [N, T, 3, s, s] float32 and image_grids [N, 8].

        s is the side of a tile: image_size, or patch_size with the tiling "native".

        Pictures with fewer than T tiles are filled up with zeros. Anything that `as_picture` takes is a picture.

        Raises:
            ImageError: (a ValueError) a picture cannot be read; it is named by its place in the list.
        """
        pictures = list(images) if isinstance(images, (list, tuple)) else [images]
        if not pictures:
            raise ImageError("no picture was given")
        laid_out = []
        for number, picture in enumerate(pictures):
            try:
                laid_out.append(self._laid_out(self._rgb(picture)))
            except ImageError as error:
                raise ImageError(f"image {number + 1} of {len(pictures)}: {error}") from None
        most = max(grid.tiles for _, grid in laid_out)
        pixels = np.zeros((len(laid_out), most, 3, self.tile_side, self.tile_side), dtype=np.float32)
        for tiles, (canvas, grid) in zip(pixels, laid_out, strict=True):
            self._cut(canvas, grid, tiles[: grid.tiles])
        grids = np.array([grid.to_list() for _, grid in laid_out])
        return _batch({"pixel_values": pixels, "image_grids": grids}, return_tensors)

    def write_tiles(self, picture: Any, grid: ImageGrid, tiles: np.ndarray) -> None:
        """Writes the pixels of one picture, whose layout is known, into `tiles` [T, 3, s, s] float32.

        For loaders: a batch's pixels are allocated once and nothing is copied.

        Raises:
            ImageError: (a ValueError) it cannot be read, or its size gives another layout.
        """
        image = self._rgb(picture)
        canvas, found = self._laid_out(image)
        if found != grid:
            raise ImageError(f"its size, {image.width}x{image.height}, gives another layout than was announced")
        self._cut(canvas, grid, tiles)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def preprocess_videos(self, videos: Sequence[Sequence[Any]], return_tensors: str | None = None) -> BatchFeature:
        """Videos → pixel_values_videos [V, F, 3, s, s] float32 and video_frames [V].

        A video is a list of frames or an array of them ([F, H, W, 3]). Videos with fewer than F frames are filled up
        with zeros.

        Raises:
            ImageError: (a ValueError) something else, a video without frames, or a frame that cannot be read.
        """
        if not videos:
            raise ImageError("no video was given")
        for number, video in enumerate(videos):
            if not (isinstance(video, (list, tuple)) or getattr(video, "ndim", 0) == 4):
                shape = f" of shape {list(video.shape)}" if hasattr(video, "shape") else ""
                raise ImageError(
                    f"video {number + 1} of {len(videos)}: expected a list of frames, an array [F, H, W, 3] or a "
                    f"file's path, found {type(video).__name__}{shape}"
                )
        most = max(len(video) for video in videos)
        pixels = np.zeros((len(videos), most, 3, self.image_size, self.image_size), dtype=np.float32)
        for number, video in enumerate(videos):
            if not len(video):
                raise ImageError(f"video {number + 1} of {len(videos)} has no frames")
            for i, frame in enumerate(video):
                try:
                    self._normalise(self._whole_tile(self._frame(self._rgb(frame))), pixels[number, i])
                except ImageError as error:
                    raise ImageError(f"video {number + 1} of {len(videos)}, frame {i + 1}: {error}") from None
        counts = np.array([len(video) for video in videos])
        return _batch({"pixel_values_videos": pixels, "video_frames": counts}, return_tensors)

    def _rgb(self, picture: Any) -> Image.Image:
        return as_picture(picture, self.max_pixels, keep_hidden=self.tiling == "released")

    def _laid_out(self, picture: Image.Image) -> tuple[Image.Image, ImageGrid]:
        """The picture on its canvas of whole tiles, and its grid."""
        placed = self.place(picture.height, picture.width)
        if placed.shrunk:
            logger.warning(
                f"a picture of {picture.width}x{picture.height} pixels is too long and narrow for the model; it was "
                f"shrunk to {placed.size[1]}x{placed.size[0]}, an aspect ratio that is allowed"
            )
        if self.tiling == "native":
            return picture.resize(placed.size[::-1], Image.Resampling.BICUBIC), placed.grid
        return self._paste(picture, placed), placed.grid

    def _cut(self, canvas: Image.Image, grid: ImageGrid, tiles: np.ndarray) -> None:
        """Cuts the canvas into its tiles, row by row, and writes their pixels into `tiles` [T, 3, s, s]."""
        side = self.tile_side
        if self.tiling == "native":  # tiles of a patch, hundreds of them: all at once
            planes = np.empty((3, canvas.height, canvas.width), dtype=np.float32)
            self._normalise(canvas, planes)
            cut = planes.reshape(3, grid.tile_rows, side, grid.tile_columns, side).transpose(1, 3, 0, 2, 4)
            tiles.reshape(cut.shape)[...] = cut
            return
        for number, pixels in enumerate(tiles):
            top, left = number // grid.tile_columns * side, number % grid.tile_columns * side
            box = (left, top, min(left + side, canvas.width), min(top + side, canvas.height))
            tile = canvas if box == (0, 0, *canvas.size) else canvas.crop(box)
            self._normalise(self._whole_tile(tile), pixels)

    def _paste(self, picture: Image.Image, placed: Placement) -> Image.Image:
        """The picture, resized, on a canvas of whole tiles."""
        height, width = placed.size
        full_height, full_width = placed.grid.tile_rows * self.image_size, placed.grid.tile_columns * self.image_size
        top, left = placed.offset
        fill = self.mean_colour
        if self.tiling == "released":
            # The released processor pads both sides alike, so a canvas of odd padding is one pixel short.
            full_height, full_width, fill = height + 2 * top, width + 2 * left, (0, 0, 0)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        if (full_width, full_height) == (width, height):
            return picture
        canvas = Image.new("RGB", (full_width, full_height), fill)
        canvas.paste(picture, (left, top))
        return canvas

    def _frame(self, picture: Image.Image) -> Image.Image:
        """One frame on the canvas of its one tile."""
        if self.tiling == "released":
            return picture
        return self._paste(picture, place(picture.height, picture.width, self.image_size, self.patch_size, max_tiles=1))

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        """The colour that normalisation turns into zero."""
        red, green, blue = (round(255 * mean) for mean in self.image_mean)
        return red, green, blue

    @property
    def tile_side(self) -> int:
        """Pixels along a side of a picture's tile."""
        return self.patch_size if self.tiling == "native" else self.image_size

    def _whole_tile(self, tile: Image.Image) -> Image.Image:
        """A tile of image_size pixels, stretched where it has others."""
        size = (self.image_size, self.image_size)
        return tile if tile.size == size else tile.resize(size, Image.Resampling.BICUBIC)

    def _normalise(self, picture: Image.Image, pixels: np.ndarray) -> None:
        """Writes the pixels of a picture into `pixels` [3, H, W], a plane at a time: it stays in the cache."""
        for plane, channel, mean, std in zip(pixels, picture.split(), self.image_mean, self.image_std, strict=True):
            np.divide(np.asarray(channel), np.float32(255), out=plane, dtype=np.float32)
            plane -= np.float32(mean)
            plane /= np.float32(std)


def _batch(data: dict[str, np.ndarray], return_tensors: str | None) -> BatchFeature:
    if return_tensors == "pt":
        return BatchFeature({name: torch.from_numpy(values) for name, values in data.items()})
    return BatchFeature(data)
