"""Packing keeps every record whole and in an order that only the seed decides."""

from collections import Counter
from random import Random

import pytest

from haplovl.data.packing import draw_documents, fill_rows, shortest
from haplovl.settings import StageMixture


def lengths(count=2000, seed=0):
    random = Random(seed)
    return [random.randint(20, 120) for _ in range(count)]


def test_rows_hold_every_document_once_within_the_budget():
    sizes = lengths()
    documents = draw_documents(["instruction"] * len(sizes), sizes, StageMixture(), 256, seed=1, epoch=0)
    rows = fill_rows(documents, sizes, 256)
    seen = Counter(index for row in rows for document in row for index in document)
    assert seen == Counter(range(len(sizes)))
    used = [sum(sizes[i] for document in row for i in document) for row in rows]
    assert max(used) <= 256
    assert sum(used) / (256 * len(rows)) > 0.95


def test_order_follows_from_seed_and_epoch_alone():
    sizes = lengths(200)
    draw = [
        draw_documents(["text"] * 200, sizes, StageMixture(), 256, seed, epoch)
        for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert draw[0] == draw[1]
    assert draw[0] != draw[2] != draw[3]


def test_weights_decide_how_often_a_kind_occurs():
    kinds = ["text"] * 1000 + ["instruction"] * 1000 + ["caption"] * 1000
    mixture = StageMixture(text=0.25, instruction=2.0, caption=0.0)
    chosen = Counter(kinds[i] for d in draw_documents(kinds, [10] * 3000, mixture, 256, seed=1, epoch=0) for i in d)
    assert chosen["instruction"] == 2000
    assert 200 < chosen["text"] < 300
    assert chosen["caption"] == 0


def test_interleaved_documents_join_records_that_fit_a_row():
    sizes = lengths()
    mixture = StageMixture(interleaved=0.5)
    documents = draw_documents(["text"] * len(sizes), sizes, mixture, 256, seed=1, epoch=0)
    joined = [d for d in documents if len(d) > 1]
    assert 0.3 < len(joined) / len(documents) < 0.7
    assert max(sum(sizes[i] for i in d) for d in documents) <= 256
    assert Counter(i for d in documents for i in d) == Counter(range(len(sizes)))


def test_the_shortest_records_come_first():
    sizes = [9, 3, 5, 1, 7, 5]
    assert shortest(sizes, 0.5) == [1, 2, 3]
    assert shortest(sizes, 1.0) == [0, 1, 2, 3, 4, 5]
    only = draw_documents(["text"] * 6, sizes, StageMixture(), 99, seed=1, epoch=0, allowed=[1, 2])
    assert sorted(only) == [[1], [2]]


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="300 tokens does not fit into a row of 256"):
        fill_rows([[0]], [300], 256)
