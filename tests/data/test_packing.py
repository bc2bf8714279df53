"""Packing keeps every record whole and in an order that only the seed decides."""

from collections import Counter
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haplovl.data.packing import draw_documents, fill_rows, real_token_share, shortest
from haplovl.settings import StageMixture

TOKENS, PICTURES = 40, 3
documents_of = st.lists(st.tuples(st.integers(1, TOKENS), st.integers(0, PICTURES)), max_size=60)
"""Tokens and pictures of documents that fit a row."""


def lengths(count=2000, seed=0):
    random = Random(seed)
    return [random.randint(20, 120) for _ in range(count)]


def packed(sizes, lookahead=4096, row_tokens=TOKENS, row_images=PICTURES):
    """Rows of document numbers."""
    tokens, pictures = zip(*sizes, strict=True) if sizes else ((), ())
    rows = fill_rows([[i] for i in range(len(sizes))], tokens, row_tokens, lookahead, pictures, row_images)
    return [[document[0] for document in row] for row in rows]


@pytest.fixture
def mix(monkeypatch, request):
    """benchmarks/lengths.py"""
    monkeypatch.syspath_prepend(request.config.rootpath / "benchmarks")
    import lengths

    return lengths


def test_rows_hold_every_document_once_within_the_budget():
    sizes = lengths()
    documents = draw_documents(["instruction"] * len(sizes), sizes, StageMixture(), 256, seed=1, epoch=0)
    rows = list(fill_rows(documents, sizes, 256))
    seen = Counter(index for row in rows for document in row for index in document)
    assert seen == Counter(range(len(sizes)))
    used = [sum(sizes[i] for document in row for i in document) for row in rows]
    assert max(used) <= 256
    assert sum(used) / (256 * len(rows)) == real_token_share(rows, sizes, 256) > 0.99


@given(documents_of, st.integers(1, 70))
def test_nothing_is_lost_cut_or_starved(sizes, lookahead):
    rows = packed(sizes, lookahead)
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    waiting = list(range(len(sizes)))
    for row in rows:
        assert sum(sizes[i][0] for i in row) <= TOKENS
        assert sum(sizes[i][1] for i in row) <= PICTURES
        assert row == sorted(row)
        assert row[0] == waiting[0]
        waiting = [number for number in waiting if number not in row]


@given(st.lists(st.tuples(st.integers(1, TOKENS), st.integers(0, PICTURES)), min_size=1, max_size=9))
def test_no_choice_of_documents_fills_the_first_row_better(sizes):
    rest = range(1, len(sizes))
    choices = [(0, *more) for size in range(len(sizes)) for more in combinations(rest, size)]
    fitting = [c for c in choices if sum(sizes[i][0] for i in c) <= TOKENS and sum(sizes[i][1] for i in c) <= PICTURES]
    assert sum(sizes[i][0] for i in packed(sizes)[0]) == max(sum(sizes[i][0] for i in c) for c in fitting)


@given(documents_of, st.integers(1, 20))
def test_no_document_overtakes_more_than_the_lookahead(sizes, lookahead):
    waiting = list(range(len(sizes)))
    for row in packed(sizes, lookahead):
        in_order = 0
        while all(sum(sizes[i][kind] for i in waiting[: in_order + 1]) <= most for kind, most in enumerate((40, 3))):
            in_order += 1
            if in_order == len(waiting):
                break
        assert waiting.index(row[-1]) < max(lookahead, in_order + 1)
        waiting = [number for number in waiting if number not in row]


@given(documents_of, st.data())
def test_later_documents_do_not_change_rows_that_are_full(sizes, data):
    rows, shorter = packed(sizes), packed(sizes[: data.draw(st.integers(0, len(sizes)))])
    for one, other in zip(shorter, rows, strict=False):
        if sum(sizes[i][0] for i in one) < TOKENS:
            break
        assert one == other


@pytest.mark.parametrize(("lookahead", "least"), [(4096, 0.999), (64, 0.99)])
def test_rows_of_a_llava_like_mix_have_hardly_any_padding(mix, lookahead, least):
    samples = mix.draw(20_000, seed=3)
    sizes, pictures = [s.length for s in samples], [s.images for s in samples]
    documents = [[i] for i in range(len(samples))]
    for bound in (None, 6):
        rows = list(fill_rows(documents, sizes, 4096, lookahead, pictures, bound))
        assert real_token_share(rows, sizes, 4096) > least
        assert max(sum(pictures[i] for document in row for i in document) for row in rows) <= (bound or 99)
    # What this is measured against: taking documents as they come.
    assert real_token_share(fill_rows(documents, sizes, 4096, 1), sizes, 4096) < 0.95


def test_rows_that_nothing_fills_hold_what_fits():
    rows = list(fill_rows([[i] for i in range(20_000)], [1000] * 20_000, 4096))
    assert {len(row) for row in rows} == {4}


def test_the_mix_is_as_large_as_its_published_files(mix):
    published = {"instruct, conversation": 126e6, "instruct, description": 20.5e6, "instruct, reasoning": 79.6e6}
    for name, size in published.items():
        assert mix.file_bytes(name) * mix.KINDS[name].records == pytest.approx(size, rel=0.1)
    assert sum(kind.records for kind in mix.KINDS.values()) == 665_298
    assert sum(mix.file_bytes(name) * kind.records for name, kind in mix.KINDS.items()) == pytest.approx(
        1.03e9, rel=0.1
    )


def test_samples_of_the_mix_follow_from_the_seed(mix):
    samples = mix.draw(3000, seed=1)
    assert samples == mix.draw(3000, seed=1) != mix.draw(3000, seed=2)
    assert all(0 < s.supervised < s.length - 576 * s.images <= mix.MAX_TEXT_TOKENS for s in samples)
    assert sum(s.images for s in samples) / 3000 == pytest.approx(1 - 40_688 / 665_298, abs=0.02)


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


def test_interleaved_documents_keep_to_the_pictures_of_a_row():
    mixture, images = StageMixture(interleaved=1.0), [1] * 300
    documents = draw_documents(["instruction"] * 300, [10] * 300, mixture, 256, 1, 0, images=images, row_images=2)
    assert {len(document) for document in documents} == {2}
    assert len(list(fill_rows(documents, [10] * 300, 256, images=images, row_images=2))) == 150


def test_the_shortest_records_come_first():
    sizes = [9, 3, 5, 1, 7, 5]
    assert shortest(sizes, 0.5) == [1, 2, 3]
    assert shortest(sizes, 1.0) == [0, 1, 2, 3, 4, 5]
    only = draw_documents(["text"] * 6, sizes, StageMixture(), 99, seed=1, epoch=0, allowed=[1, 2])
    assert sorted(only) == [[1], [2]]


def test_a_document_that_no_row_holds_is_refused_at_once():
    with pytest.raises(ValueError, match=r"300 tokens does not fit into a row of 256; raise batch\.row_tokens"):
        fill_rows([[0]], [300], 256)
    with pytest.raises(ValueError, match=r"with 5 pictures does not fit into a row of 4; raise batch\.row_images"):
        fill_rows([[0]], [300], 512, images=[5], row_images=4)
