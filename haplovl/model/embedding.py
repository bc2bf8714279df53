"""Image embedding: one linear layer over raw patches, learned 2-D positions, class and newline tokens."""

import torch
from torch import nn
from torch.nn import functional

from haplovl.model.configuration import HaploPreDecoderConfig


def resize_position_grid(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Bicubic interpolation of a square position table, as transformers' CLIP and SigLIP do it.

    Shapes: table [side², H] → [rows·columns, H].
    """
    side = int(table.shape[0] ** 0.5)
    if (rows, columns) == (side, side):
        return table
    grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(rows * columns, -1).to(table.dtype)


class HaploImageEmbedding(nn.Module):
    """Turns pictures into the tokens of their image blocks.

    Order inside a block: class token (if any), then the rows of patches, each ended by a newline token (if any).
    """

    def __init__(self, config: HaploPreDecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch = nn.Linear(config.num_channels * config.patch_size**2, width, bias=config.patch_bias)
        self.position = nn.Parameter(torch.zeros(config.patch_grid**2, width))
        self.class_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.class_position = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.newline = nn.Parameter(torch.zeros(width)) if config.image_newline else None

    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cuts pictures into flat patches: [N, C, H, W] → [N, rows, columns, C·p·p], in a convolution's order."""
        size = self.config.patch_size
        count, channels, height, width = pixel_values.shape
        if height % size or width % size:
            raise ValueError(f"pictures of {height}x{width} pixels are not whole patches of {size}x{size}")
        x = pixel_values.reshape(count, channels, height // size, size, width // size, size)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] → [N, tokens per image, pre-decoder width]."""
        patches = self.patches(pixel_values.to(self.patch.weight.dtype))
        count, rows, columns, _ = patches.shape
        position = resize_position_grid(self.position, rows, columns).reshape(rows, columns, -1)
        tokens = self.patch(patches) + position
        if self.newline is not None:
            newline = self.newline.expand(count, rows, 1, -1)
            tokens = torch.cat([tokens, newline], dim=2)
        tokens = tokens.flatten(1, 2)
        if self.class_token is not None:
            first = (self.class_token + self.class_position).expand(count, 1, -1)
            tokens = torch.cat([first, tokens], dim=1)
        return tokens

    def patch_positions(self, rows: int, columns: int) -> torch.Tensor:
        """Indices of the patches inside an image block: class token and newlines stay out. [rows·columns]."""
        start = int(self.class_token is not None)
        stride = columns + int(self.newline is not None)
        grid = torch.arange(rows)[:, None] * stride + torch.arange(columns)[None, :] + start
        return grid.flatten()
