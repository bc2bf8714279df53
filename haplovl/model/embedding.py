"""Image embedding: one linear layer over raw patches, learned 2-D positions, class and newline tokens."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from haplovl.model.configuration import HaploPreDecoderConfig
from haplovl.model.layout import ImageGrid, single_tile


def resize_position_grid(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Bicubic interpolation of a square position table, as transformers' CLIP and SigLIP do it.

    Shapes: table [side², H] → [rows·columns, H].
    """
    side = int(table.shape[0] ** 0.5)
    if (rows, columns) == (side, side):
        return table
    grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(rows * columns, -1).to(table.dtype)


def merge_tiles(tiles: torch.Tensor, grid: ImageGrid) -> torch.Tensor:
    """The patches of one picture from those of its tiles: put together, cut to what is kept, shrunk if so laid out.

    Shapes: tiles [T, rows, columns, H] (row by row) → [out_rows, out_columns, H].
    """
    _, rows, columns, width = tiles.shape
    whole = tiles.view(grid.tile_rows, grid.tile_columns, rows, columns, width).permute(0, 2, 1, 3, 4)
    whole = whole.reshape(grid.tile_rows * rows, grid.tile_columns * columns, width)
    kept = whole[grid.top : grid.top + grid.rows, grid.left : grid.left + grid.columns]
    size = (grid.out_rows, grid.out_columns)
    if size == (grid.rows, grid.columns):
        return kept
    # In float32, as interpolation in half precision loses what the patches differ by.
    shrunk = functional.interpolate(kept.permute(2, 0, 1)[None].float(), size=size, mode="bilinear")
    return shrunk[0].permute(1, 2, 0).to(tiles.dtype)


class HaploImageEmbedding(nn.Module):
    """Turns pictures into the tokens of their image blocks.

    Order inside a block: a class token per tile (if any), then the rows of patches, each ended by a newline token (if
    any).
    """

    def __init__(self, config: HaploPreDecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch = nn.Linear(config.num_channels * config.patch_size**2, width, bias=config.patch_bias)
        self.position = nn.Parameter(torch.zeros(config.patch_grid**2, width))
        self.class_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.class_position = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.newline = nn.Parameter(torch.zeros(width)) if config.image_newline else None

    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cuts tiles into flat patches: [T, C, H, W] → [T, rows, columns, C·p·p], in a convolution's order."""
        size = self.config.patch_size
        count, channels, height, width = pixel_values.shape
        if height % size or width % size:
            raise ValueError(f"pictures of {height}x{width} pixels are not whole patches of {size}x{size}")
        x = pixel_values.reshape(count, channels, height // size, size, width // size, size)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def embed_tiles(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patches with their positions: [T, C, H, W] → [T, rows, columns, pre-decoder width]."""
        patches = self.patches(pixel_values.to(self.position.dtype))
        _, rows, columns, _ = patches.shape
        return self.patch(patches) + resize_position_grid(self.position, rows, columns).reshape(rows, columns, -1)

    def forward(self, pixel_values: torch.Tensor, grids: Sequence[ImageGrid], newlines: bool = True) -> torch.Tensor:
        """The tokens of all pictures, one after the other.

        Shapes: pixel_values [T, C, H, W], the tiles of the first picture, of the second …; one grid per picture →
        [tokens, pre-decoder width]. `newlines` off leaves the newline tokens out (frames of released checkpoints).
        """
        tiles = self.embed_tiles(pixel_values)
        newline = self.newline if newlines else None
        if {*grids} == {single_tile(*tiles.shape[1:3])}:
            return self._blocks(tiles, 1, newline).flatten(0, 1)  # all alike: in one go
        parts = tiles.split([grid.tiles for grid in grids])
        blocks = [
            self._blocks(merge_tiles(part, grid)[None], grid.tiles, newline)[0]
            for part, grid in zip(parts, grids, strict=True)
        ]
        return torch.cat(blocks)

    def _blocks(self, patches: torch.Tensor, tiles: int, newline: torch.Tensor | None) -> torch.Tensor:
        """[N, rows, columns, H] → [N, tokens, H]."""
        count, rows, _, width = patches.shape
        if newline is not None:
            patches = torch.cat([patches, newline.expand(count, rows, 1, -1)], dim=2)
        tokens = patches.flatten(1, 2)
        if self.class_token is not None:
            first = (self.class_token + self.class_position).expand(count, tiles, width)
            tokens = torch.cat([first, tokens], dim=1)
        return tokens

    def blank(self, like: torch.Tensor) -> torch.Tensor:
        """The tokens of one blank patch, on the device of `like`: they let a batch of text alone use every weight."""
        size = self.config.patch_size
        return self(like.new_zeros(1, self.config.num_channels, size, size), [single_tile(1, 1)])

    def is_patch(self, grids: Sequence[ImageGrid]) -> torch.Tensor:
        """Which tokens of the pictures are patches: class and newline tokens are not. [tokens] bool."""
        flags = []
        for grid in grids:
            rows = torch.ones(grid.out_rows, grid.out_columns, dtype=torch.bool)
            rows = functional.pad(rows, (0, int(self.config.image_newline)))
            flags.append(functional.pad(rows.flatten(), (grid.tiles * int(self.config.class_token), 0)))
        return torch.cat(flags)
