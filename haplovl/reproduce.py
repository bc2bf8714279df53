"""`haplovl reproduce`: runs a version's stages again from its commit, and says where the hashes of their outs part.

Nothing is taken from DVC's cache but what the chosen stages read; every stage runs in the compute profile, with the
number of processes and threads, that the version's record names.
"""

import sys
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from haplovl.errors import UserError
from haplovl.lineage import machine_of, recorded
from haplovl.machine import differences, environment, machine
from haplovl.promotion import known
from haplovl.revisions import LOCK, commit_of, git, hashes, listing, lock_of, stages_in
from haplovl.settings import COMPUTE_FOLDER
from haplovl.worktree import Worktree, worktree

SHOWN = 10
"""Lines of each kind that are printed."""


@dataclass(frozen=True)
class Out:
    """An out of a stage: DVC's hash as it is recorded, and as it came out; empty where there is none."""

    stage: str
    path: str
    recorded: str
    found: str

    @property
    def same(self) -> bool:
        """Whether it came out as recorded."""
        return self.recorded == self.found


@dataclass
class Reproduction:
    """What came out of running a version's stages again."""

    version: str
    commit: str
    doubts: list[str]
    """What of environment and machine is not as recorded."""
    outs: list[Out] = field(default_factory=list)
    """In the order of the pipeline."""
    files: dict[str, list[str]] = field(default_factory=dict)
    """Files that differ, by out of the stage where they part first."""
    reasons: list[str] = field(default_factory=list)
    """Probable ones."""
    kept: Path | None = None
    """Where the worktree is, if it was not removed."""

    @property
    def parted(self) -> str | None:
        """The first stage whose outs are not as recorded."""
        return next((out.stage for out in self.outs if not out.same), None)


def reproduce(name: str, version: str, only: list[str], keep: bool = False) -> Reproduction:
    """Runs all stages of a version, or `only` these with their recorded inputs, and compares their outs.

    Raises:
        UserError: no such version or stage, inputs that cannot be had, or a stage that fails.
    """
    version = known(name, version)
    commit = commit_of(f"{name}@{version}")
    lock, record = lock_of(commit), recorded(commit)
    still = _stages_of(commit, lock)
    order = [stage for stage in in_order(lock) if stage in still]
    if not order:
        raise UserError(f"{version} records no stage: its commit has no {LOCK} that fits its dvc.yaml")
    if unknown := sorted(set(only) - set(order)):
        raise UserError(f"{version} has no stage '{unknown[0]}'; it has {', '.join(order)}")
    chosen = [stage for stage in order if stage in only or not only]
    result = Reproduction(version, commit, doubts_about(record, chosen))
    _announce(result, chosen)
    with worktree(version, commit) as tree:
        for stage in chosen:
            if only:  # each by itself: one that parts does not spoil the inputs of those after it
                (tree.project / LOCK).write_text(git("show", f"{commit}:./{LOCK}"), encoding="utf-8")
            _bring_inputs(tree, lock, stage, version, refresh=bool(only))
            _run(tree, stage, record, version)
            now = stages_in((tree.project / LOCK).read_text(encoding="utf-8")).get(stage, {})
            before, outs = result.parted, compared(stage, lock[stage], now)
            result.outs += outs
            print(f"{stage}: {'as recorded' if all(out.same for out in outs) else 'parts from the record'}", flush=True)
            if before is None and result.parted == stage:
                result.files = {out.path: differing_files(out) for out in result.outs if not out.same}
                result.reasons = _reasons(lock[stage], now, record, stage, result.doubts)
        tree.keep = keep or result.parted is not None
        result.kept = tree.top if tree.keep else None
    return result


def in_order(lock: dict[str, Any]) -> list[str]:
    """The stages of a dvc.lock, every one after those whose outs it reads."""
    makers = [(PurePosixPath(path), stage) for stage, facts in lock.items() for path in hashes(facts.get("outs"))]
    graph = {
        stage: [
            maker for path in hashes(facts.get("deps")) for made, maker in makers if _overlap(PurePosixPath(path), made)
        ]
        for stage, facts in lock.items()
    }
    return list(TopologicalSorter(graph).static_order())


def _overlap(one: PurePosixPath, other: PurePosixPath) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _stages_of(commit: str, lock: dict[str, Any]) -> set[str]:
    """The recorded stages that the commit's dvc.yaml still has; of a template, each of its items."""
    names = (yaml.safe_load(git("show", f"{commit}:./dvc.yaml") or "{}") or {}).get("stages") or {}
    return {stage for stage in lock if stage.split("@")[0] in names}


def doubts_about(record: dict[str, Any], stages: list[str]) -> list[str]:
    """What of environment and machine is not as it was when the version was made, one line each."""
    if not record:
        return ["the version has no lineage.json: environment, machine and compute profile are unknown"]
    lines = differences(record["environment"], environment())
    here = machine()
    for stage in stages:
        # The number of threads is not found here but set for each stage.
        lines += differences({**machine_of(record, stage), "threads": here["threads"]}, here)
        told = record["training"].get(stage, {})
        if any(place["after_step"] for place in told.get("places", [])):
            lines.append(f"{stage} was trained in several places one after the other, and runs as in the last of them")
        if str(told.get("note", "")).startswith("unknown"):
            lines.append(f"{stage}: its compute profile and number of processes are {told['note']}")
    return list(dict.fromkeys(lines))


def _announce(result: Reproduction, chosen: list[str]) -> None:
    print(f"{result.version} ({result.commit[:12]}): running {', '.join(chosen)} again", flush=True)
    if result.doubts:
        print("hashes may differ, as not everything is as recorded:", flush=True)
        print("\n".join(f"  {line}" for line in some(result.doubts)), flush=True)


def some(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are: thousands of files or hundreds of packages may differ at once."""
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], f"and {more} more"] if more > 0 else lines


# --- one stage -------------------------------------------------------------------------------------------------------
def _bring_inputs(tree: Worktree, lock: dict[str, Any], stage: str, version: str, refresh: bool) -> None:
    """Checks out what a stage reads and neither git nor an earlier stage has put there, from the cache or the remote.

    `refresh` brings the recorded outs of earlier stages, whatever lies there.

    Raises:
        UserError: it is in neither.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    made = [PurePosixPath(path) for facts in lock.values() for path in hashes(facts.get("outs"))]
    deps = [PurePosixPath(path) for path in hashes(lock[stage].get("deps"))]
    wanted = [
        dep.as_posix()
        for dep in deps
        if (refresh and any(_overlap(dep, out) for out in made)) or not (tree.project / dep).exists()
    ]
    if not wanted:
        return
    targets = [str(tree.project / path) for path in wanted]
    with Repo(str(tree.project)) as repo:
        try:
            repo.checkout(targets=targets, force=True)
        except DvcException:
            try:
                repo.pull(targets=targets, force=True)
            except DvcException as error:
                why = " ".join(str(error).split())
                raise UserError(
                    f"what '{stage}' of {version} reads ({', '.join(wanted)}) is neither in DVC's cache nor in the "
                    f"default remote (dvc remote list): {why}"
                ) from None


def _run(tree: Worktree, stage: str, record: dict[str, Any], version: str) -> None:
    """Runs one stage as it was recorded, whatever DVC's cache knows of it.

    Raises:
        UserError: it fails.
    """
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", "--force", "--no-run-cache", stage]
    code = tree.run(command, **_as_recorded(tree, stage, record))
    if code:
        tree.keep = True
        raise UserError(f"'{stage}' of {version} failed (exit code {code}); its worktree stays in {tree.top}")


def _as_recorded(tree: Worktree, stage: str, record: dict[str, Any]) -> dict[str, str]:
    """The variables that give a stage its recorded threads and compute profile; writes the profile into the worktree.

    A stage that does not train gets the profile of the training before publishing, as the pipeline gives it.
    """
    variables = {}
    if threads := machine_of(record, stage).get("threads"):
        variables["OMP_NUM_THREADS"] = str(threads)
    training = record.get("training", {})
    places = [told["places"][-1] for told in training.values() if told.get("places")]
    places = (training.get(stage, {}).get("places") or places)[-1:]
    for place in places:
        # The file of the commit need not be the one that was used, nor be in git at all.
        profile = {**place["compute"], "processes": place["world_size"]}
        target = tree.project / COMPUTE_FOLDER / f"{profile['name']}.yaml"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")
        variables["HAPLOVL_COMPUTE"] = profile["name"]
    return variables


# --- what came out ---------------------------------------------------------------------------------------------------
def compared(stage: str, before: dict[str, Any], now: dict[str, Any]) -> list[Out]:
    """All outs of a stage, of dvc.lock as recorded and as it is now."""
    old, new = hashes(before.get("outs")), hashes(now.get("outs"))
    return [Out(stage, path, old.get(path, ""), new.get(path, "")) for path in dict.fromkeys([*old, *new])]


def differing_files(out: Out) -> list[str]:
    """The files of a folder that are not as recorded, and how; nothing more to say of an out that is a file."""
    if not out.recorded.endswith(".dir") or not out.found.endswith(".dir"):
        return []
    old, new = listing(out.recorded), listing(out.found)
    if old is None or new is None:
        return ["the recorded list of its files is not in DVC's cache; 'dvc pull' of the version's outs brings it"]
    lines = [f"{name} differs" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    lines += [f"{name} is missing" for name in sorted(old.keys() - new.keys())]
    return lines + [f"{name} is new" for name in sorted(new.keys() - old.keys())]


def _reasons(
    before: dict[str, Any], now: dict[str, Any], record: dict[str, Any], stage: str, doubts: list[str]
) -> list[str]:
    """Why a stage may have parted from its record, the surest first."""
    lines = []
    if before.get("cmd") != now.get("cmd"):
        lines.append(f"its command was '{before.get('cmd')}' and is '{now.get('cmd')}' in the version's commit")
    old, new = hashes(before.get("deps")), hashes(now.get("deps"))
    changed = [path for path in dict.fromkeys([*old, *new]) if old.get(path) != new.get(path)]
    lines += [f"{path} is not what the version was made with" for path in changed]
    for file in dict.fromkeys([*before.get("params", {}), *now.get("params", {})]):
        ours, theirs = (side.get("params", {}).get(file, {}) for side in (before, now))
        keys = [key for key in dict.fromkeys([*ours, *theirs]) if ours.get(key) != theirs.get(key)]
        lines += [f"{file} has another '{key}' than the version was made with" for key in keys]
    if lines and record.get("uncommitted"):
        lines.append(f"not committed when it was published: {', '.join(record['uncommitted'])}")
    lines += doubts
    return lines or [
        f"inputs, code, packages and machine are as recorded: '{stage}' does not give the same bytes twice"
    ]
