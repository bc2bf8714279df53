import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo

from haplovl import presets
from haplovl.comparison.recipes import load_recipe
from haplovl.errors import UserError
from haplovl.settings import load_params

SHIPPED = sorted((Path(__file__).parents[1] / "params").glob("*.yaml"))
PLACEHOLDER = "0" * 40


def test_presets_ship():
    assert {path.stem for path in SHIPPED} >= {"haplovl-7b", "haplovl-8b", "haplovl-8b-multi-image"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_preset_loads_and_fits_its_rows(path):
    params = load_params(path)
    for stage in (params.stage1, params.stage2):
        assert stage.batch.row_tokens >= params.prepare.max_tokens, "a record must fit a row"
    for teacher in (params.teachers.vision, params.teachers.language):
        # An id nobody confirmed would have to say so.
        assert teacher.kind != "hub" or teacher.revision != PLACEHOLDER or "git ls-remote" in path.read_text()


@pytest.mark.parametrize("path", [Path("params.yaml"), *SHIPPED], ids=lambda path: path.stem)
def test_every_recipe_that_a_preset_compares_fits_it_and_its_size(path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    params = load_params(path)
    compare = params.compare
    for name in {*compare.recipes, *compare.samples, *(f"ablations/{own}" for own in compare.ablations)}:
        stage1 = load_recipe(name, params=path).stage1
        # Steps that recipes/ give for two cores would be next to nothing elsewhere.
        assert stage1.objective == "none" or stage1.steps >= params.stage1.steps, name


@pytest.mark.parametrize("path", [Path("params.yaml"), *SHIPPED], ids=lambda path: path.stem)
def test_dvc_finds_all_that_its_stages_read(path, tmp_path, monkeypatch):
    """`dvc repro` reads every dvc.yaml, the comparison's too, and refuses where a parameter is not there."""
    root = Path(__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    for name in ("dvc.yaml", "comparison/dvc.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((root / name).read_bytes())
    (tmp_path / "params.yaml").write_bytes((root / path).read_bytes())
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    with Repo() as repo:
        read = [stage for stage in repo.index.stages if stage.cmd]
        assert {"stage1", "compute-train@haplovl-17"} <= {stage.name for stage in read}
        for stage in read:
            for params in stage.params:
                params.save()  # raises where a key is missing


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A git repository with two presets and a committed params.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()
    for name in ("haplovl-7b", "haplovl-8b"):
        (tmp_path / "params" / f"{name}.yaml").write_bytes(next(p for p in SHIPPED if p.stem == name).read_bytes())
    (tmp_path / "params.yaml").write_text("recipe: mine\n")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], check=True)
    return tmp_path


def test_a_preset_becomes_params_yaml(project):
    assert presets.list_presets() == ["haplovl-7b", "haplovl-8b"]
    assert "is now the preset haplovl-7b" in presets.use_preset("haplovl-7b")
    assert (project / "params.yaml").read_bytes() == (project / "params" / "haplovl-7b.yaml").read_bytes()
    # One preset after the other loses nothing, though neither is committed.
    presets.use_preset("haplovl-8b")
    assert load_params().prepare.chat_template == "llama-3"
    assert "already" in presets.use_preset("haplovl-8b")


@pytest.mark.parametrize("outside_git", [False, True])
def test_changes_that_would_be_lost_are_refused(project, outside_git, monkeypatch):
    if outside_git:
        monkeypatch.setenv("GIT_DIR", str(project / "nowhere"))
    (project / "params.yaml").write_text("recipe: edited\n")
    with pytest.raises(UserError, match="not committed"):
        presets.use_preset("haplovl-7b")
    assert (project / "params.yaml").read_text() == "recipe: edited\n"


def test_an_unknown_name_gets_the_nearest(project):
    with pytest.raises(UserError, match="did you mean 'haplovl-7b'"):
        presets.use_preset("haplovl7b")


def test_a_broken_preset_is_not_taken(project):
    (project / "params" / "haplovl-7b.yaml").write_text("recipe: haplovl\n")
    with pytest.raises(UserError, match="is missing"):
        presets.use_preset("haplovl-7b")
    assert (project / "params.yaml").read_text() == "recipe: mine\n"
