"""Whether a model knows its training images by heart: how near to them, and how often on them, its samples lie."""

import torch
from torch import Tensor

from experiments.metrics.neighbours import nearest_distances


def nearest_ratio(generated: Tensor, held_out: Tensor, training: Tensor) -> float:
    """Median distance of generated images to their nearest training image, over the same median of held-out real ones.

    Images (N, C, H, W) of one shape and one scale; the distance is Euclidean over pixels. About 1: as far from the
    training images as new real images are; 0: copies. ValueError: an empty set, other shapes, or held-out images that
    are themselves in the training set (their median distance is 0).
    """
    for name, images in (("generated", generated), ("held-out", held_out), ("training", training)):
        if len(images) == 0 or images.shape[1:] != training.shape[1:]:
            wanted = tuple(training.shape[1:])
            raise ValueError(f"{name} images of shape {tuple(images.shape)}: wanted at least one of shape {wanted}")
    medians = [
        nearest_distances(images.flatten(1), training.flatten(1)).quantile(0.5).item()
        for images in (generated, held_out)
    ]
    if medians[1] == 0:
        raise ValueError("most held-out images are training images: wanted a split without common images")
    return medians[0] / medians[1]


def exact_copies(codes: Tensor, train_codes: Tensor) -> float:
    """The share in [0, 1] of samples whose whole code grid (N, h, w) is that of some training image (M, h, w).

    ValueError: the grids differ in shape, or there are no samples.
    """
    if len(codes) == 0 or codes.shape[1:] != train_codes.shape[1:]:
        raise ValueError(
            f"code grids of shapes {tuple(codes.shape)} and {tuple(train_codes.shape)}: wanted (N, h, w) and (M, h, w)"
        )
    grids = torch.cat([codes, train_codes.to(codes)]).flatten(1)  # (N + M, h * w)
    _, identity = grids.unique(dim=0, return_inverse=True)  # equal grids share a number
    return torch.isin(identity[: len(codes)], identity[len(codes) :]).double().mean().item()
