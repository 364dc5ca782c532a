"""The class of an image: labels (B,) int64 in [0, n_classes] -> a vector; label n_classes is the null."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.conditioning import ConditionConfig, ConditionEncoder, Vector

FIELDS = ("label",)  # of a batch, from which it is made


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """Classes: their number is that of the data."""


class LabelEncoder(ConditionEncoder):
    """A learned vector per class, and one for the null."""

    def __init__(self, n_classes: int, width: int):
        super().__init__()
        if n_classes < 1:
            raise ValueError(f"got n_classes {n_classes}, wanted at least 1: else leave the condition out")
        self.n_classes = n_classes
        self.embedding = nn.Embedding(n_classes + 1, width)

    def forward(self, raw: Tensor | None, x: Tensor, drop: Tensor | None = None) -> Vector:
        labels = torch.full(x.shape[:1], self.n_classes, device=x.device) if raw is None else raw
        if labels.shape != x.shape[:1]:
            raise ValueError(f"got labels {tuple(labels.shape)} for {len(x)} images, wanted ({len(x)},)")
        if drop is not None:
            labels = labels.masked_fill(drop, self.n_classes)
        return Vector(self.embedding(labels))


def build(config: Config, width: int, n_classes: int) -> LabelEncoder:
    return LabelEncoder(n_classes, width)
