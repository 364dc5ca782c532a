"""Networks conditioned on labels: encoders to build them, and a network that records its inputs."""

import torch
from torch import Tensor, nn

from models.conditioning import Condition, Vector
from models.conditions.label import LabelEncoder


def label_encoders(n_classes: int, width: int) -> dict[str, LabelEncoder]:
    """Condition encoders of a network with that embedding width; {} for 0 classes."""
    return {"label": LabelEncoder(n_classes, width)} if n_classes else {}


class LabelNetwork(nn.Module):
    """A mock network that records the ids and labels of its calls; `n_classes` is the null class.

    The label itself is the condition's vector. Subclasses implement `predict(ids, labels)`.
    """

    def __init__(self, n_classes: int):
        super().__init__()
        self.n_classes, self.calls = n_classes, []

    def encode(self, fields, ids, drop=None) -> Condition:
        labels = fields.get("label", torch.full((len(ids),), self.n_classes))
        labels = labels.masked_fill(drop["label"], self.n_classes) if drop else labels
        return Condition({"label": Vector(labels[:, None].double())})

    def forward(self, ids, condition=None, *, drop=None) -> Tensor:
        condition = condition if isinstance(condition, Condition) else self.encode(condition or {}, ids, drop)
        labels = condition.vector()[:, 0].long()
        self.calls.append((ids.clone(), labels))
        return self.predict(ids, labels)

    def predict(self, ids: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError
