"""A run that is killed, stopped, moved or damaged ends as if nothing had happened; what does not fit is refused."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from random import Random

import pytest
import torch
import yaml
from run_state import being_written, complete
from safetensors.torch import load_file

from haplovl.files import sha256_of, sha256_of_folder

TRAIN = [sys.executable, "-m", "haplovl", "train", "stage1", "--compute"]
DRILL = {"steps": 80, "precision": "fp32", "checkpoint_every": 2, "batch": {"rows": 4, "row_tokens": 96}}
SHORT = {"steps": 12, "precision": "fp32", "checkpoint_every": 4, "batch": {"rows": 4, "row_tokens": 96}}


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def project(make_project, vision, language, processor, tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("short"), vision, language, processor, SHORT)


@pytest.fixture(scope="module")
def drill(make_project, language, processor, tmp_path_factory):
    """A project whose checkpoints are large enough (60 MB) to be killed while they are written."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    vision = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
    return make_project(tmp_path_factory.mktemp("drill"), vision, language, processor, DRILL)


def copy_of(project, target):
    shutil.copytree(project, target, ignore=shutil.ignore_patterns("runs", "stage1", "stage2"))
    return target


def train(folder, profile="one", *more, stage="stage1"):
    command = [sys.executable, "-m", "haplovl", "train", stage, "--compute", profile, *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


def weights_of(folder):
    return sha256_of(folder / "models/stage1/model.safetensors")


def places_of(folder):
    """What the run in a folder noted of where it was trained."""
    return json.loads(next(folder.glob("runs/training/*/run.json")).read_text())["places"]


def kill_once(folder, profile, random, while_writing):
    """Starts a run, lets it come further than it was, and kills its whole process group; the step that it had."""
    before = max(complete(folder), default=0)
    process = subprocess.Popen([*TRAIN, profile], cwd=folder, start_new_session=True, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while max(complete(folder), default=0) <= before:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if while_writing:
            while not being_written(folder):
                assert process.poll() is None, "the run ended before it wrote again"
        else:
            time.sleep(random.uniform(0.0, 0.4))
            assert process.poll() is None, "the run ended before it could be killed"
    finally:
        subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=True)
        output = process.communicate()[0]
    assert before == 0 or "continuing after step" in output, output
    return while_writing and being_written(folder)


def run_drill(drill, folder, profile, kills, kills_in_writing):
    """Kills a run again and again; its weights are in the end those of a run that nobody killed."""
    straight, broken = (copy_of(drill, folder / name) for name in ("straight", "broken"))
    done = train(straight, profile)
    assert done.returncode == 0, done.stdout + done.stderr
    random, number, caught = Random(0), 0, 0
    while number < kills or caught < kills_in_writing:  # a kill may come a moment after the writing
        caught += kill_once(broken, profile, random, while_writing=number % 2 == 1 and caught < kills_in_writing)
        number += 1
    done = train(broken, profile)
    assert done.returncode == 0 and "continuing after step" in done.stdout, done.stdout + done.stderr
    assert weights_of(broken) == weights_of(straight)
    logs = [(path / "models/stage1/training_log.jsonl").read_bytes() for path in (straight, broken)]
    assert logs[0] == logs[1]


def test_kills_change_nothing(drill, tmp_path):
    run_drill(drill, tmp_path, "one", kills=2, kills_in_writing=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("profile", ["one", "two"])
def test_twenty_kills_change_nothing(drill, tmp_path, profile):
    run_drill(drill, tmp_path, profile, kills=20, kills_in_writing=5)


@pytest.fixture(scope="module")
def trained(project, tmp_path_factory):
    """A copy of the project after an uninterrupted run, and a complete checkpoint of step 4 out of it."""
    folder = copy_of(project, tmp_path_factory.mktemp("trained") / "project")
    process = subprocess.Popen([*TRAIN, "one"], cwd=folder, stdout=subprocess.PIPE)
    kept = folder.parent / "step-4"
    while process.poll() is None and not kept.exists():
        if 4 in complete(folder):
            shutil.copytree(next(folder.glob("runs/training/*/step-4")), kept)
        time.sleep(0.002)
    assert process.wait(timeout=120) == 0 and kept.exists()
    return folder, kept


def test_an_older_checkpoint_can_be_named(project, trained, tmp_path):
    straight, kept = trained
    folder = copy_of(project, tmp_path / "again")
    done = train(folder, "one", "--resume-from", str(kept))
    assert done.returncode == 0 and "continuing after step 4" in done.stdout, done.stdout + done.stderr
    assert weights_of(folder) == weights_of(straight)


def test_who_goes_on_from_an_older_checkpoint_leaves_the_later_ones(project, trained, tmp_path):
    """Else a kill would go on from a step that the log no longer has."""
    straight, kept = trained
    folder = killed_after(copy_of(project, tmp_path / "again"), 8)
    state = next(folder.glob("runs/training/stage1-*"))
    done = train(folder, "one", "--resume-from", str(kept))
    assert done.returncode == 0 and "leaving step-8, which is after the one to go on from" in done.stdout, done.stdout
    assert [row["step"] for row in map(json.loads, (state / "log.jsonl").open())] == list(range(1, 13))
    assert weights_of(folder) == weights_of(straight)


def killed_after(folder, step):
    """The folder after a run in it was killed, some time after it had a complete checkpoint of this step."""
    process = subprocess.Popen([*TRAIN, "one"], cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL)
    while step not in complete(folder):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "models/stage1").exists()
    return folder


def test_what_a_power_cut_leaves_is_passed_over(project, trained, tmp_path):
    folder = killed_after(copy_of(project, tmp_path / "cut"), 8)
    (marker,) = folder.glob("runs/training/stage1-*/step-8/rank-0-of-1.json")
    marker.write_text("")
    done = train(folder, "one")
    assert done.returncode == 0 and "continuing after step 4" in done.stdout, done.stdout + done.stderr
    assert weights_of(folder) == weights_of(trained[0])


def test_a_validation_loss_that_a_stop_left_no_time_for_is_made_up_for(project, trained, tmp_path):
    folder = killed_after(copy_of(project, tmp_path / "stopped"), 4)
    (state,) = folder.glob("runs/training/stage1-*")
    for newer in (path for path in state.glob("step-*") if path.name != "step-4"):
        shutil.rmtree(newer)
    rows = [json.loads(line) for line in (state / "log.jsonl").read_text().split("\n")[:4]]
    assert rows[3].pop("validation_loss") > 0
    (state / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (marker,) = (state / "step-4").glob("rank-*.json")
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"validation_loss": None}))
    done = train(folder, "one")
    assert done.returncode == 0 and "continuing after step 4" in done.stdout, done.stdout + done.stderr
    assert sha256_of_folder(folder / "models/stage1") == sha256_of_folder(trained[0] / "models/stage1")


def test_a_checkpoint_that_cannot_be_written_is_tried_again_at_once_and_told(project, tmp_path):
    """A limit on the size of files, as a full disk: the log still fits, a checkpoint does not."""
    folder = copy_of(project, tmp_path / "full")
    limited = ["bash", "-c", f"ulimit -f 40; exec {shlex.join(TRAIN)} one"]
    done = subprocess.run(limited, cwd=folder, capture_output=True, text=True, timeout=200)
    assert "a checkpoint could not be written (" in done.stdout and "trying again after step" in done.stdout, (
        done.stdout
    )
    assert done.returncode == 1 and "File too large" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (folder / "models/stage1").exists()


def test_two_trainings_of_one_run_do_not_mix(project, trained, tmp_path):
    folder = copy_of(project, tmp_path / "twice")
    first, second = (
        subprocess.Popen([*TRAIN, "one"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    )
    assert [process.wait(timeout=200) for process in (first, second)] == [0, 0]
    (log,) = folder.glob("runs/training/stage1-*/log.jsonl")
    assert [json.loads(line)["step"] for line in log.open()] == list(range(1, 13))
    assert weights_of(folder) == weights_of(trained[0])


def test_a_profile_for_gpus_needs_gpus(project, tmp_path):
    folder = copy_of(project, tmp_path / "gpu")
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for profile, processes, needs in (("g", 1, "1 GPU"), ("g2", 2, "2 GPUs")):
        text = f"name: {profile}\ndevice: cuda\nprocesses: {processes}\nmicro_batch_rows: 2\n"
        (folder / f"infra/compute/{profile}.yaml").write_text(text)
        done = subprocess.run([*TRAIN, profile], cwd=folder, capture_output=True, text=True, timeout=200, env=hidden)
        expected = f"error: compute profile '{profile}' needs {needs} on this machine, and torch sees 0\n"
        assert done.returncode == 1 and done.stderr == expected, done.stderr


def test_another_number_of_ranks_and_zero_stage_goes_on(project, trained, tmp_path):
    straight, kept = trained
    folder = copy_of(project, tmp_path / "moved")
    done = train(folder, "three", "--resume-from", str(kept))
    assert done.returncode == 0 and "continuing after step 4" in done.stdout, done.stdout + done.stderr
    ours, theirs = (load_file(path / "models/stage1/model.safetensors") for path in (folder, straight))
    assert all(torch.allclose(ours[name], value, atol=1e-5) for name, value in theirs.items())
    (place,) = places_of(folder)
    assert (place["after_step"], place["world_size"], place["machine"]["threads"]) == (4, 2, 1)
    assert place["compute"]["name"] == "three"
    mark = json.loads(next(folder.glob("runs/training/*/finished.json")).read_text())
    assert mark["result_sha256"] == sha256_of_folder(folder / "models/stage1")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda params: params.update(seed=3), "seed is 17 there and 3 here"),
        (
            lambda params: params["stage1"]["optimizer"].update(learning_rate=1.0e-5),
            "stage1.optimizer.learning_rate is 0.0007 there and 1e-05 here",
        ),
    ],
)
def test_a_state_of_another_run_is_refused_with_the_difference(project, trained, tmp_path, change, expected):
    folder = copy_of(project, tmp_path / "other")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    change(params)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    done = train(folder, "one", "--resume-from", str(trained[1]))
    assert done.returncode == 1 and expected in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (folder / "models/stage1").exists()


def test_a_damaged_or_unfinished_state_is_refused_by_name(project, trained, tmp_path):
    folder, broken = copy_of(project, tmp_path / "project"), tmp_path / "broken"
    shutil.copytree(trained[1], broken)
    state = next(broken.glob("*.safetensors"))
    state.write_bytes(state.read_bytes()[:-4] + b"oops")
    done = train(folder, "one", "--resume-from", str(broken))
    assert done.returncode == 1 and f"is damaged: {state.name}" in done.stderr, done.stderr
    next(broken.glob("*.json")).unlink()
    done = train(folder, "one", "--resume-from", str(broken))
    assert done.returncode == 1 and "is no whole checkpoint" in done.stderr, done.stderr


@pytest.mark.parametrize(("profile", "number"), [("one", signal.SIGTERM), ("two", signal.SIGUSR1)])
def test_stop_signals_write_a_checkpoint_and_exit_85(project, trained, tmp_path, profile, number):
    folder = copy_of(project, tmp_path / "stopped")
    process = subprocess.Popen([*TRAIN, profile], cwd=folder, stdout=subprocess.PIPE, text=True)
    while not complete(folder):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    if process.returncode == 0:
        pytest.skip("the short run had ended before the signal came")
    assert process.returncode == 85 and "stopped by signal" in output, output
    done = train(folder, profile)
    (place,) = places_of(folder)
    assert (place["after_step"], place["world_size"]) == (0, 2 if profile == "two" else 1), "it goes on where it was"
    assert f"continuing after step {max(complete(folder), default=0) or ''}"[:22] in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    if profile == "one":
        assert weights_of(folder) == weights_of(trained[0])


def test_an_infinite_loss_stops_before_the_step_and_leaves_evidence(project, tmp_path):
    folder = copy_of(project, tmp_path / "hot")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["stage1"]["optimizer"].update(learning_rate=1.0e18, warmup_share=0.0)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    done = train(folder)
    assert done.returncode == 1 and done.stderr.startswith("error: stage1 stopped before step"), done.stderr
    step = int(done.stderr.split("before step ")[1].split(":")[0])
    run = next(folder.glob("runs/training/stage1-*"))
    evidence = json.loads((run / "bad_batch_0.json").read_text())
    assert evidence["step"] == step and set(evidence["records"]) <= {f"r{n}" for n in range(80)}
    state = load_file(next((run / f"step-{step - 1}").glob("*.safetensors")))
    assert all(bool(value.isfinite().all()) for name, value in state.items() if name.startswith("weight|"))
    assert not (folder / "models/stage1").exists()


def test_the_best_and_the_last_checkpoint_are_kept(project, tmp_path):
    """A learning rate that grows and is far too high: the first of ten checkpoints serves held-out records best.

    Only growth makes the first one the best on every machine: at one rate the loss wanders, and rounding decides where
    it is lowest.
    """
    folder = copy_of(project, tmp_path / "best")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["stage1"].update(steps=10, checkpoint_every=1)
    params["stage1"]["optimizer"].update(learning_rate=100.0, warmup_share=1.0)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    done = train(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    run = next(folder.glob("runs/training/stage1-*"))
    scores = {row["step"]: row["validation_loss"] for row in map(json.loads, (run / "log.jsonl").open())}
    best = min(scores, key=scores.get)
    assert len(scores) == 10 and best == 1, scores
    assert [path.name for path in run.glob("step-*")] == ["step-1"]


def test_adapters_are_trained_resumed_and_merged(project, trained, tmp_path):
    folder = copy_of(project, tmp_path / "lora")
    shutil.copytree(trained[0] / "models/stage1", folder / "models/stage1")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["stage2"]["lora"] = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    moved = copy_of(folder, tmp_path / "moved")
    shutil.copytree(folder / "models/stage1", moved / "models/stage1")
    done = train(folder, stage="stage2")
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (load_file(folder / f"models/{stage}/model.safetensors") for stage in ("stage1", "stage2"))
    assert set(before) == set(after)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert "lm_head.weight" in same and "model.language_model.embed_tokens.weight" in same
    assert not any("_proj" in name for name in same)
    done = train(moved, "three", stage="stage2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(load_file(moved / "models/stage2/model.safetensors")) == set(before)
