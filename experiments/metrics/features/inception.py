"""The features of the FID: the 2048-wide layer of the field's InceptionV3, as ported by torch-fidelity."""

import tempfile
import urllib.error
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vq.weights import read_tensors

METRIC = "FID"
VERSION = 1


def build(device: torch.device | str, weights: str | Path | None = None) -> Callable[[Tensor], Tensor]:
    """Features of uint8 images (B, 3, H, W) of any size: (B, 2048) float32.

    `weights` is torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; without it, its cache or its download
    (about 95 MB). FileNotFoundError: no such file, or no download. ValueError: a file with anything but these weights;
    nothing in it is run.
    """
    network = (_download() if weights is None else _from_file(Path(weights))).to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, enabled=False):
            return network(images.to(device))[0]

    return features


def _extractor(weights: Path | None) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = None if weights is None else str(weights)
    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)


def _download() -> nn.Module:
    try:
        return _extractor(None)
    except urllib.error.URLError as error:
        remedy = "give the file's path, or take other features (--features pixels)"
        raise FileNotFoundError(f"the Inception weights could not be downloaded ({error.reason}): {remedy}") from error


def _from_file(path: Path) -> nn.Module:
    """The extractor with the tensors of a checked copy, as torch-fidelity unpickles whatever path it is given."""
    state = read_tensors(path, "wanted torch-fidelity's Inception weights (a .pth file)")
    with tempfile.TemporaryDirectory() as folder:
        checked = Path(folder) / "inception.pth"
        torch.save(state, checked)
        try:
            return _extractor(checked)
        except RuntimeError as error:  # load_state_dict's, which names the keys
            raise ValueError(f"{path} does not hold torch-fidelity's Inception weights: {error}") from error
