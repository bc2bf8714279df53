"""Versions of the data: pushed, pulled, gone back to, told apart, and known for every registered model."""

import json
import shutil
from pathlib import Path

import pytest
from dvc_project import git, make_project
from typer.testing import CliRunner

from haplovl.cli import app
from haplovl.data.validated import ImageFile, ValidatedRecord, read_validated, write_validated
from haplovl.data.versions import diff, seen
from haplovl.errors import UserError
from haplovl.files import PREPARED, RAW, VALIDATED
from haplovl.records import Record, Turn

DVC_YAML = """
stages:
  collect: {cmd: haplovl collect, outs: [data/raw]}
  validate: {cmd: haplovl validate, deps: [data/raw], outs: [data/validated]}
  prepare: {cmd: haplovl prepare, deps: [data/validated], outs: [data/prepared]}
  register: {cmd: haplovl register, deps: [data/prepared], outs: [candidate]}
"""
CACHE = Path(".dvc/cache")


def dvc():
    from dvc.repo import Repo

    return Repo(".")


def row(n, source="a", answer="two", split="train", picture="x"):
    images = (ImageFile("file:x.png", picture, 32, 32),)
    return ValidatedRecord(Record(f"r{n}", ("file:x.png",), (Turn("<image>?", answer),), split=split), images, source)


def write(rows):
    """The outs of the stages for these records, as the commands leave them."""
    for folder in (RAW, VALIDATED, PREPARED, Path("candidate")):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    (RAW / "a.jsonl").write_text("\n".join(item.record.id for item in rows))
    write_validated(VALIDATED, rows)
    sources = {source: {"train": sum(item.source == source for item in rows)} for source in ("a", "b")}
    (PREPARED / "manifest.json").write_text(json.dumps(sources))
    (Path("candidate") / "candidate.json").write_text(json.dumps({"data": {"sources": sources}}))


def version(name, rows):
    """Records the data as a version, as `dvc repro` and `git commit` do."""
    write(rows)
    dvc().commit(force=True)
    git("add", "-A")
    git("commit", "-qm", name)
    git("tag", name)


OLD = [row(1), row(2), row(3), row(4), row(5, "b")]
NEW = [
    row(1),
    row(2, answer="three"),
    row(3, split="test"),
    row(4, picture="y"),
    row(6),
    *(row(n, "b") for n in range(9)),
]


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A repository without data."""
    return make_project(tmp_path, monkeypatch, DVC_YAML)


@pytest.fixture
def repository(empty):
    """A repository with two versions of the data, `haplovl@v0.0.1` and `haplovl@v0.0.2`."""
    version("haplovl@v0.0.1", OLD)
    version("haplovl@v0.0.2", NEW)
    return empty


def check(changes):
    a, b = changes["a"], changes["b"]
    assert (a.before, a.after, a.counts["added"], a.counts["removed"], a.counts["changed"]) == (4, 5, 1, 0, 3)
    assert a.ids == {"added": ["r6"], "removed": [], "changed": ["r2", "r3", "r4"]}
    assert (b.before, b.after, b.counts["added"], b.counts["removed"]) == (1, 9, 8, 0)
    assert b.ids["added"] == ["r0", "r1", "r2", "r3", "r4"]


def test_what_changed_between_two_versions_is_told_by_source(repository):
    check(diff("haplovl@v0.0.1", "haplovl@v0.0.2"))
    back = diff("haplovl@v0.0.2", "haplovl@v0.0.1")
    assert back["a"].ids["removed"] == ["r6"] and back["b"].counts["removed"] == 8
    same = diff("HEAD", "workspace")
    assert not any(change.counts.total() for change in same.values())
    write_validated(VALIDATED, [*NEW, row(7, "c")])
    assert diff("HEAD")["c"].ids["added"] == ["r7"]


def test_the_commands_print_it(repository):
    run = CliRunner().invoke(app, ["data", "diff", "haplovl@v0.0.1", "HEAD", "--json"])
    sources = json.loads(run.output)["sources"]
    assert (sources["a"]["added"], sources["a"]["changed"], sources["b"]["added"]) == (1, 3, 8)
    run = CliRunner().invoke(app, ["data", "diff", "haplovl@v0.0.1"])
    assert "a changed: r2, r3, r4" in run.output and "b added: r0, r1, r2, r3, r4 …" in run.output
    run = CliRunner().invoke(app, ["data", "of"])
    assert run.exit_code == 0 and "a: 4 train" in run.output.replace("\n", "")
    run = CliRunner().invoke(app, ["data", "of", "haplovl@v0.0.2", "--json"])
    assert json.loads(run.output)[0]["sources"]["b"] == {"train": 9}


def test_a_registered_model_knows_its_data(repository):
    old, new = seen()
    assert (old.version, new.version) == ("haplovl@v0.0.1", "haplovl@v0.0.2")
    assert old.commit == git("rev-parse", "HEAD~1") and set(old.hashes) == {str(p) for p in (RAW, VALIDATED, PREPARED)}
    assert all(old.hashes[name] != new.hashes[name] for name in old.hashes)
    assert old.sources == {"a": {"train": 4}, "b": {"train": 1}}
    assert seen("HEAD~1")[0].hashes == old.hashes


def test_unknown_versions_are_one_sentence(repository):
    with pytest.raises(UserError, match="no git revision 'v9'"):
        diff("v9")
    Path("other.txt").write_text("x")
    git("rm", "-q", "dvc.lock")
    git("commit", "-qm", "no data")
    with pytest.raises(UserError, match=r"data/validated/records\.parquet of 'HEAD' cannot be"):
        diff("HEAD")
    with pytest.raises(UserError, match=r"'HEAD' holds no dvc\.lock that names data/prepared"):
        seen("HEAD")


# --- remotes ---------------------------------------------------------------------------------------------------------
def folder_remote(tmp_path):
    """A folder, as on a shared disk."""
    return {"url": str(tmp_path / "remote")}


def s3_remote(tmp_path):
    """A bucket on moto's server, which speaks S3 on this machine."""
    pytest.importorskip("dvc_s3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    import boto3

    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    address = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys).create_bucket(Bucket="data")
    secrets = {"access_key_id": "test", "secret_access_key": "test", "region": "us-east-1"}
    return {"url": "s3://data/haplovl", "endpointurl": address, **secrets, "stop": server.stop}


@pytest.mark.parametrize("kind", [folder_remote, s3_remote])
def test_data_is_pushed_pulled_and_gone_back_to(empty, tmp_path, kind):
    remote = kind(tmp_path)
    stop = remote.pop("stop", lambda: None)
    try:
        version("haplovl@v0.0.1", OLD)
        with dvc().config.edit() as config:
            config["remote"] = {"store": remote}
            config["core"]["remote"] = "store"
        assert dvc().push() == 8  # four folders and the file in each
        version("haplovl@v0.0.2", NEW)
        assert dvc().push() == 8
        # Another machine: the repository, and nothing of the data.
        for folder in (CACHE, Path("data"), Path("candidate")):
            shutil.rmtree(folder)
        dvc().pull()
        assert list(read_validated()) == NEW
        assert (RAW / "a.jsonl").read_text().split()[-1] == "r8"
        # Back to the old version, whose bytes come from the remote again.
        git("checkout", "-q", "haplovl@v0.0.1", "--", "dvc.lock")
        dvc().pull()
        assert list(read_validated()) == OLD
        assert (RAW / "a.jsonl").read_text().split() == [item.record.id for item in OLD]
        shutil.rmtree(CACHE)
        check(diff("haplovl@v0.0.1", "haplovl@v0.0.2"))
    finally:
        stop()
