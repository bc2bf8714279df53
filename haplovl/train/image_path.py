"""Do pictures still reach the answers? Looks at the gradient of the patch embedding and at where answers attend.

A model whose image path has died still learns: it guesses answers from the questions, and its loss falls. These two
figures tell the difference long before an evaluation does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from haplovl.data.loader import IGNORE, Batch
from haplovl.model import HaploForConditionalGeneration
from haplovl.model.attention_weights import AttentionWeights
from haplovl.model.media import image_sizes

LOOK_EVERY = 50
"""Steps between two looks. One costs a forward pass over one row."""
LOOKS = 3
"""Looks in a row that must find nothing before there is a warning: a single batch may lack a reason to look."""
DEAD_GRADIENT = 1e-6
"""Share of the whole gradient's norm under which the patch embedding's counts as none."""
DEAD_ATTENTION = 0.01
"""Attention to pictures, as a share of what equal attention to all visible tokens would give them."""
MOST_QUERIES = 256
"""Answer tokens whose attention is looked at, evenly spread: keeps long rows cheap."""


def patch_gradient(module: nn.Module) -> float | None:
    """Norm of the patch embedding's gradient, before clipping; None where it is not trained or has no gradient.

    With a vision tower, which may be frozen, it is that of the MLP's first layer: only pictures pass it.
    To be called between backward and optimiser step, by all ranks: with ZeRO 1 to 3 the parts are gathered. `module`
    is a model or an objective around one.
    """
    for name, parameter in module.named_parameters():
        if name.endswith(("image_embedding.patch.weight", "connector.linear_1.weight")):
            gradient = _whole_gradient(parameter) if parameter.requires_grad else None
            return None if gradient is None else float(torch.linalg.vector_norm(gradient.float()))
    return None


def _whole_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    if not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):  # DeepSpeed does not split it
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


@torch.no_grad()
def attention_to_images(
    model: HaploForConditionalGeneration, batch: Batch, forward: Callable[[Batch], Any] | None = None
) -> dict[str, float]:
    """How much of their attention the answers of one row give to the pictures before them in their document.

    Returns means over layers, heads and the tokens that predict an answer: `attention_pre` and `attention_post` (in
    the two decoders, 0 to 1) and `attention_even`, the share of pictures among the tokens that they see. Empty where no
    row of the batch holds an answer to a picture. The model's weights, mode and attention backend stay as they were,
    and no random number is drawn. `forward` runs a batch through the model in another way: under ZeRO 3 it is the
    objective, and all ranks call this in the same step, as they all take part in gathering the weights.
    """
    row = next((index for index in range(len(batch.input_ids)) if len(_queries(model, batch, index))), None)
    if row is None and forward is None:
        return {}
    one = _one_row(model, batch, row or 0)
    masses = _Masses(one.input_ids[0] == model.config.image_token_id)
    weights = AttentionWeights(model, _queries(model, one, 0), masses.take)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with weights.attached(), torch.compiler.set_stance("force_eager"):
            if forward is None:
                model.model(one.input_ids, one.pixel_values, one.image_grids, document_ids=one.document_ids)
            else:
                forward(one)
    finally:
        for module, mode in training.items():
            module.training = mode
    return {} if row is None else masses.means()


def _queries(model: HaploForConditionalGeneration, batch: Batch, row: int) -> torch.Tensor:
    """Positions of a row that predict an answer and have a picture before them in their document."""
    is_image = batch.input_ids[row] == model.config.image_token_id
    documents = batch.document_ids[row]
    answers = functional.pad(batch.labels[row, 1:], (0, 1), value=IGNORE) != IGNORE
    place = answers.nonzero()[:, 0]
    if not len(place) or not bool(is_image.any()):
        return place[:0]
    first = torch.full((int(documents.max()) + 1,), documents.numel(), device=documents.device)
    first.scatter_reduce_(0, documents[is_image], is_image.nonzero()[:, 0], "amin")
    place = place[first[documents[place]] < place]
    if len(place) > MOST_QUERIES:
        place = place[torch.linspace(0, len(place) - 1, MOST_QUERIES, device=place.device).long()]
    return place


def _one_row(model: HaploForConditionalGeneration, batch: Batch, row: int) -> Batch:
    """A row of the batch with its own pictures."""
    is_image = batch.input_ids == model.config.image_token_id
    before, own = int(is_image[:row].sum()), int(is_image[row].sum())
    ends = torch.tensor(image_sizes(model.config, batch.image_grids)).cumsum(0)
    first, stop = (int((ends <= tokens).sum()) for tokens in (before, before + own))
    tiles = [grid.tiles for grid in batch.image_grids]
    pixels = batch.pixel_values[sum(tiles[:first]) : sum(tiles[:stop])] if batch.pixel_values is not None else None
    parts = (tensor[row : row + 1] for tensor in (batch.input_ids, batch.labels, batch.document_ids))
    return Batch(*parts, pixels, batch.image_grids[first:stop], batch.record_ids)


@dataclass
class _Masses:
    """Attention to pictures, layer by layer: means over heads and queries."""

    is_image: torch.Tensor
    found: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"pre": [], "post": []})
    even: torch.Tensor | None = None

    def take(self, part: str, weights: torch.Tensor, allowed: torch.Tensor) -> None:
        """As `haplovl.model.attention_weights.Take`."""
        self.found[part].append(weights[..., self.is_image].sum(dim=-1).mean())
        if self.even is None:
            self.even = (allowed & self.is_image).sum(dim=-1).div(allowed.sum(dim=-1)).mean()

    def means(self) -> dict[str, float]:
        found = {
            f"attention_{part}": float(torch.stack(masses).mean()) for part, masses in self.found.items() if masses
        }
        return {**found, "attention_even": float(self.even)} if self.even is not None else found


@dataclass
class ImagePathWatch:
    """Decides when to look, and speaks when looks in a row find that pictures have no part in what is learnt."""

    every: int = LOOK_EVERY
    _idle: dict[str, int] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """Whether to look at this step (from 1): the first one and every `every` after it."""
        return step % self.every == 1 % self.every

    def note(self, figures: dict[str, float]) -> list[str]:
        """Takes the figures of one look; returns warnings, each once for every run of looks that found nothing.

        Figures: `patch_gradient_share` (the patch embedding's gradient norm divided by the whole one's, of a step that
        had pictures) and those of `attention_to_images`; absent ones are passed over.
        """
        even = figures.get("attention_even", 0.0)
        attention = figures.get("attention_post") if even else None
        found = {
            "gradient": (figures.get("patch_gradient_share"), DEAD_GRADIENT),
            "attention": (attention, DEAD_ATTENTION * even),
        }
        warnings = []
        for name, (value, least) in found.items():
            if value is None:
                continue
            self._idle[name] = self._idle.get(name, 0) + 1 if value < least else 0
            if self._idle[name] == LOOKS:
                warnings.append(_WARNINGS[name].format(value=value, even=even, looks=LOOKS))
        return warnings


_WARNINGS = {
    "gradient": (
        "pictures are not being learnt from: in {looks} looks in a row the patch embedding's share of the gradient was "
        "near zero (now {value:.1e}). The loss may fall all the same, on words alone. Check that records hold the "
        "pictures that their questions are about, and that no layer between pictures and answers is frozen or zero."
    ),
    "attention": (
        "answers do not look at pictures: in {looks} looks in a row they gave them {value:.2%} of their attention, "
        "where looking everywhere alike would give {even:.0%}. Check the answers (can they be told from the question "
        "alone?), stage 1 (did loss_vision fall?) and the connector's learning rate."
    ),
}
