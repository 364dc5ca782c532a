"""Data in COCO's JSON files: images and annotations are paired by ids; what is missing is counted or named."""

import json

import numpy as np
import pytest
import torch

from helpers.tiny_regions import BOX, CATEGORIES, IDS, instance, save_coco, save_json, save_nuimages, save_picture
from train.data.formats import panoptic
from train.datasets import UnreadableImage, coco, nuimages


def build(root, split="train", reader=coco, **options):
    return reader.build(reader.Config(data_dir=str(root), **options), split)


def change(root, kind, edit):
    """Edits the content of the JSON file of the training split."""
    path = root / "annotations" / f"{kind}_train2017.json"
    content = json.loads(path.read_text())
    edit(content)
    save_json(path, content)


def level(item):
    """The red level of an item's image, by which it is recognised."""
    return item["image"].getpixel((0, 0))[0]


def test_instances_have_boxes_classes_crowds_and_masks(tmp_path):
    dataset = build(save_coco(tmp_path))
    assert dataset.region_classes == ("grass", "car") and dataset.region_things == (True, True)
    item = dataset[0]
    assert item["boxes"].tolist() == [BOX, BOX] and item["boxes"].canvas_size == (6, 8)
    assert item["boxes"].dtype == torch.float32 and item["boxes"].clamping_mode is None
    assert item["box_class"].tolist() == [1, 1]  # ids 90 and 3 are 0 and 1: the order of the file
    assert item["box_id"].tolist() == [1, 2] and item["box_crowd"].tolist() == [0, 1]
    assert item["masks"].dtype == torch.uint8
    assert all(np.array_equal(mask, IDS == 1) for mask in item["masks"].numpy())
    empty = dataset[2]
    assert empty.keys() == item.keys() and empty["box_class"].dtype == torch.int64
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 6, 8)


def test_images_are_found_by_name_whatever_the_order(tmp_path):
    dataset = build(save_coco(tmp_path), annotations=("captions",))
    assert [(level(item), item["file_name"]) for item in (dataset[0], dataset[1])] == [
        (1, "train2017/a.png"),
        (2, "train2017/b.png"),
    ]
    assert dataset[1]["captions"] == ["left b", "two b"] and dataset[2]["captions"] == []
    assert ("left", "right") in dataset.sides.words and dataset.region_classes == ()


def test_stuff_lies_behind_instances(tmp_path):
    dataset = build(save_coco(tmp_path), annotations=("instances", "stuff", "captions"))
    assert dataset[0]["box_class"].tolist() == [0, 1, 1]
    assert np.array_equal(dataset[0]["masks"][0].numpy(), IDS == 2) and len(dataset[0]["captions"]) == 2
    stuff = build(tmp_path, annotations=("stuff",))
    assert stuff.region_things == (False, False) and stuff[2]["box_class"].tolist() == [0]


def test_panoptic_maps_bring_the_boxes_of_things(tmp_path):
    dataset = build(save_coco(tmp_path), annotations=("panoptic",))
    item = dataset[0]
    assert np.array_equal(item["panoptic"].numpy(), IDS) and item["panoptic"].dtype == torch.int32
    assert item["segment_id"].tolist() == [1, 2] and item["segment_class"].tolist() == [1, 0]
    assert item["boxes"].tolist() == [BOX] and item["box_id"].tolist() == [1] and item["box_class"].tolist() == [1]
    assert dataset.region_things == (False, True)


def test_images_without_a_partner_are_counted(tmp_path):
    save_coco(tmp_path)
    (tmp_path / "train2017" / "a.png").unlink()
    save_picture(tmp_path / "train2017" / "0.png", 99)
    dataset = build(tmp_path)
    assert [level(dataset[i]) for i in range(2)] == [2, 3]  # sorted order would pair 0.png with the first annotations
    assert dataset.unpaired["images that are listed but do not exist"] == ("a.png",)
    assert dataset.unpaired["images that are not listed"] == ("0.png",)
    assert sum("a.png" in note or "0.png" in note for note in dataset.notes) == 2


def test_images_without_a_panoptic_map_are_left_out(tmp_path):
    save_coco(tmp_path)
    (tmp_path / "annotations" / "panoptic_train2017" / "b.png").unlink()
    change(tmp_path, "panoptic", lambda content: content["annotations"].pop())  # that of c
    dataset = build(tmp_path, annotations=("panoptic",))
    assert dataset.names == ["train2017/a.png"]
    assert dataset.unpaired["images without a panoptic map"] == ("b.png", "c.png")


def test_annotations_of_images_that_are_not_listed_are_counted(tmp_path):
    save_coco(tmp_path)
    change(tmp_path, "instances", lambda content: content["annotations"].append(instance(77)))
    assert "left out: 1 annotations of images that are not listed" in build(tmp_path).notes


def test_without_a_split_in_the_name_images_are_held_out(tmp_path):
    save_coco(tmp_path)
    options = {"image_dir": "train2017", "annotation_file": "annotations/{kind}_train2017.json", "val_fraction": 0.4}
    splits = [build(tmp_path, split, **options) for split in ("train", "val")]
    assert sorted(splits[0].names + splits[1].names) == [f"train2017/{name}.png" for name in "abc"]
    assert [level(dataset[0]) for dataset in splits] == ["abc".index(d.names[0][-5]) + 1 for d in splits]
    assert splits[0].fingerprint() != splits[1].fingerprint()


def test_objects_without_masks_are_no_fault_if_all_have_none(tmp_path):
    save_coco(tmp_path)
    first = build(tmp_path).fingerprint()

    def strip(content, rows=slice(None)):
        for row in content["annotations"][rows]:
            row["segmentation"] = []

    change(tmp_path, "instances", lambda content: strip(content, slice(1)))
    with pytest.raises(ValueError, match="1 of 4 objects have no segmentation.*--no_region_masks"):
        build(tmp_path)
    assert "masks" not in build(tmp_path, region_masks=False)[0]
    change(tmp_path, "instances", strip)
    dataset = build(tmp_path)
    assert "masks" not in dataset[0] and "the objects have no masks" in dataset.notes
    assert dataset.fingerprint() != first


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content.pop("images"), "wanted images and annotations"),
        (lambda content: content["annotations"][0].pop("bbox"), "without bbox"),
        (lambda content: content["images"].append(content["images"][0]), "two images have the id"),
        (lambda content: content["annotations"].append(3), "annotation 3 without image_id"),
        (lambda content: content["categories"].append({"id": 3, "name": "bus"}), "two classes have the id 3"),
    ],
)
def test_json_files_of_another_structure_are_named(tmp_path, edit, message):
    save_coco(tmp_path)
    change(tmp_path, "instances", edit)
    with pytest.raises(ValueError, match=rf"instances_train2017.json: .*{message}|{message}"):
        build(tmp_path)


def test_damaged_json_and_missing_files_are_named(tmp_path):
    save_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match="--image_dir"):
        build(tmp_path, image_dir="nowhere")
    with pytest.raises(FileNotFoundError, match="--annotation_file"):
        build(tmp_path, annotation_file="{kind}.json")
    (tmp_path / "annotations" / "instances_train2017.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="instances_train2017.json"):
        build(tmp_path)


def test_an_unknown_category_names_the_image(tmp_path):
    save_coco(tmp_path)
    change(tmp_path, "instances", lambda content: content["annotations"][0].update(category_id=5))
    with pytest.raises(ValueError, match="a.png: got the category 5"):
        build(tmp_path)


def test_kinds_that_do_not_go_together_are_refused(tmp_path):
    save_coco(tmp_path)
    for kinds in ((), ("panoptic", "instances"), ("instance",)):
        with pytest.raises(ValueError, match="--annotations"):
            build(tmp_path, annotations=kinds)


def test_splits_that_number_classes_differently_are_refused(tmp_path):
    save_coco(tmp_path)
    change(tmp_path, "instances", lambda content: content["categories"].reverse())
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="different categories, or in another order"):
            build(tmp_path, split)


def test_an_image_of_another_size_is_unreadable(tmp_path):
    save_coco(tmp_path)
    change(tmp_path, "instances", lambda content: content["images"][-1].update(height=7))  # a.png
    dataset = build(tmp_path)
    with pytest.raises(UnreadableImage, match="a.png has 6 x 8 pixels, wanted 7 x 8"):
        dataset[0]
    assert level(dataset[1]) == 2


def test_broken_maps_are_unreadable(tmp_path):
    save_coco(tmp_path)
    folder = tmp_path / "annotations" / "panoptic_train2017"
    (folder / "a.png").write_bytes(b"no picture")
    save_picture(folder / "b.png", np.zeros((8, 8, 3), np.uint8))
    dataset = build(tmp_path, annotations=("panoptic",))
    for index, message in ((0, "a.png"), (1, "8 x 8 pixels, and its image 8 x 6")):
        with pytest.raises(UnreadableImage, match=message):
            dataset[index]
    assert len(dataset[2]["segment_id"]) == 2


def test_maps_of_another_encoding_are_refused_by_name(tmp_path):
    save_coco(tmp_path)
    for name in "abc":
        colors = panoptic.encode(IDS, "two_channel", np.array([1, 2]), np.array([3, 90]))
        save_picture(tmp_path / "annotations" / "panoptic_train2017" / f"{name}.png", colors)
    with pytest.raises(ValueError, match="panoptic_train2017: .*not of the encoding coco; they look like two_channel"):
        build(tmp_path, annotations=("panoptic",))


def test_the_fingerprint_follows_options_and_files(tmp_path):
    save_coco(tmp_path)
    options = [{}, {"region_masks": False}, {"annotations": ("stuff",)}, {"annotations": ("captions",)}]
    fingerprints = [build(tmp_path, **each).fingerprint() for each in options]
    change(tmp_path, "instances", lambda content: content["annotations"].pop())
    assert len({*fingerprints, build(tmp_path).fingerprint()}) == 5


# nuImages


def test_names_of_nuimages_say_what_the_image_shows(tmp_path):
    dataset = build(save_nuimages(tmp_path), reader=nuimages)
    item = dataset[0]
    fields = ("camera", "time", "weather", "light", "location")
    assert [item[name] for name in fields] == ["CAM_FRONT_LEFT", "150", "rain", "night", "boston-seaport"]
    assert [dataset[1][name] for name in fields[2:]] == ["unknown"] * 3
    assert item["file_name"] == "samples/CAM_FRONT_LEFT/a__CAM_FRONT_LEFT__150.png" and level(item) == 0
    assert item["boxes"].tolist() == [BOX] and dataset[1]["boxes"].shape == (0, 4) and "masks" not in item
    assert dataset.sides.swap({"camera": item["camera"]}) == {"camera": "CAM_FRONT_RIGHT"}
    assert dataset.metadata_values == {
        **{
            "camera": ("CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"),
            "weather": ("rain",),
            "light": ("night",),
            "location": ("boston-seaport",),
        }
    }


def test_a_file_with_all_of_its_name_is_found_too(tmp_path):
    save_nuimages(tmp_path)
    folder = tmp_path / "samples" / "CAM_FRONT_LEFT"
    (folder / "a__CAM_FRONT_LEFT__150.png").rename(folder / "a__CAM_FRONT_LEFT__150__Rain__night__boston-seaport.png")
    item = build(tmp_path, reader=nuimages)[0]
    assert item["light"] == "night" and item["file_name"].endswith("boston-seaport.png")


def test_names_without_metadata_are_refused(tmp_path):
    save_json(
        tmp_path / "annotations" / "nuimages_v1.0-train.json",
        {
            "images": [{"id": name, "file_name": f"{name}.png"} for name in "ab"],
            "annotations": [],
            "categories": CATEGORIES,
        },
    )
    for name in "ab":
        save_picture(tmp_path / f"{name}.png", 1)
    with pytest.raises(ValueError, match="the name [ab].png has 1 parts.*rename"):
        build(tmp_path, reader=nuimages)
