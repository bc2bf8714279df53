"""What is learnt: the losses of the two stages as sums over tokens, apart from the loop that minimises them.

An objective is a module that the engine wraps. Its `forward` returns one differentiable sum per loss part; its
`counts` tells, before any forward pass, over how many tokens each part runs. The trainer divides every sum by the
global count of the whole step, so that the way a step is split into micro-batches and ranks changes nothing.
"""

from typing import Protocol

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from haplovl.data.loader import IGNORE, Batch
from haplovl.model import HaploForConditionalGeneration
from haplovl.model.embedding import merge_tiles
from haplovl.settings import ALL_LOSSES, DistillationLosses
from haplovl.train.losses import summed_cross_entropy


class Objective(Protocol):
    """What the trainer needs of a stage's objective."""

    weights: dict[str, float]
    """Factors of the loss parts in the loss; 1 where none is named."""

    def counts(self, batch: Batch) -> dict[str, int]:
        """Number of tokens behind each loss part."""

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum of each loss part over the batch's tokens."""


class NextToken(nn.Module):
    """Next-token cross-entropy on the assistant's tokens: stage 2, and stage 1 of recipes that distil nothing."""

    def __init__(self, model: HaploForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.weights: dict[str, float] = {}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Supervised tokens; labels stand one position after the hidden state that predicts them."""
        return {"loss": int((batch.labels[:, 1:] != IGNORE).sum())}

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sum of the cross-entropy over supervised tokens; logits are computed for those positions only."""
        out = self.model.model(
            batch.input_ids, batch.pixel_values, batch.image_grids, document_ids=batch.document_ids
        )  # fmt: skip
        targets = functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORE)
        chosen = targets != IGNORE
        logits = self.model.lm_head(out.last_hidden_state[chosen])
        return {"loss": summed_cross_entropy(logits, targets[chosen])}


class Distillation(nn.Module):
    """Stage 1: the pre-decoder learns the vision teacher's patches and the language model's word embeddings.

    L = L_v + L_feat + L_ctp (times the weights of `stage1.losses`) with, as means over tokens,
    L_v = 1 − cos(Ĥ_v, T_v), L_feat = ‖Ĥ_t − T_t‖₂ − cos(Ĥ_t, T_t), and
    L_ctp = cross-entropy of softmax(Ĥ_t·Wᵀ/τ) against the current token (arXiv 2503.14694, section 3).

    Only embeddings, pre-decoder and the two throw-away heads are parameters here; the language model takes no part,
    and teachers stay outside the state dict.
    """

    def __init__(
        self,
        model: HaploForConditionalGeneration,
        vision_teacher: PreTrainedModel,
        vision_layer: int,
        temperature: float,
        losses: DistillationLosses = ALL_LOSSES,
    ) -> None:
        super().__init__()
        core = model.model
        given = {"loss_vision": losses.vision, "loss_feature": losses.feature,
                 "loss_current_token": losses.current_token}  # fmt: skip
        self.weights = {name: weight for name, weight in given.items() if weight}
        """Of the parts that are learnt; one of weight 0 is left out, and what only it needs."""
        self.image_embedding, self.text_projection = core.image_embedding, core.text_projection
        self.pre_decoder = core.pre_decoder
        width = model.config.pre_config.hidden_size
        vision_config = getattr(vision_teacher.config, "vision_config", vision_teacher.config)
        self.vision_head = nn.Linear(width, vision_config.hidden_size) if losses.vision else None
        # The connector may start from it, so it has a bias if and only if the connector has one.
        has_text = losses.feature or losses.current_token
        language = model.config.text_config.hidden_size
        self.text_head = nn.Linear(width, language, bias=model.config.connector_bias) if has_text else None
        self.temperature, self.vision_layer = temperature, vision_layer
        words = core.get_input_embeddings().weight
        words.requires_grad_(False)
        # In a tuple, so that torch registers neither the frozen modules nor the model as parts of this one.
        self._frozen = (core, vision_teacher.requires_grad_(False).eval(), words)

    def frozen_to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves what is frozen but used: the vision teacher and the language model's embedding matrix."""
        _, teacher, words = self._frozen
        teacher.to(device=device, dtype=dtype)
        words.data = words.data.to(device)  # never rounded: it is saved as the language model's own

    def counts(self, batch: Batch) -> dict[str, int]:
        """Patches behind L_v, text tokens behind L_feat and L_ctp."""
        text = int(self._is_text(batch).sum())
        patches = sum(grid.out_rows * grid.out_columns for grid in batch.image_grids)
        counts = {"loss_vision": patches, "loss_feature": text, "loss_current_token": text}
        return {name: counts[name] for name in self.weights}

    def _is_text(self, batch: Batch) -> torch.Tensor:
        image_id = self._frozen[0].config.image_token_id
        return (batch.input_ids != image_id) & (batch.document_ids >= 0)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums of the losses over the batch's patches and text tokens."""
        core, teacher, _ = self._frozen
        hidden = core.pre_decode(batch.input_ids, batch.pixel_values, batch.document_ids, batch.image_grids)
        parts = self._text_losses(hidden, batch) if self.text_head is not None else {}
        if self.vision_head is not None:
            parts["loss_vision"] = self._vision_loss(hidden, batch, teacher)
        return {name: parts[name] for name in self.weights}

    def _text_losses(self, hidden: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        words, chosen = self._frozen[2], self._is_text(batch)
        tokens = batch.input_ids[chosen]
        predicted, target = self.text_head(hidden[chosen]).float(), words[tokens].float()
        distance = torch.linalg.vector_norm(predicted - target, dim=-1)
        similarity = functional.cosine_similarity(predicted, target, dim=-1)
        parts = {"loss_feature": (distance - similarity).sum()}
        if "loss_current_token" in self.weights:
            logits = predicted @ words.float().T / self.temperature
            parts["loss_current_token"] = summed_cross_entropy(logits, tokens)
        return parts

    def _vision_loss(self, hidden: torch.Tensor, batch: Batch, teacher: PreTrainedModel) -> torch.Tensor:
        config = self._frozen[0].config
        if batch.pixel_values is None:
            # Every rank must use every parameter in every step, also without a picture.
            return 0.0 * self.vision_head(hidden[:1, :1]).float().sum()
        with torch.no_grad():
            seen = teacher(batch.pixel_values, output_hidden_states=True, interpolate_pos_encoding=True)
            states = seen.hidden_states[self.vision_layer]
        size = config.pre_config.patch_size
        rows, columns = (side // size for side in batch.pixel_values.shape[-2:])
        # The class token, where the teacher has one, comes first. Tiles are put together as the model does it.
        tiles = states[:, -rows * columns :].float().unflatten(1, (rows, columns))
        parts = zip(tiles.split([grid.tiles for grid in batch.image_grids]), batch.image_grids, strict=True)
        target = torch.cat([merge_tiles(part, grid).flatten(0, 1) for part, grid in parts])
        is_patch = self.image_embedding.is_patch(batch.image_grids).to(hidden.device)
        own = hidden[batch.input_ids == config.image_token_id][is_patch]
        similarity = functional.cosine_similarity(self.vision_head(own).float(), target, dim=-1)
        return (1 - similarity).sum()
