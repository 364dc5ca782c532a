"""The VQGAN autoencoder (Esser et al. 2021): convolutional encoder, quantizer, convolutional decoder."""

import torch
from einops import rearrange
from torch import Tensor, nn

from models.blocks import Downsample, ResBlock, Upsample, group_norm
from models.sdpa import attend
from vq.config import VQGANConfig
from vq.quantizer import make_quantizer
from vq.quantizers import Quantized, StepContext


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, plus a skip: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, heads: int = 1):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels do not split over {heads} heads: choose a divisor of {channels}")
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))  # (B, 3 C, H, W)
        q, k, v = rearrange(qkv, "b (qkv heads d) h w -> qkv b heads (h w) d", qkv=3, heads=self.heads)
        out = attend(q, k, v)  # (B, heads, H W, d)
        return x + self.proj(rearrange(out, "b heads (h w) d -> b (heads d) h w", h=x.shape[2]))


def middle_blocks(channels: int) -> list[nn.Module]:
    """Builds the blocks at the lowest resolution: ResBlock, attention, ResBlock."""
    return [ResBlock(channels, channels), AttentionBlock(channels), ResBlock(channels, channels)]


def level_blocks(in_channels: int, channels: int, count: int, attention: bool) -> list[nn.Module]:
    """Builds the `count` ResBlocks of one level, each followed by self-attention if `attention`."""
    layers: list[nn.Module] = []
    for i in range(count):
        layers.append(ResBlock(in_channels if i == 0 else channels, channels))
        if attention:
            layers.append(AttentionBlock(channels))
    return layers


class Encoder(nn.Sequential):
    """Encodes images (B, C, H, W) in [-1, 1] as vectors (B, D, H / factor, W / factor).

    `height` is that of the training images: levels whose height is in attn_resolutions have attention.
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
    """Decodes vectors (B, D, h, w) to images (B, C, h * factor, w * factor), about [-1, 1]; `height` as in Encoder."""

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
        """Returns the input of the last layer, (B, nf, h * factor, w * factor), in float32."""
        *layers, last = self
        h = vectors
        for layer in layers:
            h = layer(h)
        return h.to(last.weight.dtype)

    def image(self, features: Tensor) -> Tensor:
        """Applies the last layer, in float32 even under autocast: its gradients set the adaptive weight."""
        with torch.autocast(features.device.type, enabled=False):
            return self[-1](features)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.image(self.features(vectors))

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients set the adaptive adversarial weight."""
        return self[-1].weight


class VQGAN(nn.Module):
    """Encoder, quantizer and decoder, for images whose height and width are multiples of the config's factor.

    `size` (H, W) is that of the training images, and `grid` (h, w) that of their codes.
    """

    def __init__(self, config: VQGANConfig, size: tuple[int, int], n_channels: int = 3):
        super().__init__()
        self.config, self.grid = config, config.grid(*size)
        self.encoder = Encoder(config, size[0], n_channels)
        self.quantizer = make_quantizer(config)
        self.decoder = Decoder(config, size[0], n_channels)

    def latents(self, images: Tensor) -> Tensor:
        """Encodes images (B, C, H, W) in [-1, 1] to the quantizer's input, (B, D, H / factor, W / factor).

        ValueError for sizes that are not multiples of the factor.
        """
        self.config.grid(*images.shape[2:])
        return self.encoder((images + 1) / 2 if self.config.unit_range else images)

    def forward(self, images: Tensor, context: StepContext | None = None) -> tuple[Tensor, Quantized]:
        """images (B, C, H, W) in [-1, 1] -> reconstructions of the same shape, and the quantizer's output."""
        quantized = self.quantizer(self.latents(images), context)
        return self.decoder(quantized.vectors), quantized

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encodes images (B, C, H, W) in [-1, 1] as code ids (B, h, w)."""
        return self.quantizer.assign(self.latents(images))

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Decodes code ids (B, h, w) to images (B, C, H, W) in [-1, 1]."""
        return self.decoder(self.quantizer.vectors(ids)).float().clamp(-1, 1)
