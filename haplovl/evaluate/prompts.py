"""Which questions are computed together: those about the same pictures share a prefix; batches hold like lengths."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from haplovl.errors import UserError
from haplovl.model.processing import IMAGE_TOKEN, VIDEO_TOKEN


@dataclass(frozen=True)
class Ending:
    """The tokens of a prompt after its last picture, and the numbers of the questions that are asked by them."""

    question: str
    tokens: tuple[int, ...]
    numbers: list[int]


@dataclass(frozen=True)
class Prefix:
    """The prompt up to and with its last picture, and the endings of all questions about these pictures.

    Questions of one wording have one ending, and are asked once. Without pictures the text is empty, and the endings
    are whole prompts.
    """

    text: str
    pictures: tuple[Any, ...]
    endings: dict[tuple[int, ...], Ending] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """What is computed at once: at most `rows` questions, `tokens` tokens with padding, and the model's `context`."""

    rows: int
    tokens: int
    context: float

    def batches(self, items: Iterable[Any], length: Callable[[Any], int]) -> Iterator[list[Any]]:
        """Splits items, in their order, so that every batch, padded to its longest item, is within the limits.

        An item that is beyond them alone has a batch of its own.
        """
        held: list[Any] = []
        longest = 0
        for item in items:
            longest = max(longest, length(item))
            rows = len(held) + 1
            if held and (rows > self.rows or rows * longest > self.tokens or longest > self.context):
                yield held
                held, longest = [], length(item)
            held.append(item)
        if held:
            yield held


def prefixes(processor: Any, questions: Sequence[str], images: Sequence[Sequence[Any]]) -> list[Prefix]:
    """The questions by their pictures: those about fewer pictures first, else in the order given.

    Raises:
        UserError: a question holds a placeholder that stands for a picture or a video.
    """
    if not questions:
        return []
    texts = [_prompt(processor, question, len(shown)) for question, shown in zip(questions, images, strict=True)]
    rows = processor.tokenizer(texts, add_special_tokens=processor.add_special_tokens)["input_ids"]
    found: dict[tuple[Any, ...], Prefix] = {}
    for number, (question, text, row, shown) in enumerate(zip(questions, texts, rows, images, strict=True)):
        # A placeholder is a special token, so that text before it becomes the same tokens whatever follows.
        end = text.rfind(IMAGE_TOKEN) + len(IMAGE_TOKEN) if shown else 0
        start = len(row) - row[::-1].index(processor.image_token_id) if shown else 0
        key = (text[:end], *map(_identity, shown))
        prefix = found.setdefault(key, Prefix(text[:end], tuple(shown)))
        tokens = tuple(row[start:])
        prefix.endings.setdefault(tokens, Ending(question, tokens, [])).numbers.append(number)
    return sorted(found.values(), key=lambda prefix: len(prefix.pictures))


def _prompt(processor: Any, question: str, images: int) -> str:
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if text.count(IMAGE_TOKEN) != images or VIDEO_TOKEN in text:
        raise UserError(
            f"the question '{question:.80}' holds {IMAGE_TOKEN} or {VIDEO_TOKEN}, which stand for pictures and videos "
            "and cannot be words of a question"
        )
    return text


def _identity(picture: Any) -> Any:
    """What tells a picture from others: its name, or of a picture that is given itself, the object."""
    try:
        hash(picture)
    except TypeError:
        return ("object", id(picture))
    return picture
