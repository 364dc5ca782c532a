"""What a transformer block does to each token by itself: (B, ..., D) -> (B, ..., D)."""

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Linear, GELU, linear; the hidden layer is `ratio` times as wide."""

    def __init__(self, width: int, ratio: float = 4.0):
        super().__init__()
        hidden = int(ratio * width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x)))


class GEGLU(nn.Module):
    """The hidden layer is a product, value * GELU(gate), both linear in x (Shazeer 2020)."""

    def __init__(self, width: int, ratio: float = 4.0):
        super().__init__()
        hidden = int(ratio * width)
        self.expand = nn.Linear(width, 2 * hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=-1)
        return self.contract(value * F.gelu(gate))


FEED_FORWARDS = {"gelu": FeedForward, "geglu": GEGLU}
