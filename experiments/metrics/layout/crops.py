"""Crops of objects from images, as the crop classifier sees them, and crops that show no object."""

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.metrics.layout.layouts import Layouts, box_iou

MARGIN = 1.15  # sides of a crop, times those of the box
SIDE = 16  # pixels of a crop
OVERSAMPLING = 2  # points a pixel of a crop is the mean of, along each side
NOTHING_IOU = 0.2  # a box overlaps every object by less than this if it shows nothing
TRIES = 20  # boxes drawn for each one that is wanted
CHUNK = 512  # crops at a time


def cut_crops(images: Tensor, image: Tensor, boxes: Tensor) -> Tensor:
    """Cuts the boxes (M, 4), fractions of the images `image` (M,), with MARGIN around them from images uint8
    (N, C, H, W): uint8 (M, C, SIDE, SIDE). Beyond an image its border is repeated."""
    parts = [
        sample_boxes(images[numbers].float(), part)
        for numbers, part in zip(image.split(CHUNK), boxes.split(CHUNK), strict=True)
    ]
    none = torch.zeros(0, images.shape[1], SIDE, SIDE, dtype=torch.uint8)
    return torch.cat([none, *(part.round().clamp(0, 255).to(torch.uint8) for part in parts)])


def sample_boxes(images: Tensor, boxes: Tensor) -> Tensor:
    """Samples one box (M, 4) with its margin from each of the images (M, C, H, W): float32 (M, C, SIDE, SIDE)."""
    centre, sides = (boxes[:, :2] + boxes[:, 2:]).float() - 1, (boxes[:, 2:] - boxes[:, :2]).float() * MARGIN
    zero = torch.zeros(len(boxes))  # affine_grid's unit is half the side
    rows = [torch.stack([sides[:, 0], zero, centre[:, 0]], 1), torch.stack([zero, sides[:, 1], centre[:, 1]], 1)]
    points = SIDE * OVERSAMPLING
    grid = F.affine_grid(torch.stack(rows, 1), [len(boxes), images.shape[1], points, points], align_corners=False)
    sampled = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, OVERSAMPLING)


def jitter_boxes(boxes: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Moves each side of boxes (M, 4) by up to `amount` of the image, at random."""
    moved = boxes + amount * (2 * torch.rand(boxes.shape, generator=generator, dtype=torch.float64) - 1)
    return torch.cat([moved[:, :2], torch.maximum(moved[:, 2:], moved[:, :2] + 1e-3)], 1)


def draw_nothing(layouts: Layouts, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws boxes that show no object: up to `count` of (image, box), (n,) and (n, 4).

    Their sizes are those of objects, their places uniform in the image; they overlap every object by less than
    NOTHING_IOU. Fewer are returned where the images are full.
    """
    if not len(layouts):
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, 4, dtype=torch.float64)
    drawn = torch.randint(layouts.count, (count * TRIES,), generator=generator).sort().values
    sides = layouts.boxes[torch.randint(len(layouts), drawn.shape, generator=generator)]
    sides = sides[:, 2:] - sides[:, :2]
    corners = torch.rand(len(drawn), 2, generator=generator, dtype=torch.float64) * (1 - sides)
    boxes = torch.cat([corners, corners + sides], 1)
    free = torch.ones(len(drawn)).bool()
    for index in drawn.unique().tolist():
        here = drawn == index
        objects = layouts.boxes[layouts.rows_of(index)]
        free[here] = (box_iou(boxes[here], objects) < NOTHING_IOU).all(1)
    kept = free.nonzero()[:, 0]
    kept = kept[torch.randperm(len(kept), generator=generator)[:count]].sort().values
    return drawn[kept], boxes[kept]
