"""The comparison's report, from runs as they lie on disk after training and evaluation."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from made_runs import predictions, write_lines

from haplovl.comparison.recipes import load_recipe, write_params
from haplovl.comparison.runs import Run
from haplovl.strict import SettingsError

REPO = Path(__file__).resolve().parents[1]
RECIPES = ["haplovl", "llava", "solo"]
TERA = 1e12
STEPS = 100
"""Of each stage: one is less than what a run may miss."""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with finished runs of three recipes, two seeds each, on equal terms."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPO / "recipes", "recipes")
    shutil.copy(REPO / "params.yaml", "params.yaml")
    configure(recipes=RECIPES, samples=["llava"], ablations=["class-token"], seeds=[1, 2])
    (tmp_path / "models/teachers").mkdir(parents=True)
    flops = {"training_flops": 2 * TERA}
    Path("models/teachers/teachers.json").write_text(json.dumps({"vision": flops, "language": flops}))
    for recipe in RECIPES:
        for seed in (1, 2):
            made(Run("compute", recipe, seed))
    return tmp_path


def configure(**changes):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["compare"] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(params))


def made(run, flops=10 * TERA, records=1000, accuracy=0.7, digest="q"):
    """What a run leaves behind: `flops` and `records` of both stages."""
    write_params(load_recipe(run.recipe_file, run.seed), run.folder / "params.yaml")
    for stage, share in (("stage1", 0.1), ("stage2", 0.9)):
        each = {"loss": 1.0, "flops": share * flops / STEPS, "records": share * records / STEPS, "validation_loss": 0.5}
        rows = [{"step": step, **each} for step in range(1, STEPS + 1)]
        write_lines(run.folder / f"models/{stage}/training_log.jsonl", rows)
    write_lines(run.folder / "reports/evaluation/predictions.jsonl", predictions(accuracy, run.seed))
    (run.folder / "metrics").mkdir(exist_ok=True)
    (run.folder / "metrics/evaluation.json").write_text(json.dumps({"data": {"sha256": digest}}))


def report(*groups):
    """Standard output, or what the command said when it failed, wrapped or not."""
    command = [sys.executable, "-m", "haplovl", "comparison", "report", *groups]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def shown(group):
    with open("reports/comparison/summary.csv") as file:
        return {row["recipe"] for row in csv.DictReader(file) if row["group"] == group}


def test_runs_on_equal_terms_are_compared_and_teachers_counted(project):
    code, said = report()
    assert code == 0 and "left out" not in said, said
    assert shown("compute") == set(RECIPES)
    tables = Path("reports/comparison/tables.md").read_text()
    assert "| `llava` |" in tables and "| 10.0 | 14.0 |" in tables  # both stages; and with two teachers
    assert next(line for line in tables.splitlines() if "`solo`" in line).count("| 12.0 |")  # it has one teacher


@pytest.mark.parametrize(
    ("group", "changes", "reason"),
    [
        ("compute", {"flops": 11 * TERA}, "took 11.0 TFLOP where the reference took 10.0 TFLOP"),
        ("samples", {"records": 1100}, "took 1,100 records where the reference took 1,000 records"),
        ("ablations", {"flops": 9.7 * TERA}, "took 9.7 TFLOP where the reference took 10.0 TFLOP"),
    ],
)
def test_a_run_with_another_budget_is_left_out_by_name(group, changes, reason, project):
    recipe = {"compute": "llava", "samples": "llava", "ablations": "class-token"}[group]
    made(Run(group, recipe, 1), **({"flops": 3 * TERA} if group == "samples" else {}))
    made(Run(group, recipe, 2), **changes)
    code, said = report()
    assert code == 0 and f"left out: comparison/{group}/{recipe}-2 {reason}" in said, said
    assert reason in Path("reports/comparison/index.html").read_text()
    assert recipe in shown(group)  # by its other seed
    assert f"comparison/{group}/{recipe}-1" not in said


def test_a_run_trained_with_other_settings_is_left_out_and_a_reference_refused(project):
    recipe = yaml.safe_load(Path("recipes/solo.yaml").read_text())
    recipe["stage1"]["steps"] = 900
    Path("recipes/solo.yaml").write_text(yaml.safe_dump(recipe))
    code, said = report()
    reason = "was trained with stage1.steps 800, its recipe says 900 now"
    assert code == 0 and all(f"left out: comparison/compute/solo-{seed} {reason}" in said for seed in (1, 2)), said
    assert shown("compute") == {"haplovl", "llava"}
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["model"]["class_token"] = True
    Path("params.yaml").write_text(yaml.safe_dump(params))
    code, said = report()
    assert code == 1 and "model.class_token False, its recipe says True now; 'make compare' trains it again" in said


def test_a_reference_with_another_number_of_steps_is_no_budget(project):
    configure(changes={**yaml.safe_load(Path("params.yaml").read_text())["compare"]["changes"], "stage2": {"steps": 7}})
    code, said = report()
    assert code == 1 and "its recipe says 7 now; 'make compare' trains it again" in said, said


def test_runs_that_answered_other_questions_are_refused(project):
    made(Run("compute", "llava", 2), digest="other")
    code, said = report()
    assert code == 1 and "were tested on different questions" in said, said


def test_tables_of_a_document_are_brought_up_to_date_and_its_words_stay(project):
    document = Path("results.md")
    document.write_text("# Found\n\n<!-- tables: compute -->\nold\n<!-- end of tables -->\n\nWords.\n")
    code, said = report("compute", "--into", "results.md")
    assert code == 0 and "Its tables are in results.md" in said, said
    tables = Path("reports/comparison/tables.md").read_text().removeprefix("## Equal compute\n\n")
    head, foot = "# Found\n\n<!-- tables: compute -->\n", "<!-- end of tables -->\n\nWords.\n"
    assert document.read_text() == f"{head}{tables}{foot}" and "| `llava` |" in tables
    document.write_text("<!-- tables: samples -->\n<!-- end of tables -->")
    code, said = report("compute", "--into", "results.md")
    assert code == 1 and "results.md wants the tables of 'samples', of which no run is finished" in said, said
    document.write_text("no marks")
    code, said = report("compute", "--into", "results.md")
    assert code == 1 and "results.md has no lines '<!-- tables: compute -->'" in said, said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{**row, "id": f"z{row['id']}"} for row in rows], "answer different questions: 300 only"),
        (lambda rows: rows[:-1], "answer different questions: 1 only"),
        (lambda rows: [{**rows[0], "kind": "count"}, *rows[1:]], "1 of 300 questions differ, such as 'colour-000#0'"),
        (lambda rows: [], "holds no predictions"),
        (lambda rows: [{**rows[0], "prediction": None}, *rows[1:]], "line 1: 'prediction' is missing"),
    ],
)
def test_answers_that_the_metrics_are_not_of_are_refused(change, message, project):
    """A kill between both files, or an edit, must not give a number."""
    run = Run("compute", "llava", 2)
    write_lines(run.folder / "reports/evaluation/predictions.jsonl", change(predictions(0.7, run.seed)))
    code, said = report()
    assert code == 1 and message in said, said


def test_metrics_that_do_not_name_their_questions_are_refused(project):
    Path("comparison/compute/llava-2/metrics/evaluation.json").write_text("{}")
    code, said = report()
    assert code == 1 and "does not say which questions it is of" in said, said


def test_every_recipe_is_in_a_chart_however_many_there_are(project):
    names = [path.stem for path in sorted(Path("recipes/ablations").glob("*.yaml"))]
    configure(ablations=names)
    for name in names:
        for seed in (1, 2):
            made(Run("ablations", name, seed))
    code, said = report("ablations")
    assert code == 0 and len(names) > 14, said
    page = Path("reports/comparison/index.html").read_text()
    panels = -(-len(names) // 7)
    assert page.count('alt="Exact match by') == page.count('alt="Held-out loss against operations spent"') == panels


def test_sizes_of_single_recipes_follow_from_params(project):
    configure(recipe_changes={"solo": {"stage1": {"steps": 4000}}, "class-token": {"stage2": {"steps": 7}}})
    assert load_recipe("solo").stage1.steps == 4000
    assert load_recipe("ablations/class-token").stage2.steps == 7
    assert load_recipe("llava").stage1.steps == 200
    configure(recipe_changes={"sola": {}})
    with pytest.raises(SettingsError, match="recipe_changes names 'sola', which is no recipe"):
        load_recipe("llava")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipes": ["haplovl", "lava"]}, "no recipe 'lava'; did you mean 'llava'?"),
        ({"ablations": ["class-tokens"]}, "did you mean 'ablations/class-token'?"),
        ({"seeds": [1, 1]}, "names 1 twice"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_before_anything_runs(changes, words, project):
    configure(**changes)
    shutil.copytree(REPO / "infra", "infra")
    what = "ablations" if "ablations" in changes else "compare"
    command = [sys.executable, "-m", "flows.compare", what]
    environment = {"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin", "HOME": str(project)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and words in done.stderr, done.stderr[-2000:]
