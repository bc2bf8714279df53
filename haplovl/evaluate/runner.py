"""The evaluation: ask the held-out questions twice (seeing, then blanked), score, and write metrics and report."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table
from rich.text import Text

from haplovl.data.media import Media
from haplovl.errors import UserError
from haplovl.evaluate.answer import Answer, blank, load_to_evaluate, scored_answers
from haplovl.evaluate.console import wide_console
from haplovl.evaluate.looks import draw_looks
from haplovl.evaluate.questions import TOTAL, Question, digest, held_out_questions
from haplovl.evaluate.report import write_report
from haplovl.evaluate.scorers import Outcome, score
from haplovl.files import (
    METRICS,
    RAW,
    REPORTS,
    RUN_FILE,
    STAGE1,
    STAGE2,
    VALIDATED,
    require,
    sha256_of_folder,
    whole_folder,
    write_json,
)
from haplovl.progress import reporter
from haplovl.records import write_jsonl
from haplovl.settings import EvaluateSettings, Params
from haplovl.tracking import description


def evaluate(params: Params, root: Path = Path(".")) -> None:
    """Answers the held-out questions and writes metrics/evaluation.json and reports/evaluation/ below `root`.

    Raises:
        UserError: the validated records or the model are missing, or the test split asks nothing about pictures.
    """
    require(root / VALIDATED, "validate")
    require(root / STAGE2, "train stage2")
    questions = held_out_questions(params.evaluate.questions_per_type, folder=root / VALIDATED)
    if not questions:
        raise UserError("the test split holds no questions about pictures: nothing can be evaluated")
    asked = {path.name: sha256_of_folder(root / path) for path in (STAGE1, STAGE2) if (root / path).is_dir()}
    model, processor = load_to_evaluate(root / STAGE2)
    media = Media(root / RAW)
    outcomes = ask_all(model, processor, questions, media, params.evaluate)
    looks = draw_looks(model, processor, outcomes, media)
    metrics = {**score(outcomes), "questions": len(questions), "data": {"sha256": digest(questions)}}
    with whole_folder(root / REPORTS / "evaluation") as folder:
        write_jsonl(folder / "predictions.jsonl", (prediction_row(outcome) for outcome in outcomes))
        write_json(folder / RUN_FILE, {"stage": "evaluate", **description(params, root), "models": asked})
        write_report(folder / "index.html", params, metrics, outcomes, root, looks)
    write_json(root / METRICS / "evaluation.json", metrics)
    console = wide_console()
    console.print(summary_table(metrics))
    console.print(f"The report is {root / REPORTS / 'evaluation' / 'index.html'}", markup=False)


def ask_all(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    media: Media,
    settings: EvaluateSettings,
) -> list[Outcome]:
    """Asks every question with its pictures, then with the pictures blanked out.

    The model may be one in training; it is left as it was.

    Raises:
        UserError: see `scored_answers`.
        ImageError: a picture cannot be read.
    """
    texts = [question.question for question in questions]
    pictures = [[(question.source, image.path) for image in question.images] for question in questions]
    sizes = [[(image.width, image.height) for image in question.images] for question in questions]
    colour = processor.image_processor.mean_colour

    def ask(name: str, shown: Sequence[Sequence[Any]], open_picture: Callable[[Any], Image.Image]) -> list[Answer]:
        with reporter(name, len(questions)) as report:
            return scored_answers(
                model,
                processor,
                texts,
                shown,
                settings.batch,
                settings.max_new_tokens,
                open_picture=open_picture,
                progress=report.update,
                batch_tokens=settings.batch_tokens,
            )

    seen = ask("questions", pictures, lambda name: media.open(*name))
    # Blanked out, pictures of one size are the same picture, and many questions are the same question.
    blanked = ask("blanked questions", sizes, lambda size: blank(size, colour))
    return [
        Outcome(question, answer.text, blank_answer.text, answer.confidence)
        for question, answer, blank_answer in zip(questions, seen, blanked, strict=True)
    ]


def prediction_row(outcome: Outcome) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    question = outcome.question
    return {
        "id": question.id,
        "kind": question.kind,
        "question": question.question,
        "answer": question.answer,
        "prediction": outcome.prediction,
        "blank_prediction": outcome.blank_prediction,
        "source": question.source,
        "images": [image.path for image in question.images],
        "image_sha256": [image.sha256 for image in question.images],
        "correct": outcome.correct,
        "confidence": round(outcome.confidence, 3),
    }


def summary_table(metrics: dict[str, Any]) -> Table:
    """The metrics as a table for the terminal."""
    table = Table(title="Held-out questions, exact match")
    table.add_column("type")
    for name in ("accuracy", "95 %", "majority", "blank image", "margin", "questions"):
        table.add_column(name, justify="right", no_wrap=name == "95 %")
    for name, shares in {**metrics["types"], TOTAL: metrics}.items():
        accuracy, *others = [f"{shares[key]:.3f}" for key in ("accuracy", "majority", "blank_image", "margin")]
        ends = f"{shares['accuracy_low']:.3f}–{shares['accuracy_high']:.3f}"
        style = "bold" if name == TOTAL else None
        # Types are whatever a source calls them, and no markup.
        table.add_row(Text(name), accuracy, ends, *others, str(shares["n"]), style=style)
    return table
