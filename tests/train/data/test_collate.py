"""Fields are batched by type, and an example does not depend on the rest of its batch."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from helpers.annotated_images import CLASSES, FIELDS, annotated_dataset, assert_same_fields
from train.config import DataConfig
from train.data.codes import TrainingCodes
from train.data.collate import collate, field_to_tensor
from train.data.loading import ImageSource, TrainingImages, to_device, training_batches
from train.data.transforms import to_float
from train.datasets import FloatImage, Ragged
from train.distributed import DistContext

WORLD = DistContext(torch.device("cpu"))
CONFIG = DataConfig(dataset="mine", img_size=8, n_channels=1, horizontal_flip=True)


def boxes(*rows, format="XYXY"):
    numbers = torch.tensor(rows, dtype=torch.int64).view(-1, 4)
    return tv_tensors.BoundingBoxes(numbers, format=format, canvas_size=(8, 8))


def test_images_with_labels_are_scaled_and_stacked():
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    batch = collate([{"image": tv_tensors.Image(image), "label": i} for i, image in enumerate(images)])
    assert list(batch) == ["image", "label"] and all(type(value) is torch.Tensor for value in batch.values())
    assert torch.equal(batch["image"], images.float() / 127.5 - 1)
    assert batch["label"].dtype == torch.int64 and batch["label"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.int16, torch.bool])
@pytest.mark.parametrize("wrap", [lambda x: x, tv_tensors.Mask])
def test_label_maps_and_ids_stay_integers(dtype, wrap):
    maps = torch.tensor([[CLASSES, CLASSES[::-1]]] * 2).to(dtype)
    batch = collate([{"classes": wrap(label_map)} for label_map in maps])
    assert batch["classes"].dtype == dtype and torch.equal(batch["classes"], maps)
    assert list(batch) == ["classes"]


@pytest.mark.parametrize("name", ["image", "condition_image", "depth_image"])
def test_a_plain_tensor_is_an_image_by_its_name(name):
    pixels = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert collate([{name: pixels}])[name].tolist() == [[[[-1, 1]]]]
    mask = tv_tensors.Mask(pixels[0])  # the type takes precedence over the name
    assert collate([{name: mask}])[name].tolist() == [[[0, 255]]]
    assert collate([{"sketch": tv_tensors.Image(pixels)}])["sketch"].tolist() == [[[[-1, 1]]]]
    assert collate([{"sketch": pixels}])["sketch"].tolist() == [[[[0, 255]]]]


def test_float_images_are_not_rescaled():
    image = torch.tensor([[[-1.0, 0.25]]])
    assert torch.equal(collate([{"image": tv_tensors.Image(image)}])["image"], image[None])


def test_ragged_fields_are_padded_beside_a_mask():
    items = [
        {"boxes": boxes([1, 2, 3, 4], [5, 6, 7, 8]), "ids": Ragged([17, 2])},
        {"boxes": boxes(), "ids": Ragged(torch.zeros(0, dtype=torch.int64))},
        {"boxes": boxes([0, 0, 1, 1]), "ids": Ragged([1])},
    ]
    batch = collate(items)
    pixels = [[[1, 2, 3, 4], [5, 6, 7, 8]], [[0] * 4] * 2, [[0, 0, 1, 1], [0] * 4]]
    assert batch["boxes"].dtype == torch.float32 and torch.equal(batch["boxes"], torch.tensor(pixels) / 8)
    assert batch["ids"].tolist() == [[17, 2], [0, 0], [1, 0]] and batch["ids"].dtype == torch.int64
    for name in ("boxes_mask", "ids_mask"):
        assert batch[name].tolist() == [[True, True], [False, False], [True, False]]


FORMATS = {  # of a box of 4 x 6 pixels at (2, 1)
    "XYXY": [2.0, 1, 6, 7],
    "XYWH": [2, 1, 4, 6],
    "CXCYWH": [4, 4, 4, 6],
    "XYWHR": [2, 1, 4, 6, 0],
    "CXCYWHR": [4, 4, 6, 4, 90],
    "XYXYXYXY": [2, 1, 6, 1, 6, 7, 2, 7],
}


@pytest.mark.parametrize("format", [each.name for each in tv_tensors.BoundingBoxFormat])
def test_boxes_of_any_format_become_fractions_of_their_image(format):
    box = tv_tensors.BoundingBoxes(torch.tensor([FORMATS[format]]).float(), format=format, canvas_size=(8, 20))
    other = tv_tensors.BoundingBoxes([[-1.0, 0, 3, 5]], format="XYXY", canvas_size=(4, 2), clamping_mode=None)
    none = tv_tensors.BoundingBoxes(torch.zeros(0, len(FORMATS[format])), format=format, canvas_size=(8, 20))
    batch = collate([{"boxes": each} for each in (box, other, none)])
    expected = torch.tensor([[[0.1, 0.125, 0.3, 0.875]], [[-0.5, 0, 1.5, 1.25]], [[0, 0, 0, 0]]])
    assert torch.allclose(batch["boxes"], expected, rtol=0, atol=1e-6)
    assert batch["boxes_mask"].tolist() == [[True], [True], [False]]


def test_boxes_of_integers_keep_their_halves():
    batch = collate([{"boxes": boxes([4, 4, 3, 5], format="CXCYWH")}])
    assert (8 * batch["boxes"]).tolist() == [[[2.5, 1.5, 5.5, 6.5]]]


def test_boxes_without_an_image_are_not_converted():
    rows = torch.tensor([[0.1, 0.2, 0.3, 0.4]])  # of a file of conditions: fractions
    assert torch.equal(collate([{"boxes": Ragged(rows)}])["boxes"], rows[None])
    points = tv_tensors.KeyPoints(torch.tensor([[3.0, 4]]), canvas_size=(8, 8))
    assert collate([{"points": points}])["points"].tolist() == [[[3, 4]]]


@pytest.mark.parametrize("counts", [(0, 0), (1, 1), (2, 0)])
def test_every_batch_has_a_mask(counts):
    items = [{"masks": tv_tensors.Mask(torch.ones(n, 3, 4, dtype=torch.bool))} for n in counts]
    batch = collate(items)
    assert batch["masks"].shape == (2, max(counts), 3, 4) and batch["masks_mask"].sum(1).tolist() == list(counts)
    assert batch["masks"].dtype == torch.bool
    assert list(collate([{"map": tv_tensors.Mask(torch.ones(3, 4))}])) == ["map"]


def test_strings_stay_lists_and_numbers_keep_their_type():
    items = [{"name": "a", "words": ["x", "y"], "age": 1.5, "seen": True}, {"name": "é", "words": [], "age": 2.0}]
    items[1]["seen"] = False
    batch = collate(items)
    assert batch["name"] == ["a", "é"] and batch["words"] == [["x", "y"], []]
    assert batch["age"].tolist() == [1.5, 2.0] and batch["seen"].dtype == torch.bool


def test_an_example_does_not_depend_on_the_rest_of_its_batch():
    source = TrainingImages(ImageSource(annotated_dataset(), CONFIG), seed=1)
    together = source[list(range(6))]
    for i in range(6):
        single = source[[i]]
        fields = FIELDS | {"image", "position", "boxes_mask", "ids_mask", "parts_mask"}
        assert single.keys() == together.keys() == fields
        for name, value in single.items():
            if isinstance(value, list):
                assert value == together[name][i : i + 1], name
            else:
                expected = together[name][i : i + 1, : value.shape[1]] if value.ndim > 1 else together[name][i : i + 1]
                assert torch.equal(value, expected) and value.dtype == expected.dtype, name


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"a": 1, "b": 2}, {"a": 1}], "have b and some do not"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}], r"'a' .* shapes \[\(2,\), \(3,\)\], wanted one .*Ragged"),
        ([{"a": Ragged([[1, 2]])}, {"a": Ragged([[1]])}], "'a' .* wanted one after the first axis"),
        ([{"a": 1}, {"a": True}], "'a' .* bool and int, wanted one type"),
        ([{"a": 1.5}, {"a": True}], "'a' .* bool and float, wanted one type"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int64)}], "'a' .* wanted one type"),
        ([{"a": Ragged([1])}, {"a": torch.tensor([1])}], "'a' .* wanted one type"),
        ([{"a": boxes([1, 2, 3, 4])}, {"a": Ragged([[1, 2, 3, 4]])}], "'a' .* boxes and ragged of .*, wanted one type"),
        ([{"a": np.zeros(3)}], "'a' of an item is ndarray, wanted a tensor"),
        ([{"a": ["x", 3]}], "'a' of an item is list, wanted"),
        ([{"a": None}], "'a' of an item is NoneType"),
        ([{"a": Ragged([1]), "a_mask": 1}], "a field a_mask, which is the name of the mask of a"),
        ([{"a_mask": 1, "a": Ragged([1])}], "a field a_mask, which is the name of the mask of a"),
    ],
)
def test_items_that_cannot_be_batched_are_refused_by_field(items, message):
    with pytest.raises(ValueError, match=message):
        collate(items)


def test_integers_and_floats_can_be_mixed():
    batch = collate([{"score": 1}, {"score": 1.5}])
    assert batch["score"].dtype == torch.float32 and batch["score"].tolist() == [1, 1.5]


@pytest.mark.parametrize("name, source", [("position", "images"), ("position", "codes"), ("codes", "codes")])
def test_field_names_reserved_by_the_loader_are_refused(name, source):
    class ReservedField(type(annotated_dataset())):
        def __getitem__(self, index):
            return {"image": self.images[index], "label": 0, name: 3}

    sources = {
        "images": TrainingImages(ImageSource(ReservedField(**vars(annotated_dataset())), CONFIG), seed=0),
        "codes": TrainingCodes(torch.zeros(1, 7, 2, 2).long(), None, 0, {(0, row): {name: 3} for row in range(7)}),
    }
    with pytest.raises(ValueError, match=f"a field {name}, a name reserved .*rename the field"):
        sources[source][[0, 1]]


def test_a_scalar_is_not_ragged():
    with pytest.raises(ValueError, match="first axis"):
        Ragged(3)


@pytest.mark.parametrize("workers", [0, 2])
def test_fields_survive_workers_resumes_and_ranks(workers):
    def load_batches(start, world=WORLD, workers=workers):
        source = TrainingImages(ImageSource(annotated_dataset(), dataclasses.replace(CONFIG, shift=1)), seed=1)
        options = {"steps": 4, "batch_size": 4, "accumulate": 1, "workers": workers}
        return [batch for (batch,) in training_batches(source, start=start, world=world, **options)]

    uninterrupted, resumed = load_batches(0, workers=0), load_batches(2)
    for expected, batch in zip(uninterrupted[2:], resumed, strict=True):
        assert_same_fields(expected, batch)
    rank_1 = load_batches(0, DistContext(WORLD.device, rank=1, size=2))
    for expected, batch in zip(uninterrupted, rank_1, strict=True):
        assert expected["caption"][2:] == batch["caption"] and torch.equal(expected["classes"][2:], batch["classes"])
        assert torch.equal(expected["image"], to_float((10 * expected["classes"])[:, None]))
        assert set(expected["classes"].unique().tolist()) <= {*CLASSES}


def test_fields_reach_the_device_and_strings_stay():
    batch = {"position": torch.tensor([1]), "caption": ["a"], "words": [["b"]], "label": torch.tensor([3])}
    moved = to_device(batch, torch.device("meta"))
    assert moved["caption"] == ["a"] and moved["words"] == [["b"]]
    assert moved["label"].device.type == "meta" and moved["position"].device.type == "cpu"


def test_strings_encoded_as_tensors_can_be_decoded():
    numbers = field_to_tensor(["é", "longer"])
    assert [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in numbers] == ["é", "longer"]
    lists = field_to_tensor([["a", "b"], []])
    assert [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in lists] == [["a", "b"], []]


def test_images_of_a_declared_range_train_as_floats():
    @dataclasses.dataclass(frozen=True, eq=False)
    class Depths(type(annotated_dataset())):
        def __getitem__(self, index):
            depth = np.full((8, 8), index / 2, np.float32)
            return {"image": FloatImage(depth, (0.0, 3.0)), "label": index}

    batch = TrainingImages(ImageSource(Depths(**vars(annotated_dataset())), CONFIG), seed=0)[list(range(7))]
    assert torch.allclose(batch["image"][:, 0, 3, 3], batch["label"] / 3 - 1)
