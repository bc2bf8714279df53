"""The two sides of a comparison: predictions that exist already, or models that are asked now."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from haplovl.data.media import Media
from haplovl.data.validated import ImageFile
from haplovl.errors import UserError
from haplovl.evaluate.answer import load_to_evaluate, one_line, require_haplovl, scored_answers
from haplovl.evaluate.looking import special_in
from haplovl.evaluate.predictions import Said, Side, as_object, read_predictions, text_of
from haplovl.evaluate.questions import UNNAMED_KIND, Question, checked_kind, held_out_questions
from haplovl.files import RAW, VALIDATED, require, sha256_of
from haplovl.pictures import ImageError, decode_bytes, local_path, open_image, read_image_file
from haplovl.progress import reporter
from haplovl.records import read_items
from haplovl.settings import PARAMS_FILE, EvaluateSettings, load_params

OWN = ""
"""The source of pictures that are files on this machine rather than collected ones."""
DECIMALS = 3


@dataclass(frozen=True)
class Exam:
    """Both sides, and where their pictures lie."""

    first: Side
    second: Side
    media: Media

    def open_picture(self, question: Question, number: int) -> Image.Image:
        """A picture of a question, if it is still the one that was asked about.

        Raises:
            ImageError: it is missing here, cannot be read, or has another content.
        """
        return open_picture(self.media, question.source, question.images[number])


def take_exam(
    first: Path,
    second: Path,
    questions_file: Path | None = None,
    max_new_tokens: int | None = None,
    root: Path = Path("."),
) -> Exam:
    """Each side is a model's folder, which is asked, or a predictions.jsonl file, which is read.

    Models answer the questions of the evaluation, or those of `questions_file`, with the settings of params.yaml.

    Raises:
        UserError: a folder holds no model, a file no predictions, or a question or a picture cannot be used.
    """
    paths = (first, second)
    media = Media(root / RAW)
    for path in paths:
        if not path.exists():
            raise UserError(f"there is neither a model's folder nor a file of predictions at {path}")
    models = [path for path in paths if path.is_dir()]
    for folder in models:  # both, before the first one is asked for long
        require_haplovl(folder)
    if questions_file is not None and not models:
        raise UserError("--questions is for models to answer, but both sides are predictions already")
    settings = load_params(root / PARAMS_FILE).evaluate if (root / PARAMS_FILE).exists() else EvaluateSettings()
    if max_new_tokens is not None:
        settings = settings.model_copy(update={"max_new_tokens": max_new_tokens})
    questions = _questions(questions_file, settings, root) if models else []
    sides = [_ask(path, questions, media, settings) if path in models else read_predictions(path) for path in paths]
    return Exam(sides[0], sides[1], media)


def read_questions(path: Path) -> list[Question]:
    """Questions of one's own, one JSON object a line: `question`, `images` (paths below the file's folder) and, where
    they are known, `answer`, `kind` and `id`.

    Raises:
        UserError: a line cannot be used, or a picture is missing or cannot be read; names the line.
    """
    questions: dict[str, Question] = {}
    for item in read_items(require(path)):
        place = f"{path}, line {item.position}"
        if item.error:
            raise UserError(f"{place}: {item.error}")
        row = as_object(item.data, place)
        id_ = text_of(row, "id", place, f"{path.stem}-{item.position}")
        if id_ in questions:
            raise UserError(f"{place}: the question '{id_}' occurs twice")
        names = row.get("images", [])
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{place}: 'images' must be a path or a list of paths")
        images = tuple(_own_picture(path.parent, name, place) for name in names)
        text, answer = text_of(row, "question", place).strip(), text_of(row, "answer", place, "").strip()
        if not text:
            raise UserError(f"{place}: the question is empty")
        kind = checked_kind(text_of(row, "kind", place, UNNAMED_KIND), place)
        questions[id_] = Question(id_, id_, kind, images, text, answer, OWN)
    if not questions:
        raise UserError(f"{path} holds no questions")
    return list(questions.values())


def open_picture(media: Media, source: str, image: ImageFile) -> Image.Image:
    """A picture of a source, or of one's own, if its content is still that which `image` names.

    Raises:
        ImageError: it is missing here, cannot be read, or has another content.
    """
    content = read_image_file(Path(image.path)) if source == OWN else media.read(source, image.path)
    if hashlib.sha256(content).hexdigest() != image.sha256:
        raise ImageError("the picture has another content than the one that was asked about")
    return decode_bytes(content)


def _questions(questions_file: Path | None, settings: EvaluateSettings, root: Path) -> list[Question]:
    if questions_file is not None:
        return read_questions(questions_file)
    require(root / VALIDATED, "validate")
    questions = held_out_questions(settings.questions_per_type, folder=root / VALIDATED)
    if not questions:
        raise UserError("the test split holds no questions about pictures: there is nothing to ask")
    return questions


def _ask(folder: Path, questions: Sequence[Question], media: Media, settings: EvaluateSettings) -> Side:
    model, processor = load_to_evaluate(folder)
    for question in questions:
        if found := special_in(processor.tokenizer, question.question):
            raise UserError(f"question '{question.id}' holds '{found}', which means something special to {folder}")
    with reporter(f"questions to {folder}", len(questions)) as report:
        try:
            said = scored_answers(
                model,
                processor,
                [question.question for question in questions],
                [[(question.source, image) for image in question.images] for question in questions],
                batch=settings.batch,
                max_new_tokens=settings.max_new_tokens,
                open_picture=lambda name: open_picture(media, *name),
                progress=report.update,
                batch_tokens=settings.batch_tokens,
            )
        except ImageError as error:
            raise UserError(f"a picture of the questions cannot be used: {error}") from None
        except ValueError as error:
            raise UserError(f"the model in {folder} cannot take these questions: {one_line(error)}") from None
    answers = zip(questions, said, strict=True)
    # Rounded as predictions.jsonl is, so that it does not matter which of both an answer comes from.
    return Side(str(folder), {q.id: Said(q, answer.text, round(answer.confidence, DECIMALS)) for q, answer in answers})


def _own_picture(folder: Path, name: str, place: str) -> ImageFile:
    try:
        path = folder / local_path(name)
        image = open_image(path)
    except ImageError as error:
        raise UserError(f"{place}: {name:.200}: {error}") from None
    return ImageFile(str(path), sha256_of(path), image.width, image.height)
