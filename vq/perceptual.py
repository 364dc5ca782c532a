"""LPIPS (Zhang et al. 2018) through the `lpips` library, frozen, on images in [-1, 1]."""

import urllib.error
import warnings

from torch import Tensor, nn


class Perceptual(nn.Module):
    """Learned perceptual distance of images (B, C, H, W) in [-1, 1] (LPIPS's own range), C 1 or 3 -> (B,).

    `net` is vgg, alex or squeeze; its ImageNet weights come from torchvision's cache or download. Not `trained`, its
    weights are random: as much work, and no distance.
    """

    def __init__(self, net: str, trained: bool = True):
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ValueError(
                "the perceptual loss needs lpips: `pip install lpips`, or pass --perceptual_net none"
            ) from error
        random = {} if trained else {"pretrained": False, "pnet_rand": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision by its old `pretrained` argument
            self.distance = lpips.LPIPS(net=net, verbose=False, **random).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Perceptual":
        return super().train(False)  # frozen: its dropout must never wake up

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images, others = images.expand(-1, 3, -1, -1), others.expand(-1, 3, -1, -1)
        return self.distance(images, others).flatten()


def load_perceptual(net: str) -> tuple[str, Perceptual | None]:
    """(name, module) for `--perceptual_net`; auto is vgg, or none with one warning where its weights cannot be had."""
    if net == "none":
        return "none", None
    try:
        name = "vgg" if net == "auto" else net
        return name, Perceptual(name)
    except (urllib.error.URLError, TimeoutError) as error:
        if net != "auto":
            raise ValueError(
                f"the {net} weights of the perceptual loss could not be downloaded ({error}): put them into "
                "torch's hub cache, or pass --perceptual_net none"
            ) from error
        warnings.warn(
            f"training without the perceptual loss: its weights could not be downloaded ({error})", stacklevel=2
        )
        return "none", None
