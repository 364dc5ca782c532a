"""FID features: the 2048-dimensional pooling layer of the original InceptionV3, as ported by torch-fidelity."""

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
    """Returns the feature extractor: uint8 (B, 3, H, W) of any size -> float32 (B, 2048).

    `weights` is torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; by default it is read from
    torch-fidelity's cache or downloaded (about 95 MB). FileNotFoundError: no such file, or the download failed.
    ValueError: the file does not hold these weights; no code in it is run.
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
        remedy = "pass the path of the file, or use other features (--features pixels)"
        raise FileNotFoundError(f"the Inception weights could not be downloaded ({error.reason}): {remedy}") from error


def _from_file(path: Path) -> nn.Module:
    """Loads the extractor from a sanitised copy: torch-fidelity itself unpickles any file it is given."""
    state = read_tensors(path, "wanted torch-fidelity's Inception weights (a .pth file)")
    with tempfile.TemporaryDirectory() as folder:
        checked = Path(folder) / "inception.pth"
        torch.save(state, checked)
        try:
            return _extractor(checked)
        except RuntimeError as error:  # load_state_dict's, which names the keys
            raise ValueError(f"{path} does not hold torch-fidelity's Inception weights: {error}") from error
