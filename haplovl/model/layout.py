"""How a picture is laid out in tiles, patches and tokens: the only place where image tokens are counted."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from transformers.image_processing_utils import select_best_resolution


@dataclass(frozen=True)
class ImageGrid:
    """The patches of one picture: tiles side by side, what is kept of them, and what that is shrunk to.

    All but the tiles are counted in patches: the kept window begins at (top, left), and is interpolated to
    (out_rows, out_columns) where that differs from (rows, columns).
    """

    tile_rows: int
    tile_columns: int
    top: int
    left: int
    rows: int
    columns: int
    out_rows: int
    out_columns: int

    @property
    def tiles(self) -> int:
        """Number of tiles, row by row."""
        return self.tile_rows * self.tile_columns

    def tokens(self, class_token: bool, newline: bool) -> int:
        """Sequence positions of the picture: a class token per tile, the patches, a newline token per row."""
        return self.tiles * int(class_token) + self.out_rows * (self.out_columns + int(newline))

    def patch_places(self, class_token: bool, newline: bool) -> list[int]:
        """Where the patches stand among the picture's tokens, row by row."""
        first, step = self.tiles * int(class_token), self.out_columns + int(newline)
        return [first + row * step + column for row in range(self.out_rows) for column in range(self.out_columns)]

    def to_list(self) -> list[int]:
        """The fields in their order, as a row of the model's `image_grids`."""
        return list(astuple(self))


def single_tile(rows: int, columns: int) -> ImageGrid:
    """One tile of which every patch is kept."""
    return ImageGrid(1, 1, 0, 0, rows, columns, rows, columns)


def video_blocks(frames: int, grid: ImageGrid, class_token: bool, newline: bool, frame_newlines: bool) -> list[int]:
    """Sequence positions of every block of a video: its frames, and the newline that ends it without `frame_newlines`
    (the released layout)."""
    end = [1] if newline and not frame_newlines else []
    return [grid.tokens(class_token, newline and frame_newlines)] * frames + end


@dataclass(frozen=True)
class Placement:
    """How the pixels of a picture come into its tiles: resized to `size`, put at `offset`, both (rows, columns).

    `shrunk` says that the picture was too long and narrow to keep its aspect ratio.
    """

    grid: ImageGrid
    size: tuple[int, int]
    offset: tuple[int, int]
    shrunk: bool = False


def patch_of_pixels(placed: Placement, height: int, width: int, patch: int) -> tuple[list[int], list[int]]:
    """The row of patches that shows every row of a picture's pixels, and the column that shows every column.

    For the picture drawn with height x width pixels, whatever its own size is; −1 where no patch shows it.
    """
    grid = placed.grid
    return (
        _patch_along(height, placed.size[0], placed.offset[0], grid.top, grid.rows, grid.out_rows, patch),
        _patch_along(width, placed.size[1], placed.offset[1], grid.left, grid.columns, grid.out_columns, patch),
    )


def _patch_along(pixels: int, size: int, offset: int, first: int, kept: int, out: int, patch: int) -> list[int]:
    places = [(offset + (pixel + 0.5) * size / pixels) / patch - first for pixel in range(pixels)]
    return [min(out - 1, int(place * out / kept)) if 0 <= place < kept else -1 for place in places]


def patches_per_side(tile: int, patch: int) -> int:
    """Patches along one side of a tile.

    Raises:
        ValueError: the tile's side is no multiple of the patch size.
    """
    if tile <= 0 or tile % patch:
        raise ValueError(f"image_size {tile} is not a positive multiple of the patch size {patch}")
    return tile // patch


def tile_shapes(max_tiles: int) -> list[tuple[int, int]]:
    """All arrangements of at most `max_tiles` tiles, as (rows, columns)."""
    return [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]


def place(height: int, width: int, tile: int, patch: int, max_tiles: int) -> Placement:
    """The default layout: the aspect ratio is kept, and rows and columns of patches that show nothing are dropped.

    With one tile the picture is centred in a square of which all patches are kept, so that every picture has the same
    number of tokens. With more, the arrangement that shows most detail with least waste is chosen
    (`select_best_resolution` of transformers, as in LLaVA-NeXT).
    """
    side = patches_per_side(tile, patch)
    shapes = [(r * tile, c * tile) for r, c in tile_shapes(max_tiles)]
    full_height, full_width = select_best_resolution((height, width), shapes) or (tile, tile)
    scale = min(full_height / height, full_width / width)
    exact = min(full_height, round(height * scale)), min(full_width, round(width * scale))
    size, shrunk = (max(1, exact[0]), max(1, exact[1])), min(exact) < 1
    if max_tiles == 1:
        return Placement(single_tile(side, side), size, ((tile - size[0]) // 2, (tile - size[1]) // 2), shrunk)
    rows, columns = math.ceil(size[0] / patch), math.ceil(size[1] / patch)
    top, left = (full_height // patch - rows) // 2, (full_width // patch - columns) // 2
    grid = ImageGrid(full_height // tile, full_width // tile, top, left, rows, columns, rows, columns)
    return Placement(grid, size, (top * patch, left * patch), shrunk)


def place_native(height: int, width: int, longest: int, patch: int) -> Placement:
    """The layout of raw patches (fusion "patches"): the picture's own size and shape, in whole patches.

    As SOLO (arXiv 2407.06438) does it: the long side is rounded up to whole patches, or cut to `longest`; the short
    side follows by the aspect ratio, rounded up likewise; the picture is stretched to fill both. Nothing is padded.
    Every patch is a tile of its own, so that pictures of all sizes fit into one batch.
    """
    long, short = max(height, width), min(height, width)
    most = patches_per_side(longest, patch)
    along = min(math.ceil(long / patch), most)
    exact = along * patch * short // long
    across = max(1, math.ceil(exact / patch))
    rows, columns = (along, across) if height >= width else (across, along)
    grid = ImageGrid(rows, columns, 0, 0, rows, columns, rows, columns)
    return Placement(grid, (rows * patch, columns * patch), (0, 0), exact < 1)


def place_as_released(
    height: int, width: int, tile: int, patch: int, pinpoints: Sequence[Sequence[int]], max_tiles: int
) -> Placement | None:
    """The layout that the released checkpoints were trained with; None where it leaves no token of the picture.

    Its oddities: sizes are rounded up before pasting, the window that is kept is rounded down, and more than
    1.1² · `max_tiles` tiles' worth of patches are shrunk.
    """
    side = patches_per_side(tile, patch)
    best = select_best_resolution((height, width), [tuple(point) for point in pinpoints])
    if best is None:
        return None
    full_height, full_width = best
    by_width = full_width / width < full_height / height
    if by_width:
        size = min(math.ceil(height * (full_width / width)), full_height), full_width
    else:
        size = full_height, min(math.ceil(width * (full_height / height)), full_width)
    offset = (full_height - size[0]) // 2, (full_width - size[1]) // 2

    rows, columns = full_height // tile * side, full_width // tile * side
    top = left = 0
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        top = (rows - kept) // 2
        rows -= 2 * top
    else:
        kept = int(round(width * (rows / height), 7))
        left = (columns - kept) // 2
        columns -= 2 * left
    ratio = math.sqrt(rows * columns / (max_tiles * side**2))
    out_rows, out_columns = (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
    if out_rows < 1 or out_columns < 1:
        return None
    grid = ImageGrid(full_height // tile, full_width // tile, top, left, rows, columns, out_rows, out_columns)
    return Placement(grid, size, offset)
