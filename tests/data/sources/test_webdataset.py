"""Tars as img2dataset and cc3m-wds write them, damaged ones too."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from haplovl.errors import UserError

CAPTION = "a river has burst it 's banks and has spread out onto arable farmland alongside"


def write(path, members) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def sample(number, picture):
    about = {"url": "http://x/y.jpg", "caption": f"{CAPTION} {number}", "key": f"{number:09d}", "status": "success"}
    return [
        (f"{number:09d}.jpg", picture(number)),
        (f"{number:09d}.json", json.dumps(about).encode()),
        (f"{number:09d}.txt", f"{CAPTION} {number}".encode()),
    ]


def test_cc3m(tmp_path, collected, picture) -> None:
    for shard in range(2):
        members = [member for n in range(3) for member in sample(shard * 10 + n, picture)]
        write(tmp_path / f"cc3m-train-{shard:04d}.tar", members)
    own = collected(format="webdataset", files=[str(tmp_path / "cc3m-train-*.tar")])
    assert [record.id for record in own.records][::3] == ["cc3m-train-0000/000000000", "cc3m-train-0001/000000010"]
    assert own.records[4].turns[0].answer == f"{CAPTION} 11"
    assert (own.records[4].turns[0].question, own.records[4].kind) == ("<image>", "caption")
    assert own.pictures(4) == [picture(11)]
    assert (own.source.records, own.source.images, own.source.skipped) == (6, 6, 0)
    assert {file["path"] for file in own.source.files} == {f"media/cc3m-train-000{i}.tar" for i in range(2)}


def test_conversations_and_folders_and_captions_in_json(tmp_path, collected, picture) -> None:
    talk = {
        "split": "validation",
        "messages": [{"role": "user", "content": "<image>\nQ?"}, {"role": "assistant", "content": "A."}],
    }
    members = [
        ("./part/a.png", picture(1, kind="PNG")),
        ("./part/a.json", json.dumps(talk).encode()),
        ("./part/b.PNG", picture(2, kind="PNG")),
        ("./part/b.json", b'{"caption": "b", "split": "test"}'),
    ]
    own = collected(format="webdataset", files=[write(tmp_path / "a.tar", members)], prompt="Describe it.")
    assert own.records[0].turns[0].answer == "A."
    assert own.pictures(0) == [picture(1, kind="PNG")]
    assert own.records[1].turns[0].question == "<image>\nDescribe it."
    assert [record.split for record in own.records] == ["validation", "test"]
    assert own.pictures(1) == [picture(2, kind="PNG")]


def test_odd_samples_are_named_and_the_others_arrive(tmp_path, collected, picture) -> None:
    members = [
        ("a.txt", b"no picture"),
        ("b.jpg", picture(1)),
        ("c.jpg", picture(2)),
        ("c.json", b'{"caption": '),
        ("d.jpg", picture(3)),
        ("d.txt", b"\xff\xfe damaged"),
        *sample(7, picture),
        ("e.jpg", picture(4)),
        ("e.txt", b"first"),
        ("f.jpg", picture(5)),
        ("f.txt", b"f"),
        ("e.jpg", picture(6)),
        ("e.txt", b"second"),
    ]
    own = collected(format="webdataset", files=[write(tmp_path / "a.tar", members)])
    assert "has no picture" in own.errors[0]
    assert "has no caption" in own.errors[1]
    assert "not valid JSON" in own.errors[2]
    assert "damaged characters" in own.errors[3]
    assert own.pictures(4) == [picture(7)]
    assert own.pictures(5) == ["the archive holds 2 members of this name"]
    assert own.skipped == {"tar:a.tar!e.jpg": "the archive holds 2 members of this name"}
    assert own.pictures(6) == [picture(5)]


def test_damaged_tars(tmp_path, collected, picture) -> None:
    whole = [member for n in range(5) for member in sample(n, picture)]
    data = Path(write(tmp_path / "whole.tar", whole)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    broken = bytearray(data)
    broken[512 * 9 : 512 * 20] = b"\xaa" * 512 * 11
    (tmp_path / "broken.tar").write_bytes(broken)
    (tmp_path / "none.tar").write_bytes(b"x" * 5000)
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(
        UserError, match="broken.tar of the source own is unusable from entry 1 on: the archive is damaged"
    ):
        collected(format="webdataset", files=[str(tmp_path / "*.tar")])
    own = collected(format="webdataset", files=[str(tmp_path / "*.tar")], damaged_files="keep")
    errors = {item.file: error for item, error in zip(own.items, own.errors, strict=True) if error}
    assert set(errors) == {"cut.tar", "broken.tar", "none.tar", "empty.tar"}
    assert {f"tar:{name}" for name in errors} <= set(own.skipped)
    good = [i for i, item in enumerate(own.items) if item.file == "whole.tar"]
    assert [own.pictures(i) for i in good] == [[picture(n)] for n in range(5)]
    before = [i for i, item in enumerate(own.items) if item.file == "broken.tar" and own.records[i]]
    assert before and own.pictures(before[0]) == [picture(0)]
