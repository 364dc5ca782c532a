"""Whether images, once edited, are still what a classifier takes them for."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train.config import DataConfig
from train.registry import plugin

Classifier = Callable[[Tensor], Tensor]  # uint8 (B, C, H, W) -> logits (B, K)


class Share(NamedTuple):
    """A share in [0, 1], and its standard error (None of one image)."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} %" + ("" if self.error is None else f" +- {100 * self.error:.1f}")


def classifier_of(data: DataConfig) -> Classifier | None:
    """The classifier that the features of a data set are made of, where they have one, on the CPU."""
    reader = plugin("train.datasets", data.reader or data.dataset, "data set")
    if not hasattr(reader, "FEATURES"):
        return None
    load = getattr(plugin("experiments.metrics.features", reader.FEATURES, "features"), "load_classifier", None)
    return None if load is None else load("cpu")


@torch.no_grad()
def answers(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """The likeliest class of each of uint8 images (..., C, H, W): (...) int64."""
    flat = images.flatten(0, -4)
    found = [classifier(part).argmax(1) for part in flat.split(batch_size)]
    return torch.cat(found).view(images.shape[:-3])


def agreement(wanted: Tensor, found: Tensor) -> Share:
    """How often found (N, R) is wanted (N,). Of R results of one image, the N means are what is independent."""
    means = (found == wanted.unsqueeze(1)).double().mean(1)
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
    return Share(means.mean().item(), error)
