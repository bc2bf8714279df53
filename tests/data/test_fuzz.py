"""Thousands of damaged records and files among good ones: nothing crashes, nothing is lost, the good ones arrive."""

import io
import json
import random
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_data import Outcome, params_of, photograph, record

from haplovl.data.collect import collect
from haplovl.data.validate import validate
from haplovl.errors import UserError

GOOD, DAMAGED, PICTURES = 120, 2500, 500
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


def odd_values(dice: random.Random) -> Any:
    """What should never stand where a string, a list or an object is expected."""
    deep: Any = None
    for _ in range(dice.randint(1, 60)):
        deep = [deep] if dice.random() < 0.5 else {"from": deep}
    names = [
        "../outside.jpg",
        "/etc/passwd",
        "a\0b.jpg",
        "link.jpg",
        "x" * 400,
        "loop",
        ".",
        "",
        "good-0.jpg/x",
        "https://a/b.jpg",
    ]
    values = [None, True, -1, 10**40, 1e308, [], {}, [None], {"value": None}, deep, "\ud800", "\0", "<image>" * 50]
    return dice.choice([*values, *names])


def damaged_record(dice: random.Random, number: int) -> Any:
    """A record with some of its parts replaced, removed or repeated."""
    data = record(f"damaged-{number}", dice.choice([None, "good-1.jpg", f"broken-{number % PICTURES}"]))
    for _ in range(dice.randint(1, 3)):
        place: Any = (
            dice.choice([data, *data["conversations"]]) if isinstance(data.get("conversations"), list) else data
        )
        if not isinstance(place, dict) or not place:
            continue
        name = dice.choice([*place, "image", "split", "system", "kind", "messages", "from"])
        action = dice.random()
        if action < 0.7:
            place[name] = odd_values(dice)
        elif action < 0.85:
            place.pop(name, None)
        elif isinstance(place.get(name), list):
            place[name] = place[name] * dice.randint(0, 3)
    return data if dice.random() < 0.95 else odd_values(dice)


def damaged_line(dice: random.Random, number: int) -> bytes:
    """A damaged record as a line, sometimes damaged once more."""
    line = json.dumps(damaged_record(dice, number)).encode()
    kind = dice.random()
    if kind < 0.15:
        return line[: dice.randint(1, len(line))]
    if kind < 0.25:
        place = dice.randrange(len(line))
        return line[:place] + dice.choice([b"\0", b"\xff", b"\n", b'"', b"\\u", b"\xed\xa0\x80"]) + line[place + 1 :]
    if kind < 0.3:
        return line[:-1] + b', "id": "twice", "conversations": null}' if line.endswith(b"}") else line
    return line


def broken_picture(dice: random.Random, number: int, folder: Path) -> bytes:
    """A picture file that is cut, has bytes flipped, or is something else."""
    form = FORMATS[number % len(FORMATS)]
    path = folder / "whole"
    Image.effect_noise((40 + number % 30, 40), 60).convert("RGB").save(path, form)
    data = bytearray(path.read_bytes())
    kind = dice.random()
    if kind < 0.3:
        return bytes(data[: dice.randint(0, len(data))])
    if kind < 0.9:
        for _ in range(dice.randint(1, 30)):
            # Headers decide most: half of the flips go there.
            data[dice.randrange(min(60, len(data)) if dice.random() < 0.5 else len(data))] = dice.randrange(256)
        return bytes(data)
    return dice.choice([b"", b"<svg/>", dice.randbytes(500), zlib.compress(b"\0" * 5_000_000), bytes(data) * 2])


def write_pictures(tmp_path: Path) -> None:
    """Good pictures, and some of every broken kind."""
    dice = random.Random(11)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(GOOD):
        (images / f"good-{number}.jpg").write_bytes(photograph(number))
    for number in range(PICTURES):
        (images / f"broken-{number}").write_bytes(broken_picture(dice, number, tmp_path))
    (tmp_path / "outside.jpg").write_bytes(photograph(0))
    (images / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (images / "loop").symlink_to(images / "loop")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Outcome]:
    """A function that collects and validates annotation files."""
    monkeypatch.chdir(tmp_path)

    def run(names: list[str], images: str = "images") -> Outcome:
        source = {"name": "fuzz", "format": "llava", "license": "none", "images": images, "near_duplicates": 2}
        source["damaged_files"] = "keep"
        params = params_of([{**source, "annotations": names}])
        collect(params)
        validate(params, processes=2)
        return Outcome(tmp_path)

    return run


def good_records() -> list[dict]:
    return [record(f"good-{number}", f"good-{number}.jpg") for number in range(GOOD)]


def test_thousands_of_damaged_lines_lose_nothing(project, tmp_path) -> None:
    write_pictures(tmp_path)
    dice = random.Random(7)
    lines = [json.dumps(data).encode() for data in good_records()]
    lines += [damaged_line(dice, number) for number in range(DAMAGED)]
    lines += [json.dumps(record("huge", answer="x y " * 2_500_000)).encode()]
    lines += [b"[" * 100_000, b'{"id": "number", "conversations": ' + b"9" * 5000 + b"}"]
    dice.shuffle(lines)
    (tmp_path / "lines.jsonl").write_bytes(b"\n".join(lines))
    outcome = project(["lines.jsonl"])
    written = sum(bool(line.strip()) for line in b"\n".join(lines).split(b"\n"))
    accepted, refused = outcome.accepted, outcome.quarantine
    assert {f"good-{number}" for number in range(GOOD)} <= set(accepted)
    assert len(refused) > DAMAGED / 2
    assert len(accepted) + len(refused) == outcome.metrics["records"] == written
    assert len({(row["file"], row["position"]) for row in refused}) == len(refused)
    assert all(row["reasons"] and "data" in row for row in refused)
    assert any(
        "10000000 characters" in reason or "characters, more than" in reason for reason in outcome.reasons["huge"]
    )


def test_lists_cut_anywhere_keep_what_comes_before(project, tmp_path) -> None:
    write_pictures(tmp_path)
    dice = random.Random(3)
    whole = json.dumps(good_records())
    names = []
    for number in range(12):
        names.append(f"cut-{number}.json")
        # Ids of their own, or only the first file's would count.
        own = whole.replace('"id": "good-', f'"id": "{number}-good-')
        (tmp_path / names[-1]).write_text(own[: dice.randint(1, len(own) - 1)])
    outcome = project(names)
    for number, name in enumerate(names):
        text = (tmp_path / name).read_text()
        ends = text.count('"A square."}]}')
        own = [id_ for id_ in outcome.accepted if id_.startswith(f"{number}-good-")]
        assert len(own) == ends
        assert sum(row["file"] == name for row in outcome.quarantine) == 1


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "pack"), [("tar", tar_of), ("zip", zip_of)])
@pytest.mark.parametrize("damage", ["zeroed", "cut"])
def test_damaged_archives_cost_the_damaged_pictures(project, tmp_path, kind: str, pack: Callable, damage: str) -> None:
    files = {f"good-{number}.jpg": photograph(number) for number in range(GOOD)}
    data = bytearray(pack(files))
    middle = len(data) // 2
    if damage == "zeroed":
        data[middle : middle + 9000] = bytes(9000)
    else:
        del data[middle:]
    (tmp_path / f"images.{kind}").write_bytes(data)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(data) + "\n" for data in good_records()))
    try:
        outcome = project(["lines.jsonl"], images=f"images.{kind}")
    except UserError as error:  # a zip that lost the directory at its end
        assert (kind, damage) == ("zip", "cut") and "none of the 120 records can be used" in str(error)
        return
    assert len(outcome.accepted) + len(outcome.quarantine) == GOOD
    # What lies before the damage arrives.
    assert {f"good-{number}" for number in range(GOOD // 2 - 10)} <= set(outcome.accepted)
    assert outcome.quarantine
