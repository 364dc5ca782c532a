"""Building blocks and the two contracts (EmbedBlock, ConditionBlock) that networks dispatch on.

Shapes: B batch, C channels, H W image or grid, N tokens, D width, E embedding width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.streams import Cells

Resample = Literal["up", "down"]


class EmbedBlock(nn.Module, ABC):
    """A block that also takes the embedding of the time (or noise level)."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), emb (B, E) -> (B, C', H', W')."""


class ConditionBlock(nn.Module, ABC):
    """A block that also takes the encoded `Condition`: its vectors, tokens, maps and regions."""

    @abstractmethod
    def forward(self, x: Tensor, condition) -> Tensor:
        """x (B, C, H, W), condition a `models.conditioning.Condition` -> (B, C', H', W')."""


class RoutedFeedForward(nn.Module, ABC):
    """A feed-forward layer that also takes the cells that its rows are of, and the regions over them."""

    @abstractmethod
    def forward(self, x: Tensor, cells: Cells) -> Tensor:
        """x (B, *shape, D) -> the same shape."""


def group_norm(channels: int, groups: int = 32, eps: float = 1e-6) -> nn.GroupNorm:
    """GroupNorm with the largest number of groups, at most `groups`, that divides `channels`; eps 1e-6 as in VQGAN."""
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, eps=eps)


def zero_module(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Zeroes the weight and bias of a layer and returns it: a residual branch that ends in it starts at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(EmbedBlock):
    """Residual block: norm, SiLU and convolution, twice, plus a skip (Ho et al. 2020; Dhariwal & Nichol 2021).

    The embedding scales and shifts after the second norm. With `emb_dim=None` the block takes no embedding
    (autoencoders); with `scale_shift=False` the embedding is added before the second norm. `resample` doubles ("up") or
    halves ("down") height and width between the first SiLU and its convolution, and on the skip. `zero_init` zeroes the
    last convolution, so that the block starts as its skip. `scale_skip` divides the sum by sqrt(2).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int | None = None,
        dropout: float = 0.0,
        zero_init: bool = False,
        *,
        scale_shift: bool = True,
        resample: Resample | None = None,
        scale_skip: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        if resample not in (None, "up", "down"):
            raise ValueError(f"got resample {resample!r}, wanted up, down or None")
        self.scale_shift, self.resample, self.scale_skip = scale_shift, resample, scale_skip
        self.norm1 = group_norm(in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        emb_channels = 2 * out_channels if scale_shift else out_channels
        self.embed = None if emb_dim is None else nn.Linear(emb_dim, emb_channels)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        if zero_init:
            zero_module(self.conv2)

    def forward(self, x: Tensor, emb: Tensor | None = None, spade: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """x (B, C, H, W), emb (B, E) -> (B, C', H', W'); `spade` follows the second norm, (B, C', H', W') -> as it."""
        if (emb is None) != (self.embed is None):
            raise ValueError(
                f"ResBlock got emb={emb if emb is None else tuple(emb.shape)}, built with embed={self.embed}"
            )
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            x, h = resample_2x(x, self.resample), resample_2x(h, self.resample)
        h = self.modulate(self.conv1(h), emb, spade)  # (B, C', H', W')
        out = self.skip(x) + self.conv2(self.dropout(F.silu(h)))
        return out / math.sqrt(2) if self.scale_skip else out

    def modulate(self, h: Tensor, emb: Tensor | None, spade: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Applies the second norm, `spade` and the embedding to h (B, C', H', W')."""
        params = None if self.embed is None else self.embed(F.silu(emb))[:, :, None, None]  # (B, C' or 2 C', 1, 1)
        h = self.norm2(h if params is None or self.scale_shift else h + params)
        h = h if spade is None else spade(h)
        if params is None or not self.scale_shift:
            return h
        scale, shift = params.chunk(2, dim=1)
        return h * (1 + scale) + shift


class SPADE(nn.Module):
    """h * (1 + gamma(map)) + beta(map), for normalised h (B, C, h, w) (Park et al. 2019; Wang et al. 2022, SDM).

    Two convolutions of the map, averaged over the cells of h, give gamma and beta. The last one starts at zero.
    """

    def __init__(self, channels: int, map_channels: int):
        super().__init__()
        hidden = min(channels, 128)  # 128 in the paper, whose layers have 64 channels and more
        self.conv1 = nn.Conv2d(map_channels, hidden, 3, padding=1)
        self.conv2 = zero_module(nn.Conv2d(hidden, 2 * channels, 3, padding=1))

    def forward(self, h: Tensor, layout: Tensor) -> Tensor:
        """h (B, C, h, w), layout (B, C', H, W), of whole multiples of h and w -> as h."""
        layout = F.avg_pool2d(layout, (layout.shape[2] // h.shape[2], layout.shape[3] // h.shape[3])).to(h.dtype)
        gamma, beta = self.conv2(F.silu(self.conv1(layout))).chunk(2, dim=1)
        return h * (1 + gamma) + beta


def resample_2x(x: Tensor, direction: Resample) -> Tensor:
    """Nearest-neighbour upsampling, (B, C, H, W) -> (B, C, 2H, 2W), or average pooling, -> (B, C, H/2, W/2)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if direction == "up" else F.avg_pool2d(x, 2)


class Downsample(nn.Module):
    """Strided convolution, (B, C, H, W) -> (B, C, H/2, W/2), padded on the right and bottom as in VQGAN.

    `symmetric` pads all four sides instead, as in the UNet of Nichol & Dhariwal 2021.
    """

    def __init__(self, channels: int, symmetric: bool = False):
        super().__init__()
        self.symmetric = symmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def count_parameters(module: nn.Module) -> int:
    """Returns the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def init_normal(module: nn.Module, std: float = 0.02) -> None:
    """Initialises one Linear or Embedding with N(0, std^2) weights and zero biases (GPT-2); ignores other modules."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class FeedForward(nn.Module):
    """Two-layer perceptron with GELU, (..., D) -> (..., D); the hidden layer has width `ratio` D."""

    branches = 1  # outputs of `expand`, each as wide as the hidden layer

    def __init__(self, width: int, ratio: float = 4.0):
        super().__init__()
        hidden = int(ratio * width)
        self.expand = nn.Linear(width, self.branches * hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.activate(self.expand(x)))

    @staticmethod
    def activate(hidden: Tensor) -> Tensor:
        """Returns the input of `contract` for the output of `expand`."""
        return F.gelu(hidden)


class GEGLU(FeedForward):
    """Gated feed-forward, (..., D) -> (..., D): the hidden layer is value * GELU(gate), both linear (Shazeer 2020)."""

    branches = 2

    @staticmethod
    def activate(hidden: Tensor) -> Tensor:
        value, gate = hidden.chunk(2, dim=-1)
        return value * F.gelu(gate)


FEED_FORWARDS = {"gelu": FeedForward, "geglu": GEGLU}
