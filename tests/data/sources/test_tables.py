"""Parquet tables as LLaVA-OneVision and The Cauldron publish them, and a folder in the Hub's layout."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from haplovl.data.sources import tables
from haplovl.errors import UserError
from haplovl.settings import SettingsError

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
TURN = pa.struct({"from": pa.string(), "value": pa.string()})
ONEVISION = pa.schema({"id": pa.string(), "image": IMAGE, "conversations": pa.list_(TURN), "data_source": pa.string()})
CAULDRON = pa.schema(
    {
        "images": pa.list_(IMAGE),
        "texts": pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string(), "source": pa.string()})),
    }
)


def onevision(count, picture):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    rows = [
        {"id": f"r{i}", "image": {"bytes": picture(i), "path": f"{i}.jpg"}, "conversations": talk, "data_source": "x"}
        for i in range(count)
    ]
    text = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    return [*rows, {"id": "text", "image": None, "conversations": text, "data_source": "magpie"}]


def write(path, rows, schema=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)
    return str(path)


def test_llava_onevision(tmp_path, collected, picture) -> None:
    write(tmp_path / "ov/train-00000-of-00002.parquet", onevision(40, picture), ONEVISION, row_group_size=7)
    write(tmp_path / "ov/train-00001-of-00002.parquet", onevision(3, picture), ONEVISION)
    own = collected(format="parquet", files=[str(tmp_path / "ov/train-*.parquet")])
    assert own.source.records == len(own.records) == 45
    assert own.records[40].kind == "text"
    # In order, as preparation reads, and at random, as evaluation does.
    assert [own.pictures(i) for i in range(40)] == [[picture(i)] for i in range(40)]
    assert [own.pictures(i) for i in (30, 2, 17, 39, 0)] == [[picture(i)] for i in (30, 2, 17, 39, 0)]
    assert own.pictures(43) == [picture(2)]
    name = "train-00000-of-00002.parquet"
    assert (own.folder / "media" / name).read_bytes() == (tmp_path / "ov" / name).read_bytes()


def test_the_cauldron(tmp_path, collected, picture) -> None:
    texts = [
        {"user": "Which?", "assistant": "Both.", "source": "x"},
        {"user": "Why?", "assistant": "So.", "source": "x"},
    ]
    images = [{"bytes": picture(i), "path": None} for i in (1, 2)]
    path = write(tmp_path / "a.parquet", [{"images": images, "texts": texts}], CAULDRON)
    own = collected(format="parquet", files=[path])
    assert own.records[0].turns[0].question == "<image><image>\nWhich?"
    assert [turn.answer for turn in own.records[0].turns] == ["Both.", "So."]
    assert own.pictures(0) == [picture(1), picture(2)]


def test_captions_and_questions_in_columns_of_any_name(tmp_path, collected, picture) -> None:
    rows = [{"photo": picture(5), "blip": "a cat"}, {"photo": b"", "blip": "nothing"}, {"photo": None, "blip": "x"}]
    path = write(tmp_path / "a.parquet", rows)
    own = collected(
        format="parquet", files=[path], columns={"image": "photo", "caption": "blip"}, prompt="Describe it."
    )
    assert (own.records[0].turns[0].question, own.records[0].kind) == ("<image>\nDescribe it.", "caption")
    assert own.pictures(0) == [picture(5)]
    path = write(tmp_path / "b.parquet", [{"image": {"bytes": picture(6)}, "question": "Q?", "answer": "A."}])
    own = collected(format="parquet", files=[path])
    assert own.records[0].turns[0].question == "<image>\nQ?"


def test_who_names_a_column_of_text_gets_no_other_one(tmp_path, collected, picture) -> None:
    talk = [{"from": "human", "value": "<image>\nTalk?"}, {"from": "gpt", "value": "No."}]
    row = {"image": {"bytes": picture(1)}, "conversations": talk, "question": "q?", "answer": "yes", "caption": "a cat"}
    path = write(tmp_path / "a.parquet", [row])
    for columns, answer in (({}, "No."), ({"caption": "caption"}, "a cat"), ({"answer": "answer"}, "yes")):
        assert collected(format="parquet", files=[path], columns=columns).records[0].turns[0].answer == answer


def test_a_column_of_splits_is_heard(tmp_path, collected, picture) -> None:
    row = {"image": {"bytes": picture(1)}, "question": "q?", "answer": "yes"}
    path = write(tmp_path / "a.parquet", [{**row, "split": "test"}, {**row, "split": None}, {**row, "split": "dev"}])
    own = collected(format="parquet", files=[path])
    assert [record.split for record in own.records[:2]] == ["test", ""]
    assert own.errors[2] == "'split' must be one of train, validation, test, found 'dev'"


def test_mixed_up_columns_are_named(tmp_path, collected, picture) -> None:
    path = write(tmp_path / "a.parquet", [{"photo": picture(5), "asked": "Q?", "answered": "A."}])
    own = collected(format="parquet", files=[path], columns={"image": "asked", "answer": "photo"})
    assert own.errors == ["the column 'photo' must hold text as answer, found bytes"]
    own = collected(format="parquet", files=[path], columns={"image": "asked", "answer": "answered"})
    assert own.pictures(0) == [
        "the table's cell must hold an image file, found text; only pictures inside the table are read"
    ]


def test_a_folder_in_the_layout_of_the_hub(tmp_path, collected, picture) -> None:
    path = write(tmp_path / "hub/data/train-00000-of-00001.parquet", onevision(5, picture), ONEVISION)
    write(tmp_path / "hub/data/test-00000-of-00001.parquet", onevision(1, picture), ONEVISION)
    own = collected(format="hub", folder=str(tmp_path / "hub"), files=["data/train-*.parquet"])
    assert [record.id for record in own.records] == ["r0", "r1", "r2", "r3", "r4", "text"]
    assert own.pictures(3) == [picture(3)]
    assert (own.folder / "media/part-00000.parquet").read_bytes() == Path(path).read_bytes()
    assert own.source.files[0]["origin"] == "data/train-00000-of-00001.parquet"
    with pytest.raises(UserError, match=r"no Parquet file that fits data/none.*to_parquet"):
        collected(format="hub", folder=str(tmp_path / "hub"), files=["data/none-*.parquet"])
    with pytest.raises(
        UserError, match=r"own holds data/test-00000-of-00001.parquet, .* name the files to take in 'files'"
    ):
        collected(format="hub", folder=str(tmp_path / "hub"))


def test_a_folder_below_one_that_is_called_test_is_taken_whole(tmp_path, collected, picture) -> None:
    write(tmp_path / "test/hub/data/train-00000-of-00001.parquet", onevision(5, picture), ONEVISION)
    assert len(collected(format="hub", folder=str(tmp_path / "test/hub")).records) == 6


def test_the_hub_is_asked_for_the_pinned_revision(tmp_path, collected, picture, monkeypatch) -> None:
    """huggingface_hub's file system is replaced by one that has the repository at that revision on this disk."""
    import huggingface_hub
    from fsspec.implementations.dirfs import DirFileSystem

    revision = "0123456789abcdef" * 2 + "01234567"
    root = tmp_path / f"datasets/lmms-lab/some@{revision}"
    write(root / "aokvqa/train-00000-of-00001.parquet", onevision(2, picture), ONEVISION)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: DirFileSystem(str(tmp_path)))
    own = collected(format="hub", id="lmms-lab/some", revision=revision)
    assert own.pictures(1) == [picture(1)]
    with pytest.raises(UserError, match="no Parquet file"):
        collected(format="hub", id="lmms-lab/some", revision="f" * 40)

    class Unreachable(DirFileSystem):
        def glob(self, *args, **options):
            raise ConnectionError("the network is down")

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: Unreachable(str(tmp_path)))
    with pytest.raises(UserError, match="lmms-lab/some cannot be read from the Hub: the network is down"):
        collected(format="hub", id="lmms-lab/some", revision=revision)


@pytest.mark.parametrize("place", [{}, {"id": "a/b"}, {"id": "a/b", "folder": "x"}, {"id": "a/b", "revision": "main"}])
def test_a_hub_source_without_a_pinned_revision_is_refused(collected, place) -> None:
    with pytest.raises(SettingsError):
        collected(format="hub", **place)


def test_damaged_tables_are_errors_beside_the_good_ones(tmp_path, collected, picture) -> None:
    good = write(tmp_path / "c.parquet", onevision(3, picture), ONEVISION)
    (tmp_path / "a.parquet").write_bytes(Path(good).read_bytes()[:-40])
    (tmp_path / "b.parquet").write_bytes(b"not a table")
    write(tmp_path / "d.parquet", [{"number": 1}])
    with pytest.raises(
        UserError, match="a.parquet of the source own is unusable from entry 0 on: the table is damaged"
    ):
        collected(format="parquet", files=[str(tmp_path / "*.parquet")])
    own = collected(format="parquet", files=[str(tmp_path / "*.parquet")], damaged_files="keep")
    found = {item.file: error for item, error in zip(own.items, own.errors, strict=True) if error}
    assert set(found) == {"a.parquet", "b.parquet", "d.parquet"}
    assert "damaged" in found["a.parquet"] and "no conversation" in found["d.parquet"]
    assert [record.id for record in own.records if record] == ["r0", "r1", "r2", "text"]


def test_a_table_damaged_inside_keeps_what_is_before(tmp_path, collected, picture) -> None:
    path = write(tmp_path / "a.parquet", onevision(40, picture), ONEVISION, row_group_size=10, compression="zstd")
    data = bytearray(Path(path).read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[start : start + 60] = b"\xff" * 60
    (tmp_path / "a.parquet").write_bytes(data)
    own = collected(format="parquet", files=[path], damaged_files="keep")
    assert [error for error in own.errors if error] and "damaged" in own.errors[-1]


def test_pictures_are_not_read_to_list_the_records(tmp_path, collected, picture, monkeypatch) -> None:
    path = write(tmp_path / "a.parquet", onevision(5, picture), ONEVISION)
    asked = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, columns, **options):
        asked.extend(columns)
        return original(self, *args, columns=columns, **options)

    monkeypatch.setattr(tables.pq.ParquetFile, "iter_batches", spy)
    collected(format="parquet", files=[path])
    assert "image.path" in asked and not {"image", "image.bytes"} & set(asked)


@pytest.mark.parametrize(
    "row",
    [
        {"texts": [1, 2]},
        {"texts": ["a", "b"]},
        {"texts": [["a"], None]},
        {"conversations": ["[1]", "{"]},
        {"conversations": [1, 2]},
        {"question": [1, 2], "answer": [b"x", None]},
        {"id": [b"x", None], "caption": ["a", None]},
        {"image": [1, 2], "caption": ["a", "b"]},
        {"image": ["a.jpg", "b.jpg"], "caption": ["a", "b"]},
        {"images": [[{"bytes": None, "path": None}], []], "caption": ["a", "b"]},
    ],
    ids=str,
)
def test_columns_of_other_types_are_errors_of_their_rows(tmp_path, collected, row) -> None:
    pq.write_table(pa.table(row), tmp_path / "a.parquet")
    own = collected(format="parquet", files=[str(tmp_path / "a.parquet")])
    assert own.source.records == len(own.items) == 2
    for record, error in zip(own.records, own.errors, strict=True):
        assert error or all(isinstance(own.read(ref), str) for ref in record.images)
    assert any(own.errors) or own.records[0].images
