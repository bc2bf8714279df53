"""Which runs are seeds of one recipe, and what runs and recipes are called."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from haplovl.evaluate.compare.runs import ComparedRun
from haplovl.settings import fingerprint

STEPS = "stage2.steps"
SLACK = 0.03
"""How much more steps of stage 2 one seed may have than another: equal compute gives every seed a number of its own."""
EXECUTION = ("evaluate.batch", "evaluate.batch_tokens")
"""Settings that say how answers are computed, not which."""
REASONS_SHOWN = 4


def named(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Runs with names that tell them apart: recipe and seed where that is enough, else what differs in their paths."""
    plain = [f"{run.about.recipe} seed {run.about.seed}" if run.about.recipe else "" for run in runs]
    paths = _short([run.path for run in runs])
    found = []
    for run, name, path in zip(runs, plain, paths, strict=True):
        name = path if not name else name if plain.count(name) == 1 else f"{name} ({path})"
        found.append(replace(run, name=name))
    return found


def _short(paths: Sequence[Path]) -> list[str]:
    """The part of each path that tells it apart: a/x/reports and b/x/reports are a and b."""
    parts = [path.resolve().parts for path in paths]
    while len({own[-1] for own in parts}) == 1 and all(len(own) > 1 for own in parts):
        parts = [own[:-1] for own in parts]
    last = [own[-1] for own in parts]
    return last if len(set(last)) == len(last) else [str(path) for path in paths]


# --- together --------------------------------------------------------------------------------------------------------
def grouped(runs: Sequence[ComparedRun]) -> list[tuple[str, list[ComparedRun]]]:
    """Runs of one recipe, settings, data and code with different seeds together; in the order of the first ones.

    Their steps of stage 2 may differ by SLACK.
    """
    families: dict[str, list[ComparedRun]] = {}
    for run in runs:
        families.setdefault(_family(run), []).append(run)
    found = [own for members in families.values() for near in _near(members) for own in _seeds(near)]
    found.sort(key=lambda own: runs.index(own[0]))
    names = [own[0].name if len(own) == 1 else f"{own[0].about.recipe} ({len(own)} seeds)" for own in found]
    return [
        (name if names.count(name) == 1 else f"{name}, {own[0].path}", own)
        for name, own in zip(names, found, strict=True)
    ]


def _family(run: ComparedRun) -> str:
    """The same for runs that may be seeds of one recipe; a run that does not tell what it is stands alone."""
    about = run.about
    if not about.recipe or not about.settings or about.seed is None:
        return run.name
    settings = {name: value for name, value in _deciding(run).items() if name != STEPS}
    return fingerprint([about.recipe, settings, about.data, about.code, sorted(run.logs), bool(run.answers)])


def _deciding(run: ComparedRun) -> dict[str, Any]:
    """The settings that decide what comes out."""
    return {name: value for name, value in run.about.settings.items() if name not in EXECUTION}


def _steps(run: ComparedRun) -> int:
    """Steps of stage 2; 0 where there are none to tell."""
    steps = run.about.settings.get(STEPS)
    return steps if isinstance(steps, int) else 0


def _near(members: list[ComparedRun]) -> list[list[ComparedRun]]:
    """Runs whose steps are within SLACK of each other."""
    found: list[list[ComparedRun]] = []
    for run in sorted(members, key=_steps):
        if found and _steps(run) <= (1 + SLACK) * _steps(found[-1][0]):
            found[-1].append(run)
        else:
            found.append([run])
    return [sorted(near, key=members.index) for near in found]


def _seeds(near: list[ComparedRun]) -> list[list[ComparedRun]]:
    """Runs as one recipe if each has a seed of its own; else those of equal steps, and the rest one by one."""
    if len({run.about.seed for run in near}) == len(near):
        return [near]
    steps = dict.fromkeys(map(_steps, near))
    if len(steps) == 1:
        return [[run] for run in near]
    return [own for number in steps for own in _seeds([run for run in near if _steps(run) == number])]


# --- what a reader must know -----------------------------------------------------------------------------------------
def notes_on_seeds(groups: Sequence[list[ComparedRun]]) -> list[str]:
    """Where seeds of different steps are one recipe, and why other runs of one recipe are not."""
    notes = []
    for own in groups:
        steps = sorted(map(_steps, own))
        if steps[0] != steps[-1]:
            notes.append(
                f"The seeds of {own[0].about.recipe} are taken together although stage 2 has {steps[0]} to {steps[-1]} "
                f"steps: equal compute gives every seed its own number, and up to {100 * SLACK:.0f} % is let pass."
            )
    for recipe in dict.fromkeys(own[0].about.recipe for own in groups):
        apart = [own for own in groups if recipe and own[0].about.recipe == recipe]
        if len({frozenset(run.about.seed for run in own) for own in apart}) > 1:
            notes.append(f"Runs of {recipe} with different seeds are not taken together, because {_reason(apart)}.")
    return notes


def _reason(apart: Sequence[list[ComparedRun]]) -> str:
    """What differs between groups of one recipe."""
    firsts = [own[0] for own in apart]
    settings = [_deciding(run) for run in firsts]
    names = dict.fromkeys(name for own in settings for name in own)
    reasons = [name for name in names if any(own.get(name) != settings[0].get(name) for own in settings)]
    others = {
        "the training data": [run.about.data for run in firsts],
        "the code": [run.about.code for run in firsts],
        "which logs and answers there are": [(sorted(run.logs), bool(run.answers)) for run in firsts],
    }
    reasons += [name for name, values in others.items() if any(value != values[0] for value in values)]
    if not reasons:
        return "a seed is there twice"
    more = len(reasons) - REASONS_SHOWN
    shown = [*reasons[:REASONS_SHOWN], *([f"{more} more"] if more > 0 else [])]
    together = " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
    return f"{together} {'differ' if len(shown) > 1 else 'differs'}"
