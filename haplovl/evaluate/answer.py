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
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.logging import disable_progress_bar

from haplovl.errors import UserError
from haplovl.evaluate.prompts import Ending, Limits, Prefix, prefixes
from haplovl.model.cache import fit_cache
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

    It computes in the precision of its weights, or in that which `dtype` names; in float32 on a CPU without
    instructions for it.

    Raises:
        UserError: the folder is missing, holds no HaploVL model, or the model is damaged.
    """
    require_haplovl(folder)
    disable_progress_bar()  # of the weights: they load in a moment, and an answer should stand alone
    from haplovl.model import HaploForConditionalGeneration, HaploProcessor, pack_for_cpu
    from haplovl.model.inherit import suppress_placeholders
    from haplovl.model.packed import can_pack

    try:
        processor = HaploProcessor.from_pretrained(folder)
        model = HaploForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"the model in {folder} cannot be loaded: {one_line(error)}") from None
    if not model.generation_config.suppress_tokens:  # a folder from before the model's own configuration held them
        suppress_placeholders(model)
    if torch.cuda.is_available():
        return model.eval().to("cuda"), processor
    return pack_for_cpu(model.eval() if can_pack(model.dtype) else model.eval().float()), processor


def load_to_evaluate(folder: Path) -> tuple[Any, Any]:
    """As `load_model`, but on a CPU in float32 whatever the weights are in.

    In bfloat16 the two largest logits are often equal, and the batch decides which of them wins (docs/evaluation.md).

    Raises:
        UserError: as `load_model`.
    """
    return load_model(folder, "auto" if torch.cuda.is_available() else "float32")


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

    def rows(self, model: Any, chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor, Cache | None]:
        """Tokens, padding and a cache of its own for every chosen row, without the columns that are padding in all."""
        rows = torch.tensor(chosen, device=self.ids.device)
        if self.cache is None:
            return self.ids[rows], self.mask[rows], None
        first = int(self.mask[rows].any(dim=0).int().argmax())
        cache = DynamicCache()
        fit_cache(cache, model.config)
        for index, layer in enumerate(self.cache.layers):
            if layer.is_initialized:
                cache.update(layer.keys[rows, :, first:], layer.values[rows, :, first:], index)
        return self.ids[rows, first:], self.mask[rows, first:], cache


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
    ids, mask, cache = read.rows(model, [row for row, _ in asked])
    own_ids, own_mask = _padded([torch.tensor(ending.tokens, device=ids.device) for _, ending in asked], processor)
    tokens, scores, said = model.generate(
        input_ids=torch.cat([ids, own_ids], dim=1),
        attention_mask=torch.cat([mask, own_mask], dim=1),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        custom_generate=_greedy_search,
    )
    words = [row[own].tolist() for row, own in zip(tokens, said, strict=True)]
    texts = processor.batch_decode(words, skip_special_tokens=True)
    confidences = (scores.sum(1) / said.sum(1)).tolist()
    return [Answer(text.strip(), value) for text, value in zip(texts, confidences, strict=True)]


def _greedy_search(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    stopping_criteria: Callable[[torch.Tensor, Any], torch.Tensor],
    generation_config: Any,
    **inputs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The greedy search of `generate`, but rows are computed no longer when half of those computed have ended.

    `generate` calls it with what it has prepared. Returns the answers' tokens, their log-probabilities, and True up to
    and with the token that ends an answer: three [B, T].
    """
    cache, mask = inputs["past_key_values"], inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    batch, start = input_ids.shape
    new, rows = input_ids[:, int(cache.get_seq_length()) :], torch.arange(batch, device=input_ids.device)
    going, scores, said = input_ids.new_ones(batch, dtype=torch.bool), [], []
    while input_ids.shape[1] < generation_config.max_length and bool(going.any()):
        out = model(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1].float()
        # Processors of logits may keep something for every row, so they are given all of them.
        logits = logits.new_zeros(batch, logits.shape[1]).index_copy(0, rows, logits)
        likeliest = logits_processor(input_ids, logits).log_softmax(-1).max(-1)
        scores.append(likeliest.values * going)
        said.append(going)
        new = likeliest.indices.masked_fill(~going, generation_config.pad_token_id or 0)[:, None]
        input_ids, mask = torch.cat([input_ids, new], dim=1), functional.pad(mask, (0, 1), value=1)
        going = going & ~stopping_criteria(input_ids, None)
        if 2 * int(going.sum()) <= len(rows):
            kept = going[rows].nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, mask = rows[kept], mask[kept]
        new = new[rows]
    return input_ids[:, start:], torch.stack(scores, dim=1), torch.stack(said, dim=1)


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
