"""HaploVL as a transformers model: early fusion of image patches and text; and the two designs it is compared with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from haplovl.model.attention import MixedMask, exact_kernels, keep_exact_kernels, rotary_positions
from haplovl.model.cache import fit_cache, next_positions, remember_positions, static_size
from haplovl.model.configuration import HaploConfig
from haplovl.model.decoder import HaploDecoderModel, HaploPreDecoder
from haplovl.model.embedding import HaploImageEmbedding
from haplovl.model.generation import HaploGenerationMixin, length_limits
from haplovl.model.layout import ImageGrid
from haplovl.model.loading import StrictLoading
from haplovl.model.media import Media
from haplovl.model.outputs import HaploCausalLMOutput, HaploModelOutput
from haplovl.model.projections import HaploProjector, HaploTextGate
from haplovl.model.tower import HaploTower


class HaploPreTrainedModel(StrictLoading, PreTrainedModel):
    """Weight initialisation and the features that every HaploVL model has."""

    config_class = HaploConfig
    config: HaploConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["HaploDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Blocks and masks follow from the input ids, which no full graph can hold; torch.compile breaks around them.
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HaploImageEmbedding | HaploTextGate):
            module.start(self.config.pre_config.initializer_range)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        super()._set_gradient_checkpointing(enable, keep_exact_kernels(gradient_checkpointing_func), **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Moves and casts as nn.Module does, but for rotary frequencies: in half precision far positions blur."""
        exact = {
            module: {name: buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")}
            for module in self.modules()
        }
        super()._apply(fn, recurse)
        for module, buffers in exact.items():
            for name, buffer in buffers.items():
                moved = getattr(module, name)
                if moved.dtype != buffer.dtype and not buffer.is_meta:
                    setattr(module, name, buffer.to(moved.device))
        return self


class HaploModel(HaploPreTrainedModel):
    """Embeddings, pre-decoder, connector and the language model without its head.

    Parts that a design does not have are None: `tower` in all but the tower's, `image_embedding` there;
    `text_projection` and `pre_decoder` in all but early fusion, `connector` with raw patches, `text_gate` where text
    takes one path alone.
    """

    def __init__(self, config: HaploConfig) -> None:
        super().__init__(config)
        pre, text = config.pre_config, config.text_config
        # The language model keeps cache layers 0…N−1 of its own, the pre-decoder takes those after them.
        self.language_model = AutoModel.from_config(text)
        self.tower = HaploTower(config.vision_config) if config.fusion == "tower" else None
        self.image_embedding = HaploImageEmbedding(pre) if self.tower is None else None
        self.text_projection = self.text_embedding = self.pre_decoder = self.connector = self.text_gate = None
        if config.fusion == "early":
            if config.text_projection:
                self.text_projection = nn.Linear(text.hidden_size, pre.hidden_size)
            else:
                self.text_embedding = nn.Embedding(text.vocab_size, pre.hidden_size, padding_idx=text.pad_token_id)
            self.pre_decoder = HaploPreDecoder(pre, first_cache_index=text.num_hidden_layers)
            self.connector = nn.Linear(pre.hidden_size, text.hidden_size, bias=config.connector_bias)
            self.text_gate = {"residual": nn.Identity(), "gated": HaploTextGate(text.hidden_size)}.get(config.text_path)
        elif self.tower is not None:
            self.connector = HaploProjector(pre.hidden_size, text.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings() if self.config.text_projection else self.text_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.config.text_projection:
            self.language_model.set_input_embeddings(value)
        else:
            self.text_embedding = value

    def embed(self, input_ids: torch.Tensor, media: Media) -> torch.Tensor:
        """Puts text and image tokens into one sequence: [B, L] → [B, L, width].

        The width is the pre-decoder's, or the language model's where there is none.
        """
        x = self._words(input_ids, media)
        if self.text_projection is not None:
            x = self.text_projection(x.to(self.text_projection.weight.dtype))
        if media.images is not None:
            x = x.masked_scatter(media.is_image[..., None], self._tokens(media.images, media.image_grids).to(x.dtype))
        elif media.videos is None and (self.training or _is_distributed()):
            # Processes that share the weights (ZeRO 3) or their gradients must use all of them in every step.
            x = x + 0.0 * self._blank_tokens(x).sum()
        if media.videos is not None:
            x = x.masked_scatter(media.is_video[..., None], self._video_tokens(media).to(x.dtype))
        return x

    def _words(self, input_ids: torch.Tensor, media: Media) -> torch.Tensor:
        """Embeddings of the words; what stands at the placeholders means nothing."""
        if media.blocks is not None:
            input_ids = input_ids.masked_fill(media.blocks >= 0, 0)
        return self.get_input_embeddings()(input_ids)

    def _tokens(self, pixels: torch.Tensor, grids: Sequence[ImageGrid], newlines: bool = True) -> torch.Tensor:
        if self.tower is not None:
            return self.connector(self.tower(pixels, grids))
        return self.image_embedding(pixels, grids, newlines)

    def _blank_tokens(self, like: torch.Tensor) -> torch.Tensor:
        return self.image_embedding.blank(like) if self.tower is None else self.connector(self.tower.blank(like))

    def _video_tokens(self, media: Media) -> torch.Tensor:
        frames = sum(media.video_frames)
        tokens = self._tokens(media.videos, [media.frame_grid] * frames, self.config.frame_newlines)
        if self.config.frame_newlines or self.image_embedding.newline is None:
            return tokens
        end = self.image_embedding.newline[None]
        per_frame = len(tokens) // frames
        parts = tokens.split([count * per_frame for count in media.video_frames])
        return torch.cat([piece for part in parts for piece in (part, end)])

    def pre_decode(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        image_grids: torch.Tensor | None = None,
        all_hidden_states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Embeddings through the pre-decoder, without the language model: what stage 1 trains. → [B, L, pre width].

        Raises:
            ValueError: the model has no pre-decoder.
        """
        if self.pre_decoder is None:
            raise ValueError(f"a model with fusion '{self.config.fusion}' has no pre-decoder")
        media = Media.of(self.config, input_ids, pixel_values, image_grids)
        increment = self.config.pre_config.rotary_increment
        positions = rotary_positions(media.blocks_or_text(input_ids), increment, document_ids=document_ids)
        mask = MixedMask(*input_ids.shape, input_ids.device, media.blocks, document_ids=document_ids)
        backend = self._pre_backend()
        mask.check(backend)
        x = self.embed(input_ids, media)
        served, options = mask.for_backend(backend, x.dtype)
        with exact_kernels(mask, backend):
            return self.pre_decoder(
                x, positions, served, backend, options=options, all_hidden_states=all_hidden_states
            )  # fmt: skip

    def position_ids(
        self,
        blocks: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotary positions of a whole sequence for pre- and post-decoder: blocks [B, L] → [2, B, L]."""
        increments = (self.config.pre_config.rotary_increment, self.config.post_rotary_increment)
        pre, post = (rotary_positions(blocks, i, attention_mask, document_ids) for i in increments)
        dtype = torch.promote_types(pre.dtype, post.dtype)
        return torch.stack([pre.to(dtype), post.to(dtype)])

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grids: torch.Tensor | Sequence | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_frames: torch.Tensor | Sequence[int] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> HaploModelOutput:
        """Runs the whole transformer.

        Shapes: input_ids [B, L]; pixel_values [N, T, C, H, W] (padded to the most tiles) or [all tiles, C, H, W] in
        the order of the image blocks; image_grids [N, 8], rows of ImageGrid (absent: every picture is one tile);
        pixel_values_videos [V, F, C, H, W], video_frames [V] the real frames of each (absent: all); attention_mask
        [B, past + L], 0 for padding; position_ids [2, B, L] for pre- and post-decoder (computed when absent);
        document_ids [B, L] for packed rows.

        Raises:
            ValueError: placeholders and images do not match, the sequence is longer than context or cache, the
                attention backend cannot serve the mask, or a cache is continued whose positions are not known.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        self._check_cache(past_key_values, document_ids)
        fit_cache(past_key_values, self.config)
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        self._check_length(past + input_ids.shape[1], past_key_values)
        decoding = past > 0 and input_ids.shape[1] == 1 and pixel_values is None and pixel_values_videos is None
        media = (
            Media()
            if decoding
            else Media.of(self.config, input_ids, pixel_values, image_grids, pixel_values_videos, video_frames)
        )
        attention_mask = self._padding(attention_mask, input_ids, past)
        if position_ids is None:
            own = None if attention_mask is None else attention_mask[:, past:]
            position_ids = self.position_ids(media.blocks_or_text(input_ids), own, document_ids)
            if past:
                following = next_positions(past_key_values, past, position_ids, attention_mask)
                position_ids = position_ids + following[..., None]
        mask = MixedMask(
            *input_ids.shape, input_ids.device, media.blocks, attention_mask, document_ids, past,
            keys=static_size(past_key_values),
        )  # fmt: skip
        pre_states: list[torch.Tensor] | None = [] if output_hidden_states else None
        x = self._pre_forward(input_ids, media, position_ids[0], mask, past_key_values, pre_states)
        out = self._post_forward(x, position_ids[1], mask, past_key_values, output_hidden_states)
        if past_key_values is not None:
            remember_positions(past_key_values, position_ids.expand(2, *input_ids.shape))
        return HaploModelOutput(
            out.last_hidden_state, past_key_values, out.hidden_states, tuple(pre_states) if pre_states else None
        )

    def _pre_forward(
        self,
        input_ids: torch.Tensor,
        media: Media,
        positions: torch.Tensor,
        mask: MixedMask,
        cache: Cache | None,
        states: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """What the language model reads: [B, L] → [B, L, its width]."""
        backend = self._pre_backend()
        # Both backends are asked before anything is computed.
        if self.pre_decoder is not None:
            mask.check(backend)
        self._post_mask(mask).check(self.config.text_config._attn_implementation)
        x = self.embed(input_ids, media)
        if self.pre_decoder is None:
            return x
        served, options = mask.for_backend(backend, x.dtype)
        with exact_kernels(mask, backend):
            x = self.connector(self.pre_decoder(x, positions, served, backend, cache, options, states))
        return x if self.config.text_path == "connector" else self._with_words(x, input_ids, media)

    def _with_words(self, x: torch.Tensor, input_ids: torch.Tensor, media: Media) -> torch.Tensor:
        """Text tokens with, or as, the language model's own embeddings; image tokens as they are. [B, L, H]."""
        words = self._words(input_ids, media).to(x.dtype)
        is_media = (media.blocks_or_text(input_ids) >= 0)[..., None]
        # A choice rather than an assignment: every weight takes part, also where a batch is text alone.
        return torch.where(is_media, x, words if self.text_gate is None else words + self.text_gate(x))

    def _pre_backend(self) -> str:
        """The pre-decoder's backend is the model's own; transformers' flash functions read it in `pre_config`."""
        backend = self.config._attn_implementation
        self.config.pre_config._attn_implementation_internal = backend
        return backend

    def _post_mask(self, mask: MixedMask) -> MixedMask:
        return mask.causal() if self.config.post_mask == "causal" else mask

    def _post_forward(
        self, x: torch.Tensor, positions: torch.Tensor, mask: MixedMask, cache: Cache | None, states: bool
    ) -> Any:
        backend = self.config.text_config._attn_implementation
        served, options = self._post_mask(mask).for_backend(backend, x.dtype)
        if served is None and cache is None and not isinstance(self.language_model, HaploDecoderModel):
            # Given no mask at all, transformers would read packed documents out of the positions of an image.
            served = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        with exact_kernels(mask, backend):
            return self.language_model(
                inputs_embeds=x,
                attention_mask=served,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
                output_hidden_states=states,
                **options,
            )

    def _padding(self, attention_mask: torch.Tensor | None, input_ids: torch.Tensor, past: int) -> torch.Tensor | None:
        """The padding mask where there is padding; None says that there is none."""
        if attention_mask is None:
            return None
        wanted = (input_ids.shape[0], past + input_ids.shape[1])
        if tuple(attention_mask.shape) == tuple(input_ids.shape) and past:  # of the new tokens alone
            attention_mask = functional.pad(attention_mask, (past, 0), value=1)
        if tuple(attention_mask.shape) != wanted:
            raise ValueError(f"attention_mask has the shape {list(attention_mask.shape)}, expected {list(wanted)}")
        return None if bool(attention_mask.all()) else attention_mask

    def _check_cache(self, cache: Cache | None, document_ids: torch.Tensor | None) -> None:
        if cache is None:
            return
        if document_ids is not None:
            raise ValueError("packed documents (document_ids) cannot be combined with a key-value cache")
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError("gradient checkpointing cannot be combined with a key-value cache; call model.eval()")

    def _check_length(self, total: int, cache: Cache | None) -> None:
        context, window = length_limits(self.config)
        if context is not None and total > context:
            raise ValueError(
                f"the sequence has {total} tokens, more than the language model's context of {context}; shorten it or "
                "use fewer or smaller images"
            )
        if window is not None and total > window:
            raise ValueError(
                f"the language model attends within a sliding window of {window} tokens, but the sequence has "
                f"{total}; the mixed mask does not model the window"
            )
        room = static_size(cache)
        if 0 < room < total:
            raise ValueError(f"the static cache has room for {room} tokens, but the sequence has {total}")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class HaploForConditionalGeneration(HaploPreTrainedModel, HaploGenerationMixin):
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
        image_grids: torch.Tensor | Sequence | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_frames: torch.Tensor | Sequence[int] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool = True,
    ) -> HaploCausalLMOutput:
        """Next-token logits and, with labels, the mean cross-entropy of supervised tokens.

        Shapes as in HaploModel.forward; labels [B, L] hold −100 where nothing is supervised and are shifted here,
        once. `logits_to_keep` limits the logits to the last positions (0: all) or to the given ones.
        """
        out = self.model(
            input_ids, pixel_values, image_grids, pixel_values_videos, video_frames, attention_mask, position_ids,
            document_ids, past_key_values, bool(use_cache), output_hidden_states,
        )  # fmt: skip
        hidden = out.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            logits = self.lm_head(hidden[:, logits_to_keep])
        else:
            logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            shifted = functional.pad(labels[:, 1:], (0, 1), value=-100)
            loss = functional.cross_entropy(logits.float().flatten(0, 1), shifted.flatten())
        result = HaploCausalLMOutput(loss, logits, out.past_key_values, out.hidden_states, out.pre_hidden_states)
        return result if return_dict else result.to_tuple()
