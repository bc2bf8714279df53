"""One run of the comparison: a folder like a project of its own, that shares data and teachers with this one.

`comparison/GROUP/RECIPE-SEED/` holds the run's params.yaml, models, metrics and predictions; links lead to the data and
the teachers. In it the ordinary commands run: whatever a recipe shows here, it shows in a project of its own.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from haplovl.comparison.budget import matched
from haplovl.comparison.recipes import load_recipe, write_params
from haplovl.errors import UserError
from haplovl.files import PREPARED, TEACHERS, require
from haplovl.settings import CompareSettings, load_compare

COMPARISON = Path("comparison")
GROUPS = ("compute", "samples", "ablations")
SHARED = ("data", "infra", str(TEACHERS))
STAGES = ("stage1", "stage2")


@dataclass(frozen=True)
class Run:
    """A recipe trained with a seed. `group` says on which terms: equal compute, equal samples, or an ablation."""

    group: str
    recipe: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where it lives."""
        return COMPARISON / self.group / f"{self.recipe}-{self.seed}"

    @property
    def recipe_file(self) -> str:
        """Its recipe as a name below recipes/."""
        return f"ablations/{self.recipe}" if self.group == "ablations" else self.recipe


def planned(settings: CompareSettings, group: str) -> list[Run]:
    """All runs of a group; in `samples`, the first recipe of the comparison is the one of `compute`."""
    recipes = {"compute": settings.recipes, "samples": settings.samples, "ablations": settings.ablations}[group]
    return [Run(group, recipe, seed) for recipe in recipes for seed in settings.seeds]


def train(run: Run) -> None:
    """Trains both stages in the run's folder; one that was killed goes on from its last checkpoint.

    Raises:
        UserError: inputs are missing, the recipe is wrong, or a stage fails.
    """
    _check_group(run)
    require(PREPARED / "manifest.json", "prepare")
    require(TEACHERS, "teachers")
    reference = load_recipe(load_compare().recipes[0], run.seed)
    params = load_recipe(run.recipe_file, run.seed)
    try:
        params = matched(params, reference, "samples" if run.group == "samples" else "compute")
    except ValueError as error:
        raise UserError(str(error)) from None
    write_params(params, run.folder / "params.yaml")
    _link_shared(run.folder)
    for stage in STAGES:
        _command(run, "train", stage)


def evaluate(run: Run) -> None:
    """Answers the held-out questions in the run's folder, and probes its stage 1.

    Raises:
        UserError: the run is not trained, or a command fails.
    """
    _check_group(run)
    require(run.folder / "models" / "stage2", f"comparison train {run.group} {run.recipe} {run.seed}")
    _link_shared(run.folder)
    _command(run, "probe")
    _command(run, "evaluate")


def _check_group(run: Run) -> None:
    if run.group not in GROUPS:
        raise UserError(f"there is no group '{run.group}'; choose {', '.join(GROUPS)}")


def _link_shared(folder: Path) -> None:
    """Links what all runs share; relative, so that the project may move."""
    for name in SHARED:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(name, link.parent), target_is_directory=True)


def _command(run: Run, *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "haplovl", *words], cwd=run.folder)
    if done.returncode:
        raise UserError(f"'haplovl {' '.join(words)}' failed in {run.folder} (exit code {done.returncode})")
