"""How close two images are: PSNR, SSIM, L1; and how close one is to many, pixel by pixel or by LPIPS."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.data.transforms import to_float
from train.distributed import DistContext
from vq.perceptual import Perceptual, load_perceptual

RANGE = 255.0  # of the uint8 images that are compared
WINDOW, SIGMA = 11, 1.5  # side and deviation of SSIM's Gaussian window, pixels
SSIM_CHUNK = 2**21  # values of images that SSIM takes at once: it keeps some ten times as many, in float64
SIDE = 64  # pixels of the patches that LPIPS was fitted to (Zhang et al. 2018, section 3)


def psnr(real: Tensor, fake: Tensor) -> Tensor:
    """uint8 (B, C, H, W) twice -> (B,) dB: 10 log10(255^2 / mean squared error) of each image; inf of equal ones."""
    return 10 * (RANGE**2 / (real.float() - fake.float()).square().mean((1, 2, 3))).log10()


def ssim(real: Tensor, fake: Tensor) -> Tensor:
    """uint8 (B, C, H, W) twice -> (B,) in [-1, 1]: structural similarity, 1 of equal images.

    Wang et al. 2004, eq. 13, with data range 255, K1 0.01, K2 0.03 and a Gaussian window of 11x11; images are reflected
    at the border, and the mean is over pixels and channels. In float64: float32 loses the small variances of bright
    areas, TF32 all but large ones. ValueError where a side is smaller than the window.
    """
    height, width = real.shape[2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"got images of {height}x{width} for SSIM, wanted at least {WINDOW}x{WINDOW}: its window")
    size = max(1, SSIM_CHUNK // real[0].numel())
    return torch.cat([ssim_chunk(a, b) for a, b in zip(real.split(size), fake.split(size), strict=True)])


def ssim_chunk(real: Tensor, fake: Tensor) -> Tensor:
    """SSIM of images that are taken at once."""
    if real.device.type == "mps":  # has no float64
        real, fake = real.cpu(), fake.cpu()
    a, b = (images.flatten(0, 1)[:, None].double() for images in (real, fake))  # (B C, 1, H, W)
    mean_a, mean_b, aa, bb, ab = local_means(torch.cat([a, b, a * a, b * b, a * b])).chunk(5)
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    variances, covariance = aa - mean_a**2 + bb - mean_b**2, ab - mean_a * mean_b
    index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return index.view(len(real), -1).mean(1)


def local_means(x: Tensor) -> Tensor:
    """(N, 1, H, W) -> the same shape: means under SSIM's window, one axis after the other."""
    radius = WINDOW // 2
    window = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device).to(x) / SIGMA) ** 2)
    window = window / window.sum()
    padded = F.pad(x, [radius] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))


def l1(real: Tensor, fake: Tensor) -> Tensor:
    """uint8 (B, C, H, W) twice -> (B,) in [0, 2]: mean absolute difference of images in [-1, 1], as in training."""
    return (to_float(real) - to_float(fake)).abs().mean((1, 2, 3))


class ImageDistance(NamedTuple):
    """A distance of images."""

    name: str
    distances: Callable[[Tensor, Tensor], Tensor]  # uint8 (C, H, W), (B, C, H, W) -> float64 (B,); 0 of equal ones


def pixel_distance() -> ImageDistance:
    """The Euclidean distance over all pixels and channels, of values in [0, 1]."""

    def distances(image: Tensor, others: Tensor) -> Tensor:
        return ((others.double() - image.double()) / 255).square().flatten(1).sum(1).sqrt()

    return ImageDistance("pixels", distances)


def lpips_distance(perceptual: Perceptual, device: torch.device, batch_size: int) -> ImageDistance:
    """LPIPS, so many images at once. Images with a side below 64 pixels are `enlarge`."""
    perceptual = perceptual.to(device)

    @torch.no_grad()
    def distances(image: Tensor, others: Tensor) -> Tensor:
        found, one = [], enlarge(to_float(image[None].to(device)))
        for part in others.split(batch_size):
            each = enlarge(to_float(part.to(device)))
            found.append(perceptual(one.expand_as(each), each).cpu().double())
        return torch.cat(found)

    return ImageDistance(f"LPIPS ({perceptual.net})", distances)


def enlarge(images: Tensor) -> Tensor:
    """Images (B, C, H, W), bilinearly enlarged by the smallest whole number that brings both sides to 64 pixels."""
    factor = -(-SIDE // min(images.shape[2:]))
    return images if factor == 1 else F.interpolate(images, scale_factor=factor, mode="bilinear", align_corners=False)


def choose_distance(rerank: str, net: str, weights: str | None, world: DistContext, batch_size: int) -> ImageDistance:
    """What --rerank names; auto is LPIPS, or pixels with one printed sentence where its weights are not to be had in
    one of the processes. ValueError, FileNotFoundError: LPIPS or its file was asked for, and is not there."""
    if rerank == "pixels":
        return pixel_distance()
    perceptual, reason = None, None
    try:
        _, perceptual = load_perceptual(net, weights)
    except ValueError as error:
        if weights is not None:
            raise
        reason = f"the {net} weights could not be loaded ({error.__cause__})"
    if not world.any(reason is not None)[0]:
        return lpips_distance(perceptual, world.device, batch_size)
    reason = reason or f"another process could not load the {net} weights"
    if rerank == "lpips":
        raise ValueError(f"no LPIPS: {reason}; pass their file with --perceptual_weights, or --rerank pixels")
    print(f"Neighbours are ranked by pixels, not by LPIPS: {reason}; --perceptual_weights FILE names them", flush=True)
    return pixel_distance()
