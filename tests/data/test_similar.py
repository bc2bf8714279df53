"""Perceptual hashes see through re-encoding, tell photographs apart, and are grouped without comparing every pair."""

import io

import numpy as np
import pytest
from PIL import Image

from haplovl.data.similar import group_similar, merge_groups, picture_hash


def photograph(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((320, 240), Image.BICUBIC)


def encoded(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def apart(one: int | None, other: int | None) -> int:
    assert one is not None and other is not None
    return (one ^ other).bit_count()


def test_the_same_photograph_is_known_again_and_others_are_not() -> None:
    pictures = [photograph(seed) for seed in range(20)]
    hashes = [picture_hash(picture) for picture in pictures]
    for picture, known in zip(pictures, hashes, strict=True):
        assert apart(known, picture_hash(encoded(picture, quality=40))) <= 4
        assert apart(known, picture_hash(picture.resize((161, 97)))) <= 4
        assert apart(known, picture_hash(picture.point(lambda value: min(255, value * 1.1)))) <= 6
    assert min(apart(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 16


def test_a_picture_without_contrast_has_no_hash() -> None:
    assert picture_hash(Image.new("RGB", (50, 40), "red")) is None


@pytest.mark.parametrize("distance", [0, 1, 3, 8])
def test_groups_are_those_of_comparing_every_pair(distance: int) -> None:
    random = np.random.default_rng(distance)
    hashes = random.integers(0, 2**64, 600, dtype=np.uint64)
    for i in range(300):  # near ones, chains and copies among strangers
        flips = random.choice(64, random.integers(0, 2 * distance + 2), replace=False)
        hashes[300 + i] = hashes[random.integers(0, 300 + i)] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype("u8"))
    distances = np.full(600, distance)
    distances[::7], distances[1::5] = -1, min(1, distance)
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    near = (bits <= np.minimum.outer(distances, distances)) & (np.minimum.outer(distances, distances) >= 0)
    expected = np.arange(600)
    for _ in range(600):
        smaller = np.minimum(expected, np.where(near, expected[None, :], 600).min(axis=1))
        if (smaller == expected).all():
            break
        expected = smaller
    assert len(set(expected)) < 590
    assert group_similar(hashes, distances).tolist() == expected.tolist()


def test_what_is_together_in_either_grouping_is_together() -> None:
    assert merge_groups(np.array([0, 0, 2, 3]), np.array([0, 1, 1, 3])).tolist() == [0, 0, 0, 3]
    assert group_similar(np.empty(0, np.uint64), np.empty(0, int)).tolist() == []
