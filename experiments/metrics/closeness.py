"""How close an image is to others, as a person would say it (LPIPS), or pixel by pixel."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.distributed import World
from train.transforms import to_float
from vq.perceptual import Perceptual, load_perceptual

SIDE = 64  # pixels of the patches that LPIPS was fitted to (Zhang et al. 2018, section 3)


class Closeness(NamedTuple):
    """A distance of images."""

    name: str
    distances: Callable[[Tensor, Tensor], Tensor]  # uint8 (C, H, W), (B, C, H, W) -> float64 (B,); 0 of equal ones


def pixels() -> Closeness:
    """The Euclidean distance over all pixels and channels, of values in [0, 1]."""

    def distances(image: Tensor, others: Tensor) -> Tensor:
        return ((others.double() - image.double()) / 255).square().flatten(1).sum(1).sqrt()

    return Closeness("pixels", distances)


def learned(perceptual: Perceptual, device: torch.device, batch_size: int) -> Closeness:
    """LPIPS, so many images at once. Images with a side below 64 pixels are `enlarged`."""
    perceptual = perceptual.to(device)

    @torch.no_grad()
    def distances(image: Tensor, others: Tensor) -> Tensor:
        found, one = [], enlarged(to_float(image[None].to(device)))
        for part in others.split(batch_size):
            each = enlarged(to_float(part.to(device)))
            found.append(perceptual(one.expand_as(each), each).cpu().double())
        return torch.cat(found)

    return Closeness(f"LPIPS ({perceptual.net})", distances)


def enlarged(images: Tensor) -> Tensor:
    """Images (B, C, H, W), bilinearly enlarged by the smallest whole number that brings both sides to 64 pixels."""
    factor = -(-SIDE // min(images.shape[2:]))
    return images if factor == 1 else F.interpolate(images, scale_factor=factor, mode="bilinear", align_corners=False)


def choose(rerank: str, net: str, weights: str | None, world: World, batch_size: int) -> Closeness:
    """What --rerank names; auto is LPIPS, or pixels with one printed sentence where its weights are not to be had in
    one of the processes. ValueError, FileNotFoundError: LPIPS or its file was asked for, and is not there."""
    if rerank == "pixels":
        return pixels()
    perceptual, reason = None, None
    try:
        _, perceptual = load_perceptual(net, weights)
    except ValueError as error:
        if weights is not None:
            raise
        reason = f"the {net} weights could not be loaded ({error.__cause__})"
    if not world.any(reason is not None)[0]:
        return learned(perceptual, world.device, batch_size)
    reason = reason or f"another process could not load the {net} weights"
    if rerank == "lpips":
        raise ValueError(f"no LPIPS: {reason}; pass their file with --perceptual_weights, or --rerank pixels")
    print(f"Neighbours are ranked by pixels, not by LPIPS: {reason}; --perceptual_weights FILE names them", flush=True)
    return pixels()
