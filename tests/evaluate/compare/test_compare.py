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
from haplovl.evaluate.compare.wandb_files import OfflineRun


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


@pytest.mark.parametrize("steps", [(2609, 2569, 2590), (1000, 1030, 1001)])
def test_seeds_with_nearly_equal_steps_are_one_recipe_and_that_is_said(steps, tmp_path: Path) -> None:
    """Equal compute gives every seed a number of steps of its own."""
    runs = [project(tmp_path / f"a{i}", 0.85, recipe="llava", seed=i, stage2__steps=n) for i, n in enumerate(steps)]
    runs += [project(tmp_path / f"b{i}", 0.86, recipe="other", seed=i, evaluate__batch=7 + i) for i in range(3)]
    comparison = compare(read_runs(runs))
    assert [group.name for group in comparison.groups] == ["llava (3 seeds)", "other (3 seeds)"]
    assert [run.path.name for run in comparison.runs] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert len([verdict for verdict in comparison.verdicts if verdict.kind == ALL]) == 1
    assert dict(comparison.settings)["stage2.steps"] == [", ".join(map(str, steps)), "1800"]
    (note,) = comparison.notes
    assert note.startswith(f"The seeds of llava are taken together although stage 2 has {min(steps)} to {max(steps)} ")


def test_grids_of_steps_and_seeds_are_a_recipe_for_each_number_of_steps(tmp_path: Path) -> None:
    grid = [(1200, 1), (2400, 1), (1210, 1), (1200, 2), (2400, 2), (1210, 2)]
    runs = [project(tmp_path / f"{n}-{seed}", 0.85, seed=seed, stage2__steps=n) for n, seed in grid]
    comparison = compare(read_runs(runs))
    assert [[run.path.name for run in group.runs] for group in comparison.groups] == [
        ["1200-1", "1200-2"], ["2400-1", "2400-2"], ["1210-1", "1210-2"],
    ]  # fmt: skip
    assert not comparison.notes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stage2__steps": 1860}, "stage2.steps differs"),
        ({"stage2__steps": 900, "model__class_token": True}, "model.class_token and stage2.steps differ"),
        ({"stage1__steps": 7, "model__class_token": True, "stage2__optimizer": {}, "teachers": {"vision": 1}}, " more"),
    ],
)
def test_why_seeds_are_not_taken_together_is_said(changes, reason, tmp_path: Path) -> None:
    runs = [project(tmp_path / "a", 0.85, seed=1), project(tmp_path / "b", 0.85, seed=2, **changes)]
    comparison = compare(read_runs(runs))
    assert [group.name for group in comparison.groups] == ["haplovl seed 1", "haplovl seed 2"]
    (note,) = (note for note in comparison.notes if "not taken together" in note)
    assert note.startswith("Runs of haplovl with different seeds are not taken together, because ") and reason in note


def test_seeds_of_other_code_or_twice_are_not_taken_together(tmp_path: Path) -> None:
    a, b = (project(tmp_path / name, 0.85, seed=seed) for name, seed in (("a", 1), ("b", 2)))
    path = next((b / "runs/training").iterdir()) / "run.json"
    path.write_text(path.read_text().replace("c" * 64, "e" * 64))
    assert "because the code differs." in " ".join(compare(read_runs([a, b])).notes)
    again = project(tmp_path / "again", 0.85, seed=1)
    again_b = project(tmp_path / "b2", 0.85, seed=2)
    found = compare(read_runs([a, again, again_b]))
    assert len(found.groups) == 3 and "because a seed is there twice." in " ".join(found.notes)


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


def test_a_retrained_model_is_not_shown_beside_an_older_evaluation(tmp_path: Path) -> None:
    a, b = (project(tmp_path / name, 0.9, recipe=name) for name in ("a", "b"))
    write_lines(b / "models/stage2/training_log.jsonl", log_rows(40, 0.1, measured=False))
    (b / "params.yaml").write_text(json.dumps(settings(recipe="newer", seed=99)))
    comparison = compare(read_runs([a, b]))
    assert [set(run.logs) for run in comparison.runs] == [{"stage1", "stage2"}, {"stage1"}]
    assert [(row.run, row.stage) for row in comparison.training] == [
        ("a seed 17", "stage1"), ("a seed 17", "stage2"), ("b seed 17", "stage1"),
    ]  # fmt: skip
    assert comparison.verdicts  # the accuracies are those of the evaluation, whose settings are shown
    (note,) = (note for note in comparison.notes if "another model" in note)
    assert note.startswith(f"{b / 'models/stage2'} is another model than the one that {b / 'reports/evaluation'} is of")
    model = read_run(b / "models/stage2")  # is no longer what the evaluation tells of
    assert (model.about.recipe, model.about.seed) == ("newer", 99)


def test_an_evaluation_of_an_older_version_is_read_and_not_taken_as_checked(tmp_path: Path) -> None:
    for name in ("a", "b"):
        path = project(tmp_path / name, 0.9, recipe=name) / "reports/evaluation/run.json"
        told = json.loads(path.read_text())
        del told["models"]
        path.write_text(json.dumps(told))
    comparison = compare(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert all(set(run.logs) == {"stage1", "stage2"} for run in comparison.runs)
    assert sum("whether the losses are of these very models is not checked" in note for note in comparison.notes) == 1


def test_a_model_elsewhere_takes_nothing_from_what_lies_around_it(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("a", "b"):
        folder = project(tmp_path / name, 0.9, recipe=name)
        shutil.copytree(folder / "models/stage1", folder / "kept/first")
        (folder / "kept/first/heads.safetensors").touch()
        shutil.copytree(folder / "models/stage2", folder / "kept/second")
        shutil.copytree(folder / "reports/evaluation", folder / "kept/answers")
        (folder / "kept/answers/run.json").unlink()
        stages = {path: set(read_run(folder / "kept" / path).logs) for path in ("first", "second", "answers")}
        assert stages == {"first": {"stage1"}, "second": {"training"}, "answers": set()}
        for path in stages:
            about = read_run(folder / "kept" / path).about
            assert (about.recipe, about.seed, about.settings) == ("", None, {})
    assert command(monkeypatch, "a/kept/second", "b/kept/second") == ""
    assert capsys.readouterr().out.count(" unknown ") >= 4  # recipe and seed of both
    monkeypatch.chdir(tmp_path / "a/models/stage2")
    assert read_run(Path(".")).about.recipe == "a" and set(read_run(Path(".")).logs) == {"stage2"}


def test_a_model_is_what_its_own_training_says(tmp_path: Path) -> None:
    folder = project(tmp_path / "p", 0.9)
    (folder / "reports/evaluation/run.json").write_text(json.dumps({"recipe": "of another", "params": {}}))
    assert read_run(folder / "models/stage2").about.recipe == "haplovl"


def test_a_table_of_wandb_that_was_cut_off_is_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "run-x.wandb").touch()
    for asked in (300, 12_000):
        logged = OfflineRun({"stage": "evaluate", "questions": {"asked": asked}}, [], predictions(0.9))
        monkeypatch.setattr("haplovl.evaluate.compare.runs.read_offline_run", lambda _, logged=logged: logged)
        if asked == 300:
            assert len(read_run(tmp_path).answers.answers) == 300
    with pytest.raises(UserError, match="holds 300 of 12000 answers"):
        read_run(tmp_path)


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


def test_losses_against_other_teachers_are_marked(tmp_path: Path) -> None:
    runs = [project(tmp_path / "a", 0.9, recipe="a", stage1__objective="distillation")]
    runs.append(project(tmp_path / "b", 0.9, recipe="b", stage1__objective="distillation"))
    path = runs[1] / "reports/evaluation/run.json"
    told = json.loads(path.read_text())
    told["params"]["teachers"] = {"vision": {"kind": "hub", "id": "openai/clip"}, "language": {"kind": "x"}}
    path.write_text(json.dumps(told))
    (note,) = (note for note in compare(read_runs(runs)).notes if note.startswith("Losses of stage"))
    assert note.startswith("Losses of stage1") and "teachers.vision" in note and "teachers.language" in note


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
        ("p", "p/reports/evaluation"): "p and p/reports/evaluation are the same run",
        ("p/models/stage2", str(state)): f"p/models/stage2 and {state} are the same run",
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


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("reports/evaluation/run.json", "[1]", "run.json: expected a JSON object, found list"),
        ("reports/evaluation/run.json", '{"params": null}', "'params': expected a JSON object, found NoneType"),
        ("reports/evaluation/run.json", '{"code": [1]}', "'code': expected a JSON object, found list"),
        ("reports/evaluation/run.json", '{"seed": [1]}', "run.json: 'seed' is [1]"),
        ("models/stage2/training_log.jsonl", '{"step": Infinity, "loss": 1}\n', "line 1: no row of a training log"),
        (
            "models/stage2/training_log.jsonl",
            '{"step": 1, "loss": 1, "validation_loss": "x"}\n{"step": 2, "loss": 1}\n',
            "line 1: no row of a training log",
        ),
        ("models/stage2/training_log.jsonl", "\udcff", "training_log.jsonl is not UTF-8 text"),
    ],
)
def test_damaged_files_are_refused_by_name(file, text, said, tmp_path: Path, monkeypatch) -> None:
    project(tmp_path / "p", 0.9)
    project(tmp_path / "q", 0.8)
    (tmp_path / "q" / file).write_text(text, errors="surrogateescape")
    message = command(monkeypatch, "p", "q")
    assert message.startswith("error: q/") and said in message and "\n" not in message, message


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


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    message = command(monkeypatch, "no", "runs", "--html", "folder")
    assert message == "error: --html names a file to write, and folder is a folder"
    message = command(monkeypatch, "no", "runs", "--html", "file/page.html")
    assert message.startswith("error: file/page.html cannot be written: ") and message.endswith("/file is no folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"] and not capsys.readouterr().out


def test_a_pipe_gets_every_row_as_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("COLUMNS")
    names = [f"{letter * 90}" for letter in "ab"]
    for name in names:
        project(tmp_path / name, 0.8, recipe=name)
    show([tmp_path / name for name in names])
    told = capsys.readouterr().out
    assert f"{names[1]} seed 17 − {names[0]} seed 17" in told
    assert all(f"{name} seed 17   {name}" in told for name in names)


def test_comparing_needs_no_torch() -> None:
    code = "import sys, haplovl.evaluate.compare.show, haplovl.evaluate.compare.page; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
