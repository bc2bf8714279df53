"""Presets: whole params files at the papers' scale in params/, one of which becomes params.yaml."""

import difflib
import subprocess
from pathlib import Path

from haplovl.errors import UserError
from haplovl.files import write_whole
from haplovl.settings import PARAMS_FILE, load_params

PRESETS = Path("params")


def list_presets() -> list[str]:
    """Names of the presets, sorted.

    Raises:
        UserError: this is no project's root folder.
    """
    if not PRESETS.is_dir():
        raise UserError(f"there is no folder {PRESETS}/ here; run the command in the project's root folder")
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def use_preset(name: str) -> str:
    """Copies params/NAME.yaml over params.yaml; returns one sentence about it.

    Raises:
        UserError: no such preset, the preset is wrong, or params.yaml holds changes that would be lost.
    """
    names = list_presets()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f"; did you mean '{near[0]}'?" if near else f"; there are none in {PRESETS}/"
        raise UserError(f"no preset '{name}'{hint}")
    preset = PRESETS / f"{name}.yaml"
    load_params(preset)
    text = preset.read_text(encoding="utf-8")
    if PARAMS_FILE.exists() and PARAMS_FILE.read_text(encoding="utf-8") == text:
        return f"{PARAMS_FILE} already is the preset {name}"
    if _would_be_lost(PARAMS_FILE):
        raise UserError(f"{PARAMS_FILE} has changes that are not committed; commit it or move it away first")
    write_whole(PARAMS_FILE, text)
    return f"{PARAMS_FILE} is now the preset {name}; 'dvc repro' or 'make pipeline' runs what it changes"


def _would_be_lost(path: Path) -> bool:
    """Whether the file holds content that neither the last commit nor a preset has."""
    if not path.exists():
        return False
    text = path.read_bytes()
    if any(preset.read_bytes() == text for preset in PRESETS.glob("*.yaml")):
        return False
    try:
        committed = subprocess.run(["git", "show", f"HEAD:./{path.as_posix()}"], capture_output=True, check=False)
    except FileNotFoundError:
        return True
    return committed.returncode != 0 or committed.stdout != text
