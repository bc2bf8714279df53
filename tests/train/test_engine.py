"""Splitting a step over micro-batches, ranks and ZeRO stages changes nothing but the last bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from haplovl.train.launch import free_port

WORKER = Path(__file__).parent / "worker.py"


def spawn(world, job, folder, limit=240):
    """Runs a job on so many ranks; a rank that hangs is ended with the test."""
    path = folder / f"job{world}.json"
    path.write_text(json.dumps({"out": str(folder), **job}))
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, path],
            env={**os.environ, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=limit)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(outputs)[-3000:]


@pytest.fixture(scope="module")
def job(tiny_model_dir, vision, tmp_path_factory):
    teacher = tmp_path_factory.mktemp("teacher")
    vision.save_pretrained(teacher)
    return {
        "model": str(tiny_model_dir), "vision": str(teacher), "objective": "instruction", "precision": "fp32",
        "steps": 20, "optimizer": "sgd", "rate": 0.05, "offload": "none",
    }  # fmt: skip


def all_stages(folder, prefix="", **more):
    """One run for every ZeRO stage, each to be written into the folder."""
    return [{"zero": zero, "out": str(folder / f"{prefix}zero{zero}.pt"), **more} for zero in range(4)]


def compare(expected, found, gradients=1e-5, losses=1e-5, weights=1e-6):
    """A run against the reference: gradients relative to a tensor's norm, losses relative, weights absolute."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=losses)
    for key, value in expected["gradients"].items():
        error = (found["gradients"][key] - value).norm() / value.norm().clamp(min=1e-8)
        assert error <= gradients, key
    for key, value in expected["weights"].items():
        assert (found["weights"][key] - value).abs().max() <= weights, key


@pytest.mark.parametrize(("objective", "worlds"), [("instruction", (1, 2, 4)), ("distillation", (1, 4))])
def test_ranks_and_zero_stages_agree(job, objective, worlds, tmp_path):
    """Rows of text alone meet rows of three pictures on other ranks: nothing hangs."""
    for world in worlds:
        spawn(world, {**job, "objective": objective, "runs": all_stages(tmp_path, f"{world}-")}, tmp_path)
    expected = torch.load(tmp_path / "1-zero0.pt")
    assert expected["losses"][-1] < expected["losses"][0]
    for path in tmp_path.glob("*.pt"):
        compare(expected, torch.load(path))


def test_checkpointed_activations_and_offload_change_nothing(job, tmp_path):
    spawn(1, {**job, "runs": all_stages(tmp_path, "plain-")[:1]}, tmp_path)
    runs = all_stages(tmp_path, "spared-")
    spawn(2, {**job, "checkpointing": True, "offload": "optimizer", "runs": runs}, tmp_path)
    for path in tmp_path.glob("spared-*.pt"):
        compare(torch.load(tmp_path / "plain-zero0.pt"), torch.load(path))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_gives_the_same_bytes_and_any_other_split_the_same_losses(job, precision, tmp_path):
    job = {**job, "precision": precision, "optimizer": "adamw", "rate": 1e-3, "steps": 12}
    whole, again = {}, {}
    for world in (1, 2):
        runs, same = all_stages(tmp_path, f"whole{world}-"), all_stages(tmp_path, f"same{world}-")
        for run, resumed in zip(runs, same, strict=True):
            run["save"] = resumed["resume"] = str(tmp_path / f"state{world}-{run['zero']}")
        # One stage after the other: ZeRO 3 leaves another linear layer behind in its process.
        spawn(world, {**job, "runs": [run for pair in zip(runs, same, strict=True) for run in pair]}, tmp_path)
        whole |= {(world, zero): torch.load(tmp_path / f"whole{world}-zero{zero}.pt") for zero in range(4)}
        again |= {(world, zero): torch.load(tmp_path / f"same{world}-zero{zero}.pt") for zero in range(4)}
    for key, run in whole.items():
        assert again[key]["start"] == 6 and again[key]["losses"] == run["losses"][6:], key
        assert all(torch.equal(again[key]["weights"][name], value) for name, value in run["weights"].items()), key
    for world in (1, 2):
        moved = all_stages(tmp_path, f"moved{world}-")
        for run in moved:  # the other number of ranks, another stage
            run["resume"] = str(tmp_path / f"state{3 - world}-{(run['zero'] + 1) % 4}")
        spawn(world, {**job, "runs": moved}, tmp_path)
        for zero in range(4):
            # Half precision rounds sums of another order: its losses agree to its own precision.
            close = 1e-5 if precision == "fp32" else 2e-3
            found = torch.load(tmp_path / f"moved{world}-zero{zero}.pt")["losses"]
            assert found == pytest.approx(whole[3 - world, (zero + 1) % 4]["losses"][6:], rel=close)
