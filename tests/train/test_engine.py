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
        "zero": [0, 1, 2, 3], "steps": 20, "clip": 1.0, "offload": "none",
    }  # fmt: skip


def compare(folder, splits, reference, gradients=1e-5, losses=1e-5, weights=1e-6):
    """Every split against the reference: gradients relative to a tensor's norm, losses relative, weights absolute."""
    expected = torch.load(folder / reference)
    assert expected["losses"][-1] < expected["losses"][0]
    for name in splits:
        found = torch.load(folder / name)
        assert found["losses"] == pytest.approx(expected["losses"], rel=losses), name
        for key, value in expected["gradients"].items():
            error = (found["gradients"][key] - value).norm() / value.norm().clamp(min=1e-8)
            assert error <= gradients, (name, key)
        for key, value in expected["weights"].items():
            assert (found["weights"][key] - value).abs().max() <= weights, (name, key)


@pytest.mark.parametrize("objective", ["instruction", "distillation"])
def test_one_two_and_four_ranks_agree_in_every_zero_stage(job, objective, tmp_path):
    """Rows of text alone meet rows of three pictures on other ranks: nothing hangs."""
    worlds = (1, 2, 4) if objective == "instruction" else (1, 2)
    for world in worlds:
        spawn(world, {**job, "objective": objective}, tmp_path)
    splits = [f"zero{zero}-world{world}.pt" for world in worlds for zero in job["zero"]]
    compare(tmp_path, splits, "zero0-world1.pt")


def test_checkpointed_activations_and_offload_change_nothing(job, tmp_path):
    (tmp_path / "plain").mkdir()
    spawn(1, {**job, "zero": [0]}, tmp_path / "plain")
    spawn(2, {**job, "checkpointing": True, "offload": "optimizer"}, tmp_path)
    (tmp_path / "plain/zero0-world1.pt").rename(tmp_path / "reference.pt")
    compare(tmp_path, [f"zero{zero}-world2.pt" for zero in job["zero"]], "reference.pt")
