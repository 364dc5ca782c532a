"""Features without a network: the downsampled image itself."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

METRIC = "FD(pixels)"
VERSION = 1
SIDE = 16
ANY_CHANNELS = True


def build(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Returns the feature extractor: uint8 (B, C, H, W), resized to 16 x 16 with antialiasing -> float32 (B, C * 256)
    in [0, 1]."""

    def features(images: Tensor) -> Tensor:
        images = images.to(device).float() / 255
        return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True).flatten(1)

    return features
