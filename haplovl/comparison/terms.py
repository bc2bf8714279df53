"""Whether a run is on equal terms: trained as its recipe says now, with the reference's compute or records."""

from collections.abc import Iterator, Sequence
from typing import Any

from haplovl.comparison.recipes import load_recipe
from haplovl.comparison.results import TERA, Result
from haplovl.settings import load_params

TOLERANCE = 0.02
"""Share of the budget that a run may miss, or one step where that is more: what steps take is known from samples."""
DECIDING = ("model", "teachers", "prepare", "stage1", "stage2", "evaluate")
"""Sections of params.yaml that decide what a run comes to."""


def objection(result: Result, group: str, reference: list[Result]) -> str | None:
    """Why a run does not belong into a view beside the reference's runs; None where it does.

    `group` is the view's: `samples` asks for as many records, the others for as many operations.
    """
    # A reference sets the budget; the others' steps of stage 2 follow from it.
    follows = () if any(result.run == other.run for other in reference) else ("stage2.steps",)
    if changed := next(_changed(result, follows), None):
        return changed
    own = [other for other in reference if other.run.seed == result.run.seed] or reference
    if group == "samples":
        step = result.records / sum(result.steps.values())
        return _missed(result.records, own[0].records, step, "{:,.0f} records")
    step = result.flops["stage2"] / result.steps["stage2"]
    return _missed(*(flops / TERA for flops in (result.total_flops, own[0].total_flops, step)), "{:.1f} TFLOP")


def _missed(spent: float, budget: float, step: float, form: str) -> str | None:
    if abs(spent - budget) <= max(TOLERANCE * budget, step):
        return None
    return f"took {form.format(spent)} where the reference took {form.format(budget)}"


def _changed(result: Result, ignored: Sequence[str]) -> Iterator[str]:
    """Settings of the run that its recipe gives otherwise now, in words."""
    was = load_params(result.run.folder / "params.yaml")
    now = load_recipe(result.run.recipe_file, result.run.seed)
    for section in DECIDING:
        old, new = (dict(_flat(section, getattr(params, section).model_dump(mode="json"))) for params in (was, now))
        for name in [*old, *(name for name in new if name not in old)]:
            if name not in ignored and old.get(name) != new.get(name):
                yield f"was trained with {name} {old.get(name)}, its recipe says {new.get(name)} now"


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value
