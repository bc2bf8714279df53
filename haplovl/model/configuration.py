"""Configuration of HaploVL: the pre-decoder, the language model and how images enter the sequence."""

from typing import Any, Literal

from transformers import AutoConfig, PretrainedConfig

from haplovl.model.layout import patches_per_side, single_tile


class HaploDecoderConfig(PretrainedConfig):
    """Shape of a stack of HaploDecoderLayer: the pre-decoder, and the post-decoder of released checkpoints.

    `rope_parameters` is transformers' dictionary (`rope_type`, `rope_theta` and what the type needs). `norm` and
    `gated_mlp` choose between a vision transformer's layer (LayerNorm, fc1 and fc2) and a language model's.
    """

    model_type = "haplovl_decoder"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        hidden_act: str = "quick_gelu",
        norm: Literal["layernorm", "rmsnorm"] = "layernorm",
        norm_eps: float = 1e-5,
        gated_mlp: bool = False,
        final_norm: bool = True,
        rope_parameters: dict | None = None,
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        vocab_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if norm not in ("layernorm", "rmsnorm"):
            raise ValueError(f"norm is '{norm}'; expected 'layernorm' or 'rmsnorm'")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.norm = norm
        self.norm_eps = norm_eps
        self.gated_mlp = gated_mlp
        self.final_norm = final_norm
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        if vocab_size is not None:
            self.vocab_size = vocab_size
        super().__init__(**kwargs)


class HaploPreDecoderConfig(HaploDecoderConfig):
    """Shape of the pre-decoder and of the image embedding, both inherited from a vision transformer.

    `patch_grid` is the side, in patches, of the learned position table. `rotary_increment` is the rotary step between
    the tokens of one image (0: all tokens of an image share one position; 1: sequential).

    Where there is no pre-decoder (see HaploConfig.fusion) it has no layers, and describes the image blocks alone: the
    width of their tokens, patches, class and newline tokens. `patch_grid` 0 means no position table.
    """

    model_type = "haplovl_pre_decoder"

    def __init__(
        self,
        rotary_increment: float = 0.0,
        patch_size: int = 14,
        num_channels: int = 3,
        patch_grid: int = 24,
        patch_bias: bool = False,
        pre_layernorm: bool = True,
        pre_layernorm_eps: float | None = None,
        class_token: bool = True,
        image_newline: bool = True,
        **kwargs: Any,
    ) -> None:
        self.rotary_increment = rotary_increment
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.patch_grid = patch_grid
        self.patch_bias = patch_bias
        self.pre_layernorm = pre_layernorm
        self.pre_layernorm_eps = pre_layernorm_eps
        self.class_token = class_token
        self.image_newline = image_newline
        super().__init__(**kwargs)


FUSIONS = ("early", "tower", "patches")
TEXT_PATHS = ("connector", "residual", "gated", "direct")


class HaploConfig(PretrainedConfig):
    """Configuration of HaploForConditionalGeneration.

    `fusion`: `early` is HaploVL, with patches and text together in a pre-decoder. `tower` is LLaVA's: pictures go
    through the vision transformer of `vision_config` and a two-layer MLP into the language model. `patches` is SOLO's:
    they go there through one linear layer. `text_path` is how text leaves the pre-decoder (early only): through the
    `connector`, that plus the word's own embedding (`residual`), the same with a learned factor on every channel of
    the connector's output that starts at zero (`gated`), or as that embedding alone (`direct`).
    `text_config` is any transformers causal language model's configuration; the model uses that model's own class.
    `image_token_id` and `video_token_id` mark every position of the sequence that a token of an image or of a video
    fills. `text_projection` off means text embeddings of the pre-decoder's own width (the released layout).
    `post_mask` is the mask of the language model: `mixed` as in the pre-decoder, or `causal` also inside images.
    A video frame is one tile; with `frame_newlines` it has a newline token after every row as an image has, else there
    is one newline token after the last frame (the released layout).
    """

    model_type = "haplovl"
    sub_configs = {"pre_config": HaploPreDecoderConfig, "text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        pre_config: dict | HaploPreDecoderConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        image_token_id: int = 32000,
        video_token_id: int | None = None,
        image_size: int = 336,
        post_rotary_increment: float = 1.0,
        post_mask: Literal["mixed", "causal"] = "mixed",
        text_projection: bool = True,
        connector_bias: bool = True,
        frame_newlines: bool = True,
        fusion: Literal["early", "tower", "patches"] = "early",
        text_path: Literal["connector", "residual", "gated", "direct"] = "connector",
        vision_config: dict | PretrainedConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        if isinstance(pre_config, dict):
            pre_config = HaploPreDecoderConfig(**pre_config)
        self.pre_config = pre_config if pre_config is not None else HaploPreDecoderConfig()
        if isinstance(vision_config, dict):
            vision_config = AutoConfig.for_model(**vision_config)
        self.vision_config = vision_config
        self.fusion, self.text_path = fusion, text_path
        self._check_fusion(text_projection)
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.image_size = image_size
        self.post_rotary_increment = post_rotary_increment
        if post_mask not in ("mixed", "causal"):
            raise ValueError(f"post_mask is '{post_mask}'; expected 'mixed' or 'causal'")
        self.post_mask = post_mask
        self.text_projection = text_projection
        self.connector_bias = connector_bias
        self.frame_newlines = frame_newlines
        kwargs.setdefault("tie_word_embeddings", bool(getattr(self.text_config, "tie_word_embeddings", False)))
        if kwargs["tie_word_embeddings"] and not text_projection:
            raise ValueError(
                "tie_word_embeddings needs text_projection: without it the text embeddings have the pre-decoder's "
                "width, which is not that of the head"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        super().__init__(**kwargs)

    def _check_fusion(self, text_projection: bool) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion is '{self.fusion}'; expected one of {', '.join(FUSIONS)}")
        if self.text_path not in TEXT_PATHS:
            raise ValueError(f"text_path is '{self.text_path}'; expected one of {', '.join(TEXT_PATHS)}")
        if (self.fusion == "tower") != (self.vision_config is not None):
            raise ValueError("a vision_config and fusion 'tower' need each other")
        if not text_projection and (self.fusion, self.text_path) != ("early", "connector"):
            raise ValueError(
                "text embeddings of the pre-decoder's width (text_projection off) need fusion 'early' and text_path "
                "'connector': there are none of the language model's width"
            )

    def to_diff_dict(self) -> dict[str, Any]:
        """As PretrainedConfig.to_diff_dict; the files of early fusion say nothing of what only the others have."""
        data = super().to_diff_dict()
        usual = {"fusion": "early", "text_path": "connector", "vision_config": None}
        return {name: value for name, value in data.items() if name not in usual or value != usual[name]}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "HaploConfig":
        """As PretrainedConfig.from_dict, but only of this type: transformers would fill another one up with defaults.

        Raises:
            ValueError: the configuration of another model.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(f"the configuration is that of a '{found}', not of a '{cls.model_type}'")
        return super().from_dict(config_dict, **kwargs)

    @property
    def tokens_per_image(self) -> int:
        """Sequence positions of a picture in a single square tile: patches, row newlines and the class token."""
        pre = self.pre_config
        side = patches_per_side(self.image_size, pre.patch_size)
        return single_tile(side, side).tokens(pre.class_token, pre.image_newline)
