"""Properties of the mask over random mixtures of text, pictures of several tiles, videos, packing, padding and caches.

Earlier outputs are compared bitwise: runs of the same shapes differ only in values whose weight is exactly 0.
"""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haplovl.model.attention import MixedMask
from haplovl.model.layout import ImageGrid, single_tile

# fp32 attention over rows of another length, or in chunks; logits reach 0.7, measured worst case 3e-7.
TOLERANCE = 5e-6
SIDE, PATCH = 4, 8  # patches along a tile, pixels along a patch
FRAME = single_tile(SIDE, SIDE).tokens(class_token=True, newline=True)
KINDS = st.tuples(  # increments of pre- and post-decoder, mask of the post-decoder
    st.sampled_from([(0.0, 1.0), (1.0, 1.0), (0.25, 0.5), (0.0, 0.0)]), st.sampled_from(["mixed", "causal"])
)


def few(examples):
    return settings(deadline=None, derandomize=True, database=None, max_examples=examples)


@dataclass(frozen=True)
class Piece:
    """Words (`words`), a picture of several tiles (`pixels`, `grid`), or the frames of a video (`pixels`)."""

    words: tuple[int, ...] = ()
    pixels: torch.Tensor | None = None
    grid: ImageGrid | None = None

    @property
    def blocks(self) -> list[int]:
        """The sizes of what attends both ways: single words, a picture, every frame."""
        if self.pixels is None:
            return [1] * len(self.words)
        return [FRAME] * len(self.pixels) if self.grid is None else [self.grid.tokens(True, True)]


@st.composite
def grids(draw):
    """Up to 2 x 2 tiles, cut to a window of at most 4 x 4 patches, which may be shrunk by one row and one column."""
    tiles = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))
    kept = [draw(st.integers(1, SIDE)) for _ in tiles]
    start = [draw(st.integers(0, SIDE * count - size)) for count, size in zip(tiles, kept, strict=True)]
    shrunk = draw(st.booleans())
    return ImageGrid(*tiles, *start, *kept, *(max(1, size - shrunk) for size in kept))


@st.composite
def rows(draw, max_size=4):
    """Words, pictures and videos in any order, also side by side."""
    noise = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    row = []
    for kind in draw(st.lists(st.sampled_from(["words", "words", "picture", "picture", "video"]), max_size=max_size)):
        if kind == "words":
            words = torch.randint(5, 250, (draw(st.integers(1, 4)),), generator=noise)
            row.append(Piece(tuple(words.tolist())))
            continue
        grid = draw(grids()) if kind == "picture" else None
        count = draw(st.integers(1, 2)) if grid is None else grid.tiles
        row.append(Piece((), torch.randn(count, 3, SIDE * PATCH, SIDE * PATCH, generator=noise), grid))
    return row or [Piece((7,))]


def tokens(model, row):
    ids = []
    for piece in row:
        image = model.config.video_token_id if piece.grid is None else model.config.image_token_id
        ids += piece.words or [image] * sum(piece.blocks)
    return ids


def inputs(model, batch):
    """What the processor would make of the rows, padded on the left."""
    ids = [tokens(model, row) for row in batch]
    longest = max(map(len, ids))
    made = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
    }
    pictures = [piece for row in batch for piece in row if piece.grid is not None]
    videos = [piece.pixels for row in batch for piece in row if piece.pixels is not None and piece.grid is None]
    if pictures:
        made["pixel_values"] = torch.cat([piece.pixels for piece in pictures])
        made["image_grids"] = torch.tensor([piece.grid.to_list() for piece in pictures])
    if videos:
        made["pixel_values_videos"] = torch.nn.utils.rnn.pad_sequence(videos, batch_first=True)
        made["video_frames"] = torch.tensor([len(video) for video in videos])
    return made


def logits(model, batch, **more):
    with torch.inference_mode():
        return model(**inputs(model, batch) | more).logits


def changed(row, place):
    """The row with its `place`-th word, picture or frame changed at the end, and the first token that may notice."""
    start = 0
    for index, piece in enumerate(row):
        for block, size in enumerate(piece.blocks):
            if place == 0:
                return [*row[:index], _changed(piece, block), *row[index + 1 :]], start
            start, place = start + size, place - 1
    raise IndexError(place)


def _changed(piece, block):
    if piece.pixels is None:
        words = list(piece.words)
        words[block] = words[block] + 1
        return Piece(tuple(words))
    grid = piece.grid or single_tile(SIDE, SIDE)
    row, column = grid.top + grid.rows - 1, grid.left + grid.columns - 1  # the last patch that is kept
    tile = block if piece.grid is None else row // SIDE * grid.tile_columns + column // SIDE
    top, left = row % SIDE * PATCH, column % SIDE * PATCH
    pixels = piece.pixels.clone()
    pixels[tile, :, top : top + PATCH, left : left + PATCH] += 1.0
    return Piece((), pixels, piece.grid)


@pytest.fixture(scope="module")
def shared(vision, language, model_settings, processor):
    """One tiny model for all examples."""
    from haplovl.model.inherit import inherit

    torch.manual_seed(3)
    ids = (processor.image_token_id, len(processor.tokenizer), processor.video_token_id)
    return inherit(vision, language, model_settings, *ids).eval()


def of_kind(model, kind):
    (model.config.pre_config.rotary_increment, model.config.post_rotary_increment), model.config.post_mask = kind
    return model


def documents(batch):
    """Numbers the documents of packed rows; -1 fills the shorter rows, as in the loader."""
    ids = [[number for number, row in enumerate(packed) for _ in range(size(row))] for packed in batch]
    longest = max(map(len, ids))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in ids])


def size(row):
    return sum(sum(piece.blocks) for piece in row)


@few(100)
@given(kind=KINDS, row=rows(), data=st.data())
def test_a_change_is_seen_by_its_whole_image_and_what_follows_but_nothing_earlier(shared, kind, row, data):
    model = of_kind(shared, kind)
    place = data.draw(st.integers(0, sum(len(piece.blocks) for piece in row) - 1))
    other, start = changed(row, place)
    for pad in (0, 3):
        batch = [[Piece((9,) * (size(row) + pad))]] if pad else []
        before, after = (logits(model, [*batch, variant])[-1, pad:] for variant in (row, other))
        assert torch.equal(before[:start], after[:start])
        assert not (before[start:] == after[start:]).all(dim=-1).any()


@few(80)
@given(kind=KINDS, batch=st.lists(rows(3), min_size=2, max_size=3))
def test_a_padded_row_equals_the_row_alone(shared, kind, batch):
    model = of_kind(shared, kind)
    together = logits(model, batch)
    for row, mine in zip(batch, together, strict=True):
        torch.testing.assert_close(mine[-size(row) :], logits(model, [row])[0], atol=TOLERANCE, rtol=0)


@few(80)
@given(kind=KINDS, batch=st.lists(st.lists(rows(3), min_size=1, max_size=3), min_size=1, max_size=2), data=st.data())
def test_a_packed_document_equals_the_document_alone_and_sees_no_other(shared, kind, batch, data):
    model = of_kind(shared, kind)

    def packed(batch):
        numbers = documents(batch)
        filled = [
            [piece for document in row for piece in document] + [Piece((8,) * int((own < 0).sum()))]
            for row, own in zip(batch, numbers, strict=True)
        ]
        found = logits(model, filled, attention_mask=None, document_ids=numbers)
        lengths = [[size(document) for document in row] for row in batch]
        return [mine[: sum(sizes)].split(sizes) for mine, sizes in zip(found, lengths, strict=True)]

    together = packed(batch)
    for documents_of_row, found in zip(batch, together, strict=True):
        for document, mine in zip(documents_of_row, found, strict=True):
            torch.testing.assert_close(mine, logits(model, [document])[0], atol=TOLERANCE, rtol=0)
    row = data.draw(st.integers(0, len(batch) - 1))
    chosen = data.draw(st.integers(0, len(batch[row]) - 1))
    batch[row][chosen] = changed(batch[row][chosen], 0)[0]
    again = packed(batch)
    for i, found in enumerate(together):
        for j, mine in enumerate(found):
            assert torch.equal(mine, again[i][j]) == ((i, j) != (row, chosen))


@few(80)
@given(kind=KINDS, batch=st.lists(st.lists(rows(2), min_size=3, max_size=3), min_size=1, max_size=2))
def test_chunks_and_single_tokens_on_a_cache_equal_the_whole_row(shared, kind, batch):
    """Chunks end at words or images. In a batch every chunk is padded on the left, so that rows have holes."""
    model = of_kind(shared, kind)
    last = (31, 32, 33)
    chunks = [*zip(*batch, strict=True), *([[Piece((word,))]] * len(batch) for word in last)]
    cache, mask, found = None, torch.zeros(len(batch), 0, dtype=torch.long), []
    for chunk in chunks:
        made = inputs(model, chunk)
        mask = torch.cat([mask, made.pop("attention_mask")], dim=1)
        with torch.inference_mode():
            out = model(**made, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    for row, mine, real in zip(batch, torch.cat(found, dim=1), mask.bool(), strict=True):
        whole = [piece for chunk in row for piece in chunk] + [Piece(last)]
        torch.testing.assert_close(mine[real], logits(model, [whole])[0], atol=TOLERANCE, rtol=0)


@few(80)
@given(
    blocks=st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=5),
    past=st.integers(0, 3),
    spare=st.integers(0, 3),
    hidden=st.sets(st.integers(0, 20)),
    ends=st.none() | st.sets(st.integers(1, 20)),
)
def test_every_form_of_the_mask_says_what_the_formula_says(blocks, past, spare, hidden, ends):
    own = [(index if image else -1) for index, (image, count) in enumerate(blocks) for _ in range(count)]
    length = len(own)
    if ends is not None:
        past = spare = 0
    keys = past + length + spare
    real = [j < past + length and j not in hidden for j in range(keys)]
    number = [sum(end <= i for end in ends or ()) for i in range(keys)]
    key_blocks = [-1] * past + own + [-1] * spare
    mask = MixedMask(
        1,
        length,
        torch.device("cpu"),
        torch.tensor([own]),
        torch.tensor([real[: past + length]]) if hidden else None,
        None if ends is None else torch.tensor([number]),
        past,
        keys,
    )
    for form, images in ((mask, True), (mask.causal(), False)):
        expected = torch.tensor(
            [
                [
                    (j <= past + i or (images and own[i] == key_blocks[j] >= 0))
                    and number[past + i] == number[j]
                    and (real[j] or not hidden)
                    for j in range(keys)
                ]
                for i in range(length)
            ]
        )
        assert torch.equal(form.dense()[0, 0], expected)
        assert torch.equal(form.additive(torch.float32)[0, 0] == 0, expected)
        # FlexAttention lets padding see itself, as it has no use for an empty row.
        query, key = torch.arange(length)[:, None], torch.arange(keys)[None, :]
        zero = torch.zeros((), dtype=torch.long)
        sparse = form.block_sparse().mask_mod(zero, zero, query, key)
        assert torch.equal(sparse, expected | (key == query + past))
