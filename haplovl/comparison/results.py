"""What the comparison's runs came to: read from their folders, and refused where they do not belong together."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from haplovl.comparison.recipes import load_recipe
from haplovl.comparison.runs import COMPARISON, STAGES, Run
from haplovl.errors import UserError
from haplovl.evaluate.predictions import Side, read_predictions, require_same_questions
from haplovl.evaluate.questions import TOTAL
from haplovl.evaluate.statistics import Difference, Interval, hierarchical_interval, holm, paired_difference
from haplovl.files import TEACHERS, read_json, read_jsonl

TERA = 1e12
ALL = TOTAL
"""Name of all question types together."""


@dataclass(frozen=True)
class Result:
    """One finished run.

    `correct` [questions] is in the order of the questions' ids, as `kinds` is; `curve` are points of operations spent
    so far, stage 1 included, and the held-out loss of stage 2 at them; `measured` is what the machine decided (seconds
    of a step, memory in GiB), empty where the run's own log is gone; `stage1` is what its probe found, empty where
    nothing was distilled.
    """

    run: Run
    answers: Side
    correct: np.ndarray
    kinds: tuple[str, ...]
    digest: str
    steps: dict[str, int]
    flops: dict[str, float]
    records: int
    curve: list[tuple[float, float]]
    measured: dict[str, float]
    stage1: dict[str, float]

    @property
    def total_flops(self) -> float:
        """Of both stages, with the forward passes of frozen teachers."""
        return sum(self.flops.values())

    def right(self, kind: str) -> np.ndarray:
        """[questions of this kind], or of all: 1 where the answer is right."""
        return self.correct if kind == ALL else self.correct[[own == kind for own in self.kinds]]

    @classmethod
    def read(cls, run: Run) -> "Result":
        """Reads a run's folder.

        Raises:
            UserError: it is not trained or not evaluated, or a file is damaged.
        """
        metrics = read_json(run.folder / "metrics/evaluation.json")
        answers = read_predictions(run.folder / "reports/evaluation/predictions.jsonl")
        rows = [said for _, said in sorted(answers.answers.items())]
        logs = {stage: read_jsonl(run.folder / f"models/{stage}/training_log.jsonl") for stage in STAGES}
        flops = {stage: float(sum(row["flops"] for row in log)) for stage, log in logs.items()}
        spent, curve = flops["stage1"], []
        for row in logs["stage2"]:
            spent += row["flops"]
            if "validation_loss" in row:
                curve.append((spent, row["validation_loss"]))
        return cls(
            run,
            answers,
            np.array([said.correct for said in rows], dtype=float),
            tuple(said.question.kind for said in rows),
            _digest(run.folder, metrics),
            {stage: len(log) for stage, log in logs.items()},
            flops,
            sum(row["records"] for log in logs.values() for row in log),
            curve,
            _measured(run.folder),
            _stage1(run.folder),
        )


def _digest(folder: Path, metrics: Any) -> str:
    data = metrics.get("data") if isinstance(metrics, dict) else None
    found = data.get("sha256") if isinstance(data, dict) else None
    if not isinstance(found, str):
        raise UserError(
            f"{folder}/metrics/evaluation.json does not say which questions it is of; evaluate the run again"
        )
    return found


def _measured(folder: Path) -> dict[str, float]:
    """Median seconds and supervised tokens per second of stage 2's steps, and the most memory a stage had."""
    logs = {stage: sorted((folder / "runs/training").glob(f"{stage}-*/log.jsonl")) for stage in STAGES}
    rows = {stage: read_jsonl(paths[-1]) for stage, paths in logs.items() if paths}
    if not rows.get("stage2"):
        return {}
    return {
        "step_seconds": median(row["seconds"] for row in rows["stage2"]),
        "tokens_per_s": median(row["tokens_per_s"] for row in rows["stage2"]),
        "memory_gib": max(row["memory_gib"] for log in rows.values() for row in log),
    }


def _stage1(folder: Path) -> dict[str, float]:
    """Main figures of the run's metrics/stage1.json, those that its recipe has."""
    path = folder / "metrics/stage1.json"
    metrics = read_json(path) if path.is_file() else {}
    vision = metrics.get("vision", {}).get("in_records", {})
    shots = {f"zero-shot {name}": own["fitted"] for name, own in _zero_shot(metrics) if "fitted" in own}
    found = {
        "cosine to the teacher": vision.get("cosine"),
        "of a constant": vision.get("constant"),
        "current token": metrics.get("current_token", {}).get("all", {}).get("top1"),
    }
    return {name: value for name, value in found.items() if value is not None} | shots


def _zero_shot(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    pictures = metrics.get("zero_shot", {}).get("scenes", {})
    return [(name, own) for name, own in pictures.items() if isinstance(own, dict)]


def finished(runs: list[Run]) -> list[Result]:
    """The runs that are evaluated, in their order.

    Raises:
        UserError: none is, or they answered different questions.
    """
    results = [Result.read(run) for run in runs if (run.folder / "metrics/evaluation.json").is_file()]
    if not results:
        recipes = ", ".join(dict.fromkeys(f"'{run.recipe}'" for run in runs))
        raise UserError(
            f"no run of {recipes} is finished yet in {COMPARISON}/{runs[0].group}/; 'make compare' makes them"
        )
    for result in results:
        if result.digest != results[0].digest:
            raise UserError(
                f"{result.run.folder} and {results[0].run.folder} were tested on different questions (digests "
                f"{result.digest[:12]} and {results[0].digest[:12]}); evaluate both again, on the same data"
            )
        # An evaluation that was cut off may have left answers that its metrics are not of.
        require_same_questions(results[0].answers, result.answers)
    return results


@dataclass(frozen=True)
class Summary:
    """A recipe over its seeds: accuracy by question type with 95 % intervals, and its lead over the reference."""

    recipe: str
    results: list[Result]
    accuracy: dict[str, Interval]
    lead: dict[str, Difference]
    p_adjusted: float | None
    """p-value of the lead over all questions, adjusted for the number of recipes compared (Holm)."""
    teachers_flops: float | None
    """Operations of training the teachers that the recipe needs; None where one's were not counted."""

    def mean(self, name: str) -> float:
        """Mean over the seeds of a number of the results."""
        return float(np.mean([getattr(result, name) for result in self.results]))

    def mean_stage1(self, name: str) -> float | None:
        """Mean over the seeds of what probes of stage 1 found; None where none has it."""
        values = [result.stage1[name] for result in self.results if name in result.stage1]
        return float(np.mean(values)) if values else None

    def mean_measured(self, name: str) -> float | None:
        """Mean over the seeds of what the machine decided; None where no run has it."""
        values = [result.measured[name] for result in self.results if name in result.measured]
        return float(np.mean(values)) if values else None


def summarise(results: list[Result], reference: list[Result]) -> list[Summary]:
    """One summary per recipe, in the order of the results; leads are over the runs of `reference`."""
    recipes = list(dict.fromkeys(result.run.recipe for result in results))
    by_recipe = {name: [result for result in results if result.run.recipe == name] for name in recipes}
    own = reference[0].run.recipe
    leads = {name: _leads(found, reference) for name, found in by_recipe.items() if name != own}
    adjusted = dict(zip(leads, holm([lead[ALL].p_value for lead in leads.values()]), strict=True)) if leads else {}
    return [
        Summary(name, found, _accuracies(found), leads.get(name, {}), adjusted.get(name), teachers_flops(found[0].run))
        for name, found in by_recipe.items()
    ]


def _accuracies(results: list[Result]) -> dict[str, Interval]:
    return {kind: hierarchical_interval(_answers(results, kind)) for kind in _kinds(results[0])}


def _leads(results: list[Result], reference: list[Result]) -> dict[str, Difference]:
    return {
        kind: paired_difference(_answers(results, kind), _answers(reference, kind)) for kind in _kinds(results[0])
    }  # fmt: skip


def _kinds(result: Result) -> list[str]:
    return [*sorted(set(result.kinds)), ALL]


def _answers(results: list[Result], kind: str) -> np.ndarray:
    """[seeds, questions of this kind]."""
    return np.stack([result.right(kind) for result in results])


def teachers_flops(run: Run) -> float | None:
    """Operations of training the teachers that a recipe starts from or learns from.

    None where those of one are unknown: a model of the hub, or one trained before its operations were counted.
    """
    lineage: dict[str, Any] = read_json(TEACHERS / "teachers.json")
    params = load_recipe(run.recipe_file)
    sees = params.model.fusion != "patches"  # raw patches inherit nothing from a vision teacher
    used = [lineage[teacher].get("training_flops") for teacher in ("language", *(["vision"] if sees else []))]
    return None if None in used else float(sum(used))
