"""The mixed mask means the same alone, padded, packed, cached and on every backend."""

import pytest
import torch

from haplovl.model.attention import MixedMask, number_blocks, rotary_positions

# fp32 attention over rows of another length or with another kernel; measured worst case 4e-7 on these models.
TOLERANCE = 2e-5


@pytest.fixture
def parts(model):
    """A sequence with two neighbouring images, and its pictures."""
    image = model.config.image_token_id
    n = model.config.tokens_per_image
    ids = torch.tensor([[11, 12, *[image] * (2 * n), 13, 14, 15]])
    return ids, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits(model, *args, **kwargs):
    with torch.inference_mode():
        return model(*args, **kwargs).logits


def test_mask_by_hand():
    blocks = torch.tensor([[-1, 0, 0, 1, 1, -1]])
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 1],
        ],
        dtype=torch.bool,
    )
    assert torch.equal(MixedMask(1, 6, blocks.device, blocks).dense()[0, 0], expected)


def test_neighbouring_images_are_two_blocks():
    ids = torch.tensor([[9, 9, 9, 9, 9, 5, 9, 9], [9, 5, 5, 5, 5, 5, 5, 5]])
    assert number_blocks(ids == 9, [2, 3, 2, 1]).tolist() == [[0, 0, 1, 1, 1, -1, 2, 2], [3, *[-1] * 7]]


@pytest.mark.parametrize(
    ("rows", "sizes", "words"),
    [
        ([[9, 9, 9]], [2], "room for 3 image tokens"),
        ([[9, 5, 9]], [2], "torn apart by text"),
        ([[5, 5, 9], [9, 5, 5]], [2], "torn apart"),
    ],
)
def test_images_that_do_not_fill_their_places_are_refused(rows, sizes, words):
    with pytest.raises(ValueError, match=words):
        number_blocks(torch.tensor(rows) == 9, sizes)


@pytest.mark.parametrize(
    ("increment", "expected"),
    [
        (1.0, [0, 1, 2, 3, 4, 5]),
        (0.0, [0, 1, 1, 2, 2, 3]),
        (0.5, [0, 1, 1.5, 2.5, 3, 4]),
    ],
)
def test_rotary_positions(increment, expected):
    blocks = torch.tensor([[-1, 0, 0, 1, 1, -1]])
    assert rotary_positions(blocks, increment).tolist() == [expected]
    padded = torch.cat([torch.tensor([[-1, -1]]), blocks], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    assert rotary_positions(padded, increment, attention_mask=mask)[:, 2:].tolist() == [expected]
    documents = torch.tensor([[0] * 6 + [1] * 6])
    packed = rotary_positions(torch.cat([blocks, blocks], dim=1), increment, document_ids=documents)
    assert packed.tolist() == [expected * 2]


def test_later_tokens_change_nothing_earlier(model, parts):
    ids, pixels = parts
    changed = ids.clone()
    changed[0, -2] += 1
    before, after = logits(model, ids, pixels), logits(model, changed, pixels)
    assert torch.equal(before[:, :-2], after[:, :-2])
    assert (before[:, -2:] - after[:, -2:]).abs().max() > 1e-3


def test_an_images_tokens_see_each_other_both_ways(model, parts):
    ids, pixels = parts
    other = pixels.clone()
    other[0, :, -8:, -8:] += 1.0  # the last patch of the first image
    before, after = logits(model, ids, pixels), logits(model, ids, other)
    first = 2  # first token of the first image, long before the patch that changed
    assert (before[0, first] - after[0, first]).abs().max() > 1e-6
    assert torch.equal(before[0, :first], after[0, :first])


def test_the_second_image_is_not_seen_by_the_first(model, parts):
    ids, pixels = parts
    other = pixels.clone()
    other[1] += 1.0
    n = model.config.tokens_per_image
    before, after = logits(model, ids, pixels), logits(model, ids, other)
    assert torch.equal(before[0, : 2 + n], after[0, : 2 + n])
    assert (before[0, 2 + n] - after[0, 2 + n]).abs().max() > 1e-6


def test_padding_packing_and_backends_change_nothing(model, parts):
    ids, pixels = parts
    alone, length = logits(model, ids, pixels), ids.shape[1]
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, length)], dim=1).long()
    padded = logits(model, torch.cat([torch.zeros(1, 5).long(), ids], dim=1), pixels, attention_mask=mask)
    torch.testing.assert_close(padded[:, 5:], alone, atol=TOLERANCE, rtol=0)
    text = torch.tensor([[21, 22, 23]])
    row = torch.cat([text, ids], dim=1)
    packed = logits(model, row, pixels, document_ids=torch.tensor([[0] * 3 + [1] * length]))
    torch.testing.assert_close(packed[:, 3:], alone, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(packed[:, :3], logits(model, text), atol=TOLERANCE, rtol=0)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, ids, pixels), alone, atol=TOLERANCE, rtol=0)


def test_a_backend_that_cannot_serve_the_mask_refuses(model, parts):
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        logits(model, *parts)


def test_images_and_placeholders_must_match(model, parts):
    ids, pixels = parts
    with pytest.raises(ValueError, match="room for 42 image tokens, but 1 images"):
        logits(model, ids, pixels[:1])
    with pytest.raises(ValueError, match="0 images"):
        logits(model, ids)
    with pytest.raises(ValueError, match="room for 42 image tokens, but 2 images .* together 14"):
        logits(model, ids, torch.randn(2, 3, 16, 16))


def test_longer_than_a_sliding_window_is_refused(model):
    model.config.text_config.sliding_window = 4
    with pytest.raises(ValueError, match="sliding window of 4"):
        logits(model, torch.tensor([[11, 12, 13, 14, 15]]))
