"""Captions by template: what they say, which are for validation, and how they come with images and codes."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import tiny_regions
from train.config import DataConfig
from train.data.loading import ImageSource, TrainingImages, build_dataset
from train.data.templates import NOTHING, OF_CLASSES, OF_REGIONS, TemplateCaptions, describe_things, noun_of
from train.datasets import DIGIT_TEMPLATES, ArrayDataset, Ragged, Templates, coco, digits, semantic, shapes, yolo
from train.datasets.cifar10 import CLASS_NAMES

SHAPES = shapes.Config(shapes_count=30, shapes_size=16)


def images_of(labels, names, **options):
    labels = np.array(labels)
    return ArrayDataset(np.zeros((len(labels), 4, 4), np.uint8), labels, len(names), tuple(names), **options)


def test_a_class_is_named_in_sentences():
    dataset = TemplateCaptions(images_of([0, 1, 2], ("T-shirt/top", "Ankle boot", "pants")), "train")
    boot, pants = dataset[1]["captions"], dataset[2]["captions"]
    assert boot[:3] == ["an ankle boot", "ankle boot", "a photo of an ankle boot"]
    assert all(caption.count("ankle boot") == 1 for caption in boot) and "this photo shows an ankle boot" in boot
    assert pants[2] == "a photo of pants" and dataset[0]["captions"][0] == "a t-shirt/top"
    assert len({*boot}) == len(OF_CLASSES.train) and "this photo shows pants" in pants
    assert dataset[1]["label"] == 1 and dataset.class_names[1] == "Ankle boot" and len(dataset) == 3
    assert noun_of("Traffic_light") == "traffic light"


def test_digits_have_sentences_of_their_own():
    data = DataConfig(dataset="digits", captions="templates")
    train, val = (build_dataset(data, digits.Config(), split) for split in ("train", "val"))
    number = int(np.flatnonzero(train.labels == 8)[0])
    captions = train[number]["captions"]
    assert captions[:5] == ["an eight", "eight", "8", "the digit 8", "the digit eight"]
    assert all("eight" in caption or "8" in caption for caption in captions)
    number = int(np.flatnonzero(val.labels == 7)[0])
    assert val[number]["captions"] == ["this is the numeral 7", "a seven, written by hand"]


@pytest.mark.parametrize("templates", [OF_CLASSES, OF_REGIONS, DIGIT_TEMPLATES], ids=["classes", "regions", "digits"])
def test_sentences_of_validation_are_held_apart(templates):
    assert templates.train and templates.val and not {*templates.train} & {*templates.val}
    words = {"name": "8", "noun": "eight", "a_noun": "an eight", "things": "two dogs"}
    filled = [{sentence.format(**words) for sentence in part} for part in templates[:2]]
    assert not filled[0] & filled[1] and sum(map(len, filled)) == len(templates.train) + len(templates.val)


def test_things_are_counted_the_most_frequent_first():
    nouns, things = ("person", "dog", "sky"), (True, True, False)
    item = {"box_class": torch.tensor([0, 1, 2, 1, 1, 0, 1]), "box_crowd": torch.tensor([0, 0, 0, 0, 0, 1, 1])}
    assert describe_things(item, nouns, things) == "three dogs and a person"  # neither sky nor crowds
    assert describe_things({"box_class": torch.tensor([2])}, nouns, things) == NOTHING
    item = {"box_class": torch.tensor([0, 0, 0]), "box_words": ["red disc", "blue ring", "red disc"]}
    assert describe_things(item, nouns, things) == "two red discs and a blue ring"


def test_drawn_scenes_are_described_by_their_things():
    data = DataConfig(dataset="shapes", captions="templates")
    plain, dataset = shapes.build(SHAPES, "val"), build_dataset(data, SHAPES, "val")
    item = dataset[3]
    things = describe_things(plain[3], (), plain.region_things)
    assert item["captions"] == [f"this is {things}", f"a photograph in which one sees {things}"]
    assert torch.equal(item["boxes"], plain[3]["boxes"]) and dataset.metadata_values == plain.metadata_values
    assert dataset.read_at_size(3, (24, 24))["image"].shape[:2] == (24, 24)
    assert dataset.read_at_size(3, (24, 24))["captions"] == item["captions"]


@pytest.mark.parametrize(
    ("annotations", "things"),
    [("instances", ["a car", NOTHING]), ("stuff", [NOTHING, NOTHING]), ("panoptic", ["a car", "a car"])],
)
def test_things_of_coco_are_counted_without_crowds_and_stuff(tmp_path, annotations, things):
    config = coco.Config(data_dir=str(tiny_regions.save_coco(tmp_path)), annotations=(annotations,))
    dataset = build_dataset(DataConfig(dataset="coco", captions="templates"), config, "val")
    for i, words in enumerate(things):
        assert dataset[i]["captions"] == [f"this is {words}", f"a photograph in which one sees {words}"]


def test_things_of_yolo_are_counted(tmp_path):
    config = yolo.Config(data_dir=str(tiny_regions.save_yolo(tmp_path)))
    label = "2 0.5 0.5 0.5 0.5\n0 0.5 0.5 1 1\n2 0.2 0.2 0.1 0.1\n"
    tiny_regions.save_text(tmp_path / "labels" / "val" / "e.txt", label)
    dataset = build_dataset(DataConfig(dataset="yolo", captions="templates"), config, "val")
    assert [dataset[i]["captions"][0] for i in range(2)] == [f"this is {NOTHING}", "this is two cars and a grass"]


def test_sentences_are_part_of_the_identity_of_the_data():
    images = images_of([0, 1], ("cat", "dog"))
    other = images_of([0, 1], ("cat", "dog"), templates=Templates(("{noun}",), ("see {noun}",), ("tom", "rex")))
    wrapped = [TemplateCaptions(images, "train"), TemplateCaptions(images, "val"), TemplateCaptions(other, "train")]
    assert len({images.fingerprint(), *(each.fingerprint() for each in wrapped)}) == 4
    assert pickle.loads(pickle.dumps(wrapped[0])).fingerprint() == wrapped[0].fingerprint()
    assert wrapped[0].content_fingerprint() == TemplateCaptions(images, "train").content_fingerprint()
    assert wrapped[2][1]["captions"] == ["rex"]


def test_each_visit_shows_a_sentence_of_its_own():
    dataset = TemplateCaptions(images_of(range(10), CLASS_NAMES), "train")
    config = DataConfig(dataset="cifar10", img_size=4, n_channels=1)
    images = TrainingImages(ImageSource(dataset, config), seed=0)
    captions = images[list(range(120))]["caption"]  # twelve visits of each
    assert {caption.partition(" of ")[0] for caption in captions} >= {"a photo", "an image"}
    first = TrainingImages(ImageSource(dataset, config), seed=0, first_caption=True)[list(range(40))]["caption"]
    assert {*first} == {dataset[i]["captions"][0] for i in range(10)}


def test_captions_of_the_data_are_replaced():
    class Captioned(ArrayDataset):
        def __getitem__(self, index):
            own = {"caption": "of a shard", "captions": ["a", "b"], "caption_shares": Ragged([0.0, 1.0])}
            return super().__getitem__(index) | own

    dataset = TemplateCaptions(Captioned(np.zeros((2, 4, 4), np.uint8), np.arange(2), 2, ("cat", "dog")), "val")
    shown = TrainingImages(ImageSource(dataset, DataConfig(img_size=4, n_channels=1)), seed=0)[list(range(20))]
    assert {*shown["caption"]} == {*dataset[0]["captions"], *dataset[1]["captions"]}


def test_data_without_names_of_classes_are_refused():
    with pytest.raises(
        ValueError, match="got --captions templates for data whose classes have no names: pass --class_n"
    ):
        TemplateCaptions(ArrayDataset(np.zeros((2, 4, 4), np.uint8), np.arange(2), 2), "train")
    with pytest.raises(ValueError, match="got --captions templates for data without classes: .*leave --captions out"):
        TemplateCaptions(ArrayDataset(np.zeros((2, 4, 4), np.uint8), np.arange(2), 0), "train")


@pytest.mark.parametrize("patches", [1, 2])
def test_maps_of_classes_without_boxes_are_refused(tmp_path, patches):
    config = semantic.Config(data_dir=str(tiny_regions.save_semantic(tmp_path)))
    with pytest.raises(ValueError, match="got --captions templates for data whose .* wanted boxes: leave --captions"):
        build_dataset(DataConfig(dataset="semantic", captions="templates", patches=patches), config, "train")


def test_patches_and_captions_keep_what_a_data_set_declares():
    data = DataConfig(dataset="digits", patches=2, captions="templates")
    patched = build_dataset(data, digits.Config(), "train")
    whole = build_dataset(replace(data, patches=1), digits.Config(digits_thickness=True), "train")
    assert patched[0]["captions"] == whole[0]["captions"] and "a handwritten" in patched[0]["captions"][6]
    assert [*whole.number_measures] == ["thickness"]
