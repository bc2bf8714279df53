"""Any resolution: every picture gets the tokens that are announced, keeps its shape, and nothing of it is dropped."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from haplovl.model import HaploImageProcessor, HaploProcessor
from haplovl.model.configuration import HaploPreDecoderConfig
from haplovl.model.embedding import HaploImageEmbedding, merge_tiles
from haplovl.model.layout import ImageGrid, place, single_tile, tile_shapes
from haplovl.model.media import read_grids

TILE, PATCH = 32, 8
# fp32 sums of another length, as a batch is padded; measured worst case 2e-7 on this model.
TOLERANCE = 2e-5
SIDES = st.one_of(st.integers(1, 200), st.integers(1, 3000))
FEW = settings(derandomize=True, max_examples=15, deadline=None)


def embedding(class_token=True, newline=True, patch=PATCH, grid=TILE // PATCH):
    config = HaploPreDecoderConfig(
        hidden_size=4, num_attention_heads=1, patch_size=patch, patch_grid=grid, class_token=class_token,
        image_newline=newline,
    )  # fmt: skip
    return HaploImageEmbedding(config)


def kept_window(pixels, grid, side=TILE, patch=PATCH):
    """The pixels of the patches that are kept, and a mask of those that are not: tiles [T, 3, s, s] put together."""
    whole = torch.as_tensor(pixels)[: grid.tiles].unflatten(0, (grid.tile_rows, grid.tile_columns))
    whole = whole.permute(2, 0, 3, 1, 4).reshape(3, grid.tile_rows * side, grid.tile_columns * side)
    rows = slice(grid.top * patch, (grid.top + grid.rows) * patch)
    columns = slice(grid.left * patch, (grid.left + grid.columns) * patch)
    dropped = torch.ones(whole.shape[1:], dtype=torch.bool)
    dropped[rows, columns] = False
    return whole[:, rows, columns], whole[:, dropped]


@pytest.mark.parametrize("max_tiles", [1, 4, 6, 9])
def test_announced_and_written_and_embedded_tokens_are_as_many(max_tiles, tokenizer):
    processors = {
        flags: (HaploProcessor(HaploImageProcessor(TILE, PATCH, max_tiles), tokenizer, None, *flags), embedding(*flags))
        for flags in ((True, True), (True, False), (False, True), (False, False))
    }

    @FEW
    @given(SIDES, SIDES, st.sampled_from(sorted(processors)))
    @example(32, 16, (True, True))  # one tile with all its rows, but not all its columns
    def check(height, width, flags):
        processor, embed = processors[flags]
        batch = processor(text="<image>a", images=Image.new("RGB", (width, height)), return_tensors="pt")
        grids = read_grids(batch["image_grids"])
        announced = processor.image_tokens(height, width)
        with torch.inference_mode():
            embedded = embed(batch["pixel_values"].flatten(0, 1), grids)
        assert announced == int((batch["input_ids"] == processor.image_token_id).sum()) == len(embedded) > 0
        assert grids[0].tiles == batch["pixel_values"].shape[1] <= max_tiles
        assert len(embed.is_patch(grids)) == announced

    check()


@pytest.mark.parametrize("max_tiles", [1, 4, 6, 9])
def test_the_shape_is_kept_and_only_padding_is_dropped(max_tiles):
    processor = HaploImageProcessor(TILE, PATCH, max_tiles)
    padding = torch.tensor(processor.mean_colour) / 255
    padding = ((padding - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std))[:, None]

    @FEW
    @given(st.integers(1, 400), st.integers(1, 400))
    def check(height, width):
        placed = processor.place(height, width)
        if placed.shrunk:
            return
        full = placed.grid.tile_rows * TILE, placed.grid.tile_columns * TILE
        assert placed.size[0] == full[0] or placed.size[1] == full[1]
        scale = min(full[0] / height, full[1] / width)  # both sides are scaled alike, and rounded to whole pixels
        assert all(abs(new - old * scale) <= 0.5 for new, old in zip(placed.size, (height, width), strict=True))
        out = processor(Image.new("RGB", (width, height), (255, 0, 0)))
        window, dropped = kept_window(out["pixel_values"][0], placed.grid)
        torch.testing.assert_close(dropped, padding.expand_as(dropped), atol=1e-6, rtol=0)
        red = window[0] > 1
        assert int(red.sum()) == placed.size[0] * placed.size[1]
        if max_tiles > 1:  # every row and every column of patches shows something
            patches = red.unflatten(0, (-1, PATCH)).unflatten(2, (-1, PATCH)).any(3).any(1)
            assert patches.any(0).all() and patches.any(1).all()

    check()


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (20, 300), (300, 20), (50, 90), (17, 16)])
@pytest.mark.parametrize("max_tiles", [1, 4, 9])
def test_every_corner_of_a_picture_is_in_its_patches(size, max_tiles):
    processor = HaploImageProcessor(TILE, PATCH, max_tiles, image_mean=(0,) * 3, image_std=(1,) * 3)
    height, width = size
    placed = processor.place(height, width)
    colours = {(0, 0): (255, 0, 0), (0, -1): (0, 255, 0), (-1, 0): (0, 0, 255), (-1, -1): (255, 255, 255)}
    pixels = np.full((height, width, 3), 99, dtype=np.uint8)
    for (row, column), colour in colours.items():
        rows = slice(0, height // 2) if row == 0 else slice(height - height // 2, height)
        columns = slice(0, width // 2) if column == 0 else slice(width - width // 2, width)
        pixels[rows, columns] = colour
    window, _ = kept_window(processor(pixels)["pixel_values"][0], placed.grid)
    top, left = placed.offset[0] - placed.grid.top * PATCH, placed.offset[1] - placed.grid.left * PATCH
    shown = window[:, top : top + placed.size[0], left : left + placed.size[1]]
    for (row, column), colour in colours.items():
        # Two pixels wide, a corner takes a part of its neighbour; the wrong corner would miss by 1.
        torch.testing.assert_close(shown[:, row, column], torch.tensor(colour) / 255, atol=0.2, rtol=0)


def test_tiles_are_put_together_where_they_were_cut():
    grid = place(50, 90, TILE, PATCH, 6).grid
    assert grid.tile_columns > grid.tile_rows > 1
    positions = torch.arange(grid.tile_rows * 4 * grid.tile_columns * 4).view(grid.tile_rows * 4, -1)
    tiles = positions.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).flatten(0, 1)
    merged = merge_tiles(tiles[..., None].float(), grid)[..., 0].long()
    expected = positions[grid.top : grid.top + grid.rows, grid.left : grid.left + grid.columns]
    assert torch.equal(merged, expected)


@pytest.mark.parametrize(("side", "count"), [(336, 24), (672, 48)])
def test_one_tile_shows_every_picture_in_a_full_square(side, count, tokenizer):
    for flags in ((True, True), (True, False), (False, True), (False, False)):
        processor = HaploProcessor(HaploImageProcessor(side, 14), tokenizer, None, *flags)
        pictures = [Image.new("RGB", size) for size in ((side, side), (10, 1000), (1000, 10))]
        batch = processor(text="<image>" * 3, images=pictures, return_tensors="pt")
        assert read_grids(batch["image_grids"]) == [single_tile(count, count)] * 3
        tokens = count * (count + flags[1]) + flags[0]
        assert processor.image_tokens(123, 77) == tokens
        assert batch["input_ids"].shape == (1, 3 * tokens)
        embed, grids = embedding(*flags, patch=14, grid=24), [single_tile(count, count)] * 3
        with torch.inference_mode():
            assert len(embed(batch["pixel_values"][:, 0], grids)) == 3 * tokens


def test_tiles_and_tokens_by_hand():
    assert tile_shapes(4) == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    # 672x672 pixels are exactly 2x2 tiles; 1344x336 are 1x4; 600x450 are shown by 2x2 at 672x504.
    assert place(672, 672, 336, 14, 4).grid == ImageGrid(2, 2, 0, 0, 48, 48, 48, 48)
    assert place(336, 1344, 336, 14, 4).grid == ImageGrid(1, 4, 0, 0, 24, 96, 24, 96)
    assert place(450, 600, 336, 14, 4).grid == ImageGrid(2, 2, 6, 0, 36, 48, 36, 48)
    assert place(450, 600, 336, 14, 4).offset == (84, 0)
    assert place(450, 600, 336, 14, 4).grid.tokens(True, True) == 4 + 36 * 49
    # A small upright picture fills one tile, of which the sides are dropped.
    assert place(336, 168, 336, 14, 4).grid == ImageGrid(1, 1, 0, 6, 24, 12, 24, 12)


def test_an_upright_picture_in_one_tile_has_its_own_patches_only():
    embed = embedding()
    torch.nn.init.normal_(embed.newline)
    grid = place(32, 16, TILE, PATCH, 4).grid
    assert (grid.tiles, grid.rows, grid.columns) == (1, 4, 2)
    tiles = torch.randn(2, 3, TILE, TILE)
    with torch.inference_mode():
        tokens = embed(tiles, [grid, grid]).unflatten(0, (2, -1))
        patches = embed.embed_tiles(tiles)[:, :, grid.left : grid.left + 2]
        assert torch.equal(tokens[:, 1:].unflatten(1, (4, 3))[:, :, :2], patches)
        assert torch.equal(tokens[:, 3::3], embed.newline.expand(2, 4, -1))


@pytest.fixture
def said(caplog, monkeypatch):
    """What transformers' logger says."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.mark.parametrize("max_tiles", [1, 4, 6, 9])
@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000), (3000, 2)])
def test_a_very_long_picture_is_shrunk_and_that_is_said(tokenizer, said, max_tiles, size):
    processor = HaploProcessor(HaploImageProcessor(TILE, PATCH, max_tiles), tokenizer)
    batch = processor(text="<image>", images=Image.new("RGB", size, "red"), return_tensors="pt")
    assert processor.image_tokens(*reversed(size)) == batch["input_ids"].shape[1] > 0
    window, _ = kept_window(batch["pixel_values"][0], read_grids(batch["image_grids"])[0])
    assert int((window[0] > 1).sum()) == TILE  # one row or column of red pixels, as long as the tile
    warnings = [record for record in said.records if record.levelname == "WARNING"]
    assert f"{size[0]}x{size[1]} pixels is too long and narrow" in warnings[0].getMessage()


def test_a_picture_that_fits_is_shown_without_a_warning(processor, said):
    processor(text="<image>", images=Image.new("RGB", (100, 3)))
    assert not said.records


@pytest.fixture
def any_resolution(tokenizer, model):
    """A processor of up to four tiles for the tiny model."""
    return HaploProcessor(HaploImageProcessor(TILE, PATCH, 4), tokenizer)


def test_neighbours_with_more_tiles_change_nothing(model, any_resolution):
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((32, 16), (64, 64), (20, 90))]
    texts = ["<image>Where is the 3?", "a<image>yes", "no<image>"]
    batch = any_resolution(text=texts, images=pictures, padding=True, return_tensors="pt")
    assert batch["pixel_values"].shape[1] == 4
    assert [grid.tiles for grid in read_grids(batch["image_grids"])] == [1, 4, 3]
    with torch.inference_mode():
        together = model(**batch).logits
        tiles = [image[:count] for image, count in zip(batch["pixel_values"], (1, 4, 3), strict=True)]
        assert torch.equal(model(**batch | {"pixel_values": torch.cat(tiles)}).logits, together)
        noisy = batch["pixel_values"].clone()
        noisy[0, 1:], noisy[2, 3:] = 7.0, float("nan")  # tiles that are padding are never looked at
        assert torch.equal(model(**batch | {"pixel_values": noisy}).logits, together)
        for row, (text, picture) in enumerate(zip(texts, pictures, strict=True)):
            one = any_resolution(text=text, images=picture, return_tensors="pt")
            alone = model(**one).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, atol=TOLERANCE, rtol=0)


def test_every_tile_counts(model, any_resolution):
    batch = any_resolution(text="<image>a", images=Image.effect_noise((64, 64), 80), return_tensors="pt")
    with torch.inference_mode():
        before = model(**batch).logits[0, -1]
        for tile in range(4):
            pixels = batch["pixel_values"].clone()
            pixels[0, tile] += 1.0
            assert (model(**batch | {"pixel_values": pixels}).logits[0, -1] - before).abs().max() > 1e-4
