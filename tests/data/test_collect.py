"""collect: both kinds of source, sources that cannot be read, and a disk that is full, as real commands."""

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from haplovl.data.collect import collect
from haplovl.data.media import Media
from haplovl.data.sources import read_sources
from haplovl.data.validated import read_validated
from haplovl.errors import UserError
from haplovl.files import sha256_of_folder
from haplovl.records import read_items
from haplovl.settings import load_params

REPO = Path(__file__).resolve().parents[2]
SCENES = {"name": "scenes", "format": "scenes", "train_records": 40, "validation_records": 5, "test_records": 10}


def haplovl(cwd: Path, command: str = "collect", **run: object) -> subprocess.CompletedProcess[str]:
    """Runs a real command in a project folder."""
    words = [sys.executable, "-m", "haplovl", command]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=60, **run)


def make_project(folder: Path, source: dict) -> Path:
    params = yaml.safe_load((REPO / "params.yaml").read_text())
    params["collect"]["sources"] = [source]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def llava(folder: Path, **changes: object) -> dict:
    """A source of one record and one image below `folder`, as settings."""
    (folder / "images/sub").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / "images/sub/a.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    (folder / "data.json").write_text(json.dumps([{"id": "a", "image": "sub/a.png", "conversations": talk}]))
    places = {"annotations": [str(folder / "data.json")], "images": str(folder / "images")}
    return {"name": "own", "format": "llava", "license": "mine", **places, **changes}


def assert_stopped(done: subprocess.CompletedProcess[str], project: Path, *words: str) -> None:
    """One sentence, exit code 1, no output."""
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr
    assert not (project / "data/raw").exists()
    assert not (project / "data/raw.partial").exists()


def test_scenes_twice_give_identical_bytes(tmp_path: Path) -> None:
    params = load_params(make_project(tmp_path, SCENES) / "params.yaml")
    for name in ("one", "two"):
        collect(params, tmp_path / name)
    assert sha256_of_folder(tmp_path / "one") == sha256_of_folder(tmp_path / "two")
    other = params.model_copy(update={"seed": params.seed + 1})
    collect(other, tmp_path / "one")
    assert sha256_of_folder(tmp_path / "one") != sha256_of_folder(tmp_path / "two")


def test_scenes_by_the_command(tmp_path: Path) -> None:
    done = haplovl(make_project(tmp_path, SCENES))
    assert done.returncode == 0, done.stderr
    records = [item.data for item in read_items(tmp_path / "data/raw/scenes/annotations/scenes.jsonl")]
    media = tmp_path / "data/raw/scenes/media"
    images = {str(p.relative_to(media)) for p in media.rglob("*.png")}
    named = [
        image for r in records for image in ([r["image"]] if isinstance(r.get("image"), str) else r.get("image", []))
    ]
    assert len(records) == 55
    assert sorted(named) == sorted(images)
    assert done.stdout == f"scenes: 55 records, {len(images)} images\ncollected 1 source into data/raw\n"


def test_llava_annotations_of_one_name_stay_apart(tmp_path: Path) -> None:
    first, second = llava(tmp_path / "a"), llava(tmp_path / "b")
    source = {**first, "annotations": first["annotations"] + second["annotations"]}
    collect(load_params(make_project(tmp_path, source) / "params.yaml"), tmp_path / "raw")
    assert sorted(p.name for p in (tmp_path / "raw/own/annotations").iterdir()) == ["data-2.json", "data.json"]
    assert (tmp_path / "raw/own/media/sub/a.png").read_bytes() == (tmp_path / "a/images/sub/a.png").read_bytes()
    assert (tmp_path / "raw/own/skipped.jsonl").read_text() == ""


def test_missing_annotations(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", llava(tmp_path, annotations=["gone.json"]))
    assert_stopped(haplovl(project), project, "the annotation file gone.json cannot be read: No such file or directory")


def test_missing_image_folder(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", llava(tmp_path, images="gone"))
    assert_stopped(haplovl(project), project, "the image folder gone cannot be read: No such file or directory")


def test_annotations_of_an_unknown_type(tmp_path: Path) -> None:
    params = load_params(make_project(tmp_path, llava(tmp_path, annotations=["data.csv"])) / "params.yaml")
    with pytest.raises(UserError, match=r"data\.csv must end in \.json or \.jsonl"):
        collect(params, tmp_path / "raw")


def test_image_folder_without_permission(tmp_path: Path) -> None:
    """The superuser may read everything, so as root the child gives up that right before it starts."""
    project = make_project(tmp_path / "project", llava(tmp_path))
    (tmp_path / "images").chmod(0o000)
    try:
        done = haplovl(project, preexec_fn=_drop_file_rights if os.getuid() == 0 else None)
    except subprocess.SubprocessError:
        pytest.skip("this container does not let root give up rights")
    finally:
        (tmp_path / "images").chmod(0o755)
    assert_stopped(done, project, f"the image folder {tmp_path / 'images'} cannot be read: Permission denied")


def _drop_file_rights() -> None:
    """Takes CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2) from the bounding set (prctl 24); exec makes it felt."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):
        if libc.prctl(24, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


def test_a_wrong_parameter(tmp_path: Path) -> None:
    project = make_project(tmp_path, {**SCENES, "train_recods": 5})
    assert_stopped(haplovl(project), project, "'collect.sources.0.train_recods'", "did you mean 'train_records'?")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A file system of one megabyte, where this machine lets us mount one."""
    project = make_project(tmp_path / "project", {**SCENES, "train_records": 3000})
    (project / "data").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(project / "data")]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        assert_stopped(haplovl(project), project, "No space left on device")
    finally:
        subprocess.run(["umount", str(project / "data")], check=True)


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    """The same without root: the annotation file hits a limit on file sizes in the middle of a write."""
    project = make_project(tmp_path, {**SCENES, "train_records": 400})
    code = (
        "import resource, signal; from haplovl.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "main()\n"
    )
    run = [sys.executable, "-c", code, "collect"]
    done = subprocess.run(run, cwd=project, capture_output=True, text=True, timeout=60)
    assert_stopped(done, project, "File too large")


# --- several sources -----------------------------------------------------------------------------------------------
def test_several_sources_are_listed_with_their_counts(tmp_path: Path) -> None:
    first = llava(tmp_path / "a", name="first", weight=2.0, split={"validation": 0.1, "test": 0.0})
    second = llava(tmp_path / "b", name="second", near_duplicates=4)
    (tmp_path / "b/images/sub/a.png").unlink()
    params = yaml.safe_load((make_project(tmp_path, SCENES) / "params.yaml").read_text())
    params["collect"]["sources"] += [first, second]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    done = haplovl(tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("scenes: 55 records, ")
    assert lines[1:] == [
        "first: 1 records, 1 images",
        "second: 1 records, 0 images, 1 skipped (see data/raw/second/skipped.jsonl)",
        "collected 3 sources into data/raw",
    ]
    sources = read_sources(tmp_path / "data/raw")
    assert [source.name for source in sources] == ["scenes", "first", "second"]
    given = load_params(tmp_path / "params.yaml").collect.sources
    # The weight brings no other data, so a new one leaves data/raw as it is.
    assert [source.settings for source in sources] == [one.model_copy(update={"weight": 1.0}) for one in given]
    assert [(source.records, source.images, source.skipped) for source in sources[1:]] == [(1, 1, 0), (1, 0, 1)]
    [file] = sources[1].files
    assert file["sha256"] == hashlib.sha256((tmp_path / "a/data.json").read_bytes()).hexdigest()
    validated = haplovl(tmp_path, command="validate")
    assert validated.returncode == 0, validated.stderr
    rows = list(read_validated(tmp_path / "data/validated"))
    assert {row.source for row in rows} == {"scenes", "first"}
    for row in rows:
        for image in row.images:
            assert hashlib.sha256(Media(tmp_path / "data/raw").read(row.source, image.path)).hexdigest() == image.sha256


def test_large_files_are_linked_where_the_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(make_project(tmp_path, llava(tmp_path)) / "params.yaml")
    original = tmp_path / "images/sub/a.png"
    collect(params, tmp_path / "raw")
    copy = tmp_path / "raw/own/media/sub/a.png"
    assert copy.read_bytes() == original.read_bytes() and not copy.is_symlink()

    def refuse(*args: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    collect(params, tmp_path / "raw")
    assert copy.read_bytes() == original.read_bytes()
    assert not copy.samefile(original)


def test_a_damaged_list_of_sources_is_named(tmp_path: Path) -> None:
    collect(load_params(make_project(tmp_path, llava(tmp_path)) / "params.yaml"), tmp_path / "raw")
    for text in ("{", "[1]", '[{"name": "a"}]', "{}", "null"):
        (tmp_path / "raw/sources.json").write_text(text)
        with pytest.raises(UserError, match="sources.json"):
            read_sources(tmp_path / "raw")
