"""From validated records through shards to packed batches: nothing lost, nothing mislabelled, any position."""

import io
import json
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from haplovl.data import prepared as prepared_room
from haplovl.data.loader import PackedLoader
from haplovl.data.media import Media
from haplovl.data.picture_facts import ReadPictures
from haplovl.data.prepare import prepare, read_manifest
from haplovl.data.prepared import IGNORE, PreparedRecords
from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.errors import UserError
from haplovl.files import PREPARED, RAW, TEACHERS, VALIDATED, sha256_of
from haplovl.model import HaploImageProcessor, HaploProcessor
from haplovl.records import Record, Turn
from haplovl.settings import BatchSettings, StageMixture, load_params

BATCH = BatchSettings(rows=4, row_tokens=128)


@pytest.fixture
def project(tmp_path, monkeypatch, processor, request):
    """A project folder with validated records and a processor, before `prepare`."""
    params = load_params(request.config.rootpath / "params.yaml")
    monkeypatch.chdir(tmp_path)
    (RAW / "a/media").mkdir(parents=True)
    VALIDATED.mkdir(parents=True)
    rows = []
    for n in range(60):
        names = tuple(f"{n}-{i}.png" for i in range(n % 3))
        hashes = {}
        for i, name in enumerate(names):
            Image.new("RGB", (32, 32), (n * 4, 100 * i, 50)).save(RAW / "a/media" / name)
            hashes[name] = sha256_of(RAW / "a/media" / name)
        turns = (
            Turn("<image>" * len(names) + "Where is the 3?", "top left"),
            Turn("Is there a 7?", "yes" * (n % 2 + 1)),
        )
        record = Record(f"r{n}", names, turns, split="train" if n < 50 else "test")
        images = tuple(ImageFile(f"file:{name}", hashes[name], 32, 32) for name in names)
        rows.append(ValidatedRecord(record, images, "a"))
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
    with pytest.raises(UserError, match=r"no training record is left.*max_tokens \(the shortest has \d+ tokens\)"):
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
        assert list(sample.input_ids).count(processor.image_token_id) == index * processor.image_tokens(32, 32)
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
            assert batch.input_ids[row][chosen].tolist() == sample.input_ids.tolist()
            assert batch.labels[row][chosen].tolist() == sample.labels.tolist()
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


def test_rows_keep_to_the_bound_on_pictures(project, processor):
    prepare(project)
    records = PreparedRecords("train", processor)
    assert list(records.images[:6]) == [0, 1, 2, 0, 1, 2]
    batch = BatchSettings(rows=4, row_tokens=512, row_images=2)
    for step in range(5):
        for one in PackedLoader(records, batch, StageMixture(interleaved=0.5), 1, 1).step(step):
            assert len(one.image_grids) <= 2
    with pytest.raises(UserError, match=r"2 pictures does not fit into a row of 1; raise batch\.row_images"):
        PackedLoader(records, batch.model_copy(update={"row_images": 1}), StageMixture(), 1, 1).step(0)


# --- threads ---------------------------------------------------------------------------------------------------------
class Watched(PreparedRecords):
    """Counts what is read, and takes its time."""

    read, seconds = 0, 0.0

    def __getitem__(self, index):
        self.read += 1
        time.sleep(self.seconds)
        return super().__getitem__(index)


def own_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith(("packer", "decoder"))]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_steps(project, processor, workers):
    prepare(project)
    records = PreparedRecords("train", processor)
    plain = PackedLoader(records, BATCH, StageMixture(), 1, 2)
    ahead = PackedLoader(records, BATCH, StageMixture(), 1, 2, workers=workers)
    for number, step in enumerate(ahead.steps(3, 30), start=3):
        for one, other in zip(step, plain.step(number), strict=True):
            assert one.record_ids == other.record_ids
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.pixel_values, other.pixel_values)
    assert number == 29
    assert not own_threads()


def test_a_steps_records_do_not_depend_on_how_it_is_split(project, processor):
    prepare(project)
    records = PreparedRecords("train", processor)
    plain = PackedLoader(records, BATCH, StageMixture(interleaved=0.3), 1, 4)
    expected = [plain.step(step)[0].record_ids for step in range(30)]

    @settings(max_examples=25, deadline=None)
    @given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(0, 28), st.data())
    def check(world, micro, workers, start, data):
        stop = data.draw(st.integers(start, 30))
        found = [[] for _ in range(start, stop)]
        for rank in range(world):
            loader = PackedLoader(records, BATCH, StageMixture(interleaved=0.3), 1, micro, rank, world, (), workers)
            for names, step in zip(found, loader.steps(start, stop), strict=True):
                assert all(batch.input_ids.shape[0] == min(micro, 4 // world) for batch in step)
                names += [name for batch in step for name in batch.record_ids]
        assert found == expected[start:stop]

    check()


def test_workers_stay_a_bounded_number_of_steps_ahead_and_end_with_the_iterator(project, processor):
    prepare(project)
    records = Watched("train", processor)
    loader = PackedLoader(records, BATCH, StageMixture(), 1, 2, workers=2)
    sizes = [sum(len(document) for row in loader.rows_of_step(step) for document in row) for step in range(4)]
    steps = loader.steps(0, 1000)
    next(steps)
    deadline = time.monotonic() + 20
    while records.read < sum(sizes[:3]) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    # One step was given out; two micro-batches (a step) and one per worker (another step) are ready.
    assert records.read == sum(sizes[:3])
    assert own_threads()
    steps.close()
    assert not own_threads()
    assert records.read == sum(sizes[:3])


def test_it_is_known_how_long_the_caller_waited(project, processor):
    prepare(project)
    records = Watched("train", processor)
    loader = PackedLoader(records, BATCH, StageMixture(), 1, 4, workers=1)
    records.seconds = 0.02
    steps = loader.steps(0, 5)
    step = next(steps)
    assert loader.waited > 0.02 * len(step[0].record_ids) > 0.1
    time.sleep(1.5)
    next(steps)
    assert loader.waited < 0.1
    steps.close()


def rewrite(column, change, record="r4"):
    """Changes one record's value of a column in the first shard."""
    path = PREPARED / "train-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for row in rows:
        if row["id"] == record:
            row[column] = change(row[column])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


@pytest.mark.parametrize(
    ("column", "change", "reason"),
    [
        ("images", lambda images: [images[0][:60]], "image 1 of 1: .*damaged"),
        ("images", lambda images: [b""], "image 1 of 1: the file has 0 bytes"),
        ("images", lambda images: [None], "0 pictures for 1 image placeholders"),
        ("images", lambda images: [], "0 pictures for 1 image placeholders"),
        ("images", lambda images: images * 2, "2 pictures for 1 image placeholders"),
        ("input_ids", lambda ids: ids + ids[-1:], "[0-9]+ tokens, but the index announces"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named_with_its_record_and_shard(project, processor, column, change, reason):
    prepare(project)
    rewrite(column, change)
    loader = PackedLoader(PreparedRecords("train", processor), BATCH, StageMixture(), 1, 2, workers=2)
    with pytest.raises(UserError, match=rf"record 'r4' in data/prepared/train-00000\.parquet: {reason}"):
        for _ in loader.steps(0, 30):
            pass
    assert not own_threads()


def test_a_damaged_shard_is_named(project, processor):
    prepare(project)
    records = PreparedRecords("train", processor)
    for name, read in (
        ("train-00000.parquet", lambda: records[0]),
        ("index-train.arrow", lambda: PreparedRecords("train", processor)),
    ):
        path = PREPARED / name
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match=rf"the file data/prepared/{name} cannot be read"):
            read()


def test_more_shards_than_are_kept_open_are_read(mixed_sizes, monkeypatch):
    params, processor, rows = mixed_sizes
    prepare(params.model_copy(update={"prepare": params.prepare.model_copy(update={"records_per_shard": 2})}))
    monkeypatch.setattr(prepared_room, "OPEN_SHARDS", 2)
    monkeypatch.setattr(prepared_room, "FOOTERS", 3)
    records = PreparedRecords("train", processor)
    assert len(list(PREPARED.glob("train-*.parquet"))) > 5
    for index in [*range(20), *reversed(range(20)), 0, 19, 7]:
        assert records[index].id == rows[index].record.id


def test_pictures_do_not_stay_in_memory(mixed_sizes):
    params, processor, _ = mixed_sizes
    shards_of_four = params.prepare.model_copy(update={"records_per_shard": 4})
    prepare(params.model_copy(update={"prepare": shards_of_four}))
    records = PreparedRecords("train", processor)
    shards = sum(shard.stat().st_size for shard in PREPARED.glob("train-*.parquet"))
    before = pa.total_allocated_bytes()
    for index in range(len(records)):
        _ = records[index]
    assert pa.total_allocated_bytes() - before < shards / 4


def test_reading_a_record_reads_few_others(project, processor):
    prepare(project)
    file = pq.ParquetFile(PREPARED / "train-00000.parquet")
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert sum(groups) == 50
    assert max(groups) <= 32


# --- any resolution ------------------------------------------------------------------------------------------------
SHAPES = [(32, 16), (64, 64), (20, 90), (90, 20), (31, 33), (128, 9), (3, 3), (50, 70)]
"""Heights and widths; the model shows them in one to four tiles."""


@pytest.fixture
def mixed_sizes(tmp_path, monkeypatch, tokenizer, request):
    """A project whose records have up to two pictures of other sizes, some of them JPEGs that lie on their side."""
    params = load_params(request.config.rootpath / "params.yaml")
    monkeypatch.chdir(tmp_path)
    (RAW / "a/media").mkdir(parents=True)
    VALIDATED.mkdir(parents=True)
    records = []
    for n in range(24):
        names = tuple(f"{n}-{i}.{'jpg' if n % 2 else 'png'}" for i in range(n % 3))
        for i, name in enumerate(names):
            height, width = SHAPES[(n + 3 * i) % len(SHAPES)]
            exif = Image.Exif()
            exif[0x0112] = 6 if n % 2 else 1
            Image.effect_noise((width, height), 80).convert("RGB").save(RAW / "a/media" / name, exif=exif)
        turn = Turn("<image>" * len(names) + "Where is the 3?", "top left")
        records.append(Record(f"r{n}", names, (turn,), split="train" if n < 20 else "test"))
    look = ReadPictures(Media(RAW), 10_000, frozenset())

    def seen(name):
        facts = look.row("a", f"file:{name}")
        return ImageFile(facts["ref"], facts["sha256"].hex(), facts["width"], facts["height"])

    rows = [ValidatedRecord(record, tuple(map(seen, record.images)), "a") for record in records]
    write_validated(VALIDATED, rows)
    processor = HaploProcessor(HaploImageProcessor(32, 8, max_tiles=4), tokenizer)
    processor.save_pretrained(TEACHERS / "processor")
    return limited(params, 400), processor, rows


def test_lengths_are_those_of_the_tokens_whatever_a_pictures_size(mixed_sizes):
    params, processor, rows = mixed_sizes
    prepare(params)
    records, tiles = PreparedRecords("train", processor), set()
    assert len(records) == 20
    for index, row in enumerate(rows[:20]):
        sample = records[index]
        announced = [processor.image_tokens(image.height, image.width) for image in row.images]
        assert sample.id == row.record.id
        assert len(sample.input_ids) == len(sample.labels) == records.lengths[index]
        assert list(sample.input_ids).count(processor.image_token_id) == sum(announced)
        assert [processor.grid_tokens(grid) for grid in sample.image_grids] == announced
        if row.images:
            assert sample.pixel_values.shape == (sum(grid.tiles for grid in sample.image_grids), 3, 32, 32)
            # As the processor sees the same files when the model answers.
            files = [Media().path(row.source, image.path) for image in row.images]
            batch = processor(text="<image>" * len(files), images=files, return_tensors="pt")
            assert [grid.to_list() for grid in sample.image_grids] == batch["image_grids"].tolist()
            pixels = [part[: grid.tiles] for part, grid in zip(batch["pixel_values"], sample.image_grids, strict=True)]
            assert torch.equal(torch.cat(pixels), sample.pixel_values)
            tiles |= {grid.tiles for grid in sample.image_grids}
    assert tiles == {1, 2, 3, 4}


def test_prepare_counts_the_tokens_of_every_picture(mixed_sizes):
    params, processor, rows = mixed_sizes
    prepare(params)
    lengths = [*PreparedRecords("train", processor).lengths, *PreparedRecords("test", processor).lengths]
    limit = sorted(lengths)[len(lengths) // 2]
    prepare(limited(params, limit))
    refused = [json.loads(line) for line in (PREPARED / "quarantine.jsonl").read_text().splitlines()]
    longer = {row.record.id: length for row, length in zip(rows, lengths, strict=True) if length > limit}
    assert {row["id"]: row["tokens"] for row in refused} == longer
    assert len(set(longer.values())) > 3
    kept = [*PreparedRecords("train", processor).lengths, *PreparedRecords("test", processor).lengths]
    assert kept == [length for length in lengths if length <= limit]


def test_a_picture_of_another_size_than_announced_is_named(mixed_sizes):
    params, processor, _ = mixed_sizes
    prepare(params)
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")  # two rows of two tiles; 9x128 is one column
    rewrite("images", lambda images: [file.getvalue()], record="r13")
    records = PreparedRecords("train", processor)
    with pytest.raises(UserError, match=r"record 'r13' in .*image 1 of 1: its size, 64x64, gives another layout"):
        _ = records[13].pixel_values


@pytest.mark.parametrize("interleaved", [0.0, 1.0])
def test_packed_pictures_of_many_tiles_are_read_as_alone(mixed_sizes, model, interleaved):
    params, processor, _ = mixed_sizes
    prepare(params)
    records = PreparedRecords("train", processor)
    by_id = {records[i].id: records[i] for i in range(len(records))}
    mixture = StageMixture(interleaved=interleaved)
    batch = PackedLoader(records, BatchSettings(rows=2, row_tokens=600), mixture, 1, micro_batch_rows=2).step(0)[0]
    assert sum(grid.tiles for grid in batch.image_grids) == len(batch.pixel_values)
    assert len({grid.tiles for grid in batch.image_grids}) > 1
    with torch.inference_mode():
        together = model(
            batch.input_ids, batch.pixel_values, batch.image_grids, document_ids=batch.document_ids
        ).logits  # fmt: skip
        names, joined = iter(batch.record_ids), 0
        for row, documents in enumerate(batch.document_ids):
            for document in range(int(documents.max()) + 1):
                place, ids, pixels, grids = documents == document, [], [], []
                while len(ids) < int(place.sum()):
                    sample = by_id[next(names)]
                    joined += bool(ids)
                    ids += sample.input_ids.tolist()
                    pixels += [] if sample.pixel_values is None else [sample.pixel_values]
                    grids += sample.image_grids
                assert batch.input_ids[row][place].tolist() == ids
                pictures = (torch.cat(pixels), grids) if pixels else ()
                alone = model(torch.tensor([ids]), *pictures).logits[0]
                # fp32 sums over rows of another length; measured worst case 2e-7 on this model.
                torch.testing.assert_close(together[row][place], alone, atol=2e-5, rtol=0)
    assert next(names, None) is None
    assert (joined > 0) == (interleaved > 0)


def test_a_picture_that_fills_more_than_a_row_is_refused_with_a_way_out(mixed_sizes):
    params, processor, _ = mixed_sizes
    prepare(params)
    records = PreparedRecords("train", processor)
    with pytest.raises(UserError, match="does not fit into a row of 64; raise batch.row_tokens or lower prepare.max"):
        PackedLoader(records, BatchSettings(rows=1, row_tokens=64), StageMixture(), 1, micro_batch_rows=1).step(0)
