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
    return _merge(tiles, grid)[0]


def merge_pictures(tiles: torch.Tensor, grids: Sequence[ImageGrid]) -> list[torch.Tensor]:
    """The patches of every picture from all tiles: [tiles, rows, columns, H] → [N, out_rows, out_columns, H] each.

    Pictures laid out alike come together, in one go; else each comes alone, with N = 1.
    """
    if len({*grids}) == 1:
        return [_merge(tiles, grids[0])]
    parts = tiles.split([grid.tiles for grid in grids])
    return [_merge(part, grid) for part, grid in zip(parts, grids, strict=True)]


def _merge(tiles: torch.Tensor, grid: ImageGrid) -> torch.Tensor:
    """Tiles of N pictures of one grid: [N·T, rows, columns, H] → [N, out_rows, out_columns, H]."""
    _, rows, columns, width = tiles.shape
    whole = tiles.unflatten(0, (-1, grid.tile_rows, grid.tile_columns)).permute(0, 1, 3, 2, 4, 5)
    whole = whole.reshape(-1, grid.tile_rows * rows, grid.tile_columns * columns, width)
    kept = whole[:, grid.top : grid.top + grid.rows, grid.left : grid.left + grid.columns]
    size = (grid.out_rows, grid.out_columns)
    if size == (grid.rows, grid.columns):
        return kept
    # In float32, as interpolation in half precision loses what the patches differ by.
    shrunk = functional.interpolate(kept.permute(0, 3, 1, 2).float(), size=size, mode="bilinear")
    return shrunk.permute(0, 2, 3, 1).to(tiles.dtype)


class HaploImageEmbedding(nn.Module):
    """Turns pictures into the tokens of their image blocks.

    Order inside a block: a class token per tile (if any), then the rows of patches, each ended by a newline token (if
    any). Without a position table (`patch_grid` 0) the rotary positions alone tell patches apart.
    """

    def __init__(self, config: HaploPreDecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch = nn.Linear(config.num_channels * config.patch_size**2, width, bias=config.patch_bias)
        self.position = nn.Parameter(torch.zeros(config.patch_grid**2, width)) if config.patch_grid else None
        self.class_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.class_position = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.newline = nn.Parameter(torch.zeros(width)) if config.image_newline else None

    def start(self, std: float) -> None:
        """Draws positions, class and newline tokens anew, except those that were loaded."""
        for parameter in (self.position, self.class_token, self.class_position, self.newline):
            if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
                parameter.normal_(std=std)

    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cuts tiles into flat patches: [T, C, H, W] → [T, rows, columns, C·p·p], in a convolution's order."""
        size = self.config.patch_size
        count, channels, height, width = pixel_values.shape
        if height % size or width % size:
            raise ValueError(f"pictures of {height}x{width} pixels are not whole patches of {size}x{size}")
        x = pixel_values.reshape(count, channels, height // size, size, width // size, size)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def embed_tiles(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patches with their positions: [T, C, H, W] → [T, rows, columns, width]."""
        patches = self.patches(pixel_values.to(self.patch.weight.dtype))
        _, rows, columns, _ = patches.shape
        if self.position is None:
            return self.patch(patches)
        return self.patch(patches) + resize_position_grid(self.position, rows, columns).reshape(rows, columns, -1)

    def forward(self, pixel_values: torch.Tensor, grids: Sequence[ImageGrid], newlines: bool = True) -> torch.Tensor:
        """The tokens of all pictures, one after the other.

        Shapes: pixel_values [T, C, H, W], the tiles of the first picture, of the second …; one grid per picture →
        [tokens, width]. `newlines` off leaves the newline tokens out (frames of released checkpoints).
        """
        merged = merge_pictures(self.embed_tiles(pixel_values), grids)
        newline = self.newline if newlines else None
        # Fewer parts than grids: pictures that are laid out alike.
        blocks = [self._blocks(part, grid.tiles, newline) for part, grid in zip(merged, grids, strict=False)]
        return torch.cat([block.flatten(0, 1) for block in blocks])

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
        """The tokens of one blank tile, on the device of `like`: they let a batch of text alone use every weight.

        The tile has the size of the position table: the gradient of an interpolated one is not deterministic on a GPU.
        It goes through the module's own call, which is where ZeRO 3 gathers weights: in the same order on all ranks.
        """
        side = self.config.patch_grid or 1
        pixels = side * self.config.patch_size
        return self(like.new_zeros(1, self.config.num_channels, pixels, pixels), [single_tile(side, side)])

    def is_patch(self, grids: Sequence[ImageGrid]) -> torch.Tensor:
        """Which tokens of the pictures are patches: class and newline tokens are not. [tokens] bool."""
        flags = []
        for grid in grids:
            rows = torch.ones(grid.out_rows, grid.out_columns, dtype=torch.bool)
            rows = functional.pad(rows, (0, int(self.config.image_newline)))
            flags.append(functional.pad(rows.flatten(), (grid.tiles * int(self.config.class_token), 0)))
        return torch.cat(flags)
