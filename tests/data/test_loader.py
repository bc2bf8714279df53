"""From validated records through shards to packed batches: nothing lost, nothing mislabelled, any position."""

import json

import pytest
import torch
from PIL import Image

from haplovl.data.loader import IGNORE, PackedLoader, PreparedRecords
from haplovl.data.prepare import prepare, read_manifest
from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.errors import UserError
from haplovl.files import PREPARED, RAW, TEACHERS, VALIDATED, sha256_of
from haplovl.records import Record, Turn
from haplovl.settings import BatchSettings, StageMixture, load_params

BATCH = BatchSettings(rows=4, row_tokens=128)


@pytest.fixture
def project(tmp_path, monkeypatch, processor, request):
    """A project folder with validated records and a processor, before `prepare`."""
    params = load_params(request.config.rootpath / "params.yaml")
    monkeypatch.chdir(tmp_path)
    (RAW / "images").mkdir(parents=True)
    VALIDATED.mkdir(parents=True)
    rows = []
    for n in range(60):
        names = tuple(f"{n}-{i}.png" for i in range(n % 3))
        for i, name in enumerate(names):
            Image.new("RGB", (32, 32), (n * 4, 100 * i, 50)).save(RAW / "images" / name)
        turns = (
            Turn("<image>" * len(names) + "Where is the 3?", "top left"),
            Turn("Is there a 7?", "yes" * (n % 2 + 1)),
        )
        record = Record(f"r{n}", names, turns, split="train" if n < 50 else "test")
        rows.append(ValidatedRecord(record, tuple(ImageFile(name, "0", 32, 32) for name in names), "a.jsonl"))
    write_validated(VALIDATED, rows)
    processor.save_pretrained(TEACHERS / "processor")
    return params


def limited(params, tokens):
    return params.model_copy(update={"prepare": params.prepare.model_copy(update={"max_tokens": tokens})})


def test_shards_and_manifest(project):
    prepare(project)
    manifest = read_manifest()
    assert manifest["totals"]["train"]["records"] == 50
    assert manifest["totals"]["test"]["records"] == 10
    for shard in manifest["shards"]:
        assert shard["sha256"] == sha256_of(PREPARED / shard["file"])
    first = sha256_of(PREPARED / "manifest.json")
    prepare(project)
    assert sha256_of(PREPARED / "manifest.json") == first


def test_too_long_records_are_refused_by_name_and_never_cut(project):
    prepare(limited(project, 60))
    refused = [json.loads(line) for line in (PREPARED / "quarantine.jsonl").read_text().splitlines()]
    assert refused[0]["id"] == "r2"
    assert refused[0]["reason"] == "longer than prepare.max_tokens"
    assert refused[0]["tokens"] > 60
    kept = read_manifest()["totals"]
    assert 0 < len(refused) == 60 - kept["train"]["records"] - kept["test"]["records"]


def test_nothing_left_is_an_error_and_leaves_nothing(project):
    with pytest.raises(UserError, match="no training record is left.*max_tokens"):
        prepare(limited(project, 3))
    assert not PREPARED.exists()


def test_labels_are_the_answers_and_images_fill_their_blocks(project, processor):
    prepare(project)
    records = PreparedRecords("train", processor)
    for index in (0, 1, 2):
        sample = records[index]
        assert len(sample.input_ids) == len(sample.labels) == records.lengths[index]
        learnt = [t for t, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORE]
        assert learnt == [label for label in sample.labels if label != IGNORE]
        answer = "yes" * (index % 2 + 1)
        assert processor.tokenizer.decode(learnt) == f" top left<|end|> {answer}<|end|>"
        assert sample.input_ids.count(processor.image_token_id) == index * processor.image_tokens(32, 32)
        assert (0 if sample.pixel_values is None else len(sample.pixel_values)) == index


def test_a_batch_holds_whole_documents_and_their_pictures_in_order(project, processor):
    prepare(project)
    records = PreparedRecords("train", processor)
    batch = PackedLoader(records, BATCH, StageMixture(), seed=1, micro_batch_rows=4).step(0)[0]
    image_tokens = int((batch.input_ids == processor.image_token_id).sum())
    assert image_tokens == len(batch.pixel_values) * processor.image_tokens(32, 32)
    names = iter(batch.record_ids)
    by_id = {records[i].id: records[i] for i in range(len(records))}
    pixels = []
    for row in range(BATCH.rows):
        for document in range(int(batch.document_ids[row].max()) + 1):
            chosen = batch.document_ids[row] == document
            sample = by_id[next(names)]
            assert batch.input_ids[row][chosen].tolist() == sample.input_ids
            assert batch.labels[row][chosen].tolist() == sample.labels
            pixels += [] if sample.pixel_values is None else [sample.pixel_values]
    assert torch.equal(torch.cat(pixels), batch.pixel_values)
    assert bool((batch.labels[batch.document_ids < 0] == IGNORE).all())


def test_any_position_and_any_number_of_ranks_sees_the_same_records(project, processor):
    prepare(project)
    records = PreparedRecords("train", processor)

    def ids(step, rank=0, world=1, micro=4, start=None):
        loader = PackedLoader(records, BATCH, StageMixture(), 1, micro, rank, world)
        batches = loader.step(step) if start is None else list(loader.steps(start, step + 1))[-1]
        return [name for batch in batches for name in batch.record_ids]

    far = 40  # several epochs on
    assert ids(far) == ids(far, start=far - 3)
    assert ids(far) == ids(far, micro=1) == ids(far, 0, 2, 2) + ids(far, 1, 2, 2)
    assert ids(far) != ids(far - 1)


def test_a_step_that_cannot_be_split_is_refused(project, processor):
    prepare(project)
    with pytest.raises(UserError, match="4 rows cannot be split over 3 processes"):
        PackedLoader(PreparedRecords("train", processor), BATCH, StageMixture(), 1, 1, 0, 3)
