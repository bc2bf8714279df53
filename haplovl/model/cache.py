"""One transformers cache for both decoders, and for the rotary positions at which it is continued."""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from haplovl.model.configuration import HaploConfig

ROOM, LEAST_ROOM = 256, 16
"""Tokens by which a growing cache makes room, over all rows and in each."""


class GrowingLayer(DynamicLayer):
    """A dynamic layer that grows in place, where DynamicLayer copies all keys and values at every token.

    The keys and values that it returns carry the zero-padded tensors that they are views of as `room`: of one shape
    over many tokens, which spares a CPU's kernels from being made anew for every length.
    """

    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states, value_states, *args, **kwargs):  # noqa: D102
        if torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if not self._fits(stop, key_states):
            step = max(ROOM // len(key_states), LEAST_ROOM)  # short rows of a large batch would be mostly room
            size = (stop // step + 1) * step
            self._room = tuple(x.new_zeros(*x.shape[:2], size, x.shape[-1]) for x in (key_states, value_states))
            if start:
                self._room[0][:, :, :start], self._room[1][:, :, :start] = self.keys, self.values
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = new
        self.keys, self.values = (room[:, :, :stop] for room in self._room)
        self.keys.room, self.values.room = self._room
        return self.keys, self.values

    def _fits(self, stop: int, new: torch.Tensor) -> bool:
        """Whether keys and values still lie in the room (reordering moves them) and `stop` tokens fit in."""
        if self._room is None or stop > self._room[0].shape[2] or self._room[0].shape[:2] != new.shape[:2]:
            return False
        held = zip((self.keys, self.values), self._room, strict=True)
        return not self.keys.numel() or all(kept.data_ptr() == room.data_ptr() for kept, room in held)


def fit_cache(cache: Cache | None, config: HaploConfig) -> None:
    """Makes room in a cache behind the language model's layers: for the pre-decoder, and last for rotary positions.

    Raises:
        ValueError: a kind of cache that cannot hold the pre-decoder's keys and values.
    """
    if cache is None:
        return
    layers = config.text_config.num_hidden_layers + config.pre_config.num_hidden_layers + 1
    growing, offloading = type(cache) is DynamicCache, getattr(cache, "offloading", False)
    if offloading or not (growing or type(cache) is StaticCache):
        kind = f"offloaded {type(cache).__name__}" if offloading else type(cache).__name__
        raise ValueError(f"HaploVL generates with a DynamicCache or a StaticCache that is not offloaded, not {kind}")
    if growing:
        cache.layers = [
            GrowingLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer
            for layer in cache.layers
        ]
    for _ in range(layers - len(cache.layers)):
        cache.layers.append(GrowingLayer() if growing else StaticLayer(max_cache_len=cache.get_max_length()))


def static_size(cache: Cache | None) -> int:
    """Key slots of a cache that does not grow; 0 for one that does."""
    return cache.get_max_length() if isinstance(cache, StaticCache) else 0


def remember_positions(cache: Cache, positions: torch.Tensor) -> None:
    """Keeps the rotary positions of new tokens, [2, B, L], where cropping and reordering of the cache reach them."""
    kept = positions.float().transpose(0, 1)[..., None]  # as keys of two heads of one number
    cache.update(kept, kept, len(cache.layers) - 1)


@torch.compiler.disable  # bookkeeping; and inductor fails on the slice of a static cache (torch 2.13)
def next_positions(
    cache: Cache, length: int, like: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The rotary positions of the token after the cached ones, for pre- and post-decoder: [2, B].

    They cannot be told from the number of tokens, as those of an image may share one position. Padding that
    attention_mask [B, length or more] marks does not count, as it stands where a row of an earlier turn ended early.
    `like` [2, B, L] are the positions that are to go on from there.

    Raises:
        ValueError: something else than this model filled the cache, or it holds other rows.
    """
    known = int(cache.layers[-1].get_seq_length())
    if known != length:
        raise ValueError(
            f"the cache holds {length} tokens, but the positions of {known}: HaploVL can only continue what it filled "
            "itself; pass the whole sequence without the cache"
        )
    kept = cache.layers[-1].keys[:, :, :length, 0].transpose(0, 1)
    if kept.shape[1] != like.shape[1]:
        raise ValueError(f"the cache holds {kept.shape[1]} rows, but {like.shape[1]} are to continue it")
    if attention_mask is not None:
        kept = kept.masked_fill(attention_mask[:, :length] == 0, -1)
    return kept.amax(-1).to(like.device, like.dtype) + 1
