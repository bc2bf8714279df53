"""Benchmark data from local folders: Parquet with the published columns, JSON with pictures beside, and refusals."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from golden_scores import golden
from small_benchmarks import picture_bytes, rows_of, write_json_folder, write_parquet_folder

from haplovl.errors import UserError
from haplovl.evaluate.benchmarks import find, names
from haplovl.evaluate.benchmarks.data import data_digest, picture_digests, read_rows


@pytest.mark.parametrize("name", names())
def test_parquet_and_json_with_the_same_content_are_the_same_data(name, tmp_path):
    benchmark = find(name)
    write_parquet_folder(name, tmp_path / "parquet", 4)
    write_json_folder(name, tmp_path / "json", 4)
    found = {}
    for kind in ("parquet", "json"):
        rows = read_rows(benchmark, tmp_path / kind)
        assert [benchmark.prompt(row.record) for row in rows] == [
            item["prompt"]["lmms_eval"] for item in golden(name)["records"][:4]
        ]
        digests = picture_digests(rows)
        assert digests[0] == tuple(hashlib.sha256(content).hexdigest() for content in picture_bytes(name, 0))
        assert len(set(digests)) == 4
        found[kind] = data_digest(rows, digests)
    assert found["parquet"] == found["json"]


def test_the_limit_keeps_rotated_copies_and_pairs_together(tmp_path):
    records = [item["record"] for item in golden("mmbench_en_dev")["records"] if item["group"] == "circular"]
    write_parquet_folder(
        "mmbench_en_dev", tmp_path / "a", records=[*records[::4], *records[1::4], *records[2::4], *records[3::4]]
    )
    rows = read_rows(find("mmbench_en_dev"), tmp_path / "a", limit=2)
    assert {row.record["index"] % 1_000_000 for row in rows} == {1001, 1002} and len(rows) == 8
    write_parquet_folder("mmvp", tmp_path / "b", 6)
    assert [row.record["Index"] for row in read_rows(find("mmvp"), tmp_path / "b", limit=2)] == [1, 2, 3, 4]
    write_parquet_folder("pope", tmp_path / "c", 6)
    assert len(read_rows(find("pope"), tmp_path / "c", limit=2)) == 2


def test_videos_of_seed_bench_are_left_out(tmp_path):
    folder = write_parquet_folder("seedbench_img", tmp_path / "seed", 4)
    path = folder / "test-00000-of-00001.parquet"
    table = pq.read_table(path).to_pylist()
    table[1]["data_type"] = "video"
    pq.write_table(pa.Table.from_pylist(table), path)
    rows = read_rows(find("seedbench_img"), folder)
    assert [row.record["question_id"] for row in rows] == ["10000", "10002", "10003"]


def test_gqa_pictures_may_lie_in_tables_of_their_own(tmp_path):
    records = [{**item["record"], "imageId": f"n{i % 2}"} for i, item in enumerate(golden("gqa")["records"][:4])]
    (tmp_path / "questions").mkdir()
    (tmp_path / "pictures").mkdir()
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "questions/testdev-00000-of-00001.parquet")
    pictures = [{"id": f"n{i}", "image": {"bytes": picture_bytes("gqa", i)[0], "path": None}} for i in range(2)]
    pq.write_table(pa.Table.from_pylist(pictures), tmp_path / "pictures/testdev-00000-of-00001.parquet")
    digests = picture_digests(read_rows(find("gqa"), tmp_path))
    assert digests[0] == digests[2] != digests[1] == digests[3]

    pq.write_table(pa.Table.from_pylist(pictures[:1]), tmp_path / "pictures/testdev-00000-of-00001.parquet")
    assert "there is no picture 'n1' in the tables of pictures" in refusal("gqa", tmp_path)
    (tmp_path / "pictures/testdev-00000-of-00001.parquet").unlink()
    assert "lacks the column 'image' of GQA" in refusal("gqa", tmp_path)


def test_only_the_published_split_is_read(tmp_path):
    folder = write_parquet_folder("vqav2", tmp_path / "vqa", 3)
    (folder / "test-00000-of-00001.parquet").write_bytes((folder / "validation-00000-of-00001.parquet").read_bytes())
    assert len(read_rows(find("vqav2"), folder)) == 3
    (folder / "validation-00000-of-00001.parquet").rename(folder / "testdev-00000-of-00001.parquet")
    assert "holds the splits test, testdev, but not validation" in refusal("vqav2", folder)
    (folder / "test-00000-of-00001.parquet").unlink()
    assert "holds the split testdev, but not validation" in refusal("vqav2", folder)


def test_a_split_with_missing_shards_or_other_tables_beside_it_is_refused(tmp_path):
    folder = write_parquet_folder("pope", tmp_path / "pope", 3)
    shard = (folder / "test-00000-of-00001.parquet").rename(folder / "test-00001-of-00003-0a1b.parquet")
    assert "holds 1 of the 3 files of POPE's split test" in refusal("pope", folder)
    (folder / "extra.parquet").write_bytes(shard.read_bytes())
    assert f"holds extra.parquet beside shards such as {shard.name}" in refusal("pope", folder)


def refusal(name, data):
    with pytest.raises(UserError) as error:
        rows = read_rows(find(name), data)
        picture_digests(rows)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", names())
def test_missing_columns_are_named(name, tmp_path):
    column = list(find(name).fields)[-1]
    write_parquet_folder(name, tmp_path / "a", 3, without=column)
    assert f"lacks the column {column!r} of {find(name).title}" in refusal(name, tmp_path / "a")
    picture = "image_1" if name == "mmmu_val" else "image"
    write_parquet_folder(name, tmp_path / "b", 3, without=picture)
    message = refusal(name, tmp_path / "b")
    assert f"lacks the column {picture!r}" in message or f"has no column {picture!r}" in message


@pytest.mark.parametrize("column", ["hint", "C", "D"])
def test_options_and_hints_are_columns_that_a_table_must_have(column, tmp_path):
    write_parquet_folder("mmbench_en_dev", tmp_path / "data", 3, without=column)
    assert f"lacks the column {column!r} of MMBench-EN dev" in refusal("mmbench_en_dev", tmp_path / "data")


@pytest.mark.parametrize("name", ["gqa", "mmmu_val", "seedbench_img"])
@pytest.mark.parametrize(("content", "part"), [(None, ""), (b"no picture", "not an image"), (b"", "0 bytes")])
def test_missing_and_broken_pictures_in_tables_are_named(name, content, part, tmp_path):
    write_parquet_folder(name, tmp_path / "data", 3, spoil=(1, content))
    message = refusal(name, tmp_path / "data")
    assert "record 2 of" in message and "picture" in message and part in message


def test_a_truncated_picture_is_found_before_the_model_is_asked(tmp_path):
    write_parquet_folder("gqa", tmp_path / "data", 3, spoil=(2, picture_bytes("gqa", 2)[0][:-40]))
    assert "record 3 of" in refusal("gqa", tmp_path / "data")


def test_missing_and_broken_picture_files_are_named(tmp_path):
    folder = write_json_folder("pope", tmp_path / "data", 3)
    (folder / "images/1_0.png").write_bytes(b"")
    assert "record 2 of" in refusal("pope", folder) and "the file has 0 bytes" in refusal("pope", folder)
    (folder / "images/1_0.png").unlink()
    assert "the picture images/1_0.png is missing" in refusal("pope", folder)
    rows = json.loads((folder / "pope.json").read_text())
    for value, part in (("../x.png", "leaves the image folder"), (5, "must name an image file"), (None, "must name")):
        rows[1]["image"] = value
        (folder / "pope.json").write_text(json.dumps(rows))
        assert "record 2 of" in refusal("pope", folder) and part in refusal("pope", folder)


def test_folders_without_usable_files_are_refused(tmp_path):
    assert "there is no file or folder" in refusal("pope", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no Parquet and no JSON files; POPE is lmms-lab/POPE" in refusal("pope", tmp_path / "empty")
    (tmp_path / "rows.csv").write_text("a,b")
    assert "neither a Parquet nor a JSON file" in refusal("pope", tmp_path / "rows.csv")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1nothing")
    assert "is no readable Parquet file" in refusal("pope", tmp_path / "bad.parquet")
    write_parquet_folder("pope", tmp_path / "two/en", 3)
    write_parquet_folder("pope", tmp_path / "two/cn", 3)
    assert "holds tables in several folders (cn, en)" in refusal("pope", tmp_path / "two")
    write_json_folder("pope", tmp_path / "json", 2)
    (tmp_path / "json/other.jsonl").write_text(json.dumps(rows_of("pope", 2)[0]))
    assert "holds several JSON files" in refusal("pope", tmp_path / "json")


@pytest.mark.parametrize(("name", "other"), [("realworldqa", "pope"), ("gqa", "pope"), ("pope", "gqa")])
def test_the_data_of_another_benchmark_are_refused(name, other, tmp_path):
    write_json_folder(other, tmp_path / "json", 2)
    assert f"({other})" in refusal(name, tmp_path / "json")
    write_parquet_folder(other, tmp_path / "parquet", 2)
    message = refusal(name, tmp_path / "parquet")
    wrong_split = f"but not {find(name).split}, which {find(name).title} is"
    assert any(part in message for part in (f"({other})", "lacks the column", wrong_split)), message
