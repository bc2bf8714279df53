"""Floating-point operations of a training step: what model FLOPs utilisation (MFU) is counted in.

Only matrix products count, a multiplication and an addition as two operations, and only those that the result needs:
no attention between tokens that the mask keeps apart, no padding, no logits where nothing is learnt, and no second
forward pass of activation checkpointing (that is hardware work, reported beside). The backward pass of a product costs
one forward for the gradient of its input and one for that of its weight; where either is not wanted, it is not counted:
not for weights that are frozen, and not below the first ones that are trained. So counts are right for the parameters
that ask for a gradient when they are made.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from haplovl.data.loader import IGNORE, Batch
from haplovl.model.configuration import HaploConfig
from haplovl.model.media import image_sizes
from haplovl.model.modeling import HaploForConditionalGeneration, HaploModel
from haplovl.settings import ALL_LOSSES, DistillationLosses


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
    def stage1(
        cls,
        model: HaploForConditionalGeneration,
        vision: PretrainedConfig,
        losses: DistillationLosses = ALL_LOSSES,
        taught: int | None = None,
    ) -> "StepFlops":
        """Distillation: embeddings, pre-decoder and heads are trained, words·logits and the vision teacher are not.

        A loss without weight costs nothing, and the vision teacher counts up to the hidden state that it teaches
        (`taught`; by default its last). `model` may be on the meta device; `vision` is the teacher's configuration
        (CLIP or SigLIP).
        """
        core, pre, width = model.model, model.config.pre_config, model.config.text_config.hidden_size
        vision = getattr(vision, "vision_config", vision)
        products, flows = _before_language(core, words_trained=False, until="pre_decoder")
        both = 1 + int(flows)
        products |= {"heads": [], "logits": []}
        if losses.vision:
            products["heads"].append(_Product(2 * pre.hidden_size * vision.hidden_size, "learnt_patches", both))
        if losses.feature or losses.current_token:
            products["heads"].append(_Product(2 * pre.hidden_size * width, "text_tokens", both))
        if losses.current_token:
            products["logits"].append(_Product(2 * width * model.config.text_config.vocab_size, "text_tokens", 1))
        side = model.config.image_size // vision.patch_size
        layers = vision.num_hidden_layers if taught is None else taught
        return cls(products, _vision_forward(vision, layers, side * side) if losses.vision else 0)

    @classmethod
    def stage2(cls, model: HaploForConditionalGeneration) -> "StepFlops":
        """Next-token prediction: logits for supervised positions. `model` may be on the meta device."""
        core, config = model.model, model.config
        mask = "causal_pairs" if config.post_mask == "causal" else "pairs"
        products, flows = _before_language(core, _any_trained(core.get_input_embeddings()))
        products["language_model"], flows = _stack(core.language_model, config.text_config, mask, flows)
        return cls(products | {"logits": [_linear(model.lm_head, "supervised", flows)]})

    def of(self, work: Work, activation_checkpointing: bool = False) -> Flops:
        """Operations of a step with this work; `Work` of all its micro-batches and ranks, or of a share of them."""
        forward, backward = {}, {}
        for part, products in self.products.items():
            forward[part] = sum(p.per_unit * getattr(work, p.units) for p in products)
            backward[part] = sum(p.backward * p.per_unit * getattr(work, p.units) for p in products)
        again = sum(
            p.per_unit * getattr(work, p.units)
            for part in ("tower", "pre_decoder", "language_model")
            for p in self.products.get(part, ())
            if p.backward  # without a backward pass there is no second forward pass
        )
        return Flops(forward, backward, self.teacher_per_tile * work.tiles, again if activation_checkpointing else 0)


def _any_trained(module: nn.Module | None) -> bool:
    return module is not None and any(p.requires_grad for p in module.parameters())


def _linear(layer: nn.Module, units: str, input_gradient: bool, times: int = 1) -> _Product:
    """A linear layer, `times` per unit. Features rather than the weight's shape: ZeRO 3 leaves no shape behind."""
    inputs, outputs = (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    trained = any(p.requires_grad for p in layer.parameters(recurse=False))
    return _Product(2 * inputs * outputs * times, units, int(trained) + int(input_gradient))


def _before_language(
    core: HaploModel, words_trained: bool, until: str | None = None
) -> tuple[dict[str, list[_Product]], bool]:
    """What runs before the language model, and whether its output asks for a gradient.

    Nothing asks for the gradient of pixels, nor for that of words that are frozen. Products of text tokens that reach
    the language model on another path are counted as they are computed: for all tokens.
    """
    if core.tower is not None:
        return _tower_and_connector(core, words_trained)
    products = {"embeddings": [_linear(core.image_embedding.patch, "patches", input_gradient=False)]}
    flows = words_trained or _any_trained(core.image_embedding) or _any_trained(core.text_projection)
    if core.text_projection is not None:
        products["embeddings"].append(_linear(core.text_projection, "text_tokens", words_trained))
    if core.pre_decoder is not None:
        products["pre_decoder"], flows = _stack(core.pre_decoder, core.config.pre_config, "pairs", flows)
        if until != "pre_decoder":
            products["connector"] = [_linear(core.connector, "tokens", flows)]
            flows = flows or _any_trained(core.connector)
    return products, flows


def _tower_and_connector(core: HaploModel, words_trained: bool) -> tuple[dict[str, list[_Product]], bool]:
    """The tower sees whole tiles; the connector only what is kept of them."""
    vision, connector = core.tower.vision_model, core.connector
    config = vision.config
    patch = 2 * config.num_channels * config.patch_size**2 * config.hidden_size
    products = {"embeddings": [_Product(patch, "patches", int(_any_trained(vision.embeddings.patch_embedding)))]}
    flows = any(_any_trained(part) for name, part in vision.named_children() if name != "encoder")
    tokens = (config.image_size // config.patch_size) ** 2 + int(hasattr(vision.embeddings, "class_embedding"))
    products["tower"], flows = _stack(vision.encoder, config, "tiles", flows, tokens)
    products["connector"] = [
        _linear(connector.linear_1, "learnt_patches", flows),
        _linear(connector.linear_2, "learnt_patches", flows or _any_trained(connector.linear_1)),
    ]
    return products, flows or words_trained or _any_trained(connector)


def _stack(
    module: nn.Module, config: PretrainedConfig, pairs: str, flows: bool, tile: int = 0
) -> tuple[list[_Product], bool]:
    """All linear layers of a stack of transformer layers, and its attention; whether its output asks for a gradient.

    `flows` says whether its input does. In the first layer with trained weights all products are taken to need their
    input's gradient, as they do where its norms are trained too. `tile` is the number of tokens of a tile where that
    is the unit, else work is counted by tokens and pairs.
    """
    units, times, squares = ("tiles", tile, tile**2) if tile else ("tokens", 1, 1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * 2 * config.num_attention_heads * head_dim * squares  # queries with keys, weights with values
    layers = next(m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)
    inside = _linears(layers)
    products = [_linear(layer, units, flows, times) for layer in _linears(module) if layer not in inside]
    for layer in layers:
        flows = flows or _any_trained(layer)
        products += [_linear(linear, units, flows, times) for linear in _linears(layer)]
        products.append(_Product(attention, pairs, 2 * int(flows)))
    return products, flows or _any_trained(module)


def _linears(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.Linear | Conv1D)]


def _vision_forward(vision: PretrainedConfig, layers: int, patches: int) -> int:
    """Forward pass of the first layers of a CLIP or SigLIP vision tower over one tile."""
    width, tokens = vision.hidden_size, patches + int(vision.model_type == "clip_vision_model")
    layer = 2 * tokens * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * width * tokens**2
    return 2 * patches * vision.num_channels * vision.patch_size**2 * width + layers * layer
