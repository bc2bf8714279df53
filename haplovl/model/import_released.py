"""`haplovl import-released`: a checkpoint folder in the layout of the authors' release becomes ours.

There one list of layers holds both decoders, every projection is biased and every MLP gated, and text is embedded in
the pre-decoder's own width.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from haplovl.model.configuration import HaploConfig, HaploDecoderConfig, HaploPreDecoderConfig
from haplovl.model.image_processing import CLIP_MEAN, CLIP_STD, HaploImageProcessor
from haplovl.model.inherit import suppress_placeholders
from haplovl.model.modeling import HaploForConditionalGeneration
from haplovl.model.processing import IMAGE_TOKEN, VIDEO_TOKEN, HaploProcessor
from haplovl.model.released_layout import (
    DEFAULT_PINPOINTS,
    INDEX,
    PIXEL_SETTINGS,
    PRE_NORM_EPS,
    TEXT_DEFAULTS,
    WEIGHTS,
    read_json,
    released_name,
    released_shape,
)

PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "patch_size", "default_image_size",
)  # fmt: skip
_FRACTIONS = ("rms_norm_eps", "rope_theta", "initializer_range")
_IDS = ("image_token_index", "video_token_index", "pad_token_id")


def import_released(source: Path, target: Path) -> str:
    """Writes a released checkpoint folder as ours, with its processor where there is one; returns a sentence about it.

    The processor's files are looked for in `source`, in its folder `processor`, and in a folder `processor` beside it.
    Nothing is written before everything was read.

    Raises:
        ValueError: a file is missing or damaged, a setting is one that the release's code cannot run or that ours does
            not know, or a tensor is missing, unknown or of another shape.
    """
    given = source
    source = source / "model" if not (source / "config.json").is_file() and (source / "model").is_dir() else source
    settings = read_json(source / "config.json")
    if settings.get("model_type") != "haplo":
        raise ValueError(
            f"{source}: model_type is '{settings.get('model_type')}', expected 'haplo' (a released checkpoint)"
        )
    if target.resolve() in (given.resolve(), source.resolve()):
        raise ValueError(f"{target} is the checkpoint itself; name another folder to write")
    try:
        config = import_config(settings)
    # KeyError is transformers' complaint about rotary parameters.
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source / 'config.json'}: {error.args[0]}") from None
    place = next((p for p in (source, source / "processor", source.parent / "processor") if _has_processor(p)), None)
    processor = import_processor(place, settings) if place else None
    model = _load(config, _read_weights(source), source)
    if (source / "generation_config.json").is_file():
        model.generation_config = _read_generation(source / "generation_config.json")
    suppress_placeholders(model)
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    if processor is None:
        return f"{source} -> {target} (the model alone: no processor files were found)"
    processor.save_pretrained(target)
    return f"{source} -> {target} (processor from {place})"


def import_config(settings: dict[str, Any]) -> HaploConfig:
    """Our configuration of a released config.json.

    Raises:
        ValueError: something that the release's own code cannot run either, or a sliding window.
    """
    base, pre = (_part(settings, name) for name in ("base_config", "pre_config"))
    if base["tie_word_embeddings"]:
        raise ValueError("tie_word_embeddings is on, but embedding and head of the released layout differ in width")
    for name in ("patch_size", "default_image_size"):
        if pre[name] != base[name]:
            raise ValueError(f"{name} is {pre[name]} in pre_config, expected {base[name]} as in base_config")
    # Without attention_rope, the pre-decoder turns by the post-decoder's rotary embedding.
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
    text_config = HaploDecoderConfig(
        **_decoder_shape(base, base),
        vocab_size=base["vocab_size"],
        **{name: base[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    if own_rotary is base and pre_config.head_dim != text_config.head_dim:
        raise ValueError("pre- and post-decoder share one rotary embedding, but their heads differ in size")
    has_video = base["video_token_index"] < base["vocab_size"]
    return HaploConfig(
        pre_config=pre_config,
        text_config=text_config,
        image_token_id=base["image_token_index"],
        video_token_id=base["video_token_index"] if has_video else None,
        image_size=base["default_image_size"],
        post_rotary_increment=1.0,
        text_projection=False,
        connector_bias=False,
        frame_newlines=False,
    )


def _part(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """base_config or pre_config, with what the file leaves out; post_config is ignored, as the release does.

    The release copies base_config over the file's top level when it loads and saves, so the two agree in its files;
    where somebody edited the top level of a value that base_config leaves out, that is what was meant.
    """
    given = settings.get(name, {})
    if not isinstance(given, dict):
        raise ValueError(f"{name} is {given!r}, expected an object of settings")
    top = {key: settings[key] for key in TEXT_DEFAULTS if key in settings} if name == "base_config" else {}
    part = {**TEXT_DEFAULTS, **top, **given}
    part["num_key_value_heads"] = part["num_key_value_heads"] or part["num_attention_heads"]
    for key in _POSITIVE:
        if type(part[key]) is not int or part[key] < 1:
            raise ValueError(f"{name}.{key} is {part[key]!r}, expected a positive whole number")
    for key in _FRACTIONS:
        if type(part[key]) not in (int, float) or not part[key] > 0:
            raise ValueError(f"{name}.{key} is {part[key]!r}, expected a positive number")
    for key in _IDS:
        if type(part[key]) is not int and not (key == "pad_token_id" and part[key] is None):
            raise ValueError(f"{name}.{key} is {part[key]!r}, expected the id of a token")
    if (part["pad_token_id"] or 0) >= part["vocab_size"]:
        beyond = f"beyond the vocabulary of {part['vocab_size']}"
        raise ValueError(f"{name}.pad_token_id is {part['pad_token_id']}, {beyond}")
    if part["hidden_act"] not in ACT2FN:
        raise ValueError(f"{name}.hidden_act is '{part['hidden_act']}', which is no activation of transformers")
    if part["use_sliding_window"]:
        raise ValueError(f"{name}.use_sliding_window is on; the mixed mask does not model a window")
    return part


def _decoder_shape(part: dict[str, Any], rotary: dict[str, Any]) -> dict[str, Any]:
    scaling = rotary["rope_scaling"] or {"rope_type": "default"}
    kind = (scaling.get("type") or scaling.get("rope_type")) if isinstance(scaling, dict) else None
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"rope_scaling is {scaling!r}, of no type that transformers knows")
    scaling = {name: value for name, value in scaling.items() if name != "type"} | {"rope_type": kind}
    same = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "initializer_range",
    )  # fmt: skip
    return {
        **{name: part[name] for name in same},
        **({"head_dim": part["head_dim"]} if part.get("head_dim") else {}),
        "norm": part["norm_mode"],
        "norm_eps": part["rms_norm_eps"],
        "gated_mlp": True,
        "max_position_embeddings": rotary["max_position_embeddings"],
        "rope_parameters": {**scaling, "rope_theta": rotary["rope_theta"]},
    }


def _load(config: HaploConfig, weights: dict[str, torch.Tensor], source: Path) -> HaploForConditionalGeneration:
    """The model around the tensors as they are: without random ones first, and without a second copy of them."""
    with torch.device("meta"):
        model = HaploForConditionalGeneration(config)
    own = model.state_dict()
    wanted = {released_name(name, config.pre_config.num_hidden_layers): name for name in own}
    if missing := sorted(set(wanted) - set(weights)):
        raise ValueError(f"{source}: missing tensors ({len(missing)}): {', '.join(missing[:5])}")
    if unknown := sorted(set(weights) - set(wanted)):
        raise ValueError(f"{source}: unknown tensors ({len(unknown)}): {', '.join(unknown[:5])}")
    dtypes = {tensor.dtype for tensor in weights.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    state = {}
    for theirs, ours in wanted.items():
        tensor, shape = weights[theirs], own[ours].shape
        expected = released_shape(ours, tuple(shape), config.pre_config.patch_size)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{source}: {theirs} has the shape {list(tensor.shape)}, expected {list(expected)}")
        if tensor.dtype not in PRECISIONS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{source}: {theirs} holds {kind}, expected floating-point numbers of 16 bits or more")
        state[ours] = tensor.reshape(shape).to(dtype)
    model.load_state_dict(state, assign=True)
    return model


def _read_weights(source: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for name in _weight_files(source):
        try:
            weights |= load_file(source / name)
        except FileNotFoundError:
            raise ValueError(f"{source / name} is missing (weights are read from safetensors only)") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{source / name} is damaged: {error}") from None
    return weights


def _weight_files(source: Path) -> list[str]:
    if (source / WEIGHTS).is_file() or not (source / INDEX).is_file():
        return [WEIGHTS]
    shards = read_json(source / INDEX).get("weight_map")
    # A name, not a path: an index may not point out of its folder.
    if not isinstance(shards, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    ):
        raise ValueError(f"{source / INDEX} has no weight_map of file names")
    return sorted(set(shards.values()))


def _read_generation(path: Path) -> GenerationConfig:
    settings = read_json(path)
    if not settings.get("do_sample"):
        # They say nothing about greedy decoding, but transformers would refuse to save them.
        settings = {name: value for name, value in settings.items() if name not in SAMPLING}
    try:
        generation = GenerationConfig.from_dict(settings)
        generation.validate(strict=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None
    return generation


def _has_processor(folder: Path) -> bool:
    return (folder / "preprocessor_config.json").is_file() and (folder / "tokenizer_config.json").is_file()


def import_processor(source: Path, settings: dict[str, Any]) -> HaploProcessor:
    """Our processor with the release's way of laying pictures out. `settings` is the released config.json.

    Raises:
        ValueError: a file is missing or damaged, pictures and videos are not prepared alike or not as the model needs
            them, or the tokenizer has other ids of the placeholders.
    """
    base = _part(settings, "base_config")
    size = base["default_image_size"]
    pictures = _read_pixels(source / "preprocessor_config.json", size)
    videos_file = source / "video_processor" / "preprocessor_config.json"
    if videos_file.is_file():
        videos = _read_pixels(videos_file, size)
        for name in ("image_mean", "image_std"):
            if videos[name] != pictures[name]:
                raise ValueError(f"{videos_file}: {name} differs from that of images, which is not supported")
    tiles = re.fullmatch(r"anyres_max_([1-9]\d*)", str(base["image_aspect_ratio"]))
    if tiles is None:
        raise ValueError(f"image_aspect_ratio is '{base['image_aspect_ratio']}', expected anyres_max_ and a number")
    tokenizer = _read_tokenizer(source)
    for token, wanted in ((IMAGE_TOKEN, base["image_token_index"]), (VIDEO_TOKEN, base["video_token_index"])):
        found = tokenizer.get_vocab().get(token)
        no_videos = token == VIDEO_TOKEN and (found is None or wanted >= base["vocab_size"])
        if found != wanted and not no_videos:
            raise ValueError(f"{source}: the tokenizer's id of '{token}' is {found}, but the model's is {wanted}")
    chat = source / "chat_template.json"
    return HaploProcessor(
        HaploImageProcessor(
            image_size=size,
            patch_size=base["patch_size"],
            max_tiles=int(tiles[1]),
            image_mean=pictures["image_mean"],
            image_std=pictures["image_std"],
            tiling="released",
            # Where the two files differ, the release's code works only on pictures for which both choose alike.
            image_grid_pinpoints=pictures.get("image_grid_pinpoints")
            or base.get("image_grid_pinpoints", DEFAULT_PINPOINTS),
        ),
        tokenizer,
        chat_template=(read_json(chat) if chat.is_file() else {}).get("chat_template", tokenizer.chat_template),
        class_token=False,
        frame_newlines=False,
        add_special_tokens=True,
    )


def _read_pixels(path: Path, size: int) -> dict[str, Any]:
    """The settings of a released image or video processor, which must be those that ours always has."""
    given = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD), **PIXEL_SETTINGS, **read_json(path)}
    for name, value in {**PIXEL_SETTINGS, "size": {"height": size, "width": size}}.items():
        if given.get(name) != value:
            raise ValueError(f"{path}: {name} is {given.get(name)}, expected {value}")
    for name in ("image_mean", "image_std"):
        colours = given[name] if isinstance(given[name], list) else []
        numbers = [value for value in colours if isinstance(value, (int, float))]
        if not len(colours) == len(numbers) == 3 or (name == "image_std" and min(numbers) <= 0):
            raise ValueError(f"{path}: {name} is {given[name]}, expected a list of three numbers")
    points = given.get("image_grid_pinpoints") or []
    if not isinstance(points, list) or not all(isinstance(point, list) for point in points):
        raise ValueError(f"{path}: image_grid_pinpoints is {points}, expected pairs of heights and widths")
    return given


def _read_tokenizer(source: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, config=PretrainedConfig(), trust_remote_code=False)
    # The tokenizers library raises plain Exception on damaged files.
    except Exception as error:
        raise ValueError(f"{source}: the tokenizer cannot be read: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
