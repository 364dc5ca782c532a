"""Classifiers of real images, trained here without pretrained weights, that judge generated ones."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.metrics.layout import fitting
from train.config import DataConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.datasets import Dataset

SIDE = 64  # pixels; larger images are reduced to it
BATCH = 250  # images at a time
MAX_IMAGES = 20_000  # of a split that are loaded

M = TypeVar("M", bound=nn.Module)
Augment = Callable[[Tensor, torch.Generator], Tensor]  # uint8 (B, C, H, W) -> (B, C, H, W)


class LabelledImages(NamedTuple):
    """Images with their classes."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)


class Recipe(NamedTuple):
    """How a classifier is trained: AdamW with a one-cycle learning rate."""

    epochs: int
    batch_size: int
    peak_lr: float
    weight_decay: float
    label_smoothing: float = 0.0


RECIPE = Recipe(epochs=20, batch_size=64, peak_lr=3e-3, weight_decay=0.05, label_smoothing=0.1)
FIELDS_RECIPE = fitting.Recipe(steps=1000, batch_size=64, peak_lr=3e-3)
UNKNOWN = -1  # label of a field that is not known


class ImageClassifier(nn.Module):
    """ResNet (He et al. 2016) of four residual blocks, one a stage; its features are the 512 means of the last map."""

    def __init__(self, n_channels: int, n_classes: int) -> None:
        from torchvision.models.resnet import BasicBlock, ResNet

        super().__init__()
        self.body = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=n_classes)
        self.body.conv1 = nn.Conv2d(n_channels, 64, 3, stride=2, padding=1, bias=False)
        self.head, self.body.fc = self.body.fc, nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        """Maps images (B, C, H, W) of any size, in [0, 255], to features (B, 512) float32."""
        images = images.float() / 127.5 - 1
        if max(images.shape[-2:]) > SIDE:
            images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, C, H, W) of any size, in [0, 255], to logits (B, K) float32."""
        return self.head(self.features(images))


def load_labelled_images(dataset: Dataset, data: DataConfig) -> LabelledImages:
    """Loads the readable images of a data set, or a fixed random part of a large one, with their classes."""
    subset = sorted(fixed_subset(len(dataset), MAX_IMAGES))
    parts = list(images_in_order(ImageSource(dataset, data), BATCH, subset))
    images, indices = (torch.cat([part[name] for part in parts]) for name in ("image", "index"))
    return LabelledImages(images, torch.from_numpy(dataset.labels)[indices].long())


@torch.no_grad()
def classify(classifier: ImageClassifier, images: Tensor) -> Tensor:
    """Returns the most likely class of each image, uint8 (N, C, H, W): int64 (N,) on the CPU."""
    device = classifier.head.weight.device
    return torch.cat([classifier(part.to(device)).argmax(1).cpu() for part in images.split(BATCH)])


def train_image_classifier(
    images: Tensor,
    labels: Tensor,
    n_classes: int,
    flip: bool,
    seed: int,
    device: torch.device,
    advance: Callable[[int], object],
) -> ImageClassifier:
    """Trains a classifier on images (N, C, H, W) uint8 and labels (N,), in float32; frozen, in eval mode.

    `flip`: mirror images do not change class. `advance` is called with the size of each batch. The global random state
    is unchanged.
    """
    with torch.random.fork_rng(devices=[]):  # layers draw their initial weights from the global generator
        torch.default_generator.manual_seed(seed)
        classifier = ImageClassifier(images.shape[1], n_classes).to(device)

    def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
        return move_and_scale(batch, generator, flip)

    return fit_classifier(classifier, images, labels, augment, RECIPE, seed, advance)


def fit_classifier(
    classifier: M,
    images: Tensor,
    labels: Tensor,
    augment: Augment,
    recipe: Recipe,
    seed: int,
    advance: Callable[[int], object] = lambda count: None,
) -> M:
    """Trains a classifier on images (N, C, H, W) uint8 and labels (N,), deterministically on the CPU; returns it frozen
    and in eval mode."""
    device = next(classifier.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=recipe.peak_lr, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * -(-len(images) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.peak_lr, total_steps=steps)
    with torch.enable_grad():  # even if the caller has disabled it
        for _ in range(recipe.epochs):
            for rows in torch.randperm(len(images), generator=generator).split(recipe.batch_size):
                logits = classifier(augment(images[rows], generator).to(device))
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[rows].to(device), label_smoothing=recipe.label_smoothing).backward()
                optimizer.step()
                schedule.step()
                advance(len(rows))
    return classifier.requires_grad_(False).eval()


def train_field_classifier(
    images: Tensor,
    labels: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    seed: int,
    device: torch.device,
    advance: Callable[[int], object] = lambda steps: None,
) -> ImageClassifier:
    """Trains one classifier of several fields on images (N, C, H, W) uint8, for FIELDS_RECIPE.steps steps; frozen.

    `labels` (N,) of a field are below its size, or UNKNOWN. The logits of the fields stand side by side, in the order
    of `sizes`. `advance` is called with 1 after each step. The global random state is unchanged.
    """

    def build() -> ImageClassifier:
        return ImageClassifier(images.shape[1], sum(sizes.values())).to(device)

    def loss(network: ImageClassifier, rows: Tensor, generator: torch.Generator) -> Tensor:
        logits = network(move_and_scale(images[rows], generator, flip=False).to(device)).split([*sizes.values()], 1)
        losses = [
            F.cross_entropy(each, labels[name][rows].to(device), ignore_index=UNKNOWN, reduction="sum")
            for name, each in zip(sizes, logits, strict=True)
        ]
        return torch.stack(losses).sum() / len(rows)

    return fitting.fit(build, loss, len(images), FIELDS_RECIPE, seed, advance)


@torch.no_grad()
def classify_fields(classifier: ImageClassifier, images: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Returns the most likely class of each field of images uint8 (N, C, H, W): int64 (N,) each, on the CPU."""
    device = classifier.head.weight.device
    logits = torch.cat([classifier(part.to(device)).cpu() for part in images.split(BATCH)])
    parts = logits.split([*sizes.values()], 1)
    return {name: part.argmax(1) for name, part in zip(sizes, parts, strict=True)}


def move_and_scale(images: Tensor, generator: torch.Generator, flip: bool) -> Tensor:
    """Augments images (B, C, H, W) by shifts of up to a tenth of the side and scaling by 0.85 to 1.15, and mirrors half
    of them if `flip`; float32, the border is repeated."""
    uniform = torch.rand(4, len(images), generator=generator) * 2 - 1  # in [-1, 1)
    scale, shift = 1 + 0.15 * uniform[0], 0.2 * uniform[1:3]  # affine_grid's unit is half the side
    mirror = torch.where(uniform[3] < 0, -1.0, 1.0) if flip else torch.ones(len(images))
    zero = torch.zeros(len(images))
    rows = [torch.stack([scale * mirror, zero, shift[0]], 1), torch.stack([zero, scale, shift[1]], 1)]  # (B, 3) each
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
