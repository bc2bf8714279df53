"""The whole pipeline on a small recipe: the flow in one clone, `dvc repro` in another, the same dvc.lock."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SMALL = {
    "collect.sources.0": {"train_records": 400, "validation_records": 20, "test_records": 60},
    "teachers.vision": {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "steps": 4, "batch": 16},
    "teachers.language": {"vocabulary": 400, "hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2,
                          "steps": 4, "batch": 8},
    "stage1": {"steps": 4},
    "stage2": {"steps": 4, "curriculum": [{"share": 0.6, "epochs": 1}]},
    "probe": {"records": 20, "zero_shot_pictures": 60, "fit_pictures": 60},
    "evaluate": {"questions_per_type": 10},
    "register": {"min_accuracy": 0.0, "min_margin": -1.0},
    "compare": {"changes": {}, "recipes": ["haplovl", "solo"], "samples": [], "ablations": ["text-connector"],
                "seeds": [17]},
}  # fmt: skip
STAGES = ["collect", "validate", "teachers", "prepare", "stage1", "probe", "stage2", "evaluate", "register"]


def run(command: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # No git identity, no W&B key, no Prefect server: what a new user has.
    env = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    for name in ("WANDB_API_KEY", "WANDB_MODE", "PREFECT_API_URL"):
        env.pop(name, None)
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    done.stdout += done.stderr
    return done


def clone(source: Path, target: Path) -> Path:
    """A fresh clone of the working tree as it is, with the small recipe committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=source, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
    params = yaml.safe_load((target / "params.yaml").read_text())
    for place, values in SMALL.items():
        section = params
        for part in place.split("."):
            section = section[int(part) if part.isdigit() else part]
        section.update(values)
    (target / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    solo = yaml.safe_load((target / "recipes/solo.yaml").read_text())
    solo["stage1"] |= {"steps": 3, "curriculum": []}
    (target / "recipes/solo.yaml").write_text(yaml.safe_dump(solo))
    for words in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "small"],
    ):
        assert run(["git", *words], target).returncode == 0
    return target


@pytest.fixture(scope="module")
def flow_clone(tmp_path_factory, request):
    """A clone after its first flow."""
    root = clone(request.config.rootpath, tmp_path_factory.mktemp("flow"))
    done = run([sys.executable, "-m", "flows.pipeline"], root)
    assert done.returncode == 0, done.stdout[-4000:]
    return root, done.stdout


def test_the_flow_ends_with_a_summary_and_a_version(flow_clone):
    root, output = flow_clone
    assert "9 stages run, 0 cached" in output
    assert (root / "reports/stage1/index.html").is_file() and (root / "metrics/stage1.json").is_file()
    assert "reports/evaluation/index.html" in output and (root / "reports/evaluation/index.html").is_file()
    assert re.search(r"version\s+haplovl@?v?0\.\d\.\d|v0\.\d\.\d", output), output[-1500:]
    tags = run(["git", "tag"], root).stdout.split()
    assert len(tags) == 1 and tags[0].startswith("haplovl@")
    changed = run(["git", "show", "--stat", "--format=", "HEAD"], root).stdout
    assert "dvc.lock" in changed and "lineage.json" in changed and "2 files changed" in changed
    assert run(["git", "status", "--porcelain"], root).stdout == ""
    metrics = json.loads((root / "metrics/evaluation.json").read_text())
    assert set(metrics["types"]) == {"digit", "colour", "position", "count", "presence", "comparison"}
    assert all({"accuracy", "majority", "blank_image", "n"} <= set(t) for t in metrics["types"].values())


def test_the_printed_command_asks_the_model(flow_clone):
    root, output = flow_clone
    command = next(line for line in output.splitlines() if "haplovl ask" in line).split("ask it", 1)[1].strip()
    done = run(["sh", "-c", command.replace(".venv/bin/haplovl", "haplovl")], root)
    assert done.returncode == 0, done.stdout


def test_dvc_repro_in_a_second_clone_gives_the_same_lock(flow_clone, tmp_path_factory, request):
    root = clone(request.config.rootpath, tmp_path_factory.mktemp("repro"))
    done = run([sys.executable, "-m", "dvc", "repro"], root)
    assert done.returncode == 0, done.stdout[-4000:]
    ours, theirs = ((folder / "dvc.lock").read_text() for folder in (root, flow_clone[0]))
    assert ours.count("md5") > 30
    assert ours == theirs


def test_a_second_flow_finds_everything_cached_and_makes_no_version(flow_clone):
    root, _ = flow_clone
    done = run([sys.executable, "-m", "flows.pipeline"], root)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "0 stages run, 9 cached" in done.stdout
    assert all(re.search(rf"'?{name}'?.*Cached", done.stdout) for name in STAGES), done.stdout
    assert len(run(["git", "tag"], root).stdout.split()) == 1


def test_a_stage_of_the_version_comes_out_again(flow_clone):
    root, _ = flow_clone
    done = run(["haplovl", "reproduce", "v0.0.1", "--stage", "validate", "--stage", "prepare"], root)
    assert done.returncode == 0 and "6 of 6 outs are as recorded" in done.stdout, done.stdout[-4000:]
    told = json.loads(run(["haplovl", "lineage", "v0.0.1", "--json"], root).stdout)
    assert [place["world_size"] for name in ("stage1", "stage2") for place in told["training"][name]["places"]] == [
        1,
        1,
    ]
    assert set(told["wandb"]) == {"stage1", "stage2", "evaluate", "publish"} and told["missing"] == []
    assert run(["git", "worktree", "list"], root).stdout.count("\n") == 1


def test_an_edited_recipe_reruns_only_what_depends_on_it(flow_clone):
    root, _ = flow_clone
    path = root / "params.yaml"
    path.write_text(path.read_text().replace("min_accuracy: 0.0", "min_accuracy: 0.99"))
    done = run([sys.executable, "-m", "dvc", "status", "--json"], root)
    changed = set(json.loads(done.stdout[done.stdout.index("{") :].splitlines()[0]))
    assert {name for name in changed if not name.startswith("comparison/")} == {"register"}


def test_a_mistyped_key_stops_everything_with_its_name(flow_clone):
    root, _ = flow_clone
    path = root / "params.yaml"
    before = path.read_text()
    path.write_text(before.replace("min_margin", "min_margn"))
    done = run([sys.executable, "-m", "flows.pipeline"], root)
    path.write_text(before)
    assert done.returncode == 1
    assert "unknown key 'register.min_margn'; did you mean 'min_margin'?" in done.stdout


@pytest.mark.timeout(1200)  # two runs, each with three commands that load torch and train
def test_the_comparison_trains_recipes_on_equal_terms_and_reports(flow_clone):
    root = flow_clone[0]
    command = [sys.executable, "-m", "flows.compare", "compare"]
    done = run(command, root)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "4 stages run, 4 cached" in done.stdout  # two runs, trained and evaluated; what they stand on is there
    with (root / "reports/comparison/runs.csv").open() as file:
        rows = {row["recipe"]: row for row in csv.DictReader(file)}
    spent = {name: float(row["stage1_flops"]) + float(row["stage2_flops"]) for name, row in rows.items()}
    # Half a step of the dearer recipe is the finest that steps can divide.
    step = max(float(row["stage2_flops"]) / int(row["stage2_steps"]) for row in rows.values())
    assert set(spent) == {"haplovl", "solo"} and abs(spent["solo"] - spent["haplovl"]) < step
    assert int(rows["solo"]["stage2_steps"]) > int(rows["haplovl"]["stage2_steps"])  # its steps are cheaper
    tables = (root / "reports/comparison/tables.md").read_text()
    assert f"| `solo` | {float(rows['solo']['all']):.3f} (" in tables and "| recipe | colour |" in tables
    page = (root / "reports/comparison/index.html").read_text()
    assert "Equal compute" in page and "Not finished yet" not in page
    assert "teachers' training included" in page and "unknown" not in page
    assert float(rows["haplovl"]["teachers_flops"]) > float(rows["solo"]["teachers_flops"]) > 0
    again = run(command, root)
    assert again.returncode == 0 and "0 stages run, 8 cached" in again.stdout, again.stdout[-2000:]
    untracked = run(["git", "ls-files", "--others", "--exclude-standard"], root).stdout.split()
    assert untracked == ["comparison/dvc.lock"]
    states = run([sys.executable, "-m", "flows.pipeline"], root).stdout
    assert "1 stages run, 8 cached" in states  # the main pipeline: its edited gate, and nothing else
    lineage = root / "models/teachers/teachers.json"
    told = json.loads(lineage.read_text())
    del told["vision"]["training_flops"]
    lineage.unlink()  # may be a link to DVC's cache
    lineage.write_text(json.dumps(told))
    assert run(["haplovl", "comparison", "report"], root).returncode == 0
    page = (root / "reports/comparison/index.html").read_text()
    assert "teachers' training included" not in page
    assert page.count("unknown") == 2  # the vision teacher's operations, and the sum of all


def stopped_at(pattern: str, command: list[str], root: Path) -> str:
    """Runs a command until a line matches, then tells it to stop; all that it said."""
    env = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    process, said = subprocess.Popen(command, cwd=root, env=env, text=True, **pipes), ""
    try:
        for line in process.stdout:
            said += line
            if re.search(pattern, line):
                break
    finally:
        process.send_signal(signal.SIGTERM)
    said += process.stdout.read()
    assert process.wait() == 1 and "interrupted; run the same command again" in said[-500:], said[-4000:]
    return said


@pytest.mark.timeout(600)
def test_a_comparison_told_to_stop_keeps_its_checkpoints_and_goes_on(flow_clone):
    root = flow_clone[0]
    path = root / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["compare"]["changes"] = {"stage2": {"steps": 50_000}}  # nothing ends by itself
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    command = [sys.executable, "-m", "flows.compare", "ablations"]
    said = stopped_at(r"stage2 \[.*/50000", command, root)
    steps = re.findall(r"stopped by signal after step (\d+)", said)
    assert steps, said[-4000:]
    again = stopped_at(r"stage2: continuing after step \d+", command, root)
    assert re.search(r"stage2: continuing after step (\d+)", again)[1] in steps
