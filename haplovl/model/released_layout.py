"""The layout of the authors' released checkpoints: its names of tensors and settings, and what it leaves unsaid."""

import json
from pathlib import Path
from typing import Any

from haplovl.model.layout import tile_shapes

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PRE_NORM_EPS = 1e-5
"""Of the release's norm before the first layer, whatever its configuration says of the others."""
TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "patch_size": 14,
    "norm_mode": "rmsnorm",
    "attention_rope": False,
    "image_token_index": 151646,
    "video_token_index": 151647,
    "image_aspect_ratio": "anyres_max_6",
    "image_newline": True,
    "default_image_size": 336,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
"""What the release's configuration leaves out of its file where a value is this."""
PIXEL_SETTINGS = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
"""How the release's processor turns every picture into pixel values; there is no other way here."""
DEFAULT_PINPOINTS = [[336 * rows, 336 * columns] for rows, columns in tile_shapes(6)]

_LAYER = {
    "layer_norm1": "input_layernorm",
    "layer_norm2": "post_attention_layernorm",
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.out_proj": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
}
_OUTER = {
    "model.text_embedding.weight": "model.embed_tokens.weight",
    "model.image_embedding.newline": "model.image_newline",
    "model.image_embedding.patch.weight": "model.patch_embed.proj.weight",
    "model.image_embedding.position": "model.pre_pos_embed",
    "model.pre_decoder.pre_layernorm.weight": "model.pre_norm.weight",
    "model.pre_decoder.pre_layernorm.bias": "model.pre_norm.bias",
    "model.connector.weight": "model.pre_connector.weight",
    "model.language_model.norm.weight": "model.norm.weight",
    "model.language_model.norm.bias": "model.norm.bias",
    "lm_head.weight": "lm_head.weight",
}


def released_name(name: str, pre_layers: int) -> str:
    """The release's name of one of our tensors (of a model in its layout)."""
    if name in _OUTER:
        return _OUTER[name]
    for prefix, first in (("model.pre_decoder.layers.", 0), ("model.language_model.layers.", pre_layers)):
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            module, kind = rest.rsplit(".", 1)
            return f"model.layers.{first + int(number)}.{_LAYER[module]}.{kind}"
    raise KeyError(name)


def released_shape(name: str, shape: tuple[int, ...], patch_size: int) -> tuple[int, ...]:
    """The release's shape of one of our tensors."""
    if name == "model.image_embedding.patch.weight":
        return (shape[0], shape[1] // patch_size**2, patch_size, patch_size)
    return (1, *shape) if name == "model.image_embedding.position" else shape


def read_json(path: Path) -> dict[str, Any]:
    """The settings in a JSON file.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object of settings")
    return content
