"""The VQGAN autoencoder (Esser et al. 2021): convolutional encoder, quantizer, convolutional decoder."""

import torch
from torch import Tensor, nn

from models.blocks import Downsample, ResBlock, Upsample, group_norm
from models.sdpa import attend
from vq.config import VQGANConfig
from vq.quantizer import make_quantizer
from vq.quantizers import Quantized, StepContext


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, beside a skip: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, heads: int = 1):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels do not split over {heads} heads: choose a divisor of {channels}")
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2)
        q, k, v = qkv.unbind(1)  # (B, heads, HW, C/heads) each
        out = attend(q, k, v)
        return x + self.proj(out.transpose(-1, -2).reshape(B, C, H, W))


def middle_blocks(channels: int) -> list[nn.Module]:
    return [ResBlock(channels, channels), AttentionBlock(channels), ResBlock(channels, channels)]


def level_blocks(in_channels: int, channels: int, count: int, attention: bool) -> list[nn.Module]:
    """`count` ResBlocks at one resolution, each followed by attention where `attention`."""
    layers: list[nn.Module] = []
    for i in range(count):
        layers.append(ResBlock(in_channels if i == 0 else channels, channels))
        if attention:
            layers.append(AttentionBlock(channels))
    return layers


class Encoder(nn.Sequential):
    """Images (B, C, H, W) in [-1, 1] -> vectors (B, E, H / factor, W / factor).

    `height` is that of the images to train on: attention stands where a level's height is among attn_resolutions.
    """

    def __init__(self, config: VQGANConfig, height: int, n_channels: int):
        widths = [config.nf * m for m in config.ch_mult]
        layers: list[nn.Module] = [nn.Conv2d(n_channels, config.nf, 3, padding=1)]
        for i, (before, width) in enumerate(zip([config.nf, *widths[:-1]], widths, strict=True)):
            layers += level_blocks(before, width, config.res_blocks, height >> i in config.attn_resolutions)
            if i < len(widths) - 1:
                layers.append(Downsample(width))
        layers += middle_blocks(widths[-1])
        layers += [group_norm(widths[-1]), nn.Conv2d(widths[-1], config.code_dim, 3, padding=1)]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """Code vectors (B, E, h, w) -> images (B, C, h * factor, w * factor), about [-1, 1]; `height` as in the encoder."""

    def __init__(self, config: VQGANConfig, height: int, n_channels: int):
        widths = [config.nf * m for m in config.ch_mult]
        layers: list[nn.Module] = [nn.Conv2d(config.code_dim, widths[-1], 3, padding=1), *middle_blocks(widths[-1])]
        for i in reversed(range(len(widths))):
            before = widths[min(i + 1, len(widths) - 1)]
            layers += level_blocks(before, widths[i], config.res_blocks, height >> i in config.attn_resolutions)
            if i > 0:
                layers.append(Upsample(widths[i]))
        layers += [group_norm(widths[0]), nn.Conv2d(widths[0], n_channels, 3, padding=1)]
        super().__init__(*layers)

    def features(self, vectors: Tensor) -> Tensor:
        """What the last layer is given (B, nf, h * factor, w * factor), in float32."""
        *layers, last = self
        h = vectors
        for layer in layers:
            h = layer(h)
        return h.to(last.weight.dtype)

    def image(self, features: Tensor) -> Tensor:
        """The last layer, in float32 whatever autocast says: its gradients weigh the losses."""
        with torch.autocast(features.device.type, enabled=False):
            return self[-1](features)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.image(self.features(vectors))

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that the adaptive adversarial weight compares gradients on."""
        return self[-1].weight


class VQGAN(nn.Module):
    """Encoder, quantizer and decoder together, for images of any multiple of the config's factor.

    `size` (H, W) is that of the images to train on, whose codes are a `grid`.
    """

    def __init__(self, config: VQGANConfig, size: tuple[int, int], n_channels: int = 3):
        super().__init__()
        self.config, self.grid = config, config.grid(*size)
        self.encoder = Encoder(config, size[0], n_channels)
        self.quantizer = make_quantizer(config)
        self.decoder = Decoder(config, size[0], n_channels)

    def latents(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) in [-1, 1] -> what the quantizer is given (B, D, H / factor, W / factor).

        ValueError for sizes that are no multiples of the factor.
        """
        self.config.grid(*images.shape[2:])
        return self.encoder((images + 1) / 2 if self.config.unit_range else images)

    def forward(self, images: Tensor, context: StepContext | None = None) -> tuple[Tensor, Quantized]:
        """images (B, C, H, W) in [-1, 1] -> reconstructions of the same shape, Codes."""
        codes = self.quantizer(self.latents(images), context)
        return self.decoder(codes.vectors), codes

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) in [-1, 1] -> ids (B, h, w)."""
        return self.quantizer.assign(self.latents(images))

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """ids (B, h, w) -> images (B, C, H, W) in [-1, 1]."""
        return self.decoder(self.quantizer.vectors(ids)).float().clamp(-1, 1)
