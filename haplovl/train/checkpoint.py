"""Training state on disk: complete checkpoints only, verified by hash, keyed by what decides the result."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from haplovl.errors import UserError
from haplovl.files import RUNS, read_json, sha256_of, write_json

KEPT = 2
MARKER = "complete.json"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run's state, outside every DVC out: `runs/training/<stage>-<key>`."""

    path: Path

    @classmethod
    def of(cls, stage: str, key: str) -> "RunFolder":
        """The folder of a stage's run; `key` is the hash of recipe, data, initial weights and code."""
        folder = RUNS / "training" / f"{stage}-{key[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    @property
    def log(self) -> Path:
        """JSON lines, one per step, with timings."""
        return self.path / "log.jsonl"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, newest first."""
        found = [p.parent for p in self.path.glob(f"step-*/{MARKER}")]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)

    def save(self, engine: Any, step: int) -> None:
        """Writes the engine's state after `step` steps; the marker with all hashes comes last."""
        name = f"step-{step}"
        target = self.path / name
        if is_main() and target.exists():
            shutil.rmtree(target)
        barrier()
        state = {"step": step, "random": torch.get_rng_state()}
        engine.save_checkpoint(str(self.path), tag=name, client_state=state, save_latest=False)
        barrier()
        if is_main():
            files = sorted(p for p in target.rglob("*") if p.is_file())
            hashes = {p.relative_to(target).as_posix(): sha256_of(p) for p in files}
            write_json(target / MARKER, {"shape": _shape(engine), "files": hashes})
            for old in self.checkpoints()[KEPT:]:
                shutil.rmtree(old)
        barrier()

    def resume(self, engine: Any) -> int:
        """Loads the newest undamaged checkpoint; returns the number of steps it has taken, 0 without one.

        Raises:
            UserError: the state was written by another number of processes or ZeRO stage.
        """
        for folder in self.checkpoints():
            damaged = _damaged_file(folder)
            if damaged:
                say(f"checkpoint {folder} is damaged ({damaged}); trying the one before it")
                continue
            shape = read_json(folder / MARKER)["shape"]
            if shape != _shape(engine):
                raise UserError(
                    f"the state in {self.path} was written with {shape}, this profile has {_shape(engine)}; "
                    "continue with the profile it began with, or delete the folder to start again"
                )
            _, state = engine.load_checkpoint(str(self.path), tag=folder.name)
            torch.set_rng_state(state["random"])
            return int(state["step"])
        return 0

    def keep_log(self, step: int) -> list[dict[str, Any]]:
        """Cuts the log after `step` and returns its rows: later ones belong to steps that are taken again."""
        rows = []
        if self.log.exists():
            for line in self.log.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    break  # the line that was being written when the run was killed
                if row["step"] <= step:
                    rows.append(row)
        if is_main():
            self.log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return rows

    def discard_checkpoints(self) -> None:
        """Removes the checkpoints of a finished run; its log stays."""
        for folder in self.path.glob("step-*"):
            shutil.rmtree(folder)


def _shape(engine: Any) -> dict[str, int]:
    """What DeepSpeed's own checkpoint format depends on."""
    return {"processes": engine.world_size, "zero_stage": engine.zero_optimization_stage()}


def _damaged_file(folder: Path) -> str:
    """Name of the first file of a checkpoint that is missing or differs from its hash, else ''."""
    for name, expected in read_json(folder / MARKER)["files"].items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != expected:
            return name
    return ""


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def say(text: str) -> None:
    """Prints on the main process only."""
    if is_main():
        print(text, flush=True)
