"""The whole stage on a tiny untrained model: its files, their agreement, and the same bytes twice."""

import json
import shutil
from pathlib import Path

import pytest
from noise import noise
from rich.console import Console

from haplovl.data.scenes import SceneMaker
from haplovl.data.validated import ImageFile, ValidatedRecord, write_validated
from haplovl.errors import UserError
from haplovl.evaluate.looks import RIGHT, WRONG
from haplovl.evaluate.runner import evaluate, summary_table
from haplovl.files import sha256_of, sha256_of_folder
from haplovl.records import IMAGE_PLACEHOLDER, Record, Turn
from haplovl.settings import Params, load_params

PARAMS_FILE = Path(__file__).parents[2] / "params.yaml"


@pytest.fixture
def params() -> Params:
    params = load_params(PARAMS_FILE)
    settings = params.evaluate.model_copy(update={"questions_per_type": 6, "max_new_tokens": 3, "batch": 7})
    return params.model_copy(update={"evaluate": settings})


def scene_rows(images: Path, records: int) -> list[ValidatedRecord]:
    maker, rows = SceneMaker("test", seed=1, image_size=32), []
    for number in range(records):
        scene = maker.scene()
        path = f"test/{number}.png"
        maker.draw(scene).save(images / path)
        first, *rest = maker.picture_turns(scene, 4)
        turns = (Turn(f"{IMAGE_PLACEHOLDER}\n{first.question}", first.answer, first.kind), *rest)
        record = Record(f"test-{number}", (f"file:{path}",), turns, "test")
        rows.append(ValidatedRecord(record, (ImageFile(f"file:{path}", sha256_of(images / path), 32, 32),), "scenes"))
    return rows


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: Path) -> Path:
    images = tmp_path / "data/raw/scenes/media"
    (images / "test").mkdir(parents=True)
    (tmp_path / "data/validated").mkdir()
    write_validated(tmp_path / "data/validated", scene_rows(images, 12))
    shutil.copytree(tiny_model_dir, tmp_path / "models/stage2")
    return tmp_path


def outputs(project: Path) -> dict[str, bytes]:
    paths = [*(project / "reports").rglob("*"), *(project / "metrics").rglob("*")]
    return {path.relative_to(project).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def test_evaluate_writes_metrics_predictions_and_report(project: Path, params: Params, capsys) -> None:
    evaluate(params, project)
    first = outputs(project)
    assert set(first) == {
        "metrics/evaluation.json",
        "reports/evaluation/index.html",
        "reports/evaluation/predictions.jsonl",
        "reports/evaluation/run.json",
    }
    metrics = json.loads(first["metrics/evaluation.json"])
    rows = [json.loads(line) for line in first["reports/evaluation/predictions.jsonl"].decode().splitlines()]
    assert metrics["questions"] == metrics["n"] == len(rows) == sum(t["n"] for t in metrics["types"].values())
    assert metrics["accuracy"] == round(sum(row["correct"] for row in rows) / len(rows), 4)
    assert 0 <= metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"] < 1
    told = json.loads(first["reports/evaluation/run.json"])
    assert told["recipe"] == params.recipe
    assert told["models"] == {"stage2": sha256_of_folder(project / "models/stage2")}
    assert all(0 < t["n"] <= 6 for t in metrics["types"].values())
    assert {"colour", "digit", "position", "count", "presence"} == set(metrics["types"])
    assert "Held-out questions" in capsys.readouterr().out
    page = first["reports/evaluation/index.html"].decode()
    assert 1 <= page.count('<div class="panel scroll look">') <= RIGHT + WRONG
    assert all(len(row["images"]) == len(row["image_sha256"]) > 0 and row["source"] == "scenes" for row in rows)

    evaluate(params, project)
    assert outputs(project) == first
    assert not any(str(project).encode() in content for content in first.values())


def test_the_blanked_answers_do_not_depend_on_the_pictures(project: Path, params: Params, monkeypatch) -> None:
    monkeypatch.setattr("haplovl.evaluate.looks.RIGHT", 0)  # figures take longer than tiny answers
    monkeypatch.setattr("haplovl.evaluate.looks.WRONG", 1)
    evaluate(params, project)
    before = predictions(project)
    for seed, path in enumerate((project / "data/raw/scenes/media/test").iterdir()):
        noise(32, 32, seed).save(path)
    evaluate(params, project)
    after = predictions(project)
    assert [row["blank_prediction"] for row in after] == [row["blank_prediction"] for row in before]
    assert [row["confidence"] for row in after] != [row["confidence"] for row in before]


def predictions(project: Path) -> list[dict]:
    text = (project / "reports/evaluation/predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_types_are_no_markup(capsys) -> None:
    shares = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "majority", "blank_image", "margin"), 0.5)
    Console().print(summary_table({**shares, "n": 1, "types": {"[/x]": {**shares, "n": 1}}}))
    assert "[/x]" in capsys.readouterr().out


def test_missing_inputs_are_named(project: Path, params: Params) -> None:
    write_validated(project / "data/validated", [])
    with pytest.raises(UserError, match="no questions about pictures"):
        evaluate(params, project)
    shutil.rmtree(project / "models/stage2")
    with pytest.raises(UserError, match="haplovl train stage2"):
        evaluate(params, project)
    shutil.rmtree(project / "data/validated")
    with pytest.raises(UserError, match="haplovl validate"):
        evaluate(params, project)
