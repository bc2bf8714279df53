"""The images and videos of a batch: checked against their placeholders before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from haplovl.model.attention import number_blocks
from haplovl.model.configuration import HaploConfig
from haplovl.model.layout import ImageGrid, patches_per_side, single_tile, video_blocks


@dataclass
class Media:
    """Images and videos in the order of their blocks, and where their tokens stand.

    Shapes: blocks [B, L] (None without any), is_image and is_video [B, L], images [tiles, C, H, W], videos
    [frames, C, H, W].
    """

    blocks: torch.Tensor | None = None
    is_image: torch.Tensor | None = None
    is_video: torch.Tensor | None = None
    images: torch.Tensor | None = None
    image_grids: list[ImageGrid] = field(default_factory=list)
    videos: torch.Tensor | None = None
    video_frames: list[int] = field(default_factory=list)
    frame_grid: ImageGrid | None = None

    @classmethod
    def of(
        cls,
        config: HaploConfig,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | Sequence | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_frames: torch.Tensor | Sequence[int] | None = None,
    ) -> "Media":
        """Reads the model's inputs.

        Raises:
            ValueError: pictures, grids or frames do not match each other or the placeholders in input_ids.
        """
        is_image, is_video = media_masks(config, input_ids)
        images, grids = _read_images(config, pixel_values, image_grids)
        videos, frames = _read_videos(config, pixel_values_videos, video_frames)
        sizes = image_sizes(config, grids)
        frame_sizes = video_sizes(config, frames)
        has_media = bool((is_image | is_video).any()) or bool(sizes) or bool(frame_sizes)
        if not has_media:
            return cls()
        blocks = number_media(is_image, is_video, sizes, frame_sizes)
        return cls(blocks, is_image, is_video, images, grids, videos, frames, frame_grid(config) if frames else None)

    def blocks_or_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The blocks, all −1 where there is no image. [B, L]."""
        return torch.full_like(input_ids, -1) if self.blocks is None else self.blocks


def media_masks(config: HaploConfig, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where image tokens and where video tokens stand: [B, L] → two [B, L] bool."""
    is_image = input_ids == config.image_token_id
    no_video = config.video_token_id is None
    return is_image, torch.zeros_like(is_image) if no_video else input_ids == config.video_token_id


def number_media(
    is_image: torch.Tensor, is_video: torch.Tensor, images: list[int], videos: list[list[int]]
) -> torch.Tensor:
    """Numbers the blocks of images, then of videos, by the tokens of every block: see `number_blocks`."""
    blocks = number_blocks(is_image, images)
    frames = number_blocks(is_video, [size for video in videos for size in video])
    return torch.where(is_video, frames + len(images), blocks)


def image_sizes(config: HaploConfig, grids: Sequence[ImageGrid]) -> list[int]:
    """Tokens of every image."""
    pre = config.pre_config
    return [grid.tokens(pre.class_token, pre.image_newline) for grid in grids]


def frame_grid(config: HaploConfig) -> ImageGrid:
    """A video frame is one whole tile."""
    side = patches_per_side(config.image_size, config.pre_config.patch_size)
    return single_tile(side, side)


def video_sizes(config: HaploConfig, frames: Sequence[int]) -> list[list[int]]:
    """Tokens of every block of every video."""
    pre, grid = config.pre_config, frame_grid(config)
    return [
        video_blocks(count, grid, pre.class_token, pre.image_newline, config.frame_newlines) for count in frames
    ]  # fmt: skip


def read_grids(image_grids: torch.Tensor | Sequence) -> list[ImageGrid]:
    """The model's `image_grids` [N, 8] as objects."""
    rows = image_grids.tolist() if isinstance(image_grids, torch.Tensor) else image_grids
    return [row if isinstance(row, ImageGrid) else ImageGrid(*map(int, row)) for row in rows]


def _read_images(
    config: HaploConfig, pixels: torch.Tensor | None, image_grids: torch.Tensor | Sequence | None
) -> tuple[torch.Tensor | None, list[ImageGrid]]:
    if pixels is None or not pixels.shape[0]:
        if image_grids is not None and len(image_grids):
            raise ValueError(f"image_grids names {len(image_grids)} images, but there are no pixel_values")
        return None, []
    patch = config.pre_config.patch_size
    height, width = pixels.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"pictures of {height}x{width} pixels are not whole patches of {patch}x{patch}")
    if image_grids is None:
        if pixels.ndim == 5:
            if pixels.shape[1] != 1:
                raise ValueError("pixel_values hold several tiles per image; image_grids must tell how they lie")
            pixels = pixels[:, 0]
        return pixels, [single_tile(height // patch, width // patch)] * pixels.shape[0]
    grids = read_grids(image_grids)
    if pixels.ndim == 5:
        if len(grids) != pixels.shape[0] or any(grid.tiles > pixels.shape[1] for grid in grids):
            raise ValueError(
                f"pixel_values hold {pixels.shape[0]} images of up to {pixels.shape[1]} tiles, but image_grids names "
                f"{[grid.tiles for grid in grids]} tiles"
            )
        pixels = torch.cat([image[: grid.tiles] for image, grid in zip(pixels, grids, strict=True)])
    if sum(grid.tiles for grid in grids) != pixels.shape[0]:
        raise ValueError(
            f"pixel_values hold {pixels.shape[0]} tiles, but image_grids names {sum(g.tiles for g in grids)}"
        )
    return pixels, grids


def _read_videos(
    config: HaploConfig, pixels: torch.Tensor | None, video_frames: torch.Tensor | Sequence[int] | None
) -> tuple[torch.Tensor | None, list[int]]:
    if pixels is None or not pixels.shape[0]:
        return None, []
    if config.video_token_id is None:
        raise ValueError("this model has no video token (video_token_id is None), but videos were given")
    count, longest = pixels.shape[:2]
    if video_frames is None:
        frames = [longest] * count
    else:
        frames = video_frames.tolist() if isinstance(video_frames, torch.Tensor) else list(video_frames)
    if len(frames) != count or not all(0 < number <= longest for number in frames):
        raise ValueError(f"video_frames is {frames}, but there are {count} videos of up to {longest} frames")
    side = config.image_size
    if tuple(pixels.shape[-2:]) != (side, side):
        raise ValueError(f"video frames have {pixels.shape[-2]}x{pixels.shape[-1]} pixels, expected {side}x{side}")
    return torch.cat([video[:number] for video, number in zip(pixels, frames, strict=True)]), frames
