"""`haplovl-retrain`: trains what changed, registers it, and promotes it unless it is worse; a real Prefect server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DVC_YAML = """
stages:
  evaluate:
    cmd: python model.py
    deps: [model.py]
    outs: [models/stage2, reports/evaluation]
    metrics: [metrics/evaluation.json]
  register:
    cmd: mkdir -p candidate && cp metrics/evaluation.json candidate/scores.json && python register.py
    deps: [metrics/evaluation.json, models/stage2, register.py]
    outs: [candidate]
"""
# A model that answers WRONG of 400 questions wrong, and its evaluation, in the files that the real stages write.
MODEL = """
import json
from pathlib import Path

WRONG = {wrong}
for name in ("models/stage2", "reports/evaluation", "metrics"):
    Path(name).mkdir(parents=True, exist_ok=True)
Path("models/stage2/model.safetensors").write_text(str(WRONG))
rows = [
    {{"id": f"q{{i}}", "kind": "colour", "source": "scenes", "question": "Which?", "answer": "red", "images": [],
     "prediction": "blue" if i < WRONG else "red", "image_sha256": [], "confidence": -0.1}}
    for i in range(400)
]
Path("reports/evaluation/predictions.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
accuracy = 1 - WRONG / 400
scores = {{"accuracy": accuracy, "majority": 0.2, "blank_image": 0.2, "n": 400}}
Path("metrics/evaluation.json").write_text(json.dumps({{"accuracy": accuracy, "types": {{"colour": scores}}}}))
"""
REGISTER = """
import json
from pathlib import Path

evaluation = json.loads(Path("metrics/evaluation.json").read_text())
passed = evaluation["accuracy"] >= 0.5
candidate = {"params": {}, "metrics": {"evaluation": evaluation},
             "gate": {"passed": passed, "reasons": [] if passed else ["accuracy is below 0.500"]}}
Path("candidate/candidate.json").write_text(json.dumps(candidate))
"""


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    files = {
        "dvc.yaml": DVC_YAML,
        "model.py": MODEL.format(wrong=40),
        "register.py": REGISTER,
        "params.yaml": (ROOT / "params.yaml").read_text(),
        "infra/compute/laptop.yaml": (ROOT / "infra/compute/laptop.yaml").read_text(),
        ".gitignore": "/runs/\n/models/\n/reports/\n/candidate/\n/metrics/\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    command("git", "init", "-q", root=root)
    command(sys.executable, "-m", "dvc", "init", "-q", root=root)
    commit(root, "start")
    return root


def command(*words, root):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "WANDB_MODE": "disabled", "NO_COLOR": "1"}
    env |= {"PREFECT_HOME": str(root.parent / "prefect"), "COLUMNS": "300"}
    return subprocess.run(words, cwd=root, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def commit(root, message):
    command("git", "add", "-A", root=root)
    command("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", message, root=root)


def retrain(root, wrong=None):
    """Runs the flow, on a new model that answers so many questions wrong; returns what its last lines say."""
    if wrong is not None:
        (root / "model.py").write_text(MODEL.format(wrong=wrong))
        commit(root, f"{wrong} wrong")
    done = command(sys.executable, "-m", "flows.pipeline", "--promote", root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("haplovl-retrain:"))


def in_production(root):
    listed = command("haplovl", "models", "--json", root=root)
    return [row["version"] for row in json.loads(listed.stdout) if "prod" in row["stages"]]


@pytest.mark.timeout(600)
def test_only_what_is_not_worse_reaches_production(project):
    assert retrain(project) == "haplovl-retrain: 2 stages run, 0 cached; prod: nothing → v0.0.1"
    assert retrain(project) == "haplovl-retrain: 0 stages run, 2 cached; v0.0.1 is in prod already"

    said = retrain(project, wrong=120)
    assert "v0.0.2 is not promoted, prod stays v0.0.1: worse than v0.0.1 on all questions: -20.0 points" in said
    assert in_production(project) == ["v0.0.1"]

    assert retrain(project, wrong=10).endswith("prod: v0.0.1 → v0.0.3")
    assert retrain(project, wrong=300).endswith("not registered: accuracy is below 0.500")
    assert in_production(project) == ["v0.0.3"]

    # A night after a rollback, the version that was taken back does not return by itself.
    retrain(project, wrong=10)
    assert command("haplovl", "rollback", root=project).returncode == 0
    assert "v0.0.3 was in prod before, which holds v0.0.1 now" in retrain(project)
    assert in_production(project) == ["v0.0.1"]

    # What the flow's page in Prefect shows.
    shown = command("prefect", "artifact", "inspect", "haplovl-scores", "--limit", "10", root=project)
    assert "| colour | 0.975 | 0.200 | 0.200 | 400 |" in shown.stdout and "v0.0.3" in shown.stdout, shown
