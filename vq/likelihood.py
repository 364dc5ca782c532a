"""Gaussian likelihood of images under a decoder: the reconstruction is the mean, a head predicts the log variance."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import zero_module
from vq.autoencoder import Decoder

# standard deviations of 1/9 of an 8-bit level, and of more than the whole range
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -14.0, 2.0
INITIAL_LOG_VARIANCE = -4.0  # a standard deviation of 17 levels


class Reconstruction(NamedTuple):
    """A decoded image and the features it was computed from."""

    mean: Tensor  # (B, C, H, W) float32, about [-1, 1], not clamped
    features: Tensor  # (B, nf, H, W) float32, input of the last layer


def reconstruct(decoder: Decoder, vectors: Tensor) -> Reconstruction:
    """Decodes code vectors (B, D, h, w); returns the image and its features."""
    features = decoder.features(vectors)
    return Reconstruction(decoder.image(features), features)


class LogVarianceHead(nn.Sequential):
    """Maps features (B, channels, H, W) to log variances (B, n_channels, H, W) in [MIN_, MAX_LOG_VARIANCE].

    A 3x3 and a 1x1 convolution: 147,971 parameters for 128 channels and RGB. The output starts at INITIAL_LOG_VARIANCE.
    """

    def __init__(self, channels: int, n_channels: int):
        last = zero_module(nn.Conv2d(channels, n_channels, 1))
        nn.init.constant_(last.bias, INITIAL_LOG_VARIANCE)
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU(), last)

    def forward(self, features: Tensor) -> Tensor:
        return soft_clamp(super().forward(features))


def soft_clamp(log_variance: Tensor) -> Tensor:
    """Clamps smoothly to [MIN_, MAX_LOG_VARIANCE], elementwise; near the identity inside (Chua et al. 2018, A.1)."""
    below = MAX_LOG_VARIANCE - F.softplus(MAX_LOG_VARIANCE - log_variance)
    return MIN_LOG_VARIANCE + F.softplus(below - MIN_LOG_VARIANCE)


def build_head(decoder: Decoder) -> LogVarianceHead:
    """Builds a head for the features of a decoder."""
    last = decoder[-1]
    return LogVarianceHead(last.in_channels, last.out_channels)
