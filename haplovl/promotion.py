"""Which registered version is in use: champion and challenger, the way back, and the files of a version.

Registered versions and stages are GTO's git tags (`haplovl@v0.0.2`, `haplovl#prod#3`), what they mean is in the
candidate and the predictions that DVC keeps for their commits: no account and no server is needed.
"""

import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from haplovl.errors import UserError
from haplovl.evaluate.predictions import Side, read_predictions, require_same_questions
from haplovl.evaluate.statistics import SIGNIFICANT, Difference, holm, paired_difference
from haplovl.files import CANDIDATE, REPORTS, STAGE2, read_json, whole_folder
from haplovl.publish import with_identity
from haplovl.revisions import commit_of, fetch, git, versions_of

PROD = "prod"
PREDICTIONS = REPORTS / "evaluation" / "predictions.jsonl"
ROLLED_BACK = "Roll back from"
"""How the message of an assignment begins that takes an earlier one back."""


@dataclass(frozen=True)
class Version:
    """A registered version of the model and the stages that it is in."""

    name: str
    commit: str
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a challenger may take the champion's place; differences are challenger minus champion."""

    challenger: str
    champion: str | None
    """None where the stage is free."""
    differences: dict[str, Difference] = field(default_factory=dict)
    """Over all questions (`all`), then by question type."""
    reasons: tuple[str, ...] = ()
    """Why it may not; empty where it may."""


def registered(name: str) -> list[Version]:
    """The registered versions of the model of this name, the oldest first.

    Raises:
        UserError: git is not installed.
    """
    current = {stage: path[-1] for stage in _stages(name) if (path := _path_to(name, stage))}
    return [
        Version(version, commit_of(tag), tuple(sorted(stage for stage, held in current.items() if held == version)))
        for version, tag in versions_of(name).items()
    ]


def in_stage(name: str, stage: str) -> str | None:
    """The version that is in a stage now."""
    path = _path_to(name, stage)
    return path[-1] if path else None


def was_in_stage(name: str, version: str, stage: str) -> bool:
    """Whether a version is in a stage now or was ever put there."""
    return any(version == held for held, _ in _assignments(name, stage))


def promote(name: str, version: str | None = None, stage: str = PROD, force: bool = False) -> Verdict:
    """Puts a version (the newest by default) into a stage if it is not worse than the one there, or with `force`.

    Raises:
        UserError: no such version, nothing to compare by, or both were tested on different questions.
    """
    version = known(name, version)
    champion = in_stage(name, stage)
    if champion == version:
        return Verdict(version, champion)
    verdict = Verdict(version, champion) if champion is None or force else judge(name, version, champion)
    if not verdict.reasons:
        _assign(name, version, stage, f"Promote {name} {version} to {stage}")
    return verdict


def judge(name: str, challenger: str, champion: str) -> Verdict:
    """Compares two versions' answers to the same held-out questions.

    The challenger must not be worse over all questions, nor on a type of them, by more than chance: a paired bootstrap
    (`haplovl.evaluate.statistics`) at p < 0.05, the types' p-values adjusted for their number (Holm).

    Raises:
        UserError: predictions are missing, or answer different questions.
    """
    new, old = (_predictions(name, version) for version in (challenger, champion))
    require_same_questions(new, old)
    ids = sorted(new.answers)
    kinds = [new.answers[id_].question.kind for id_ in ids]
    differences = {"all": _difference(new, old, ids)}
    for kind in sorted(set(kinds)):
        differences[kind] = _difference(new, old, [id_ for id_, own in zip(ids, kinds, strict=True) if own == kind])
    types = [kind for kind in differences if kind != "all"]
    adjusted = dict(zip(types, holm([differences[kind].p_value for kind in types]), strict=True))
    p_values = {"all": differences["all"].p_value, **adjusted}
    reasons = [
        f"worse than {champion} on {'all questions' if kind == 'all' else repr(kind)}: {told(differences[kind])}, "
        f"p = {p_value:.2g}"
        for kind, p_value in p_values.items()
        if differences[kind].mean < 0 and p_value < SIGNIFICANT
    ]
    return Verdict(challenger, champion, differences, tuple(reasons))


def told(difference: Difference) -> str:
    """A difference and its 95 % interval in percentage points."""
    return f"{100 * difference.mean:+.1f} points ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def rollback(name: str, stage: str = PROD) -> tuple[str, str]:
    """Puts the version back that was in a stage before the present one; returns both, the present one first.

    Rolling back again goes one further back.

    Raises:
        UserError: the stage is free, or nothing was in it before.
    """
    path = _path_to(name, stage)
    if not path:
        raise UserError(f"no version of {name} is in '{stage}'; 'haplovl models' lists the versions")
    if len(path) < 2:
        raise UserError(f"nothing was in '{stage}' before {path[-1]}; 'haplovl models' lists the versions")
    _assign(name, path[-2], stage, f"{ROLLED_BACK} {path[-1]} to {path[-2]}")
    return path[-1], path[-2]


def get(name: str, out: Path, version: str | None = None, stage: str = PROD) -> str:
    """Writes the model folder of a version, or of the one in a stage, to `out`; returns the version.

    Raises:
        UserError: `out` exists, there is no such version, or its files are neither in DVC's cache nor in the remote.
    """
    if out.exists():
        raise UserError(f"{out} exists already; give another folder with --output, or remove it")
    found = known(name, version) if version else in_stage(name, stage)
    if found is None:
        raise UserError(f"no version of {name} is in '{stage}'; 'haplovl promote' puts one there")
    with whole_folder(out) as folder:
        folder.rmdir()  # DVC copies into a folder that exists, but makes one that does not
        fetch(f"{name}@{found}", STAGE2, folder)
    return found


def candidate_of(name: str, version: str) -> dict[str, Any]:
    """What was registered: params, hashes of data, teachers and model, metrics.

    Raises:
        UserError: it is neither in DVC's cache nor in the remote.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "candidate.json"
        fetch(f"{name}@{version}", CANDIDATE / target.name, target)
        found: dict[str, Any] = read_json(target)
    return found


def _predictions(name: str, version: str) -> Side:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / PREDICTIONS.name
        fetch(f"{name}@{version}", PREDICTIONS, target)
        return Side(version, read_predictions(target).answers)


def _difference(new: Side, old: Side, ids: list[str]) -> Difference:
    return paired_difference(*([side.answers[id_].correct for id_ in ids] for side in (new, old)))


def known(name: str, version: str | None) -> str:
    """A registered version's name: the one given (with or without the model's name), or the newest.

    Raises:
        UserError: there is none.
    """
    versions = [found.name for found in registered(name)]
    if not versions:
        raise UserError(f"no version of {name} is registered yet; 'haplovl publish' registers a candidate")
    if version is None:
        return versions[-1]
    if (wanted := version.removeprefix(f"{name}@")) not in versions:
        raise UserError(f"{name} has no version '{version}', only {', '.join(versions)}")
    return wanted


def _tags(pattern: str) -> list[str]:
    return git("tag", "--list", pattern, "--sort=version:refname").splitlines()


def _stages(name: str) -> list[str]:
    return sorted({tag.split("#")[1].rstrip("!") for tag in _tags(f"{name}#*#*")})


def _path_to(name: str, stage: str) -> list[str]:
    """The versions that were in a stage one after the other, up to the present one; empty where it is free.

    What was rolled back is not part of it. GTO numbers its tags, so their order does not hang on a clock.
    """
    path: list[str] = []
    for version, subject in _assignments(name, stage):
        if version is None:
            path = []
        elif subject.startswith(ROLLED_BACK):
            path = path[:-1]
        else:
            path.append(version)
    return path


def _assignments(name: str, stage: str) -> list[tuple[str | None, str]]:
    """What was put into a stage, in order, with the messages; None for the version where the stage was freed."""
    pattern = "%(refname:strip=2)%09%(*objectname)%09%(contents:subject)"
    tags = [line.split("\t") for line in git("for-each-ref", f"--format={pattern}", "refs/tags").splitlines()]
    versions = {commit: tag.removeprefix(f"{name}@") for tag, commit, _ in tags if tag.startswith(f"{name}@v")}
    form = re.compile(rf"{re.escape(name)}#{re.escape(stage)}(!?)#(\d+)")
    events = [(found, commit, subject) for tag, commit, subject in tags if (found := form.fullmatch(tag))]
    return [
        (None if found[1] else versions[commit], subject)
        for found, commit, subject in sorted(events, key=lambda event: int(event[0][2]))
        if found[1] or commit in versions
    ]


def _assign(name: str, version: str, stage: str, message: str) -> None:
    """Tags the version's commit with the stage.

    Raises:
        UserError: GTO refuses.
    """
    import gto.api
    from gto.exceptions import GTOException

    # `dvc artifacts get --stage` takes the latest tag by its time, which has whole seconds.
    times = git("for-each-ref", "--format=%(taggerdate:unix)", f"refs/tags/{name}#{stage}#*").split()
    while times and int(time.time()) <= max(map(int, times)):
        time.sleep(0.1)
    author = with_identity()
    try:
        gto.api.assign(
            ".", name, stage, version=version, message=message, force=True, author=author.get("GIT_COMMITTER_NAME"),
            author_email=author.get("GIT_COMMITTER_EMAIL"),
        )  # fmt: skip
    except GTOException as error:
        raise UserError(f"GTO could not put {name} {version} into '{stage}': {error}") from None
