"""A commit of the project in a clean folder of its own: its code runs there, with this project's DVC cache."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from haplovl.errors import UserError
from haplovl.files import RUNS
from haplovl.processes import end_group
from haplovl.revisions import git

FOLDER = RUNS / "reproduce"
COMMANDS = RUNS / "bin"
"""Where a worktree has its command `haplovl`, out of git's and DVC's sight."""
SHIM = """#!/bin/sh
exec "{python}" -m haplovl "$@"
"""


@dataclass
class Worktree:
    """A checked-out commit. It is removed at the end unless `keep` is set by then."""

    top: Path
    project: Path
    """Where dvc.yaml is."""
    keep: bool = False

    def run(self, command: list[str], **variables: str) -> int:
        """Runs a command in the project, with its code, and returns the exit code; whatever ends us ends it too."""
        process = subprocess.Popen(
            command,
            cwd=self.project,
            env={**self.environment(), **variables},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait()
        except BaseException:
            end_group(process)
            raise

    def environment(self) -> dict[str, str]:
        """The environment in which Python and the command `haplovl` are the commit's."""
        # Not `.resolve()`: the Python of a virtual environment is a link to another one.
        python = str(Path(os.path.abspath(sys.executable)).parent)
        folders = [str(self.project / COMMANDS), python, os.environ.get("PATH")]
        paths = [str(self.project), os.environ.get("PYTHONPATH")]
        return {
            **os.environ,
            "PATH": os.pathsep.join(filter(None, folders)),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "DVC_NO_ANALYTICS": "1",
            # A training has the id of the run that it repeats, whose curves it would overwrite.
            "WANDB_MODE": "disabled",
        }


@contextmanager
def worktree(name: str, commit: str) -> Iterator[Worktree]:
    """Checks a commit out below runs/reproduce/ and ties it to this project's cache and remotes.

    Raises:
        UserError: git refuses, or the commit's code would not be what runs.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    top = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=FOLDER.absolute()))
    tree = Worktree(top, top / git("rev-parse", "--show-prefix").strip())
    try:
        with _ended_by_signals():
            _check_out(top, commit)
            _share_dvc(tree.project)
            _give_command(tree)
            yield tree
    finally:
        if not tree.keep:
            _remove(top)


def _remove(top: Path) -> None:
    """Removes a worktree and git's knowledge of it."""
    git("worktree", "remove", "--force", str(top))
    shutil.rmtree(top, ignore_errors=True)  # where git could not remove it itself
    git("worktree", "prune")


def _check_out(target: Path, commit: str) -> None:
    # Without hooks: DVC's own would check out every file of the data.
    command = ["git", "-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--quiet", "--detach"]
    done = subprocess.run([*command, str(target), commit], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"git could not check out {commit[:12]}: {' '.join(done.stderr.split())}")


def _share_dvc(project: Path) -> None:
    """Gives the worktree this project's cache and today's remotes, as those of the commit may be gone.

    Raises:
        UserError: the commit is no DVC project.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(".") as ours, Repo(str(project)) as theirs, theirs.config.edit("local") as config:
            config["remote"] = dict(ours.config["remote"])
            if remote := ours.config["core"].get("remote"):
                config["core"]["remote"] = remote
            links = {name: ours.config["cache"][name] for name in ("type", "shared") if name in ours.config["cache"]}
            config["cache"] = {**links, "dir": ours.cache.local_cache_dir}
    except DvcException as error:
        raise UserError(f"the version's commit is no usable DVC project: {error}") from None


def _give_command(tree: Worktree) -> None:
    """Puts a `haplovl` first on PATH that runs the worktree's package, and makes sure that it does.

    Raises:
        UserError: another package would run.
    """
    command = tree.project / COMMANDS / "haplovl"
    command.parent.mkdir(parents=True)
    command.write_text(SHIM.format(python=os.path.abspath(sys.executable)), encoding="utf-8")
    command.chmod(0o755)
    if not (tree.project / "haplovl").is_dir():  # a project whose stages are other commands
        return
    asked = [sys.executable, "-c", "import haplovl; print(haplovl.__path__[0])"]
    done = subprocess.run(asked, cwd=tree.project, env=tree.environment(), capture_output=True, text=True)
    if Path(done.stdout.strip() or ".").resolve() != (tree.project / "haplovl").resolve():
        where = done.stdout.strip() or done.stderr.strip()
        raise UserError(f"'haplovl' in the worktree would be that of {where}, not the version's own")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C end the block by an exception, so that it is cleaned up after.

    Shells start background jobs with Ctrl-C ignored, and Python keeps it so.
    """

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    wanted = {signal.SIGTERM: end, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
