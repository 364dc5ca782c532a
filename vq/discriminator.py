"""PatchGAN: judges overlapping patches rather than the whole image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from models.blocks import group_norm

NORMS = {"group": group_norm, "batch": nn.BatchNorm2d, "none": None}


class Blur(nn.Module):
    """Halves height and width behind a low-pass filter, each channel for itself (Zhang 2019, "BlurPool").

    The filter is the binomial one, [1, 3, 3, 1] / 8 along both axes. It is a constant, and not saved.
    """

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, (H + 1) // 2, (W + 1) // 2)."""
        channels = x.shape[1]
        padded = F.pad(x, (1, 2, 1, 2))  # zeros, as convolutions have: gradients of mirrored borders are not repeatable
        return F.conv2d(padded, self.kernel.expand(channels, 1, 4, 4), stride=2, groups=channels)


class PatchDiscriminator(nn.Sequential):
    """Images (B, C, H, W) -> logits (B, 1, h, w), positive for real (Isola et al. 2017).

    `norm` is group (the same for any split of the batch), batch (as in the reference) or none. `spectral_norm` divides
    the weight of every convolution by its largest singular value (Miyato et al. 2018), followed by one power iteration
    per forward pass in training. `blur` lets no strided convolution alias: it keeps the resolution, and behind its
    activation `Blur` halves it (Zhang 2019, section 3.2); the grid of logits stays the same. `unit_range` has the first
    convolution see images in [0, 1], as in Unleashing Transformers.
    """

    def __init__(
        self,
        n_channels: int = 3,
        ndf: int = 64,
        layers: int = 3,
        norm: str = "group",
        *,
        spectral_norm: bool = False,
        blur: bool = False,
        unit_range: bool = False,
    ):
        if norm not in NORMS:
            raise ValueError(f"got discriminator norm {norm!r}, wanted one of {', '.join(NORMS)}: pass --disc_norm")
        if layers < 1:
            raise ValueError(f"got {layers} discriminator layers, wanted at least 1: pass --disc_layers N")
        widths = [n_channels, *(ndf * min(2**i, 8) for i in range(layers + 1))]
        blocks: list[nn.Module] = []
        for i, (before, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            halves, normed = i < layers, i > 0 and NORMS[norm] is not None
            stride = 2 if halves and not blur else 1
            blocks.append(nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=not normed))
            if normed:
                blocks.append(NORMS[norm](width))
            blocks.append(nn.LeakyReLU(0.2))
            if halves and blur:
                blocks.append(Blur())
        super().__init__(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.unit_range = unit_range
        if spectral_norm:
            for block in self:
                if isinstance(block, nn.Conv2d):
                    parametrizations.spectral_norm(block)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward((images + 1) / 2 if self.unit_range else images)
