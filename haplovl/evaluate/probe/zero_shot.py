"""Zero-shot classification through the teacher's text tower, from the teacher's class token and from the distilled one.

The class token has no part in the distillation loss: it learns nothing but by attending to patches that do. Two ways
lead from it into the teacher's space, and both are measured: the vision head, in place of the teacher's hidden state
that it was trained to give, and the last layer's output as it is, since the layers were inherited.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from haplovl.evaluate.probe.classes import PictureSet, imagenet, scenes
from haplovl.evaluate.probe.subject import Subject, run_pictures, teacher_states
from haplovl.evaluate.probe.vision import square
from haplovl.model.media import read_grids
from haplovl.settings import Params

WAYS = ("teacher", "vision_head", "direct")
TEXTS_TOGETHER = 256


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


@torch.inference_mode()
def zero_shot(
    subject: Subject,
    shown: PictureSet,
    target: int,
    batch: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Accuracy of every question by each of WAYS, and chance. `target` is the hidden state that stage 1 taught."""
    seen: dict[str, list[torch.Tensor]] = {way: [] for way in WAYS}
    for start in range(0, len(shown.pictures), batch):
        pictures = [open_picture() for open_picture in shown.pictures[start : start + batch]]
        for way, features in image_features(subject, pictures, target).items():
            seen[way].append(features)
        progress(min(start + batch, len(shown.pictures)))
    features = {way: torch.cat(parts) for way, parts in seen.items() if parts}
    every = [prompt for question in shown.questions.values() for prompts in question.prompts for prompt in prompts]
    known = _texts(subject, list(dict.fromkeys(every)))
    results = {}
    for name, question in shown.questions.items():
        classes = torch.stack([_class_features([known[prompt] for prompt in own]) for own in question.prompts])
        said = {way: (found @ classes.T).argmax(dim=1).cpu() for way, found in features.items()}
        right = torch.tensor(question.right)
        results[name] = {"classes": len(classes), "chance": 1 / len(classes)}
        results[name] |= {way: float((answers == right).double().mean()) for way, answers in said.items()}
        results[name] |= {
            f"{way}_agrees": float((answers == said["teacher"]).double().mean())
            for way, answers in said.items()
            if way != "teacher"
        }
    return {"pictures": len(shown.pictures), **results}


def image_features(subject: Subject, pictures: Sequence[Any], target: int) -> dict[str, torch.Tensor]:
    """Pictures, one tile each, in the space that the teacher's towers share: [N, P] by each of WAYS that there is."""
    own = subject.processor.image_processor
    processor = own if own.max_tiles == 1 else square(own, own.image_size)
    shown = processor(pictures, return_tensors="pt")
    pixels, grids = shown["pixel_values"][:, 0], read_grids(shown["image_grids"])
    states = teacher_states(subject, pixels)
    done = run_pictures(subject, pixels, grids)
    found = {"teacher": _finish(subject, states[-1])}
    if subject.vision_head is not None:
        found["vision_head"] = _finish(subject, _through_the_head(subject, done.output, grids, states[target]), target)
    if done.states[-1].shape[-1] == states[-1].shape[-1]:
        found["direct"] = _finish(subject, done.states[-1][:, :1])
    return found


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


def _finish(subject: Subject, state: torch.Tensor, number: int | None = None) -> torch.Tensor:
    """From hidden state `number` (the last by default) through the layers above it to unit vectors: [N, P]."""
    tower, clip = subject.teacher, subject.clip
    for layer in tower.encoder.layers[number:] if number is not None else ():
        state = layer(state, None)
    return functional.normalize(clip.visual_projection(tower.post_layernorm(state[:, 0])), dim=-1)


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
