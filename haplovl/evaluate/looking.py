"""Where an answer looks: what each of its tokens attends to in the pictures, layer by layer, in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from haplovl.errors import UserError
from haplovl.model.attention_weights import AttentionWeights
from haplovl.model.layout import Placement, patch_of_pixels
from haplovl.model.media import read_grids
from haplovl.model.processing import reserved_words

MOST_TOKENS = 24
"""Most tokens of an answer, and of a question, that are looked at: the first ones."""


@dataclass(frozen=True)
class Shown:
    """A picture as it was given, how it was laid out, and the side of its patches in pixels."""

    image: Image.Image
    placed: Placement
    patch: int

    def spread(self, values: np.ndarray, height: int, width: int) -> np.ndarray:
        """Values of the patches at the pixels of the picture, drawn with height x width pixels.

        Shapes: values [rows, columns] → [height, width], NaN where no patch shows the picture. Padding lies outside.
        """
        rows, columns = (np.array(places) for places in patch_of_pixels(self.placed, height, width, self.patch))
        seen = (rows >= 0)[:, None] & (columns >= 0)[None, :]
        return np.where(seen, values[np.maximum(rows, 0)][:, np.maximum(columns, 0)], np.nan)


@dataclass(frozen=True)
class Look:
    """Where the tokens of an answer (and of the question) look, with every picture's patches as [rows, columns].

    `attention`, per picture [tokens, layers, rows, columns], is the mean over heads. A token of the answer is looked
    at where it is said, in the position before it; a token of the question where it is read. `share` [tokens, layers]
    is the attention that all tokens of pictures get, class and newline tokens included, and `even` [tokens] what equal
    attention to all visible tokens would give them. `likeness`, per picture [tokens, rows, columns], is the cosine of
    the token's own output of the pre-decoder with the patch's; None where the model has no pre-decoder.
    """

    question: str
    answer: str
    tokens: list[str]
    of_question: int
    left_out: int
    pictures: list[Shown]
    layers: list[tuple[str, int]]
    attention: list[np.ndarray]
    share: np.ndarray
    even: np.ndarray
    likeness: list[np.ndarray] | None

    def relative(self) -> list[np.ndarray]:
        """Attention to each patch in multiples of an equal share among all patches of all pictures."""
        total = sum(part.sum(axis=(2, 3)) for part in self.attention)[:, :, None, None]
        patches = sum(part[0, 0].size for part in self.attention)
        return [part * patches / np.maximum(total, np.finfo(np.float32).tiny) for part in self.attention]


@torch.inference_mode()
def look(
    model: Any,
    processor: Any,
    question: str,
    pictures: Sequence[Image.Image],
    answer: str | None = None,
    max_new_tokens: int = 64,
    with_question: bool = False,
) -> Look:
    """Asks the model (greedily), or takes the answer that is given, and looks where its tokens look.

    `with_question` looks at the question's tokens as well, before the answer's. The model's weights, mode and attention
    backends stay as they were.

    Raises:
        UserError: question or answer are empty or hold special tokens, there is no picture, or the model cannot take
            them.
    """
    question, answer = question.strip(), answer if answer is None else answer.strip()
    _check(processor, question, pictures, answer)
    prompt = [{"role": "user", "content": [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    model.eval()
    try:
        inputs = processor(text=[text], images=[list(pictures)], return_tensors="pt").to(model.device, model.dtype)
        if answer is None:
            said = _generate(model, inputs, max_new_tokens)
        else:
            said = _answer_ids(processor, prompt, text, answer)
        if not said:
            raise UserError("the model's answer is empty: it has no token to look at")
        asked = _question_places(processor, text, question, inputs) if with_question else []
        return _look(model, processor, question, pictures, inputs, asked, said)
    except (ValueError, torch.OutOfMemoryError) as error:
        raise UserError(f"the model cannot take this question: {' '.join(str(error).split())}") from None


def special_in(tokenizer: Any, text: str) -> str | None:
    """The first string in a text that would be read as a special token or placeholder; None where there is none."""
    return next((word for word in reserved_words(tokenizer) if word in text), None)


def _check(processor: Any, question: str, pictures: Sequence[Image.Image], answer: str | None) -> None:
    if not question:
        raise UserError("the question is empty")
    if not pictures:
        raise UserError("there is no picture to look at; name one with --image")
    if answer == "":
        raise UserError("the answer is empty: it has no token to look at")
    found = special_in(processor.tokenizer, f"{question}\n{answer or ''}")
    if found:
        raise UserError(
            f"'{found}' means something special to this model and cannot be part of a text; write it differently"
        )


def _generate(model: Any, inputs: Any, max_new_tokens: int) -> list[int]:
    """The tokens of the greedy answer, without the end token and what follows."""
    sequence = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    said = sequence[0, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return said[: next((place for place, token in enumerate(said) if token in ends), len(said))]


def _answer_ids(processor: Any, prompt: list[dict[str, Any]], text: str, answer: str) -> list[int]:
    """The tokens of a given answer as the template writes it, with the space that may stand before it."""
    tokenizer, written = processor.tokenizer, f"{text}{answer}"
    whole = processor.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
    # From the prompt on: the template's end mark may hold the answer's letters as well.
    start = whole.find(answer, len(text))
    if whole.startswith(text) and start >= 0:
        written = whole[: start + len(answer)]
    before, both = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, written))
    if both[: len(before)] == before:
        return both[len(before) :]
    return tokenizer(answer, add_special_tokens=False)["input_ids"]


def _question_places(processor: Any, text: str, question: str, inputs: Any) -> list[int]:
    """Positions of the question's tokens in the sequence, in which every picture's placeholder has become many."""
    start = text.rfind(question)
    if start < 0:  # a template that changes the words
        return []
    options = {"add_special_tokens": processor.add_special_tokens, "return_offsets_mapping": True}
    ids, offsets = (processor.tokenizer(text, **options)[name] for name in ("input_ids", "offset_mapping"))
    # Pictures come before the question, so all that they add stands before it.
    added = inputs["input_ids"].shape[1] - len(ids)
    places = [place for place, (first, stop) in enumerate(offsets) if stop > start and first < start + len(question)]
    return [place + added for place in places]


def _look(
    model: Any,
    processor: Any,
    question: str,
    pictures: Sequence[Image.Image],
    inputs: Any,
    asked: list[int],
    said: list[int],
) -> Look:
    device = model.device
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([said], device=device)], dim=1)
    shown = asked[:MOST_TOKENS]
    places = [*shown, *range(length, length + len(said[:MOST_TOKENS]))]
    queries = torch.tensor([place - (place >= length) for place in places], device=device)
    media = [_shown(processor, picture) for picture in pictures]
    is_image = ids[0] == model.config.image_token_id
    patches = _patch_positions(model, inputs, is_image)
    layers, found, shares, even = [], [], [], []

    def take(part: str, weights: torch.Tensor, allowed: torch.Tensor) -> None:
        mean = weights.mean(dim=0)
        layers.append((part, 1 + sum(name == part for name, _ in layers)))
        found.append(mean.cpu().numpy())
        shares.append(mean[:, is_image].sum(dim=-1).cpu().numpy())
        if not even:
            even.append((allowed & is_image).sum(dim=-1).div(allowed.sum(dim=-1)).cpu().numpy())

    with AttentionWeights(model, queries, take).attached(), _PreDecoded(model) as pre_decoded:
        given = {name: inputs[name] for name in ("pixel_values", "image_grids")}
        model.model(ids, **given)
    weights = np.stack(found, axis=1)  # [tokens, layers, keys]
    tokens = ids[0, torch.tensor(places)].tolist()
    return Look(
        question=question,
        answer=processor.tokenizer.decode(said, skip_special_tokens=True).strip(),
        tokens=[processor.tokenizer.decode([token]).strip() for token in tokens],
        of_question=len(shown),
        left_out=len(asked) + len(said) - len(places),
        pictures=media,
        layers=layers,
        attention=[weights[:, :, own.ravel()].reshape(*weights.shape[:2], *own.shape) for own in patches],
        share=np.stack(shares, axis=1),
        even=even[0],
        likeness=_likeness(pre_decoded.output, places, patches),
    )


def _shown(processor: Any, picture: Image.Image) -> Shown:
    look = processor.image_processor
    return Shown(picture, look.place(picture.height, picture.width), look.patch_size)


def _patch_positions(model: Any, inputs: Any, is_image: torch.Tensor) -> list[np.ndarray]:
    """Where the patches of every picture stand in the sequence: [rows, columns] each."""
    positions, pre = is_image.nonzero()[:, 0].cpu().numpy(), model.config.pre_config
    patches, start = [], 0
    for grid in read_grids(inputs["image_grids"]):
        own = start + np.array(grid.patch_places(pre.class_token, pre.image_newline))
        patches.append(positions[own].reshape(grid.out_rows, grid.out_columns))
        start += grid.tokens(pre.class_token, pre.image_newline)
    return patches


class _PreDecoded:
    """Keeps the output of the pre-decoder [B, L, H] of one forward pass; None where there is no pre-decoder."""

    def __init__(self, model: Any) -> None:
        self.pre_decoder, self.output = model.model.pre_decoder, None

    def __enter__(self) -> "_PreDecoded":
        if self.pre_decoder is not None:
            self.handle = self.pre_decoder.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.pre_decoder is not None:
            self.handle.remove()

    def _keep(self, module: Any, given: Any, output: torch.Tensor) -> None:
        self.output = output


def _likeness(states: torch.Tensor | None, places: list[int], patches: list[np.ndarray]) -> list[np.ndarray] | None:
    if states is None:
        return None
    own = functional.normalize(states[0, torch.tensor(places)].float(), dim=-1)
    cosines = []
    for picture in patches:
        other = functional.normalize(states[0, torch.from_numpy(picture.ravel())].float(), dim=-1)
        cosines.append((own @ other.T).reshape(len(places), *picture.shape).cpu().numpy())
    return cosines
