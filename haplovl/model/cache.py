"""One transformers cache for both decoders, and the rotary positions at which it is continued."""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from haplovl.model.configuration import HaploConfig

_POSITIONS = "_haplovl_positions"


def fit_cache(cache: Cache | None, config: HaploConfig) -> None:
    """Makes room in a cache for the pre-decoder, behind the language model's layers.

    Raises:
        ValueError: a kind of cache that cannot hold the pre-decoder's keys and values.
    """
    if cache is None:
        return
    text, pre = config.text_config.num_hidden_layers, config.pre_config.num_hidden_layers
    if len(cache.layers) == text + pre:
        return
    if type(cache) is DynamicCache and not cache.offloading:
        cache.layers += [DynamicLayer() for _ in range(text + pre - len(cache.layers))]
    elif type(cache) is StaticCache and not cache.offloading:
        cache.layers += [StaticLayer(max_cache_len=cache.get_max_length()) for _ in range(pre)]
    else:
        kind = "offloaded cache" if cache.offloading else type(cache).__name__
        raise ValueError(f"HaploVL generates with a DynamicCache or a StaticCache, not with an {kind}")


def remember_positions(cache: Cache, length: int, following: torch.Tensor) -> None:
    """Notes at which rotary positions a cache of `length` tokens goes on: following [2, B]."""
    setattr(cache, _POSITIONS, (length, following))


def next_positions(cache: Cache, length: int) -> torch.Tensor:
    """The rotary positions of the token after the cached ones, for pre- and post-decoder: [2, B].

    They cannot be told from the number of tokens, as those of an image may share one position.

    Raises:
        ValueError: the cache was cut or filled elsewhere since.
    """
    known, following = getattr(cache, _POSITIONS, (None, None))
    if known != length:
        raise ValueError(
            f"position_ids are needed to continue a cache of {length} tokens that this model did not leave like that; "
            "pass position_ids, or the whole sequence without the cache"
        )
    return following
