"""Conversion of items (size, channels, value range) and views."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from train.config import DataConfig
from train.data.transforms import (
    View,
    all_views,
    check_8_bits,
    cover_size,
    five_crops,
    from_unit_range,
    to_float,
    to_item,
    to_uint8,
    training_views,
    warn_if_dark,
)
from train.datasets import FloatImage, Ragged, UnreadableImage


def item_with_box(image, box, size):
    boxes = tv_tensors.BoundingBoxes(torch.tensor([box]), format="XYXY", canvas_size=size)
    return {"image": image, "label": 3, "boxes": boxes, "name": "a", "vector": torch.arange(4)}


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("shape", [(8, 8), (50, 20), (20, 50, 3), (32, 32, 3)])
@pytest.mark.parametrize("pil", [False, True])
def test_every_image_becomes_a_square_of_n_channels(n_channels, shape, pil):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    item = {"image": Image.fromarray(array) if pil else array, "label": 5}
    result = to_item(item, (32, 32), n_channels)
    assert isinstance(result["image"], tv_tensors.Image)
    assert result["image"].shape == (n_channels, 32, 32) and result["image"].dtype == torch.uint8
    assert result["label"] == 5
    assert item["image"] is not result["image"]


def test_grey_and_rgb_convert_without_loss():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(to_item({"image": grey}, (16, 16), 1)["image"][0], grey)
    colour = to_item({"image": grey}, (16, 16), 3)["image"]
    assert all(np.array_equal(plane, grey) for plane in colour)
    back = to_item({"image": colour.permute(1, 2, 0).numpy()}, (16, 16), 1)["image"]
    assert np.array_equal(back[0], grey)


def test_the_centre_of_the_long_side_is_kept():
    image = np.zeros((10, 30), np.uint8)
    image[:, 10:20] = 255
    assert (to_item({"image": image}, (10, 10), 1)["image"] == 255).all()
    assert (to_item({"image": image.T.copy()}, (10, 10), 1)["image"] == 255).all()


@pytest.mark.parametrize("n_channels", [1, 3, 5])
def test_items_of_the_wanted_size_are_not_resized(n_channels, monkeypatch):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 8, n_channels) if n_channels > 1 else (6, 8), np.uint8)
    item = item_with_box(image, [-1.5, 2, 9, 5], (6, 8))
    item["masks"] = tv_tensors.Mask(torch.from_numpy(rng.integers(0, 2, (2, 6, 8), np.uint8)))
    item["panoptic"] = tv_tensors.Mask(torch.arange(48, dtype=torch.int32).view(6, 8))
    item["depth"] = tv_tensors.Image(3 * torch.rand(1, 6, 8, generator=torch.Generator().manual_seed(0)) - 1.5)
    resized, resize = [], F.resize
    monkeypatch.setattr(F, "resize", lambda inpt, *a, **kw: resized.append(type(inpt)) or resize(inpt, *a, **kw))
    result = to_item(item, (6, 8), n_channels)
    assert set(resized) <= {tv_tensors.BoundingBoxes}
    assert result["image"].dtype == torch.uint8
    assert torch.equal(result["image"], torch.from_numpy(image.reshape(6, 8, n_channels)).permute(2, 0, 1))
    assert torch.equal(result["masks"], item["masks"]) and torch.equal(result["panoptic"], item["panoptic"])
    assert torch.equal(result["depth"], item["depth"].clamp(-1, 1))
    assert result["boxes"].tolist() == [[0, 2, 8, 5]]  # clamped as ever
    assert all(type(result[name]) is type(item[name]) for name in ("masks", "panoptic", "depth", "boxes"))


def test_masks_of_another_size_are_resized_all_the_same():
    item = {"image": np.zeros((6, 8), np.uint8), "classes": tv_tensors.Mask(torch.arange(48).view(6, 8))}
    item["classes"] = tv_tensors.Mask(item["classes"].repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert to_item(item, (6, 8), 1)["classes"].tolist() == torch.arange(48).view(6, 8).tolist()


def test_the_cost_of_an_image_does_not_grow_with_its_length(monkeypatch):
    resized, resize = [], F.resize
    monkeypatch.setattr(F, "resize", lambda inpt, size, *options, **named: resized.append(size) or resize(inpt, size))
    for shape in [(30_000, 1), (1, 30_001), (30_000, 3)]:
        grey, levels = np.full(shape, 200, np.uint8), np.full(shape, 40_000, np.uint16)
        mask, item = tv_tensors.Mask(torch.from_numpy(grey)), item_with_box(grey, [0, 0, *shape[::-1]], shape)
        converted = to_item(item | {"mask": mask}, (16, 24), 1)
        assert (converted["image"] == 200).all() and (converted["mask"] == 200).all()
        assert converted["boxes"].tolist() == [[0, 0, 24, 16]]
        assert to_item({"image": levels}, (16, 24), 1, (0, 65535))["image"].unique().item() == pytest.approx(
            0.2207, 1e-3
        )
    assert len(resized) == 12 and max(height * width for height, width in resized) < 40 * 16 * 24


@pytest.mark.parametrize("shape", [(1_001, 5), (5, 1_000), (990, 30, 3)])
def test_a_trimmed_image_shows_what_it_would_in_full(shape, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    trimmed = to_item({"image": image}, (10, 12), 1)["image"].int()
    monkeypatch.setattr("train.data.transforms.LONGEST", 10_000)
    assert (trimmed - to_item({"image": image}, (10, 12), 1)["image"].int()).abs().float().mean() < 1


def test_a_dark_scan_is_noticed():
    scan = np.array([[0, 17], [4000, 9]], np.uint16)
    with pytest.warns(UserWarning, match="no value above 4000, .* pass --data_range 0 4095"):
        warn_if_dark(Image.fromarray(scan))
    for image in (scan * 16, scan * 0, scan.astype(np.uint8), Image.fromarray(scan.astype(np.uint8))):
        warn_if_dark(image)


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 16), (7, 30)])
@pytest.mark.parametrize("height, width", [(40, 40), (33, 77), (77, 33), (5, 9), (16, 24), (1, 200)])
def test_cover_size_keeps_the_aspect_and_just_covers(size, height, width):
    high, wide = cover_size(height, width, size)
    assert high >= size[0] and wide >= size[1] and (high == size[0] or wide == size[1])
    scale = max(size[0] / height, size[1] / width)
    assert abs(high - scale * height) < 1 and abs(wide - scale * width) < 1


@pytest.mark.parametrize("shape", [(50, 20, 3), (20, 50, 3), (37, 23, 3), (11, 90, 3)])
def test_squares_match_resizing_the_short_side(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    fitted = F.center_crop(F.resize(image, [16], F.InterpolationMode.BICUBIC, antialias=True), [16])
    assert torch.equal(to_item({"image": image}, (16, 16), 3)["image"], F.to_image(fitted))


def test_non_square_sizes_are_cropped_at_the_centre():
    image = np.zeros((10, 30), np.uint8)
    image[:, 5:25] = 255
    for size, pixels in [((10, 20), image), ((20, 10), image.T.copy())]:
        item = to_item({"image": pixels}, size, 1)["image"]
        assert item.shape == (1, *size) and (item == 255).all()
    # taller than the target: rows are cropped, columns are not
    rows = np.arange(40, dtype=np.uint8)[:, None].repeat(20, 1)
    assert to_item({"image": rows}, (10, 20), 1)["image"][0, :, 7].tolist() == list(range(15, 25))


def test_masks_and_boxes_follow_a_non_square_image():
    item = item_with_box(np.zeros((20, 40, 3), np.uint8), [20, 0, 30, 10], (20, 40)) | {
        "mask": tv_tensors.Mask(torch.arange(40).expand(20, 40).clone())
    }
    result = to_item(item, (20, 30), 3)
    assert result["image"].shape == (3, 20, 30)
    assert result["boxes"].tolist() == [[15, 0, 25, 10]] and result["boxes"].canvas_size == (20, 30)
    assert result["mask"][3].tolist() == list(range(5, 35))


def test_downscaling_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    image = to_item({"image": stripes}, (8, 8), 1)["image"].float()
    assert (image - 127.5).abs().max() < 20


def test_boxes_follow_their_image():
    item = item_with_box(np.zeros((20, 40, 3), np.uint8), [20, 0, 30, 10], (20, 40))
    result = to_item(item, (10, 10), 3)
    assert result["boxes"].tolist() == [[5, 0, 10, 5]]
    assert result["boxes"].canvas_size == (10, 10)
    assert result["vector"].tolist() == [0, 1, 2, 3] and result["name"] == "a"


LABEL_MAP = torch.tensor([0, 1, 2, 17], dtype=torch.uint8).repeat_interleave(4).view(4, 4).repeat_interleave(3, 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_label_maps_are_resized_without_new_labels(dtype):
    item = {"image": np.zeros((12, 4), np.uint8), "classes": tv_tensors.Mask(LABEL_MAP.to(dtype))}
    item["several"] = tv_tensors.Mask(torch.stack([LABEL_MAP == 17, LABEL_MAP == 1]))
    result = to_item(item, (8, 8), 1)
    assert result["classes"].shape == (8, 8) and result["classes"].dtype == dtype
    assert set(result["classes"].unique().tolist()) <= set(LABEL_MAP.to(dtype).unique().tolist())
    assert result["several"].shape == (2, 8, 8) and result["several"].dtype == torch.bool


def test_boxes_outside_the_image_keep_their_rows():
    """The centre of a wide image is cropped: one box is cut, one is outside, one inside."""
    item = item_with_box(np.zeros((10, 30), np.uint8), [5, 0, 15, 10], (10, 30))
    rows = torch.tensor([[5, 0, 15, 10], [0, 2, 8, 4], [12, 1, 14, 3]])
    item["boxes"] = tv_tensors.wrap(rows, like=item["boxes"])
    cropped = to_item(item, (10, 10), 1)["boxes"]
    assert cropped.tolist() == [[0, 0, 5, 10], [0, 2, 0, 4], [2, 1, 4, 3]]
    moved = View(dx=7, dy=-2)({"boxes": cropped})["boxes"]
    assert moved.tolist() == [[7, 0, 10, 8], [7, 0, 7, 2], [9, 0, 10, 1]] and moved.canvas_size == (10, 10)


@pytest.mark.parametrize("view", [View(), View(flip=True, dx=1), View(crop=(1, 1, 4, 4)), View(dy=-2, flip=True)])
def test_empty_boxes_and_masks_are_transformed(view):
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(6, 6))
    item = {"image": np.zeros((6, 6), np.uint8), "boxes": boxes, "masks": tv_tensors.Mask(torch.zeros(0, 6, 6))}
    moved = view(to_item(item, (6, 6), 1))
    size = (4, 4) if view.crop else (6, 6)
    assert moved["boxes"].shape == (0, 4) and moved["boxes"].canvas_size == size
    assert moved["masks"].shape == (0, *size)


def test_a_view_moves_tv_tensors_but_not_plain_tensors():
    item = {"vector": torch.arange(6).view(2, 3), "classes": tv_tensors.Mask(torch.arange(6).view(2, 3)), "name": "a"}
    moved = View(flip=True)(item)
    assert moved["vector"].tolist() == [[0, 1, 2], [3, 4, 5]] and moved["name"] == "a"
    assert moved["classes"].tolist() == [[2, 1, 0], [5, 4, 3]]


SIXTEEN = np.array([[0, 2048, 4095, 5000]], np.uint16)


@pytest.mark.parametrize("image", [SIXTEEN, Image.fromarray(SIXTEEN)])
def test_sixteen_bit_images_are_scaled_by_the_data_range(image):
    pixels = to_item({"image": image}, (1, 4), 1, (0, 4095))["image"]
    assert isinstance(pixels, tv_tensors.Image) and pixels.dtype == torch.float32
    assert torch.allclose(pixels[0, 0], torch.tensor([-1, 2048 / 4095 * 2 - 1, 1, 1]), atol=1e-6)
    assert from_unit_range(pixels[0, 0, :3], (0, 4095)).round().tolist() == [0, 2048, 4095]
    eight = to_item({"image": image}, (1, 4), 1)["image"]  # without a range
    assert eight.dtype == torch.uint8 and eight.flatten().tolist() == [0, 8, 16, 19]


@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8, 3)])
def test_floats_are_resized_like_eight_bit_images(n_channels, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    eight = to_item({"image": array}, (12, 10), n_channels)["image"]
    floats = to_item({"image": FloatImage(array / np.float32(255), (0.0, 1.0))}, (12, 10), n_channels)["image"]
    assert floats.shape == eight.shape and floats.abs().max() <= 1
    distance = (to_uint8(floats).float() - eight.float()).abs()
    assert distance.max() <= 4 and distance.mean() < 0.5  # PIL rounds and clamps after each axis


def test_a_given_range_overrides_the_declared_one():
    image = FloatImage(np.array([[0.0, 2.0]], np.float32), (0.0, 2.0))
    assert to_item({"image": image}, (1, 2), 1)["image"].tolist() == [[[-1, 1]]]
    assert to_item({"image": image}, (1, 2), 1, (0.0, 4.0))["image"].tolist() == [[[-1, 0]]]
    assert to_item({"image": image.pixels}, (1, 2), 1, (0.0, 4.0))["image"].tolist() == [[[-1, 0]]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_pixels_are_refused(value):
    pixels = np.zeros((4, 4), np.float32)
    pixels[1, 2] = value
    for image, data_range in ((FloatImage(pixels, (0, 1)), None), (pixels, (0, 1))):
        with pytest.raises(UnreadableImage, match="image has pixels that are nan or infinite"):
            to_item({"image": image}, (4, 4), 1, data_range)


def test_boxes_with_clamping_mode_none_are_not_clamped():
    boxes = torch.tensor([[0, 0, 4, 4], [10, 4, 16, 8]])  # the centre of the wide image is x from 4 to 12
    for mode, expected in (("soft", [[0, 0, 0, 4], [6, 4, 8, 8]]), (None, [[-4, 0, 0, 4], [6, 4, 12, 8]])):
        bounding_boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(8, 16), clamping_mode=mode)
        item = {"image": np.zeros((8, 16), np.uint8), "boxes": bounding_boxes}
        assert to_item(item, (8, 8), 1)["boxes"].tolist() == expected


@pytest.mark.parametrize(
    ("image", "data_range", "message"),
    [
        (np.zeros((2, 2), np.uint8), (0, 9), "8-bit.*leave --data_range out"),
        (Image.new("RGB", (2, 2)), (0, 9), "8-bit.*leave --data_range out"),
        (np.zeros((2, 2), np.float32), None, "unknown range: pass --data_range"),
        (np.zeros((2, 2), np.int64), None, "an image of int64, wanted"),
        (torch.zeros(2, 2), None, "an image of torch.float32, wanted"),
        (FloatImage(np.zeros((2, 2)), (1.0, 1.0)), None, "lower first"),
        (FloatImage(np.zeros((2, 2, 4)), (0.0, 1.0)), None, r"\(2, 2, 4\), wanted \(H, W\)"),
    ],
)
def test_images_of_unknown_range_or_type_are_refused(image, data_range, message):
    with pytest.raises(ValueError, match=message):
        to_item({"image": image}, (2, 2), 1, data_range)


def test_shifts_uncover_black_in_float_images_too():
    image = tv_tensors.Image(torch.full((1, 3, 4), 0.5))
    assert View(dx=1, dy=-1)({"image": image})["image"].tolist() == [[[-1, 0.5, 0.5, 0.5]] * 2 + [[-1] * 4]]
    assert View(dx=-1)(image)[0, 0].tolist() == [0.5, 0.5, 0.5, -1]
    depth = tv_tensors.Mask(torch.full((3, 4), 0.5))
    assert View(dx=1)({"depth": depth})["depth"][0].tolist() == [0, 0.5, 0.5, 0.5]


def test_levels_become_floats_in_a_tensor_of_their_own():
    image = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(image), image / 127.5 - 1)
    assert torch.equal(image, torch.arange(256, dtype=torch.uint8))
    with pytest.raises(ValueError, match="scaled already"):
        to_float(image / 255)


def test_bits_per_dimension_need_eight_bit_images():
    check_8_bits(to_float(torch.arange(256, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="not 8-bit"):
        check_8_bits(torch.tensor([1000 / 32767.5 - 1]))


@pytest.mark.parametrize(
    "size, channels, message",
    [
        ((8, 0), 3, r"size is \(8, 0\)"),
        ((0, 8), 3, r"size is \(0, 8\)"),
        ((8, 8), 2, r"wanted \(H, W, 2\) or \(2, H, W\)"),
    ],
)
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
def test_a_view_mirrors_before_it_shifts(view, rows):
    image = tv_tensors.Image(PIXELS)
    moved = view({"image": image, "label": 1})
    assert moved["image"].tolist() == [rows] and isinstance(moved["image"], tv_tensors.Image)
    assert moved["label"] == 1
    assert image.tolist() == PIXELS.tolist()


def test_boxes_and_masks_move_with_their_image():
    item = item_with_box(tv_tensors.Image(torch.zeros(3, 8, 10, dtype=torch.uint8)), [1, 2, 4, 5], (8, 10))
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
    outputs = [view(image) for view in all_views(flip, shift)]
    assert len(outputs) == count == len({tuple(view.flatten().tolist()) for view in outputs})
    assert torch.equal(outputs[0], image)


def test_a_negative_shift_is_refused():
    with pytest.raises(ValueError, match="shift is -1"):
        all_views(False, -1)


def apply_training_views(image, margin, size, flip=False):
    """Applies each training view to an image."""
    data = DataConfig(img_size=size[0], img_width=size[1], crop_margin=margin, horizontal_flip=flip)
    return [view(image) for view in training_views(data)]


@pytest.mark.parametrize("margin", [2, 3, 4])
def test_crops_are_the_centre_and_the_four_corners(margin):
    image = torch.arange(1, 1 + (6 + margin) * (8 + margin)).view(1, 6 + margin, 8 + margin)
    outputs = apply_training_views(image, margin, (6, 8))
    middle = image[:, margin // 2 :, margin // 2 :][:, :6, :8]
    corners = [image[:, :6, :8], image[:, :6, margin:], image[:, margin:, :8], image[:, margin:, margin:]]
    assert len(outputs) == 5 and all(torch.equal(a, b) for a, b in zip(outputs, [middle, *corners], strict=True))
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_flips_double_the_five_crops():
    image = torch.arange(1, 131).view(1, 10, 13)
    outputs = apply_training_views(image, 4, (6, 9), flip=True)
    assert len(outputs) == 10 == len({tuple(view.flatten().tolist()) for view in outputs})
    assert all(torch.equal(outputs[5 + i], outputs[i].flip(-1)) for i in range(5))


def test_a_view_crops_before_it_mirrors_and_shifts():
    view = View(flip=True, dx=1, crop=(1, 2, 2, 2))
    assert view(tv_tensors.Image(PIXELS)).tolist() == [[[0, 8], [0, 12]]]


def test_boxes_and_masks_are_cropped_with_their_image():
    item = item_with_box(tv_tensors.Image(torch.zeros(3, 8, 10)), [3, 2, 6, 5], (8, 10))
    item["image"][:, 2:5, 3:6] = 1
    item["mask"] = tv_tensors.Mask(item["image"][0].long())
    for flip, left in [(False, 1), (True, 3)]:
        part = View(flip=flip, crop=(1, 2, 6, 7))(item)
        assert part["boxes"].tolist() == [[left, 1, left + 3, 4]] and part["boxes"].canvas_size == (6, 7)
        assert part["image"].shape == (3, 6, 7) and (part["image"][:, 1:4, left : left + 3] == 1).all()
        assert part["image"].sum() == 27 and torch.equal(part["mask"], part["image"][0].long())
        assert part["label"] == 3


@pytest.mark.parametrize("view", [View(crop=(0, 0, 3, 4)), View(crop=(1, 1, 2, 2)), View()])
def test_a_view_is_a_copy(view):
    image = tv_tensors.Image(PIXELS.clone())
    item = {"image": image, "words": ["a"], "ids": Ragged([1])}
    transformed = view(item)
    transformed["image"].zero_()
    transformed["words"].append("b")
    transformed["ids"].zero_()
    view(image).zero_()
    assert torch.equal(image, PIXELS) and item["words"] == ["a"] and item["ids"].tolist() == [1]


@pytest.mark.parametrize("crop", [(0, 0, 4, 4), (0, 1, 3, 4), (1, 0, 3, 4), (-1, 0, 3, 4), (0, -1, 3, 4)])
def test_a_crop_outside_the_image_is_refused(crop):
    with pytest.raises(ValueError, match="cannot crop .* from 3x4: .*--crop_margin"):
        View(crop=crop)(PIXELS)


def test_crops_of_images_without_a_margin_are_refused():
    views = training_views(DataConfig(img_size=3, img_width=4, crop_margin=2))
    for view in views[:1] + views[2:]:  # all but the top left corner
        with pytest.raises(ValueError, match="from 3x4"):
            view(PIXELS)


def test_the_key_of_a_view_without_a_crop_has_not_changed():
    assert [view.to_list() for view in all_views(True, 1)[::9]] == [[False, 0, 0], [True, 0, 0]]
    assert View(True, 2, -1).to_list() == [True, 2, -1]
    assert View(crop=(1, 2, 3, 4)).to_list() == [False, 0, 0, 1, 2, 3, 4] and not View(crop=(0, 0, 3, 4)).is_identity
    data = [DataConfig(img_size=8, img_width=w, crop_margin=m, horizontal_flip=True) for w in (8, 9) for m in (0, 2, 4)]
    keys = [[tuple(view.to_list()) for view in training_views(each)] for each in data]
    assert keys[0] == keys[3] == [(False, 0, 0), (True, 0, 0)]
    assert all(len(set(each)) == len(each) for each in keys) and len(set(map(tuple, keys))) == 5
    assert five_crops((8, 9), 0) == [None]


def test_all_256_values_survive_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert floats[0] == -1 and floats[255] == 1
    assert torch.equal(to_uint8(floats), values)


def test_to_uint8_rounds_and_clamps():
    floats = torch.tensor([-3.0, -1.0, (99.6 / 127.5) - 1, (100.4 / 127.5) - 1, 1.0, 1.2])
    assert to_uint8(floats).tolist() == [0, 0, 100, 100, 255, 255]


def test_to_float_refuses_floats():
    with pytest.raises(ValueError, match="image is torch.float32"):
        to_float(torch.zeros(3))
