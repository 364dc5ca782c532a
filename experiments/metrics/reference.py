"""What generated images are measured against, and its file."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from experiments.metrics.frechet import Statistics, read_arrays


class Reference(NamedTuple):
    """Of real images."""

    statistics: Statistics  # of all their features
    features: Tensor | None  # (n, D) float32, those of some of them; None where a file does not tell

    def save(self, path: str | Path) -> None:
        """Writes an .npz file of statistics that also holds `features`, whole or not at all."""
        self.statistics.save(path, features=self.features.float().numpy())

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Reads an .npz file of statistics, with or without features; no code in it is run.

        FileNotFoundError: no such file. ValueError: not such a file, or what it holds are not statistics or features.
        """
        statistics = Statistics.load(path)
        found = read_arrays(path, ("features",)).get("features")
        if found is None:
            return cls(statistics, None)
        if found.ndim != 2 or found.dtype.kind != "f" or found.shape[1] != len(statistics.mean):
            wanted = f"(n, {len(statistics.mean)}), as mu is"
            raise ValueError(f"{path} holds features of shape {found.shape}, {found.dtype}: wanted floats {wanted}")
        features = torch.from_numpy(found).float()
        if not features.isfinite().all():
            raise ValueError(f"{path} holds features that are nan or inf: compute them again")
        return cls(statistics, features)
