"""Pictures of every shape in the released layout: as many tokens as announced, never none, and shrinking is said.

The public reference's processor and model disagree on some sizes (206x1648, 849x2264), and it drops very long pictures.
"""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from haplovl.model import HaploImageProcessor, HaploProcessor
from haplovl.model.configuration import HaploPreDecoderConfig
from haplovl.model.embedding import HaploImageEmbedding
from haplovl.model.media import read_grids
from haplovl.model.released_layout import DEFAULT_PINPOINTS

SIDES = st.one_of(st.integers(1, 60), st.integers(1, 3000))
# As many tiles as the release knows, but of 4x4 patches of 2 pixels: (tile, patch, most tiles, arrangements).
SMALL = {
    "six tiles": (8, 2, 6, [[8 * height // 336, 8 * width // 336] for height, width in DEFAULT_PINPOINTS]),
    "36 tiles shrunk to nine": (8, 2, 9, [[8 * rows, 8 * columns] for rows in range(1, 7) for columns in range(1, 7)]),
    "one tile": (8, 2, 1, [[8, 8]]),
    "one patch a tile": (8, 8, 6, [[8, 8], [8, 48], [48, 8]]),
}


def parts(tokenizer, tile, patch, max_tiles, points):
    """Processor and image embedding of a released checkpoint."""
    images = HaploImageProcessor(tile, patch, max_tiles, tiling="released", image_grid_pinpoints=points)
    config = HaploPreDecoderConfig(
        hidden_size=4, num_attention_heads=1, patch_size=patch, patch_grid=tile // patch, class_token=False
    )
    return HaploProcessor(images, tokenizer, class_token=False, frame_newlines=False), HaploImageEmbedding(config)


@pytest.fixture(scope="module")
def full_size(tokenizer):
    return parts(tokenizer, 336, 14, 6, DEFAULT_PINPOINTS)


def tokens(processor, embedding, height, width):
    """Tokens of one picture: as announced, as written into the text, as embedded by the model."""
    batch = processor(text="<image>yes", images=Image.new("RGB", (width, height), "red"), return_tensors="pt")
    written = int((batch["input_ids"] == processor.image_token_id).sum())
    assert torch.isfinite(batch["pixel_values"]).all()
    with torch.inference_mode():
        embedded = embedding(batch["pixel_values"].flatten(0, 1), read_grids(batch["image_grids"]))
    assert torch.isfinite(embedded).all()
    return processor.image_tokens(height, width), written, len(embedded)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (336, 336, 24 * 25),
        # Five tiles side by side, of which 120 / 8 = 15 of 24 rows show it; 16, as both sides are cut alike.
        (206, 1648, 16 * 121),
        (1648, 206, 120 * 17),
        # Two times three tiles, of which 72 · 3 / 8 = 27 of 48 rows show it; 28 for the same reason.
        (849, 2264, 28 * 73),
        (2264, 849, 72 * 29),
    ],
)
def test_the_tokens_of_sizes_that_once_disagreed(height, width, expected, full_size, caplog):
    assert tokens(*full_size, height, width) == (expected, expected, expected)
    assert not caplog.records


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 25), (25, 1), (1, 144), (144, 1), (1, 1000), (10000, 1), (1, 10000), (2, 9001), (9001, 2), (7, 20000)],
)
def test_a_picture_too_long_to_leave_a_token_is_shrunk_and_that_is_said(height, width, full_size, caplog):
    announced, written, embedded = tokens(*full_size, height, width)
    assert announced == written == embedded > 0
    assert f"a picture of {width}x{height} pixels is too long and narrow for the model" in caplog.text
    assert full_size[0].image_processor.place(height, width).shrunk


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (1, 24), (24, 1), (5000, 40), (40, 5000), (3000, 4000)])
def test_other_pictures_are_not_shrunk(height, width, full_size, caplog):
    announced, written, embedded = tokens(*full_size, height, width)
    assert announced == written == embedded > 0
    assert not caplog.records


@pytest.mark.parametrize("kind", SMALL)
def test_every_size_has_the_tokens_that_are_announced(kind, tokenizer):
    processor, embedding = parts(tokenizer, *SMALL[kind])

    @settings(derandomize=True, max_examples=60, deadline=None)
    @given(SIDES, SIDES)
    @example(206, 1648)
    @example(849, 2264)
    @example(1, 3000)
    @example(3000, 1)
    def check(height, width):
        announced, written, embedded = tokens(processor, embedding, height, width)
        assert announced == written == embedded > 0

    check()


@pytest.mark.parametrize("kind", ["full size", *SMALL])
def test_the_kept_window_is_the_references_in_exact_arithmetic(kind):
    """It computes in floating point, whose errors must not cost a row of patches."""
    tile, patch, most, points = SMALL.get(kind, (336, 14, 6, DEFAULT_PINPOINTS))
    images = HaploImageProcessor(tile, patch, most, tiling="released", image_grid_pinpoints=points)
    shrunk = 0

    @settings(derandomize=True, max_examples=300, deadline=None)
    @given(SIDES, SIDES, st.integers(1, 8))
    @example(206, 206, 8)
    @example(849, 283, 8)
    def check(height, width, times):
        nonlocal shrunk
        width *= times
        placed = images.place(height, width)
        grid = placed.grid
        rows, columns = grid.tile_rows * tile // patch, grid.tile_columns * tile // patch
        assert grid.top >= 0 and grid.top + grid.rows <= rows
        assert grid.left >= 0 and grid.left + grid.columns <= columns
        assert grid.out_rows > 0 and grid.out_columns > 0
        if placed.shrunk:
            shrunk += 1
            return
        assert [*select_best_resolution((height, width), points)] == [rows * patch, columns * patch]
        if Fraction(width, height) > Fraction(columns, rows):
            cut = (rows - height * columns // width) // 2
            assert (grid.rows, grid.columns) == (rows - 2 * cut, columns)
        else:
            cut = (columns - width * rows // height) // 2
            assert (grid.rows, grid.columns) == (rows, columns - 2 * cut)

    check()
    assert shrunk > 0 or kind == "one patch a tile"  # an odd number of patches always keeps one
