"""Sizes and channels of items, the views of them, and the one range of floats."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from train.transforms import View, to_float, to_item, to_uint8, views


def boxed(image, box, size):
    boxes = tv_tensors.BoundingBoxes(torch.tensor([box]), format="XYXY", canvas_size=size)
    return {"image": image, "label": 3, "boxes": boxes, "name": "a", "vector": torch.arange(4)}


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("shape", [(8, 8), (50, 20), (20, 50, 3), (32, 32, 3)])
@pytest.mark.parametrize("pil", [False, True])
def test_every_image_becomes_a_square_of_the_wanted_channels(n_channels, shape, pil):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    item = {"image": Image.fromarray(array) if pil else array, "label": 5}
    result = to_item(item, 32, n_channels)
    assert isinstance(result["image"], tv_tensors.Image)
    assert result["image"].shape == (n_channels, 32, 32) and result["image"].dtype == torch.uint8
    assert result["label"] == 5
    assert item["image"] is not result["image"]


def test_grey_and_colour_turn_into_each_other_without_loss():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(to_item({"image": grey}, 16, 1)["image"][0], grey)
    colour = to_item({"image": grey}, 16, 3)["image"]
    assert all(np.array_equal(plane, grey) for plane in colour)
    back = to_item({"image": colour.permute(1, 2, 0).numpy()}, 16, 1)["image"]
    assert np.array_equal(back[0], grey)


def test_the_centre_of_the_long_side_is_kept():
    image = np.zeros((10, 30), np.uint8)
    image[:, 10:20] = 255
    assert (to_item({"image": image}, 10, 1)["image"] == 255).all()
    assert (to_item({"image": image.T.copy()}, 10, 1)["image"] == 255).all()


def test_shrinking_averages_and_does_not_pick_pixels():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    image = to_item({"image": stripes}, 8, 1)["image"].float()
    assert (image - 127.5).abs().max() < 20


def test_boxes_follow_their_image():
    item = boxed(np.zeros((20, 40, 3), np.uint8), [20, 0, 30, 10], (20, 40))
    result = to_item(item, 10, 3)
    assert result["boxes"].tolist() == [[5, 0, 10, 5]]
    assert result["boxes"].canvas_size == (10, 10)
    assert result["vector"].tolist() == [0, 1, 2, 3] and result["name"] == "a"


@pytest.mark.parametrize("size, channels, message", [(0, 3, "img_size is 0"), (8, 2, "n_channels is 2: give 1")])
def test_impossible_sizes_and_channels_are_refused(size, channels, message):
    with pytest.raises(ValueError, match=message):
        to_item({"image": np.zeros((8, 8), np.uint8)}, size, channels)


PIXELS = torch.arange(1, 13, dtype=torch.uint8).view(1, 3, 4)


@pytest.mark.parametrize(
    "view, rows",
    [
        (View(), [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]),
        (View(flip=True), [[4, 3, 2, 1], [8, 7, 6, 5], [12, 11, 10, 9]]),
        (View(dx=1), [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11]]),
        (View(dy=-1), [[5, 6, 7, 8], [9, 10, 11, 12], [0, 0, 0, 0]]),
        (View(flip=True, dx=1, dy=1), [[0, 0, 0, 0], [0, 4, 3, 2], [0, 8, 7, 6]]),
    ],
)
def test_a_view_mirrors_first_and_then_moves(view, rows):
    image = tv_tensors.Image(PIXELS)
    moved = view({"image": image, "label": 1})
    assert moved["image"].tolist() == [rows] and isinstance(moved["image"], tv_tensors.Image)
    assert moved["label"] == 1
    assert image.tolist() == PIXELS.tolist()


def test_boxes_and_masks_move_with_their_image():
    item = boxed(tv_tensors.Image(torch.zeros(3, 8, 10)), [1, 2, 4, 5], (8, 10))
    item["image"][:, 2:5, 1:4] = 1
    item["mask"] = tv_tensors.Mask(item["image"][0].long())
    moved = View(flip=True, dx=1, dy=2)(item)
    assert moved["boxes"].tolist() == [[7, 4, 10, 7]]
    assert (moved["image"][:, 4:7, 7:10] == 1).all() and moved["image"].sum() == 27
    assert torch.equal(moved["mask"], moved["image"][0].long())
    assert moved["vector"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("flip, shift, count", [(False, 0, 1), (True, 0, 2), (False, 1, 9), (True, 2, 50)])
def test_all_views_are_different_and_the_first_changes_nothing(flip, shift, count):
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8)
    seen = [view(image) for view in views(flip, shift)]
    assert len(seen) == count == len({tuple(view.flatten().tolist()) for view in seen})
    assert torch.equal(seen[0], image)


def test_a_negative_shift_is_refused():
    with pytest.raises(ValueError, match="shift is -1"):
        views(False, -1)


def test_all_256_values_survive_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert floats[0] == -1 and floats[255] == 1
    assert torch.equal(to_uint8(floats), values)


def test_to_uint8_rounds_and_clamps():
    floats = torch.tensor([-3.0, -1.0, (99.6 / 127.5) - 1, (100.4 / 127.5) - 1, 1.0, 1.2])
    assert to_uint8(floats).tolist() == [0, 0, 100, 100, 255, 255]


def test_to_float_refuses_what_has_been_scaled():
    with pytest.raises(ValueError, match="image is torch.float32"):
        to_float(torch.zeros(3))
