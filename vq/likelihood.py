"""A Gaussian around what the decoder makes of codes: its mean is the reconstruction, a head says its log variance."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import zero_module
from vq.autoencoder import Decoder

MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = (
    -14.0,
    2.0,
)  # log variances: deviations of a ninth of an 8-bit level, and of more than all levels
INITIAL_LOG_VARIANCE = -4.0  # 17 levels: what all begin at


class Reconstruction(NamedTuple):
    """What a decoder makes of codes, and of what it makes it."""

    mean: Tensor  # (B, C, H, W) float32, about [-1, 1], not clamped
    features: Tensor  # (B, nf, H, W) float32, what its last layer is given


def reconstruct(decoder: Decoder, vectors: Tensor) -> Reconstruction:
    """Code vectors (B, D, h, w) -> the decoder's image and its features."""
    features = decoder.features(vectors)
    return Reconstruction(decoder.image(features), features)


class LogVarianceHead(nn.Sequential):
    """Features (B, channels, H, W) -> log variances (B, n_channels, H, W) between LOWEST and HIGHEST.

    A 3x3 and a 1x1 convolution: 147,971 parameters for 128 channels and colour. All begin at FIRST.
    """

    def __init__(self, channels: int, n_channels: int):
        last = zero_module(nn.Conv2d(channels, n_channels, 1))
        nn.init.constant_(last.bias, INITIAL_LOG_VARIANCE)
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(), last)

    def forward(self, features: Tensor) -> Tensor:
        return soft_clamp(super().forward(features))


def soft_clamp(log_variance: Tensor) -> Tensor:
    """Any number to between LOWEST and HIGHEST, as it is well inside, smoothly (Chua et al. 2018, appendix A.1)."""
    below = MAX_LOG_VARIANCE - F.softplus(MAX_LOG_VARIANCE - log_variance)
    return MIN_LOG_VARIANCE + F.softplus(below - MIN_LOG_VARIANCE)


def build_head(decoder: Decoder) -> LogVarianceHead:
    """A new head for the features of this decoder."""
    last = decoder[-1]
    return LogVarianceHead(last.in_channels, last.out_channels)
