"""What no source should hold: collect goes on, and every bad thing has a line that says what it was."""

import json
import os
import resource
import struct
import tarfile
import zipfile
from io import BytesIO

import pytest

from haplovl.data.archives import MEMBER_LIMIT, read_index, read_member, write_index
from haplovl.pictures import ImageError

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]


def entry(id_, image, **more):
    return {"id": id_, "image": image, "conversations": TALK, **more}


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


def reason(archive, folder, name):
    with pytest.raises(ImageError) as raised:
        read_member(archive, read_index(folder, archive.name), name)
    return str(raised.value)


# --- annotation files ----------------------------------------------------------------------------------------------
def test_hostile_lines_between_good_ones(tmp_path, collected, picture) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(picture(1))
    bad = [
        b'{"id": "cut", "conversations": [{"from": "hu',
        b"null",
        b"[[[[]]]]",
        b"[" * 50_000,
        b'{"id": "deep", "conversations": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
        b'{"id": "huge number", "n": ' + b"9" * 5000 + b"}",
        b'{"id": "twice", "id": "again", "conversations": []}',
        b'{"id": "\xff\xfe"}',
        b"\x00\x00\x00",
        json.dumps(entry("nul", "a\0b.jpg")).encode(),
        json.dumps(entry("long text", "a.jpg", conversations=[{"from": "human", "value": "x" * 10_000_000}])).encode(),
        json.dumps(entry("long name", "x" * 10_000_000)).encode(),
        json.dumps(entry("types", {"a": [1]})).encode(),
        json.dumps(entry("numbers", [1, None])).encode(),
        json.dumps(entry("role", "a.jpg", conversations=[{"from": {}, "value": "x"}])).encode(),
        json.dumps(entry("nulls", "a.jpg", conversations=[None, {"from": None, "value": None}])).encode(),
        json.dumps(entry("parts", "a.jpg", conversations=[{"from": "human", "value": [{"type": ["text"]}]}])).encode(),
        json.dumps({"id": "messages", "messages": {"role": "user"}}).encode(),
    ]
    good = [json.dumps(entry(f"good{i}", "a.jpg")).encode() for i in range(len(bad))]
    lines = [line for pair in zip(good, bad, strict=True) for line in pair]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    own = collected(format="llava", annotations=[str(tmp_path / "a.jsonl")], images=str(tmp_path / "images"))
    assert [record.id for record in own.records[::2]] == [f"good{i}" for i in range(len(bad))]
    assert own.source.records == len(lines)
    for record, error in zip(own.records[1::2], own.errors[1::2], strict=True):
        assert error or own.read(record.images[0]).startswith(("the path", "the image")), (record, error)
    assert len(own.skipped) == 2


def test_damage_in_a_list_costs_only_the_damage(tmp_path, collected) -> None:
    records = [json.dumps(entry(f"r{i}", None), indent=1) for i in range(300)]
    for i in (5, 100, 101, 250):
        records[i] = records[i][:-20]
    records[200] = records[200].replace('"human"', '"human", "from": "gpt"')
    (tmp_path / "a.json").write_text("[" + ",\n".join(records) + "]")
    own = collected(format="llava", annotations=[str(tmp_path / "a.json")])
    lost = {5, 100, 101, 200, 250}
    assert {record.id for record in own.records if record} == {f"r{i}" for i in range(300) if i not in lost}
    assert 3 <= len([error for error in own.errors if error]) <= 5


def test_a_line_longer_than_the_limit_is_passed_over(tmp_path, collected, monkeypatch) -> None:
    monkeypatch.setattr("haplovl.records.ENTRY_LIMIT", 10_000)
    monkeypatch.setattr("haplovl.records.WINDOW", 1_000)
    rows = [entry("a", None), entry("b", None, note="x" * 50_000), entry("c", None)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.json")]
    own = collected(format="llava", annotations=names)
    assert [record and record.id for record in own.records] == ["a", None, "c"] * 2
    assert all("more than" in error for error in own.errors if error)


# --- folders -------------------------------------------------------------------------------------------------------
def test_paths_that_lead_out_of_the_folder(tmp_path, collected, picture) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    (images / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (images / "way").symlink_to(tmp_path)
    (images / "loop").symlink_to(images / "loop")
    (images / "sub/a.jpg").write_bytes(picture(1))
    os.mkfifo(images / "pipe.jpg")
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "way/secret.jpg", "loop/a.jpg", "pipe.jpg"]
    names += ["sub", "sub/a.jpg/b.jpg", ".", "~/x.jpg", "file:///etc/passwd", "https://example.org/a.jpg", "a" * 300]
    names += ["./sub//a.jpg"]
    rows = [entry(f"r{i}", name) for i, name in enumerate(names)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    own = collected(format="llava", annotations=[str(tmp_path / "a.json")], images=str(images))
    assert own.pictures(len(names) - 1) == [picture(1)]
    assert all(isinstance(own.pictures(i)[0], str) for i in range(len(names) - 1))
    assert set(own.skipped) == {f"file:{name}" for name in names[:-1]}
    brought = [path for path in (own.folder / "media").rglob("*") if not path.is_dir()]
    assert [path.name for path in brought] == ["a.jpg"] and not brought[0].is_symlink()


# --- archives ------------------------------------------------------------------------------------------------------
def test_a_zip_bomb_is_never_unpacked(tmp_path) -> None:
    """A child could not even hold a tenth of what these members claim or unpack to."""
    honest = write_zip(tmp_path / "honest.zip", [("bomb.png", b"\0" * (MEMBER_LIMIT + 1))])
    data = honest.read_bytes()
    assert len(data) < 1_000_000
    # The same bytes under a small announced size, in the directory and in the member's own header.
    (tmp_path / "liar.zip").write_bytes(data.replace(struct.pack("<I", MEMBER_LIMIT + 1), struct.pack("<I", 1000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, word in (("honest.zip", "more than the limit"), ("liar.zip", "size that the archive announces")):
        assert write_index(tmp_path / name, tmp_path / "index") == ""
        assert word in reason(tmp_path / name, tmp_path / "index", "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_duplicates_traversal_and_odd_members_of_zips(tmp_path, collected, picture) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write_zip(
            tmp_path / "images.zip",
            [("a.jpg", picture(1)), ("a.jpg", picture(2)), ("../../up.jpg", picture(3)), ("good.jpg", picture(4))],
        )
    with zipfile.ZipFile(path, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("lzma.jpg", picture(5))
    data = bytearray(path.read_bytes())
    place = data.index(b"good.jpg") + len("good.jpg")
    (tmp_path / "images.zip").write_bytes(data)
    rows = [
        entry(f"r{i}", name) for i, name in enumerate(["a.jpg", "../../up.jpg", "lzma.jpg", "gone.jpg", "good.jpg"])
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    settings = {"format": "llava", "annotations": [str(tmp_path / "a.json")], "images": str(path)}
    own = collected(**settings)
    shown = [own.pictures(i)[0] for i in range(5)]
    assert shown[0] == "the archive holds 2 members of this name"
    assert shown[1] == picture(3)  # a name, nothing more: it never becomes a path
    assert "unknown way" in shown[2] and "no such member" in shown[3]
    assert shown[4] == picture(4)
    assert not (own.raw.parent / "up.jpg").exists()
    data[place + 5] ^= 0xFF
    (tmp_path / "images.zip").unlink()  # what was collected may be a link to it
    (tmp_path / "images.zip").write_bytes(data)
    assert "damaged" in collected(**settings).pictures(4)[0]


def test_archives_that_are_none(tmp_path, collected, picture) -> None:
    whole = write_zip(tmp_path / "whole.zip", [("a.jpg", picture(1))], zipfile.ZIP_STORED).read_bytes()
    contents = {"none.zip": b"x" * 100, "empty.zip": b"", "cut.zip": whole[: len(whole) // 2], "none.tar": b"y" * 600}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / "a.json").write_text(json.dumps([entry("a", "a.jpg")]))
        own = collected(format="llava", annotations=[str(tmp_path / "a.json")], images=str(tmp_path / name))
        kind = name.rpartition(".")[2]
        assert set(own.skipped) == {f"{kind}:{name}", f"{kind}:{name}!a.jpg"}
        assert own.pictures(0) == ["the archive has no such member"]


def test_a_zip_without_its_beginning(tmp_path, picture) -> None:
    """Its directory still lists every member; the first ones would lie before the file's first byte."""
    files = [(f"{i}.jpg", picture(i)) for i in range(4)]
    data = write_zip(tmp_path / "whole.zip", files, zipfile.ZIP_STORED).read_bytes()
    (tmp_path / "late.zip").write_bytes(data[len(picture(0)) // 2 :])
    assert write_index(tmp_path / "late.zip", tmp_path / "index") == ""
    index = read_index(tmp_path / "index", "late.zip")
    assert "out of place" in reason(tmp_path / "late.zip", tmp_path / "index", "0.jpg")
    assert [read_member(tmp_path / "late.zip", index, name) for name, _ in files[1:]] == [data for _, data in files[1:]]


def test_links_and_devices_in_tars(tmp_path, collected, picture) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture(9))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dev.jpg", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.jpg")
            archive.addfile(member)
        member = tarfile.TarInfo("x" * 200 + "/long.jpg")
        member.size = len(picture(1))
        archive.addfile(member, BytesIO(picture(1)))
    names = ["link.jpg", "hard.jpg", "dev.jpg", "x" * 200 + "/long.jpg"]
    (tmp_path / "a.json").write_text(json.dumps([entry(f"r{i}", name) for i, name in enumerate(names)]))
    own = collected(format="llava", annotations=[str(tmp_path / "a.json")], images=str(tmp_path / "a.tar"))
    shown = [own.pictures(i)[0] for i in range(4)]
    assert shown == ["the member is a link, encrypted, out of place or packed in an unknown way"] * 3 + [picture(1)]


def test_a_tar_that_leads_back_to_itself_ends(tmp_path) -> None:
    """A negative size in the second header points to the first one."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.jpg", "b.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    header = data[512:1024]
    header[124:136] = (-1024).to_bytes(12, signed=True)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[512:1024] = header
    (tmp_path / "a.tar").write_bytes(data)
    assert "impossible size" in write_index(tmp_path / "a.tar", tmp_path / "index")
    assert read_member(tmp_path / "a.tar", read_index(tmp_path / "index", "a.tar"), "a.jpg") == b""


def test_references_in_annotations_are_names_and_nothing_else(tmp_path, collected, picture) -> None:
    """An image called like one of our references stays a path in the image folder."""
    (tmp_path / "images").mkdir()
    names = ["zip:a.zip!b", "parquet:x!0!image", "video:v!0!1", "tar:!", "file:"]
    (tmp_path / "a.json").write_text(json.dumps([entry(f"r{i}", name) for i, name in enumerate(names)]))
    own = collected(format="llava", annotations=[str(tmp_path / "a.json")], images=str(tmp_path / "images"))
    assert [own.pictures(i) for i in range(len(names))] == [["the image is missing"]] * len(names)
