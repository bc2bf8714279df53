"""The vision tower of the compositional design (LLaVA-1.5), over pictures alone."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from haplovl.model.embedding import merge_pictures
from haplovl.model.layout import ImageGrid, single_tile

BACKENDS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Those that serve attention both ways without a mask; with any other the tower uses sdpa."""


class HaploTower(nn.Module):
    """A CLIP or SigLIP vision transformer in transformers' own class, up to the layer whose output is used.

    It has nothing that this output does not need: no later layers, no last LayerNorm, no pooling.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = AutoModel.from_config(config)
        self.vision_model.post_layernorm = nn.Identity()

    def forward(self, pixel_values: torch.Tensor, grids: Sequence[ImageGrid]) -> torch.Tensor:
        """The patches of all pictures, one after the other, without class tokens.

        Shapes: pixel_values [T, C, H, W], the tiles of the first picture, of the second …; one grid per picture →
        [patches, tower width].
        """
        own = self.vision_model.config
        if own._attn_implementation not in BACKENDS:
            own._attn_implementation_internal = "sdpa"
        states = self.vision_model(pixel_values).last_hidden_state
        rows, columns = (side // own.patch_size for side in pixel_values.shape[-2:])
        tiles = states[:, -rows * columns :].unflatten(1, (rows, columns))  # the class token, if any, comes first
        return torch.cat([picture.flatten(0, 2) for picture in merge_pictures(tiles, grids)])

    def blank(self, like: torch.Tensor) -> torch.Tensor:
        """The patches of a blank tile, on the device of `like`: they let a batch of text alone use every weight."""
        own = self.config
        tile = like.new_zeros(1, own.num_channels, own.image_size, own.image_size)
        side = own.image_size // own.patch_size
        return self(tile, [single_tile(side, side)])
