"""Generation: positions that follow the images, pictures that follow their rows, and filled caches."""

from typing import Any

import torch
from transformers import GenerationMixin

from haplovl.model.attention import number_blocks
from haplovl.model.cache import fit_cache, next_positions
from haplovl.model.layout import single_tile
from haplovl.model.media import image_sizes, media_masks, read_grids, video_sizes

MEDIA_INPUTS = ("pixel_values", "image_grids", "pixel_values_videos", "video_frames")


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
        elif is_first_iteration:
            inputs |= self._uncached_media(input_ids, past, media)
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **_):  # noqa: D102
        return attention_mask  # the model makes its own mask, also for a static cache

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Positions of the whole sequence [2, B, L]; `generate` goes on from the last one by 1 a token."""
        ids, mask = model_kwargs.get("input_ids", inputs_tensor), model_kwargs.get("attention_mask")
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if mask is not None and mask.shape[1] and not bool(mask[:, -1].all()):
            raise ValueError("the prompts are padded on the right; generation needs padding_side='left'")
        media = {name: model_kwargs.get(name) for name in MEDIA_INPUTS}
        only_new = past > 0 and (mask.shape[1] > ids.shape[1] if mask is not None else ids.shape[1] <= past)
        if not past:
            return self.model.position_ids(self._blocks(ids, media), mask)
        new = ids if only_new else ids[:, past:]
        fresh = media if only_new else self._uncached_media(ids, past, media)
        own = None if mask is None else mask[:, -new.shape[1] :]
        positions = self.model.position_ids(self._blocks(new, fresh), own)
        positions = positions + next_positions(cache, past)[..., None].to(positions.device)
        # The cached part is sliced off before use; it only has to be there.
        return torch.nn.functional.pad(positions, (ids.shape[1] - new.shape[1], 0))

    def _blocks(self, input_ids: torch.Tensor, media: dict[str, Any]) -> torch.Tensor:
        """Block numbers of a sequence, see `number_blocks`. [B, L]."""
        is_image, is_video = media_masks(self.config, input_ids)
        images, videos = self._sizes(media)
        blocks = number_blocks(is_image, images)
        frames = number_blocks(is_video, [size for video in videos for size in video])
        return torch.where(is_video, frames + len(images), blocks)

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
        return result


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
