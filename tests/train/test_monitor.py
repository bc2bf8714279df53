"""The log of a run: its fields, its files, its spikes; W&B beside it, which may fail without harm."""

import json
import math
import os
import subprocess
import sys
from random import Random

import pytest
import torch

from haplovl.progress import reporter
from haplovl.train.image_path import LOOKS
from haplovl.train.monitor import (
    MEASURED,
    SPIKE_LEAST,
    SpikeDetector,
    StepFigures,
    memory_gib,
    monitor,
    progress_text,
    without_measurements,
)

CPU = torch.device("cpu")


def figures(step, loss=2.0, **changed):
    values = {
        "losses": {"loss": loss},
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "supervised_tokens": 300,
        "tokens": 1000,
        "seconds": 0.5,
        "wait": 0.05,
        "flops": 2e12,
    }
    return StepFigures(step, **values | changed)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """A folder to run in, without W&B."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "disabled")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_holds_rates_per_second_and_per_device(tmp_path):
    with monitor("stage2", 10, tmp_path, "k", CPU) as watcher:
        row = watcher.record(figures(1), ["a"])
    assert row["supervised_tokens_per_s"] == 600 and row["tokens_per_s"] == 2000
    assert row["tflops"] == pytest.approx(4.0) and row["data_wait"] == pytest.approx(0.1)
    assert row["loss"] == 2.0 and row["eta_s"] >= 0
    assert row["memory_gib"] == pytest.approx(memory_gib(CPU), rel=0.5) and row["memory_gib"] > 0.05
    assert "mfu" not in row and "spike" not in row
    assert read(tmp_path / "log.jsonl") == [row] == watcher.rows


def test_mfu_refers_to_the_peak_of_a_gpu_and_a_cpu_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    with monitor("stage2", 10, tmp_path, "k", torch.device("cuda", 0), peak_tflops=10.0) as watcher:
        row = watcher.record(figures(1), [])
    assert row["mfu"] == pytest.approx(0.4) and row["memory_gib"] == 3.0
    with monitor("stage2", 10, tmp_path, "k", CPU, peak_tflops=10.0) as watcher:
        assert "mfu" not in watcher.record(figures(1), [])


def test_parts_are_summed_and_what_the_machine_decides_can_be_left_out(tmp_path):
    with monitor("stage1", 10, tmp_path, "k", CPU) as watcher:
        row = watcher.record(figures(1, losses={"loss_vision": 0.5, "loss_feature": 0.25}), [], {"attention_pre": 0.1})
    kept = without_measurements(row)
    assert kept == {
        "step": 1, "loss": 0.75, "loss_vision": 0.5, "loss_feature": 0.25, "learning_rate": 1e-4, "grad_norm": 0.5,
        "supervised_tokens": 300, "tokens": 1000, "records": 0, "flops": 0, "attention_pre": 0.1,
    }  # fmt: skip
    assert set(row) - set(kept) == set(MEASURED) - {"mfu"}


def test_the_loss_is_what_is_minimised(tmp_path):
    with monitor("stage1", 10, tmp_path, "k", CPU) as watcher:
        parts = {"losses": {"loss_vision": 0.5, "loss_feature": 2.0}, "weights": {"loss_vision": 10.0}}
        row = watcher.record(figures(1, **parts), [])
    assert (row["loss"], row["loss_vision"], row["loss_feature"]) == (7.0, 0.5, 2.0)


def test_other_ranks_write_no_log_but_know_the_same(tmp_path, capsys):
    with monitor("stage2", 10, tmp_path, "k", CPU, rank=1) as watcher:
        row = watcher.record(figures(1), [])
    assert without_measurements(row)["loss"] == 2.0
    assert not (tmp_path / "log.jsonl").exists() and capsys.readouterr().out == ""


# --- spikes --------------------------------------------------------------------------------------------------------
def falling(steps, seed, noise=0.08):
    random = Random(seed)
    return [(0.3 + 4 * math.exp(-n / 150)) * random.gauss(1, noise) for n in range(steps)]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.08, 0.2])
def test_a_noisy_falling_curve_has_no_spike(noise):
    for seed in range(5):
        detector = SpikeDetector()
        assert [detector.add(loss) for loss in falling(1000, seed, noise)] == [None] * 1000


@pytest.mark.parametrize("place", [SPIKE_LEAST, 60, 400, 900])
def test_a_jump_is_one_spike(place):
    curve = falling(1000, seed=3)
    usual = 0.3 + 4 * math.exp(-place / 150)
    curve[place] = 3 * usual
    detector = SpikeDetector()
    found = {n: value for n, value in ((n, detector.add(loss)) for n, loss in enumerate(curve)) if value is not None}
    assert list(found) == [place] and found[place] == pytest.approx(usual, rel=0.5)


def test_the_first_steps_are_never_spikes_and_a_lasting_level_is_soon_usual():
    detector = SpikeDetector()
    assert [detector.add(loss) for loss in [2.0] * (SPIKE_LEAST - 1) + [9.0]] == [None] * SPIKE_LEAST
    detector = SpikeDetector()
    found = [detector.add(loss) is not None for loss in [1.0] * 100 + [2.0] * 100]
    assert found[100] and not any(found[151:])


def test_a_spike_is_marked_told_and_its_records_are_written_down_by_every_rank(tmp_path, capsys):
    rows = []
    for rank in (0, 1):
        with monitor("stage2", 100, tmp_path, "k", CPU, rank=rank) as watcher:
            for step in range(1, 41):
                rows.append(watcher.record(figures(step, 9.0 if step == 30 else 2.0 + step % 3 / 10), [f"r{rank}"]))
    assert [row["step"] for row in rows if row.get("spike")] == [30, 30]
    told = [line for line in capsys.readouterr().out.splitlines() if "spike" in line]
    assert len(told) == 1 and "loss spike at step 30: 9" in told[0]
    for rank in (0, 1):
        written = json.loads((tmp_path / f"spike_step30_rank{rank}.json").read_text())
        assert written == {"step": 30, "loss": 9.0, "usual": pytest.approx(2.1), "records": [f"r{rank}"]}


def test_a_run_that_goes_on_judges_as_if_it_had_not_stopped(tmp_path, capsys):
    curve = [9.0 if step == 30 else 2.0 + step % 3 / 10 for step in range(1, 41)]
    dead = {"patch_gradient_share": 0.0}
    looks = {25 + 2 * n: dead for n in range(LOOKS)}

    def run(folder, stops):
        folder.mkdir()
        earlier = []
        for first, last in zip([1, *(s + 1 for s in stops)], [*stops, 40], strict=True):
            with monitor("stage2", 40, folder, "k", CPU, earlier=earlier) as watcher:
                for step in range(first, last + 1):
                    watcher.record(figures(step, curve[step - 1]), [], looks.get(step))
            earlier = read(folder / "log.jsonl")
        return [without_measurements(row) for row in earlier], capsys.readouterr().out.count("warning at step")

    whole, broken = run(tmp_path / "whole", []), run(tmp_path / "broken", [10, 28])
    assert whole == broken and whole[1] == 1 and len(whole[0]) == 40
    assert [row["step"] for row in whole[0] if row.get("spike")] == [30]


# --- the progress line ---------------------------------------------------------------------------------------------
def test_the_progress_line_fits_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("haplovl.progress.LINE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 131.4 * 2**30)
    large = figures(12345, 11.2345, supervised_tokens=54321, seconds=1.05, flops=452e12, wait=0.2, grad_norm=123.456)
    clock = iter([0.0, *[12345 * 17.0] * 9])
    monkeypatch.setattr("haplovl.progress.time.monotonic", lambda: next(clock))
    with monitor("stage2", 30000, tmp_path, "k", torch.device("cuda"), peak_tflops=989.0) as watcher:
        watcher.record(large, [])
    line = capsys.readouterr().out.strip()
    assert len(line) <= 120, len(line)
    for part in ("12345/30000", "loss 11.23", "lr 1.0e-04", "grad 123", "51.7k tok/s", "430 TFLOP/s", "MFU 44%", "131G",
                 "wait 19%", "3d 11h left"):  # fmt: skip
        assert part in line, line


@pytest.mark.parametrize(("seconds", "text"), [(59, "0:59"), (3723, "1:02:03"), (100000, "1d 03h")])
def test_the_time_left_is_short(seconds, text, capsys, monkeypatch):
    clock = iter([0.0, *[float(seconds)] * 9])
    monkeypatch.setattr("haplovl.progress.time.monotonic", lambda: next(clock))
    with reporter("stage1", 2) as report:
        report.update(1, "loss 1")
    assert capsys.readouterr().out == f"stage1 [#####.....] 1/2 loss 1 {text} left\n"


def test_small_figures_stay_readable():
    row = {"loss": 0.00123456, "learning_rate": 5e-4, "grad_norm": 0.012, "supervised_tokens_per_s": 345.6,
           "tflops": 0.0031, "memory_gib": 0.789, "data_wait": 0.001}  # fmt: skip
    text = progress_text(row)
    assert text == "loss 0.001235 lr 5.0e-04 grad 0.012 346 tok/s 0.0031 TFLOP/s 0.789G wait 0%"


# --- W&B -----------------------------------------------------------------------------------------------------------
RUN = """
import sys, torch
from pathlib import Path
from haplovl.train.monitor import StepFigures, monitor
first, last = int(sys.argv[1]), int(sys.argv[2])
folder = Path("state"); folder.mkdir(exist_ok=True)
with monitor("stage2", 4, folder, "0123456789abcdef" * 4, torch.device("cpu"), config={"recipe": "x"}) as watcher:
    for step in range(first, last + 1):
        watcher.record(StepFigures(step, {"loss": 7.5 / step}, 1e-4, 0.5, 3, 9, 0.1, 0.0, 1e9), [])
"""


def run_in(folder, first, last, before="", **environment):
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}, **environment}
    return subprocess.run(
        [sys.executable, "-c", before + RUN, str(first), str(last)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_wandb_offline_goes_on_under_the_same_id_and_writes_nothing_into_the_home_folder(tmp_path):
    pytest.importorskip("wandb")
    home = tmp_path / "home"
    home.mkdir()
    for first, last in ((1, 2), (3, 4)):
        done = run_in(tmp_path, first, last, HOME=str(home))
        assert done.returncode == 0 and "W&B" not in done.stdout + done.stderr, done.stdout + done.stderr
    runs = sorted((tmp_path / "runs/wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith("-stage2-0123456789abcdef") for run in runs)
    logged = b"".join(next(run.glob("*.wandb")).read_bytes() for run in runs)
    assert b"supervised_tokens_per_s" in logged and b"grad_norm" in logged and b"1.875" in logged
    assert len(read(tmp_path / "state/log.jsonl")) == 4
    assert not list(home.rglob("*"))


def test_online_without_a_server_soon_becomes_offline(tmp_path):
    pytest.importorskip("wandb")
    nobody = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    done = run_in(tmp_path, 1, 4, "import haplovl.tracking as t; t.START_TIMEOUT = 2.0", **nobody)
    assert done.returncode == 0 and done.stdout.count("W&B could not start (online); training goes on") == 1, done
    assert "offline" not in done.stdout
    (run,) = (tmp_path / "runs/wandb").glob("offline-run-*")
    assert b"supervised_tokens_per_s" in next(run.glob("*.wandb")).read_bytes()
    assert len(read(tmp_path / "state/log.jsonl")) == 4


def test_a_wandb_failure_is_told_and_training_goes_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with monitor("stage2", 2, tmp_path, "k", CPU) as watcher:
        watcher.record(figures(1), [])
    assert len(read(tmp_path / "log.jsonl")) == 1
    assert capsys.readouterr().out.count("W&B could not start (nonsense); training goes on") == 1
