"""Any position of the training data is found at once, however it was reached before."""

from itertools import count

import pytest

from haplovl.data import loader as loader_room
from haplovl.data.loader import PackedLoader
from haplovl.data.plans import PLANS, Plan
from haplovl.settings import BatchSettings, CurriculumPhase, StageMixture

BATCH = BatchSettings(rows=4, row_tokens=128)


class Records:
    """Lengths without records: enough for packing."""

    def __init__(self, number=400):
        self.kinds = ["text"] * number
        self.sources = ["a", "b"] * (number // 2)
        self.lengths = [10 + n * 7 % 60 for n in range(number)]
        self.images = [0] * number

    def __len__(self):
        return len(self.kinds)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Plans of few records are kept, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loader_room, "LEAST_RECORDS", 1)


def loader(records=None, mixture=None, seed=1, batch=BATCH, curriculum=()):
    return PackedLoader(records or Records(), batch, mixture or StageMixture(), seed, 2, curriculum=curriculum)


def steps_of_epochs(number):
    """The loader's rows from the beginning, and the first step of epoch `number`."""
    here = loader()
    rows = []
    for step in count():
        rows.append(here.rows_of_step(step))
        if here._place(step) == (number, 0):
            return rows, step


def test_any_position_packs_at_most_two_epochs(monkeypatch):
    rows, last = steps_of_epochs(7)
    for path in PLANS.rglob("*.npy"):
        path.unlink()
    packed = []
    real = loader_room.fill_rows
    monkeypatch.setattr(loader_room, "fill_rows", lambda *a, **k: packed.append(1) or real(*a, **k))
    assert loader().rows_of_step(last) == rows[last]
    assert len(packed) == 2
    loader().rows_of_step(1000 * last)
    assert len(packed) == 3  # the first epoch was kept


def test_phases_of_a_curriculum_are_found_as_they_are_gone_through():
    curriculum = [CurriculumPhase(share=0.3, epochs=2), CurriculumPhase(share=0.6, epochs=3)]
    here = loader(curriculum=curriculum)
    rows, places = [], []
    for step in range(120):
        rows.append(here.rows_of_step(step))
        places.append(here._place(step))
    assert {epoch for epoch, _ in places} >= set(range(7))
    assert places == sorted(places)  # one epoch after the other, none left out
    for step in (119, 40, 3, 77):
        assert loader(curriculum=curriculum).rows_of_step(step) == rows[step]


def test_an_epoch_with_fewer_rows_than_the_first_one_begins_again():
    records = Records()
    records.kinds = ["caption", "text"] * 200
    here = loader(records, StageMixture(text=0.5, caption=1.0))  # how many texts an epoch has is decided by lot
    steps = here._count(0)
    sizes = {}
    for epoch in range(20):
        drawn = [here.rows_of_step(epoch * steps + step) for step in range(steps)]
        assert all(len(rows) == 4 for rows in drawn)
        sizes[epoch] = len(here._plan(epoch))
    assert min(sizes.values()) < steps * 4 <= sizes[0]  # else this shows nothing


def test_a_position_that_was_reached_once_is_found_without_packing(monkeypatch):
    rows, last = steps_of_epochs(5)
    packed = []
    monkeypatch.setattr(loader_room, "fill_rows", lambda *a, **k: packed.append(1))
    again = loader()
    for step in (last // 2, 0, 3, last // 4):
        assert again.rows_of_step(step) == rows[step]
    assert not packed


def test_rows_are_the_same_kept_or_packed_forward_or_backward():
    rows, last = steps_of_epochs(3)
    for path in PLANS.rglob("*.npy"):
        path.unlink()
    fresh = loader()
    for step in (last, 0, last // 2, last - 1, 1):
        assert fresh.rows_of_step(step) == rows[step]


def test_every_record_occurs_once_an_epoch():
    rows, last = steps_of_epochs(1)
    seen = [index for step in rows[:last] for row in step for document in row for index in document]
    assert len(seen) == len(set(seen)) > 0.95 * 400


def test_a_damaged_plan_is_packed_again():
    rows, last = steps_of_epochs(2)
    for path, content in zip(sorted(PLANS.rglob("*.npy")), (b"", b"rubbish"), strict=False):
        path.write_bytes(content)
    assert loader().rows_of_step(last) == rows[last]
    path = sorted(PLANS.rglob("*.npy"))[0]
    path.write_bytes(path.read_bytes()[:-8])
    assert loader().rows_of_step(last) == rows[last]


@pytest.mark.parametrize("change", ["lengths", "kinds", "sources", "images", "mixture", "seed", "batch", "curriculum"])
def test_other_records_or_settings_never_get_a_kept_plan(change):
    records = Records()
    if change in ("lengths", "images"):
        getattr(records, change)[3] += 1
    elif change in ("kinds", "sources"):
        getattr(records, change)[3] = "caption"
    other = {
        "mixture": {"mixture": StageMixture(text=2.0)},
        "seed": {"seed": 2},
        "batch": {"batch": BATCH.model_copy(update={"row_tokens": 256})},
        "curriculum": {"curriculum": [CurriculumPhase(share=0.5, epochs=1)]},
    }.get(change, {})
    assert loader(records, **other)._key != loader()._key


def test_the_number_of_rows_in_a_step_shares_the_plan():
    assert loader(batch=BATCH.model_copy(update={"rows": 8}))._key == loader()._key


def test_reading_ahead_keeps_the_epoch_before_its_end_is_reached():
    here = loader()
    here.rows_of_step(0)
    assert not list(PLANS.rglob("*.npy"))
    here._pack_ahead()
    assert len(list(PLANS.rglob("*.npy"))) == 1


def test_a_plan_gives_back_the_rows_that_it_was_given():
    rows = [[[3, 1], [2]], [[0]], [[5], [4, 7, 6]]]
    plan = Plan(lambda: iter(rows))
    assert plan.has(2) and not plan.has(4) and len(plan) == 3
    assert [plan.row(number) for number in range(3)] == rows
