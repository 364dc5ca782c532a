"""Classifier-based metrics (confidence, class balance, class agreement) and copies of training images."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.metrics.neighbours import nearest_distances
from train.config import DataConfig
from train.registry import load_plugin


def class_balance(labels: Tensor, n_classes: int) -> Tensor:
    """Counts each class: labels (N,) in [0, n_classes) -> int64 (n_classes,). ValueError: a label out of range."""
    if len(labels) and not (0 <= labels.min() and labels.max() < n_classes):
        got = f"{labels.min().item()} to {labels.max().item()}"
        raise ValueError(f"labels from {got}: wanted 0 to {n_classes - 1}")
    return torch.bincount(labels.long(), minlength=n_classes)


def confident_fraction(logits: Tensor, confidence: float = 0.9) -> float:
    """Returns the fraction of images whose most likely class has at least this probability; logits (N, K), N >= 1."""
    _check_logits(logits)
    return (logits.double().softmax(1).amax(1) >= confidence).double().mean().item()


def same_class_fraction(before: Tensor, after: Tensor) -> float:
    """Returns the fraction of images with the same most likely class in both sets of logits (N, K), N >= 1."""
    _check_logits(before)
    if before.shape != after.shape:
        raise ValueError(f"logits of shapes {tuple(before.shape)} and {tuple(after.shape)}: wanted the same images")
    return (before.argmax(1) == after.argmax(1)).double().mean().item()


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"logits of shape {tuple(logits.shape)}: wanted (N, K) with at least one image")


Classifier = Callable[[Tensor], Tensor]  # uint8 (B, C, H, W) -> logits (B, K)


class Proportion(NamedTuple):
    """A proportion in [0, 1] with its standard error."""

    value: float
    error: float | None  # None for a single image

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} %" + ("" if self.error is None else f" ± {100 * self.error:.1f}")


def classifier_for(data: DataConfig) -> Classifier | None:
    """Loads the classifier that provides a data set's features, on the CPU; None if it has none."""
    reader = load_plugin("train.datasets", data.reader or data.dataset, "data set")
    if not hasattr(reader, "FEATURES"):
        return None
    load = getattr(load_plugin("experiments.metrics.features", reader.FEATURES, "features"), "load_classifier", None)
    return None if load is None else load("cpu")


@torch.no_grad()
def predict_classes(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Returns the most likely class of each image: uint8 (..., C, H, W) -> int64 (...)."""
    flat = images.flatten(0, -4)
    classes = [classifier(part).argmax(1) for part in flat.split(batch_size)]
    return torch.cat(classes).view(images.shape[:-3])


def class_agreement(labels: Tensor, predictions: Tensor) -> Proportion:
    """Returns how often predictions (N, R) for R results per image equal labels (N,).

    The standard error is over the N per-image means: results of the same image are not independent.
    """
    means = (predictions == labels.unsqueeze(1)).double().mean(1)
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
    return Proportion(means.mean().item(), error)


def nearest_distance_ratio(generated: Tensor, held_out: Tensor, training: Tensor) -> float:
    """Returns the median distance of generated images to their nearest training image, divided by that of held-out real
    images.

    Images (N, C, H, W) share a shape and a scale; the distance is Euclidean over pixels. About 1: as far from the
    training images as new real images are; 0: copies. ValueError: an empty set, different shapes, or held-out images
    that are in the training set (their median distance is 0).
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
        raise ValueError("most held-out images are training images: wanted splits without common images")
    return medians[0] / medians[1]


def copied_fraction(codes: Tensor, train_codes: Tensor) -> float:
    """Returns the fraction of samples whose code grid (N, h, w) equals that of some training image (M, h, w).

    ValueError: the grids differ in shape, or there are no samples.
    """
    if len(codes) == 0 or codes.shape[1:] != train_codes.shape[1:]:
        raise ValueError(
            f"code grids of shapes {tuple(codes.shape)} and {tuple(train_codes.shape)}: wanted (N, h, w) and (M, h, w)"
        )
    grids = torch.cat([codes, train_codes.to(codes)]).flatten(1)  # (N + M, h * w)
    _, ids = grids.unique(dim=0, return_inverse=True)  # equal grids have equal ids
    return torch.isin(ids[: len(codes)], ids[len(codes) :]).double().mean().item()
