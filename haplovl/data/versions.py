"""Versions of the data: what changed between two of them, and which one a registered model saw.

A version is a git revision whose dvc.lock names the data, or `workspace`: the files that lie in data/ now. DVC brings
what is not in its cache from the default remote.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from haplovl.data.validated import FILE_NAME, ValidatedRecord, read_validated
from haplovl.errors import UserError
from haplovl.files import CANDIDATE, PREPARED, RAW, VALIDATED, read_json
from haplovl.revisions import LOCK, commit_of, fetch, git

WORKSPACE = "workspace"
SHOWN = 5
"""Ids that are kept as examples of every kind of change."""
CHANGES = ("added", "removed", "changed")


@dataclass
class SourceChange:
    """What happened to the records of one source; counts, and the first ids of each change."""

    before: int = 0
    after: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    ids: dict[str, list[str]] = field(default_factory=lambda: {change: [] for change in CHANGES})

    def note(self, change: str, id_: str) -> None:
        """Counts one record's change."""
        self.counts[change] += 1
        if len(self.ids[change]) < SHOWN:
            self.ids[change].append(id_)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists, every change named."""
        counts = {change: self.counts[change] for change in CHANGES}
        return {"before": self.before, "after": self.after, **counts, "ids": self.ids}


def diff(before: str, after: str = WORKSPACE) -> dict[str, SourceChange]:
    """What changed from one version of the validated records to another, by source.

    A record is the same one if source and id are; it changed if its text, its split or the content of a picture did.
    Memory: about 150 bytes for each record of the older version.

    Raises:
        UserError: a version is unknown, holds no validated data, or its data is neither here nor in the remote.
    """
    sources: dict[str, SourceChange] = {}
    with _table(before) as folder:
        known = {(row.source, row.record.id): _content(row) for row in read_validated(folder)}
    for source, _ in known:
        sources.setdefault(source, SourceChange()).before += 1
    with _table(after) as folder:
        for row in read_validated(folder):
            change = sources.setdefault(row.source, SourceChange())
            change.after += 1
            content = known.pop((row.source, row.record.id), None)
            if content is None:
                change.note("added", row.record.id)
            elif content != _content(row):
                change.note("changed", row.record.id)
    for source, id_ in known:
        sources[source].note("removed", id_)
    return dict(sorted(sources.items()))


def _content(row: ValidatedRecord) -> bytes:
    record = row.record
    turns = [[turn.question, turn.answer, turn.kind] for turn in record.turns]
    content = [record.split, record.system, turns, [image.sha256 for image in row.images]]
    return hashlib.sha256(json.dumps(content).encode()).digest()[:16]


@contextmanager
def _table(version: str) -> Iterator[Path]:
    """A folder that holds the validated table of a version."""
    if version == WORKSPACE:
        yield VALIDATED
        return
    with tempfile.TemporaryDirectory() as name:
        fetch(version, VALIDATED / FILE_NAME, Path(name) / FILE_NAME)
        yield Path(name)


@dataclass(frozen=True)
class Seen:
    """The data that one version of the model saw: DVC's hashes of it, and its records by source and split."""

    version: str
    commit: str
    hashes: dict[str, str]
    sources: dict[str, dict[str, int]]


def seen(version: str = "") -> list[Seen]:
    """The data behind a registered model's version (`haplovl@v0.0.1`, or any git revision); behind all by default.

    Raises:
        UserError: the revision is unknown, or its dvc.lock names no prepared data.
    """
    versions = [version] if version else git("tag", "--list", "*@v*", "--sort=version:refname").splitlines()
    return [_seen(name) for name in versions]


def _seen(version: str) -> Seen:
    commit = commit_of(version)
    lock = yaml.safe_load(git("show", f"{commit}:./{LOCK}") or "{}") or {}
    outs = [out for stage in (lock.get("stages") or {}).values() for out in stage.get("outs") or []]
    hashes = {out["path"]: str(out.get("md5", "")) for out in outs}
    named = {path.as_posix(): hashes.get(path.as_posix(), "") for path in (RAW, VALIDATED, PREPARED)}
    if not named[PREPARED.as_posix()]:
        raise UserError(f"'{version}' holds no {LOCK} that names {PREPARED}")
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "candidate.json"
        fetch(version, CANDIDATE / target.name, target)
        data = read_json(target).get("data", {})
    return Seen(version, commit, named, data.get("sources", {}))


def print_diff(before: str, after: str, as_json: bool) -> None:
    """Prints what changed as a table, or as one JSON object."""
    changes = diff(before, after)
    if as_json:
        sources = {source: change.to_json() for source, change in changes.items()}
        print(json.dumps({"before": before, "after": after, "sources": sources}, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"validated records: {before} → {after}")
    table.add_column("source")
    for name in ("before", "after", *CHANGES):
        table.add_column(name, justify="right")
    for source, change in changes.items():
        counts = (str(change.counts[name]) for name in CHANGES)
        table.add_row(source, str(change.before), str(change.after), *counts)
    console = Console()
    console.print(table)
    for source, change in changes.items():
        for name in CHANGES:
            if change.ids[name]:
                more = " …" if change.counts[name] > SHOWN else ""
                console.print(f"{source} {name}: {', '.join(change.ids[name])}{more}", markup=False, soft_wrap=True)


def print_seen(version: str, as_json: bool) -> None:
    """Prints which data registered models saw as a table, or as one JSON list."""
    found = seen(version)
    if as_json:
        print(json.dumps([vars(one) for one in found], ensure_ascii=False))
        return
    if not found:
        print("no version of a model is registered yet")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="data behind the registered models (DVC's hashes, first 8 characters)")
    for name in ("version", "commit", *(path.as_posix() for path in (RAW, VALIDATED, PREPARED)), "records by split"):
        table.add_column(name)
    for one in found:
        records = "\n".join(
            f"{source}: " + ", ".join(f"{count} {split}" for split, count in splits.items() if count)
            for source, splits in one.sources.items()
        )
        table.add_row(one.version, one.commit[:8], *(value[:8] for value in one.hashes.values()), records)
    Console().print(table)
