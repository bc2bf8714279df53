"""Zero-shot classification through the teacher's text tower, from the teacher's class token and from the distilled one.

The class token has no part in the distillation loss: it learns nothing but by attending to patches that do, and
nothing keeps it in the teacher's space. So three ways are measured that lead there from it: a linear map, fitted to the
teacher's class tokens of training pictures; the vision head, which was trained on patches alone; and the last layer's
output as it is, where the layers are as many as the teacher's and were inherited.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from haplovl.evaluate.probe.classes import PictureSet, imagenet, scenes
from haplovl.evaluate.probe.linear_map import HELD_OUT, fit_linear_map
from haplovl.evaluate.probe.similarity import Cosine
from haplovl.evaluate.probe.subject import Subject, run_pictures, teacher_states
from haplovl.evaluate.probe.vision import square
from haplovl.model.media import read_grids
from haplovl.settings import Params

WAYS = ("fitted", "vision_head", "direct")
TEXTS_TOGETHER = 256

Open = Callable[[], Image.Image]
Progress = Callable[[int], None]
LinearMap = Callable[[torch.Tensor], torch.Tensor]


def undefined(subject: Subject, params: Params) -> str:
    """Why there can be no zero-shot classification; empty where there can."""
    if not subject.core.config.pre_config.class_token:
        return "the recipe has no class token (model.class_token)"
    if subject.clip is None:
        return "the vision teacher came without a text tower"
    if subject.tokenizer is None:
        return "the vision teacher came without its tokenizer"
    if params.probe.imagenet is None and all(source.format != "scenes" for source in params.collect.sources):
        return "no source has the format scenes, and probe.imagenet names no folder"
    return ""


def picture_sets(params: Params) -> dict[str, PictureSet]:
    """What there is to classify, by name.

    Raises:
        UserError: the folder of `probe.imagenet` cannot be used.
    """
    found = {}
    if drawn := scenes(params):
        found["scenes"] = drawn
    if params.probe.imagenet is not None:
        found["imagenet"] = imagenet(Path(params.probe.imagenet).expanduser(), params.probe.zero_shot_pictures)
    return found


@dataclass(frozen=True)
class ClassTokens:
    """Of pictures in one tile each: both class tokens [N, H], and the pictures by every way but the map, [N, P].

    `ours` is the pre-decoder's output, `theirs` the teacher's last hidden state.
    """

    ours: torch.Tensor
    theirs: torch.Tensor
    features: dict[str, torch.Tensor]


@torch.inference_mode()
def look(subject: Subject, pictures: Sequence[Image.Image], target: int) -> ClassTokens:
    """The class tokens of pictures; `target` is the teacher's hidden state that stage 1 taught."""
    own = subject.processor.image_processor
    processor = own if own.max_tiles == 1 else square(own, own.image_size)
    shown = processor(pictures, return_tensors="pt")
    pixels, grids = shown["pixel_values"][:, 0], read_grids(shown["image_grids"])
    states = teacher_states(subject, pixels)
    done = run_pictures(subject, pixels, grids)
    features = {"teacher": project(subject, states[-1][:, 0])}
    if subject.vision_head is not None:
        replaced = _through_the_head(subject, done.output, grids, states[target])
        for layer in subject.teacher.encoder.layers[target:]:
            replaced = layer(replaced, None)
        features["vision_head"] = project(subject, replaced[:, 0])
    own_layers, their_layers = subject.layers
    # The last of fewer layers was inherited from a lower one of the teacher: its output is no last hidden state.
    if own_layers == their_layers and done.states[-1].shape[-1] == states[-1].shape[-1]:
        features["direct"] = project(subject, done.states[-1][:, 0])
    return ClassTokens(done.output[:, 0], states[-1][:, 0], features)


@torch.inference_mode()
def fit(subject: Subject, pictures: Sequence[Open], target: int, batch: int, progress: Progress) -> LinearMap | None:
    """The linear map from our class tokens to the teacher's of these pictures; None where they are too few."""
    if len(pictures) < HELD_OUT:
        return None
    seen = [look(subject, part, target) for part in _batches(pictures, batch, progress)]
    return fit_linear_map(torch.cat([tokens.ours for tokens in seen]), torch.cat([tokens.theirs for tokens in seen]))


@torch.inference_mode()
def zero_shot(
    subject: Subject, shown: PictureSet, fitted: LinearMap | None, target: int, batch: int, progress: Progress
) -> dict[str, Any]:
    """Accuracy of every question by the teacher and by each of WAYS, chance, and how alike the class tokens are."""
    features: dict[str, list[torch.Tensor]] = {}
    ours, theirs = Cosine(), Cosine()
    for pictures in _batches(shown.pictures, batch, progress):
        tokens = look(subject, pictures, target)
        ours.add(tokens.ours, tokens.ours)
        theirs.add(tokens.theirs, tokens.theirs)
        mapped = {} if fitted is None else {"fitted": project(subject, fitted(tokens.ours))}
        for way, found in (tokens.features | mapped).items():
            features.setdefault(way, []).append(found)
    every = [prompt for question in shown.questions.values() for prompts in question.prompts for prompt in prompts]
    known = _texts(subject, list(dict.fromkeys(every)))
    results: dict[str, Any] = {
        "pictures": len(shown.pictures),
        "alike": ours.constant,
        "teacher_alike": theirs.constant,
    }
    for name, question in shown.questions.items():
        classes = torch.stack([_class_features([known[prompt] for prompt in own]) for own in question.prompts])
        said = {way: (torch.cat(found) @ classes.T).argmax(dim=1).cpu() for way, found in features.items()}
        results[name] = _scores(said, torch.tensor(question.right), len(classes))
    return results


def _scores(said: dict[str, torch.Tensor], right: torch.Tensor, classes: int) -> dict[str, Any]:
    """Accuracies, and how often each of WAYS says what the teacher says."""
    ways = [way for way in WAYS if way in said]
    return {
        "classes": classes,
        "chance": 1 / classes,
        **{way: float((said[way] == right).double().mean()) for way in ("teacher", *ways)},
        "agreement": {way: float((said[way] == said["teacher"]).double().mean()) for way in ways},
    }


def _batches(pictures: Sequence[Open], batch: int, progress: Progress) -> Iterator[list[Image.Image]]:
    for start in range(0, len(pictures), batch):
        yield [open_picture() for open_picture in pictures[start : start + batch]]
        progress(min(start + batch, len(pictures)))


def project(subject: Subject, token: torch.Tensor) -> torch.Tensor:
    """Class tokens in the place of the teacher's last ones → unit vectors of the space of both towers: [N, P]."""
    return functional.normalize(subject.clip.visual_projection(subject.teacher.post_layernorm(token)), dim=-1)


def _through_the_head(
    subject: Subject, output: torch.Tensor, grids: Sequence[Any], taught: torch.Tensor
) -> torch.Tensor:
    """The vision head's class token and patches in the teacher's order: [N, L, H] → [N, n, H].

    The loss leaves their lengths open, which only the teacher's layers above `taught` would notice: they are
    the teacher's own.
    """
    newline_free = subject.core.image_embedding.is_patch(grids[:1])
    newline_free[0] = True  # the class token
    directions = functional.normalize(subject.vision_head(output[:, newline_free.to(output.device)]), dim=-1)
    return directions * taught.norm(dim=-1, keepdim=True)


def _class_features(prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One unit vector for a class: the mean over its prompts. [P]."""
    return functional.normalize(torch.stack([*prompts]).mean(dim=0), dim=0)


def _texts(subject: Subject, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    parts = (texts[start : start + TEXTS_TOGETHER] for start in range(0, len(texts), TEXTS_TOGETHER))
    return dict(zip(texts, (own for part in parts for own in text_features(subject, part)), strict=True))


def text_features(subject: Subject, texts: Sequence[str]) -> torch.Tensor:
    """Texts in the space that the teacher's towers share, as unit vectors: [N, P]."""
    longest = subject.clip.config.text_config.max_position_embeddings
    rows = [_ended(ids, subject.tokenizer, longest) for ids in subject.tokenizer(list(texts))["input_ids"]]
    width, end = max(map(len, rows)), subject.tokenizer.eos_token_id
    ids = torch.tensor([row + [end] * (width - len(row)) for row in rows], device=subject.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=subject.device)
    pooled = subject.clip.text_model(input_ids=ids, attention_mask=mask).pooler_output
    return functional.normalize(subject.clip.text_projection(pooled), dim=-1)


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[int]:
    """At most `longest` ids, of which the last is the end of the text: the tower reads the text there."""
    end = tokenizer.eos_token_id
    return [*(ids[:-1] if ids[-1:] == [end] else ids)[: longest - 1], end]
