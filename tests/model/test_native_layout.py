"""Raw patches at a picture's own size: SOLO's rounding, no padding, and pictures of all sizes in one batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from haplovl.model import HaploImageProcessor, HaploProcessor
from haplovl.model.layout import place_native

FEW = settings(derandomize=True, max_examples=60, deadline=None)
SIDES = st.one_of(st.integers(1, 200), st.integers(1, 5000))


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (480, 640, 15, 20),  # whole patches stay as they are
        (32, 540, 1, 17),  # 540 becomes 544
        (500, 375, 16, 12),  # 512 x 384
        (2000, 3000, 22, 32),  # 1024 x 682.67, rounded up to 704
        (1, 1, 1, 1),  # one patch, the least there is
        (10, 5000, 1, 32),
    ],
)
def test_sizes_that_solo_gives(height, width, rows, columns):
    placed = place_native(height, width, 1024, 32)
    assert (placed.grid.tile_rows, placed.grid.tile_columns) == (rows, columns)
    assert (placed.grid.out_rows, placed.grid.out_columns) == (rows, columns)
    assert placed.size == (rows * 32, columns * 32) and placed.offset == (0, 0)


@FEW
@given(SIDES, SIDES)
@example(1, 5000)
@example(5000, 1)
def test_the_shape_is_kept_and_nothing_is_blown_up(height, width):
    placed = place_native(height, width, 1024, 32)
    long, short = max(placed.size), min(placed.size)
    assert long == min(1024, math.ceil(max(height, width) / 32) * 32)
    if placed.shrunk:  # less than a pixel would be left of the short side
        assert short == 32 and long * min(height, width) < max(height, width)
    else:
        exact = long * min(height, width) / max(height, width)
        assert exact - 1 < short < exact + 32
    assert (placed.size[0] >= placed.size[1]) == (height >= width) or long == short


def test_a_batch_of_all_sizes_holds_every_patch(tokenizer):
    processor = HaploProcessor(HaploImageProcessor(48, 8, tiling="native"), tokenizer, class_token=False)
    sizes = [(48, 48), (9, 31), (300, 20), (1, 1)]
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    batch = processor(text="<image>" * 4, images=pictures, return_tensors="pt")
    counts = [processor.image_tokens(*size) for size in sizes]
    assert counts == [6 * 7, 2 * 5, 6 * 2, 1 * 2]
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == sum(counts)
    assert batch["pixel_values"].shape == (4, 36, 3, 8, 8)
    first = batch["pixel_values"][0].view(6, 6, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(3, 48, 48)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    plain = torch.from_numpy(np.array(pictures[0])).permute(2, 0, 1) / 255
    torch.testing.assert_close(first, (plain - mean) / std)


def test_a_picture_too_narrow_for_a_pixel_is_told(caplog):
    with caplog.at_level("WARNING"):
        HaploImageProcessor(48, 8, tiling="native")(Image.new("RGB", (1000, 1)))
    assert "too long and narrow" in caplog.text and "48x8" in caplog.text
