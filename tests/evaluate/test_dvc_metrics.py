"""DVC's own commands read the evaluation's metrics: accuracies by type, from experiment to experiment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from haplovl.evaluate.compare.show import show

dvc = pytest.importorskip("dvc.cli")

STAGE = f"""
stages:
  evaluate:
    cmd: {sys.executable} stage.py
    deps: [stage.py]
    params: [stage2]
    outs: [reports/evaluation]
    metrics: [metrics/evaluation.json]
"""
# Answers get better with the steps; everything from there on is what `haplovl evaluate` does.
CODE = """
import json, yaml
from pathlib import Path
from haplovl.evaluate.questions import Question
from haplovl.evaluate.scorers import Outcome, score
steps = yaml.safe_load(Path("params.yaml").read_text())["stage2"]["steps"]
outcomes = [
    Outcome(Question(f"{kind}-{i}#0", str(i), kind, (), "?", "yes"), "yes" if i < steps else "no", "no", -1.0)
    for kind in ("colour", "count") for i in range(10)
]
Path("metrics").mkdir(exist_ok=True)
Path("reports/evaluation").mkdir(parents=True, exist_ok=True)
rows = [
    {"id": o.question.id, "kind": o.question.kind, "question": "?", "answer": "yes", "prediction": o.prediction,
     "source": "own", "images": [], "image_sha256": [], "confidence": -1.0}
    for o in outcomes
]
Path("reports/evaluation/predictions.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
Path("metrics/evaluation.json").write_text(json.dumps({**score(outcomes), "questions": 20, "data": {"sha256": "d1"}}))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git and DVC repository with one finished run of 4 steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@b.c")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("COLUMNS", "200")
    for name, text in {"dvc.yaml": STAGE, "stage.py": CODE, "params.yaml": "stage2: {steps: 4}\n"}.items():
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], check=True)
    run("init", "-q")
    run("repro", "-q")
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "commit", "-qm", "four steps"], check=True)
    return tmp_path


def run(*words: str) -> None:
    assert dvc.main(list(words)) == 0, words


def told(*words: str):
    # In a process of its own: DVC prints to the stream that was there when it was imported.
    done = subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_metrics_and_experiments_show_accuracies_by_type(project: Path, capsys: pytest.CaptureFixture) -> None:
    shown = told("metrics", "show", "--json")[""]["data"]["metrics/evaluation.json"]["data"]
    assert shown["accuracy"] == 0.4 and shown["accuracy_low"] < 0.4 < shown["accuracy_high"]

    run("exp", "run", "-q", "-n", "more-steps", "-S", "stage2.steps=9")
    assert (project / "params.yaml").read_text() == "stage2: {steps: 9}\n"
    difference = told("metrics", "diff", "--json")["metrics/evaluation.json"]
    assert difference["types.count.accuracy"] == {"old": 0.4, "new": 0.9, "diff": 0.5}
    assert difference["accuracy"]["diff"] == 0.5 and "types.colour.accuracy_low" in difference
    changed = told("params", "diff", "--json")
    assert changed["params.yaml"] == {"stage2.steps": {"old": 4, "new": 9, "diff": 5}}

    (workspace, commit) = told("exp", "show", "--json", "--num", "1")
    (experiment,) = commit["experiments"]
    assert experiment["name"] == "more-steps"
    (rev,) = experiment["revs"]
    assert rev["data"]["metrics"]["metrics/evaluation.json"]["data"]["types"]["colour"]["accuracy"] == 0.9
    assert rev["data"]["params"]["params.yaml"]["data"]["stage2"]["steps"] == 9

    for name, revision in (("before", "HEAD"), ("after", "more-steps")):
        run("get", "-q", ".", "reports/evaluation", "--rev", revision, "-o", name)
    show([project / "before", project / "after"])
    overall = next(
        line for line in capsys.readouterr().out.splitlines() if "after − before" in line and " all " in line
    )
    assert "+50.0" in overall and "real" in overall
