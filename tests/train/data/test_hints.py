"""Hints: edges are where the brightness jumps, every hint follows its image, and the classes have their colours."""

import sys

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from helpers.region_images import face_dataset, mirrored_face
from train.data.collate import collate
from train.data.hints import HINTS, HintMaker, HintsConfig, class_color, find_edges, hint_channels, with_hints
from train.data.transforms import View, to_item

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 24, 3), np.uint8)


def pair_item(size=(32, 24)):
    """An item of a picture with a disc, its source, and a box."""
    y, x = np.mgrid[: size[0], : size[1]]
    image = PICTURE[: size[0], : size[1]] // 8 + (160 * ((y - 14) ** 2 + (x - 9) ** 2 < 50))[..., None].astype(np.uint8)
    boxes = torch.tensor([[2.0, 7.0, 17.0, 22.5], [-3.0, -3.0, 5.0, 5.0]])
    masks = torch.from_numpy(np.stack([image[..., 0] > 120, (y > 18) & (x < 8)]).astype(np.uint8))
    return {
        "image": tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)),
        "source_image": tv_tensors.Image(255 - torch.from_numpy(image).permute(2, 0, 1)),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size, clamping_mode=None),
        "box_class": torch.tensor([1, 4]),
        "masks": tv_tensors.Mask(masks),
    }


def test_an_edge_is_where_the_brightness_jumps():
    """The contour of a disc: each edge pixel lies within a pixel of it, and each of its directions has one."""
    y, x = np.mgrid[:64, :64] - 31.5
    radius = np.hypot(y, x)
    disc = np.clip(20.5 - radius, 0, 1) * 0.5 + 0.2
    edges = find_edges(disc, 1.0, 0.1, 0.2)
    assert np.abs(radius[edges] - 20).max() < 1
    directions = np.histogram(np.arctan2(y, x)[edges], 36, (-np.pi, np.pi))[0]
    assert directions.min() >= 2 and edges.sum() < 1.6 * 2 * np.pi * 20  # thin


def test_a_flat_or_smooth_image_has_no_edges():
    ramp = np.linspace(0, 1, 64) * np.ones((64, 1))
    assert not find_edges(np.full((8, 8), 0.7), 1.0, 0.1, 0.2).any()
    assert not find_edges(ramp, 1.0, 0.15, 0.2).any()  # 8 / 63 = 0.127
    assert find_edges(ramp, 1.0, 0.1, 0.12).any()


def test_weak_edges_count_if_connected_with_strong_ones():
    """Two bars whose contrast fades: alone the weak part is no edge, with a strong end it is all one."""
    fading = np.zeros((40, 60))
    fading[18:22] = np.linspace(0.02, 0.5, 60)
    weak = np.zeros((40, 60))
    weak[18:22] = np.linspace(0.02, 0.04, 60)
    edges = find_edges(fading, 1.0, 0.1, 1.0)
    sobel = 4 * np.linspace(0.02, 0.5, 60)  # at most, of a step of this height
    assert edges[:, 20].any() and sobel[20] < 1.0
    assert not find_edges(fading, 1.0, 1.0, 1.0)[:, 20].any()
    assert find_edges(weak, 1.0, 0.05, 0.05).any() and not find_edges(weak, 1.0, 0.05, 1.0).any()


def test_edges_do_not_depend_on_the_side():
    image = np.random.default_rng(1).integers(0, 256, (40, 33)).astype(float) / 255
    edges = find_edges(image, 1.5, 0.1, 0.3)
    assert 0.02 < edges.mean() < 0.4
    for turn in (np.fliplr, np.flipud, np.transpose):
        assert np.array_equal(find_edges(turn(image), 1.5, 0.1, 0.3), turn(edges))
    two = np.zeros((8, 8))
    two[:, 4:] = 1  # both columns beside the jump have the same gradient; a border has no edges
    inner = find_edges(two, 1.0, 0.1, 0.2)[1:-1]
    assert np.array_equal(inner, np.isin(np.arange(8), (3, 4)) * np.ones((6, 1), bool))


def test_edges_without_scikit_image_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        find_edges(np.zeros((8, 8)), 1.0, 0.1, 0.2)


@pytest.mark.parametrize("kind", HINTS)
def test_the_hint_of_a_mirrored_item_is_mirrored(kind):
    item, maker = pair_item(), HintMaker(kind)
    hint, mirrored = maker(item), maker(View(flip=True)(item))
    assert type(hint) is tv_tensors.Image and hint.dtype == torch.uint8
    assert hint.shape == (hint_channels(kind, 3), 32, 24) and 0 < (hint > 0).double().mean()
    difference = (mirrored.as_subclass(torch.Tensor).int() - hint.as_subclass(torch.Tensor).flip(-1).int()).abs()
    assert difference.max() <= (1 if kind == "small" else 0)  # half a level may be rounded up or down
    assert not torch.equal(hint, hint.flip(-1))


@pytest.mark.parametrize("kind", ["image", "mask", "boxes", "grey"])
def test_the_hint_of_a_crop_is_a_crop_of_the_hint(kind):
    item, maker, view = pair_item(), HintMaker(kind), View(crop=(4, 6, 16, 12))
    assert torch.equal(maker(view(item)), view(maker(item)))


def test_the_colours_of_boxes_and_masks_are_those_of_classes():
    item = pair_item()
    boxes, mask = HintMaker("boxes")(item), HintMaker("mask")(item)
    assert boxes[:, 7, 2].tolist() == boxes[:, 22, 16].tolist() == list(class_color(1))  # a pixel touched in part
    assert boxes[:, 15, 10].tolist() == boxes[:, 7, 17].tolist() == [0, 0, 0]
    assert boxes[:, 4, 0].tolist() == list(class_color(4)) and boxes[:, 0, 0].tolist() == [0, 0, 0]  # its edge: outside
    masks = item["masks"].as_subclass(torch.Tensor) > 0
    assert (masks[0] & masks[1]).any()
    wanted = torch.tensor(class_color(4))[:, None].expand(3, int(masks[1].sum()))
    assert torch.equal(mask.as_subclass(torch.Tensor)[:, masks[1]].long(), wanted)  # the later is in front
    assert not mask[:, ~(masks[0] | masks[1])].any()


def test_all_kinds_of_maps_give_the_same_mask():
    item = to_item(face_dataset()[3], (8, 12), 1)  # its parts do not overlap
    mask = HintMaker("mask")
    semantic = mask({**item, "semantic": tv_tensors.Mask(item["semantic"].where(item["panoptic"] > 0, 255))})
    panoptic = mask({name: value for name, value in item.items() if name != "semantic"})
    masks = mask({name: item[name] for name in ("image", "masks", "box_class")})
    assert torch.equal(semantic, panoptic) and torch.equal(panoptic, masks) and semantic.any()
    plain = mask({"image": item["image"], "mask": tv_tensors.Mask(item["panoptic"] > 0)})
    assert torch.equal(plain.amax(0) > 0, item["panoptic"] > 0)
    mirrored = to_item(mirrored_face(3), (8, 12), 1)
    assert torch.equal(mask(mirrored), mask(face_dataset().sides.swap(View(flip=True)(item))))


def test_grey_is_luma_and_small_is_a_mean():
    item = {"image": tv_tensors.Image(torch.tensor([255, 100, 10], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8))}
    grey = HintMaker("grey")(item)
    assert grey.unique().tolist() == [round(0.299 * 255 + 0.587 * 100 + 0.114 * 10)]
    assert torch.equal(HintMaker("small")(item), item["image"])
    noise = {"image": tv_tensors.Image(torch.from_numpy(PICTURE[..., :1]).permute(2, 0, 1))}
    small = HintMaker("small", HintsConfig(small_factor=8))(noise).as_subclass(torch.Tensor).double()
    means = torch.nn.functional.avg_pool2d(noise["image"].as_subclass(torch.Tensor)[None].double(), 8)[0]
    again = torch.nn.functional.avg_pool2d(small[None], 8)[0]
    assert (again - means).abs().max() < 15 and small.std() < 0.3 * noise["image"].double().std()
    with pytest.raises(ValueError, match="small_factor 5 for images of 32x24 .* a divisor"):
        HintMaker("small", HintsConfig(small_factor=5))(noise)


def test_hints_of_float_images_are_those_of_their_levels():
    item = pair_item()
    floats = item | {"image": tv_tensors.Image(item["image"] / 127.5 - 1)}
    for kind in ("edges", "grey", "small"):
        assert torch.equal(HintMaker(kind)(floats), HintMaker(kind)(item))


def test_hints_are_added_to_items_and_scaled_in_batches():
    item, calls = pair_item(), []
    adapt = with_hints(lambda each: calls.append(1) or each, {"condition_image": "edges", "hint_image": "image"})
    batch = collate([adapt(item), adapt(item)])
    assert len(calls) == 2 and batch["condition_image"].shape == (2, 1, 32, 24)
    assert batch["condition_image"].unique().tolist() == [-1, 1]
    assert (batch["hint_image"] + batch["image"]).abs().max() < 1e-6
    assert with_hints(None, {"condition_image": ""}) is None and with_hints(adapt, {}) is adapt


def test_what_a_hint_is_made_of_is_named_if_missing():
    item = {"image": tv_tensors.Image(torch.zeros(2, 8, 8, dtype=torch.uint8))}
    for kind, missing in (("image", "no source_image"), ("boxes", "no boxes"), ("mask", "no semantic, panoptic")):
        with pytest.raises(ValueError, match=f"the items have {missing}.*--dataset"):
            HintMaker(kind)(item)
    for kind in ("edges", "grey"):
        with pytest.raises(ValueError, match="images of 2 channels .* wanted 1 or 3"):
            HintMaker(kind)(item)
    with pytest.raises(ValueError, match="a field hint_image already, got the hint small.*leave the hint out"):
        with_hints(None, {"hint_image": "small"})(item | {"hint_image": item["image"]})
    with pytest.raises(ValueError, match="edge_thresholds 0.3 0.1, wanted the lower first"):
        HintsConfig(edge_thresholds=(0.3, 0.1))
