"""What distinguishes runs, and whether the distance between their accuracies is more than chance."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from typing import Any

import numpy as np

from haplovl.errors import UserError
from haplovl.evaluate.compare.grouping import grouped, named, notes_on_seeds
from haplovl.evaluate.compare.runs import ComparedRun
from haplovl.evaluate.predictions import require_same_questions
from haplovl.evaluate.questions import TOTAL
from haplovl.evaluate.statistics import (
    SIGNIFICANT,
    Difference,
    Interval,
    hierarchical_interval,
    holm,
    paired_difference,
)

ALL = TOTAL
UNKNOWN, UNSET = "unknown", "not set"
_MOVE_A_LOSS = ("objective", "losses", "mixture", "curriculum", "temperature", "vision_layer")
"""Settings of a stage that change what its loss is a loss of."""
_TEACHERS = ("teachers.vision", "teachers.language")
"""Settings that change what a distillation's loss is a loss of: the distance to these very models."""


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds (`haplovl.evaluate.compare.grouping`); or a single run.

    `accuracy` is by question type, and `all`; empty where there are no answers, or none that may be compared.
    """

    name: str
    runs: list[ComparedRun]
    accuracy: dict[str, Interval]


@dataclass(frozen=True)
class Verdict:
    """How far group `name` lies above group `other` on the questions of a type, and whether that is more than chance.

    `p_value` is adjusted for the number of such verdicts in the comparison (Holm): those over all questions are one
    family, those by type another.
    """

    name: str
    other: str
    kind: str
    difference: Difference
    p_value: float

    @property
    def real(self) -> bool:
        """Whether chance alone would rarely make such a difference."""
        return self.p_value < SIGNIFICANT

    @property
    def words(self) -> str:
        """The verdict for people."""
        return "real" if self.real else "within noise"


@dataclass(frozen=True)
class StageFigures:
    """How one stage of one run went; what its log does not tell is None.

    `loss` is the mean over the last twentieth of the steps; speeds are medians over the steps, memory is the most.
    """

    run: str
    stage: str
    steps: int
    loss: float
    validation_loss: float | None
    tokens_per_s: float | None
    tflops: float | None
    memory_gib: float | None
    hours: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything that tables and page show."""

    groups: list[Group]
    settings: list[tuple[str, list[str]]]
    """Settings in which groups differ, with the value of each."""
    training: list[StageFigures]
    verdicts: list[Verdict]
    refusal: str
    """Why accuracies are not compared; empty where they are."""
    notes: list[str]
    """What a reader must know so as not to read too much into the numbers."""

    @property
    def runs(self) -> list[ComparedRun]:
        """All runs, group by group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def kinds(self) -> list[str]:
        """Question types, then `all`; empty without accuracies."""
        return next((list(group.accuracy) for group in self.groups if group.accuracy), [])


def compare(runs: Sequence[ComparedRun]) -> Comparison:
    """Compares runs; accuracies only where all of them were asked the same.

    Raises:
        UserError: no two runs have anything in common that could be compared.
    """
    _require_common_ground(runs)
    refusal = _refusal(runs)
    groups = [Group(name, own, {} if refusal else _accuracies(own)) for name, own in grouped(named(runs))]
    verdicts = [] if refusal else _verdicts(groups)
    settings = _differing_settings(groups)
    training = [figures for group in groups for run in group.runs for figures in _figures(run)]
    return Comparison(groups, settings, training, verdicts, refusal, _notes(groups, settings, verdicts))


# --- which runs ------------------------------------------------------------------------------------------------------
def _require_common_ground(runs: Sequence[ComparedRun]) -> None:
    found = [{*run.logs, *(["answers"] if run.answers else [])} for run in runs]
    if not any(a & b for a, b in combinations(found, 2)):
        told = ", ".join(f"{run.path} holds {' and '.join(sorted(own))}" for run, own in zip(runs, found, strict=True))
        raise UserError(f"nothing in these runs can be compared: {told}")


def _refusal(runs: Sequence[ComparedRun]) -> str:
    """What differs in the questions that runs were asked; nothing where they were the same."""
    asked = [run.answers for run in runs if run.answers]
    try:
        for other in asked[1:]:
            require_same_questions(asked[0], other)
    except UserError as error:
        return f"accuracies are not compared: {error}"
    return ""


# --- settings --------------------------------------------------------------------------------------------------------
def _differing_settings(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Settings with different values. One that a run's whole section lacks is unknown there, and no difference."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.about.settings)
    told = {name: [_values(group, name) for group in groups] for name in names}
    return [(name, values) for name, values in told.items() if len({value for value in values if value != UNKNOWN}) > 1]


def _values(group: Group, name: str) -> str:
    """The value of a setting; several where seeds have their own."""
    return ", ".join(dict.fromkeys(_value(run, name) for run in group.runs))


def _value(run: ComparedRun, name: str) -> str:
    settings, section = run.about.settings, name.split(".")[0]
    if name not in settings:
        return UNSET if any(own.split(".")[0] == section for own in settings) else UNKNOWN
    value = settings[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- training --------------------------------------------------------------------------------------------------------
def _figures(run: ComparedRun) -> list[StageFigures]:
    found = []
    for stage, rows in run.logs.items():
        tail = rows[-max(1, len(rows) // 20) :]
        scored = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
        seconds, memory = _column(rows, "seconds"), _column(rows, "memory_gib")
        found.append(
            StageFigures(
                run.name,
                stage,
                rows[-1]["step"],
                sum(row["loss"] for row in tail) / len(tail),
                scored[-1] if scored else None,
                *(median(values) if (values := _column(rows, name)) else None for name in ("tokens_per_s", "tflops")),
                max(memory) if memory else None,
                sum(seconds) / 3600 if seconds else None,
            )
        )
    return found


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if isinstance(row.get(name), (int, float))]


# --- accuracy --------------------------------------------------------------------------------------------------------
def _accuracies(runs: Sequence[ComparedRun]) -> dict[str, Interval]:
    if not all(run.answers for run in runs):
        return {}
    return {kind: hierarchical_interval(_correct(runs, kind)) for kind in _kinds(runs[0])}


def _kinds(run: ComparedRun) -> list[str]:
    return [*sorted({said.question.kind for said in run.answers.answers.values()}), ALL]


def _correct(runs: Sequence[ComparedRun], kind: str) -> np.ndarray:
    """[runs, questions of this type]; questions in the order of their ids, which is the same for all runs."""
    chosen = sorted(id_ for id_, said in runs[0].answers.answers.items() if kind in (ALL, said.question.kind))
    return np.array([[run.answers.answers[id_].correct for id_ in chosen] for run in runs])


def _verdicts(groups: Sequence[Group]) -> list[Verdict]:
    """Every group against every one before it, over all questions and by type."""
    judged = [group for group in groups if group.accuracy]
    found = [
        Verdict(new.name, old.name, kind, paired_difference(_correct(new.runs, kind), _correct(old.runs, kind)), 1.0)
        for old, new in combinations(judged, 2)
        for kind in new.accuracy
    ]
    adjusted: dict[int, float] = {}
    for family in ([v for v in found if v.kind == ALL], [v for v in found if v.kind != ALL]):
        raised = holm([verdict.difference.p_value for verdict in family])
        adjusted |= {id(verdict): p for verdict, p in zip(family, raised, strict=True)}
    return [replace(verdict, p_value=adjusted[id(verdict)]) for verdict in found]


# --- what to keep in mind --------------------------------------------------------------------------------------------
def _notes(
    groups: Sequence[Group], settings: Sequence[tuple[str, list[str]]], verdicts: Sequence[Verdict]
) -> list[str]:
    notes = []
    single = [group.name for group in groups if group.accuracy and len(group.runs) == 1]
    if single and verdicts:
        notes.append(f"One seed of {', '.join(single)}: a verdict is about that very model, another seed may turn it.")
    runs = [run for group in groups for run in group.runs]
    unasked = [run.name for run in runs if run.answers is None]
    if unasked and len(unasked) < len(runs):
        notes.append(f"There are no answers of {', '.join(unasked)}.")
    notes += dict.fromkeys(note for run in runs for note in run.notes)
    return notes + notes_on_seeds([group.runs for group in groups]) + _notes_on_losses(groups, settings)


def _notes_on_losses(groups: Sequence[Group], settings: Sequence[tuple[str, list[str]]]) -> list[str]:
    notes = []
    for stage in dict.fromkeys(stage for group in groups for stage in group.runs[0].logs):
        having = [group for group in groups if stage in group.runs[0].logs]
        if len(having) < 2:
            continue
        differing = ["the training data"] if len({g.runs[0].about.data for g in having} - {""}) > 1 else []
        moving = ("prepare", "model.image_size", *(f"{stage}.{name}" for name in _MOVE_A_LOSS))
        if any(group.runs[0].about.settings.get(f"{stage}.objective") == "distillation" for group in having):
            moving += _TEACHERS
        differing += [name for name, _ in settings if name.startswith(moving)]
        if differing:
            notes.append(
                f"Losses of {stage} are of different tasks ({', '.join(differing)} differ): they tell how each run "
                "went, not which is better."
            )
    return notes
