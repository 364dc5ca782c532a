"""DiffAugment: differentiable augmentation of the discriminator's inputs (Zhao et al. 2020)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Augmentation(NamedTuple):
    """One draw of the "color,translation" policy for a batch, applied to real images and reconstructions alike."""

    brightness: Tensor  # (B, 1, 1, 1) in [-.5, .5), added
    saturation: Tensor  # (B, 1, 1, 1) in [0, 2), scales the difference from the grey value of each pixel
    contrast: Tensor  # (B, 1, 1, 1) in [.5, 1.5), scales the difference from the mean of each image
    shift: Tensor  # (B, 2) pixels down and right, at most 1/8 of each side; padded with zeros

    @classmethod
    def draw(cls, images: Tensor, rng) -> "Augmentation":
        """Draws an augmentation for images (B, C, H, W); `rng.uniform(shape)` draws from U[0, 1)."""
        B, _, H, W = images.shape
        u = rng.uniform((B, 5))
        most = [math.floor(side / 8 + 0.5) for side in (H, W)]
        shift = torch.stack([(u[:, 3 + i] * (2 * m + 1)).floor() - m for i, m in enumerate(most)], 1)
        brightness, saturation, contrast = u[:, :3].view(B, 3, 1, 1, 1).unbind(1)
        return cls(brightness - 0.5, 2 * saturation, contrast + 0.5, shift.long())

    def __call__(self, images: Tensor) -> Tensor:
        """Augments images (B, C, H, W) -> the same shape; differentiable."""
        x = images + self.brightness
        grey = x.mean(1, keepdim=True)
        x = (x - grey) * self.saturation + grey
        mean = x.mean((1, 2, 3), keepdim=True)
        return self.translate((x - mean) * self.contrast + mean)

    def translate(self, x: Tensor) -> Tensor:
        """Shifts each image of x (B, C, H, W): out[b, :, i, j] = x[b, :, i - down, j - right], zero outside."""
        B, _, H, W = x.shape
        rows = torch.arange(H, device=x.device) - self.shift[:, :1] + 1  # (B, H), into the padded image
        columns = torch.arange(W, device=x.device) - self.shift[:, 1:] + 1  # (B, W)
        padded = F.pad(x, (1, 1, 1, 1)).movedim(1, -1)  # (B, H + 2, W + 2, C)
        batch = torch.arange(B, device=x.device)[:, None, None]
        return padded[batch, rows.clamp(0, H + 1)[:, :, None], columns.clamp(0, W + 1)[:, None, :]].movedim(-1, 1)
