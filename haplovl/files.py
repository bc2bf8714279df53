"""Where the pipeline's files live, and how they are written so that no half-written output is ever trusted."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haplovl.errors import UserError

RAW = Path("data/raw")
VALIDATED = Path("data/validated")
QUARANTINE = Path("data/quarantine")
PREPARED = Path("data/prepared")
TEACHERS = Path("models/teachers")
STAGE1 = Path("models/stage1")
HEADS = "heads.safetensors"
"""The two heads that stage 1 trains and stage 2 drops, beside the model in STAGE1; `haplovl probe` needs them."""
STAGE2 = Path("models/stage2")
REPORTS = Path("reports")
DATA_PROFILE = REPORTS / "data_profile.json"
"""What the validated data is like: lengths, sizes, words."""
ACCEPTED = Path("data/accepted.json")
"""The profile of the data that was last accepted; in git. `{}` while none was."""
METRICS = Path("metrics")
CANDIDATE = Path("candidate")
RUNS = Path("runs")
"""Training state and logs: outside the DVC outs, so that a killed run finds its state again."""
RUN_FILE = "run.json"
"""Beside the results of a run: what they were made of (`haplovl.tracking.description`)."""


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields a folder to write into; it takes the name `target` only when the block ends without an error."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def write_whole(target: Path, text: str) -> None:
    """Writes a text file in one step: readers see the old content or all of the new one.

    Raises:
        UserError: a folder is in its place.
    """
    if target.is_dir():
        raise UserError(f"{target} is a folder and cannot be written as a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def require_writable(target: Path, option: str) -> None:
    """Tells before hours of work whether their result can be written; `option` named the file.

    Raises:
        UserError: a folder is in its place, or its folder cannot be made or written to.
    """
    if target.is_dir():
        raise UserError(f"{option} names a file to write, and {target} is a folder")
    nearest = next(parent for parent in target.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"{target} cannot be written: {nearest} is no folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"{target} cannot be written: {nearest} is not yours to write to")


def write_json(target: Path, value: Any) -> None:
    """Writes JSON in a stable, readable form, in one step."""
    write_whole(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(require(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_jsonl(path: Path) -> list[Any]:
    """Reads JSON lines.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        # Not splitlines(): it would also cut at U+2028 and the like, which JSON allows inside a string.
        return [json.loads(line) for line in require(path).read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise UserError(f"{path} does not hold JSON lines: {error}") from None


def require(path: Path, made_by: str = "") -> Path:
    """Returns `path` if it exists.

    Raises:
        UserError: it does not; names the command that makes it.
    """
    if not path.exists():
        raise UserError(f"{path} is missing" + (f"; run 'haplovl {made_by}' or 'dvc repro' first" if made_by else ""))
    return path


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """sha256 over the relative names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()
