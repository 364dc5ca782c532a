"""What a classifier's answers say of generated images: how sure, how balanced, how well kept."""

import torch
from torch import Tensor


def class_balance(labels: Tensor, n_classes: int) -> Tensor:
    """How often each class occurs: labels (N,) in [0, n_classes) -> counts (n_classes,) int64. ValueError: others."""
    if len(labels) and not (0 <= labels.min() and labels.max() < n_classes):
        got = f"{labels.min().item()} to {labels.max().item()}"
        raise ValueError(f"labels from {got}: wanted 0 to {n_classes - 1}")
    return torch.bincount(labels.long(), minlength=n_classes)


def share_sure(logits: Tensor, confidence: float = 0.9) -> float:
    """The share in [0, 1] of images whose most likely class has at least this probability; logits (N, K), N >= 1."""
    _check_some(logits)
    return (logits.double().softmax(1).amax(1) >= confidence).double().mean().item()


def share_kept(before: Tensor, after: Tensor) -> float:
    """The share in [0, 1] of images with the same most likely class in both sets of logits (N, K), N >= 1."""
    _check_some(before)
    if before.shape != after.shape:
        raise ValueError(f"logits of shapes {tuple(before.shape)} and {tuple(after.shape)}: wanted the same images")
    return (before.argmax(1) == after.argmax(1)).double().mean().item()


def _check_some(logits: Tensor) -> None:
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"logits of shape {tuple(logits.shape)}: wanted (N, K) with at least one image")
