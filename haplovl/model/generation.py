"""Generation: positions that follow the images, pictures that follow their rows, and filled caches."""

import math
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.utils import logging

from haplovl.model.attention import number_blocks
from haplovl.model.cache import fit_cache, next_positions
from haplovl.model.configuration import HaploConfig
from haplovl.model.layout import single_tile
from haplovl.model.media import image_sizes, media_masks, number_media, read_grids, video_sizes

MEDIA_INPUTS = ("pixel_values", "image_grids", "pixel_values_videos", "video_frames")
SEQUENCE_FIELDS = ("fusion", "image_token_id", "video_token_id", "image_size", "frame_newlines")
BLOCK_FIELDS = ("patch_size", "num_channels", "class_token", "image_newline")

logger = logging.get_logger(__name__)


class HaploGenerationMixin(GenerationMixin):
    """What `generate` needs to know of a sequence with images."""

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, is_first_iteration=False, **kwargs):  # noqa: D102
        media = {name: kwargs.pop(name, None) for name in MEDIA_INPUTS}
        cached = kwargs.get("past_key_values") is not None
        past = 0 if next_sequence_length is None else input_ids.shape[1] - next_sequence_length
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, is_first_iteration=is_first_iteration, **kwargs
        )
        # Pictures of the cached part are in the cache; without a cache they are needed at every step.
        if not cached:
            inputs |= media
        elif is_first_iteration or next_sequence_length != 1:  # an assistant's prefill does not count as the first
            inputs |= self._uncached_media(input_ids, past, media)
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **_):  # noqa: D102
        return attention_mask  # the model makes its own mask, also for a static cache

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Positions of the whole sequence [2, B, L]; `generate` goes on from the last one by 1 a token."""
        ids, mask = model_kwargs.get("input_ids", inputs_tensor), model_kwargs.get("attention_mask")
        past = _cached_tokens(model_kwargs)
        if mask is not None and mask.shape[1] and not bool(mask[:, -1].all()):
            raise ValueError("the prompts are padded on the right; generation needs padding_side='left'")
        media = {name: model_kwargs.get(name) for name in MEDIA_INPUTS}
        if not past:
            return self.model.position_ids(self._blocks(ids, media), mask)
        only_new = mask is not None and mask.shape[1] > ids.shape[1]
        if not only_new and ids.shape[1] <= past:
            raise ValueError(
                f"the cache holds {past} tokens, but input_ids only {ids.shape[1]}; pass the whole sequence, or the "
                "new tokens with an attention_mask over the whole sequence"
            )
        new = ids if only_new else ids[:, past:]
        fresh = media if only_new else self._uncached_media(ids, past, media)
        own = None if mask is None else mask[:, -new.shape[1] :]
        positions = self.model.position_ids(self._blocks(new, fresh), own)
        positions = positions + next_positions(model_kwargs["past_key_values"], past, positions, mask)[..., None]
        # The cached part is sliced off before use; it only has to be there.
        return torch.nn.functional.pad(positions, (ids.shape[1] - new.shape[1], 0))

    def _blocks(self, input_ids: torch.Tensor, media: dict[str, Any]) -> torch.Tensor:
        """Block numbers of a sequence, see `number_media`. [B, L]."""
        return number_media(*media_masks(self.config, input_ids), *self._sizes(media))

    def _sizes(self, media: dict[str, Any]) -> tuple[list[int], list[list[int]]]:
        """Tokens of every image, and of every block of every video."""
        pixels, grids, videos, frames = (media[name] for name in MEDIA_INPUTS)
        if grids is not None:
            images = image_sizes(self.config, read_grids(grids))
        elif pixels is not None:
            patch = self.config.pre_config.patch_size
            alike = single_tile(pixels.shape[-2] // patch, pixels.shape[-1] // patch)
            images = image_sizes(self.config, [alike] * pixels.shape[0])
        else:
            images = []
        if videos is not None and frames is None:
            frames = [videos.shape[1]] * videos.shape[0]
        return images, video_sizes(self.config, [] if frames is None else [int(n) for n in frames])

    def _uncached_media(self, input_ids: torch.Tensor, past: int, media: dict[str, Any]) -> dict[str, Any]:
        """The pictures that are not in the cache: all those given where only new ones were given."""
        images, videos = self._sizes(media)
        chosen = [
            self._after(mask, past, sizes)
            for mask, sizes in zip(
                media_masks(self.config, input_ids), (images, [sum(video) for video in videos]), strict=True
            )
        ]
        return _select(media, *chosen)

    @staticmethod
    def _after(mask: torch.Tensor, past: int, sizes: list[int]) -> list[int]:
        """Indices of the images (or videos) whose tokens stand at or after the position `past`."""
        if int(mask[:, past:].sum()) == sum(sizes):
            return list(range(len(sizes)))
        numbers = number_blocks(mask, sizes)
        cached, new = (set(part[part >= 0].tolist()) for part in (numbers[:, :past], numbers[:, past:]))
        if cached & new:
            raise ValueError("the cache ends inside an image; images are cached whole")
        return sorted(new)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Beams repeat rows; the pictures of a row are repeated together, not one by one."""
        media = {name: kwargs.pop(name, None) for name in MEDIA_INPUTS}
        if expand_size > 1 and _cached_tokens(kwargs):
            raise ValueError(
                "a filled cache has one row a prompt, so it is continued without beams and num_return_sequences; "
                "repeat the rows of cache (batch_repeat_interleave) and inputs instead"
            )
        if expand_size > 1 and input_ids is not None:
            images, videos = self._sizes(media)
            masks = media_masks(self.config, input_ids)
            sizes = (images, [sum(video) for video in videos])
            media = _select(media, *(_repeated(mask, own, expand_size) for mask, own in zip(masks, sizes, strict=True)))
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | {name: value for name, value in media.items() if value is not None}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        fit_cache(model_kwargs.get("past_key_values"), self.config)
        self._stay_in_context(generation_config, model_kwargs)
        return result

    def _stay_in_context(self, generation_config, model_kwargs):
        """Ends generation where the language model's context, or its sliding window, is full."""
        context = context_of(self.config)
        given, mask = model_kwargs["position_ids"].shape[-1], model_kwargs.get("attention_mask")
        whole = mask.shape[1] if mask is not None else generation_config._mask_length
        # The last token is never fed back, so it needs no place in the context.
        longest = context + 1 - (whole - given)
        if generation_config.max_length > longest:
            logger.warning_once(f"generation ends where the language model's context of {context} tokens is full")
            generation_config.max_length = longest

    def _get_candidate_generator(self, *args, assistant_model=None, **kwargs):
        """Candidates of prompt lookup, or of an assistant that reads the same sequences.

        Raises:
            ValueError: any other assistant, and a cache that is already filled.
        """
        generation_config, model_kwargs = kwargs["generation_config"], kwargs["model_kwargs"]
        if generation_config.assistant_early_exit is not None:
            raise ValueError("assistant_early_exit needs logits between the layers, which HaploVL does not have")
        if _cached_tokens(model_kwargs):
            raise ValueError("assisted decoding begins with an empty cache; pass the whole sequence without the cache")
        if assistant_model is not None:
            self._check_assistant(assistant_model)
            # Its own positions, as its rotary increments may be others.
            kwargs["model_kwargs"] = {name: value for name, value in model_kwargs.items() if name != "position_ids"}
        return super()._get_candidate_generator(*args, assistant_model=assistant_model, **kwargs)

    def _check_assistant(self, assistant):
        if not isinstance(assistant, HaploGenerationMixin):
            raise ValueError(f"the assistant is a {type(assistant).__name__}; it must be a HaploVL model too")
        ours, theirs = self.config, assistant.config
        pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in SEQUENCE_FIELDS]
        pairs += [(name, getattr(ours.pre_config, name), getattr(theirs.pre_config, name)) for name in BLOCK_FIELDS]
        pairs.append(("vocab_size", ours.text_config.vocab_size, theirs.text_config.vocab_size))
        differing = [f"{name} {own} and {other}" for name, own, other in pairs if own != other]
        if differing:
            raise ValueError(f"model and assistant must read the same sequences; they differ in {', '.join(differing)}")

    def init_continuous_batching(self, *_, **__):
        """Paged caches hold text only: transformers hands no pictures on."""
        raise ValueError("HaploVL has no continuous batching; use generate with a batch")


def length_limits(config: HaploConfig) -> tuple[int | None, int | None]:
    """Tokens that the language model's context holds, and its sliding window; None where there is no limit."""
    text = config.text_config
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return getattr(text, "max_position_embeddings", None), window


def context_of(config: HaploConfig) -> float:
    """How many tokens the language model reads. The mask models no sliding window, so that is a limit as well."""
    return min((limit for limit in length_limits(config) if limit is not None), default=math.inf)


def _cached_tokens(model_kwargs: dict[str, Any]) -> int:
    cache = model_kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _repeated(mask: torch.Tensor, sizes: list[int], times: int) -> list[int]:
    """Indices of the images of row 0, `times` over, then of row 1 …"""
    numbers = number_blocks(mask, sizes)
    rows = [sorted(set(row[row >= 0].tolist())) for row in numbers]
    return [index for row in rows for _ in range(times) for index in row]


def _select(media: dict[str, Any], images: list[int], videos: list[int]) -> dict[str, Any]:
    """The chosen pictures, in the chosen order; what is empty then is None."""
    pixels, grids, frames, counts = (media[name] for name in MEDIA_INPUTS)
    if pixels is not None:
        if pixels.ndim == 4 and grids is not None:  # tiles of all images in a row
            parts = pixels.split([grid.tiles for grid in read_grids(grids)])
            pixels = torch.cat([parts[i] for i in images]) if images else None
        else:
            pixels = pixels[images] if images else None
    if grids is not None:
        grids = (grids[images] if isinstance(grids, torch.Tensor) else [grids[i] for i in images]) if images else None
    if frames is not None:
        frames = frames[videos] if videos else None
    if counts is not None:
        counts = (
            (counts[videos] if isinstance(counts, torch.Tensor) else [counts[i] for i in videos]) if videos else None
        )
    return dict(zip(MEDIA_INPUTS, (pixels, grids, frames, counts), strict=True))
