"""The loss on held-out records: every row counts once, on any number of ranks."""

from types import SimpleNamespace

import pytest
import torch

from haplovl.errors import UserError
from haplovl.settings import BatchSettings
from haplovl.train.validation import Validation

LENGTHS = [40, 60, 50, 50, 90, 100, 30, 30, 30, 80, 20]


class Engine:
    """Adds up what its batches hold, as a model whose loss is a token's length."""

    def eval(self):
        pass

    def train(self):
        pass

    def module(self, batch):
        return {"loss": torch.tensor(float(sum(2 * LENGTHS[i] for i in batch.records)))}


class Records(SimpleNamespace):
    def __len__(self):
        return len(self.lengths)


class Batch(SimpleNamespace):
    def to(self, device):
        return self


def loader(micro_rows, rank, world, **batch):
    """What `Validation` asks of a PackedLoader, without shards and tokens."""

    def collate(rows):
        return Batch(records=[i for row in rows for document in row for i in document], rows=len(rows))

    settings = BatchSettings(rows=4, row_tokens=batch.pop("row_tokens", 100), **batch)
    own = {"micro_rows": micro_rows, "rank": rank, "world": world, "collate": collate}
    return SimpleNamespace(records=Records(lengths=LENGTHS, images=[1] * len(LENGTHS)), batch=settings, **own)


def seen(validation):
    """Records that count, and how many batches go through the model."""
    batches = []
    objective = SimpleNamespace(
        weights={"loss": 3.0},
        counts=lambda batch: batches.append(batch) or {"loss": float(sum(LENGTHS[i] for i in batch.records))},
    )
    loss = validation.loss(Engine(), objective, torch.device("cpu"))
    return loss, batches


@pytest.mark.parametrize(("micro", "world"), [(1, 1), (3, 1), (4, 1), (12, 1), (1, 2), (2, 3), (4, 4)])
def test_every_row_counts_once_on_any_number_of_ranks(micro, world):
    counted, rounds = [], set()
    for rank in range(world):
        validation = Validation(loader(micro, rank, world))
        loss, batches = seen(validation)
        real = [real for _, real in validation._rounds]
        counted += [i for batch, counts in zip(batches, real, strict=True) if counts for i in batch.records]
        rounds.add(len(batches))
        assert all(batch.rows for batch in batches)
        # Weighted: three times the mean of two for each token; no row of its own for a rank is no loss of its own.
        assert loss == (6.0 if any(real) else 0.0)
    assert sorted(counted) == list(range(len(LENGTHS)))
    assert len(rounds) == 1, "under ZeRO 3 all ranks go through the model together"


def test_a_row_holds_as_many_pictures_as_in_training():
    _, batches = seen(Validation(loader(1, 0, 1, row_images=1)))
    assert [len(batch.records) for batch in batches] == [1] * len(LENGTHS)


def test_records_that_no_row_can_hold_are_one_sentence():
    with pytest.raises(UserError, match="the held-out records do not fit: a document of 100 tokens"):
        Validation(loader(1, 0, 1, row_tokens=90))
