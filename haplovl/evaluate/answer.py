"""Free-running greedy answers: one fresh conversation per question, never the right answer's tokens as input."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils.logging import disable_progress_bar

from haplovl.errors import UserError
from haplovl.pictures import open_image


@dataclass(frozen=True)
class Answer:
    """What the model said, and the mean log-probability of the tokens in which it said it (0 is certain)."""

    text: str
    confidence: float


def answer(
    model: Any,
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Sequence[Path]],
    batch: int,
    max_new_tokens: int,
) -> list[str]:
    """The model's greedy answers to questions about pictures, in the order of the questions.

    `images` holds the picture files of every question (none for a question about text).

    Raises:
        ImageError: a picture cannot be read.
    """
    answers = scored_answers(model, processor, questions, images, batch, max_new_tokens)
    return [item.text for item in answers]


def scored_answers(
    model: Any,
    processor: Any,
    questions: Sequence[str],
    images: Sequence[Sequence[Any]],
    batch: int,
    max_new_tokens: int,
    open_picture: Callable[[Any], Image.Image] = open_image,
    progress: Callable[[int], None] = lambda answered: None,
) -> list[Answer]:
    """Like `answer`, with confidences. `open_picture` makes pictures of what `images` holds (paths of
    files by default) when their batch is due.

    Questions of about the same length share a batch, so that little is computed for padding. `progress` is told after
    every batch how many questions are answered.
    """
    model.eval()
    by_length = sorted(range(len(questions)), key=lambda i: (len(images[i]), len(questions[i]), i))
    answers: dict[int, Answer] = {}
    for start in range(0, len(by_length), batch):
        chosen = by_length[start : start + batch]
        pictures = [[open_picture(path) for path in images[i]] for i in chosen]
        said = _answer_batch(model, processor, [questions[i] for i in chosen], pictures, max_new_tokens)
        answers.update(zip(chosen, said, strict=True))
        progress(len(answers))
    return [answers[i] for i in range(len(questions))]


def blank(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """A picture of the same size in one colour.

    The colour must be the image processor's `mean_colour`, never the mean of the picture itself: that would give away
    how bright the scene is, hence how many digits it holds, and its colour.
    """
    return Image.new("RGB", image.size, colour)


def load_model(folder: Path) -> tuple[Any, Any]:
    """The model of a folder, ready to answer on the GPU if there is one, and its processor.

    Raises:
        UserError: the folder is missing, holds no HaploVL model, or the model is damaged.
    """
    require_haplovl(folder)
    disable_progress_bar()  # of the weights: they load in a moment, and an answer should stand alone
    from haplovl.model import HaploForConditionalGeneration, HaploProcessor, pack_for_cpu
    from haplovl.model.inherit import suppress_placeholders

    try:
        processor = HaploProcessor.from_pretrained(folder)
        model = HaploForConditionalGeneration.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"the model in {folder} cannot be loaded: {one_line(error)}") from None
    if not model.generation_config.suppress_tokens:  # a folder from before the model's own configuration held them
        suppress_placeholders(model)
    return pack_for_cpu(model.eval().to("cuda" if torch.cuda.is_available() else "cpu")), processor


class Confidence(LogitsProcessor):
    """Notes the log-probability of every greedy token; keeps one number per token instead of whole score tables."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Greedy search takes the best token, so its log-probability is the largest one.
        self.steps.append(scores.float().log_softmax(-1).amax(-1))
        return scores


@torch.inference_mode()
def _answer_batch(
    model: Any, processor: Any, questions: list[str], pictures: list[list[Image.Image]], max_new_tokens: int
) -> list[Answer]:
    texts = [
        processor.apply_chat_template(_conversation(question, len(shown)), add_generation_prompt=True, tokenize=False)
        for question, shown in zip(questions, pictures, strict=True)
    ]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(model.device, model.dtype)
    noted = Confidence()
    output_ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([noted]),
    )
    new_ids = output_ids[:, inputs["input_ids"].shape[1] :]
    said = _until_end(new_ids, model.generation_config.eos_token_id)
    log_probabilities = torch.stack(noted.steps, dim=1)
    confidences = (log_probabilities * said).sum(1) / said.sum(1)
    decoded = processor.batch_decode(new_ids, skip_special_tokens=True)
    return [Answer(text.strip(), value) for text, value in zip(decoded, confidences.tolist(), strict=True)]


def _conversation(question: str, images: int) -> list[dict[str, Any]]:
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def _until_end(new_ids: torch.Tensor, end: int | list[int] | None) -> torch.Tensor:
    """[B, T] True for the tokens up to and with the first end token; what follows is padding."""
    ends = torch.tensor([end] if isinstance(end, int) else end or [], device=new_ids.device, dtype=new_ids.dtype)
    is_end = torch.isin(new_ids, ends).int()
    return is_end.cumsum(1) - is_end == 0


def require_haplovl(folder: Path) -> None:
    """Refuses what is no folder of a HaploVL model, by its config.json alone.

    Raises:
        UserError: it is missing or holds another model.
    """
    if not folder.is_dir():
        raise UserError(f"there is no model folder {folder}; train a model with 'dvc repro', or name one with --model")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} is no model: it holds no readable config.json") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    from haplovl.model import HaploForConditionalGeneration

    if found != HaploForConditionalGeneration.config_class.model_type:
        raise UserError(f"{folder} is not a HaploVL model: its config.json names the type {found!r}")


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks; the name of its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
