"""The PatchGAN discriminator, which classifies overlapping patches rather than the whole image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from models.blocks import group_norm

NORMS = {"group": group_norm, "batch": nn.BatchNorm2d, "none": None}


class Blur(nn.Module):
    """Halves height and width after a low-pass filter on each channel (Zhang 2019, "BlurPool").

    The filter is binomial, [1, 3, 3, 1] / 8 along both axes; it is constant and not saved.
    """

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, (H + 1) // 2, (W + 1) // 2)."""
        channels = x.shape[1]
        padded = F.pad(x, (1, 2, 1, 2))  # zeros: the backward of reflection padding is not deterministic
        return F.conv2d(padded, self.kernel.expand(channels, 1, 4, 4), stride=2, groups=channels)


class PatchDiscriminator(nn.Sequential):
    """Maps images (B, C, H, W) in [-1, 1] to logits (B, 1, h, w), positive for real (Isola et al. 2017).

    `norm` is group (independent of how the batch is split), batch (as in the original) or none. `spectral_norm` divides
    the weight of every convolution by its largest singular value, tracked by one power iteration per forward pass in
    training (Miyato et al. 2018). `blur` replaces each strided convolution by a dense one, its activation and `Blur`
    (Zhang 2019, section 3.2); the grid of logits does not change. `unit_range` maps images to [0, 1] first, as in
    Unleashing Transformers.
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
            halves, has_norm = i < layers, i > 0 and NORMS[norm] is not None
            stride = 2 if halves and not blur else 1
            blocks.append(nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=not has_norm))
            if has_norm:
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
