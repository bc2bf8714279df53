"""`haplovl publish`: commits dvc.lock and lineage.json, registers the version with GTO and logs the W&B artifact.

Git runs as a command; GTO and W&B are imported only when there is a new version, so that publishing an unchanged
candidate takes a fraction of a second.
"""

import os
import subprocess
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from haplovl.errors import UserError
from haplovl.files import CANDIDATE, RUNS, STAGE2, read_json, require, sha256_of, write_json
from haplovl.lineage import RECORD, wandb_id, write_record
from haplovl.redaction import without_secrets
from haplovl.revisions import LOCK, dir_hash, hashes, lock_of, next_version, stages_in, versions_of
from haplovl.settings import Params
from haplovl.tracking import start_wandb, wandb_mode
from haplovl.wandb_registry import link

PUBLISHED = RUNS / "published.json"
FALLBACK_NAME, FALLBACK_EMAIL = "HaploVL", "haplovl@localhost"


@dataclass
class PublishResult:
    """What `publish` did; also kept in runs/published.json."""

    version: str | None
    """Registered version such as `v0.0.1`; None when the gate failed."""
    new: bool = False
    reasons: list[str] = field(default_factory=list)
    """Why the gate failed."""
    committed: bool = False
    dirty: list[str] = field(default_factory=list)
    """Changed files that no commit holds, other than dvc.lock and lineage.json."""
    commit: str = ""
    wandb: str = ""
    """Where the W&B artifact is, or `failed: …`."""

    def line(self) -> str:
        """One sentence for people."""
        if self.version is None:
            return "not registered: " + "; ".join(self.reasons)
        return f"registered as {self.version}" if self.new else f"already registered as {self.version}"


def publish(params: Params) -> PublishResult:
    """Publishes the candidate; an unchanged one makes no new version, one that fails its gate makes none at all.

    Raises:
        UserError: no git repository, no dvc.lock, no candidate, candidate or model are not those that dvc.lock records,
            or git refuses.
    """
    if not _git("rev-parse", "--is-inside-work-tree", check=False):
        raise UserError("publish needs a git repository, and this folder is in none")
    if not Path(LOCK).is_file():
        raise UserError(f"{LOCK} is missing; run 'dvc repro' first")
    name = params.register_.name
    stages = stages_in(Path(LOCK).read_text(encoding="utf-8"))
    candidate = _candidate_hash(stages)
    gate = read_json(require(CANDIDATE / "candidate.json", "register"))["gate"]
    _require_recorded(CANDIDATE, candidate)
    if not gate["passed"]:
        return _finish(PublishResult(version=None, reasons=gate["reasons"]))

    result = PublishResult(version=None, dirty=_dirty_files())
    if result.dirty:
        print(f"the tree is dirty; the commit will not hold: {', '.join(result.dirty)}")
    result.version = _version_of(candidate, versions_of(name))
    gone = None if result.version else _version_of(candidate, versions_of(name, taken_back=True))
    if gone:
        return _finish(PublishResult(version=None, reasons=[f"this candidate was {gone}, which was taken back"]))
    result.new = result.version is None
    if result.version is None:
        if model := hashes(stages.get(STAGE2.name, {}).get("outs")).get(STAGE2.as_posix()):
            _require_recorded(STAGE2, model)
        write_record(params, candidate, result.dirty)
        result.committed = _commit(name, LOCK, RECORD.as_posix())
        result.version = _register_with_gto(name)
        # Should what follows be interrupted, the next publish makes up for it.
        write_json(PUBLISHED, asdict(replace(result, wandb="failed: interrupted")))
    else:
        result.committed = _commit(name, LOCK)
    result.commit = _git("rev-list", "-n", "1", f"{name}@{result.version}")
    before = read_json(PUBLISHED) if PUBLISHED.is_file() else {}
    result.wandb = before.get("wandb", "") if before.get("version") == result.version else ""
    if result.new or result.wandb.startswith("failed"):
        result.wandb = _log_to_wandb(params, result)
    return _finish(result)


def _finish(result: PublishResult) -> PublishResult:
    write_json(PUBLISHED, asdict(result))
    print(result.line())
    return result


def _git(*arguments: str, check: bool = True) -> str:
    """Output of a git command; an empty string when it fails and `check` is off.

    Raises:
        UserError: git is missing, or fails with `check` on.
    """
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=with_identity()
        )
    except FileNotFoundError:
        raise UserError("publish needs git, which is not installed") from None
    if done.returncode and check:
        raise UserError(f"git {arguments[0]} failed: {' '.join((done.stderr or done.stdout).split())}")
    return "" if done.returncode else done.stdout.rstrip("\n")


def with_identity() -> dict[str, str]:
    """The environment, with a stand-in author where the user configured none."""
    environment = dict(os.environ)
    for key, fallback in (("name", FALLBACK_NAME), ("email", FALLBACK_EMAIL)):
        known = subprocess.run(["git", "config", f"user.{key}"], capture_output=True, check=False).returncode == 0
        for role in ("AUTHOR", "COMMITTER"):
            if not known:
                environment.setdefault(f"GIT_{role}_{key.upper()}", fallback)
    return environment


def _dirty_files() -> list[str]:
    """Files with uncommitted changes, left out those that publishing commits."""
    own = (f":(exclude){name}" for name in (LOCK, RECORD.as_posix()))
    entries = _git("status", "--porcelain", "-z", "--no-renames", "--", ".", *own).split("\0")
    return [entry[3:] for entry in entries if entry]


def _commit(name: str, *files: str) -> bool:
    """Commits these files and nothing else, whatever the user has staged; False when they are committed already.

    The user's git hooks run: a rule of their repository is theirs to waive, not ours.
    """
    if not _git("status", "--porcelain", "--", *files):
        return False
    _git("add", "--", *files)  # A commit by path knows no untracked files.
    told = " and ".join(files)
    _git("commit", "--quiet", "--only", "-m", f"Record {name}: {told} of the last pipeline run", "--", *files)
    print(f"committed {told}, and nothing else")
    return True


def _candidate_hash(stages: dict[str, Any]) -> str:
    """The hash of the candidate that dvc.lock records.

    Raises:
        UserError: it records none.
    """
    found = _recorded_candidate(stages)
    if found is None:
        raise UserError(f"{LOCK} does not record the stage 'register'; run 'dvc repro' first")
    return found


def _recorded_candidate(stages: dict[str, Any]) -> str | None:
    return hashes(stages.get("register", {}).get("outs")).get(CANDIDATE.as_posix())


def _require_recorded(folder: Path, recorded: str) -> None:
    """Refuses what a stage that was run by hand left: the version's commit would name other files.

    Raises:
        UserError: the folder is missing, or not what dvc.lock records.
    """
    if dir_hash(require(folder)) != recorded:
        raise UserError(
            f"{folder} is not what {LOCK} records, as after a stage that was run by hand; 'dvc repro' makes both agree"
        )


def _version_of(candidate_hash: str, versions: dict[str, str]) -> str | None:
    """The newest version whose commit's dvc.lock records the same candidate."""
    for version, tag in reversed(versions.items()):
        if _recorded_candidate(lock_of(f"{tag}^{{commit}}")) == candidate_hash:
            return version
    return None


def _register_with_gto(name: str) -> str:
    """Tags HEAD with the artifact's next version; returns it.

    Raises:
        UserError: GTO refuses, for example because HEAD already has a version.
    """
    import gto.api
    from gto.exceptions import GTOException

    identity = with_identity()
    author = identity.get("GIT_COMMITTER_NAME"), identity.get("GIT_COMMITTER_EMAIL")
    try:
        version = next_version(name)
        tag = gto.api.register(".", name, "HEAD", version=version, author=author[0], author_email=author[1])
    except GTOException as error:
        raise UserError(f"GTO could not register {name}: {error}") from None
    return tag.version


def _log_to_wandb(params: Params, result: PublishResult) -> str:
    """Logs candidate and model as a W&B artifact; a failure is told, and never costs the registered version.

    Offline unless the user sets WANDB_API_KEY or WANDB_MODE; nothing is written outside runs/wandb.
    """
    mode = wandb_mode()
    if mode == "disabled":
        return "disabled"
    try:
        where = _wandb_artifact(params, result, mode)
    except Exception as error:  # W&B raises many kinds; the version is already safe in git.
        reason = without_secrets(" ".join(str(error).split()))
        print(f"W&B failed, the version is registered all the same; 'haplovl publish' tries again: {reason}")
        return f"failed: {reason}"
    print(f"W&B artifact logged ({mode}): {where}")
    return where


def _wandb_artifact(params: Params, result: PublishResult, mode: str) -> str:
    candidate: dict[str, Any] = read_json(CANDIDATE / "candidate.json")
    metadata = {
        "git_commit": result.commit,
        "dvc_lock_sha256": sha256_of(Path(LOCK)),
        "version": result.version,
        "dirty": result.dirty,
    }
    run = start_wandb(
        params.register_.name,
        mode,
        name=f"{params.register_.name}@{result.version}",
        job_type="publish",
        config={**metadata, "params": candidate["params"]},
        id=wandb_id(_candidate_hash(lock_of(result.commit))),
        resume="allow",
    )
    import wandb  # only now that its folders are set

    try:
        run.summary["accuracy"] = candidate["metrics"]["evaluation"]["accuracy"]
        artifact = wandb.Artifact(params.register_.name, type="model", metadata=metadata)
        artifact.add_dir(str(CANDIDATE), name="candidate")
        artifact.add_dir(str(STAGE2), name="model")
        logged = run.log_artifact(artifact, aliases=[str(result.version)])
        registry, version = params.register_.wandb_registry, str(result.version)
        if mode == "online" and registry is not None:
            logged.wait()  # until W&B has it
            print(f"linked in W&B's registry: {link(params.register_.name, registry, version, version)}")
    finally:
        run.finish()
    return str(run.url) if mode == "online" else os.path.relpath(Path(run.dir).parent)
