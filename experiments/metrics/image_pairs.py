"""Metrics of image pairs (MSE, PSNR, SSIM, L1), and distances of one image to many, by pixels or by LPIPS."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.data.transforms import to_float
from train.datasets._channels import PICTURES
from train.distributed import DistContext
from vq.perceptual import Perceptual, load_perceptual

RANGE = 255.0  # of levels
LUMA = (65.481, 128.553, 24.966)  # of red, green and blue in [0, 1], above black, which is 16 (ITU-R BT.601)
WINDOW, SIGMA = 11, 1.5  # side and standard deviation of SSIM's Gaussian window, pixels
SSIM_CHUNK = 2**21  # image values that SSIM processes at once: it needs about ten times as many, in float64
SIDE = 64  # pixels of the patches that LPIPS was calibrated on (Zhang et al. 2018, section 3)


def luma(images: Tensor) -> Tensor:
    """Returns Y of BT.601 in studio swing, unrounded, from 16 for black to 235: uint8 (B, 3, H, W) -> float64
    (B, 1, H, W)."""
    weights = torch.tensor(LUMA, dtype=torch.float64).view(3, 1, 1) / RANGE
    return 16 + (images.double() * weights).sum(1, keepdim=True)


def mse(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the mean squared difference of each pair: levels in [0, 255], uint8 or floats (B, C, H, W) twice ->
    (B,)."""
    return (real.float() - fake.float()).square().mean((1, 2, 3))


def psnr(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the PSNR of each pair, 10 log10(255^2 / MSE): as `mse` -> dB (B,); inf if equal."""
    return 10 * (RANGE**2 / mse(real, fake)).log10()


def ssim(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the structural similarity of each pair: as `mse` -> (B,) in [-1, 1], 1 if equal.

    Wang et al. 2004, eq. 13, with data range 255, K1 0.01, K2 0.03, an 11x11 Gaussian window and reflection padding,
    averaged over pixels and channels. In float64: float32 loses small variances in bright areas, TF32 even more.
    ValueError: a side is smaller than the window.
    """
    height, width = real.shape[2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"got images of {height}x{width} for SSIM, wanted at least {WINDOW}x{WINDOW}, its window")
    size = max(1, SSIM_CHUNK // real[0].numel())
    return torch.cat([ssim_chunk(a, b) for a, b in zip(real.split(size), fake.split(size), strict=True)])


def ssim_chunk(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the SSIM of images that are processed at once, (B,)."""
    if real.device.type == "mps":  # has no float64
        real, fake = real.cpu(), fake.cpu()
    a, b = (images.flatten(0, 1)[:, None].double() for images in (real, fake))  # (B C, 1, H, W)
    mean_a, mean_b, aa, bb, ab = local_means(torch.cat([a, b, a * a, b * b, a * b])).chunk(5)
    c1, c2 = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    variances, covariance = aa - mean_a**2 + bb - mean_b**2, ab - mean_a * mean_b
    index = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return index.view(len(real), -1).mean(1)


def local_means(x: Tensor) -> Tensor:
    """Averages x (N, 1, H, W) under SSIM's separable window, with reflection padding."""
    radius = WINDOW // 2
    window = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device).to(x) / SIGMA) ** 2)
    window = window / window.sum()
    padded = F.pad(x, [radius] * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))


def l1(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the mean absolute difference of each pair, scaled to [-1, 1] as in training: uint8 (B, C, H, W) twice ->
    (B,) in [0, 2]."""
    return (to_float(real) - to_float(fake)).abs().mean((1, 2, 3))


class ImageDistance(NamedTuple):
    """A distance between images, for ranking."""

    name: str
    distances: Callable[[Tensor, Tensor], Tensor]  # uint8 (C, H, W), (B, C, H, W) -> float64 (B,); 0 if equal


def pixel_distance() -> ImageDistance:
    """Returns the Euclidean distance over all pixels and channels, of values in [0, 1]."""

    def distances(image: Tensor, others: Tensor) -> Tensor:
        return ((others.double() - image.double()) / 255).square().flatten(1).sum(1).sqrt()

    return ImageDistance("pixels", distances)


def lpips_distance(perceptual: Perceptual, device: torch.device, batch_size: int) -> ImageDistance:
    """Returns LPIPS as a distance, computed in batches. Images with a side below 64 pixels are enlarged."""
    perceptual = perceptual.to(device)

    @torch.no_grad()
    def distances(image: Tensor, others: Tensor) -> Tensor:
        values, query = [], enlarge(to_float(image[None].to(device)))
        for part in others.split(batch_size):
            batch = enlarge(to_float(part.to(device)))
            values.append(perceptual(query.expand_as(batch), batch).cpu().double())
        return torch.cat(values)

    return ImageDistance(f"LPIPS ({perceptual.net})", distances)


def enlarge(images: Tensor) -> Tensor:
    """Enlarges images (B, C, H, W) bilinearly by the smallest integer factor that brings both sides to 64 pixels."""
    factor = -(-SIDE // min(images.shape[2:]))
    return images if factor == 1 else F.interpolate(images, scale_factor=factor, mode="bilinear", align_corners=False)


def choose_distance(
    rerank: str, net: str, weights: str | None, world: DistContext, batch_size: int, n_channels: int = 3
) -> ImageDistance:
    """Returns the distance of --rerank; auto is LPIPS, or pixels, with a message, if a process cannot load its weights.

    ValueError, FileNotFoundError: LPIPS or its weights file was requested and cannot be loaded.
    """
    if rerank == "pixels":
        return pixel_distance()
    if n_channels not in PICTURES:
        reason = f"it takes grey or RGB images, not {n_channels} channels"
        if rerank == "lpips":
            raise ValueError(f"no LPIPS: {reason}; pass --rerank pixels")
        print(f"ranking neighbours by pixels, not by LPIPS: {reason}", flush=True)
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
        raise ValueError(f"no LPIPS: {reason}; pass their file as --perceptual_weights, or --rerank pixels")
    print(f"ranking neighbours by pixels, not by LPIPS: {reason}; pass --perceptual_weights FILE for LPIPS", flush=True)
    return pixel_distance()
