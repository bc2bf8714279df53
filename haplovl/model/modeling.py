"""HaploVL as a transformers model: early fusion of raw image patches and text in one transformer."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import ModelOutput

from haplovl.model.attention import for_backend, image_blocks, mixed_mask, rotary_positions
from haplovl.model.configuration import HaploConfig
from haplovl.model.embedding import HaploImageEmbedding
from haplovl.model.pre_decoder import HaploPreDecoder


@dataclass
class HaploModelOutput(ModelOutput):
    """Hidden states of the post-decoder [B, L, H] and, where one is used, the filled cache."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None


@dataclass
class HaploCausalLMOutput(ModelOutput):
    """Loss (mean over supervised tokens), logits [B, kept, V] and the filled cache."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None


class HaploPreTrainedModel(PreTrainedModel):
    """Weight initialisation and the features that every HaploVL model has."""

    config_class = HaploConfig
    config: HaploConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HaploPreDecoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HaploImageEmbedding):
            for name in ("position", "class_token", "class_position", "newline"):
                parameter = getattr(module, name)
                if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
                    parameter.normal_(std=self.config.pre_config.initializer_range)


class HaploModel(HaploPreTrainedModel):
    """Embeddings, pre-decoder, connector and the language model without its head."""

    def __init__(self, config: HaploConfig) -> None:
        super().__init__(config)
        pre, text = config.pre_config, config.text_config
        # The language model keeps cache layers 0…N−1 of its own, the pre-decoder takes those after them.
        self.language_model = AutoModel.from_config(text)
        self.image_embedding = HaploImageEmbedding(pre)
        self.text_projection = nn.Linear(text.hidden_size, pre.hidden_size)
        self.pre_decoder = HaploPreDecoder(pre, first_cache_index=text.num_hidden_layers)
        self.connector = nn.Linear(pre.hidden_size, text.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Puts text and image tokens into one sequence of the pre-decoder's width.

        Shapes: input_ids [B, L], pixel_values [N, C, H, W] in the order of the image blocks → [B, L, pre width].

        Raises:
            ValueError: the placeholders in input_ids do not match the images.
        """
        is_image = input_ids == self.config.image_token_id
        text_ids = input_ids.masked_fill(is_image, 0)
        words = self.get_input_embeddings()(text_ids)
        x = self.text_projection(words.to(self.text_projection.weight.dtype))
        slots = int(is_image.sum())
        images = 0 if pixel_values is None else pixel_values.shape[0]
        if slots != images * self.config.tokens_per_image:
            raise ValueError(
                f"the sequence has room for {slots} image tokens, but {images} images of "
                f"{self.config.tokens_per_image} tokens each were given"
            )
        if images:
            tokens = self.image_embedding(pixel_values)
            if tokens.shape[1] != self.config.tokens_per_image:
                raise ValueError(
                    f"pictures of {tuple(pixel_values.shape[2:])} pixels give {tokens.shape[1]} tokens, "
                    f"expected {self.config.tokens_per_image}"
                )
            x = x.masked_scatter(is_image[..., None], tokens.to(x.dtype))
        return x

    def pre_decode(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        document_ids: torch.Tensor | None = None,
        all_hidden_states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Embeddings through the pre-decoder, without the language model: what stage 1 trains. → [B, L, pre width]."""
        blocks = image_blocks(input_ids, self.config.image_token_id, self.config.tokens_per_image)
        positions = rotary_positions(blocks, self.config.pre_config.rotary_increment, document_ids=document_ids)
        x = self.embed(input_ids, pixel_values)
        backend = self.config._attn_implementation
        mask = for_backend(mixed_mask(blocks, document_ids=document_ids), backend, x.dtype)
        return self.pre_decoder(x, positions, mask, backend, all_hidden_states=all_hidden_states)

    def position_ids(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotary positions of a whole sequence for pre- and post-decoder. [B, L] → [2, B, L]."""
        blocks = image_blocks(input_ids, self.config.image_token_id, self.config.tokens_per_image)
        increments = (self.config.pre_config.rotary_increment, self.config.post_rotary_increment)
        pre, post = (rotary_positions(blocks, i, attention_mask, document_ids) for i in increments)
        dtype = torch.promote_types(pre.dtype, post.dtype)
        return torch.stack([pre.to(dtype), post.to(dtype)])

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
    ) -> HaploModelOutput:
        """Runs the whole transformer.

        Shapes: input_ids [B, L]; pixel_values [N, C, H, W] in the order of the image blocks; attention_mask
        [B, past + L], 0 for padding; position_ids [2, B, L] for pre- and post-decoder (computed when absent);
        document_ids [B, L] for packed rows.

        Raises:
            ValueError: placeholders and images do not match, the attention backend cannot serve the mask, or a cache
                is continued without position_ids while positions depend on what it holds.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past_key_values is not None:
            add_pre_decoder_layers(past_key_values, self.config)
        if position_ids is None:
            if past:
                raise ValueError("position_ids are needed to continue a filled cache; generate() passes them")
            position_ids = self.position_ids(input_ids, attention_mask, document_ids)
        blocks = image_blocks(input_ids, self.config.image_token_id, self.config.tokens_per_image)
        allowed = mixed_mask(blocks, attention_mask, document_ids, past)
        self._refuse_sliding_window(allowed.shape[-1])
        x = self.embed(input_ids, pixel_values)
        backend = self.config._attn_implementation
        mask = for_backend(allowed, backend, x.dtype)
        x = self.connector(self.pre_decoder(x, position_ids[0], mask, backend, past_key_values))
        mask = for_backend(allowed, self.config.text_config._attn_implementation, x.dtype)
        out = self.language_model(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=position_ids[1],
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        )
        return HaploModelOutput(out.last_hidden_state, past_key_values)

    def _refuse_sliding_window(self, length: int) -> None:
        window = getattr(self.config.text_config, "sliding_window", None)
        if window is not None and getattr(self.config.text_config, "use_sliding_window", True) and length > window:
            raise ValueError(
                f"the language model attends within a sliding window of {window} tokens, but the sequence has "
                f"{length}; the mixed mask does not model the window"
            )


def add_pre_decoder_layers(cache: Cache, config: HaploConfig) -> None:
    """Makes room in a cache for the pre-decoder, behind the language model's layers.

    Raises:
        ValueError: a cache that does not grow; its masks have another length than the mixed mask.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"HaploVL generates with a DynamicCache, not with a {type(cache).__name__}")
    wanted = config.text_config.num_hidden_layers + config.pre_config.num_hidden_layers
    while len(cache.layers) < wanted:
        cache.layers.append(DynamicLayer())


class HaploForConditionalGeneration(HaploPreTrainedModel, GenerationMixin):
    """HaploVL with the language model's head: next-token logits, loss and generation."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: HaploConfig) -> None:
        super().__init__(config)
        self.model = HaploModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: object,
    ) -> HaploCausalLMOutput:
        """Next-token logits and, with labels, the mean cross-entropy of supervised tokens.

        Shapes as in HaploModel.forward; labels [B, L] hold −100 where nothing is supervised and are shifted here,
        once. `logits_to_keep` limits the logits to the last positions (0: all).
        """
        out = self.model(
            input_ids, pixel_values, attention_mask, position_ids, document_ids, past_key_values, bool(use_cache)
        )
        hidden = out.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            shifted = functional.pad(labels[:, 1:], (0, 1), value=-100)
            loss = functional.cross_entropy(logits.float().flatten(0, 1), shifted.flatten())
        return HaploCausalLMOutput(loss, logits, out.past_key_values)

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, attention_mask=None, **kwargs):  # noqa: D102
        # Positions depend on where images stand, so they come from the whole sequence, at every step.
        kwargs["position_ids"] = self.model.position_ids(
            input_ids, attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        )
        first = kwargs.get("is_first_iteration", False)
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        # Pictures of the cached part are in the cache; without a cache they are needed at every step.
        if first or kwargs.get("past_key_values") is None:
            inputs["pixel_values"] = pixel_values
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        # Beams repeat rows; the pictures of a row must be repeated together, not one by one.
        pixels = kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1:
            is_image = input_ids == self.config.image_token_id
            per_row = (is_image.sum(dim=1) // self.config.tokens_per_image).tolist()
            pixels = torch.cat([part for rows in pixels.split(per_row) for part in [rows] * expand_size])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs if pixels is None else {**kwargs, "pixel_values": pixels}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is not None:
            add_pre_decoder_layers(model_kwargs["past_key_values"], self.config)
        return result
