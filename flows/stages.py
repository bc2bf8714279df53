"""DVC's graph of the project in the current folder, and one stage of it run with its output streamed.

Prefect is not imported here; `flows.pipeline` turns every stage into a task.
"""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haplovl.errors import EXIT_AGAIN, UserError
from haplovl.processes import end_group
from haplovl.redaction import without_secrets
from haplovl.settings import COMPUTE_FOLDER, ComputeProfile, load_compute
from haplovl.train.launch import EXIT_PREEMPTED

RENTABLE = ("stage1", "stage2")
"""Stages that train; the others always run on the flow's machine."""
TAIL_LINES = 20
TAIL_BYTES = 64 * 1024

_AGAIN = re.compile(rf"exited with ({EXIT_AGAIN}|{EXIT_PREEMPTED})\b|Unable to acquire lock")
"""What DVC says of a stage that a temporary fault or a stop signal ended, or while another of its processes works."""

_running: set[subprocess.Popen[bytes]] = set()
"""Commands that run now, in whatever thread."""
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml and the names of the stages that it reads from."""

    name: str
    upstream: tuple[str, ...]


class Project:
    """The DVC project in the current folder.

    Raises:
        UserError: there is no DVC project here, or dvc.yaml cannot be used.
    """

    def __init__(self) -> None:
        os.environ.setdefault("DVC_NO_ANALYTICS", "1")
        self._repo: Any = None
        self.all_stages = self._read_graph()
        """Those of every dvc.yaml in the project; outside the root their names begin with the file's."""
        self.stages = [stage for stage in self.all_stages if ":" not in stage.name]
        """The main pipeline."""

    def is_unchanged(self, name: str) -> bool:
        """Whether `dvc repro` would skip the stage; asks DVC in this process, which starts no interpreter."""
        return not self._open().status(targets=[name])

    def forget(self) -> None:
        """Drops what DVC keeps in memory (dvc.lock, the index); needed after another process ran a stage."""
        if self._repo is not None:
            self._repo.close()
            self._repo = None

    def _open(self) -> Any:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        if self._repo is None:
            try:
                self._repo = Repo(".")
            except DvcException as error:
                raise UserError(f"no usable DVC project here: {error}") from None
        return self._repo

    def _read_graph(self) -> list[Stage]:
        """All stages with a command, every one after those it depends on, otherwise in the order of dvc.yaml."""
        import networkx
        from dvc.exceptions import DvcException

        try:
            graph = self._open().index.graph
        except DvcException as error:
            raise UserError(f"dvc.yaml cannot be used: {error}") from None
        order = {node: position for position, node in enumerate(graph.nodes)}
        # DVC's edges point from a stage to what it depends on.
        nodes = networkx.lexicographical_topological_sort(graph.reverse(copy=True), key=order.__getitem__)
        return [
            Stage(node.addressing, tuple(up.addressing for up in graph.successors(node) if up.cmd))
            for node in nodes
            if node.cmd
        ]


def run_stage(name: str, compute: str, on_line: Callable[[str], None]) -> tuple[int, list[str]]:
    """Runs `dvc repro --single-item`; returns its exit code and its last lines.

    On a terminal the stage gets a terminal of its own and its bytes pass through untouched, so that progress bars
    live; otherwise every line goes to `on_line`.
    """
    venv_bin = str(Path(sys.executable).parent)
    if name in RENTABLE and (profile := rented(compute)):
        from flows.sky import run_on_rented_nodes

        return run_on_rented_nodes(name, profile, on_line)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([venv_bin, os.environ.get("PATH", "")]),
        "HAPLOVL_COMPUTE": compute,
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", name]
    return stream(command, environment, None if sys.stdout.isatty() else on_line)


def rented(compute: str) -> ComputeProfile | None:
    """The compute profile, if it has SkyPilot rent the nodes of training stages."""
    if not (COMPUTE_FOLDER / f"{compute}.yaml").is_file():
        return None  # A project without training needs no profiles.
    profile = load_compute(compute)
    return profile if profile.launcher == "sky" else None


def may_help_again(last_lines: list[str]) -> bool:
    """Whether a stage that ended with these lines may well succeed when it is run again as it is.

    So it is after a fault of network or file system, or a stop signal with a checkpoint; never after wrong data,
    settings or code.
    """
    return any(_AGAIN.search(line) for line in last_lines)


def stream(
    command: list[str], environment: dict[str, str], on_line: Callable[[str], None] | None
) -> tuple[int, list[str]]:
    """Runs a command, passing its output on as it comes; `on_line` None means a terminal and raw bytes.

    The command leads its own process group: whatever ends this function early also ends the command and its children.
    """
    tail = unfinished = b""
    with _child(command, environment, terminal=on_line is None) as (process, source):
        for chunk in _chunks(process, source):
            tail = (tail + chunk)[-TAIL_BYTES:]
            if on_line is None:
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
                continue
            *lines, unfinished = (unfinished + chunk).split(b"\n")
            for line in filter(None, map(_plain, lines)):
                on_line(line)
        if on_line is not None and _plain(unfinished):
            on_line(_plain(unfinished))
        code = process.wait()
    lines = [line for line in map(_plain, tail.split(b"\n")) if line]
    return code, lines[-TAIL_LINES:]


@contextmanager
def _child(
    command: list[str], environment: dict[str, str], terminal: bool
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Yields the running command and the file descriptor of its output; ends its process group on any exception."""
    source, sink = pty.openpty() if terminal else os.pipe()
    if terminal:
        columns, rows = shutil.get_terminal_size()
        termios.tcsetwinsize(sink, (rows, columns))
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
        )
    except BaseException:
        os.close(source)
        raise
    finally:
        os.close(sink)
    _running.add(process)
    try:
        yield process, source
    except BaseException:
        end_group(process)
        raise
    finally:
        _running.discard(process)
        os.close(source)


def _chunks(process: subprocess.Popen[bytes], source: int) -> Iterator[bytes]:
    """The command's output in pieces.

    It ends with the command, not with the end of the file: a daemon left behind by a stage may hold that open.
    """
    while True:
        ended = process.poll() is not None
        ready, _, _ = select.select([source], [], [], 0.0 if ended else 0.2)
        if ready:
            try:
                chunk = os.read(source, 65536)
            except OSError:  # A pseudo-terminal says EIO when its last writer is gone.
                return
            if not chunk:
                return
            yield chunk
        elif ended:
            return


def end_all() -> None:
    """Ends the commands of all threads, as an interruption of each would."""
    for process in list(_running):
        end_group(process)


def _plain(line: bytes) -> str:
    """One line as a person saw it last: no colours, only the final state of a progress bar, and no credentials.

    Prefect keeps these lines in its database, whatever a stage or DVC prints.
    """
    states = _CONTROL.sub("", line.decode(errors="replace")).rstrip().split("\r")
    return without_secrets(states[-1].rstrip())
