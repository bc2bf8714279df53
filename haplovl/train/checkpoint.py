"""Training state on disk: complete checkpoints only, verified by hash, keyed by what decides the result.

A checkpoint is a folder `step-N` with one safetensors file per rank and, written after it, a marker with the file's
hash. It is complete when all ranks' markers are there, so that no rank has to wait for another, and a thread can write
beside the next steps.
"""

import errno
import json
import os
import random
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from haplovl.errors import UserError
from haplovl.files import RUNS, read_json, sha256_of, sha256_of_folder, write_json, write_whole
from haplovl.settings import fingerprint
from haplovl.train.state import Pieces, restore, snapshot

KEPT = 2
FINISHED = "finished.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and the markers of all ranks."""

    path: Path
    markers: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.markers[0]["step"]

    @property
    def validation_loss(self) -> float | None:
        """Loss on the validation records at this step, if there are any."""
        return self.markers[0]["validation_loss"]

    @property
    def files(self) -> list[Path]:
        """The ranks' files."""
        return [self.path / marker["file"] for marker in self.markers]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint | None":
        """The checkpoint in a folder; None where it is not complete, or a marker cannot be read."""
        try:
            markers = [read_json(found) for found in sorted(path.glob("rank-*.json"))]
            complete = markers and len(markers) == markers[0]["world"] and all("sha256" in marker for marker in markers)
        except (UserError, TypeError, KeyError):  # as a power cut leaves it
            return None
        return cls(path, sorted(markers, key=lambda marker: marker["rank"])) if complete else None


@dataclass
class RunFolder:
    """The folder of one run's state, outside every DVC out: `runs/training/<stage>-<key>`.

    `identity` is what decides the result (recipe, data, initial weights, code), by name; its hash is the key.
    """

    path: Path
    identity: dict[str, Any]
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _writing: Future | None = None

    @classmethod
    def of(cls, stage: str, identity: dict[str, Any]) -> "RunFolder":
        """The folder of a stage's run; one that was left half-written is made clean."""
        folder = cls.named(stage, identity)
        if is_main():
            folder.path.mkdir(parents=True, exist_ok=True)
            if (folder.path / FINISHED).exists():  # the same run again, from its beginning
                shutil.rmtree(folder.path)
                folder.path.mkdir()
            for path in folder.path.glob("step-*"):
                if Checkpoint.read(path) is None:
                    shutil.rmtree(path)
        barrier()
        folder.path.mkdir(parents=True, exist_ok=True)  # a bucket shows no node the empty folder of another one
        return folder

    @classmethod
    def named(cls, stage: str, identity: dict[str, Any]) -> "RunFolder":
        """The folder of a stage's run, as it is."""
        folder = cls(Path(), identity)
        folder.path = RUNS / "training" / f"{stage}-{folder.key[:16]}"
        return folder

    @property
    def result(self) -> Path:
        """Where a job of a scheduler leaves the stage's outcome for the command that waits for it."""
        return self.path / "result"

    @property
    def key(self) -> str:
        """Hash of the identity."""
        return fingerprint(self.identity)

    @property
    def log(self) -> Path:
        """JSON lines, one per step, with timings."""
        return self.path / "log.jsonl"

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, newest first."""
        found = [Checkpoint.read(path) for path in self.path.glob("step-*")]
        return sorted((c for c in found if c), key=lambda c: c.step, reverse=True)

    def save(self, engine: Any, step: int, validation_loss: float | None = None) -> None:
        """Copies the engine's state after `step` steps; a thread writes it while training goes on.

        Raises:
            OSError: the checkpoint before this one could not be written.
        """
        self.finish_writing()
        target = self.path / f"step-{step}"
        if is_main():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            self._prune()
        barrier()
        rank, world = dist.get_rank(), dist.get_world_size()
        marker = {
            "step": step, "rank": rank, "world": world, "file": f"rank-{rank}-of-{world}.safetensors",
            "validation_loss": validation_loss, "identity": self.identity, "random": _random_state(),
        }  # fmt: skip
        self._writing = self._writer.submit(_write, target, snapshot(engine), marker)

    def write_error(self) -> BaseException | None:
        """Why the last checkpoint could not be written, if that is known by now; it is forgotten then."""
        if self._writing is None or not self._writing.done() or self._writing.exception() is None:
            return None
        error, self._writing = self._writing.exception(), None
        return error

    def note_validation(self, step: int, loss: float, rows: list[dict[str, Any]]) -> None:
        """Adds the validation loss to a checkpoint that was written without, and to the last row of the log."""
        if rows and rows[-1]["step"] == step:
            rows[-1]["validation_loss"] = loss
        if is_main():
            for path in (self.path / f"step-{step}").glob("rank-*.json"):
                write_json(path, {**read_json(path), "validation_loss": loss})
            self._write_log(rows)
        barrier()

    def finish_writing(self) -> None:
        """Waits until the last checkpoint is on disk."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _prune(self) -> None:
        """Removes all but the newest checkpoints and the best one."""
        found = self.checkpoints()
        best = min((c for c in found if c.validation_loss is not None), key=lambda c: c.validation_loss, default=None)
        for old in found[KEPT:]:
            if old != best:
                shutil.rmtree(old.path)

    def resume(self, engine: Any, seed: int, explicit: Path | None = None) -> int:
        """Loads the newest undamaged checkpoint, or the given one; returns the number of steps it has taken.

        Raises:
            UserError: the given one is no whole checkpoint, is damaged, or belongs to another run (the difference is
                named).
        """
        if explicit is not None:
            chosen = self._given(explicit)
            damaged = _damaged_file(chosen)
            if damaged:
                raise UserError(f"the checkpoint {explicit} is damaged: {damaged}")
            self._leave_later_ones(chosen.step)
            return _load(engine, chosen, seed)
        for checkpoint in self._seen_by_all():
            damaged = _damaged_file(checkpoint)
            if not damaged:
                return _load(engine, checkpoint, seed)
            say(f"checkpoint {checkpoint.path} is damaged ({damaged}); trying the one before it")
        return 0

    def _seen_by_all(self) -> list[Checkpoint]:
        """Complete checkpoints that every rank sees, newest first: one node of a bucket may see them before another."""
        found = self.checkpoints()
        if _world() == 1:
            return found
        everywhere: list[Any] = [None] * _world()
        dist.all_gather_object(everywhere, [checkpoint.step for checkpoint in found])
        return [checkpoint for checkpoint in found if all(checkpoint.step in steps for steps in everywhere)]

    def _leave_later_ones(self, step: int) -> None:
        """Removes checkpoints after `step`: the run takes these steps again, and they are of the way that it left."""
        barrier()
        if is_main():
            for later in (checkpoint for checkpoint in self.checkpoints() if checkpoint.step > step):
                say(f"leaving {later.path.name}, which is after the one to go on from")
                shutil.rmtree(later.path)
        barrier()

    def _given(self, path: Path) -> Checkpoint:
        checkpoint = Checkpoint.read(path) if path.is_dir() else None
        if checkpoint is None:
            raise UserError(f"{path} is no whole checkpoint; give a folder such as {self.path}/step-100")
        differing = differences(checkpoint.markers[0]["identity"], self.identity)
        if differing:
            raise UserError(f"the checkpoint {path} belongs to another run: {'; '.join(differing)}")
        return checkpoint

    def keep_log(self, step: int) -> list[dict[str, Any]]:
        """Cuts the log after `step` and returns its rows: later ones belong to steps that are taken again."""
        rows = []
        if self.log.exists():
            for line in self.log.read_text(encoding="utf-8").split("\n")[:-1]:
                try:
                    row = json.loads(line)
                except ValueError:
                    break  # the line that was being written when the run was killed
                if row["step"] <= step:
                    rows.append(row)
        barrier()
        if is_main():
            self._write_log(rows)
        return rows

    def _write_log(self, rows: list[dict[str, Any]]) -> None:
        write_whole(self.log, "".join(json.dumps(row) + "\n" for row in rows))

    def finish(self, result: Path) -> None:
        """Marks the run as finished and keeps only the best of its checkpoints, and that only if it is not the last.

        The mark holds the hash of the folder that came out: by it `haplovl publish` finds the run behind a model.
        """
        self.finish_writing()
        barrier()
        if is_main():
            mark = {"identity": self.identity, "result_sha256": sha256_of_folder(result)}
            write_json(self.path / FINISHED, mark)
            found = self.checkpoints()
            scored = [c for c in found if c.validation_loss is not None]
            best = min(scored, key=lambda c: c.validation_loss, default=None)
            for checkpoint in found:
                if checkpoint != best or checkpoint == found[0]:
                    shutil.rmtree(checkpoint.path)


def _write(target: Path, tensors: dict[str, torch.Tensor], marker: dict[str, Any]) -> None:
    """Writes one rank's file, then its marker; runs beside training."""
    target.mkdir(exist_ok=True)
    path = target / marker["file"]
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # a full disk, say: what the operating system said stands in its text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from None
    _to_disk(path)
    write_json(path.with_suffix(".json"), {**marker, "sha256": sha256_of(path)})
    _to_disk(path.with_suffix(".json"), target)


def _to_disk(*paths: Path) -> None:
    """Waits until files and folders would survive a power cut."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a mounted bucket knows no such thing
                raise
        finally:
            os.close(descriptor)


def _load(engine: Any, checkpoint: Checkpoint, seed: int) -> int:
    try:
        restore(engine, Pieces(checkpoint.files))
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None
    rank, same = dist.get_rank(), checkpoint.markers[0]["world"] == dist.get_world_size()
    if same:
        _set_random_state(checkpoint.markers[rank]["random"])
    else:  # other processes than those that wrote it: their states fit nobody, so new ones begin here
        torch.manual_seed(hash((seed, checkpoint.step, rank)) % 2**63)
    return checkpoint.step


def _damaged_file(checkpoint: Checkpoint) -> str:
    """Name of a file that is missing or differs from its hash, else ''; the ranks share the work."""
    own = checkpoint.markers[_rank() :: _world()]
    paths = [(checkpoint.path / marker["file"], marker["sha256"]) for marker in own]
    damaged = [path.name for path, expected in paths if not path.is_file() or sha256_of(path) != expected]
    everywhere: list[Any] = [damaged]
    if _world() > 1:
        everywhere = [None] * _world()
        dist.all_gather_object(everywhere, damaged)
    return next((name for names in everywhere for name in names), "")


def differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """What differs between two identities, in words: `seed is 17 there and 18 here`."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = dict.fromkeys([*theirs, *ours])
        return [d for k in keys for d in differences(theirs.get(k), ours.get(k), f"{name}.{k}" if name else str(k))]
    return [] if theirs == ours else [f"{name} is {theirs} there and {ours} here"]


def _random_state() -> dict[str, Any]:
    """The state of all random number generators of this process, for JSON."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_initialized() else None
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
    version, keys, last = state["python"]
    random.setstate((version, tuple(keys), last))
    kind, numbers, *rest = state["numpy"]
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), *rest))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return _rank() == 0


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def say(text: str) -> None:
    """Prints on the main process only."""
    if is_main():
        print(text, flush=True)
