"""What leads into the language model besides a linear connector."""

import torch
from torch import nn


class HaploProjector(nn.Module):
    """The connector of a tower: linear, GELU, linear, with biases (LLaVA-1.5, arXiv 2310.03744)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs)
        self.activation = nn.GELU()
        self.linear_2 = nn.Linear(outputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., tower width] → [..., language model's width]."""
        return self.linear_2(self.activation(self.linear_1(x)))


class HaploTextGate(nn.Module):
    """A factor on every channel of what the connector gives for text, 0 at first: [..., H] → [..., H].

    The language model then starts with the words that it knows, and takes in what the pre-decoder makes of them as far
    as it learns to (text_path `gated`; the gates of Flamingo, arXiv 2204.14198, section 3.1, one for each channel).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def start(self, _: float) -> None:
        """Closes the gate, unless its weight was loaded."""
        if not getattr(self.weight, "_is_hf_initialized", False):
            self.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight
