"""`haplovl import-released`: a checkpoint folder in the layout of the authors' release becomes ours.

There one list of layers holds both decoders, every projection is biased and every MLP gated, and text is embedded in
the pre-decoder's own width.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig

from haplovl.model.configuration import HaploConfig, HaploDecoderConfig, HaploPreDecoderConfig
from haplovl.model.image_processing import HaploImageProcessor
from haplovl.model.inherit import suppress_placeholders
from haplovl.model.modeling import HaploForConditionalGeneration
from haplovl.model.processing import HaploProcessor
from haplovl.model.released_layout import (
    DEFAULT_PINPOINTS,
    INDEX,
    PRE_NORM_EPS,
    TEXT_DEFAULTS,
    WEIGHTS,
    released_name,
    released_shape,
)


def import_released(source: Path, target: Path) -> str:
    """Writes a released checkpoint folder as ours, with its processor where there is one; returns a sentence about it.

    The processor's files are looked for in `source`, in its folder `processor`, and in a folder `processor` beside it.

    Raises:
        ValueError: a file is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    source = source / "model" if not (source / "config.json").is_file() and (source / "model").is_dir() else source
    settings = _read_json(source / "config.json")
    if settings.get("model_type") != "haplo":
        raise ValueError(
            f"{source}: model_type is '{settings.get('model_type')}', expected 'haplo' (a released checkpoint)"
        )
    model = HaploForConditionalGeneration(import_config(settings))
    _load(model, _read_weights(source), source)
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    suppress_placeholders(model)
    model.save_pretrained(target)
    place = next((p for p in (source, source / "processor", source.parent / "processor") if _has_processor(p)), None)
    if place is None:
        return f"{source} -> {target} (the model alone: no processor files were found)"
    import_processor(place, settings).save_pretrained(target)
    return f"{source} -> {target} (processor from {place})"


def import_config(settings: dict[str, Any]) -> HaploConfig:
    """Our configuration of a released config.json.

    Raises:
        ValueError: something that the release's own code cannot run either.
    """
    base, pre = ({**TEXT_DEFAULTS, **settings.get(name, {})} for name in ("base_config", "pre_config"))
    # The release copies its base configuration to the top level, from where it is read, and ignores post_config.
    base |= {name: value for name, value in settings.items() if name in TEXT_DEFAULTS}
    if base["tie_word_embeddings"]:
        raise ValueError("tie_word_embeddings is on, but embedding and head of the released layout differ in width")
    if base["use_sliding_window"]:
        raise ValueError("use_sliding_window is on; the mixed mask does not model a window")
    own_rotary = pre if pre["attention_rope"] else base
    pre_config = HaploPreDecoderConfig(
        **_decoder_shape(pre, own_rotary),
        final_norm=False,
        rotary_increment=1.0,
        patch_size=pre["patch_size"],
        patch_grid=pre["default_image_size"] // pre["patch_size"],
        pre_layernorm_eps=PRE_NORM_EPS,
        class_token=False,
    )
    if own_rotary is base and pre_config.head_dim != base["hidden_size"] // base["num_attention_heads"]:
        raise ValueError("pre- and post-decoder share one rotary embedding, but their heads differ in size")
    text_config = HaploDecoderConfig(
        **_decoder_shape(base, base),
        vocab_size=base["vocab_size"],
        **{name: base[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    return HaploConfig(
        pre_config=pre_config,
        text_config=text_config,
        image_token_id=base["image_token_index"],
        video_token_id=base["video_token_index"],
        image_size=base["default_image_size"],
        post_rotary_increment=1.0,
        text_projection=False,
        connector_bias=False,
        frame_newlines=False,
    )


def _decoder_shape(part: dict[str, Any], rotary: dict[str, Any]) -> dict[str, Any]:
    scaling = dict(rotary["rope_scaling"] or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", None) or scaling["rope_type"]
    same = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "initializer_range",
    )  # fmt: skip
    return {
        **{name: part[name] for name in same},
        "norm": part["norm_mode"],
        "norm_eps": part["rms_norm_eps"],
        "gated_mlp": True,
        "rope_parameters": {**scaling, "rope_theta": rotary["rope_theta"]},
    }


def _load(model: HaploForConditionalGeneration, weights: dict[str, torch.Tensor], source: Path) -> None:
    layers = model.config.pre_config.num_hidden_layers
    own = model.state_dict()
    wanted = {released_name(name, layers): name for name in own}
    if missing := sorted(set(wanted) - set(weights)):
        raise ValueError(f"{source}: tensors are missing: {', '.join(missing[:5])}")
    if unknown := sorted(set(weights) - set(wanted)):
        raise ValueError(f"{source}: unknown tensors: {', '.join(unknown[:5])}")
    state = {}
    for theirs, ours in wanted.items():
        tensor, shape = weights[theirs], own[ours].shape
        expected = released_shape(ours, tuple(shape), model.config.pre_config.patch_size)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{source}: {theirs} has the shape {list(tensor.shape)}, expected {list(expected)}")
        state[ours] = tensor.reshape(shape)
    dtypes = {tensor.dtype for tensor in weights.values()}
    model.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
    model.load_state_dict(state)


def _read_weights(source: Path) -> dict[str, torch.Tensor]:
    names = [WEIGHTS]
    if (source / INDEX).is_file():
        names = sorted(set(_read_json(source / INDEX)["weight_map"].values()))
    weights: dict[str, torch.Tensor] = {}
    for name in names:
        try:
            weights |= load_file(source / name)
        except FileNotFoundError:
            raise ValueError(f"{source / name} is missing (weights are read from safetensors only)") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{source / name} is damaged: {error}") from None
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _has_processor(folder: Path) -> bool:
    return (folder / "preprocessor_config.json").is_file() and (folder / "tokenizer_config.json").is_file()


def import_processor(source: Path, settings: dict[str, Any]) -> HaploProcessor:
    """Our processor with the release's way of laying pictures out. `settings` is the released config.json.

    Raises:
        ValueError: a file is missing or damaged, or pictures and videos are not prepared alike.
    """
    pictures = _read_json(source / "preprocessor_config.json")
    videos_file = source / "video_processor" / "preprocessor_config.json"
    if videos_file.is_file():
        videos = _read_json(videos_file)
        for name in ("size", "image_mean", "image_std", "rescale_factor"):
            if name in pictures and videos.get(name, pictures[name]) != pictures[name]:
                raise ValueError(f"{videos_file}: {name} differs from that of images, which is not supported")
    base = {**TEXT_DEFAULTS, **settings.get("base_config", {}), **settings}
    size = pictures.get("size", {"height": 384, "width": 384})
    chat = source / "chat_template.json"
    image_processor = HaploImageProcessor(
        image_size=size["height"],
        patch_size=base["patch_size"],
        max_tiles=int(str(base["image_aspect_ratio"]).rsplit("_", 1)[-1]),
        image_mean=pictures["image_mean"],
        image_std=pictures["image_std"],
        tiling="released",
        image_grid_pinpoints=pictures.get("image_grid_pinpoints")
        or base.get("image_grid_pinpoints", DEFAULT_PINPOINTS),
    )
    tokenizer = AutoTokenizer.from_pretrained(source, config=PretrainedConfig())
    return HaploProcessor(
        image_processor,
        tokenizer,
        chat_template=_read_json(chat)["chat_template"] if chat.is_file() else tokenizer.chat_template,
        class_token=False,
        frame_newlines=False,
        add_special_tokens=True,
    )
