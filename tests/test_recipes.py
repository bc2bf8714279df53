"""Recipes are data: files of recipes/ on top of params.yaml."""

from pathlib import Path

import pytest

from haplovl.comparison.recipes import load_recipe, merge, recipe_files, write_params
from haplovl.settings import load_params
from haplovl.strict import SettingsError

REPO = Path(__file__).resolve().parents[1]
NAMES = [path.relative_to(REPO / "recipes").with_suffix("").as_posix() for path in (REPO / "recipes").rglob("*.yaml")]


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(REPO)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_recipe_that_ships_parses_and_can_be_written(name, tmp_path):
    params = load_recipe(name, seed=5)
    assert params.seed == 5 and params.recipe == name.rpartition("/")[2]
    write_params(params, tmp_path / "params.yaml")
    assert load_params(tmp_path / "params.yaml").model_dump(exclude={"compare"}) == params.model_dump(
        exclude={"compare"}
    )


def test_every_recipe_of_the_comparison_exists():
    compare = load_params().compare
    assert {*compare.recipes, *compare.samples} <= set(recipe_files())
    assert {f"ablations/{name}" for name in compare.ablations} <= set(recipe_files())


def test_every_ablation_differs_from_the_main_recipe():
    main = load_recipe("haplovl").model_dump(exclude={"recipe"})
    for name in recipe_files():
        if name.startswith("ablations/"):
            assert load_recipe(name).model_dump(exclude={"recipe"}) != main, name


def test_a_stage_with_another_objective_keeps_its_size_and_others_are_merged():
    base = {"stage1": {"objective": "distillation", "steps": 3, "vision_layer": -1}, "model": {"a": 1, "b": 2}}
    assert merge(base, {"stage1": {"objective": "next_token"}})["stage1"] == {"objective": "next_token", "steps": 3}
    merged = merge(base, {"stage1": {"objective": "none"}, "model": {"b": 3}})
    assert merged == {"stage1": {"objective": "none"}, "model": {"a": 1, "b": 3}}
    assert merge(base, {"stage1": {"steps": 4}})["stage1"] == {**base["stage1"], "steps": 4}
    assert merge({"s": {"mixture": {"text": 1.0, "caption": 1.0}}}, {"s": {"mixture": {"text": 0.5}}}) == {
        "s": {"mixture": {"text": 0.5}}
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {fusoin: tower}", ["unknown key 'model.fusoin'", "did you mean 'fusion'?"]),
        ("stage1: {objective: next_token, steps: 3}", ["stage1.optimizer", "missing"]),
        (
            "model: {connector: text_head}\nstage1: {objective: none}",
            ["model.connector: text_head is a head of the distillation"],
        ),
        (
            "model: {connector: text_head}\nstage1: {losses: {feature: 0.0, current_token: 0.0}}",
            ["model.connector: text_head is learnt by", "both have weight 0"],
        ),
        ("stage1: {vision_layer: 5}", ["stage1.vision_layer is 5, but the vision teacher has 4 layers"]),
        ("teachers: {vision: {group: 97}}", ["group 97 is more than a batch of 96"]),
        ("stage2: {optimizer: {betas: [0.9, 1.0]}}", ["betas"]),
        ("model: {fusion: tower, text_path: connector, pre_decoder_layers: null}", ["distillation trains"]),
        ("stage2: {optimizer: {rate_factors: {tail: 0.0}}}", ["rate_factors"]),
        ("recipe: yours", ["recipes/mine.yaml: 'recipe' is 'yours', but the file is called 'mine'"]),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_by_name(text, words, tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text(text)
    (tmp_path / "params.yaml").write_text((REPO / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as error:
        load_recipe("mine")
    assert all(word in str(error.value) for word in words), error.value


def test_a_recipe_is_called_as_its_file(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text("model: {image_newline: true}")
    (tmp_path / "params.yaml").write_text((REPO / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine").recipe == "mine"


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(SettingsError, match="did you mean 'llava'"):
        load_recipe("lava")
