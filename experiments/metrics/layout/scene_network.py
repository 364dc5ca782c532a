"""A small network that finds the objects of an image and the class of each pixel: one trunk, two heads.

Objects as points (Zhou et al. 2019, arXiv 1904.07850): a heat map of centres for each class of things, with the size
and the offset of the box at each centre.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.metrics.layout.colors import NOT_SEEN, nearest_colors
from experiments.metrics.layout.detections import MOST_DETECTIONS, Detections, without_overlaps
from experiments.metrics.layout.fitting import Recipe, fit
from experiments.metrics.layout.layouts import UNLABELLED, Layouts
from train.datasets._shapes_scene import COLORS, GROUNDS, PALETTE, THINGS

STRIDE = 2  # pixels of an image per cell of the heat map, along each side
WIDTHS = (32, 48, 64)  # channels at strides 2, 4, 8
SIGMA = 1 / 6  # of the Gaussian around a centre, times the smaller side of the box
LEAST_SIGMA = 0.5  # cells
PRIOR = 0.02  # initial probability of a centre in a cell
LEAST_SCORE = 0.05  # of a detection
SURE_SCORE = 0.3  # of a detection that counts as a thing of a scene
BOX_WEIGHT = 1.0  # of the losses of size and offset, beside that of the heat map
RECIPE = Recipe(steps=1200, batch_size=64, peak_lr=4e-3)  # of images of 32 x 32: of others, as many pixels a step
LEAST_BATCH = 4
EVALUATED = 64  # images at a time when it is used
MAX_SIDE = 128  # pixels; larger images are reduced to it


class SceneNetwork(nn.Module):
    """Trunk of three scales with skips, a heat map head and, if maps of classes are known, a head for pixels."""

    def __init__(self, n_channels: int, n_things: int, n_pixel_classes: int) -> None:
        super().__init__()
        a, b, c = WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(n_channels, a, 5, STRIDE, 2, bias=False), nn.BatchNorm2d(a), nn.ReLU())
        self.down_1, self.down_2 = nn.Sequential(*stage(a, b, 2)), nn.Sequential(*stage(b, c, 2), *stage(c, c))
        self.up_2, self.up_1 = nn.Conv2d(c, b, 1), nn.Conv2d(b, a, 1)
        self.merge_2, self.merge_1 = nn.Sequential(*stage(b, b)), nn.Sequential(*stage(a, a))
        self.objects = nn.Sequential(*stage(a, a), nn.Conv2d(a, n_things + 4, 1)) if n_things else None
        pixel_outputs = n_pixel_classes * STRIDE**2
        self.pixels = nn.Sequential(*stage(a, a), nn.Conv2d(a, pixel_outputs, 1)) if n_pixel_classes else None
        if self.objects is not None:
            nn.init.constant_(self.objects[-1].bias[:n_things], math.log(PRIOR / (1 - PRIOR)))  # few centres

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Maps images (B, C, H, W) in [0, 255] to heat maps with boxes (B, n_things + 4, h, w), of which the last four
        are the logarithm of the sides and the offset of the centre, in cells, and to logits of pixels (B, K, H, W)."""
        x = scale_pixels(images)
        fine, middle, coarse = self.encode(x)
        middle = self.merge_2(middle + resize(self.up_2(coarse), middle))
        fine = self.merge_1(fine + resize(self.up_1(middle), fine))
        objects = None if self.objects is None else self.objects(fine)
        if self.pixels is None:
            return objects, None
        pixels = F.pixel_shuffle(self.pixels(fine), STRIDE)[..., : x.shape[2], : x.shape[3]]
        return objects, pixels if pixels.shape[-2:] == images.shape[-2:] else resize(pixels, images)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps scaled pixels (B, C, H, W) to features of the three scales, the finest first."""
        fine = self.stem(x)  # (B, a, h, w)
        middle = self.down_1(fine)
        return fine, middle, self.down_2(middle)

    def features(self, images: Tensor) -> Tensor:
        """Maps images (B, C, H, W) in [0, 255] to the means of the coarsest features, (B, 64)."""
        return self.encode(scale_pixels(images))[-1].mean((2, 3))

    def loss(self, images: Tensor, layouts: Layouts) -> Tensor:
        """Returns the loss of a batch of images (B, C, H, W) with their layouts."""
        objects, pixels = self(images)
        total = images.new_zeros(())
        if objects is not None:
            total = total + object_loss(objects, layouts)
        if pixels is not None:
            total = total + F.cross_entropy(pixels, layouts.pixels.long(), ignore_index=UNLABELLED)
        return total


def scale_pixels(images: Tensor) -> Tensor:
    """Maps images (B, C, H, W) in [0, 255] to [-1, 1], reduced to MAX_SIDE pixels if they are larger."""
    x, (H, W) = images.float() / 127.5 - 1, images.shape[-2:]
    if max(H, W) > MAX_SIDE:
        size = [max(1, side * MAX_SIDE // max(H, W)) for side in (H, W)]
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    return x


def stage(channels_in: int, channels_out: int, stride: int = 1) -> list[nn.Module]:
    """Returns the layers of a convolution with batch normalization."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Resizes maps to the size of others."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def object_loss(outputs: Tensor, layouts: Layouts) -> Tensor:
    """Returns the focal loss of the heat maps and the smooth L1 losses of sizes and offsets at the centres."""
    heat, boxes = outputs[:, :-4], outputs[:, -4:]
    target, cells, wanted = object_targets(layouts, heat.shape)
    log_p, log_not_p = F.logsigmoid(heat), F.logsigmoid(-heat)
    centre = target == 1
    positive = -(log_not_p.exp().square() * log_p)[centre].sum()  # weight (1 - p)²
    negative = -(log_p.exp().square() * log_not_p * (1 - target) ** 4)[~centre].sum()
    image, row, column = cells
    of_boxes = F.smooth_l1_loss(boxes[image, :, row, column], wanted, reduction="sum")
    return (positive + negative + BOX_WEIGHT * of_boxes) / max(1, len(wanted))


def object_targets(layouts: Layouts, shape: torch.Size) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """Returns the heat maps (B, K, h, w) of layouts, the cells (image, row, column) of the M objects' centres, and
    what to predict there, (M, 4): the logarithm of the sides and the offset of the centre from that of the cell.

    Crowds and objects that are hardly visible are left out.
    """
    kept = ~layouts.ignored
    image, classes = layouts.image[kept], layouts.classes[kept]
    h, w = shape[-2:]
    scale = torch.tensor([w, h], dtype=torch.float64)
    corners = layouts.boxes[kept].view(-1, 2, 2) * scale
    centre, sides = corners.mean(1), corners[:, 1] - corners[:, 0]  # (M, 2) each, in cells, x first
    cell = torch.minimum(centre.floor(), scale - 1)
    sigma = (sides.amin(1) * SIGMA).clamp(min=LEAST_SIGMA)
    across, along = torch.arange(w) - cell[:, :1], torch.arange(h) - cell[:, 1:]  # (M, w), (M, h)
    squared = along[:, :, None] ** 2 + across[:, None, :] ** 2  # (M, h, w)
    blobs = (-squared / (2 * sigma[:, None, None] ** 2)).exp().float()
    target = torch.zeros(shape).view(-1, h * w)  # (B K, h w)
    maps = (image * shape[1] + classes)[:, None].expand(-1, h * w)
    target.scatter_reduce_(0, maps, blobs.flatten(1), "amax")
    column, row = cell.long().unbind(1)
    wanted = torch.cat([sides.log(), centre - cell - 0.5], 1).float()
    return target.view(shape), (image, row, column), wanted


def train_scene_network(
    images: Tensor,
    layouts: Layouts,
    n_classes: int,
    recipe: Recipe,
    seed: int,
    advance: Callable[[int], object] = lambda steps: None,
) -> SceneNetwork:
    """Trains the network on images uint8 (N, C, H, W): to find objects if there are any, and to classify pixels if
    their classes are known."""
    things, pixel_classes = n_classes * (len(layouts) > 0), n_classes * (layouts.pixels is not None)
    pixels = min(images.shape[2], MAX_SIDE) * min(images.shape[3], MAX_SIDE)
    batch_size = min(recipe.batch_size, max(LEAST_BATCH, recipe.batch_size * 32 * 32 // pixels))

    def build() -> SceneNetwork:
        return SceneNetwork(images.shape[1], things, pixel_classes)

    def loss(network: SceneNetwork, rows: Tensor, generator: torch.Generator) -> Tensor:
        return network.loss(images[rows], layouts.take(rows.tolist()))

    return fit(build, loss, len(images), recipe._replace(batch_size=batch_size), seed, advance)


@torch.no_grad()
def detect(network: SceneNetwork, images: Tensor) -> Detections:
    """Returns the objects that the network finds in images uint8 (N, C, H, W): the maxima of 3 x 3 cells of the heat
    maps, at most MOST_DETECTIONS an image."""
    parts = []
    for number, batch in enumerate(images.split(EVALUATED)):
        outputs, _ = network(batch)
        heat, boxes = outputs[:, :-4].sigmoid(), outputs[:, -4:]
        B, K, h, w = heat.shape
        peaks = heat * (F.max_pool2d(heat, 3, 1, 1) == heat)
        scores, order = peaks.flatten(1).topk(min(MOST_DETECTIONS, K * h * w))  # (B, D)
        image = torch.arange(B)[:, None].expand_as(order)[scores > LEAST_SCORE]
        order, scores = order[scores > LEAST_SCORE], scores[scores > LEAST_SCORE]
        classes, row, column = order // (h * w), order // w % h, order % w
        found = boxes[image, :, row, column].double()
        half = found[:, :2].exp() / 2
        centre = torch.stack([column, row], 1) + 0.5 + found[:, 2:]
        corners = torch.cat([centre - half, centre + half], 1) / torch.tensor([w, h, w, h])
        parts.append(Detections(image + number * EVALUATED, corners.clamp(0, 1), classes, scores.double()))
    fields = ("image", "boxes", "classes", "scores")
    return Detections(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


@torch.no_grad()
def segment(network: SceneNetwork, images: Tensor) -> Tensor:
    """Returns the most likely class of each pixel of images uint8 (N, C, H, W): uint8 (N, H, W)."""
    return torch.cat([network(batch)[1].argmax(1).to(torch.uint8) for batch in images.split(EVALUATED)])


@torch.no_grad()
def scene_features(network: SceneNetwork, images: Tensor) -> Tensor:
    """Returns the features of images uint8 (N, C, H, W), by which sets of whole images are compared: (N, 64)."""
    return torch.cat([network.features(batch) for batch in images.split(EVALUATED)])


class Contents(NamedTuple):
    """What is found in N images."""

    things: Tensor  # (N, classes, colours) int64: how many
    grounds: Tensor  # (N, 2) int64: at the top and at the bottom


def find_contents(network: SceneNetwork, images: Tensor) -> Contents:
    """Finds the things and the grounds in images uint8 (N, 3, H, W).

    The horizon is never in the upper or lower quarter of an image: the ground there is the one of most pixels.
    """
    classes, detections = segment(network, images), detect(network, images)  # classes: (N, H, W)
    detections = without_overlaps(detections[detections.scores > SURE_SCORE])
    N, M, H = len(images), len(detections.image), images.shape[2]
    layouts = Layouts(N, detections.image, detections.boxes, detections.classes, torch.ones(M), torch.zeros(M).bool())
    layouts = replace(layouts, owner=find_owners(layouts, classes < len(THINGS)))
    colors, things = nearest_colors(images, layouts, PALETTE), torch.zeros(N, len(THINGS), len(COLORS)).long()
    for image, thing, color in zip(layouts.image.tolist(), layouts.classes.tolist(), colors.tolist(), strict=True):
        if color != NOT_SEEN:
            things[image, thing, color] += 1
    numbers = len(THINGS) + torch.arange(len(GROUNDS))[:, None]
    quarters = [each.flatten(1)[:, None] for each in (classes[:, : H // 4], classes[:, -(H // 4) :])]  # (N, 1, pixels)
    return Contents(things, torch.stack([(each == numbers).sum(2).argmax(1) for each in quarters], 1))


def find_owners(layouts: Layouts, is_thing: Tensor) -> Tensor:
    """Returns which object of its image each pixel shows, -1: none, (N, H, W) int16: the last one in whose box it is,
    if it shows a thing, (N, H, W) bool."""
    N, H, W = is_thing.shape
    owner = torch.full((N, H, W), -1, dtype=torch.int16)
    sides = (layouts.boxes * torch.tensor([W, H, W, H])).round().long().tolist()
    numbers = (torch.arange(len(layouts)) - layouts.first[layouts.image]).tolist()
    for image, number, (left, top, right, bottom) in zip(layouts.image.tolist(), numbers, sides, strict=True):
        box = owner[image, top:bottom, left:right]
        box[is_thing[image, top:bottom, left:right]] = number
    return owner
