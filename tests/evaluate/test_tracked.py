"""Training and evaluation as offline W&B runs, and `haplovl compare` reading them back; with W&B itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from made_runs import predictions, settings, write_lines
from PIL import Image

from haplovl.errors import UserError
from haplovl.evaluate.compare.comparison import ALL, compare
from haplovl.evaluate.compare.runs import read_run, read_runs
from haplovl.evaluate.compare.wandb_files import read_offline_run
from haplovl.evaluate.tracked import EXAMPLES

pytest.importorskip("wandb")
# One process logs three runs: a training that is killed and goes on, and an evaluation.
LOG = """
import sys, torch
from pathlib import Path
from haplovl.evaluate.tracked import log_evaluation
from haplovl.settings import load_params
from haplovl.tracking import code_version, description, grouping
from haplovl.train.monitor import StepFigures, monitor
params = load_params()
about = {"stage": "stage2", **description(params), "code": code_version("c0de")}
for first, last in ((1, 3), (3, 5)):  # step 3 is taken again
    folder = Path(f"state-{first}"); folder.mkdir()
    with monitor("stage2", 5, folder, sys.argv[1] * 16, torch.device("cpu"), config=about,
                 grouping=grouping(params, "stage2")) as watcher:
        for step in range(first, last + 1):
            watcher.record(StepFigures(step, {"loss": 7.5 / step + first}, 1e-4, 0.5, 3, 9, 0.1, 0.0, 1e9), [])
log_evaluation(params)
"""


LOSSES = [(1, 8.5), (2, 4.75), (3, 5.5), (4, 4.875), (5, 4.5)]


def project(folder: Path, seed: int, accuracy: float) -> Path:
    """A folder with what an evaluation leaves, its pictures too."""
    rows = predictions(accuracy, seed)
    media = folder / "data/raw/own/media"
    media.mkdir(parents=True)
    for i in range(150):
        Image.new("RGB", (20, 20) if i % 2 else (300, 200), (i, 0, 0)).save(media / f"{i}.png")
    rows[1]["images"], rows[1]["image_sha256"] = ["file:1.png", "file:2.png"], ["0" * 64, "1" * 64]
    write_lines(folder / "reports/evaluation/predictions.jsonl", rows)
    shares = {"accuracy": accuracy, "accuracy_low": 0.5, "accuracy_high": 0.99, "n": 150}
    metrics = {**shares, "types": {"colour": shares}, "questions": 300, "data": {"sha256": "d1"}}
    (folder / "metrics").mkdir()
    (folder / "metrics/evaluation.json").write_text(json.dumps(metrics))
    (folder / "params.yaml").write_text(yaml.safe_dump(settings(recipe="tracked", seed=seed)))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two projects whose training and evaluation were logged with two seeds."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    made = [project(tmp_path_factory.mktemp("w") / "p", seed, accuracy) for seed, accuracy in ((1, 0.7), (2, 0.8))]
    running = [
        subprocess.Popen([sys.executable, "-c", LOG, "ab"[n]], cwd=folder, env=clean, stdout=subprocess.PIPE, text=True)
        for n, folder in enumerate(made)
    ]
    for process in running:
        told = process.communicate()[0]
        assert process.returncode == 0 and "W&B" not in told, told
    return made


def offline(folder: Path, job: str) -> list[Path]:
    return sorted((folder / "runs/wandb").glob(f"offline-run-*-{job}-*"))  # …-1 of the same second sorts after


def test_a_training_is_described_grouped_and_whole_after_going_on(folders) -> None:
    parts = offline(folders[0], "stage2")
    assert len(parts) == 2
    run = read_offline_run(parts[-1])
    assert [(row["step"], row["loss"]) for row in run.rows] == LOSSES
    assert run.config["recipe"] == "tracked" and run.config["code"]["sha256"] == "c0de"
    assert run.config["params"]["stage1"]["steps"] == settings()["stage1"]["steps"]
    assert [row["step"] for row in read_offline_run(parts[0]).rows] == [1, 2, 3]
    told = parts[-1].joinpath(next(parts[-1].glob("*.wandb"))).read_bytes()
    assert b"recipe-tracked" in told and b"tracked-stage2-seed-1" in told and b"seed-1" in told
    assert json.loads((folders[0] / "state-3/run.json").read_text())["recipe"] == "tracked"


def test_parts_of_one_second_are_read_in_their_order(folders, tmp_path) -> None:
    """W&B names the folder of a second start in the same second with a number at its end."""
    first, second = offline(folders[0], "stage2")
    copied = shutil.copytree(first, tmp_path / "offline-run-20261128_071154-stage2-aaaaaaaaaaaaaaaa")
    again = shutil.copytree(second, copied.with_name(f"{copied.name}-1"))
    assert [(row["step"], row["loss"]) for row in read_offline_run(again).rows] == LOSSES
    assert [row["step"] for row in read_offline_run(copied).rows] == [1, 2, 3]


def test_a_training_that_went_on_online_is_whole(folders, tmp_path) -> None:
    """A start offline leaves offline-run-…, one online run-…, and both are parts of one run."""
    first, second = offline(folders[0], "stage2")
    id_ = "stage2-aaaaaaaaaaaaaaaa"
    offline_part = shutil.copytree(first, tmp_path / f"offline-run-20261128_071154-{id_}")
    online_part = shutil.copytree(second, tmp_path / f"run-20261128_081154-{id_}")
    assert [(row["step"], row["loss"]) for row in read_offline_run(online_part).rows] == LOSSES
    assert [row["step"] for row in read_offline_run(offline_part).rows] == [1, 2, 3]


def test_an_evaluation_has_all_predictions_and_some_pictures(folders) -> None:
    (folder,) = offline(folders[0], "evaluate")
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in folder.glob("files/media/table/*.json")}
    assert set(tables) == {"predictions", "examples"}
    assert len(tables["predictions"]["data"]) == 300 and len(tables["examples"]["data"]) == EXAMPLES
    assert tables["examples"]["columns"][:3] == ["picture", "id", "kind"]
    # What is uploaded waits in the staging area: the table as the pages show it, and its pictures.
    staged = list((folders[0] / "runs/wandb/data/artifacts/staging").iterdir())
    uploads = [json.loads(path.read_text()) for path in staged if path.read_bytes()[:1] == b"{"]
    shown = next(upload for upload in uploads if upload.get("columns", [""])[0] == "picture")
    pictures = [row[0] for row in shown["data"]]
    assert all(picture["_type"] == "image-file" for picture in pictures) and len(pictures) == EXAMPLES
    assert {(picture["width"], picture["height"]) for picture in pictures} >= {(80, 80), (300, 200)}
    assert sum(path.read_bytes()[:4] == b"\x89PNG" for path in staged) >= EXAMPLES / 2
    kinds = [row[2] for row in tables["examples"]["data"]]
    assert kinds.count("colour") == kinds.count("count")
    (other,) = offline(folders[1], "evaluate")
    (path,) = other.glob("files/media/table/examples*.json")
    assert [row[1] for row in json.loads(path.read_text())["data"]] == [row[1] for row in tables["examples"]["data"]]
    told = next(folder.glob("*.wandb")).read_bytes()
    assert b"colour/accuracy_low" in told and b"evaluate" in told


def test_offline_runs_compare_as_their_files_do(folders) -> None:
    evaluations = [offline(folder, "evaluate")[0] for folder in folders]
    found = compare(read_runs(evaluations))
    from_files = compare(read_runs([folder / "reports/evaluation" for folder in folders]))
    (group,), (same,) = found.groups, from_files.groups
    assert group.name == "tracked (2 seeds)" and group.accuracy == same.accuracy and group.accuracy[ALL].seeds == 2
    trainings = compare(read_runs([offline(folder, "stage2")[-1] for folder in folders]))
    assert [(row.run, row.steps) for row in trainings.training] == [("tracked seed 1", 5), ("tracked seed 2", 5)]
    assert trainings.runs[0].about.code == "c0de" and not trainings.kinds


def test_logging_changes_no_file_of_the_evaluation(folders) -> None:
    assert {path.name for path in folders[0].iterdir()} == {
        "data", "metrics", "params.yaml", "reports", "runs", "state-1", "state-3",
    }  # fmt: skip
    assert {path.name for path in (folders[0] / "reports/evaluation").iterdir()} == {"predictions.jsonl"}


def test_a_damaged_or_empty_wandb_file_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "offline-run-20260101_000000-x"
    folder.mkdir()
    (folder / "run-x.wandb").write_bytes(b"no run at all")
    with pytest.raises(UserError, match="run-x.wandb|nothing to compare"):
        read_run(folder)
