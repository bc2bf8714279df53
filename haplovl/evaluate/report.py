"""The evaluation report: one HTML page that holds all it shows and works without a network."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from haplovl.data.media import Media
from haplovl.evaluate.looks import DrawnLook
from haplovl.evaluate.pages import data_uri, embedded_picture, page_templates
from haplovl.evaluate.plots import accuracy_bars, loss_curves
from haplovl.evaluate.predictions import Said
from haplovl.evaluate.scorers import Outcome, by_kind, normalise
from haplovl.files import (
    METRICS,
    PREPARED,
    RAW,
    STAGE1,
    STAGE2,
    TEACHERS,
    read_json,
    sha256_of,
    sha256_of_folder,
    write_whole,
)
from haplovl.settings import Params, fingerprint

Judged = TypeVar("Judged", Outcome, Said)
WORST_SHOWN = 12
CONFUSION_ANSWERS = 10
"""Answers with a row and a column of their own in the confusion table; the rest share one."""
OPEN_ENDED = 40
"""A type with more different right answers than this has no confusion table: nothing would repeat in it."""
OTHER = "other"


def write_report(
    target: Path,
    params: Params,
    metrics: dict[str, Any],
    outcomes: Sequence[Outcome],
    root: Path,
    looks: Sequence[DrawnLook] = (),
) -> None:
    """Writes the page. The same numbers, pictures and models give the same bytes.

    `root` is the project's folder: pictures, training logs and lineage are read below it. What a recipe does not have
    (a stage without a log, say) is left out of the page.
    """
    media = Media(root / RAW)
    samples = sample(outcomes, params.evaluate.samples_in_report)
    worst = worst_mistakes(outcomes, WORST_SHOWN)
    weakest = min(metrics["types"], key=lambda name: (metrics["types"][name]["accuracy"], name))
    tightest = min(metrics["types"], key=lambda name: (metrics["types"][name]["margin"], name))
    page = (
        page_templates()
        .get_template("report.html.j2")
        .render(
            recipe=params.recipe,
            metrics=metrics,
            tightest=tightest,
            bars=data_uri(accuracy_bars(metrics).encode(), "image/svg+xml"),
            curves=_curves(root),
            samples=[_card(outcome, media) for outcome in samples],
            wrong=sum(not outcome.correct for outcome in outcomes),
            worst=[_card(outcome, media) for outcome in worst],
            looks=[{**_card(item.outcome, media), "figure": data_uri(item.png, "image/png")} for item in looks],
            weakest=weakest,
            confusion=confusion(by_kind(outcomes)[weakest]),
            validation=_read_if_there(root / METRICS / "validation.json"),
            lineage=lineage(params, metrics, root),
        )
    )
    write_whole(target, page)


def sample(outcomes: Sequence[Judged], count: int) -> list[Judged]:
    """`count` outcomes (or predictions) spread over the types.

    They are chosen by a hash of the question: never by how well it was answered.
    """
    piles = [sorted(group, key=_hash_of) for group in by_kind(outcomes).values()]
    longest = max(map(len, piles), default=0)
    chosen = [pile[turn] for turn in range(longest) for pile in piles if turn < len(pile)][:count]
    return sorted(chosen, key=lambda outcome: (outcome.question.kind, _hash_of(outcome)))


def worst_mistakes(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """The wrong answers that the model was surest of, surest first."""
    wrong = [outcome for outcome in outcomes if not outcome.correct]
    return sorted(wrong, key=lambda outcome: (-outcome.confidence, outcome.question.id))[:count]


def confusion(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    """Counts of right answers (rows) against predictions (columns) for one question type; None if it is open-ended.

    Returns `columns` (names) and `rows`: each with its `answer`, its number of questions `n`, and `cells` with `count`,
    `share` of the row and whether the cell is on the diagonal (`right`).
    """
    pairs = Counter((normalise(o.question.answer), normalise(o.prediction)) for o in outcomes)
    totals = Counter(normalise(o.question.answer) for o in outcomes)
    if len(totals) > OPEN_ENDED:
        return None
    names = sorted(sorted(totals), key=lambda name: -totals[name])[:CONFUSION_ANSWERS]
    names = sorted(names)
    folded: Counter = Counter()
    for (answer, prediction), count in pairs.items():
        column = prediction if prediction in names else OTHER
        folded[answer if answer in names else OTHER, column] += count
    rows = [*names, OTHER] if any(answer == OTHER for answer, _ in folded) else names
    columns = [*names, OTHER] if any(prediction == OTHER for _, prediction in folded) else names
    return {"columns": columns, "rows": [_confusion_row(name, columns, folded) for name in rows]}


def lineage(params: Params, metrics: dict[str, Any], root: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the numbers stand on, as sections of (name, value) rows: model, settings, questions, data, teachers."""
    # The gate (`register`) and `probe` do not make these numbers: changing them must not change this page.
    made_by = params.model_dump(mode="json", by_alias=True, exclude={"register_", "probe"})
    sections = [
        ("Model", [("folder", STAGE2.as_posix()), ("sha256 of all files", sha256_of_folder(root / STAGE2))]),
        ("Settings", [("recipe", params.recipe), ("seed", str(params.seed)), ("fingerprint", fingerprint(made_by))]),
        ("Questions", [("asked", str(metrics["questions"])), ("sha256", metrics["data"]["sha256"])]),
    ]
    manifest = root / PREPARED / "manifest.json"
    if manifest.is_file():
        shards = read_json(manifest).get("shards", [])
        records = Counter({shard["split"]: 0 for shard in shards})
        for shard in shards:
            records[shard["split"]] += shard["records"]
        rows = [("manifest sha256", sha256_of(manifest)), ("shards", str(len(shards)))]
        sections.append(("Training data", rows + [(f"records, {split}", f"{n:,}") for split, n in records.items()]))
    for name, about in (_read_if_there(root / TEACHERS / "teachers.json") or {}).items():
        rows = _flat(about) if isinstance(about, dict) else [("", _text(about))]
        sections.append((f"Teacher: {name}", rows))
    return sections


def _confusion_row(name: str, columns: list[str], folded: Counter) -> dict[str, Any]:
    total = sum(folded[name, column] for column in columns)
    cells = [
        {
            "count": folded[name, column],
            "share": folded[name, column] / max(total, 1),
            "right": column == name and name != OTHER,
        }
        for column in columns
    ]
    return {"answer": name, "n": total, "cells": cells}


def _curves(root: Path) -> list[dict[str, Any]]:
    """Title, chart and last loss of every training stage that left a log."""
    titles = (("Stage 1: distillation", STAGE1), ("Stage 2: instruction tuning", STAGE2))
    curves = []
    for title, folder in titles:
        log = _read_log(root / folder / "training_log.jsonl")
        if log:
            chart = data_uri(loss_curves(log).encode(), "image/svg+xml")
            curves.append({"title": title, "chart": chart, "steps": len(log), "last": _tail_mean(log)})
    return curves


def _tail_mean(log: list[dict[str, Any]]) -> float:
    """Mean loss of the last twentieth of the steps: one step's loss says little."""
    tail = log[-max(1, len(log) // 20) :]
    return sum(line["loss"] for line in tail) / len(tail)


def _card(outcome: Outcome, media: Media) -> dict[str, Any]:
    question = outcome.question
    return {
        "id": question.id,
        "kind": question.kind,
        "question": question.question,
        "answer": question.answer,
        "prediction": outcome.prediction,
        "blank_prediction": outcome.blank_prediction,
        "correct": outcome.correct,
        "certainty": math.exp(outcome.confidence),
        "pictures": [embedded_picture(media.open(question.source, image.path)) for image in question.images],
    }


def _hash_of(outcome: Outcome) -> str:
    return hashlib.sha256(outcome.question.id.encode()).hexdigest()


def _read_if_there(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # Not splitlines(): it would also cut at U+2028 and the like, which JSON allows inside a string.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _flat(about: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as rows with dotted names."""
    rows: list[tuple[str, str]] = []
    for name, value in about.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", _text(value))]
    return rows


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
