"""Runs of every kind are read and compared, and nothing that looks right is said about what cannot be compared."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import log_rows, predictions, project, settings, write_lines

from haplovl import cli
from haplovl.errors import UserError
from haplovl.evaluate.compare.comparison import ALL, UNSET, compare
from haplovl.evaluate.compare.runs import read_run, read_runs
from haplovl.evaluate.compare.show import show


@pytest.fixture(autouse=True)
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no table wraps, and a folder of the test's own."""
    monkeypatch.setenv("COLUMNS", "260")
    monkeypatch.chdir(tmp_path)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """Runs `haplovl compare`; the message of an error that ends it, else nothing."""
    monkeypatch.setattr(sys, "argv", ["haplovl", "compare", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return "" if ended.value.code in (0, None) else str(ended.value.code)


# --- what is shown ---------------------------------------------------------------------------------------------------
def test_two_projects_are_compared_in_everything(tmp_path: Path, monkeypatch, capsys) -> None:
    project(tmp_path / "old", 0.70, level=2.0)
    project(tmp_path / "new", 0.95, recipe="wider", stage2__steps=900, model__class_token=True)
    assert command(monkeypatch, "old", "new", "--html", "page.html") == ""
    told = capsys.readouterr().out
    parts = ["haplovl seed 17", "wider seed 17", "dddddddddd", "cccccccccc", "1234567890+", "stage2.steps", "1800"]
    for part in [*parts, "900", "model.class_token", "true", "2,001", "0.05", "0.02", "real", "The page is page.html"]:
        assert part in told, part
    assert "stage1.steps" not in told and "teachers" not in told
    assert "One seed of haplovl seed 17, wider seed 17" in told
    comparison = compare(read_runs([tmp_path / "old", tmp_path / "new"]))
    assert [name for name, _ in comparison.settings] == ["model.class_token", "stage2.steps"]
    by_kind = {verdict.kind: verdict for verdict in comparison.verdicts}
    assert set(by_kind) == {"colour", "count", ALL}
    old, new = (group.accuracy[ALL] for group in comparison.groups)
    assert by_kind[ALL].difference.mean == pytest.approx(new.mean - old.mean) and new.mean > old.mean + 0.15
    assert by_kind[ALL].real and by_kind[ALL].name == "wider seed 17"
    assert old.low < old.mean < old.high and old.questions == 300
    losses = {(row.run, row.stage): row for row in comparison.training}
    figures = losses["haplovl seed 17", "stage2"]
    assert (figures.steps, figures.validation_loss, figures.tokens_per_s) == (40, 2.2, 2001.0)
    assert figures.loss == pytest.approx(2 * (1 + 9 / 39.5), rel=1e-3)  # the last two of forty steps
    assert figures.hours == pytest.approx(40 * 1.8 / 3600)
    assert losses["haplovl seed 17", "stage1"].tokens_per_s is None  # its state folder is gone


def test_runs_that_differ_in_their_seed_only_are_one_recipe(tmp_path: Path) -> None:
    runs = [project(tmp_path / f"a{seed}", 0.85, seed=seed) for seed in (1, 2, 3)]
    runs += [project(tmp_path / f"b{seed}", 0.86, recipe="other", seed=seed) for seed in (1, 2, 3)]
    comparison = compare(read_runs(runs))
    assert [group.name for group in comparison.groups] == ["haplovl (3 seeds)", "other (3 seeds)"]
    assert [len(group.runs) for group in comparison.groups] == [3, 3]
    overall = next(verdict for verdict in comparison.verdicts if verdict.kind == ALL)
    assert overall.difference.seeds == (3, 3) and not overall.real and overall.words == "within noise"
    assert comparison.groups[0].accuracy[ALL].seeds == 3
    assert not comparison.settings and not comparison.notes


def test_the_same_seed_twice_is_no_second_seed(tmp_path: Path) -> None:
    comparison = compare(read_runs([project(tmp_path / "before", 0.85), project(tmp_path / "after", 0.85)]))
    assert [group.name for group in comparison.groups] == ["haplovl seed 17 (before)", "haplovl seed 17 (after)"]
    assert all(verdict.p_value == 1.0 for verdict in comparison.verdicts)


def test_p_values_are_adjusted_for_the_number_of_comparisons(tmp_path: Path) -> None:
    runs = [project(tmp_path / name, accuracy, recipe=name) for name, accuracy in (("a", 0.8), ("b", 0.86), ("c", 0.9))]
    comparison = compare(read_runs(runs))
    overall = [verdict for verdict in comparison.verdicts if verdict.kind == ALL]
    assert [(v.name, v.other) for v in overall] == [(f"{x} seed 17", f"{y} seed 17") for x, y in ("ba", "ca", "cb")]
    smallest = min(overall, key=lambda verdict: verdict.difference.p_value)
    assert smallest.p_value == pytest.approx(3 * smallest.difference.p_value)
    assert all(verdict.p_value >= verdict.difference.p_value for verdict in comparison.verdicts)


# --- kinds of runs ---------------------------------------------------------------------------------------------------
def test_every_kind_of_folder_and_its_files_are_read(tmp_path: Path) -> None:
    folder = project(tmp_path / "p", 0.9)
    state = next((folder / "runs/training").iterdir())
    kinds = {
        folder: ({"stage1", "stage2"}, True),
        folder / "reports/evaluation": (set(), True),
        folder / "models/stage2": ({"stage2"}, False),
        state: ({"stage2"}, False),
    }
    for path, (stages, answered) in kinds.items():
        run = read_run(path)
        assert (set(run.logs), run.answers is not None) == (stages, answered), path
        assert (run.about.recipe, run.about.seed) == ("haplovl", 17), path
        assert run.about.settings["stage2.optimizer.learning_rate"] == 8e-4, path
    assert read_run(folder / "reports/evaluation/predictions.jsonl").answers is not None
    assert read_run(state / "log.jsonl").about == read_run(state).about
    assert read_run(folder / "params.yaml").path == folder


def test_a_run_in_progress_may_be_looked_at(tmp_path: Path) -> None:
    for name in ("a", "b"):
        path = write_lines(tmp_path / f"runs/training/stage2-{name}/log.jsonl", log_rows(10))
        with path.open("a") as file:
            file.write('{"step": 11, "lo')  # being written
    comparison = compare(read_runs(sorted((tmp_path / "runs/training").iterdir())))
    assert [(row.run, row.steps) for row in comparison.training] == [("stage2-a", 10), ("stage2-b", 10)]


def test_settings_of_other_code_stand_as_they_are(tmp_path: Path) -> None:
    for name, extra in (("a", {}), ("b", {"dropout": 0.5})):
        folder = project(tmp_path / name, 0.9, recipe=name)
        (folder / "reports/evaluation/run.json").unlink()
        content = settings(recipe=name)
        content["model"] |= extra
        (folder / "params.yaml").write_text(json.dumps(content))
    found = dict(compare(read_runs([tmp_path / "a", tmp_path / "b"])).settings)
    assert found["model.dropout"] == [UNSET, "0.5"]


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"question": "What else?"}, "its words"),
        ({"answer": "green"}, "its right answer"),
        ({"image_sha256": ["f" * 64]}, "the content of its pictures"),
        ({"id": "unheard-of#0"}, "1 only"),
    ],
)
def test_accuracies_on_different_test_data_are_refused(changed, named, tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("a", "b"):
        project(tmp_path / name, 0.9, recipe=name)
    write_lines(tmp_path / "b/reports/evaluation/predictions.jsonl", predictions(0.7, **changed))
    message = command(monkeypatch, "a", "b", "--html", "page.html")
    told = capsys.readouterr().out
    assert message.startswith("error: accuracies are not compared: ") and named in message, message
    assert "predictions.jsonl" in message and message.count("\n") == 0
    page = (tmp_path / "page.html").read_text()
    assert "Accuracies are not compared" in page
    for shown in (told, page):
        assert "Exact match, with" not in shown and "within noise" not in shown and "(0." not in shown
        assert "stage2" in shown  # losses may still be looked at


def test_losses_of_different_data_are_marked(tmp_path: Path) -> None:
    a, b = (project(tmp_path / name, 0.9, recipe=name) for name in ("a", "b"))
    told = json.loads((b / "reports/evaluation/run.json").read_text())
    told["data"]["manifest_sha256"] = "e" * 64
    told["params"]["stage2"]["mixture"]["text"] = 0.0
    (b / "reports/evaluation/run.json").write_text(json.dumps(told))
    notes = " ".join(compare(read_runs([a, b])).notes)
    assert "Losses of stage1 are of different tasks (the training data differ)" in notes
    assert "Losses of stage2 are of different tasks (the training data, stage2.mixture.text differ)" in notes


def test_what_is_no_run_is_told_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    folder = project(tmp_path / "p", 0.9)
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "fresh").mkdir()
    shutil.copy(folder / "params.yaml", tmp_path / "fresh")
    (tmp_path / "notes.txt").write_text("no run")
    write_lines(tmp_path / "torn/log.jsonl", log_rows(3)).write_text('{"step": 1}\n{"step": 2, "loss": 1}\n')
    state = next((folder / "runs/training").iterdir())
    cases = {
        ("p",): "a comparison needs two runs or more, and there is one",
        ("p", "p"): "p is given twice",
        ("p", "p/params.yaml"): "p and p/params.yaml are the same run",
        ("p", "nowhere"): "there is no run at nowhere",
        ("p", "empty"): "empty holds no run: give the folder of a project",
        ("p", "notes.txt"): "notes.txt is no run: give",
        ("p", "fresh"): "fresh has nothing to compare yet: it holds no trained model and no evaluation",
        ("p", "torn"): "torn/log.jsonl, line 1: no row of a training log",
        (
            "p/reports/evaluation",
            str(state),
        ): "nothing in these runs can be compared: p/reports/evaluation holds answers",
    }
    for words, expected in cases.items():
        message = command(monkeypatch, *words)
        assert message.startswith(f"error: {expected}") and "\n" not in message, (words, message)


def test_predictions_of_an_older_version_are_refused_by_name(tmp_path: Path) -> None:
    rows = predictions(0.9)
    for row in rows:
        del row["image_sha256"]
    write_lines(tmp_path / "predictions.jsonl", rows)
    with pytest.raises(UserError, match="'image_sha256' is missing; 'haplovl evaluate' writes it"):
        read_run(tmp_path)


# --- the page --------------------------------------------------------------------------------------------------------
def test_the_page_needs_nothing_but_itself_and_trusts_no_text(tmp_path: Path, capsys) -> None:
    hostile = "<script>alert('x')</script>[bold]$x_1$"
    for name, recipe in (("a", hostile), ("b", "_other")):
        project(tmp_path / name, 0.8, recipe=recipe)
    show([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html")
    assert hostile in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert len(references) == 3 and all(reference.startswith("data:image/svg+xml;base64,") for reference in references)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    show([tmp_path / "a", tmp_path / "b"], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()


def test_comparing_needs_no_torch() -> None:
    code = "import sys, haplovl.evaluate.compare.show, haplovl.evaluate.compare.page; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
