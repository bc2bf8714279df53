"""A recipe is data: a file of recipes/ that says what differs from params.yaml."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from haplovl.settings import PARAMS_FILE, Params
from haplovl.strict import SettingsError, read_settings, validate_settings

RECIPES = Path("recipes")
REPLACED = ("mixture", "curriculum", "sources", "rate_factors")
"""Settings that a recipe gives whole: half of a mixture means nothing."""
SIZES = ("steps", "precision", "batch", "checkpoint_every")
"""What a stage keeps where a recipe gives it another objective: its size, and nothing else."""


def recipe_files() -> dict[str, Path]:
    """The files of recipes/ and its folders, by the recipe's name (`ablations/…` for those below)."""
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in sorted(RECIPES.rglob("*.yaml"))}


def load_recipe(name: str, seed: int | None = None, params: Path = PARAMS_FILE) -> Params:
    """params.yaml with what all runs of the comparison change, what the recipe changes, and perhaps another seed.

    Raises:
        SettingsError: no such recipe, its file says another name, or the two do not fit together.
    """
    files = recipe_files()
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1, cutoff=0.0)
        hint = f"; did you mean '{near[0]}'?" if near else f"; there are none in {RECIPES}/"
        raise SettingsError(f"no recipe '{name}'{hint}")
    base = read_settings(params)
    if common := (base.get("compare") or {}).get("changes"):
        base = merge(base, common)
        validate_settings(base, Path(f"{params} (compare.changes)"), Params)
    own = read_settings(files[name])
    called = files[name].stem
    if own.setdefault("recipe", called) != called:
        raise SettingsError(f"{files[name]}: 'recipe' is {own['recipe']!r}, but the file is called '{called}'")
    merged = merge(base, own)
    merged = merge(merged, _own_changes(base, name, files))
    if seed is not None:
        merged["seed"] = seed
    return validate_settings(merged, files[name], Params)


def _own_changes(base: dict[str, Any], name: str, files: Iterable[str]) -> dict[str, Any]:
    """What `compare.recipe_changes` says of this recipe."""
    changes = (base.get("compare") or {}).get("recipe_changes") or {}
    if unknown := sorted(changes.keys() - {file.rpartition("/")[2] for file in files}):
        raise SettingsError(f"compare.recipe_changes names '{unknown[0]}', which is no recipe of {RECIPES}/")
    return changes.get(name.rpartition("/")[2], {})


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, section by section; some settings are replaced as a whole, see REPLACED."""
    merged = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        if key in REPLACED or not isinstance(value, dict) or not isinstance(old, dict):
            merged[key] = value
            continue
        if value.get("objective", old.get("objective")) != old.get("objective"):
            kept = () if value["objective"] == "none" else SIZES
            old = {name: old[name] for name in kept if name in old}
        merged[key] = merge(old, value)
    return merged


def write_params(params: Params, target: Path) -> None:
    """Writes settings as a params.yaml, whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(
        params.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"compare"}), sort_keys=False
    )
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")
