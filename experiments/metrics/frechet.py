"""Fréchet distance between two sets of features, from streamed means and covariances; their files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.files import atomic_write, read_arrays

WANTED = "wanted an .npz file with the arrays mu and sigma (and n, if known)"
ROWS = 2048  # features that enter the scatter together: a product of fewer rows is bound by memory
COLUMNS = 512  # of the scatter that are computed together, from the diagonal on


class Statistics:
    """Count, mean (D,) and covariance (D, D) of features that arrive in batches, in float64 on the CPU.

    Keeps the mean and the scatter S = sum (f - mean)(f - mean)^T; parts merge by the pairwise rule of Chan, Golub &
    LeVeque 1983, which avoids the cancellation of sum(f f^T) - n mean mean^T. Features of small batches wait until
    there are ROWS of them. `count` is None for statistics from a file without a count: these can be compared but not
    extended.
    """

    def __init__(self) -> None:
        self.count: int | None = 0  # with those that wait
        self._merged = 0  # without
        self._waiting: list[Tensor] = []  # (n, D) each
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
        self._check_width(features.shape[1])
        if self._mean is None:
            width = features.shape[1]
            self._mean, self._scatter = torch.zeros(width).double(), torch.zeros(width, width).double()
        self._waiting.append(features.detach().cpu().to(torch.float64, copy=True))
        self.count += len(features)
        if self.count - self._merged >= ROWS:
            self._merge_waiting()
        return self

    def _check_width(self, width: int) -> None:
        """Raises ValueError unless features of this width can be added."""
        if self.count is None:
            raise ValueError("these statistics have no sample count, so nothing can be added to them")
        if self._mean is not None and width != len(self._mean):
            raise ValueError(f"features of width {width}: wanted {len(self._mean)}, as in the features before")

    def _merge_waiting(self) -> None:
        """Moves the features that wait to mean and scatter."""
        if self._waiting:
            rows, self._waiting = torch.cat(self._waiting), []
            mean = rows.mean(0)
            self._absorb(len(rows), mean)
            add_scatter(self._scatter, rows.sub_(mean))

    def _absorb(self, count: int, mean: Tensor) -> None:
        """Updates the mean for `count` more features with this mean; adds the scatter between the means."""
        total = self._merged + count
        delta = mean - self._mean
        self._scatter.addr_(delta, delta, alpha=self._merged * count / total)
        self._mean = self._mean + delta * (count / total)
        self._merged = total

    def __add__(self, other: "Statistics") -> "Statistics":
        """Returns the statistics of both sets of features together. ValueError: widths differ or a count is unknown."""
        if other.count is None:
            raise ValueError("these statistics have no sample count, so they cannot be added to others")
        if other.count == 0 or self.count == 0:
            return (self if other.count == 0 else other)._copy()
        self._check_width(len(other.mean))
        union = self._copy()
        union._absorb(other.count, other.mean)
        union._scatter += other._scatter
        union.count += other.count
        return union

    def _copy(self) -> "Statistics":
        self._merge_waiting()
        copy = Statistics()
        copy.count, copy._merged = self.count, self._merged
        if self._mean is not None:
            copy._mean, copy._scatter = self._mean.clone(), self._scatter.clone()
        return copy

    @property
    def mean(self) -> Tensor:
        """(D,) float64. ValueError: no features yet."""
        if self._mean is None:
            raise ValueError("0 features: the mean needs at least 1")
        self._merge_waiting()
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
        self._merge_waiting()
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
        loaded._merged = loaded.count or 0
        loaded._mean = mean
        loaded._scatter = covariance if loaded.count is None else covariance * (loaded.count - 1)
        return loaded


def add_scatter(scatter: Tensor, rows: Tensor) -> None:
    """Adds rows^T rows, of rows (n, D), to a symmetric matrix (D, D): the upper triangle, which is then mirrored."""
    for first in range(0, len(scatter), COLUMNS):
        own, rest = slice(first, first + COLUMNS), slice(first + COLUMNS, None)
        scatter[own, first:].addmm_(rows[:, own].T, rows[:, first:])
        scatter[rest, own] = scatter[own, rest].T


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Returns the squared Fréchet distance, >= 0, between the Gaussians with these means and covariances.

    d² = |mu_a - mu_b|² + tr(S_a + S_b - 2 (S_a^½ S_b S_a^½)^½), Dowson & Landau 1982; on Inception features, the FID of
    Heusel et al. 2017, eq. 6. For any factors S = F F^T the trace of the last root is the sum of the singular values of
    F_a^T F_b, which stays real and accurate for singular covariances (fewer images than features). The eigenvalues of
    F_a^T S_b F_a would take half the time, but are their squares, of which rounding leaves half the digits.
    ValueError: the widths differ, or either set has fewer than 2 features.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of widths {len(a.mean)} and {len(b.mean)}: both sets need the same features")
    between = (a.mean - b.mean).square().sum()
    within = a.covariance.trace() + b.covariance.trace()
    overlap = torch.linalg.svdvals(factor(a.covariance).T @ factor(b.covariance)).sum()
    return max(0.0, float(between + within - 2 * overlap))  # below zero by rounding only


def factor(covariance: Tensor) -> Tensor:
    """Returns F (D, r) with F F^T the covariance (D, D) of rank r, by Cholesky's decomposition with pivots.

    It takes a tenth of the time of eigenvectors and stops at the rank; the eigenvalues beyond it are rounding errors of
    either sign, of which the positive ones would bias distances by up to 1e-7. Variances are scaled to 1 first, since
    LAPACK's tolerance of D eps is relative to the largest one.
    """
    from scipy.linalg.lapack import dpstrf

    deviations = covariance.diagonal().clamp(min=0).sqrt()
    deviations = torch.where(deviations > 0, deviations, 1.0)
    scaled = (covariance + covariance.T) / (2 * deviations * deviations[:, None])
    triangle, order, rank, _ = dpstrf(scaled.numpy(), lower=True)
    rows = torch.from_numpy(triangle).tril()[:, :rank]
    return torch.empty_like(rows).index_copy_(0, torch.from_numpy(order).long() - 1, rows) * deviations[:, None]


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
