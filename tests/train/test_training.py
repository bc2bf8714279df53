"""Training through the command: same bytes again, also after a kill; splitting a step changes nothing."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from run_state import complete
from safetensors import safe_open
from safetensors.torch import load_file

from haplovl.files import HEADS, sha256_of
from haplovl.model import HaploForConditionalGeneration

STEPS = 12


def haplovl(*words, cwd, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "haplovl", *words], cwd=cwd, capture_output=True, text=True, timeout=200, **kwargs
    )


@pytest.fixture(scope="module")
def project(make_project, vision, language, processor, tmp_path_factory):
    """A folder with tiny teachers and prepared records, ready for `haplovl train stage1`."""
    stage = {"steps": STEPS, "precision": "fp32", "checkpoint_every": 4, "batch": {"rows": 4, "row_tokens": 96}}
    return make_project(tmp_path_factory.mktemp("project"), vision, language, processor, stage)


def copy_of(project, tmp_path):
    target = tmp_path / "copy"
    shutil.copytree(project, target, ignore=shutil.ignore_patterns("runs", "stage1", "stage2"))
    return target


@pytest.fixture(scope="module")
def trained(project):
    """Hash of stage 1's weights after an uninterrupted run."""
    done = haplovl("train", "stage1", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    return sha256_of(project / "models/stage1/model.safetensors")


def losses(folder, stage="stage1"):
    lines = (folder / f"models/{stage}/training_log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_stage1_learns_and_leaves_the_language_model_alone(project, trained):
    log = losses(project)
    assert len(log) == STEPS
    assert log[-1] < log[0]
    weights = load_file(project / "models/stage1/model.safetensors")
    teacher = load_file(project / "models/teachers/language/model.safetensors")
    for name, value in teacher.items():
        ours = name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        assert torch.equal(weights[ours], value), name


def test_stage1_leaves_its_heads_beside_the_model(project, trained):
    heads = load_file(project / "models/stage1" / HEADS)
    weights = load_file(project / "models/stage1/model.safetensors")
    assert set(heads) == {"vision_head.weight", "vision_head.bias", "text_head.weight", "text_head.bias"}
    assert {value.dtype for value in heads.values()} == {torch.float32}
    with safe_open(project / "models/stage1" / HEADS, "pt") as file:  # `haplovl probe` asks which state was taught
        assert file.metadata() == {"vision_layer": "1"}
    for name in ("weight", "bias"):  # the connector starts from the text head, and stage 1 does not train it further
        assert torch.equal(heads[f"text_head.{name}"], weights[f"model.connector.{name}"])
    _, found = HaploForConditionalGeneration.from_pretrained(project / "models/stage1", output_loading_info=True)
    assert not found["unexpected_keys"]


def test_a_killed_run_continues_and_ends_with_the_same_bytes(project, trained, tmp_path):
    folder = copy_of(project, tmp_path)
    process = subprocess.Popen([sys.executable, "-m", "haplovl", "train", "stage1"], cwd=folder, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not complete(folder):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "models/stage1").exists()
    done = haplovl("train", "stage1", cwd=folder)
    assert "continuing after step" in done.stdout, done.stdout + done.stderr
    assert sha256_of(folder / "models/stage1/model.safetensors") == trained
    assert losses(folder) == losses(project)


def test_bf16_resumes_to_the_same_bytes(project, trained, tmp_path):
    straight = copy_of(project, tmp_path / "straight")
    params = yaml.safe_load((straight / "params.yaml").read_text())
    params["stage1"]["precision"] = "bf16"
    (straight / "params.yaml").write_text(yaml.safe_dump(params))
    broken = copy_of(straight, tmp_path / "broken")
    assert haplovl("train", "stage1", cwd=straight).returncode == 0
    process = subprocess.Popen([sys.executable, "-m", "haplovl", "train", "stage1"], cwd=broken, stdout=subprocess.PIPE)
    while not complete(broken):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "continuing after step" in haplovl("train", "stage1", cwd=broken).stdout
    ours, theirs = (sha256_of(f / "models/stage1/model.safetensors") for f in (broken, straight))
    assert ours == theirs != trained


def test_sigterm_writes_a_checkpoint_and_a_damaged_one_is_passed_over(project, trained, tmp_path):
    folder = copy_of(project, tmp_path)
    process = subprocess.Popen([sys.executable, "-m", "haplovl", "train", "stage1"], cwd=folder, stdout=subprocess.PIPE)
    while not complete(folder):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 85
    newest = max(folder.glob("runs/training/*/step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    state = next(p for p in newest.glob("*.safetensors"))
    state.write_bytes(state.read_bytes()[:100])
    done = haplovl("train", "stage1", cwd=folder)
    assert f"{newest.name} is damaged" in done.stdout, done.stdout + done.stderr
    assert sha256_of(folder / "models/stage1/model.safetensors") == trained


def test_micro_batches_and_ranks_change_only_the_last_bits(project, trained, tmp_path):
    reference = losses(project)
    for profile in ("one", "two"):
        folder = copy_of(project, tmp_path / profile)
        done = haplovl("train", "stage1", "--compute", profile, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        # Sums in another order, amplified by Adam over the steps; measured worst case 2e-6 of the loss.
        assert losses(folder) == pytest.approx(reference, rel=1e-4)


def test_stage2_trains_everything_from_stage1(project, trained):
    done = haplovl("train", "stage2", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(project, "stage2")[-1] < losses(project, "stage2")[0]
    before = load_file(project / "models/stage1/model.safetensors")
    after = load_file(project / "models/stage2/model.safetensors")
    assert set(before) == set(after)
    frozen = [name for name in before if torch.equal(before[name], after[name])]
    assert frozen == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "stage3"], "there is no training stage 'stage3'"),
        (["train", "stage1", "--compute", "moon"], "no compute profile 'moon'"),
    ],
)
def test_wrong_words_end_with_one_sentence(project, words, expected):
    done = haplovl(*words, cwd=project)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and expected in done.stderr
    assert done.stderr.count("\n") == 1


def test_missing_inputs_are_named(tmp_path, request):
    shutil.copy(request.config.rootpath / "params.yaml", tmp_path)
    shutil.copytree(request.config.rootpath / "infra", tmp_path / "infra")
    for command, missing in (
        ("prepare", "data/validated"),
        ("teachers", "data/validated"),
        ("evaluate", "data/validated"),
    ):
        done = haplovl(command, cwd=tmp_path)
        assert done.returncode == 1 and missing in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == ["infra", "params.yaml"]
