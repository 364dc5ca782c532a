"""--patches: an image is a grid of items, with its boxes, masks, partner images and place in the order."""

import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from helpers.annotated_images import annotated_dataset, assert_same_fields
from helpers.region_images import SIDES, FaceDataset, face_dataset
from train.config import DataConfig
from train.data.image_cache import image_cache_key
from train.data.loading import ImageSource, TrainingImages, build_dataset, build_splits
from train.data.patches import PatchedDataset, cut_patch
from train.data.transforms import training_views
from train.datasets import ArrayDataset, Blocks, FloatImage, UnreadableImage, content_fingerprint
from train.datasets.digits import Config as Digits
from train.distributed import DistContext

DATA = DataConfig(dataset="digits", img_size=8, n_channels=1, patches=2)


def patched(patches=2, **options):
    return PatchedDataset(face_dataset(**options), patches, 1)


@pytest.mark.parametrize("patches", [2, 3, 4])
def test_patches_tile_every_image_once(patches):
    """Put together again, row by row, the patches are the image and its maps."""
    dataset, per_image = patched(patches), patches**2
    assert len(dataset) == 20 * per_image
    whole = face_dataset()[4]
    parts = [dataset[4 * per_image + i] for i in range(per_image)]
    for name in ("image", "semantic", "panoptic"):
        arrays = [np.asarray(part[name]) for part in parts]
        rows = [np.concatenate(arrays[i : i + patches], 1) for i in range(0, per_image, patches)]
        assert np.array_equal(np.concatenate(rows), np.asarray(whole[name])), name


def test_boxes_and_masks_of_a_patch_are_those_inside():
    """Rows without a part in the patch are dropped; the others keep their numbers, which may lie outside."""
    whole, parts = face_dataset()[4], [patched()[16 + i] for i in range(4)]
    assert [part["box_id"].tolist() for part in parts] == [[1, 4], [2], [3, 4], [3]]
    for i, part in enumerate(parts):
        top, left = 4 * (i // 2), 6 * (i % 2)
        rows = [number - 1 for number in part["box_id"].tolist()]
        assert part["boxes"].tolist() == (whole["boxes"][rows] - torch.tensor([left, top, left, top])).tolist()
        assert part["boxes"].canvas_size == (4, 6) and part["boxes"].clamping_mode is None
        assert torch.equal(part["masks"], whole["masks"][rows, top : top + 4, left : left + 6])
        assert part["box_words"] == [whole["box_words"][row] for row in rows]
        assert part["box_class"].tolist() == whole["box_class"][rows].tolist()
        assert part["segment_id"].tolist() == sorted({*part["panoptic"].flatten().tolist()} - {0})
        assert len(part["segment_class"]) == len(part["segment_id"])
        assert {name: type(value) for name, value in part.items()} == {n: type(v) for n, v in whole.items()}
        assert part["captions"] == whole["captions"] and part["file_name"] == whole["file_name"]


def test_clamped_boxes_are_clipped():
    item = face_dataset()[4]
    boxes = tv_tensors.BoundingBoxes(item["boxes"], format="XYXY", canvas_size=(8, 12))
    part = cut_patch(item | {"boxes": boxes}, 2, 2, 1)
    assert part["boxes"].tolist() == [[3, 1, 6, 3], [0, 0, 3, 2]] and part["box_id"].tolist() == [3, 4]
    empty = cut_patch(face_dataset()[0], 0, 2, 1)
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 4, 6)


def test_other_boxes_keep_their_rows():
    """Without box_class nothing says which fields have a row per box."""
    part = PatchedDataset(annotated_dataset(), 2, 1)[4 * 2]
    assert len(part["boxes"]) == len(part["ids"]) == len(part["parts"]) == 2
    assert part["label"] == 2 and part["vector"].tolist() == [2, -1]


@pytest.mark.parametrize("kind", ["pil", "last", "first", "float", "partner"])
def test_every_kind_of_image_is_cut(kind):
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    expected = pixels[2:, :3]
    images = {"pil": Image.fromarray(pixels), "last": pixels, "first": pixels.transpose(2, 0, 1)}
    images |= {"float": FloatImage(pixels.astype(np.float32), (0, 255)), "partner": pixels}
    item = {"image": images[kind], "after": tv_tensors.Image(torch.zeros(3, 10, 14))}
    part = cut_patch(item, 2, 2, 3)
    image = part["image"].pixels if kind == "float" else np.asarray(part["image"])
    assert np.array_equal(image.transpose(1, 2, 0) if kind == "first" else image, expected)
    assert part["after"].shape == (3, 5, 7)  # of its own size


def test_an_image_of_too_few_pixels_is_unreadable():
    with pytest.raises(UnreadableImage, match="image has 3x9 pixels, too few for --patches 4"):
        cut_patch({"image": np.zeros((3, 9), np.uint8)}, 0, 4, 1)


def test_patches_belong_to_the_identity_of_the_data():
    sets = plain, two, three = face_dataset(), patched(2), patched(3)
    for fingerprint in (lambda data: data.fingerprint(), content_fingerprint, lambda d: image_cache_key(d, (1, 8, 8))):
        assert len({fingerprint(each) for each in sets}) == 3
    assert two.sides is plain.sides and pickle.loads(pickle.dumps(three)).patches == 3


def test_one_patch_is_the_data_set_itself():
    whole, parts = (build_dataset(replace(DATA, patches=patches), Digits(), "train") for patches in (1, 2))
    assert isinstance(whole, ArrayDataset) and not isinstance(parts, ArrayDataset)
    assert len(parts) == 4 * len(whole) and parts.labels.tolist() == np.repeat(whole.labels, 4).tolist()
    assert parts.class_names == whole.class_names and parts.n_classes == whole.n_classes
    assert image_cache_key(whole, (1, 8, 8)) != image_cache_key(parts, (1, 8, 8))


def test_a_training_says_that_images_are_cut(capsys):
    splits = build_splits(DATA, Digits(), DistContext(torch.device("cpu")))
    printed = capsys.readouterr().out
    assert f"{len(splits['train']):,} training images" in printed and "each image is cut into 2 x 2 images" in printed


def test_blocks_of_images_are_blocks_of_patches():
    """Images stored together are read together: the order visits all patches of a few blocks at a time."""

    @dataclass(frozen=True, eq=False)
    class Sharded(FaceDataset):
        blocks: Blocks = Blocks((5, 15), 1)

    dataset = PatchedDataset(Sharded(**vars(face_dataset())), 2, 1)
    assert dataset.blocks == Blocks((20, 60), 1)
    order = TrainingImages(ImageSource(dataset, replace(DATA, patches=1)), 0).order
    epoch = [order[position] for position in range(80)]
    assert sorted(epoch) == list(range(80)) and {i < 20 for i in epoch[:20]} == {epoch[0] < 20}


def test_four_patches_and_their_mirrors_are_eight():
    data = replace(DATA, horizontal_flip=True)
    source, views = ImageSource(PatchedDataset(annotated_dataset(), 2, 1), data), training_views(data, SIDES)
    seen = {tuple(view(source[index])["image"].flatten().tolist()) for index in range(16, 20) for view in views}
    assert len(seen) == 8


@pytest.mark.parametrize("cache", [False, True])
def test_patches_survive_the_image_cache(tmp_path, cache):
    data = replace(DATA, cache_images=cache, img_width=12)
    source, plain = ImageSource(patched(), data, tmp_path), ImageSource(patched(), replace(DATA, img_width=12))
    for index in (16, 19, 3):
        assert_same_fields(source[index], plain[index])
