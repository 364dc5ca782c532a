"""Tiny autoencoders of the latents of larger ones (Boer Bohan 2023, TAESD; TAEF2 for those of FLUX.2).

Convolutions and ReLU alone, 64 channels throughout, factor 8. Layers are numbered as in the public files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.ranges import SIZE, check_ranges

BLOCKS = 3  # residual blocks per level
GROUPS = 4  # of the norm in blocks with `global_norm`


@dataclass(frozen=True, kw_only=True)
class TinyAutoencoderConfig:
    """Options of a tiny autoencoder; the defaults are those of TAESD."""

    in_channels: int = 3
    channels: int = 64
    latent_channels: int = 4  # TAEF2: 32
    middle_norm: bool = False  # blocks at the lowest resolution see the statistics of the whole image (TAEF2)

    RANGES = dict.fromkeys(("in_channels", "channels", "latent_channels"), SIZE)
    factor = 8  # pixels per side of one latent position

    def __post_init__(self):
        check_ranges(self)


class TinyBlock(nn.Module):
    """ReLU(convolutions(x) + x), (B, C, h, w) -> as it, with `norm` after x + norm branch(x)."""

    def __init__(self, channels: int, norm: bool = False):
        super().__init__()
        first, second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.pool = None
        if norm:
            wide = 4 * channels
            expand, contract = (nn.Conv2d(*sizes, 1, bias=False) for sizes in ((channels, wide), (wide, channels)))
            self.pool = nn.Sequential(expand, nn.GroupNorm(GROUPS, wide), nn.ReLU(), contract)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return (self.conv(x) + x).relu()


class SoftClamp(nn.Module):
    """3 tanh(x / 3): bounds latents."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class TinyAutoencoder(nn.Module):
    """Images (B, C, H, W) in [-1, 1] <-> latents (B, D, H / 8, W / 8); sizes are multiples of 8."""

    def __init__(self, config: TinyAutoencoderConfig):
        super().__init__()
        self.config = config
        width, norm = config.channels, config.middle_norm

        def blocks(norm: bool = False) -> list[nn.Module]:
            return [TinyBlock(width, norm) for _ in range(BLOCKS)]

        def resample(stride: int) -> nn.Module:
            return nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)

        first = nn.Conv2d(config.in_channels, width, 3, padding=1)
        levels = [[resample(2), *blocks(norm and level == 2)] for level in range(3)]
        last = nn.Conv2d(width, config.latent_channels, 3, padding=1)
        self.encoder = nn.Sequential(first, TinyBlock(width), *sum(levels, []), last)
        first = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        levels = [[*blocks(norm and level == 0), nn.Upsample(scale_factor=2), resample(1)] for level in range(3)]
        last = nn.Conv2d(width, config.in_channels, 3, padding=1)
        self.decoder = nn.Sequential(SoftClamp(), first, nn.ReLU(), *sum(levels, []), TinyBlock(width), last)

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images (B, C, H, W) in [-1, 1] to latents (B, D, h, w), about of unit variance."""
        return self.encoder((images + 1) / 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (B, D, h, w) to images (B, C, H, W) in [-1, 1]."""
        return 2 * self.decoder(latents).clamp(0, 1) - 1

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))
