"""MMC4 and OBELICS in their published layout, with pictures missing as on the web."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

MMC4 = {
    "image_info": [
        {
            "face_detections": None,
            "image_name": "b9040a0dbb22.jpg",
            "matched_sim": 0.27694183588027954,
            "matched_text_index": 2,
            "raw_url": "http://www.hfitinfo.com/honda_fit_pics/3/2/index.90.jpg",
        },
        {
            "face_detections": None,
            "image_name": "db1c21bc8474.jpg",
            "matched_sim": 0.3234919607639313,
            "matched_text_index": 1,
            "raw_url": "http://www.hfitinfo.com/honda_fit_pics/3/2/index.91.jpg",
        },
    ],
    "similarity_matrix": [[0.24, 0.31, 0.27], [0.22, 0.32, 0.26]],
    "text_list": ["When you lock the door.", "Press the switch.", "All other doors lock."],
    "url": "http://www.hfitinfo.com/hofi-48.html",
    "could_have_url_duplicate": 0,
}
OBELICS = {
    "images": ["a.jpg", None, "b.jpg", "c.jpg", None, "d.jpg"],
    "texts": [None, "One.", None, None, "Two.", None],
    "metadata": "[]",
    "general_metadata": "{}",
}


def run(tmp_path, collected, documents, files):
    (tmp_path / "images").mkdir()
    for name, content in files.items():
        (tmp_path / "images" / name).write_bytes(content)
    path = tmp_path / "docs_no_face_shard_0_v3.jsonl"
    path.write_text("\n".join(map(json.dumps, documents)))
    return collected(format="interleaved", annotations=[str(path)], images=str(tmp_path / "images"))


def turns(record):
    return [(turn.question, turn.answer) for turn in record.turns]


def test_mmc4(tmp_path, collected, picture) -> None:
    own = run(tmp_path, collected, [MMC4], {"b9040a0dbb22.jpg": picture(1), "db1c21bc8474.jpg": picture(2)})
    assert turns(own.records[0]) == [
        ("When you lock the door.\n<image>", "Press the switch."),
        ("<image>", "All other doors lock."),
    ]
    assert own.pictures(0) == [picture(2), picture(1)]
    assert own.records[0].id == "docs_no_face_shard_0_v3-1"


def test_obelics(tmp_path, collected, picture) -> None:
    own = run(tmp_path, collected, [OBELICS], {f"{name}.jpg": picture(i) for i, name in enumerate("abcd")})
    assert turns(own.records[0]) == [("<image>", "One."), ("<image>\n<image>", "Two.")]
    assert own.pictures(0) == [picture(0), picture(1), picture(2)]


def test_obelics_as_a_table(tmp_path, collected, picture) -> None:
    (tmp_path / "images").mkdir()
    for i, name in enumerate("abcd"):
        (tmp_path / f"images/{name}.jpg").write_bytes(picture(i))
    path = tmp_path / "train-00000-of-01335.parquet"
    pq.write_table(pa.Table.from_pylist([OBELICS, {**OBELICS, "texts": ["x"]}]), path)
    settings = {"format": "interleaved", "annotations": [str(path)], "images": str(tmp_path / "images")}
    own = collected(**settings)
    assert turns(own.records[0]) == [("<image>", "One."), ("<image>\n<image>", "Two.")]
    assert own.pictures(0) == [picture(0), picture(1), picture(2)]
    assert "equal length" in own.errors[1]
    path.write_bytes(b"no table")
    assert "damaged" in collected(**settings, damaged_files="keep").errors[0]


def test_pictures_that_are_gone_leave_their_document(tmp_path, collected, picture) -> None:
    own = run(tmp_path, collected, [MMC4, OBELICS], {"b9040a0dbb22.jpg": picture(1), "b.jpg": picture(2)})
    assert turns(own.records[0]) == [("When you lock the door.\nPress the switch.\n<image>", "All other doors lock.")]
    assert own.pictures(0) == [picture(1)]
    assert turns(own.records[1]) == [("One.\n<image>", "Two.")]
    assert set(own.skipped) == {"file:db1c21bc8474.jpg", "file:a.jpg", "file:c.jpg"}


def test_damaged_documents_are_named(tmp_path, collected) -> None:
    info = MMC4["image_info"][0]
    documents = [
        {**MMC4, "text_list": "text"},
        {**MMC4, "image_info": None},
        {**MMC4, "image_info": [{**info, "matched_text_index": 3}]},
        {**MMC4, "image_info": [{**info, "image_name": None}]},
        {**OBELICS, "texts": ["x"]},
        {**OBELICS, "images": [None] * 6},
        {"text": "x"},
        [1],
    ]
    own = run(tmp_path, collected, documents, {})
    assert all(own.errors)
    assert own.source.records == len(documents)
    assert "a 'matched_text_index' in the list" in own.errors[2]
    assert "(MMC4)" in own.errors[6]
