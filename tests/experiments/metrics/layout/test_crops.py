"""Crops of boxes, and boxes that show nothing."""

import torch

from experiments.metrics.layout import crops
from experiments.metrics.layout.crops import SIDE, cut_crops, draw_nothing, jitter_boxes
from experiments.metrics.layout.layouts import Layouts, box_iou


def layouts_of(boxes: torch.Tensor, image: list[int], count: int) -> Layouts:
    n = len(boxes)
    return Layouts(count, torch.tensor(image), boxes, torch.zeros(n).long(), torch.ones(n), torch.zeros(n).bool())


def test_a_crop_shows_its_box_with_a_margin(monkeypatch):
    """A ramp along each axis: the crop's mean is the ramp at the box's centre, its span that of the box's sides."""
    monkeypatch.setattr(crops, "CHUNK", 2)
    H, W = 40, 80
    ramp = torch.stack([torch.arange(W).expand(H, W), 2 * torch.arange(H)[:, None].expand(H, W), torch.zeros(H, W)])
    images = torch.stack([torch.zeros(3, H, W), ramp]).to(torch.uint8)
    boxes = torch.tensor([[0.25, 0.25, 0.75, 0.5]]).double().expand(3, 4)
    cut = cut_crops(images, torch.tensor([1, 0, 1]), boxes)
    assert cut.shape == (3, 3, SIDE, SIDE) and cut.dtype == torch.uint8
    assert cut[1].sum() == 0 and torch.equal(cut[0], cut[2])
    across, down = cut[0, 0, 0].float(), cut[0, 1, :, 0].float()
    step_x, step_y = 1.15 * 40 / SIDE, 1.15 * 2 * 10 / SIDE  # values per pixel of the crop
    middle = torch.arange(SIDE) - (SIDE - 1) / 2
    assert (across - (39.5 + step_x * middle)).abs().max() < 0.6
    assert (down - (2 * 14.5 + step_y * middle)).abs().max() < 0.6


def test_a_crop_beyond_the_image_repeats_its_border():
    image = torch.full((1, 1, 8, 8), 7, dtype=torch.uint8)
    assert (cut_crops(image, torch.tensor([0]), torch.tensor([[0.0, 0, 1, 1]]).double()) == 7).all()


def test_jitter_moves_each_side_a_little_and_keeps_an_area():
    boxes = torch.tensor([[0.2, 0.2, 0.5, 0.6], [0.5, 0.5, 0.501, 0.501]]).double().repeat(500, 1)
    moved = jitter_boxes(boxes, 0.02, torch.Generator().manual_seed(0))
    assert 0.015 < (moved - boxes).abs()[::2].max() <= 0.02 and (moved[:, 2:] > moved[:, :2]).all()
    assert (moved - boxes)[::2].mean(0).abs().max() < 0.003


def test_nothing_boxes_overlap_no_object_of_their_image():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator).double() * 0.6
    layouts = layouts_of(torch.cat([corners, corners + 0.3], 1), sorted(list(range(30)) * 2), 31)  # the last is empty
    image, boxes = draw_nothing(layouts, 200, generator)
    assert len(boxes) == 200 and (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 1).all() and 30 in image
    for index in range(31):
        assert (box_iou(boxes[image == index], layouts.boxes[layouts.rows_of(index)]) < 0.2).all()
    assert len(image.unique()) > 20


def test_full_images_have_no_place_for_nothing():
    full = layouts_of(torch.tensor([[0.0, 0, 1, 1]]).double(), [0], 1)
    assert len(draw_nothing(full, 10, torch.Generator().manual_seed(0))[0]) == 0
