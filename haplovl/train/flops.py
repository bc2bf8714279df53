"""Floating-point operations of a training step: what model FLOPs utilisation (MFU) is counted in.

Only matrix products count, a multiplication and an addition as two operations, and only those that the result needs:
no attention between tokens that the mask keeps apart, no padding, no logits where nothing is learnt, and no second
forward pass of activation checkpointing (that is hardware work, reported beside). The backward pass of a product costs
one forward for the gradient of its input and one for that of its weight; where either is not wanted, it is not counted.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from haplovl.data.loader import IGNORE, Batch
from haplovl.model.configuration import HaploConfig
from haplovl.model.media import image_sizes
from haplovl.model.modeling import HaploForConditionalGeneration


@dataclass(frozen=True)
class Work:
    """What a batch, or a step, asks of the model; sums of several are sums of their fields."""

    tokens: int = 0
    """Positions that are no padding."""
    text_tokens: int = 0
    """Those of them that are no image tokens."""
    supervised: int = 0
    """Positions whose next token is learnt (stage 2)."""
    patches: int = 0
    """Patches of all tiles that the image embedding reads."""
    learnt_patches: int = 0
    """Patches in the sequence, which stage 1 compares with its teacher's: fewer where layouts cut or shrink."""
    tiles: int = 0
    pairs: int = 0
    """Query-key pairs that the mixed mask lets through."""
    causal_pairs: int = 0
    """Those of the causal mask: without sight of later tokens of the same image."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: int) -> "Work":
        """That many batches of this work."""
        return Work(*(value * factor for value in astuple(self)))

    @classmethod
    def of(cls, batch: Batch, config: HaploConfig) -> "Work":
        """The work of one micro-batch; cheap, best called before the batch moves to a GPU."""
        sizes = image_sizes(config, batch.image_grids)
        causal, mixed = attended_pairs(batch.document_ids, sizes)
        tokens = int((batch.document_ids >= 0).sum())
        tiles, patches = 0, 0
        if batch.pixel_values is not None:
            tiles, _, height, width = batch.pixel_values.shape
            patches = tiles * (height // config.pre_config.patch_size) * (width // config.pre_config.patch_size)
        return cls(
            tokens=tokens,
            text_tokens=tokens - sum(sizes),
            supervised=int((batch.labels[:, 1:] != IGNORE).sum()),
            patches=patches,
            learnt_patches=sum(grid.out_rows * grid.out_columns for grid in batch.image_grids),
            tiles=tiles,
            pairs=mixed,
            causal_pairs=causal,
        )


def attended_pairs(document_ids: torch.Tensor, image_tokens: Sequence[int]) -> tuple[int, int]:
    """Query-key pairs of the causal mask within documents, and with sight of one's whole image besides.

    Shapes: document_ids [B, L] (negative: padding), the tokens of every image block. A document of n tokens has
    n(n + 1)/2 causal pairs; a block of m tokens inside it adds m(m − 1)/2.
    """
    rows = torch.arange(len(document_ids), device=document_ids.device)[:, None]
    numbers = document_ids + rows * (document_ids.max() + 1)
    sizes = torch.bincount(numbers[document_ids >= 0])
    causal = int((sizes * (sizes + 1) // 2).sum())
    return causal, causal + sum(m * (m - 1) // 2 for m in image_tokens)


@dataclass(frozen=True)
class Flops:
    """Operations of a step, all ranks together.

    `forward` and `backward` are those of the model by its parts; `teachers` the forward passes of frozen teachers, in
    which no parameter of the model takes part; `recompute` the second forward pass of activation checkpointing.
    """

    forward: dict[str, int]
    backward: dict[str, int]
    teachers: int = 0
    recompute: int = 0

    @property
    def model(self) -> int:
        """What MFU counts: forward and backward pass of the model, without teachers and without recomputation."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def hardware(self) -> int:
        """What the device computes: also teachers and recomputation."""
        return self.model + self.teachers + self.recompute


@dataclass(frozen=True)
class _Product:
    """A matrix product: operations per unit of work, and how many forwards its backward pass costs."""

    per_unit: int
    units: str
    backward: int


@dataclass(frozen=True)
class StepFlops:
    """Counts the operations of a stage's steps; made once, asked for every step.

    Shapes come from modules, so they are right for any language model of linear layers, also with adapters (LoRA).
    """

    products: dict[str, list[_Product]]
    teacher_per_tile: int = 0

    @classmethod
    def stage1(cls, model: HaploForConditionalGeneration, vision: PretrainedConfig) -> "StepFlops":
        """Distillation: embeddings, pre-decoder and heads are trained, words·logits and the vision teacher are not.

        `model` may be on the meta device; `vision` is the vision teacher's configuration (CLIP or SigLIP).
        """
        core, pre, width = model.model, model.config.pre_config, model.config.text_config.hidden_size
        vision = getattr(vision, "vision_config", vision)
        products = _embeddings(core, words_trained=False) | {
            "pre_decoder": _stack(core.pre_decoder, pre, "pairs"),
            "heads": [
                _Product(2 * pre.hidden_size * vision.hidden_size, "learnt_patches", 2),
                _Product(2 * pre.hidden_size * width, "text_tokens", 2),
            ],
            "logits": [_Product(2 * width * model.config.text_config.vocab_size, "text_tokens", 1)],
        }
        side = model.config.image_size // vision.patch_size
        return cls(products, _vision_forward(vision, side * side))

    @classmethod
    def stage2(cls, model: HaploForConditionalGeneration) -> "StepFlops":
        """Instruction tuning: the whole model, logits for supervised positions. `model` may be on the meta device.

        A frozen weight (LoRA) costs one forward in the backward pass, for the gradient that goes through it.
        """
        core, config = model.model, model.config
        mask = "causal_pairs" if config.post_mask == "causal" else "pairs"
        products = _embeddings(core, words_trained=_trained(core.get_input_embeddings())) | {
            "pre_decoder": _stack(core.pre_decoder, config.pre_config, "pairs"),
            "connector": [_linear(core.connector, "tokens")],
            "language_model": _stack(core.language_model, config.text_config, mask),
            "logits": [_linear(model.lm_head, "supervised")],
        }
        return cls(products)

    def of(self, work: Work, activation_checkpointing: bool = False) -> Flops:
        """Operations of a step with this work; `Work` of all its micro-batches and ranks, or of a share of them."""
        forward, backward = {}, {}
        for part, products in self.products.items():
            forward[part] = sum(p.per_unit * getattr(work, p.units) for p in products)
            backward[part] = sum(p.backward * p.per_unit * getattr(work, p.units) for p in products)
        layers = sum(forward.get(part, 0) for part in ("pre_decoder", "language_model"))
        return Flops(forward, backward, self.teacher_per_tile * work.tiles, layers if activation_checkpointing else 0)


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _linear(layer: nn.Module, units: str, input_gradient: bool = True) -> _Product:
    """A linear layer per token. Features rather than the weight's shape: ZeRO 3 leaves no shape behind."""
    inputs, outputs = (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    return _Product(2 * inputs * outputs, units, int(_trained(layer)) + int(input_gradient))


def _embeddings(core: Any, words_trained: bool) -> dict[str, list[_Product]]:
    """Nothing asks for the gradient of pixels, nor for that of words that are frozen."""
    products = [_linear(core.image_embedding.patch, "patches", input_gradient=False)]
    if core.config.text_projection:
        products.append(_linear(core.text_projection, "text_tokens", words_trained))
    return {"embeddings": products}


def _stack(module: nn.Module, config: PretrainedConfig, pairs: str) -> list[_Product]:
    """All linear layers of a stack of transformer layers, and its attention."""
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear | Conv1D)]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Queries with keys, and weights with values.
    attention = 2 * 2 * config.num_attention_heads * head_dim * config.num_hidden_layers
    return [*(_linear(layer, "tokens") for layer in linears), _Product(attention, pairs, 2)]


def _vision_forward(vision: PretrainedConfig, patches: int) -> int:
    """Forward pass of a CLIP or SigLIP vision tower over one tile (SigLIP's pooling head left out)."""
    width, tokens = vision.hidden_size, patches + int(vision.model_type == "clip_vision_model")
    layer = 2 * tokens * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * width * tokens**2
    return 2 * patches * vision.num_channels * vision.patch_size**2 * width + vision.num_hidden_layers * layer
