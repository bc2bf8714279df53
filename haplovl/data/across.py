"""What only all records together can tell: repeated ids, splits, and pictures that several splits share.

Everything here is arrays of a few bytes per record and picture, so that a million records take some 100 MB.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from haplovl.data.similar import group_similar, merge_groups
from haplovl.data_settings import SplitShares
from haplovl.records import SPLITS

NO_SPLIT = -1
"""Stands for the split of an entry that has none (it could not be read)."""


@dataclass
class Rows:
    """Columns over all entries, in order.

    `readable`: a record could be read. `source`: its number. `declared`: the index in SPLITS that the record names, or
    NO_SPLIT. `place`: where the hash of its id falls in 0 … 2**64. `ids`: equal for equal ids of a source. The
    pictures of entry i are `pictures[starts[i]:starts[i + 1]]`, numbers of pictures.
    """

    readable: np.ndarray
    source: np.ndarray
    declared: np.ndarray
    place: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    pictures: np.ndarray

    @property
    def row_of(self) -> np.ndarray:
        """The entry that each element of `pictures` belongs to."""
        return np.repeat(np.arange(len(self.readable)), np.diff(self.starts))

    def first_where(self, chosen: np.ndarray) -> np.ndarray:
        """For every entry the first index into `pictures` that is chosen, or -1. `chosen` is a mask over `pictures`."""
        first = np.full(len(self.readable), -1)
        at = np.flatnonzero(chosen)[::-1]
        first[self.row_of[at]] = at
        return first


def earlier_same(ids: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """How many readable entries before each have the same id."""
    earlier = np.zeros(len(ids), dtype=np.int64)
    rows = np.flatnonzero(readable)
    order = rows[np.argsort(ids[rows], kind="stable")]
    if len(order):
        starts = np.r_[True, ids[order][1:] != ids[order][:-1]]
        begin = np.flatnonzero(starts)
        earlier[order] = np.arange(len(order)) - np.repeat(begin, np.diff(np.r_[begin, len(order)]))
    return earlier


@dataclass
class SharedPictures:
    """Which pictures are the same: `content` by their bytes, `look` by their bytes or their perceptual hash.

    Both give every picture the number of a group. `place` is where the group of `look` falls in 0 … 2**64.
    """

    content: np.ndarray
    look: np.ndarray
    place: np.ndarray


def shared_pictures(
    sha256: np.ndarray, hashes: np.ndarray, distances: np.ndarray, usable: np.ndarray
) -> SharedPictures:
    """Groups pictures. `sha256` is uint8 [N, 32], `hashes` uint64 [N], `distances` [N] is -1 where none is compared.

    Unusable pictures are groups of their own.
    """
    count = len(usable)
    content = np.arange(count)
    at = np.flatnonzero(usable)
    if len(at):
        keys = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), len(at), [None, pa.py_buffer(np.ascontiguousarray(sha256[at]))]
        )
        codes = np.asarray(keys.dictionary_encode().indices)
        _, first = np.unique(codes, return_index=True)
        content[at] = at[first][codes]
    look = merge_groups(content, group_similar(hashes, np.where(usable, distances, -1)))
    begin = sha256[:, :8].copy().view(">u8").ravel().astype(np.uint64)
    smallest = np.full(count, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, look[at], begin[at])
    return SharedPictures(content, look, smallest[look])


@dataclass
class Splits:
    """The split of every entry (index in SPLITS, or NO_SPLIT), and where it clashes with a stronger held-out split.

    `copied` and `similar` hold the first index into `Rows.pictures` of a picture that another split owns, or -1: byte
    for byte the same, and only looking the same. `copied_owner` and `similar_owner` hold the owning split of each
    element of `Rows.pictures`.
    """

    split: np.ndarray
    copied: np.ndarray
    similar: np.ndarray
    copied_owner: np.ndarray
    similar_owner: np.ndarray


def split_at(place: np.ndarray, shares: SplitShares) -> np.ndarray:
    """The split that a place in 0 … 2**64 falls into: test first, then validation, then train."""
    share = place.astype(np.float64) / 2.0**64
    held_out = np.where(share < shares.test + shares.validation, SPLITS.index("validation"), SPLITS.index("train"))
    return np.where(share < shares.test, SPLITS.index("test"), held_out)


def assign_splits(rows: Rows, shared: SharedPictures, usable: np.ndarray, shares: list[SplitShares]) -> Splits:
    """Gives a split to entries that name none, by their first picture (all questions about one picture, and about those
    that look like it, go together) or their id; then marks those that a stronger split owns a picture of.

    `usable` marks entries whose pictures are all fine: only those claim pictures. `shares` are the sources'.
    The order of SPLITS is the strength of the claim.
    """
    place = rows.place.copy()
    with_picture = np.flatnonzero(usable & (np.diff(rows.starts) > 0))
    place[with_picture] = shared.place[rows.pictures[rows.starts[with_picture]]]
    split = rows.declared.copy()
    for number, own in enumerate(shares):
        chosen = usable & (rows.declared == NO_SPLIT) & (rows.source == number)
        split[chosen] = split_at(place[chosen], own)
    claims = usable[rows.row_of]
    claimed = np.where(claims, split[rows.row_of], NO_SPLIT)
    owners = {}
    for name, groups in (("copied", shared.content), ("similar", shared.look)):
        owner = np.full(len(groups), NO_SPLIT)
        np.maximum.at(owner, groups[rows.pictures[claims]], claimed[claims])
        owners[name] = owner[groups[rows.pictures]]
    copied = rows.first_where(claims & (owners["copied"] != claimed))
    similar = rows.first_where(claims & (owners["similar"] != claimed))
    similar[copied >= 0] = -1
    return Splits(split, copied, similar, owners["copied"], owners["similar"])
