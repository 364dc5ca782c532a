"""Features for distances between sets of images, one file each.

A file defines `METRIC`, the name of the distance, `build(device)`, which returns a function from uint8 images
(B, 3, H, W) to features (B, D), and `VERSION`, a number to increase whenever the same images get different features:
earlier measurements are then repeated. With `ANY_CHANNELS`, the function takes (B, C, H, W) of any C but 1. A `build`
with the parameter `weights` takes --inception_weights, one with `clip_dir` takes --clip_dir.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from train.config import DataConfig
from train.data.transforms import grey_to_rgb
from train.datasets._channels import PICTURES
from train.files import sha256_of_network
from train.registry import load_plugin


class Features(NamedTuple):
    """A features file and its feature extractor."""

    name: str
    module: ModuleType
    extract: Callable[[Tensor], Tensor]  # uint8 (B, C, H, W) -> (B, D)
    clip_hash: str | None = None  # SHA-256 of the files in --clip_dir


def load_features(name: str, device: torch.device, weights: str | None = None, clip_dir: str | None = None) -> Features:
    """Builds the features of one file of this folder; `weights` and `clip_dir` are passed to a `build` that takes them.

    ValueError for one that does not.
    """
    module = load_plugin(__name__, name, "features")
    given = {key: path for key, path in {"weights": weights, "clip_dir": clip_dir}.items() if path is not None}
    for key in given.keys() - inspect.signature(module.build).parameters.keys():
        flag, own = ("--clip_dir", "clip") if key == "clip_dir" else ("--inception_weights", "inception")
        raise ValueError(f"{flag} goes with --features {own}, got --features {name}")
    extract = module.build(device, **given)
    clip_hash = None if clip_dir is None else sha256_of_network(Path(clip_dir).expanduser())
    return Features(name, module, lambda images: extract(grey_to_rgb(images)), clip_hash)


def choose_features(
    name: str, data: DataConfig, device: torch.device, weights: str | None = None, clip_dir: str | None = None
) -> Features:
    """Returns the features of --features; auto is those of the weights that are given, else the data set's own, else
    inception, else pixels with a warning.

    Images that are neither grey nor RGB have pixels alone, or features with `ANY_CHANNELS`; ValueError for others.
    """
    if name == "auto" and (weights or clip_dir):
        name = "inception" if weights else "clip"
    if data.n_channels not in PICTURES:
        reason = f"take grey or RGB images, not {data.n_channels} channels"
        if name == "auto":
            warnings.warn(f"Inception features {reason}. Measuring FD(pixels), which is not an FID", stacklevel=2)
            return load_features("pixels", device)
        if not hasattr(load_plugin(__name__, name, "features"), "ANY_CHANNELS"):
            raise ValueError(f"{name} features {reason}: use pixels (--features pixels)")
    if name != "auto":
        return load_features(name, device, weights, clip_dir)
    reader = load_plugin("train.datasets", data.reader or data.dataset, "data set")
    if hasattr(reader, "FEATURES"):
        return load_features(reader.FEATURES, device)
    try:
        return load_features("inception", device)
    except FileNotFoundError as error:
        warnings.warn(f"{error}. Measuring FD(pixels), which is not an FID", stacklevel=2)
        return load_features("pixels", device)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Features."""

    features: str = "auto"
    """A file of experiments/metrics/features, or auto: the data set's own, else inception, else pixels (warns)."""
    inception_weights: str | None = None
    """Path of torch-fidelity's Inception weights; if omitted, its cache or a download."""
    clip_dir: str | None = None
    """Folder of a CLIP model as transformers saves it, for --features clip."""

    def load(self, data: DataConfig, device: torch.device) -> Features:
        """Returns the features that the flags choose for images of `data`."""
        return choose_features(self.features, data, device, self.inception_weights, self.clip_dir)
