"""Layouts from items: boxes clipped, who owns a pixel, what is visible; the kinds of difficult objects."""

import pytest
import torch
from torchvision import tv_tensors

from experiments.metrics.layout.layouts import (
    UNLABELLED,
    Layouts,
    box_iou,
    find_buckets,
    join_layouts,
    read_layout,
)
from train.datasets import Ragged

SIZE = (4, 8)  # height, width


def item(boxes, classes, **fields):
    boxes = tv_tensors.BoundingBoxes(torch.tensor(boxes).view(-1, 4), format="XYXY", canvas_size=SIZE)
    return {"boxes": boxes, "box_class": Ragged(torch.tensor(classes, dtype=torch.long)), **fields}


def masks(*boxes):
    """Masks of boxes left, top, right, bottom in pixels."""
    out = torch.zeros(len(boxes), *SIZE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(out, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return tv_tensors.Mask(out)


def test_boxes_are_fractions_clipped_and_dropped_when_empty():
    fields = read_layout(item([[-4.0, 1, 4, 3], [8, 0, 9, 2], [2, 2, 4, 4]], [0, 1, 2]), SIZE)
    assert fields["boxes"].tolist() == [[0, 0.25, 0.5, 0.75], [0.25, 0.5, 0.5, 1]]
    assert fields["classes"].tolist() == [0, 2] and fields["visible"].tolist() == [1, 1]
    assert fields["owner"] is None is fields["colors"] and fields["crowd"].tolist() == [False, False]


def test_later_masks_are_in_front_and_rows_are_renumbered():
    boxes = [(0, 0, 4, 4), (8, 0, 9, 1), (2, 0, 6, 4)]
    shown = masks((0, 0, 4, 4), (0, 0, 0, 0), (2, 0, 6, 4))
    colors = Ragged(torch.tensor([5, 6, 7]))
    fields = read_layout(item([[*map(float, box)] for box in boxes], [0, 1, 2], masks=shown, box_color=colors), SIZE)
    assert fields["owner"][0].tolist() == [0, 0, 1, 1, 1, 1, -1, -1] and fields["colors"].tolist() == [5, 7]
    assert fields["visible"].tolist() == [0.5, 1]


def test_the_declared_visible_share_is_taken():
    extra = {"box_visible": Ragged(torch.tensor([0.25])), "box_crowd": Ragged(torch.tensor([1]))}
    layouts = join_layouts([read_layout(item([[0.0, 0, 4, 4]], [0], masks=masks((0, 0, 4, 4)), **extra), SIZE)])
    assert layouts.visible.tolist() == [0.25] and layouts.ignored.tolist() == [True]


def test_a_panoptic_map_gives_owners_and_classes_of_pixels():
    segments = torch.tensor([[7, 7, 9, 0]]).repeat(4, 2)
    extra = {
        "box_id": Ragged(torch.tensor([9, 7])),
        "panoptic": tv_tensors.Mask(segments),
        "segment_id": Ragged(torch.tensor([7, 9])),
        "segment_class": Ragged(torch.tensor([3, 1])),
    }
    fields = read_layout(item([[0.0, 0, 4, 4], [0, 0, 2, 4]], [1, 3], **extra), SIZE)
    assert fields["owner"][0, :4].tolist() == [1, 1, 0, -1]
    assert fields["pixels"][0, :4].tolist() == [3, 3, 1, UNLABELLED]


def test_an_item_without_objects_has_an_empty_layout():
    empty = read_layout(item([], [], masks=masks()), SIZE)
    layouts = join_layouts([empty, read_layout(item([[0.0, 0, 4, 4]], [2], masks=masks((0, 0, 4, 4))), SIZE), empty])
    assert len(layouts) == 1 and layouts.count == 3 and layouts.image.tolist() == [1]
    assert [len(range(5)[layouts.rows_of(i)]) for i in range(3)] == [0, 1, 0]
    assert layouts.visible_pixels(0).sum() == 16


def of_boxes(*rows, count=1, visible=None) -> Layouts:
    """Layouts of rows (image, class, box)."""
    return Layouts(
        count=count,
        image=torch.tensor([row[0] for row in rows]),
        boxes=torch.tensor([row[2] for row in rows], dtype=torch.float64),
        classes=torch.tensor([row[1] for row in rows]),
        visible=torch.ones(len(rows)).double() if visible is None else torch.tensor(visible).double(),
        crowd=torch.zeros(len(rows)).bool(),
    )


def test_small_and_occluded_objects():
    layouts = of_boxes((0, 0, (0, 0, 0.25, 0.2)), (0, 1, (0.5, 0.5, 0.7, 0.7)), visible=[0.8, 0.79])
    buckets = find_buckets(layouts)
    assert buckets["small"].tolist() == [False, True] and buckets["occluded"].tolist() == [False, True]


def test_contact_is_near_one_of_its_class_in_the_same_image():
    near, far, beside = (0.0, 0.0, 0.2, 0.2), (0.6, 0.6, 0.8, 0.8), (0.24, 0.1, 0.4, 0.3)
    assert find_buckets(of_boxes((0, 1, near), (0, 1, beside), (0, 1, far)))["contact"].tolist() == [1, 1, 0]
    assert not find_buckets(of_boxes((0, 1, near), (0, 2, beside)))["contact"].any()
    assert not find_buckets(of_boxes((0, 1, near), (1, 1, beside), count=2))["contact"].any()
    diagonal = (0.24, 0.24, 0.4, 0.4)  # .04 away along each axis, .057 in all
    assert not find_buckets(of_boxes((0, 1, near), (0, 1, diagonal)))["contact"].any()


def test_overlap_needs_a_common_area():
    a, touching, over = (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.4, 0.4, 0.9, 0.9)
    assert find_buckets(of_boxes((0, 0, a), (0, 1, touching)))["overlap"].tolist() == [False, False]
    assert find_buckets(of_boxes((0, 0, a), (0, 1, touching), (0, 2, over)))["overlap"].all()
    assert not find_buckets(of_boxes((0, 0, a), (1, 1, over), count=2))["overlap"].any()


def test_iou_of_boxes_and_of_a_crowd():
    a, b = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2], [5, 5, 6, 6], [-1, -1, 9, 9]])
    assert box_iou(a, b)[0].tolist() == pytest.approx([1 / 3, 0, 4 / 100])
    assert box_iou(a, b, torch.tensor([True, False, True]))[0].tolist() == pytest.approx([0.5, 0, 1])


def test_layouts_are_taken_in_any_order_with_repeats():
    layouts = of_boxes((0, 0, (0, 0, 1, 1)), (2, 1, (0, 0, 0.5, 1)), (2, 2, (0, 0, 1, 0.5)), count=3)
    taken = layouts.take([2, 1, 0, 2])
    assert taken.count == 4 and taken.image.tolist() == [0, 0, 2, 3, 3] and taken.classes.tolist() == [1, 2, 0, 1, 2]
    assert taken.boxes[2].tolist() == [0, 0, 1, 1] and taken.first.tolist() == [0, 2, 2, 3]
