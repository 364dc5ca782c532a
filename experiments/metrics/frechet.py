"""Fréchet distance between two sets of features, from streamed means and covariances; their files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.files import atomic_write, read_arrays

WANTED = "wanted an .npz file with the arrays mu and sigma (and n, if known)"


class Statistics:
    """Count, mean (D,) and covariance (D, D) of features that arrive in batches, in float64 on the CPU.

    Keeps the mean and the scatter S = sum (f - mean)(f - mean)^T; parts merge by the pairwise rule of Chan, Golub &
    LeVeque 1983, which avoids the cancellation of sum(f f^T) - n mean mean^T. `count` is None for statistics from a
    file without a count: these can be compared but not extended.
    """

    def __init__(self) -> None:
        self.count: int | None = 0
        self._mean: Tensor | None = None  # (D,)
        self._scatter: Tensor | None = None  # (D, D); where count is None, the covariance itself

    def update(self, features: Tensor) -> "Statistics":
        """Adds features (B, D), on any device and of any real dtype; returns self.

        ValueError: not two-dimensional, not finite, or of another width than the features before.
        """
        if features.ndim != 2:
            raise ValueError(f"features of shape {tuple(features.shape)}: wanted (B, D)")
        if not features.isfinite().all():
            raise ValueError("features hold nan or inf: check the images and the feature network")
        if len(features) == 0:
            return self
        features = features.detach().cpu().double()
        mean = features.mean(0)
        centred = features - mean
        if self._mean is None and self.count == 0:
            width = features.shape[1]
            self._mean, self._scatter = mean.new_zeros(width), mean.new_zeros(width, width)
        self._absorb(len(features), mean)
        self._scatter.addmm_(centred.T, centred)
        return self

    def _absorb(self, count: int, mean: Tensor) -> None:
        """Updates count and mean for `count` more features with this mean; adds the scatter between the means."""
        if self.count is None:
            raise ValueError("these statistics have no sample count, so nothing can be added to them")
        if len(mean) != len(self._mean):
            raise ValueError(f"features of width {len(mean)}: wanted {len(self._mean)}, as in the features before")
        total = self.count + count
        delta = mean - self._mean
        self._scatter.addr_(delta, delta, alpha=self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total

    def __add__(self, other: "Statistics") -> "Statistics":
        """Returns the statistics of both sets of features together. ValueError: widths differ or a count is unknown."""
        if other.count is None:
            raise ValueError("these statistics have no sample count, so they cannot be added to others")
        if other.count == 0 or self.count == 0:
            return (self if other.count == 0 else other)._copy()
        union = self._copy()
        union._absorb(other.count, other._mean)
        union._scatter += other._scatter
        return union

    def _copy(self) -> "Statistics":
        copy = Statistics()
        copy.count = self.count
        if self._mean is not None:
            copy._mean, copy._scatter = self._mean.clone(), self._scatter.clone()
        return copy

    @property
    def mean(self) -> Tensor:
        """(D,) float64. ValueError: no features yet."""
        if self._mean is None:
            raise ValueError("0 features: the mean needs at least 1")
        return self._mean

    @property
    def has_covariance(self) -> bool:
        """Whether there are at least 2 features, or the statistics of a file, which has a covariance."""
        return self.count is None or self.count > 1

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased (divided by count - 1). ValueError: fewer than 2 features."""
        if self.count is None:
            return self._scatter
        if not self.has_covariance:
            raise ValueError(f"{self.count} features: the covariance needs at least 2, so measure more images")
        return self._scatter / (self.count - 1)

    def save(self, path: str | Path, **extra: np.ndarray) -> None:
        """Writes `mu` (D,), `sigma` (D, D), `n` if known, and `extra` arrays to an .npz file, atomically."""
        arrays = {"mu": self.mean.numpy(), "sigma": self.covariance.numpy(), **extra}
        if self.count is not None:
            arrays["n"] = np.int64(self.count)
        with atomic_write(path) as scratch, scratch.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Reads `mu`, `sigma` and, if present, `n` from an .npz file, without unpickling.

        FileNotFoundError: no such file. ValueError: the file does not hold valid statistics.
        """
        arrays = read_arrays(Path(path), ("mu", "sigma", "n"), WANTED)
        if not {"mu", "sigma"} <= arrays.keys():
            raise ValueError(f"{path} lacks mu or sigma: {WANTED}")
        mean, covariance = (torch.from_numpy(arrays[key].astype(np.float64)) for key in ("mu", "sigma"))
        if arrays.get("n", np.int64(0)).shape:
            raise ValueError(f"{path} holds {arrays['n'].shape} numbers as n: {WANTED}")
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"mu {tuple(mean.shape)}, sigma {tuple(covariance.shape)}"
            raise ValueError(f"{path} holds {shapes}: wanted (D,) and (D, D)")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{path} holds nan or inf: compute these statistics again")
        loaded = cls()
        loaded.count = int(arrays["n"]) if "n" in arrays else None
        loaded._mean = mean
        loaded._scatter = covariance if loaded.count is None else covariance * (loaded.count - 1)
        return loaded


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Returns the squared Fréchet distance, >= 0, between the Gaussians with these means and covariances.

    d² = |mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½), Dowson & Landau 1982; on Inception features, the FID of
    Heusel et al. 2017, eq. 6. For any factors S = F F^T the trace of the last root is the sum of the singular values of
    F_a^T F_b, which stays real and accurate for singular covariances (fewer images than features).
    ValueError: the widths differ, or either set has fewer than 2 features.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of widths {len(a.mean)} and {len(b.mean)}: both sets need the same features")
    between = (a.mean - b.mean).square().sum()
    within = a.covariance.trace() + b.covariance.trace()
    overlap = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    return max(0.0, float(between + within - 2 * overlap))  # below zero by rounding only


def _factor(covariance: Tensor) -> Tensor:
    """Returns F (D, D) with F F^T the covariance; eigenvalues that rounding made negative are clamped to zero."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp(min=0).sqrt()


class Reference(NamedTuple):
    """Reference of real images for the Fréchet and kernel distances."""

    statistics: Statistics  # of the features of all images
    features: Tensor | None  # (n, D) float32, of a subset of the images; None if the file has none

    def save(self, path: str | Path) -> None:
        """Writes the statistics and `features` to an .npz file, atomically."""
        self.statistics.save(path, features=self.features.float().numpy())

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Reads statistics, and features if present, from an .npz file, without unpickling.

        FileNotFoundError: no such file. ValueError: the file does not hold valid statistics or features.
        """
        statistics = Statistics.load(path)
        array = read_arrays(Path(path), ("features",), WANTED).get("features")
        if array is None:
            return cls(statistics, None)
        if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] != len(statistics.mean) or len(array) < 2:
            wanted = f"(n, {len(statistics.mean)}), of the width of mu, n at least 2"
            raise ValueError(f"{path} holds features of shape {array.shape}, {array.dtype}: wanted floats {wanted}")
        features = torch.from_numpy(array).float()
        if not features.isfinite().all():
            raise ValueError(f"{path} holds features that are nan or inf: compute them again")
        return cls(statistics, features)
