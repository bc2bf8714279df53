"""Builds a model from a vision teacher (CLIP, SigLIP) and a causal language model, weight by weight."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from haplovl.model.configuration import HaploConfig, HaploPreDecoderConfig
from haplovl.model.embedding import HaploImageEmbedding, resize_position_grid
from haplovl.model.modeling import HaploForConditionalGeneration
from haplovl.settings import ModelSettings

VISION_TYPES = ("clip_vision_model", "siglip_vision_model")


def vision_part(config: PretrainedConfig) -> PretrainedConfig:
    """The vision tower's configuration of a CLIP or SigLIP configuration.

    Raises:
        ValueError: another architecture.
    """
    config = getattr(config, "vision_config", config)
    if config.model_type not in VISION_TYPES:
        raise ValueError(
            f"the vision teacher is a '{config.model_type}'; the pre-decoder inherits from {' or '.join(VISION_TYPES)}"
        )
    return config


def build_config(
    vision: PretrainedConfig,
    text: PretrainedConfig,
    settings: ModelSettings,
    image_token_id: int,
    video_token_id: int | None = None,
) -> HaploConfig:
    """The configuration of the model that inherits from these two teachers.

    Raises:
        ValueError: the settings do not fit the teachers.
    """
    vision = vision_part(vision)
    config = HaploConfig(
        pre_config=_BLOCKS[settings.fusion](vision, text, settings),
        text_config=copy.deepcopy(text),  # the teacher's own stays as it is
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        image_size=settings.image_size,
        post_rotary_increment=settings.post_rotary_increment,
        post_mask=settings.post_mask,
        connector_bias=not settings.released_layout,
        frame_newlines=not settings.released_layout,
        fusion=settings.fusion,
        text_path=settings.text_path,
        vision_config=_tower_config(vision, settings) if settings.fusion == "tower" else None,
    )
    _ = config.tokens_per_image  # refuses an image size that is no multiple of the patch size
    return config


def _pre_decoder_config(
    vision: PretrainedConfig, _: PretrainedConfig, settings: ModelSettings
) -> HaploPreDecoderConfig:
    """A pre-decoder that inherits from the vision teacher, and its image embedding."""
    is_clip = vision.model_type == "clip_vision_model"
    if settings.class_token and not is_clip:
        raise ValueError("model.class_token is on, but a SigLIP teacher has no class token")
    layers = settings.pre_decoder_layers or vision.num_hidden_layers
    if layers > vision.num_hidden_layers:
        raise ValueError(f"model.pre_decoder_layers is {layers}, but the vision teacher has {vision.num_hidden_layers}")
    return HaploPreDecoderConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=vision.num_attention_heads,
        hidden_act=vision.hidden_act,
        norm_eps=vision.layer_norm_eps,
        final_norm=not settings.released_layout,
        rotary_increment=settings.pre_rotary_increment,
        patch_size=vision.patch_size,
        num_channels=vision.num_channels,
        patch_grid=settings.image_size // vision.patch_size,
        patch_bias=not is_clip,
        pre_layernorm=is_clip,
        class_token=settings.class_token,
        image_newline=settings.image_newline,
        # For what no teacher has; the usual 0.02 suits widths of thousands only.
        initializer_range=vision.hidden_size**-0.5,
    )


def _tower_blocks(vision: PretrainedConfig, _: PretrainedConfig, settings: ModelSettings) -> HaploPreDecoderConfig:
    """The image blocks of a tower: its patches and nothing else."""
    return HaploPreDecoderConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=0,
        num_attention_heads=vision.num_attention_heads,
        rotary_increment=1.0,
        patch_size=vision.patch_size,
        num_channels=vision.num_channels,
        patch_grid=settings.image_size // vision.patch_size,
        class_token=False,
        image_newline=False,
    )


def _patch_blocks(vision: PretrainedConfig, text: PretrainedConfig, settings: ModelSettings) -> HaploPreDecoderConfig:
    """Raw patches as the language model's own tokens, their rows ended by newlines."""
    return HaploPreDecoderConfig(
        hidden_size=text.hidden_size,
        intermediate_size=0,
        num_hidden_layers=0,
        num_attention_heads=1,
        rotary_increment=1.0,
        patch_size=settings.patch_size,
        num_channels=vision.num_channels,
        patch_grid=0,
        class_token=False,
        image_newline=settings.image_newline,
        # The newline is one more word.
        initializer_range=getattr(text, "initializer_range", 0.02),
    )


_BLOCKS = {"early": _pre_decoder_config, "tower": _tower_blocks, "patches": _patch_blocks}


def _tower_config(vision: PretrainedConfig, settings: ModelSettings) -> PretrainedConfig:
    """The vision teacher's configuration up to the layer that is used, for pictures of the model's size."""
    states = vision.num_hidden_layers + 1  # the embeddings are hidden state 0
    if not -states <= settings.tower_layer < states:
        raise ValueError(
            f"model.tower_layer is {settings.tower_layer}, but the vision teacher has the hidden states "
            f"{-states} to {states - 1}"
        )
    tower = copy.deepcopy(vision)
    tower.num_hidden_layers = settings.tower_layer % states
    tower.image_size = settings.image_size
    if hasattr(tower, "vision_use_head"):
        tower.vision_use_head = False
    return tower


def inherit(
    vision: PreTrainedModel,
    language: PreTrainedModel,
    settings: ModelSettings,
    image_token_id: int,
    vocabulary: int,
    video_token_id: int | None = None,
) -> HaploForConditionalGeneration:
    """A HaploVL model with the teachers' weights; what no teacher has is drawn from torch's random generator.

    `vocabulary` is the tokenizer's size; the language model's embeddings grow to it where they are smaller.

    Raises:
        ValueError: the teachers or the settings do not fit each other.
    """
    _refuse_changed_logits(language)
    if vocabulary > language.config.get_text_config().vocab_size:
        language.resize_token_embeddings(vocabulary, mean_resizing=False)
    config = build_config(vision.config, language.config, settings, image_token_id, video_token_id)
    model = HaploForConditionalGeneration(config).to(language.dtype)
    inherit_language(model, language)
    if settings.fusion == "tower":
        inherit_tower(model, vision)
    elif settings.fusion == "early" and settings.pre_decoder == "inherit":
        inherit_vision(model, vision)
    return model


def _refuse_changed_logits(language: PreTrainedModel) -> None:
    """Refuses language models that do more to their logits than one linear layer: ours would differ in silence."""
    config = language.config.get_text_config()
    changed = [n for n in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, n, None)]
    if getattr(language.get_output_embeddings(), "bias", None) is not None:
        changed.append("a bias in the head")
    if changed:
        raise ValueError(f"the language model '{config.model_type}' has {', '.join(changed)}, which is not supported")


@torch.no_grad()
def inherit_language(model: HaploForConditionalGeneration, language: PreTrainedModel) -> None:
    """Copies the whole language model: its decoder and its head."""
    model.model.language_model.load_state_dict(language.base_model.state_dict())
    model.lm_head.weight.copy_(language.get_output_embeddings().weight)
    model.generation_config.update(
        **{name: getattr(language.generation_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    suppress_placeholders(model)


def suppress_placeholders(model: HaploForConditionalGeneration) -> None:
    """Keeps generation from placeholders: as an answer they would be pictures that nobody gave."""
    ids = [model.config.image_token_id, model.config.video_token_id]
    model.generation_config.suppress_tokens = [number for number in ids if number is not None]


@torch.no_grad()
def inherit_vision(model: HaploForConditionalGeneration, vision: PreTrainedModel) -> None:
    """Copies patches, positions and the first layers of the vision teacher into embedding and pre-decoder."""
    tower = getattr(vision, "vision_model", vision)
    _inherit_embedding(model.model.image_embedding, tower.embeddings)
    pre_decoder = model.model.pre_decoder
    if isinstance(pre_decoder.pre_layernorm, nn.LayerNorm):
        pre_decoder.pre_layernorm.load_state_dict(tower.pre_layrnorm.state_dict())
    for ours, theirs in zip(pre_decoder.layers, tower.encoder.layers, strict=False):
        ours.layer_norm1.load_state_dict(theirs.layer_norm1.state_dict())
        ours.layer_norm2.load_state_dict(theirs.layer_norm2.state_dict())
        ours.fc1.load_state_dict(theirs.mlp.fc1.state_dict())
        ours.fc2.load_state_dict(theirs.mlp.fc2.state_dict())
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            getattr(ours.self_attn, name).load_state_dict(getattr(theirs.self_attn, name).state_dict())


@torch.no_grad()
def inherit_tower(model: HaploForConditionalGeneration, vision: PreTrainedModel) -> None:
    """Copies the vision teacher into the tower; its position table is interpolated to the model's grid."""
    ours, theirs = model.model.tower.vision_model, getattr(vision, "vision_model", vision)
    state = {name: value for name, value in theirs.state_dict().items() if name in ours.state_dict()}
    name, side = "embeddings.position_embedding.weight", model.config.pre_config.patch_grid
    extra = int(hasattr(theirs.embeddings, "class_embedding"))
    positions = resize_position_grid(state[name][extra:], side, side)
    ours.load_state_dict(state | {name: torch.cat([state[name][:extra], positions])})


def _inherit_embedding(ours: HaploImageEmbedding, theirs: Any) -> None:
    ours.patch.weight.copy_(theirs.patch_embedding.weight.flatten(1))
    if ours.patch.bias is not None:
        ours.patch.bias.copy_(theirs.patch_embedding.bias)
    table = theirs.position_embedding.weight
    if hasattr(theirs, "class_embedding"):
        if ours.class_token is not None:
            ours.class_token.copy_(theirs.class_embedding)
            ours.class_position.copy_(table[0])
        table = table[1:]
    side = ours.config.patch_grid
    ours.position.copy_(resize_position_grid(table, side, side))
