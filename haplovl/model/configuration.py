"""Configuration of HaploVL: the pre-decoder, the language model and how images enter the sequence."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class HaploPreDecoderConfig(PretrainedConfig):
    """Shape of the pre-decoder and of the image embedding, both inherited from a vision transformer.

    `patch_grid` is the side, in patches, of the learned position table. `rotary_increment` is the rotary step between
    the tokens of one image (0: all tokens of an image share one position; 1: sequential).
    """

    model_type = "haplovl_pre_decoder"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rotary_increment: float = 0.0,
        patch_size: int = 14,
        num_channels: int = 3,
        patch_grid: int = 24,
        patch_bias: bool = False,
        pre_layernorm: bool = True,
        class_token: bool = True,
        image_newline: bool = True,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.rope_theta = rope_theta
        self.rotary_increment = rotary_increment
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.patch_grid = patch_grid
        self.patch_bias = patch_bias
        self.pre_layernorm = pre_layernorm
        self.class_token = class_token
        self.image_newline = image_newline
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class HaploConfig(PretrainedConfig):
    """Configuration of HaploForConditionalGeneration.

    `text_config` is any transformers causal language model's configuration; the model uses that model's own class.
    `image_token_id` marks every position of the sequence that an image token fills.
    """

    model_type = "haplovl"
    sub_configs = {"pre_config": HaploPreDecoderConfig, "text_config": AutoConfig}

    def __init__(
        self,
        pre_config: dict | HaploPreDecoderConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        image_token_id: int = 32000,
        image_size: int = 336,
        post_rotary_increment: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        if isinstance(pre_config, dict):
            pre_config = HaploPreDecoderConfig(**pre_config)
        self.pre_config = pre_config if pre_config is not None else HaploPreDecoderConfig()
        self.image_token_id = image_token_id
        self.image_size = image_size
        self.post_rotary_increment = post_rotary_increment
        kwargs.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        super().__init__(**kwargs)

    @property
    def tokens_per_image(self) -> int:
        """Sequence positions that one image fills: patches, row newlines and the class token."""
        pre = self.pre_config
        return image_token_count(self.image_size, pre.patch_size, pre.class_token, pre.image_newline)


def image_token_count(image_size: int, patch_size: int, class_token: bool, image_newline: bool) -> int:
    """Number of sequence positions of one square image; the only place where they are counted.

    Raises:
        ValueError: the image's side is no multiple of the patch size.
    """
    if image_size <= 0 or image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a positive multiple of the patch size {patch_size}")
    side = image_size // patch_size
    return side * (side + int(image_newline)) + int(class_token)
