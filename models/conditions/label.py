"""The class of an image: labels (B,) int64 in [0, n_classes] -> a vector; label n_classes is the null."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.conditioning import ConditionEncoder, Vector

FIELD = "label"  # of a batch, from which it is made


@dataclass(frozen=True, kw_only=True)
class Config:
    """Classes."""

    n_classes: int
    """How many there are, the null not counted."""

    def __post_init__(self):
        if self.n_classes < 1:
            raise ValueError(f"got n_classes {self.n_classes}, wanted at least 1: else leave the condition out")


class LabelEncoder(ConditionEncoder):
    """A learned vector per class, and one for the null."""

    def __init__(self, n_classes: int, width: int):
        super().__init__()
        self.n_classes = n_classes
        self.embedding = nn.Embedding(n_classes + 1, width)

    def forward(self, raw: Tensor | None, x: Tensor, drop: Tensor | None = None) -> Vector:
        labels = torch.full(x.shape[:1], self.n_classes, device=x.device) if raw is None else raw
        if labels.shape != x.shape[:1]:
            raise ValueError(f"got labels {tuple(labels.shape)} for {len(x)} images, wanted ({len(x)},)")
        if drop is not None:
            labels = labels.masked_fill(drop, self.n_classes)
        return Vector(self.embedding(labels))


def build(config: Config, width: int) -> LabelEncoder:
    return LabelEncoder(config.n_classes, width)
