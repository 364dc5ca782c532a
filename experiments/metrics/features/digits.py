"""Features for the embedded digits: a small classifier trained on the real training digits only."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.metrics.image_classifier import Recipe, fit_classifier
from train.data.transforms import to_item
from train.datasets import Dataset, digits
from train.files import atomic_write

METRIC = "FD(digits)"
VERSION = 1  # increase it when a change below affects the trained weights: their cache is keyed by it, too
SIDE = 32  # pixels; images are resized to it
RECIPE, SEED = Recipe(epochs=20, batch_size=64, peak_lr=4e-3, weight_decay=0.05), 0
CACHE_DIR = Path(__file__).resolve().parents[3] / "logs" / ".cache" / "classifiers"


class DigitsClassifier(nn.Module):
    """Classifier of ten digits: three convolutions and, as in LeNet-5 (LeCun et al. 1998), 84 hidden units, which are
    the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.AvgPool2d(2),  # the digits were enlarged from 8 x 8 pixels: half the size loses nothing
            *_stage(1, 24),
            nn.MaxPool2d(2),
            *_stage(24, 48),
            nn.MaxPool2d(2),
            *_stage(48, 64),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 84),
            nn.ReLU(),
        )
        self.head = nn.Linear(84, 10)

    def features(self, images: Tensor) -> Tensor:
        """Maps uint8 images (B, 3, H, W) or (B, 1, H, W) of any size to features (B, 84) float32."""
        with torch.autocast(images.device.type, enabled=False):
            grey = images.float().mean(1, keepdim=True) / 255
            if grey.shape[-2:] != (SIDE, SIDE):
                grey = F.interpolate(grey, size=(SIDE, SIDE), mode="bilinear", antialias=True)
            return self.body(grey)

    def forward(self, images: Tensor) -> Tensor:
        """Maps uint8 images (B, 3, H, W) or (B, 1, H, W) of any size to logits (B, 10) float32."""
        features = self.features(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.head(features)


def _stage(channels_in: int, channels_out: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def build(device: torch.device | str, cache_dir: str | Path = CACHE_DIR) -> Callable[[Tensor], Tensor]:
    """Returns the extractor of the classifier's features, uint8 (B, 3, H, W) -> float32 (B, 84); trains the classifier
    first if it is not cached."""
    classifier = load_classifier(device, cache_dir)
    return lambda images: classifier.features(images.to(device))


@torch.inference_mode(False)  # weights made in a caller's inference mode could not be used with autograd
def load_classifier(device: torch.device | str, cache_dir: str | Path = CACHE_DIR) -> DigitsClassifier:
    """Loads the trained classifier, frozen and in eval mode, on `device`; trains it on the CPU (seconds) if not cached.

    The cache file is named by a hash of the training digits and `VERSION`. ValueError: a damaged file.
    """
    training = digits.build(digits.Config(), "train")
    key = hashlib.sha256(f"{training.fingerprint()} recipe {VERSION}".encode()).hexdigest()
    path = Path(cache_dir) / f"digits-{key[:16]}.safetensors"
    if not path.is_file():
        trained = train_classifier(*_stack(training), seed=SEED)
        with atomic_write(path) as scratch:
            save_file(trained.state_dict(), scratch)
    with torch.device("meta"):  # no initial weights: they would be drawn from the global generator
        classifier = DigitsClassifier()
    try:
        classifier.load_state_dict(load_file(path), assign=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it will be trained again") from error
    return classifier.to(device).requires_grad_(False).eval()


def train_classifier(images: Tensor, labels: Tensor, seed: int) -> DigitsClassifier:
    """Trains a classifier on images (N, 1, 32, 32) uint8 and labels (N,), in float32 on the CPU, deterministically.

    The global random state is unchanged.
    """
    with torch.random.fork_rng(devices=[]):  # layers draw their initial weights from the global generator
        torch.default_generator.manual_seed(seed)
        classifier = DigitsClassifier()
    return fit_classifier(classifier, images, labels, augment, RECIPE, seed)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augments images (B, 1, H, W) by rotation up to 10 degrees, scaling by 0.9 to 1.1 and shifts of up to about 2
    pixels; float32."""
    uniform = torch.rand(4, len(images), generator=generator) * 2 - 1  # in [-1, 1)
    angle, scale = uniform[0] * math.radians(10), 1 + 0.1 * uniform[1]
    shift = uniform[2:] * 2 * 2 / images.shape[-1]  # two pixels, in affine_grid's units of half the side
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cosine, -sine, shift[0]], 1), torch.stack([sine, cosine, shift[1]], 1)]  # (B, 3) each
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images.float(), grid, align_corners=False)


@torch.no_grad()
def accuracy(classifier: DigitsClassifier, split: str = "val") -> float:
    """Returns the classifier's accuracy, in [0, 1], on the digits of `split` ("train" or "val")."""
    images, labels = _stack(digits.build(digits.Config(), split))
    device = next(classifier.parameters()).device
    return (classifier(images.to(device)).argmax(1).cpu() == labels).double().mean().item()


def _stack(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Returns all images (N, 1, 32, 32) uint8 and labels (N,) int64."""
    items = [to_item(dataset[index], (SIDE, SIDE), 1) for index in range(len(dataset))]
    images = torch.stack([item["image"].as_subclass(Tensor) for item in items])
    return images, torch.tensor([item["label"] for item in items])
