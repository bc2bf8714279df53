"""Pictures that look the same: a perceptual hash of 64 bits, and groups of hashes that are nearly equal."""

from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image

SIDE = 32
"""Pixels per side of the small gray picture that is hashed."""
KEPT = 8
"""Lowest frequencies per direction that are kept: 8 x 8 bits."""
FLAT = 2.0
"""Standard deviation of gray values below which a picture has nothing to compare (blank pages, one colour)."""


def picture_hash(picture: Image.Image) -> int | None:
    """The perceptual hash (pHash) of a picture: which low frequencies of its gray values are above their median.

    Scaling, re-encoding and small changes of brightness flip few of the 64 bits; unrelated photographs differ in about
    32. None for a picture without contrast: all of those look the same.
    """
    gray = picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0).convert("L")
    values = np.asarray(gray, dtype=np.float64)
    if values.std() < FLAT:
        return None
    cosines = _cosines()
    frequencies = cosines @ values @ cosines.T
    bits = frequencies > np.median(frequencies)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@cache
def _cosines() -> np.ndarray:
    """Rows 1 … KEPT of the cosine transform (DCT-II); row 0, the mean brightness, says nothing of the content."""
    frequency, place = np.arange(1, KEPT + 1)[:, None], np.arange(SIDE)[None, :]
    # Rounded: the last bits of a cosine differ between mathematical libraries, and a hash must not.
    return np.round(np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE)), 6)


def group_similar(hashes: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """The group of every hash: the index of its first member. Two hashes are linked when they differ in at most the
    smaller of their two distances; a group is whatever links connect.

    `hashes` are uint64 [N]; `distances` integers [N], -1 for a hash that is compared with none.
    """
    groups = np.arange(len(hashes))
    taking_part = np.flatnonzero(distances >= 0)
    if len(taking_part) < 2:
        return groups
    # Equal hashes are one: thousands of copies of a picture would else be millions of pairs.
    unique, place = np.unique(hashes[taking_part], return_inverse=True)
    widest = np.full(len(unique), -1, dtype=np.int64)
    np.maximum.at(widest, place, distances[taking_part])
    label = _connected(len(unique), *_links(unique, widest))[place]
    first = np.full(label.max() + 1, len(hashes))
    np.minimum.at(first, label, taking_part)
    groups[taking_part] = first[label]
    return groups


def merge_groups(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Groups of what belongs together in either; each array and the result hold the index of a member, the first."""
    count = len(one)
    everyone = np.arange(count)
    label = _connected(count, np.r_[everyone, everyone], np.r_[one, other])
    _, first = np.unique(label, return_index=True)
    return first[label]


def _links(hashes: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of different hashes that are near enough, found without comparing every pair.

    The 64 bits are cut into distance // 2 + 1 bands: of two hashes within the distance, one band at least differs in
    one bit or none. So for every bit, the hashes that agree in the rest of that bit's band are compared.
    """
    bands = np.array_split(np.arange(64, dtype=np.uint64), int(distances.max()) // 2 + 1)
    lefts, rights = [], []
    for band in bands:
        whole = np.bitwise_or.reduce(np.uint64(1) << band)
        for bit in band:
            key = hashes & (whole & ~(np.uint64(1) << bit))
            order = np.argsort(key, kind="stable")
            for left, right in _neighbours(key[order]):
                left, right = order[left], order[right]
                apart = np.bitwise_count(hashes[left] ^ hashes[right])
                near = apart <= np.minimum(distances[left], distances[right])
                lefts.append(left[near])
                rights.append(right[near])
    return np.concatenate(lefts or [np.empty(0, int)]), np.concatenate(rights or [np.empty(0, int)])


def _neighbours(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields index pairs of equal values in sorted `keys`, at offset 1, 2, … until no two are equal that far apart."""
    active, offset = np.arange(len(keys) - 1), 1
    while len(active):
        active = active[active + offset < len(keys)]
        active = active[keys[active] == keys[active + offset]]
        if len(active):
            yield active, active + offset
        offset += 1


def _connected(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(left), dtype=bool), (left, right)), shape=(count, count))
    return connected_components(links, directed=False)[1]
