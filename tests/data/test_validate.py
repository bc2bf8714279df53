"""collect and validate on a LLaVA-style source that has every kind of bad record among good ones, as real commands."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import yaml
from PIL import Image

from haplovl.data.across import split_at
from haplovl.data.media import Media
from haplovl.data.suite import CHECKS
from haplovl.data.validated import ImageFile, ValidatedRecord, read_validated, write_validated
from haplovl.data_settings import SplitShares
from haplovl.pictures import ImageError, decode_bytes, open_image, resolve_inside
from haplovl.records import SPLITS, Record, Turn

REPO = Path(__file__).resolve().parents[2]
GOOD = 20


def haplovl(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a real command in a project folder."""
    run = [sys.executable, "-m", "haplovl", command]
    return subprocess.run(run, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def make_project(folder: Path, source: dict, **validate: float) -> Path:
    """A project folder whose params.yaml is the repo's with another source."""
    params = yaml.safe_load((REPO / "params.yaml").read_text())
    params["collect"]["sources"] = [source]
    params["validate"].update(validate)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG of any size: a valid header, and pixel data that ends at once."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def entry(
    id_: str, image: str | list[str] | None = None, question: str = "<image>\nWhat is it?", **more: object
) -> dict:
    data = {"id": id_, **({"image": image} if image else {}), **more}
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": "A square."}]
    return {**data, "conversations": data.pop("conversations", talk)}


def write_source(folder: Path) -> None:
    """A JSON list, truncated in its last record, and a JSONL file beside a folder of images."""
    images = folder / "images"
    images.mkdir(parents=True)
    noise = Image.effect_noise((64, 48), 80).convert("RGB")
    for i in range(GOOD):
        colour = Image.new("RGB", (16 + i, 12), (i * 12, 40, 200))
        colour.save(images / f"good{i}.{'jpg' if i % 2 else 'png'}")
    noise.save(images / "whole.jpg", quality=95)
    (images / "truncated.jpg").write_bytes((images / "whole.jpg").read_bytes()[:900])
    (images / "empty.png").write_bytes(b"")
    (images / "text.png").write_text("this is not an image")
    (images / "huge.png").write_bytes(png_header(50_000, 50_000))
    (images / "folder.png").mkdir()
    noise.save(folder / "outside.png")
    noise.resize((100, 3)).save(images / "flat.png")
    (images / "link.png").symlink_to(folder / "outside.png")
    # The same bytes under two names, in two splits.
    noise.save(images / "shared-a.png")
    shutil.copy(images / "shared-a.png", images / "shared-b.png")

    good = [entry(f"good{i}", f"good{i}.{'jpg' if i % 2 else 'png'}") for i in range(GOOD)]
    listed = json.dumps([*good, entry("text-only", None, "What is two and two?"), entry("cut-off", "good0.png")])
    (folder / "list.json").write_text(listed[:-30])
    lines = [json.dumps(data) for data in bad_entries()]
    lines.append('{"id": "broken-line", "image": "good1.jpg", "conversations": [{"from": "hum')
    lines.append(json.dumps(entry("held-out", "shared-a.png", split="test")))
    (folder / "more.jsonl").write_text("\n".join(lines) + "\n")


def bad_entries() -> list[dict]:
    human, gpt = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}
    picture = "good0.png"
    return [
        entry("missing-image", "nowhere.png"),
        entry("truncated-image", "truncated.jpg"),
        entry("empty-image", "empty.png"),
        entry("not-an-image", "text.png"),
        entry("huge-image", "huge.png"),
        entry("folder-image", "folder.png"),
        entry("parent-path", "../outside.png"),
        entry("absolute-path", str(REPO / "README.md")),
        entry("link-out", "link.png"),
        entry("long-name", "x" * 5000 + ".png"),
        entry("nul-name", "a\0b.png"),
        entry("markup-name", "<script>alert(1)</script>$x.png"),
        entry("<script>alert(2)</script>", "nowhere.png"),
        entry("too-few-placeholders", picture, "What is it?"),
        entry("too-many-placeholders", picture, "<image> <image> Which?"),
        entry("placeholder-in-answer", picture, conversations=[human, {"from": "gpt", "value": "<image> it"}]),
        entry("good3", "good3.jpg"),
        entry("no-conversation", picture, conversations=[]),
        entry("no-alternation", picture, conversations=[human, human, gpt]),
        entry("no-last-answer", picture, conversations=[human, gpt, human]),
        entry("blank-answer", picture, conversations=[human, {"from": "gpt", "value": "  \n"}]),
        entry("no-words", picture, conversations=[human, {"from": "gpt", "value": "…!"}]),
        entry("mojibake", picture, conversations=[human, {"from": "gpt", "value": "A cafÃ©."}]),
        entry("flat-image", "flat.png"),
        entry("wrong-split", picture, split="holdout"),
        entry("odd-role", picture, conversations=[{"from": "robot", "value": "x"}, gpt]),
        entry("lone-surrogate", picture, "<image> \ud800"),
        entry("long", picture, "What? " * 5000),
        entry("leak", "shared-b.png", split="train"),
        {"id": [], "image": picture, "conversations": [human, gpt]},
        [1, 2, 3],
    ]


REASONS = {
    "cut-off": "entry: not valid JSON from here to the end of the file",
    "broken-line": "entry: not valid JSON",
    "missing-image": "image: file:nowhere.png: the image is missing",
    "truncated-image": "image: file:truncated.jpg: the image is truncated or damaged",
    "empty-image": "image: file:empty.png: the file has 0 bytes",
    "not-an-image": "image: file:text.png: not an image in a known format",
    "huge-image": "image: file:huge.png: 2500000000 pixels, more than the limit of 50000000",
    "folder-image": "image: file:folder.png: the path is not a file",
    "parent-path": "image: file:../outside.png: the path leaves the image folder",
    "absolute-path": f"image: file:{REPO / 'README.md'}: the path leaves the image folder",
    "link-out": "image: file:link.png: the path leaves the image folder through a symbolic link",
    "long-name": "image: file:xxx",
    "nul-name": "image: file:a\0b.png: the path holds a NUL character",
    "markup-name": "image: file:<script>alert(1)</script>$x.png: the image is missing",
    "<script>alert(2)</script>": "image: file:nowhere.png: the image is missing",
    "too-few-placeholders": "placeholders: 0 image placeholders for 1 images",
    "too-many-placeholders": "placeholders: 2 image placeholders for 1 images",
    "placeholder-in-answer": "stray_placeholder: 1 image placeholders outside the questions",
    "good3": "duplicate_id: 1 earlier records have the same id",
    "no-conversation": "conversation: the conversation is empty",
    "no-alternation": "conversation: turns do not alternate",
    "no-last-answer": "conversation: the last question has no answer",
    "blank-answer": "blank: 1 blank messages",
    "no-words": "degenerate: answer 1: only punctuation",
    "mojibake": "encoding: the text holds UTF-8 that was read as another encoding",
    "flat-image": "image_size: file:flat.png: 100x3 pixels",
    "wrong-split": "entry: 'split' must be one of train, validation, test, found 'holdout'",
    "odd-role": "entry: message 0 has the unknown role 'robot'",
    "lone-surrogate": "entry: the text holds damaged characters",
    "long": "placeholders: 0 image placeholders for 1 images",
    "leak": "split: file:shared-b.png in train is also in test",
    None: "entry: ",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bad source, collected and validated twice, in two folders, with different hash seeds and time zones."""
    root = tmp_path_factory.mktemp("bad")
    write_source(root / "source")
    source = {"name": "bad", "format": "llava", "license": "mine", "images": "../source/images"}
    source["damaged_files"] = "keep"
    source["annotations"] = ["../source/list.json", "../source/more.jsonl"]
    for name, seed, zone in (("first", "1", "UTC"), ("second-run", "2", "Asia/Tokyo")):
        folder = make_project(root / name, source, max_quarantined_share=0.6)
        for command in ("collect", "validate"):
            done = haplovl(command, folder, PYTHONHASHSEED=seed, TZ=zone)
            assert done.returncode == 0, done.stderr
    return root / "first"


def quarantine_of(project: Path) -> list[dict]:
    lines = (project / "data/quarantine/records.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_every_bad_record_is_quarantined_with_file_id_and_reason(project: Path) -> None:
    found = quarantine_of(project)
    assert {row["id"] for row in found} == set(REASONS)
    for row in found:
        assert row["file"] == ("list.json" if row["id"] == "cut-off" else "more.jsonl")
        assert row["reasons"][0].startswith(REASONS[row["id"]]), row["reasons"]
        assert len(json.dumps(row["data"], ensure_ascii=False)) < 13_000
    # The position leads back to the entry: a line of JSONL, an index of JSON.
    by_id = {row["id"]: row for row in found}
    assert by_id["cut-off"]["position"] == GOOD + 1
    assert by_id["empty-image"]["position"] == 3
    assert by_id["empty-image"]["data"] == entry("empty-image", "file:empty.png")


def test_the_rest_goes_on(project: Path) -> None:
    rows = list(read_validated(project / "data/validated"))
    assert {row.record.id for row in rows} == {*(f"good{i}" for i in range(GOOD)), "text-only", "held-out"}
    for row in rows:
        for image in row.images:
            assert Media(project / "data/raw").open(row.source, image.path).size == (image.width, image.height)
    assert [
        row.record.id for row in read_validated(project / "data/validated", "test") if row.record.split != "test"
    ] == []
    assert "held-out" in {row.record.id for row in read_validated(project / "data/validated", "test")}


def test_metrics_count_what_happened(project: Path) -> None:
    metrics = json.loads((project / "metrics/validation.json").read_text())
    bad = len(quarantine_of(project))
    assert (metrics["accepted"], metrics["quarantined"]) == (GOOD + 2, bad)
    assert metrics["records"] == GOOD + 2 + bad
    assert list(metrics["reasons"]) == [check.name for check in CHECKS]
    unseen = {name for name, count in metrics["reasons"].items() if not count}
    assert unseen == {"near_duplicate", "contamination"}  # not looked for without being asked
    assert sum(metrics["splits"].values()) == sum(metrics["kinds"].values()) == GOOD + 2


def test_collect_copies_bytes_and_lists_what_it_skipped(project: Path) -> None:
    raw, source = project / "data/raw", project.parent / "source"
    assert (raw / "bad/annotations/list.json").read_bytes() == (source / "list.json").read_bytes()
    assert (raw / "bad/media/good0.png").read_bytes() == (source / "images/good0.png").read_bytes()
    assert not any(path.is_symlink() for path in raw.rglob("*"))
    skipped = [json.loads(line)["ref"] for line in (raw / "bad/skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == len(set(skipped))
    assert {"file:nowhere.png", "file:link.png", "file:../outside.png"} <= set(skipped)


def test_two_runs_give_the_same_bytes(project: Path) -> None:
    def contents(root: Path) -> dict[str, bytes]:
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    first, second = contents(project), contents(project.parent / "second-run")
    assert {"reports/data_docs/index.html", "data/validated/records.parquet"} <= set(first)
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_data_docs_show_the_faults_and_no_run(project: Path) -> None:
    pages = list((project / "reports/data_docs/validations").rglob("*.html"))
    assert len(pages) == 1
    text = pages[0].read_text(encoding="utf-8")
    assert "text.png: not an image in a known format" in text
    assert "empty-image" in text
    assert "alert(2)" in text
    assert "<script>alert(" not in text
    assert str(project.parent) not in text
    assert set(re.findall(r"\b2\d{7}T", text)) <= {"20000101T"}


def test_data_docs_need_no_network(project: Path) -> None:
    docs = project / "reports/data_docs"
    pages = sorted(docs.rglob("*.html"))
    assert len(pages) == 3
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<script" not in text
        assert not re.findall(r'<(?:link|img)[^>]*(?:href|src)="https?://', text)
        assert "<style>" in text
        for link in re.findall(r'(?:href|src)="([^"#][^":]*)"', text):
            assert (page.parent / unquote(link)).exists(), link
    index = (docs / "index.html").read_text(encoding="utf-8")
    assert "failed" in index and "placeholders" in index
    assert 'href="validations/records/rows%200%20to%20' in index


def test_too_much_quarantine_stops_and_leaves_nothing_to_trust(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "strict")
    make_project(tmp_path / "strict", yaml.safe_load((project / "params.yaml").read_text())["collect"]["sources"][0])
    done = haplovl("validate", tmp_path / "strict")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "more than the limit of 2.0%" in done.stderr
    assert re.search(r"most often because of 'image' \(first: file:\S+: .*\); see", done.stderr)
    assert "data/quarantine/records.jsonl" in done.stderr
    assert not (tmp_path / "strict/data/validated").exists()
    assert quarantine_of(tmp_path / "strict") == quarantine_of(project)
    assert (tmp_path / "strict/metrics/validation.json").exists()


def test_validate_without_collect_names_the_command(tmp_path: Path) -> None:
    done = haplovl(
        "validate",
        make_project(tmp_path, {"name": "a", "format": "llava", "license": "mine", "annotations": ["a.json"]}),
    )
    assert done.returncode == 1
    assert done.stderr == "error: data/raw/sources.json is missing; run 'haplovl collect' or 'dvc repro' first\n"


# --- the parts -----------------------------------------------------------------------------------------------------
def test_splits_by_hash_have_their_shares_and_keep_the_content() -> None:
    import hashlib

    shares = SplitShares(validation=0.1, test=0.2)
    keys = [hashlib.sha256(str(i).encode()).digest()[:8] for i in range(4000)]
    places = np.array([int.from_bytes(key, "big") for key in keys], dtype=np.uint64)
    splits = [SPLITS[number] for number in split_at(places, shares)]
    assert 0.17 < splits.count("test") / 4000 < 0.23
    assert 0.08 < splits.count("validation") / 4000 < 0.12
    more = [SPLITS[number] for number in split_at(places, SplitShares(validation=0.1, test=0.3))]
    assert all(later == "test" for before, later in zip(splits, more, strict=True) if before == "test")


def test_the_header_decides_before_any_pixel_is_allocated(tmp_path: Path) -> None:
    """A child with 1 GB of address space to spare refuses an image that would take 7.5 GB; so does a lowered limit."""
    (tmp_path / "huge.png").write_bytes(png_header(50_000, 50_000))
    code = (
        "import resource; from haplovl.pictures import *\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)\n"
        "try: open_image(Path('huge.png'))\n"
        "except ImageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2500000000 pixels, more than the limit of 50000000\n", done.stderr
    with pytest.raises(ImageError, match=r"48 pixels \(8x6\), more than the limit of 47"):
        decode_bytes(png_header(8, 6), max_pixels=47)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.png"
    white = {"I;16": 65535, "P": 255, "1": 1, "L": 255, "LA": (255, 255)}.get(mode, (255,) * len(mode))
    image = Image.new(mode, (5, 3), white)
    if mode == "P":
        image.putpalette([255] * 768)
    image.save(path)
    decoded = open_image(path)
    assert (decoded.mode, decoded.size, decoded.getpixel((0, 0))) == ("RGB", (5, 3), (255, 255, 255))


def test_transparency_is_white_and_16_bit_gray_is_scaled(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("I;16", (2, 2), 32768).save(tmp_path / "gray.png")
    assert open_image(tmp_path / "gray.png").getpixel((0, 0)) == (128, 128, 128)


def test_exif_turns_the_picture_and_animations_give_their_first_frame(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a\0b", "\ud800", "loop"])
def test_paths_that_leave_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ImageError):
        resolve_inside(tmp_path, path)


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.png").write_bytes(b"x")
    (tmp_path / "link.png").symlink_to("real.png")
    assert resolve_inside(tmp_path, "link.png") == (tmp_path / "real.png").resolve()


def test_validated_table_round_trip(tmp_path: Path) -> None:
    record = Record("a", ("x.png",), (Turn("<image>\nWhat?", "ä €", "digit"), Turn("And?", "b")), "test", "Be brief.")
    rows = [
        ValidatedRecord(record, (ImageFile("x.png", "00", 3, 4),), "s.json"),
        ValidatedRecord(Record("b", (), (Turn("q", "a"),), "train"), (), "s.json"),
    ]
    write_validated(tmp_path, rows)
    first = (tmp_path / "records.parquet").read_bytes()
    assert list(read_validated(tmp_path)) == rows
    assert [row.record.id for row in read_validated(tmp_path, "train")] == ["b"]
    write_validated(tmp_path, iter(rows))
    assert (tmp_path / "records.parquet").read_bytes() == first
