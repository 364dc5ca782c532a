"""Features for distances between sets of images, one file each.

A file defines `METRIC`, the name of the distance, `build(device)`, which returns a function from uint8 images
(B, 3, H, W) to features (B, D), and `VERSION`, a number to increase whenever the same images get different features:
earlier measurements are then repeated. With `ANY_CHANNELS`, the function takes (B, C, H, W) of any C but 1.
"""

import inspect
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from train.config import DataConfig
from train.data.transforms import grey_to_rgb
from train.datasets._channels import PICTURES
from train.registry import load_plugin


class Features(NamedTuple):
    """A features file and its feature extractor."""

    name: str
    module: ModuleType
    extract: Callable[[Tensor], Tensor]  # uint8 (B, C, H, W) -> (B, D)


def load_features(name: str, device: torch.device, weights: str | None = None) -> Features:
    """Builds the features of one file of this folder; `weights` is passed to a `build` that accepts it."""
    module = load_plugin(__name__, name, "features")
    if weights is not None and "weights" not in inspect.signature(module.build).parameters:
        raise ValueError(f"--inception_weights goes with --features inception, got --features {name}")
    extract = module.build(device) if weights is None else module.build(device, weights=weights)
    return Features(name, module, lambda images: extract(grey_to_rgb(images)))


def choose_features(name: str, data: DataConfig, device: torch.device, weights: str | None = None) -> Features:
    """Returns the features of --features; auto is the data set's own, else inception, else pixels with a warning.

    Images that are neither grey nor RGB have pixels alone, or features with `ANY_CHANNELS`; ValueError for others.
    """
    if data.n_channels not in PICTURES:
        reason = f"take grey or RGB images, not {data.n_channels} channels"
        if name == "auto" and weights is None:
            warnings.warn(f"Inception features {reason}. Measuring FD(pixels), which is not an FID", stacklevel=2)
            return load_features("pixels", device)
        name = "inception" if name == "auto" else name
        if not hasattr(load_plugin(__name__, name, "features"), "ANY_CHANNELS"):
            raise ValueError(f"{name} features {reason}: use pixels (--features pixels)")
    if name != "auto" or weights is not None:
        return load_features("inception" if name == "auto" else name, device, weights)
    reader = load_plugin("train.datasets", data.reader or data.dataset, "data set")
    if hasattr(reader, "FEATURES"):
        return load_features(reader.FEATURES, device)
    try:
        return load_features("inception", device)
    except FileNotFoundError as error:
        warnings.warn(f"{error}. Measuring FD(pixels), which is not an FID", stacklevel=2)
        return load_features("pixels", device)
