"""Answers and log-likelihoods for a harness: prompts as they come, pictures at their places, batches by length."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from haplovl.errors import UserError
from haplovl.model.generation import context_of
from haplovl.model.processing import IMAGE_TOKEN

SAMPLING = ("temperature", "top_p", "top_k")
SETTINGS = (*SAMPLING, "do_sample", "num_beams", "repetition_penalty", "length_penalty", "max_new_tokens", "until")
IGNORED = ("image_aspect_ratio",)
"""Settings of other models' image processors: ours cuts pictures as it was trained to."""
MAX_NEW_TOKENS = 1024
"""For tasks that name no length, as lmms-eval's own models do."""

_MARKER = re.compile(r"<image (\d+)>")


@dataclass(frozen=True)
class Question:
    """A prompt, where to get its pictures when they are due, and the settings of generation that came with it."""

    text: str
    pictures: Callable[[], Sequence[Image.Image]]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """An answer and the tokens of prompt (pictures included) and answer."""

    text: str
    tokens_in: int
    tokens_out: int


def generate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    batch: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int], None] = lambda answered: None,
) -> list[Reply]:
    """The answers, in the order of the questions. Greedy, unless a question's settings sample.

    Questions with the same settings and of about the same length share a batch. `max_new_tokens` is for questions that
    name no length; `progress` is told after every batch how many are answered.

    Raises:
        UserError: a setting that is not known, or a prompt that leaves no room to answer.
        ImageError: a picture cannot be used.
    """
    settings = [_settings(question.settings, max_new_tokens) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (repr(settings[i]), _length(questions[i].text), i))
    replies: dict[int, Reply] = {}
    for chosen in _runs(order, settings, batch):
        options, until = settings[chosen[0]]
        inputs = _inputs(model, processor, [_prompt(questions[i]) for i in chosen])
        replies.update(zip(chosen, _answer(model, processor, inputs, options, until), strict=True))
        progress(len(replies))
    return [replies[i] for i in range(len(questions))]


def log_likelihoods(
    model: Any, processor: Any, questions: Sequence[Question], continuations: Sequence[str], batch: int
) -> list[tuple[float, bool]]:
    """For every answer the sum of the log-probabilities of its tokens after its prompt, and whether each was likeliest.

    The answer is written as the chat template writes an assistant's; what ends it is not counted.

    Raises:
        UserError: an empty answer, or one that is too long together with its prompt.
        ImageError: a picture cannot be used.
    """
    order = sorted(range(len(questions)), key=lambda i: (_length(questions[i].text) + len(continuations[i]), i))
    found: dict[int, tuple[float, bool]] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        prompts = [_prompt(questions[i]) for i in chosen]
        wholes = [
            _with_answer(processor, prompt[0], continuations[i]) for prompt, i in zip(prompts, chosen, strict=True)
        ]
        found.update(zip(chosen, _score(model, processor, prompts, wholes), strict=True))
    return [found[i] for i in range(len(questions))]


def place_pictures(text: str, pictures: int) -> tuple[str, list[int]]:
    """A prompt with `<image>` for every picture, and the numbers of the pictures in the order of those placeholders.

    Where the prompt has as many different marks `<image 1>`, `<image 2>` … as there are pictures, which lmms-eval hands
    over by rising number, each picture stands in the place of the first mark of its own. Otherwise, pictures stand
    ahead of the text, as in training. No other character of the prompt changes.
    """
    marks = list(dict.fromkeys(_MARKER.findall(text)))
    if not pictures:
        return text, []
    if len(marks) != pictures:
        return IMAGE_TOKEN * pictures + "\n" + text, list(range(pictures))
    for mark in marks:
        text = text.replace(f"<image {mark}>", IMAGE_TOKEN, 1)
    return text, [sorted(marks).index(mark) for mark in marks]


def rendered_with_pictures(processor: Any, text: str) -> str:
    """A prompt as the model reads it: with the pictures that its marks name, or else with one."""
    return _rendered(processor, place_pictures(text, len(set(_MARKER.findall(text))) or 1)[0])


# ---- prompts

Prompt = tuple[str, list[Image.Image]]


def _prompt(question: Question) -> Prompt:
    given = list(question.pictures())
    strange = next((item for item in given if not isinstance(item, Image.Image)), None)
    if strange is not None:
        raise UserError(f"this task shows the model a {type(strange).__name__}; the adapter takes pictures only")
    text, order = place_pictures(question.text, len(given))
    return text, [given[i] for i in order]


def _rendered(processor: Any, text: str) -> str:
    return processor.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )


def _inputs(model: Any, processor: Any, prompts: Sequence[Prompt]) -> Any:
    texts, pictures = [_rendered(processor, text) for text, _ in prompts], [shown for _, shown in prompts]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    return _within_context(model, inputs).to(model.device, model.dtype)


def _within_context(model: Any, inputs: Any) -> Any:
    longest, context = int(inputs["attention_mask"].sum(1).max()), context_of(model.config)
    if longest > context:
        raise UserError(f"a prompt has {longest} tokens with its pictures, but the model reads {context}")
    return inputs


def _length(text: str) -> int:
    return len(text) + 1000 * len(set(_MARKER.findall(text)))  # a picture is about as long as a page


def _runs(order: Sequence[int], settings: Sequence[Any], batch: int) -> list[list[int]]:
    """Batches of neighbours with the same settings."""
    runs: list[list[int]] = []
    for i in order:
        if runs and len(runs[-1]) < batch and settings[runs[-1][0]] == settings[i]:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


# ---- generation


def _settings(given: dict[str, Any], max_new_tokens: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What `generate` takes, and the texts that end an answer."""
    unknown = [name for name in given if name not in (*SETTINGS, *IGNORED)]
    if unknown:
        raise UserError(f"the task sets '{unknown[0]}', which is not known; known are {', '.join(SETTINGS)}")
    until = given.get("until") or ()
    options = {name: value for name, value in given.items() if name in SETTINGS and name != "until"}
    options.setdefault("max_new_tokens", max_new_tokens)
    sampled = {name: options.pop(name) for name in SAMPLING if options.get(name) is not None}
    options["do_sample"] = bool(options.get("do_sample", float(sampled.get("temperature", 0)) > 0))
    if options["do_sample"]:
        options |= sampled
    return options, tuple(text for text in ([until] if isinstance(until, str) else until) if text)


@torch.inference_mode()
def _answer(model: Any, processor: Any, inputs: Any, options: dict[str, Any], until: tuple[str, ...]) -> list[Reply]:
    start = inputs["input_ids"].shape[1]
    stop = StoppingCriteriaList([_Until(processor.tokenizer, until, start)] if until else [])
    output = model.generate(**inputs, **options, stopping_criteria=stop)[:, start:]
    said = _said(output, _end_tokens(model), processor.tokenizer.pad_token_id)
    texts = processor.batch_decode(
        [row[own].tolist() for row, own in zip(output, said, strict=True)], skip_special_tokens=True
    )
    sizes = inputs["attention_mask"].sum(1).tolist()
    return [
        Reply(_before(text, until), size, tokens)
        for text, size, tokens in zip(texts, sizes, said.sum(1).tolist(), strict=True)
    ]


def _said(output: torch.Tensor, ends: list[int], pad: int) -> torch.Tensor:
    """[B, T] True for the tokens of an answer: up to and with its end, or up to the padding after a text of `until`."""
    is_end = torch.isin(output, torch.tensor([*ends, pad], device=output.device)).int()
    said = is_end.cumsum(1) - is_end == 0
    return said if pad in ends else said & (output != pad)


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _before(text: str, until: tuple[str, ...]) -> str:
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))].strip()


class _Until(StoppingCriteria):
    """Ends the rows whose answer holds one of the texts; what stands in the prompt does not count."""

    def __init__(self, tokenizer: Any, until: tuple[str, ...], start: int) -> None:
        self.tokenizer, self.until, self.start = tokenizer, until, start
        # The end of an answer: no token is shorter than a byte, and a few may be cut characters.
        self.tail = max(len(text.encode()) for text in until) + 8

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        done = [any(stop in text for stop in self.until) for text in texts]
        return torch.tensor(done, device=input_ids.device, dtype=torch.bool)


# ---- log-likelihoods


def _with_answer(processor: Any, text: str, answer: str) -> tuple[str, str]:
    """The rendered prompt, and what the chat template writes after it up to the end of the answer."""
    answer = answer.strip()
    if not answer:
        raise UserError("the task asks for the likelihood of an empty answer")
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    whole, prompt = processor.apply_chat_template(messages, tokenize=False), _rendered(processor, text)
    # From the prompt on: its words or the template's end mark may hold the answer's letters as well.
    start = whole.find(answer, len(os.path.commonprefix([whole, prompt])))
    start = whole.rindex(answer) if start < 0 else start
    return whole[: start + len(answer)], prompt


@torch.inference_mode()
def _score(
    model: Any, processor: Any, prompts: Sequence[Prompt], wholes: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    pictures = [shown for _, shown in prompts]
    inputs = processor(text=[whole for whole, _ in wholes], images=pictures, padding=True, return_tensors="pt")
    inputs = _within_context(model, inputs).to(model.device, model.dtype)
    counts = [_answer_tokens(processor, whole, prompt) for whole, prompt in wholes]
    ids, longest = inputs["input_ids"], max(counts)
    # Padding is on the left, so every answer ends the row; the logits before a token tell its probability.
    logits = model(**inputs, logits_to_keep=longest + 1).logits[:, :-1].float()
    targets = ids[:, -longest:]
    own = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    likeliest = logits.argmax(-1) == targets
    return [
        (own[row, longest - count :].sum().item(), bool(likeliest[row, longest - count :].all()))
        for row, count in enumerate(counts)
    ]


def _answer_tokens(processor: Any, whole: str, prompt: str) -> int:
    """How many tokens of a rendered text follow its prompt; a token that is partly the prompt's counts."""
    tokens = processor.tokenizer(whole, add_special_tokens=processor.add_special_tokens)["input_ids"]
    before = processor.tokenizer(prompt, add_special_tokens=processor.add_special_tokens)["input_ids"]
    shared = next((i for i, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b), len(before))
    return len(tokens) - shared


def _until_end(new_ids: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """[B, T] True for the tokens up to and with the first of `ends`; what follows is padding."""
    is_end = torch.isin(new_ids, torch.tensor(ends, device=new_ids.device, dtype=new_ids.dtype)).int()
    return is_end.cumsum(1) - is_end == 0
