"""params.yaml: what ships parses, and a mistake is named with the nearest valid key."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from settings_reference import TAG, every_setting, literals, read_tables

from haplovl.data_settings import ScenesSource
from haplovl.settings import ModelSettings, SettingsError, fingerprint, load_compute, load_params

REPO = Path(__file__).resolve().parents[1]
SHIPPED = [REPO / "params.yaml", *sorted((REPO / "params").glob("*.yaml"))]


def write_changed(folder: Path, key: str, value: Any) -> Path:
    """The repo's params.yaml with one dotted key set, or removed where the value is `...`."""
    params = yaml.safe_load((REPO / "params.yaml").read_text())
    *parents, last = key.split(".")
    section = params
    for parent in parents:
        section = section[int(parent) if parent.isdigit() else parent]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_params_file_that_ships_parses(path: Path) -> None:
    assert load_params(path).recipe


def test_every_compute_profile_that_ships_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    for path in sorted(Path("infra/compute").glob("*.yaml")):
        assert load_compute(path.stem).name == path.stem


def test_the_default_source_is_the_embedded_data_set() -> None:
    assert isinstance(load_params(REPO / "params.yaml").collect.sources[0], ScenesSource)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("stage_1", {}, ["unknown key 'stage_1'", "did you mean 'stage1'?"]),
        ("model.imagesize", 3, ["unknown key 'model.imagesize'", "did you mean 'image_size'?"]),
        ("stage1.batch.row", 3, ["unknown key 'stage1.batch.row'", "did you mean 'rows'?"]),
        ("collect.sources.0.train_recods", 3, ["'collect.sources.0.train_recods'", "did you mean 'train_records'?"]),
        ("teachers.vision.patchsize", 8, ["'teachers.vision.patchsize'", "did you mean 'patch_size'?"]),
        ("validate.max_quarantine_share", 0.1, ["'validate.max_quarantine_share'", "'max_quarantined_share'?"]),
        ("stage2.optimizer.lr", 0.1, ["unknown key 'stage2.optimizer.lr'", "did you mean"]),
        ("seed", "17", ["'seed'", "found '17'"]),
        ("prepare.max_tokens", 999, ["params.yaml: stage1.batch.row_tokens must be at least prepare.max_tokens"]),
        ("stage1.steps", 0, ["'stage1.steps'", "greater than 0", "found 0"]),
        ("stage1.precision", "fp8", ["'stage1.precision'", "found 'fp8'"]),
        ("validate.max_quarantined_share", 2.0, ["'validate.max_quarantined_share'", "found 2.0"]),
        ("validate.splits", {"validation": 0.5, "test": 0.5}, ["'validate.splits'", "leave nothing to train on"]),
        ("collect.sources.0.format", "scene", ["'collect.sources.0.format' is 'scene'", "did you mean 'scenes'?"]),
        (
            "collect.sources.0.format",
            "moon",
            ["'collect.sources.0.format' is 'moon'", "unknown; choose 'scenes', 'llava'"],
        ),
        ("collect.sources.0.format", ..., ["'collect.sources.0.format' is missing; choose 'scenes', 'llava'"]),
        ("teachers.vision.kind", ..., ["'teachers.vision.kind' is missing; choose 'hub', 'folder', 'train'"]),
        ("stage1.objective", ..., ["'stage1.objective' is missing; choose 'distillation', 'next_token', 'none'"]),
        ("stage1.objective", "none", ["'stage1.objective: none' takes no other keys; remove those beside it"]),
        ("stage2.optimizer.learning_rate", "1e-3", ["found '1e-3', which YAML takes for text; write 1.0e-3"]),
        ("stage2.optimizer.learning_rate", "2.5E4", ["which YAML takes for text; write 2.5e+4"]),
        ("register.name", "My_Model", ["'register.name' must be a name of a-z", "found 'My_Model'"]),
        (
            "teachers.vision",
            {"kind": "hub", "id": "a/b", "revision": "main"},
            ["'teachers.vision.revision' must be a full commit hash (git ls-remote", "found 'main'"],
        ),
        ("collect.sources.0.train_records", ..., ["'collect.sources.0.train_records' is missing"]),
        ("collect.sources", [], ["'collect.sources'", "at least 1 item"]),
        (
            "collect.sources",
            [{"name": "a", "format": "hub", "license": "x"}],
            ["'collect.sources.0': give either", "'folder'"],
        ),
        (
            "collect.sources",
            [{"name": "A b", "format": "sharegpt", "license": "x", "annotations": ["a.json"]}],
            ["'collect.sources.0.name'", "found 'A b'"],
        ),
        (
            "collect.sources",
            [{"name": "a", "format": "alpaca", "annotations": ["a.json"]}],
            ["'collect.sources.0.license' is missing"],
        ),
        (
            "collect.sources",
            [{"name": "a", "format": "llava", "license": "x", "annotations": []}],
            ["'collect.sources.0.annotations'"],
        ),
        (
            "collect.sources",
            [{"name": "a", "format": "llava", "license": "x", "annotation": ["a.json"]}],
            ["unknown key 'collect.sources.0.annotation'; did you mean 'annotations'?"],
        ),
        (
            "collect.sources",
            [{"name": "a", "format": "sharegpt", "license": "x", "annotations": ["a"]}] * 2,
            ["two sources have the name 'a'"],
        ),
        ("collect.sources.0.split", {"test": 1.0}, ["'collect.sources.0.split", "leave nothing to train on"]),
        ("collect.sources.0.split", "dev", ["'collect.sources.0.split"]),
        ("model", ..., ["'model' is missing"]),
        (
            "model",
            {"fusion": "tower", "image_size": 32, "class_token": True, "text_path": "direct"},
            ["fusion: tower does not go with class_token: True, text_path: direct"],
        ),
        (
            "model",
            {"fusion": "patches", "image_size": 32, "patch_size": 8, "max_tiles": 4, "connector": "text_head"},
            ["fusion: patches does not go with connector: text_head, max_tiles: 4"],
        ),
        ("model", {"fusion": "patches", "image_size": 32}, ["fusion: patches needs patch_size"]),
        (
            "model",
            {"fusion": "patches", "image_size": 36, "patch_size": 8},
            ["image_size 36 is no multiple of patch_size 8"],
        ),
        ("model", {"image_size": 32, "patch_size": 8}, ["fusion: early does not go with patch_size: 8"]),
        ("model", {"image_size": 32, "tower_layer": -1}, ["fusion: early does not go with tower_layer: -1"]),
        ("model", {"image_size": 32, "fusion": "late"}, ["'model.fusion'", "found 'late'"]),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, key: str, value: Any, words: list[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        load_params(write_changed(tmp_path, key, value))
    message = str(raised.value)
    assert "\n" not in message
    for word in ("params.yaml", *words):
        assert word in message


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    path = write_changed(tmp_path, "seed", "17")
    path.write_text(path.read_text().replace("image_size:", "image_sizes:"))
    with pytest.raises(SettingsError, match="seed.*") as raised:
        load_params(path)
    assert "image_sizes" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("- 1", "must be a mapping"), ("", "must be a mapping"), ("\x00", "not valid YAML")],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_params(tmp_path / "params.yaml")


def test_a_missing_file_says_where_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="project's root folder"):
        load_params()
    with pytest.raises(SettingsError, match="no compute profile 'moon'"):
        load_compute("moon")


def test_a_time_that_yaml_makes_a_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    profile = (REPO / "infra/compute/slurm-4x8gpu.yaml").read_text()
    Path("infra/compute").mkdir(parents=True)
    profile = profile.replace("slurm-4x8gpu", "mine").replace("'24:00:00'", "24:00:00")
    Path("infra/compute/mine.yaml").write_text(profile)
    with pytest.raises(SettingsError, match="slurm.time_limit.*belongs in quotes"):
        load_compute("mine")


def test_fingerprint_ignores_key_order_and_sees_values() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
    params = load_params(REPO / "params.yaml")
    assert fingerprint(params) != fingerprint(params.model_copy(update={"seed": 18}))


def test_other_fusions_bring_their_own_defaults_and_survive_a_dump() -> None:
    tower = ModelSettings(fusion="tower", image_size=32)
    patches = ModelSettings(fusion="patches", image_size=32, patch_size=8)
    for settings, newline in ((tower, False), (patches, True)):
        assert (settings.class_token, settings.image_newline) == (False, newline)
        assert (settings.post_mask, settings.connector) == ("causal", "random")
        assert ModelSettings(**settings.model_dump()) == settings
    assert ModelSettings(fusion="tower", image_size=32, post_mask="mixed").post_mask == "mixed"
    assert ModelSettings(image_size=32).post_mask == "mixed"


def test_every_setting_is_in_the_reference() -> None:
    """docs/settings.md lists every key in its place, with its default and what it may be, and no other key."""
    tables, known = read_tables(REPO / "docs" / "settings.md"), set()
    for section, tag, key, field in every_setting():
        places = [
            heading
            for heading, rows in tables.items()
            if key in rows and section in heading and (tag in (found := TAG.findall(heading)) or not found)
        ]
        where = f"`{key}` under {section} {tag}".rstrip()
        assert places, f"docs/settings.md does not list {where}"
        default, meaning = tables[places[-1]][key]
        value = field.get_default(call_default_factory=True)
        value = {} if isinstance(value, BaseModel) else list(value) if isinstance(value, tuple) else value
        expected = "required" if field.is_required() else repr(value)
        given = default if default == "required" else repr(yaml.safe_load(default.strip("`")))
        assert given == expected, f"docs/settings.md has another default of {where}"
        unnamed = [choice for choice in literals(field.annotation) if f"`{choice}`" not in meaning]
        assert not unnamed, f"docs/settings.md does not name all that {where} may be"
        known |= {(place, key) for place in places}
    stale = {(heading, key) for heading, rows in tables.items() for key in rows} - known
    assert not stale, "docs/settings.md lists what is no setting"
