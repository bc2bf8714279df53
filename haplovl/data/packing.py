"""Packing: records become documents, documents fill rows of a token budget. A pure function of lengths and seed."""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, count, islice
from random import Random
from typing import Any, overload

import numpy as np

from haplovl.settings import StageMixture

RECORDS_PER_INTERLEAVED = 3
"""Most records that are joined into one interleaved document."""
PATIENCE = 32
"""Documents among which a row must halve its padding, or it is closed: rows that nothing can fill stay cheap."""

Row = list[list[int]]
"""Documents of record indices."""


class Documents(Sequence[list[int]]):
    """Documents of record indices in training order; memory holds 4 bytes for each record and each document."""

    def __init__(self, records: "array[int]", edges: "array[int]") -> None:
        """`edges` are 0 and, for every document, the number of records up to its end."""
        self._records, self._edges = records, edges

    @classmethod
    def of(cls, documents: Iterable[Sequence[int]]) -> "Documents":
        """Any documents as such."""
        lists = list(documents)
        return cls(array("i", chain.from_iterable(lists)), array("i", accumulate(map(len, lists), initial=0)))

    def __len__(self) -> int:
        return len(self._edges) - 1

    @overload
    def __getitem__(self, number: int) -> list[int]: ...
    @overload
    def __getitem__(self, number: slice) -> Row: ...
    def __getitem__(self, number: int | slice) -> list[int] | Row:
        numbers = range(len(self))[number]  # raises IndexError
        return self.take([numbers])[0] if isinstance(numbers, int) else self.take(numbers)

    def take(self, numbers: Iterable[int]) -> Row:
        """The documents of these numbers."""
        records, edges = self._records, self._edges
        return [records[edges[number] : edges[number + 1]].tolist() for number in numbers]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Documents) and (self._records, self._edges) == (other._records, other._edges)

    def sums(self, values: Sequence[int]) -> np.ndarray:
        """For every document the sum of its records' values, int64."""
        chosen = np.asarray(values, dtype=np.int64)[np.asarray(self._records, dtype=np.int64)]
        before = np.concatenate([[0], np.cumsum(chosen)])
        return np.diff(before[np.asarray(self._edges, dtype=np.int64)])


def draw_documents(
    kinds: Sequence[str],
    lengths: Sequence[int],
    mixture: StageMixture,
    row_tokens: int,
    seed: int,
    epoch: int,
    allowed: Sequence[int] | None = None,
    images: Sequence[int] | None = None,
    row_images: int | None = None,
    sources: Sequence[str] | None = None,
) -> Documents:
    """One epoch's documents in training order, each a list of record indices.

    A record occurs as often per epoch as its kind's weight times its source's says (the fraction by lot). A share of
    the documents, `interleaved`, joins up to three records that together fit a row: sequences that interleave several
    images and texts. `allowed` limits the epoch to some records; `images` are the pictures of every record, which
    `row_images` bounds in a row; `sources` are the records' sources.
    """
    random = Random(f"documents-{seed}-{epoch}")
    indices = range(len(kinds)) if allowed is None else allowed
    times = _occurrences(kinds, mixture, indices, sources, random)
    chosen = array("i", np.repeat(np.asarray(indices, dtype=np.int32), times).tobytes())
    random.shuffle(chosen)
    if not mixture.interleaved:
        return Documents(chosen, array("i", range(len(chosen) + 1)))

    def fits(records: Sequence[int]) -> bool:
        if sum(lengths[index] for index in records) > row_tokens:
            return False
        return not (images and row_images) or sum(images[index] for index in records) <= row_images

    edges, position = array("i", [0]), 0
    while position < len(chosen):
        first, position = position, position + 1
        if random.random() < mixture.interleaved:
            most = min(first + RECORDS_PER_INTERLEAVED, len(chosen))
            while position < most and fits(chosen[first : position + 1]):
                position += 1
        edges.append(position)
    return Documents(chosen, edges)


def _occurrences(
    kinds: Sequence[str], mixture: StageMixture, indices: Sequence[int], sources: Sequence[str] | None, random: Random
) -> np.ndarray:
    """How often each of the records occurs in this epoch, int64."""
    weights = {"instruction": mixture.instruction, "caption": mixture.caption, "text": mixture.text}
    expected = np.fromiter((weights[kinds[index]] for index in indices), float, len(indices))
    if mixture.sources and sources is not None:
        factors = (mixture.sources.get(sources[index], 1.0) for index in indices)
        expected *= np.fromiter(factors, float, len(indices))
    whole = expected.astype(np.int64)
    lots = np.fromiter(iter(random.random, None), float, len(indices))
    return whole + (lots < expected - whole)


def shortest(lengths: Sequence[int], share: float) -> list[int]:
    """Indices of the `share` of the records with the fewest tokens, in their own order."""
    ranked = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return sorted(ranked[: math.ceil(share * len(ranked))])


def fill_rows(
    documents: Sequence[list[int]],
    lengths: Sequence[int],
    row_tokens: int,
    lookahead: int = 4096,
    images: Sequence[int] | None = None,
    row_images: int | None = None,
) -> Iterator[Row]:
    """Packs documents into rows of at most `row_tokens` tokens and `row_images` pictures; yields one row at a time.

    Every row takes the oldest waiting document and those of the next `lookahead` that fill it best, or as many as fit
    in their order where that is more. Where several choices fill it alike, older documents go first. `lengths` and
    `images` are those of the records.

    Raises:
        ValueError: at once, if a document has more tokens or pictures than a row.
    """
    documents = documents if isinstance(documents, Documents) else Documents.of(documents)
    sizes, pictures, bound = documents.sums(lengths), np.zeros(len(documents), dtype=np.int64), 0
    longest = int(sizes.max(initial=0))
    if longest > row_tokens:
        raise ValueError(
            f"a document of {longest} tokens does not fit into a row of {row_tokens}; "
            "raise batch.row_tokens or lower prepare.max_tokens"
        )
    if images is not None and row_images is not None:
        pictures, bound = documents.sums(images), row_images
    most = int(pictures.max(initial=0))
    if most > bound:
        raise ValueError(f"a document with {most} pictures does not fit into a row of {bound}; raise batch.row_images")
    if (pictures * row_tokens <= bound * sizes).all():
        pictures, bound = 0 * pictures, 0  # no row of so many tokens can have more pictures than the bound
    row = _RowSums(row_tokens, bound)
    return _filled(documents, array("q", row.place(sizes, pictures).tobytes()), row, lookahead)


def real_token_share(rows: Iterable[Row], lengths: Sequence[int], row_tokens: int) -> float:
    """Share of the rows' positions that hold a token of a document; the rest is padding."""
    number = tokens = 0
    for row in rows:
        number += 1
        tokens += sum(lengths[index] for document in row for index in document)
    return tokens / (number * row_tokens) if number else 0.0


class _RowSums:
    """Which sums of tokens and pictures a row may hold, as the bits of one integer.

    Bit `place(t, p)` stands for t tokens and p pictures. Adding a document to every sum at once is then a shift by its
    place. Each count of tokens has bits for twice the pictures: too many fall on bits that `allowed` clears.
    """

    def __init__(self, tokens: int, pictures: int) -> None:
        self.stride = 2 * pictures + 1
        every_count = ((1 << self.stride * (tokens + 1)) - 1) // ((1 << self.stride) - 1)
        self.allowed = every_count * ((1 << pictures + 1) - 1)
        self.full = self.place(tokens, 0)
        """The first bit of a row without padding."""

    def place(self, tokens: Any, pictures: Any) -> Any:
        """The bit of so many tokens and pictures: of numbers, or of arrays of them."""
        return tokens * self.stride + pictures

    def padding(self, sums: int) -> int:
        """Tokens that the fullest of the sums leaves free."""
        return (self.full - sums.bit_length()) // self.stride + 1


def _filled(documents: Documents, places: Sequence[int], row: _RowSums, lookahead: int) -> Iterator[Row]:
    fresh = iter(range(len(documents)))
    waiting: list[int] = []  # what earlier rows passed over, oldest first
    while sums := _reachable(waiting, fresh, places, row, lookahead):
        chosen = _choice(sums, [places[document] for document in waiting[: len(sums)]])
        yield documents.take(waiting[position] for position in chosen)
        for position in reversed(chosen):
            del waiting[position]


def _reachable(
    waiting: list[int], fresh: Iterator[int], places: Sequence[int], row: _RowSums, lookahead: int
) -> list[int]:
    """Subset sums by dynamic programming: entry n has those of the oldest document with any of the n after it.

    Moves the documents that it looks at from `fresh` to `waiting`. (Best fit, one document after the other, leaves
    gaps that no single document fills: a picture alone takes 576 tokens.)
    """
    sums: list[int] = []
    in_order, fits_in_order = 0, True
    last_check = last_padding = 0
    for position in count():
        if position == len(waiting):
            waiting += islice(fresh, 1)
            if position == len(waiting):
                break
        place = places[waiting[position]]
        with_it = (sums[-1] if sums else 1) << place & row.allowed
        sums.append(sums[-1] | with_it if sums else with_it)
        if fits_in_order:
            in_order += place
            fits_in_order = bool(sums[-1] >> in_order & 1)
        if fits_in_order or position == last_check + PATIENCE:
            padding = row.padding(sums[-1])
            if not fits_in_order and 2 * padding > last_padding:
                break
            last_check, last_padding = position, padding
        if sums[-1] >> row.full or (position + 1 >= lookahead and not fits_in_order):
            break
    return sums


def _choice(sums: list[int], places: list[int]) -> list[int]:
    """Positions of the documents that make up the last entry's greatest sum; the newest are left out where they can."""
    chosen, rest = [], sums[-1].bit_length() - 1
    for position in range(len(sums) - 1, 0, -1):
        if not sums[position - 1] >> rest & 1:
            chosen.append(position)
            rest -= places[position]
    return [0, *reversed(chosen)]
