"""Preparation: shards kept by content, made by any number of processes, lengths kept by a stated rule."""

import hashlib
import io
import json
import re
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from PIL import Image

from haplovl.data import prepare as room
from haplovl.data.loader import PreparedRecords
from haplovl.data.packing import draw_documents
from haplovl.data.prepare import KEPT, prepare, read_manifest
from haplovl.data.shards import ShardMaker
from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.errors import UserError
from haplovl.files import PREPARED, RAW, TEACHERS, VALIDATED, sha256_of
from haplovl.records import Record, Turn
from haplovl.settings import Params, StageMixture, load_params


@pytest.fixture
def params(tmp_path, monkeypatch, processor, request):
    """Settings of a project whose processor is there and whose records are not."""
    params = load_params(request.config.rootpath / "params.yaml")
    monkeypatch.chdir(tmp_path)
    VALIDATED.mkdir(parents=True)
    processor.save_pretrained(TEACHERS / "processor")
    return params


def change(params, **values):
    return params.model_copy(update={"prepare": params.prepare.model_copy(update=values)})


def text(n, source="a", answer="two"):
    record = Record(
        f"{source}{n}", (), (Turn(f"Which digit is {n}?", answer),), split="test" if n % 50 == 7 else "train"
    )
    return ValidatedRecord(record, (), source)


def picture(n, size=(32, 32), turns=1, source="a"):
    """A record with a picture per turn."""
    images = []
    (RAW / source / "media").mkdir(parents=True, exist_ok=True)
    for turn in range(turns):
        name = f"{n}-{turn}.png"
        Image.new("RGB", size, (n % 256, 50 * turn, 99)).save(RAW / source / "media" / name)
        digest = hashlib.sha256((RAW / source / "media" / name).read_bytes()).hexdigest()
        images.append(ImageFile(f"file:{name}", digest, *size))
    asked = tuple(Turn("<image>\nWhere is the 3?", f"top left {turn}") for turn in range(turns))
    record = Record(f"{source}{n}", tuple(image.path for image in images), asked, split="train")
    return ValidatedRecord(record, tuple(images), source)


def run(params, rows, capsys):
    """Prepares the rows; how many blocks were new, and how many there are."""
    write_validated(VALIDATED, rows)
    prepare(params)
    new, blocks = re.search(r"(\d+) of (\d+) blocks were new", capsys.readouterr().out).groups()
    return int(new), int(blocks)


def shards():
    return {path.name: sha256_of(path) for path in sorted(PREPARED.iterdir())}


def everything():
    names = [shard["file"] for shard in read_manifest()["shards"]]
    return [row for name in names for row in pq.read_table(PREPARED / name).to_pylist()]


# --- only what changed -----------------------------------------------------------------------------------------------
def test_one_percent_of_new_records_makes_few_new_shards(params, capsys):
    params = change(params, records_per_shard=64)
    rows = [text(n) for n in range(2000)]
    new, blocks = run(params, rows, capsys)
    assert new == blocks > 30
    assert run(params, rows, capsys) == (0, blocks)
    # At the end, as a new source, in one place in the middle, and one record removed: the cuts behind stay.
    for changed in (
        [*rows, *(text(n) for n in range(2000, 2020))],
        [*rows, *(text(n, "b") for n in range(20))],
        [*rows[:900], *(text(n, "b") for n in range(20)), *rows[900:]],
        [*rows[:1000], *rows[1001:]],
        [*rows[:1000], text(1000, answer="three"), *rows[1001:]],
    ):
        new, _ = run(params, changed, capsys)
        assert 1 <= new <= 5
        run(params, rows, capsys)
    run(params, changed, capsys)
    made = shards()
    shutil.rmtree(KEPT)
    run(params, changed, capsys)
    assert shards() == made  # as if nothing had been kept


@pytest.mark.parametrize("values", [{"max_tokens": 100}, {"too_long": "drop_last_turns"}, {"max_image_side": 16}])
def test_other_settings_make_all_shards_anew_and_going_back_makes_none(params, capsys, values):
    rows = [text(n) for n in range(50)]
    _, blocks = run(params, rows, capsys)
    assert run(change(params, **values), rows, capsys) == (blocks, blocks)
    assert run(params, rows, capsys) == (0, blocks)


def test_any_number_of_processes_makes_the_same_shards(params, capsys, monkeypatch):
    params = change(params, records_per_shard=16)
    rows = [picture(n) if n % 3 else text(n) for n in range(60)]
    run(params, rows, capsys)
    alone = shards()
    shutil.rmtree(KEPT)
    monkeypatch.setattr(room, "FEW_RECORDS", 10)
    new, blocks = run(params, rows, capsys)
    assert new == blocks > 3
    assert shards() == alone


def test_a_kept_shard_that_was_written_into_is_made_anew(params, capsys):
    rows = [text(n) for n in range(50)]
    run(params, rows, capsys)
    before = shards()
    path = PREPARED / "train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    assert run(params, rows, capsys)[0] == 1
    assert shards() == before


def test_the_cache_is_bounded(params, capsys):
    rows = [text(n) for n in range(50)]
    for limit in range(100, 110):
        run(change(params, max_tokens=limit), rows, capsys)
    kept = sum(path.stat().st_size for path in KEPT.rglob("*") if path.is_file())
    used = sum(path.stat().st_size for path in PREPARED.glob("*.parquet"))
    assert used < kept < 4 * used
    assert run(change(params, max_tokens=109), rows, capsys)[0] == 0


# --- what a shard holds ----------------------------------------------------------------------------------------------
def test_manifest_counts_sources_and_order_is_that_of_the_table(params, capsys):
    run(params, [*(text(n) for n in range(100)), *(text(n, "b") for n in range(10))], capsys)
    manifest = read_manifest()
    assert manifest["sources"] == {
        "a": {"train": 98, "validation": 0, "test": 2},
        "b": {"train": 9, "validation": 0, "test": 1},
    }
    trained = [row["id"] for row in everything() if row["id"][1:] != "7"]
    assert trained[:3] == ["a0", "a1", "a2"] and "b9" in trained
    assert [row["source"] for row in everything()].count("b") == 10


def test_pictures_are_copied_as_they_are_or_scaled_down(params, capsys, processor):
    rows = [picture(0, (64, 32)), picture(1, (20, 10))]
    run(params, rows, capsys)
    for row, item in zip(everything(), rows, strict=True):
        assert row["images"] == [(RAW / "a/media" / item.images[0].path.removeprefix("file:")).read_bytes()]
    run(change(params, max_image_side=24), rows, capsys)
    scaled, small = everything()
    assert scaled["sizes"] == [24, 12] and Image.open(io.BytesIO(scaled["images"][0])).size == (24, 12)
    assert Image.open(io.BytesIO(scaled["images"][0])).format == "JPEG"
    assert small["sizes"] == [20, 10] and Image.open(io.BytesIO(small["images"][0])).format == "PNG"
    records = PreparedRecords("train", processor)
    assert [len(records[i].input_ids) for i in range(2)] == list(records.lengths)


def test_a_picture_that_changed_since_validation_stops_preparation(params, capsys):
    row = picture(3)
    write_validated(VALIDATED, [text(0), row])
    Image.new("RGB", (32, 32)).save(RAW / "a/media/3-0.png")
    with pytest.raises(UserError, match=r"file:3-0\.png of record 'a3' \(a\): it changed after it was validated"):
        prepare(params)
    assert not PREPARED.exists()


# --- lengths ---------------------------------------------------------------------------------------------------------
def test_a_long_record_loses_whole_turns_with_their_pictures_if_that_is_the_rule(params, capsys, processor):
    rows = [text(0), picture(1, turns=4)]
    run(change(params, max_tokens=400), rows, capsys)
    lengths = PreparedRecords("train", processor).lengths
    whole = everything()[1]
    limited = change(params, max_tokens=lengths[1] - 1)
    run(limited, rows, capsys)
    assert [row["id"] for row in everything()] == ["a0"]
    refused = json.loads((PREPARED / "quarantine.jsonl").read_text())
    assert refused["id"] == "a1" and refused["source"] == "a" and refused["tokens"] == lengths[1]
    run(change(limited, too_long="drop_last_turns"), rows, capsys)
    kept = everything()[1]
    assert read_manifest()["shortened"] == 1
    assert len(kept["images"]) == 3 and kept["images"] == whole["images"][:3]
    assert kept["input_ids"] == whole["input_ids"][: len(kept["input_ids"])]
    answers = [
        processor.tokenizer.decode(kept["input_ids"][a:b]) for a, b in zip(*[iter(kept["spans"])] * 2, strict=True)
    ]
    assert answers == [f" top left {turn}<|end|>" for turn in range(3)]
    run(change(limited, too_long="drop_last_turns", max_tokens=30), rows, capsys)
    refused = json.loads((PREPARED / "quarantine.jsonl").read_text())
    assert refused["id"] == "a1" and refused["reason"] == "longer than prepare.max_tokens"


def test_a_record_without_a_supervised_token_is_refused(params, processor, tmp_path):
    silent = text(0)
    silent = replace(silent, record=replace(silent.record, turns=()))
    facts = ShardMaker(processor, params.prepare).write([silent, text(1)], tmp_path / "s.parquet", tmp_path / "s.arrow")
    assert facts["refused"] == [{"id": "a0", "source": "a", "reason": "no supervised token"}]
    assert facts["records"] == 1


# --- weights ---------------------------------------------------------------------------------------------------------
def with_weight(params, weight):
    """The settings read again, with another weight of their only source."""
    data = params.model_dump(mode="json", by_alias=True)
    data["collect"]["sources"][0]["weight"] = weight
    for stage in ("stage1", "stage2"):
        data[stage]["mixture"]["sources"] = {}
    return Params.model_validate_json(json.dumps(data))


def test_a_sources_weight_reaches_the_stages_and_no_shard(params, capsys):
    rows = [text(n, "scenes") for n in range(50)]
    run(params, rows, capsys)
    before = shards()
    heavier = with_weight(params, 3.0)
    assert heavier.stage1.mixture.sources == heavier.stage2.mixture.sources == {"scenes": 3.0}
    assert run(heavier, rows, capsys)[0] == 0
    assert {name for name, digest in shards().items() if digest != before[name]} == {"manifest.json"}
    assert read_manifest()["weights"] == {"scenes": 3.0}


def test_records_occur_as_often_as_the_weights_of_kind_and_source_say():
    kinds, sources = ["text"] * 3000, ["a", "b", "c"] * 1000
    mixture = StageMixture(text=2.0, sources={"a": 0.25, "c": 0.0})
    documents = draw_documents(kinds, [5] * 3000, mixture, 256, seed=1, epoch=0, sources=sources)
    drawn = [sources[index] for (index,) in documents]
    assert 430 < drawn.count("a") < 570
    assert drawn.count("b") == 2000 and drawn.count("c") == 0


def test_datasets_reads_the_shards(params, capsys):
    datasets = pytest.importorskip("datasets")
    run(params, [picture(n) for n in range(5)], capsys)
    files = [str(PREPARED / shard["file"]) for shard in read_manifest()["shards"]]
    read = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir="hf")
    assert read["id"] == [f"a{n}" for n in range(5)]
    assert Image.open(io.BytesIO(read[0]["images"][0])).size == (32, 32)
