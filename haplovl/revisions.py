"""Git revisions of the project, and what DVC kept of them."""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from haplovl.errors import UserError
from haplovl.redaction import without_secrets

LOCK = "dvc.lock"


def fetch(version: str, path: Path, target: Path) -> None:
    """Brings a file or folder of a version from DVC's cache or the default remote.

    Raises:
        UserError: the revision is unknown, or what is asked for is in neither.
    """
    # A file that lies in the cache needs no DVC, which would read the whole project of that revision.
    kept = _kept(commit_of(version), path)
    if kept is not None:
        shutil.copyfile(kept, target)
        return
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_data.index import DataIndexDirError
    from scmrepo.exceptions import SCMError

    try:
        # With today's remotes: those of an old version may not exist yet, or no longer.
        files = DVCFileSystem(".", rev=version, config=dict(Repo(".").config))
        if files.isdir(path.as_posix()):
            files.get(path.as_posix(), str(target), recursive=True)
        else:
            files.get_file(path.as_posix(), str(target))
    except FileNotFoundError:
        raise UserError(
            f"{path} of '{version}' cannot be found: that version has none, or it is neither in DVC's cache nor in the "
            f"default remote (dvc remote list)"
        ) from None
    except RecursionError:  # what DVC makes of a listing with `..`
        raise UserError(f"{path} of '{version}' cannot be read: what DVC keeps of it is damaged") from None
    except (DvcException, SCMError, DataIndexDirError, OSError) as error:
        reason = without_secrets(" ".join(str(error).split()))  # which may name the remote
        raise UserError(f"{path} of '{version}' cannot be read: {reason}") from None


def lock_of(commit: str) -> dict[str, Any]:
    """The stages that a commit's dvc.lock records, by name; empty where it has none."""
    return stages_in(git("show", f"{commit}:./{LOCK}"))


def stages_in(lock: str) -> dict[str, Any]:
    """The stages of a dvc.lock's text, by name."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C where PyYAML has it: ten times as fast
    return (yaml.load(lock or "{}", Loader=loader) or {}).get("stages") or {}


def hashes(entries: Iterable[dict[str, Any]] | None) -> dict[str, str]:
    """DVC's hashes of a stage's outs or deps, by path; those of folders end in `.dir`."""
    return {entry["path"]: str(entry.get("md5") or entry.get("etag") or "") for entry in entries or []}


def cached(digest: str) -> Path | None:
    """The file in DVC's cache that has this hash, if it is there."""
    path = _cache(Path.cwd()) / digest[:2] / digest[2:]
    return path if digest and path.is_file() else None


def listing(digest: str) -> dict[str, str] | None:
    """The files of a folder that has this hash, with theirs; None where DVC's cache does not know it."""
    found = cached(digest) if digest.endswith(".dir") else None
    if found is None:
        return None
    return {entry["relpath"]: entry["md5"] for entry in json.loads(found.read_text(encoding="utf-8"))}


def dir_hash(folder: Path) -> str:
    """DVC's hash of a folder as it lies here: md5 over the sorted list of its files with theirs."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = [{"md5": _md5(path), "relpath": path.relative_to(folder).as_posix()} for path in files]
    entries.sort(key=lambda entry: tuple(entry["relpath"].split("/")))
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def versions_of(name: str, taken_back: bool = False) -> dict[str, str]:
    """The registered versions of a model (`v0.0.2`) with their tags, the oldest first.

    Those are annotated tags as GTO writes them, not names made by hand; without those that were taken back
    (`haplovl@v0.0.2!`), or these alone.
    """
    form = re.compile(rf"{re.escape(name)}@(v\d+\.\d+\.\d+)")
    tags = _tags_of(name)
    gone = {tag.split("!")[0] for tag, _ in tags if "!" in tag}
    return {
        found[1]: tag
        for tag, kind in tags
        if kind == "tag" and (tag in gone) == taken_back and (found := form.fullmatch(tag))
    }


def next_version(name: str) -> str:
    """The version after all that there ever were: a number that was taken back is not given to another model."""
    numbers = [
        tuple(map(int, found.groups()))
        for tag, _ in _tags_of(name)
        if (found := re.fullmatch(rf"{re.escape(name)}@v(\d+)\.(\d+)\.(\d+)!?", tag))
    ]
    major, minor, patch = max(numbers, default=(0, 0, 0))
    return f"v{major}.{minor}.{patch + 1}"


def _tags_of(name: str) -> list[tuple[str, str]]:
    """Tags of a model's versions with git's type of them: `tag` for annotated ones, `commit` for names alone."""
    form = "%(refname:strip=2)%09%(objecttype)"
    lines = git("for-each-ref", "--sort=version:refname", f"--format={form}", f"refs/tags/{name}@*").splitlines()
    return [(tag, kind) for tag, kind in (line.split("\t") for line in lines)]


def _kept(commit: str, path: Path) -> Path | None:
    """Where DVC's cache keeps a single file that is, or lies in, an out of a commit."""
    outs = hashes(out for stage in lock_of(commit).values() for out in stage.get("outs") or [])
    for name in (path, *path.parents):
        if digest := outs.get(name.as_posix()):
            if digest.endswith(".dir"):
                digest = (listing(digest) or {}).get(path.relative_to(name).as_posix(), "")
            return cached(digest)
    return None


@lru_cache(maxsize=8)
def _cache(project: Path) -> Path:
    """The folder of DVC's cache; opening DVC for it takes a twentieth of a second."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(project)) as repo:
            return Path(repo.cache.local.path)
    except DvcException as error:
        raise UserError(f"no usable DVC project here: {error}") from None


def commit_of(version: str) -> str:
    """The commit of a revision.

    Raises:
        UserError: there is none of this name.
    """
    found = git("rev-parse", "--verify", "--quiet", f"{version}^{{commit}}").strip()
    if not found:
        raise UserError(f"there is no git revision '{version}' here; 'git tag' and 'git log' list them")
    return found


def git(*arguments: str) -> str:
    """Output of a git command, empty if it fails.

    Raises:
        UserError: git is not installed.
    """
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UserError("versions need git, which is not installed") from None
    return "" if done.returncode else done.stdout
