"""What is logged and watched: one row per step, in a JSON-lines file, in W&B and on the progress line.

All ranks keep a Monitor, as a loss spike concerns the records of all of them; only the main one writes and prints.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from haplovl.files import RUN_FILE, write_json
from haplovl.progress import Reporter, reporter
from haplovl.tracking import PROJECT, TrackedRun
from haplovl.train.image_path import ImagePathWatch

GIB = 2.0**30
MEASURED = (
    "seconds", "supervised_tokens_per_s", "tokens_per_s", "tflops", "mfu", "memory_gib", "data_wait", "eta_s",
)  # fmt: skip
"""Fields of a row that the machine decides; all others are functions of recipe, data and code."""
SPIKE_WINDOW, SPIKE_LEAST = 100, 20
SPIKE_DEVIATIONS, SPIKE_SHARE = 6.0, 0.1


@dataclass(frozen=True)
class StepFigures:
    """What the trainer knows about one step. Token counts are over all ranks, padding left out."""

    step: int
    """From 1."""
    losses: dict[str, float]
    """Mean of every loss part over its tokens."""
    learning_rate: float
    grad_norm: float
    """Of the whole gradient, before clipping."""
    supervised_tokens: int
    tokens: int
    seconds: float
    """Of the whole step, from the end of the one before: waiting for data included."""
    wait: float
    """Seconds of them in which the step waited for its batches."""
    flops: float
    """Model FLOPs of this device's share of the step, forward and backward."""
    records: int = 0
    """Records of the step over all ranks."""
    total_flops: int = 0
    """The same over all devices, and the forward passes of frozen teachers."""
    weights: dict[str, float] = field(default_factory=dict)
    """Of the loss parts in the loss that is minimised; 1 where none is given."""

    @property
    def loss(self) -> float:
        """What is minimised: the weighted sum of the parts."""
        return sum(self.weights.get(name, 1.0) * value for name, value in self.losses.items())


class SpikeDetector:
    """Tells losses that stand out: above the median of the last ones by a multiple of their usual deviation.

    A loss is a spike if it lies above the median of up to SPIKE_WINDOW losses before it by SPIKE_DEVIATIONS standard
    deviations (1.4826 × the median absolute deviation, which single outliers do not move) and by SPIKE_SHARE of the
    median. The first SPIKE_LEAST losses are never one. A level that lasts stops being one after half a window.
    """

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def add(self, loss: float) -> float | None:
        """Takes the next loss; returns the median it stands out from, or None where it does not."""
        usual = median(self._last) if len(self._last) >= SPIKE_LEAST else None
        found = None
        if usual is not None:
            deviation = 1.4826 * median(abs(value - usual) for value in self._last)
            found = usual if loss - usual > max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(usual)) else None
        self._last.append(loss)
        return found


class Monitor:
    """Turns the figures of a step into a row of the log, writes it everywhere, and speaks when something looks wrong.

    Use `monitor` to open one.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        device: torch.device,
        peak_tflops: float | None,
        earlier: Iterable[dict[str, Any]] = (),
    ) -> None:
        self.folder, self.rank, self.device = folder, rank, device
        # On a CPU there is no peak worth the name.
        self.peak = peak_tflops if device.type == "cuda" else None
        self.watch = ImagePathWatch()
        self.rows = list(earlier)
        """The whole log."""
        self._spikes = SpikeDetector()
        for row in self.rows:  # a run that goes on judges as if it had never stopped
            self._spikes.add(row["loss"])
            self.watch.note(row)
        self._log: Path | None = None
        self._report: Reporter | None = None
        self._wandb: TrackedRun | None = None

    def record(
        self, figures: StepFigures, record_ids: list[str], looks: dict[str, float] | None = None
    ) -> dict[str, Any]:
        """Logs a step; returns its row.

        `record_ids` are those of this rank's batches, which are written down after a spike; `looks` the figures of
        `ImagePathWatch.note` where there was a look.
        """
        row = {**self._row(figures), **(looks or {})}
        usual = self._spikes.add(row["loss"])
        if usual is not None:
            row["spike"] = True
            path = self.folder / f"spike_step{figures.step}_rank{self.rank}.json"
            write_json(path, {"step": figures.step, "loss": row["loss"], "usual": usual, "records": record_ids})
            self._say(
                f"loss spike at step {figures.step}: {row['loss']:.4g}, where the steps before had {usual:.4g}; "
                f"the records of this step are in {self.folder}/spike_step{figures.step}_rank*.json"
            )
        for warning in self.watch.note(looks or {}):
            self._say(f"warning at step {figures.step}: {warning}")
        self.rows.append(row)
        self._write(row)
        return row

    def _row(self, figures: StepFigures) -> dict[str, Any]:
        losses, seconds = figures.losses, max(figures.seconds, 1e-9)
        tflops = figures.flops / seconds / 1e12
        left = self._report.seconds_left(figures.step) if self._report else None
        return {
            "step": figures.step,
            "loss": figures.loss,
            **({} if list(losses) == ["loss"] else losses),
            "learning_rate": figures.learning_rate,
            "grad_norm": figures.grad_norm,
            "supervised_tokens": figures.supervised_tokens,
            "tokens": figures.tokens,
            "records": figures.records,
            "flops": figures.total_flops,
            "seconds": figures.seconds,
            "supervised_tokens_per_s": figures.supervised_tokens / seconds,
            "tokens_per_s": figures.tokens / seconds,
            "tflops": tflops,
            **({"mfu": tflops / self.peak} if self.peak else {}),
            "memory_gib": memory_gib(self.device),
            "data_wait": figures.wait / seconds,
            **({} if left is None else {"eta_s": left}),
        }

    def _write(self, row: dict[str, Any]) -> None:
        if self._log is not None:
            # Closed after every row: a mounted bucket keeps no more of a file than it had when it was last closed.
            with self._log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log(row)
        if self._report is not None:
            self._report.update(row["step"], progress_text(row))

    def _say(self, text: str) -> None:
        if self._report is not None:
            self._report.say(text)


@contextmanager
def monitor(
    stage: str,
    total: int,
    folder: Path,
    key: str,
    device: torch.device,
    *,
    rank: int = 0,
    peak_tflops: float | None = None,
    earlier: Iterable[dict[str, Any]] = (),
    config: dict[str, Any] | None = None,
    grouping: dict[str, Any] | None = None,
) -> Iterator[Monitor]:
    """Opens the log of a run: `folder/log.jsonl` (appended to), W&B and the progress line, on rank 0 only.

    `total` steps of `stage`; `key` is the run's identity, under which W&B finds it again; `earlier` are the rows of
    the steps already taken, `config` the run's description, which `folder/run.json` and W&B hold, and `grouping` its
    place among W&B's runs.
    """
    watcher = Monitor(folder, rank, device, peak_tflops, earlier)
    if rank:
        yield watcher
        return
    write_json(folder / RUN_FILE, config or {})
    run = TrackedRun(PROJECT, f"{stage}-{key[:16]}", config or {}, grouping)
    write_json(folder / RUN_FILE, {**(config or {}), "wandb": run.place})
    try:
        start = len(watcher.rows)
        with reporter(stage, total, start) as report:
            watcher._report, watcher._log, watcher._wandb = report, folder / "log.jsonl", run
            yield watcher
    finally:
        run.finish()


def without_measurements(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is the same in every run of the same recipe: what a DVC out may hold."""
    return {name: value for name, value in row.items() if name not in MEASURED}


def memory_gib(device: torch.device) -> float:
    """GPU: the most memory that tensors have taken so far; CPU: the process's resident memory now. In GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return psutil.Process().memory_info().rss / GIB


def progress_text(row: dict[str, Any]) -> str:
    """The figures of a row for one line beside a progress bar; its tokens are the supervised ones."""
    parts = [
        f"loss {row['loss']:.4g}",
        f"lr {row['learning_rate']:.1e}",
        f"grad {row['grad_norm']:.3g}",
        f"{_short(row['supervised_tokens_per_s'])} tok/s",
        f"{row['tflops']:.3g} TFLOP/s",
        *([f"MFU {row['mfu']:.0%}"] if "mfu" in row else []),
        f"{row['memory_gib']:.3g}G",
        f"wait {row['data_wait']:.0%}",
    ]
    return " ".join(parts)


def _short(number: float) -> str:
    """1,234 as 1.2k."""
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
