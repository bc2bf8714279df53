"""Packing: records become documents, documents fill rows of a token budget. A pure function of lengths and seed."""

import math
from collections.abc import Sequence
from random import Random

from haplovl.settings import StageMixture

OPEN_ROWS = 64
"""Rows that stay open at once: the look-ahead that lets short documents fill the gaps of long ones."""
RECORDS_PER_INTERLEAVED = 3
"""Most records that are joined into one interleaved document."""


def draw_documents(
    kinds: Sequence[str],
    lengths: Sequence[int],
    mixture: StageMixture,
    row_tokens: int,
    seed: int,
    epoch: int,
    allowed: Sequence[int] | None = None,
) -> list[list[int]]:
    """One epoch's documents in training order, each a list of record indices.

    A kind of weight w occurs w times per epoch (the fraction by lot). A share of the documents, `interleaved`, joins
    up to three records that together fit a row: sequences that interleave several images and texts. `allowed` limits
    the epoch to some records.
    """
    random = Random(f"documents-{seed}-{epoch}")
    weights = {"instruction": mixture.instruction, "caption": mixture.caption, "text": mixture.text}
    chosen = []
    for index in range(len(kinds)) if allowed is None else allowed:
        weight = weights[kinds[index]]
        chosen += [index] * (int(weight) + int(random.random() < weight - int(weight)))
    random.shuffle(chosen)
    documents, position = [], 0
    while position < len(chosen):
        document = [chosen[position]]
        position += 1
        if mixture.interleaved and random.random() < mixture.interleaved:
            total = lengths[document[0]]
            while position < len(chosen) and len(document) < RECORDS_PER_INTERLEAVED:
                total += lengths[chosen[position]]
                if total > row_tokens:
                    break
                document.append(chosen[position])
                position += 1
        documents.append(document)
    return documents


def shortest(lengths: Sequence[int], share: float) -> list[int]:
    """Indices of the `share` of the records with the fewest tokens, in their own order."""
    ranked = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return sorted(ranked[: math.ceil(share * len(ranked))])


def fill_rows(documents: list[list[int]], lengths: Sequence[int], row_tokens: int) -> list[list[list[int]]]:
    """Packs documents into rows of at most `row_tokens` tokens: best fit among the open rows, in order.

    Returns rows of documents of record indices.

    Raises:
        ValueError: a document is longer than a row.
    """
    done: list[list[list[int]]] = []
    rows: list[tuple[int, list[list[int]]]] = []  # (free tokens, documents), oldest first
    for document in documents:
        size = sum(lengths[index] for index in document)
        if size > row_tokens:
            raise ValueError(f"a document of {size} tokens does not fit into a row of {row_tokens}")
        fitting = [i for i, (free, _) in enumerate(rows) if free >= size]
        if fitting:
            best = min(fitting, key=lambda i: rows[i][0])
            free, content = rows[best]
            content.append(document)
            rows[best] = (free - size, content)
        else:
            rows.append((row_tokens - size, [document]))
        if len(rows) > OPEN_ROWS:
            fullest = min(range(len(rows)), key=lambda i: rows[i][0])
            done.append(rows.pop(fullest)[1])
    return done + [content for _, content in rows]
