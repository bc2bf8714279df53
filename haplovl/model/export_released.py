"""`haplovl export-released`: a model of ours in the layout of the authors' release.

What that layout cannot hold is refused by name. What it can is written exactly: an ungated MLP as a gate whose other
factor is 0·x + 1, missing biases as zeros, the text projection folded into the embedding, the patches' bias into the
positions.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from haplovl.model.configuration import HaploConfig, HaploDecoderConfig
from haplovl.model.modeling import HaploForConditionalGeneration
from haplovl.model.processing import IMAGE_TOKEN, VIDEO_TOKEN, HaploProcessor
from haplovl.model.released_layout import (
    PIXEL_SETTINGS,
    PRE_NORM_EPS,
    TEXT_DEFAULTS,
    WEIGHTS,
    read_json,
    released_name,
    released_shape,
)

LANGUAGE_TYPES = ("llama", "mistral", "qwen2")
"""transformers' language models whose layers are those of the release, apart from biases."""


def export_released(source: Path, target: Path) -> str:
    """Writes a model folder of ours in the released layout, with its processor if it has one; returns a sentence.

    Raises:
        ValueError: the model has something that the layout cannot hold, or cannot be loaded. Nothing is written then.
    """
    kind = read_json(source / "config.json").get("model_type")
    if kind != HaploConfig.model_type:
        raise ValueError(f"{source}: model_type is '{kind}', expected '{HaploConfig.model_type}' (a model of ours)")
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the model itself; name another folder to write")
    try:
        config = HaploConfig.from_pretrained(source)
        has_processor = (source / "processor_config.json").is_file()
        processor = HaploProcessor.from_pretrained(source) if has_processor else None
        refused = unsupported(config) + (unsupported_processor(processor, config) if processor else [])
        if refused:
            raise ValueError(f"the released layout cannot hold {'; '.join(refused)}")
        model = HaploForConditionalGeneration.from_pretrained(source, dtype="auto")
    except OSError as error:
        raise ValueError(f"{source} cannot be loaded: {' '.join(str(error).split())}") from None
    target.mkdir(parents=True, exist_ok=True)
    save_file(released_weights(model), target / WEIGHTS, metadata={"format": "pt"})
    _write(target / "config.json", released_config(model, processor))
    generation = model.generation_config
    generation.suppress_tokens = None  # our guard against placeholders, unknown to the release
    generation.save_pretrained(target)
    if processor is None:
        return f"{source} -> {target} (the model alone: no processor files were found)"
    _write_processor(processor, target)
    return f"{source} -> {target}"


def unsupported(config: HaploConfig) -> list[str]:
    """What of a model the released layout cannot hold, in words that name the setting."""
    pre = config.pre_config
    if config.fusion != "early":
        return [f"a model without a pre-decoder (fusion '{config.fusion}')"]
    found = [
        (config.text_path != "connector", f"text that bypasses the connector (text_path '{config.text_path}')"),
        (pre.class_token, "a class token (pre_config.class_token)"),
        (not pre.image_newline, "images without newline tokens (pre_config.image_newline)"),
        (not pre.pre_layernorm, "a pre-decoder without a norm before it (pre_config.pre_layernorm)"),
        (
            pre.pre_layernorm and (pre.pre_layernorm_eps or pre.norm_eps) != PRE_NORM_EPS,
            f"an epsilon other than {PRE_NORM_EPS} in the norm before the pre-decoder (pre_config.pre_layernorm_eps)",
        ),
        (pre.final_norm, "a norm after the pre-decoder (pre_config.final_norm)"),
        (config.connector_bias, "a bias in the connector (connector_bias)"),
        (pre.rotary_increment != 1, f"a pre-decoder rotary increment of {pre.rotary_increment}; it is always 1"),
        (
            config.post_rotary_increment != 1,
            f"a post_rotary_increment of {config.post_rotary_increment}; it is always 1",
        ),
        (config.post_mask != "mixed", f"a language model with the mask '{config.post_mask}' (post_mask)"),
        (
            config.frame_newlines and config.video_token_id is not None,
            "video frames with newline tokens (frame_newlines)",
        ),
        (pre.num_channels != 3, f"pictures of {pre.num_channels} channels"),
        (
            pre.patch_grid * pre.patch_size != config.image_size,
            f"a position table of {pre.patch_grid}x{pre.patch_grid} patches (pre_config.patch_grid) for tiles of "
            f"{config.image_size} pixels (image_size)",
        ),
    ]
    return [words for wrong, words in found if wrong] + _unsupported_language(config)


def _unsupported_language(config: HaploConfig) -> list[str]:
    text, image = config.text_config, config.image_token_id
    if text.model_type not in (HaploDecoderConfig.model_type, *LANGUAGE_TYPES):
        return [f"a language model of type '{text.model_type}' (it holds {', '.join(LANGUAGE_TYPES)})"]
    windowed = getattr(text, "use_sliding_window", hasattr(text, "sliding_window"))
    window = text.sliding_window if windowed else None
    found = [
        (window is not None, f"a language model with a sliding window of {window}"),
        (
            not getattr(text, "final_norm", True),
            "a language model without a norm after it (text_config.final_norm)",
        ),
        (image >= text.vocab_size, f"an image token ({image}) beyond the vocabulary of {text.vocab_size}"),
    ]
    return [words for wrong, words in found if wrong]


def unsupported_processor(processor: HaploProcessor, config: HaploConfig) -> list[str]:
    """What of a processor the released layout cannot hold, together with the model of this configuration."""
    images, pre = processor.image_processor, config.pre_config
    found = [
        (images.tiling != "released", f"pictures laid out by the tiling '{images.tiling}' (it holds 'released')"),
        (processor.class_token, "a processor that counts class tokens (class_token)"),
        (not processor.image_newline, "a processor that counts no newline tokens (image_newline)"),
        (processor.frame_newlines, "a processor that counts newline tokens in video frames (frame_newlines)"),
        (processor.video_token_id is None, f"a tokenizer without '{VIDEO_TOKEN}'"),
        (
            (images.image_size, images.patch_size) != (config.image_size, pre.patch_size),
            f"tiles of {images.image_size} and patches of {images.patch_size} pixels in the processor, but "
            f"{config.image_size} and {pre.patch_size} in the model",
        ),
    ]
    return [words for wrong, words in found if wrong]


# --- weights ---------------------------------------------------------------------------------------------------------
def released_weights(model: HaploForConditionalGeneration) -> dict[str, torch.Tensor]:
    """All tensors under the release's names."""
    config, state = model.config, dict(model.state_dict())
    if config.text_config.model_type != HaploDecoderConfig.model_type:
        state = _plain_language(state)
    if config.text_projection:
        state = _folded_text(state)
    else:
        state.pop("model.language_model.embed_tokens.weight", None)  # the language model's own are not used then
    bias = state.pop("model.image_embedding.patch.bias", None)
    if bias is not None:
        state["model.image_embedding.position"] = state["model.image_embedding.position"] + bias
    state = _gated(_biased(state))
    layers, size = config.pre_config.num_hidden_layers, config.pre_config.patch_size
    return {
        released_name(name, layers): tensor.reshape(released_shape(name, tuple(tensor.shape), size))
        .clone()
        .contiguous()
        for name, tensor in state.items()
    }


def _plain_language(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Llama-like language model's tensors under the names of HaploDecoderModel."""
    renamed = {
        "input_layernorm": "layer_norm1",
        "post_attention_layernorm": "layer_norm2",
        "self_attn.o_proj": "self_attn.out_proj",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "fc1",
        "mlp.down_proj": "fc2",
    }
    ours = {}
    for name, tensor in state.items():
        if name.startswith("model.language_model.layers."):
            for theirs, own in renamed.items():
                name = name.replace(f".{theirs}.", f".{own}.")
        ours[name] = tensor
    return ours


def _folded_text(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text projection applied to every word, in float64, so that only the last rounding remains."""
    state = dict(state)
    words = state.pop("model.language_model.embed_tokens.weight")
    weight, bias = state.pop("model.text_projection.weight"), state.pop("model.text_projection.bias")
    folded = words.double() @ weight.double().T + bias.double()
    return {**state, "model.text_embedding.weight": folded.to(words.dtype)}


def _biased(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros where a projection of a layer has no bias."""
    added = {}
    for name, tensor in state.items():
        is_projection = ".layers." in name and name.endswith(".weight") and tensor.ndim == 2
        bias = name.removesuffix("weight") + "bias"
        if is_projection and bias not in state:
            added[bias] = tensor.new_zeros(tensor.shape[0])
    return state | added


def _gated(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ungated MLPs as gated ones: act(fc1(x)) · (0·x + 1)."""
    gated = dict(state)
    for name, tensor in state.items():
        layer = name.removesuffix("fc1.weight")
        if name.endswith(".fc1.weight") and f"{layer}gate.weight" not in state:
            gated[f"{layer}gate.weight"], gated[f"{layer}gate.bias"] = tensor, state[f"{layer}fc1.bias"]
            gated[f"{layer}fc1.weight"] = torch.zeros_like(tensor)
            gated[f"{layer}fc1.bias"] = torch.ones_like(state[f"{layer}fc1.bias"])
    return gated


# --- settings --------------------------------------------------------------------------------------------------------
def released_config(model: HaploForConditionalGeneration, processor: HaploProcessor | None) -> dict[str, Any]:
    """The release's config.json."""
    config, pre, text = model.config, model.config.pre_config, model.config.text_config
    tiles = 1 if processor is None else processor.image_processor.max_tiles
    points = [] if processor is None else processor.image_processor.image_grid_pinpoints
    shared = {
        "vocab_size": text.vocab_size,
        "patch_size": pre.patch_size,
        "image_token_index": config.image_token_id,
        # The release always has one; without a video token of ours it names an id that no text has.
        "video_token_index": text.vocab_size if config.video_token_id is None else config.video_token_id,
        "image_aspect_ratio": f"anyres_max_{tiles}",
        "image_grid_pinpoints": points or [[config.image_size, config.image_size]],
        "image_newline": True,
    }
    same_rotary = pre.rope_parameters == text.rope_parameters and pre.head_dim == _head_dim(text)
    base = {
        **TEXT_DEFAULTS,
        **_shape(text),
        **shared,
        "default_image_size": config.image_size,
        **{name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    pre_part = {
        **TEXT_DEFAULTS,
        **_shape(pre),
        **shared,
        "attention_rope": not same_rotary,
        "default_image_size": pre.patch_grid * pre.patch_size,
    }
    return {
        "architectures": ["HaploForConditionalGeneration"],
        "model_type": "haplo",
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        **base,
        "base_config": {**base, "model_type": "haplo"},
        "pre_config": {**pre_part, "model_type": "haplo"},
        "post_config": {**base, "model_type": "haplo"},
    }


def _head_dim(text: PretrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _shape(part: PretrainedConfig) -> dict[str, Any]:
    scaling = dict(part.rope_parameters)
    theta, head_dim = scaling.pop("rope_theta"), _head_dim(part)
    same = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "initializer_range",
    )  # fmt: skip
    return {
        **{name: getattr(part, name) for name in same},
        **({} if head_dim == part.hidden_size // part.num_attention_heads else {"head_dim": head_dim}),
        "rope_theta": theta,
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "norm_mode": getattr(part, "norm", "rmsnorm"),
        "rms_norm_eps": getattr(part, "norm_eps", None) or part.rms_norm_eps,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }


def _write_processor(processor: HaploProcessor, target: Path) -> None:
    images = processor.image_processor
    _write_tokenizer(processor, target)
    pixels = {
        **PIXEL_SETTINGS,
        "image_mean": images.image_mean,
        "image_std": images.image_std,
        "size": {"height": images.image_size, "width": images.image_size},
    }
    _write(
        target / "preprocessor_config.json",
        {
            **pixels,
            "do_pad": True,
            "image_grid_pinpoints": images.image_grid_pinpoints,
            "image_processor_type": "HaploImageProcessor",
            "processor_class": "HaploProcessor",
        },
    )
    (target / "video_processor").mkdir(exist_ok=True)
    videos = target / "video_processor" / "preprocessor_config.json"
    _write(videos, {**pixels, "image_processor_type": "HaploVideoProcessor"})
    side = images.image_size // images.patch_size
    tokens = {"image_token": IMAGE_TOKEN, "num_image_tokens": side * side, "video_token": VIDEO_TOKEN}
    _write(target / "processor_config.json", {**tokens, "processor_class": "HaploProcessor"})
    if processor.chat_template:
        _write(target / "chat_template.json", {"chat_template": processor.chat_template})


def _write_tokenizer(processor: HaploProcessor, target: Path) -> None:
    """The tokenizer as transformers 4, which the release's code needs, can read it."""
    processor.tokenizer.save_pretrained(target)
    (target / "chat_template.jinja").unlink(missing_ok=True)
    if not processor.add_special_tokens:
        # The release's processor always lets the tokenizer add what it adds, so it must be one that adds nothing.
        path = target / "tokenizer.json"
        _write(path, {**read_json(path), "post_processor": None})
    path = target / "tokenizer_config.json"
    settings = read_json(path)
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    extra = settings.pop("extra_special_tokens", None)
    settings |= {"additional_special_tokens": extra or [], "tokenizer_class": "PreTrainedTokenizerFast"}
    _write(path, settings)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
