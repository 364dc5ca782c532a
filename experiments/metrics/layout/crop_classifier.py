"""A classifier of crops of objects, with a class for crops that show none."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.metrics.layout.crops import SIDE, cut_crops, draw_nothing, jitter_boxes
from experiments.metrics.layout.fitting import Recipe, fit
from experiments.metrics.layout.layouts import Layouts

WIDTHS = (32, 48, 64)  # channels of the convolutions
JITTER = 0.02  # of the image, by which the sides of boxes are moved in training
RECIPE = Recipe(steps=600, batch_size=128, peak_lr=4e-3)
BATCH = 1000  # crops at a time


class CropClassifier(nn.Module):
    """Three convolutions and a linear layer, which knows places: an object off the centre of its box is another."""

    def __init__(self, n_channels: int, n_outputs: int) -> None:
        super().__init__()
        widths = (n_channels, *WIDTHS)
        layers = []
        for channels_in, channels_out in pairwise(widths):
            layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers[:-1])
        self.head = nn.Linear(WIDTHS[-1] * (SIDE // 4) ** 2, n_outputs)

    def forward(self, crops: Tensor) -> Tensor:
        """Maps crops (B, C, SIDE, SIDE) in [0, 255] to logits (B, n_outputs)."""
        return self.head(self.body(crops.float() / 127.5 - 1).flatten(1))

    def features(self, crops: Tensor) -> Tensor:
        """Maps crops (B, C, SIDE, SIDE) in [0, 255] to the means of the last maps, (B, 64)."""
        return self.body(crops.float() / 127.5 - 1).mean((2, 3))


def train_crop_classifier(
    images: Tensor,
    layouts: Layouts,
    n_classes: int,
    recipe: Recipe,
    seed: int,
    advance: Callable[[int], object] = lambda steps: None,
    *,
    with_nothing: bool,
) -> CropClassifier:
    """Trains a classifier of the objects in images uint8 (N, C, H, W), but for ignored ones.

    With `with_nothing`, as many boxes that show nothing are the class `n_classes`.
    """
    kept = ~layouts.ignored
    image, boxes, classes = layouts.image[kept], layouts.boxes[kept], layouts.classes[kept]
    if with_nothing:
        other_image, other_boxes = draw_nothing(layouts, len(image), torch.Generator().manual_seed(seed))
        image, boxes = torch.cat([image, other_image]), torch.cat([boxes, other_boxes])
        classes = torch.cat([classes, torch.full((len(other_image),), n_classes)])

    def build() -> CropClassifier:
        return CropClassifier(images.shape[1], n_classes + with_nothing)

    def loss(network: CropClassifier, rows: Tensor, generator: torch.Generator) -> Tensor:
        crops = cut_crops(images, image[rows], jitter_boxes(boxes[rows], JITTER, generator))
        return F.cross_entropy(network(crops), classes[rows])

    return fit(build, loss, len(image), recipe, seed, advance)


@torch.no_grad()
def classify_crops(classifier: CropClassifier, crops: Tensor) -> Tensor:
    """Returns the most likely class (M,) of each crop uint8 (M, C, SIDE, SIDE)."""
    return torch.cat([classifier(part).argmax(1) for part in crops.split(BATCH)])


@torch.no_grad()
def crop_features(classifier: CropClassifier, crops: Tensor) -> Tensor:
    """Returns the features (M, 64) of crops uint8 (M, C, SIDE, SIDE)."""
    return torch.cat([classifier.features(part) for part in crops.split(BATCH)])
