"""The continuous autoencoder of latent diffusion (Rombach et al. 2022): images -> a normal distribution of latents.

Shapes: B batch, C channels, H W image, D latent channels, h = H / factor, w = W / factor.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import Downsample, Upsample, group_norm
from models.ranges import FINITE, POSITIVE, SIZE, check_ranges
from vq.autoencoder import level_blocks, middle_blocks

LOGVAR = (-30.0, 20.0)  # to which log-variances are clamped


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Options of the autoencoder; the defaults are those of Stable Diffusion 1 and 2."""

    in_channels: int = 3
    channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 4, 4)  # width of each level, times `channels`
    res_blocks: int = 2  # per level of the encoder; one more in the decoder
    latent_channels: int = 4
    quant_conv: bool = True  # a 1x1 convolution of the encoder's output, and one of the decoder's input
    scaling_factor: float = 0.18215  # of latents: diffusion sees (z - shift_factor) * scaling_factor
    shift_factor: float = 0.0

    RANGES = {
        **dict.fromkeys(("in_channels", "channels", "res_blocks", "latent_channels"), SIZE),
        **{"channel_mults": "[1, 1024]", "scaling_factor": POSITIVE, "shift_factor": FINITE},
    }

    def __post_init__(self):
        check_ranges(self)
        if not self.channel_mults:
            raise ValueError("got no channel_mults, wanted a number per level")

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.channels * mult for mult in self.channel_mults]

    @property
    def factor(self) -> int:
        """Pixels per side of one latent position."""
        return 2 ** (len(self.channel_mults) - 1)


class Posterior(NamedTuple):
    """A normal distribution of latents, each (B, D, h, w)."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return (self.logvar / 2).exp()

    def kl(self) -> Tensor:
        """Returns the KL divergence from the standard normal distribution in nats, (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class KLEncoder(nn.Module):
    """Encodes images (B, C, H, W) in [-1, 1] to means and log-variances (B, 2 D, h, w)."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = level_blocks(widths[max(level - 1, 0)], width, config.res_blocks, attention=False)
            self.down.append(nn.Sequential(*blocks, *([Downsample(width)] if level < len(widths) - 1 else [])))
        self.middle = nn.Sequential(*middle_blocks(widths[-1]))
        self.norm = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm(self.middle(h))))


class KLDecoder(nn.Module):
    """Decodes latents (B, D, h, w) to images (B, C, H, W), about [-1, 1]."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths = config.widths[::-1]  # from the lowest resolution on
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = nn.Sequential(*middle_blocks(widths[0]))
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            blocks = level_blocks(widths[max(level - 1, 0)], width, config.res_blocks + 1, attention=False)
            self.up.append(nn.Sequential(*blocks, *([Upsample(width)] if level < len(widths) - 1 else [])))
        self.norm = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.middle(self.conv_in(latents))
        for level in self.up:
            h = level(h)
        return self.conv_out(F.silu(self.norm(h)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder, for images of any size from the factor on."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = KLEncoder(config), KLDecoder(config)
        channels = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.quant_conv else nn.Identity()

    def posterior(self, images: Tensor) -> Posterior:
        """Encodes images (B, C, H, W) in [-1, 1] to the distribution of their latents; odd sizes are rounded down."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR))

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (B, D, h, w), as encoded, neither shifted nor scaled, to images (B, C, H, W)."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructs images (B, C, H, W) from the means of their latents."""
        return self.decode(self.posterior(images).mean)


def sample_posterior(posterior: Posterior, noise: Tensor) -> Tensor:
    """Returns latents mean + std * noise (B, D, h, w)."""
    return torch.addcmul(posterior.mean, posterior.std, noise)
