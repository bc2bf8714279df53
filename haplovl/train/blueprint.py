"""The model of a recipe as shapes alone: from params.yaml and the teachers' configurations, on the meta device."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from haplovl.data.loader import IGNORE, Batch
from haplovl.errors import UserError
from haplovl.model import HaploConfig, HaploForConditionalGeneration
from haplovl.model.inherit import build_config, vision_part
from haplovl.model.layout import place, place_native
from haplovl.settings import FolderTeacher, HubTeacher, Params, StageSettings

PUBLISHED: dict[str, dict[str, Any]] = {
    # https://huggingface.co/openai/clip-vit-large-patch14-336/blob/main/config.json (vision_config)
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    # https://huggingface.co/lmsys/vicuna-7b-v1.5/blob/main/config.json
    "lmsys/vicuna-7b-v1.5": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    # https://huggingface.co/meta-llama/Meta-Llama-3-8B-Instruct/blob/main/config.json
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
}
"""Architectures of the teachers that params/ names, so that a plan needs no network."""

ADDED_TOKENS = 3
"""Image, video and padding token, which most published tokenizers lack."""
PICTURE = (480, 640)
"""Height and width of a typical picture (COCO's), which decides the tiles where a recipe has several."""
TEXT_TOKENS = 400
"""Assumed text of a typical record, as in params/haplovl-7b.yaml."""
SUPERVISED_SHARE = 0.6
"""Assumed share of a record's text that is an assistant's answer."""


@dataclass(frozen=True)
class Teachers:
    """Configurations of both teachers, and where each was found."""

    vision: PretrainedConfig
    language: PretrainedConfig
    sources: dict[str, str]


def find_teachers(params: Params) -> Teachers:
    """The teachers' shapes: from params.yaml, a folder, the local cache of the hub, the shipped table or the hub.

    Raises:
        UserError: a folder without a configuration, or a hub id that is unknown and cannot be fetched.
    """
    language, vision = params.teachers.language, params.teachers.vision
    if language.kind == "train":
        text: PretrainedConfig = LlamaConfig(
            vocab_size=language.vocabulary,
            hidden_size=language.hidden_size,
            intermediate_size=language.intermediate_size,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            max_position_embeddings=language.max_positions,
        )
        found_text = "params.yaml"
    else:
        text, found_text = _configuration(language)
        text.vocab_size += ADDED_TOKENS
    if vision.kind == "train":
        seen: PretrainedConfig = CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=params.model.image_size,
            patch_size=vision.patch_size,
        )
        found_vision = "params.yaml"
    else:
        seen, found_vision = _configuration(vision)
    return Teachers(vision_part(seen), text, {"vision": found_vision, "language": found_text})


def _configuration(source: HubTeacher | FolderTeacher) -> tuple[PretrainedConfig, str]:
    if isinstance(source, FolderTeacher):
        path = Path(os.path.expanduser(source.path))
        if not (path / "config.json").is_file():
            raise UserError(f"'{source.path}' is not a model folder (it has no config.json)")
        return AutoConfig.from_pretrained(path, trust_remote_code=False), str(path)
    pinned = {"revision": source.revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source.id, local_files_only=True, **pinned)
        return config, "local cache of the hub"
    except (OSError, ValueError):
        pass
    if source.id in PUBLISHED:
        return AutoConfig.for_model(**PUBLISHED[source.id]), "published architecture"
    try:
        return AutoConfig.from_pretrained(source.id, **pinned), "the hub"
    except (OSError, ValueError) as error:
        raise UserError(f"the shape of the teacher '{source.id}' cannot be found: {str(error)[:200]}") from None


@dataclass(frozen=True)
class Blueprint:
    """Model and vision teacher on the meta device, in float32 and training mode."""

    model: HaploForConditionalGeneration
    vision: PreTrainedModel

    @classmethod
    def of(cls, params: Params, teachers: Teachers) -> "Blueprint":
        """Builds both.

        Raises:
            UserError: the teachers and the model settings do not fit each other.
        """
        image_token_id = teachers.language.vocab_size - ADDED_TOKENS
        try:
            config = build_config(teachers.vision, teachers.language, params.model, image_token_id)
        except ValueError as error:
            raise UserError(f"the model cannot be built from its teachers: {error}") from None
        cls_vision = CLIPVisionModel if teachers.vision.model_type == "clip_vision_model" else SiglipVisionModel
        with torch.device("meta"):
            model = HaploForConditionalGeneration(config)
            vision = cls_vision(teachers.vision)
        return cls(model.train(), vision)


def typical_rows(config: HaploConfig, params: Params, stage: StageSettings, rows: int) -> Batch:
    """A micro-batch of packed rows as the recipe's data are assumed to be; pictures are on the meta device.

    Every row is filled with records of one picture and `TEXT_TOKENS` of text (fewer where max_tokens or the row leaves
    less room); what is left over is a record of text alone.
    """
    length, patch = stage.batch.row_tokens, config.pre_config.patch_size
    if config.fusion == "patches":
        grid, size = place_native(*PICTURE, config.image_size, patch).grid, patch
    else:
        grid, size = place(*PICTURE, config.image_size, patch, params.model.max_tiles).grid, config.image_size
    image = grid.tokens(config.pre_config.class_token, config.pre_config.image_newline)
    text = min(TEXT_TOKENS, params.prepare.max_tokens - image)
    if text < 2:
        raise UserError(f"prepare.max_tokens is {params.prepare.max_tokens}, but a picture alone has {image} tokens")
    pictures = min(length // (image + text), stage.batch.row_images or length)
    ids = torch.zeros(1, length, dtype=torch.long)
    labels, documents = torch.full((1, length), IGNORE), torch.full((1, length), pictures)
    for number in range(pictures + 1):
        start = number * (image + text)
        stop = start + image + text if number < pictures else length
        if number < pictures:
            ids[:, start : start + image] = config.image_token_id
            start += image
            documents[:, start - image : stop] = number
        learnt = int((stop - start) * SUPERVISED_SHARE)
        labels[:, stop - learnt : stop] = 0
    pixels = torch.empty(rows * pictures * grid.tiles, 3, size, size, device="meta") if pictures else None
    wide = (t.expand(rows, -1).clone() for t in (ids, labels, documents))
    return Batch(*wide, pixels, [grid] * (rows * pictures), [])
