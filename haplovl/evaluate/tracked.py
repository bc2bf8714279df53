"""An evaluation in Weights & Biases: its figures, every prediction, and a table of examples with their pictures.

It is made from the files that the evaluation left and changes none of them.
"""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from haplovl.data.media import Media
from haplovl.evaluate.pages import PIXELATED_BELOW, THUMBNAIL_SIDE
from haplovl.evaluate.predictions import Said, read_predictions
from haplovl.evaluate.report import sample
from haplovl.files import METRICS, RAW, REPORTS, RUNS, read_json, sha256_of, write_json
from haplovl.machine import machine
from haplovl.records import read_items
from haplovl.settings import Params, fingerprint
from haplovl.tracking import PROJECT, TrackedRun, code_version, description, grouping

EVALUATIONS = RUNS / "evaluations"
"""Where each evaluation ran, outside DVC's outs."""
EXAMPLES = 200
"""Questions that are shown with their pictures: the same ones for every model, so that tables can be joined."""
PREDICTIONS = 10_000
"""Most rows of the table of all predictions: more W&B cuts off."""
ENLARGED = 4
GAP = 4


def log_evaluation(params: Params, root: Path = Path(".")) -> None:
    """Shows the evaluation below `root` as a W&B run, and notes where it ran.

    Whatever fails in W&B is told once and changes nothing here.
    """
    predictions = root / REPORTS / "evaluation" / "predictions.jsonl"
    metrics = read_json(root / METRICS / "evaluation.json")
    about = description(params, root)
    config = {
        "stage": "evaluate",
        **about,
        "code": code_version(),
        "questions": {"asked": metrics["questions"], **metrics["data"]},
    }
    key = evaluation_key(params, root)
    run = TrackedRun(PROJECT, key, config, grouping(params, "evaluate"), "the evaluation is complete without it")
    write_json(EVALUATIONS / f"{key}.json", {"machine": machine(), "wandb": run.place})
    if run.alive:
        run.summarise(figures(metrics))
        rows = [item.data for item, _ in zip(read_items(predictions), range(PREDICTIONS), strict=False)]
        run.table("predictions", list(rows[0]), lambda wandb: [list(map(_cell, row.values())) for row in rows])
        chosen = sample(list(read_predictions(predictions).answers.values()), EXAMPLES)
        columns = ["picture", "id", "kind", "question", "answer", "prediction", "correct", "confidence"]
        media = Media(root / RAW)
        run.table("examples", columns, lambda wandb: [_example(wandb, said, media) for said in chosen])
    run.finish()


def evaluation_key(params: Params, root: Path = Path(".")) -> str:
    """What names the evaluation below `root` in W&B and in runs/evaluations/: hash of what it is of and came to."""
    predictions = root / REPORTS / "evaluation" / "predictions.jsonl"
    return f"evaluate-{fingerprint([description(params, root), sha256_of(predictions)])[:16]}"


def figures(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation under flat names: `accuracy`, `accuracy_low`, `colour/accuracy`, …"""
    flat = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    for kind, shares in metrics["types"].items():
        flat |= {f"{kind}/{name}": value for name, value in shares.items()}
    return flat


def _cell(value: Any) -> Any:
    """Lists become text: W&B wants one type in a column, and an empty list has another than one of texts."""
    return json.dumps(value) if isinstance(value, list) else value


def _example(wandb: Any, said: Said, media: Media) -> list[Any]:
    question = said.question
    pictures = [_shown(media.open(question.source, image.path)) for image in question.images]
    return [
        wandb.Image(_side_by_side(pictures)) if pictures else None,
        question.id,
        question.kind,
        question.question,
        question.answer,
        said.prediction,
        said.correct,
        said.confidence,
    ]


def _shown(image: Image.Image) -> Image.Image:
    """A picture in a size that can be looked at: small ones enlarged with hard pixels, large ones shrunk."""
    if max(image.size) < PIXELATED_BELOW:
        return image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return image


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Several pictures as one, in their order from left to right."""
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    whole = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + GAP
    return whole
