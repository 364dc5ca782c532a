"""Class condition: labels (B,) int64 in [0, n_classes] -> a vector; label n_classes is the null."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.conditioning import ConditionConfig, ConditionEncoder, Vector
from models.embeddings import GrowingEmbedding

FIELDS = ("label",)  # batch fields that the encoder reads


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """Class labels; the number of classes is that of the data."""


class LabelEncoder(ConditionEncoder):
    """Looks up a learned vector per class, plus one for the null."""

    def __init__(self, n_classes: int, width: int):
        super().__init__()
        if n_classes < 1:
            raise ValueError(f"got n_classes {n_classes}, wanted at least 1: leave the condition out")
        self.n_classes = n_classes
        self.embedding = GrowingEmbedding(n_classes + 1, width, null_last=True)

    def forward(self, raw: Tensor | None, x: Tensor, drop: Tensor | None = None) -> Vector:
        labels = torch.full(x.shape[:1], self.n_classes, device=x.device) if raw is None else raw
        if labels.shape != x.shape[:1]:
            raise ValueError(f"got labels {tuple(labels.shape)} for {len(x)} images, wanted ({len(x)},)")
        if drop is not None:
            labels = labels.masked_fill(drop, self.n_classes)
        return Vector(self.embedding(labels))


def build(config: Config, width: int, n_classes: int) -> LabelEncoder:
    """Builds the encoder for vectors of `width` and `n_classes` classes."""
    return LabelEncoder(n_classes, width)
