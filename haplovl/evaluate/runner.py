"""The evaluation: ask the held-out questions twice (seeing, then blanked), score, and write metrics and report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from haplovl.data.media import Media
from haplovl.errors import UserError
from haplovl.evaluate.answer import Answer, blank, load_model, scored_answers
from haplovl.evaluate.looks import draw_looks
from haplovl.evaluate.questions import Question, digest, held_out_questions
from haplovl.evaluate.report import write_report
from haplovl.evaluate.scorers import Outcome, score
from haplovl.files import METRICS, RAW, REPORTS, RUN_FILE, STAGE2, VALIDATED, require, whole_folder, write_json
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
    model, processor = load_model(root / STAGE2)
    media = Media(root / RAW)
    outcomes = ask_all(model, processor, questions, media, params.evaluate)
    looks = draw_looks(model, processor, outcomes, media)
    metrics = {**score(outcomes), "questions": len(questions), "data": {"sha256": digest(questions)}}
    with whole_folder(root / REPORTS / "evaluation") as folder:
        write_jsonl(folder / "predictions.jsonl", (prediction_row(outcome) for outcome in outcomes))
        write_json(folder / RUN_FILE, {"stage": "evaluate", **description(params, root)})
        write_report(folder / "index.html", params, metrics, outcomes, root, looks)
    write_json(root / METRICS / "evaluation.json", metrics)
    console = Console()
    console.print(summary_table(metrics))
    console.print(f"The report is {root / REPORTS / 'evaluation' / 'index.html'}")


def ask_all(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    media: Media,
    settings: EvaluateSettings,
) -> list[Outcome]:
    """Asks every question with its pictures, then with the pictures blanked out."""
    texts = [question.question for question in questions]
    pictures = [[(question.source, image.path) for image in question.images] for question in questions]

    def open_picture(name: tuple[str, str]) -> Image.Image:
        return media.open(*name)

    limits = {"batch": settings.batch, "max_new_tokens": settings.max_new_tokens}
    with reporter("questions", len(questions)) as report:
        told = {"open_picture": open_picture, "progress": report.update}
        seen = scored_answers(model, processor, texts, pictures, **limits, **told)

    colour = processor.image_processor.mean_colour
    # Blanked out, many questions are the same one: equal words and equal picture sizes. Each is asked once.
    keys = [(q.question, tuple((image.width, image.height) for image in q.images)) for q in questions]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    asked = sorted(first.values())
    with reporter("blanked questions", len(asked)) as report:
        said = scored_answers(
            model,
            processor,
            [texts[i] for i in asked],
            [pictures[i] for i in asked],
            **limits,
            open_picture=lambda name: blank(open_picture(name), colour),
            progress=report.update,
        )
    blanked: dict[int, Answer] = dict(zip(asked, said, strict=True))
    return [
        Outcome(question, answer.text, blanked[first[key]].text, answer.confidence)
        for question, answer, key in zip(questions, seen, keys, strict=True)
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
    for name, shares in {**metrics["types"], "all": metrics}.items():
        accuracy, *others = [f"{shares[key]:.3f}" for key in ("accuracy", "majority", "blank_image", "margin")]
        ends = f"{shares['accuracy_low']:.3f}–{shares['accuracy_high']:.3f}"
        table.add_row(name, accuracy, ends, *others, str(shares["n"]), style="bold" if name == "all" else None)
    return table
