"""PatchGAN: judges overlapping patches rather than the whole image."""

from torch import Tensor, nn

from models.blocks import group_norm


class PatchDiscriminator(nn.Sequential):
    """Images (B, C, H, W) -> logits (B, 1, h, w), positive for real (Isola et al. 2017).

    `norm` is group (the same for any split of the batch) or batch (as in the reference).
    """

    def __init__(self, n_channels: int = 3, ndf: int = 64, layers: int = 3, norm: str = "group"):
        norms = {"group": group_norm, "batch": nn.BatchNorm2d}
        if norm not in norms:
            raise ValueError(f"got discriminator norm {norm!r}, wanted one of {', '.join(norms)}: pass --disc_norm")
        if layers < 1:
            raise ValueError(f"got {layers} discriminator layers, wanted at least 1: pass --disc_layers N")
        widths = [ndf * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(n_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            stride = 2 if i < layers - 1 else 1
            conv = nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False)
            blocks += [conv, norms[norm](width), nn.LeakyReLU(0.2)]
        super().__init__(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)
