"""Free-running greedy answers: one fresh conversation per question, never the right answer's tokens as input."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.logging import disable_progress_bar

from haplovl.errors import UserError
from haplovl.evaluate.prompts import Ending, Limits, Prefix, prefixes
from haplovl.model.generation import context_of
from haplovl.pictures import open_image
from haplovl.settings import EvaluateSettings


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
    batch_tokens: int = EvaluateSettings().batch_tokens,
) -> list[Answer]:
    """Like `answer`, with confidences. `open_picture` makes pictures of what `images` holds (paths of
    files by default) when their batch is due.

    At most `batch` questions, pictures of as many, and `batch_tokens` tokens are computed at once. Questions about the
    same pictures share what is read before their words, so that every picture is opened, embedded and read once. Equal
    questions about the same pictures are asked once. `progress` is told after every batch how many are answered.

    The model may be one in training: it is left as it was.

    Raises:
        UserError: a question holds a placeholder, or is with its pictures longer than the model's context.
    """
    limits = Limits(batch, batch_tokens, context_of(model.config))
    answers: dict[int, Answer] = {}
    with answering(model):
        for read in _read_all(model, processor, prefixes(processor, questions, images), limits, open_picture):
            for asked in read.batches(limits, max_new_tokens):
                said = _answer(model, processor, read, asked, max_new_tokens)
                for (_, ending), one in zip(asked, said, strict=True):
                    answers |= dict.fromkeys(ending.numbers, one)
                progress(len(answers))
    return [answers[number] for number in range(len(questions))]


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """The model in evaluation mode, without gradients; afterwards every part of it is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Tensors of inference_mode that a model keeps would be refused by its next training step.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def blank(size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    """A picture of this width and height in one colour.

    The colour must be the image processor's `mean_colour`, never the mean of the picture that it stands for: that would
    give away how bright the scene is, hence how many digits it holds, and its colour.
    """
    return Image.new("RGB", size, colour)


def load_model(folder: Path, dtype: str = "auto") -> tuple[Any, Any]:
    """The model of a folder, ready to answer on the GPU if there is one, and its processor.

    It computes in the precision of its weights, or in that which `dtype` names.

    Raises:
        UserError: the folder is missing, holds no HaploVL model, or the model is damaged.
    """
    require_haplovl(folder)
    disable_progress_bar()  # of the weights: they load in a moment, and an answer should stand alone
    from haplovl.model import HaploForConditionalGeneration, HaploProcessor, pack_for_cpu
    from haplovl.model.inherit import suppress_placeholders

    try:
        processor = HaploProcessor.from_pretrained(folder)
        model = HaploForConditionalGeneration.from_pretrained(folder, dtype=dtype)
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


@dataclass(frozen=True)
class _Read:
    """Prefixes that the model has read: their tokens and padding [N, P], and their keys and values (None if P is 0)."""

    prefixes: list[Prefix]
    ids: torch.Tensor
    mask: torch.Tensor
    cache: Cache | None = None

    def batches(self, limits: Limits, max_new_tokens: int) -> Iterator[list[tuple[int, Ending]]]:
        """The endings with the rows of their prefixes, in batches of like lengths."""
        asked = [(row, ending) for row, prefix in enumerate(self.prefixes) for ending in prefix.endings.values()]
        asked.sort(key=lambda pair: len(pair[1].tokens))
        room = self.ids.shape[1] + max_new_tokens
        return limits.batches(asked, lambda pair: room + len(pair[1].tokens))

    def rows(self, chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor, Cache | None]:
        """Tokens, padding and a cache of its own for every chosen row, without the columns that are padding in all."""
        rows = torch.tensor(chosen, device=self.ids.device)
        first = int(self.mask[rows].any(dim=0).int().argmax()) if self.cache is not None else 0
        cut = (rows, slice(first, None))
        cache = None
        if self.cache is not None:
            kept = [(layer.keys, layer.values) for layer in self.cache.layers]
            cache = DynamicCache([(keys[rows, :, first:], values[rows, :, first:]) for keys, values in kept])
        return self.ids[cut], self.mask[cut], cache


def _read_all(
    model: Any,
    processor: Any,
    shared: Sequence[Prefix],
    limits: Limits,
    open_picture: Callable[[Any], Image.Image],
) -> Iterator[_Read]:
    """The prefixes, read by the model in batches of like lengths; at most `limits.rows` are held open."""
    for pictures, alike in groupby(shared, key=lambda prefix: len(prefix.pictures)):
        while held := list(islice(alike, limits.rows)):
            if not pictures:
                _check_context(held, [0] * len(held), limits.context)
                nothing = torch.zeros(len(held), 0, dtype=torch.long, device=model.device)
                yield _Read(held, nothing, nothing)
                continue
            opened = [(prefix, _open(processor, prefix, open_picture)) for prefix in held]
            _check_context(held, [_length(inputs) for _, inputs in opened], limits.context)
            opened.sort(key=lambda pair: _length(pair[1]))
            for part in limits.batches(opened, lambda pair: _length(pair[1])):
                yield _read(model, processor, part)


def _open(processor: Any, prefix: Prefix, open_picture: Callable[[Any], Image.Image]) -> dict[str, torch.Tensor]:
    """The model's inputs for one prefix; of its pictures only the pixels that the model sees are kept."""
    pictures = [open_picture(picture) for picture in prefix.pictures]
    return dict(processor(text=[prefix.text], images=[pictures], return_tensors="pt"))


def _length(inputs: dict[str, torch.Tensor]) -> int:
    return inputs["input_ids"].shape[1]


def _check_context(held: Sequence[Prefix], lengths: Sequence[int], context: float) -> None:
    for prefix, length in zip(held, lengths, strict=True):
        longest = max(prefix.endings.values(), key=lambda ending: len(ending.tokens))
        tokens = length + len(longest.tokens)
        if tokens > context:
            raise UserError(
                f"the question '{longest.question:.80}' has {tokens} tokens with its pictures, more than the model's "
                f"context of {context}"
            )


def _read(model: Any, processor: Any, part: Sequence[tuple[Prefix, dict[str, torch.Tensor]]]) -> _Read:
    inputs = {name: [own[name] for _, own in part] for name in part[0][1]}
    ids, mask = _padded([row[0] for row in inputs.pop("input_ids")], processor)
    del inputs["attention_mask"]
    media = {name: _stacked(values).to(model.device) for name, values in inputs.items()}
    media = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in media.items()}
    ids, mask = ids.to(model.device), mask.to(model.device)
    out = model(input_ids=ids, attention_mask=mask, **media, use_cache=True, logits_to_keep=1)
    return _Read([prefix for prefix, _ in part], ids, mask, out.past_key_values)


def _padded(rows: Sequence[torch.Tensor], processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens, padded on the left, and what is none: two [B, L]."""
    padding = processor.tokenizer.pad_token_id or 0
    ids = pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
    real = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(real, batch_first=True, padding_value=0, padding_side="left")


def _stacked(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pictures of several prefixes one after the other, [N, …], filled up with zeros to the most tiles."""
    most = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    out = parts[0].new_zeros(sum(map(len, parts)), *most)
    start = 0
    for part in parts:
        stop = start + len(part)
        out[start:stop][(slice(None), *map(slice, part.shape[1:]))] = part
        start = stop
    return out


def _answer(
    model: Any, processor: Any, read: _Read, asked: Sequence[tuple[int, Ending]], max_new_tokens: int
) -> list[Answer]:
    """Goes on from read prefixes with the endings of prompts, and answers."""
    ids, mask, cache = read.rows([row for row, _ in asked])
    own_ids, own_mask = _padded([torch.tensor(ending.tokens, device=ids.device) for _, ending in asked], processor)
    prompts = torch.cat([ids, own_ids], dim=1)
    noted = Confidence()
    output_ids = model.generate(
        input_ids=prompts,
        attention_mask=torch.cat([mask, own_mask], dim=1),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([noted]),
    )
    new_ids = output_ids[:, prompts.shape[1] :]
    said = _until_end(new_ids, model.generation_config.eos_token_id)
    confidences = (torch.stack(noted.steps, dim=1) * said).sum(1) / said.sum(1)
    decoded = processor.batch_decode(new_ids, skip_special_tokens=True)
    return [Answer(text.strip(), value) for text, value in zip(decoded, confidences.tolist(), strict=True)]


def _until_end(new_ids: torch.Tensor, end: int | list[int] | None) -> torch.Tensor:
    """[B, T] True for the tokens up to and with the first end token; what follows is padding."""
    ends = torch.tensor([end] if isinstance(end, int) else end or [], device=new_ids.device, dtype=new_ids.dtype)
    is_end = torch.isin(new_ids, ends).int()
    return is_end.cumsum(1) - is_end == 0


def require_haplovl(folder: Path) -> None:
    """Refuses what is not the folder of a HaploVL model, before anything of it is loaded.

    Raises:
        UserError: the folder is missing or holds no HaploVL model.
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
