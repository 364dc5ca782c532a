"""The readers on small real data as they were published, if REAL_DATA names the folder that has them."""

import os
from pathlib import Path

import numpy as np
import pytest

from train.datasets import celebamask, coco, panoptic_folder, semantic, yolo

REAL = Path(os.environ.get("REAL_DATA", ""))
COCO128, SAMPLE = REAL / "coco128_lightly", REAL / "panopticapi_sample" / "sample_data"
FACES = REAL / "celebamask_samples" / "MaskGAN_demo" / "samples"
IMAGES = {"image_dir": "images/{split}2017"}


def needs(folder):
    return pytest.mark.skipif(not folder.is_dir(), reason=f"REAL_DATA names no folder with {folder.name}")


def build(reader, root, split="train", **options):
    return reader.build(reader.Config(data_dir=str(root), **options), split)


def items(dataset):
    return [dataset[i] for i in range(len(dataset))]


@needs(COCO128)
def test_coco128_boxes():
    options = {**IMAGES, "label_dir": "object_detection/labels/{split}2017"}
    dataset = build(yolo, COCO128, categories="object_detection/config.yaml", **options)
    without = tuple(f"0000000{n:05}.jpg" for n in (250, 508))
    stray = tuple(f"0000000{n:05}.txt" for n in (656, 659))
    assert dataset.unpaired == {"images without a label file": without, "label files without an image": stray}
    own = items(dataset)
    assert len(own) == 126 and sum(len(item["boxes"]) for item in own) == 929
    classes = np.concatenate([item["box_class"].numpy() for item in own])
    assert len(set(classes.tolist())) == 71 and (classes == dataset.region_classes.index("person")).sum() == 254
    val = items(build(yolo, COCO128, "val", categories="object_detection/config.yaml", **options))
    assert len(val) == 128 and sum(len(item["boxes"]) for item in val) == 898


@needs(COCO128)
def test_coco128_polygons_have_other_ids_and_the_same_names():
    options = {**IMAGES, "label_dir": "instance_segmentation/labels/{split}2017", "region_masks": True}
    polygons = build(yolo, COCO128, categories="instance_segmentation/config.yaml", **options)
    boxes = build(
        yolo,
        COCO128,
        categories="object_detection/config.yaml",
        **{**IMAGES, "label_dir": "object_detection/labels/{split}2017"},
    )
    assert polygons.categories.ids[-1] == 90 and boxes.categories.ids[-1] == 79
    assert polygons.region_classes == boxes.region_classes
    assert len(polygons) == 100 and sum(len(item["masks"]) for item in items(polygons)) == 746


@needs(COCO128)
def test_coco128_panoptic_maps_and_semantic_maps_agree():
    options = {**IMAGES, "annotation_file": "panoptic_segmentation/annotations/{kind}_{split}2017.json"}
    maps = build(coco, COCO128, annotations=("panoptic",), **options)
    options = {**IMAGES, "mask_dir": "semantic_segmentation/masks/{split}2017", "unlabelled": (0,)}
    levels = build(semantic, COCO128, categories="semantic_segmentation/config.yaml", **options)
    assert len(maps) == len(levels) == 100 and maps.names == levels.names
    assert len(maps.region_classes) == 133 and sum(maps.region_things) == 80
    unlabelled, segments, crowds = [], 0, 0
    for one, other in zip(items(maps), items(levels), strict=True):
        unlabelled.append(float((one["panoptic"] == 0).float().mean()))
        segments, crowds = segments + len(one["segment_id"]), crowds + int(one["box_crowd"].sum())
        classes = np.full(int(one["panoptic"].max()) + 1, -1)
        classes[one["segment_id"].numpy()] = one["segment_class"].numpy()
        names = np.array(["", *maps.region_classes])[classes[one["panoptic"].numpy()] + 1]
        assert (names == np.array([*levels.region_classes, *[""] * 127])[other["semantic"].numpy()]).all()
    assert (segments, crowds) == (1111, 6)
    assert max(unlabelled) > 0.965 and abs(np.mean(unlabelled) - 0.098) < 0.002


@needs(SAMPLE)
def test_the_sample_of_panopticapi_reads_alike_in_three_forms():
    options = {"image_dir": "input_images"}
    for split in ("train", "val"):
        file = {"annotations": ("panoptic",), "annotation_file": "panoptic_examples.json"}
        (maps,) = items(build(coco, SAMPLE, split, **file, **options))
        runs = build(coco, SAMPLE, split, annotation_file="panoptic_coco_detection_format.json", **options)
        two = build(
            panoptic_folder,
            SAMPLE,
            split,
            panoptic_dir="panoptic_examples_2ch_format",
            **options,
            **{"panoptic_encoding": "two_channel", "categories": "../panoptic_coco_categories.json"},
        )
        segments = zip(maps["segment_id"].tolist(), maps["segment_class"].tolist(), strict=True)
        wanted = sorted((number, (maps["panoptic"] == each).numpy().tobytes()) for each, number in segments)
        of_runs = zip(runs[0]["box_class"].tolist(), runs[0]["masks"].numpy().astype(bool), strict=True)
        assert sorted((number, mask.tobytes()) for number, mask in of_runs) == wanted
        segments = zip(two[0]["segment_id"].tolist(), two[0]["segment_class"].tolist(), strict=True)
        assert sorted((n, (two[0]["panoptic"] == each).numpy().tobytes()) for each, n in segments) == wanted
        assert two[0]["box_crowd"].sum() == maps["box_crowd"].sum()


@needs(SAMPLE)
def test_a_wrong_encoding_of_the_sample_is_refused():
    options = {"image_dir": "input_images", "categories": "../panoptic_coco_categories.json"}
    for folder, wrong in (("panoptic_examples", "two_channel"), ("panoptic_examples_2ch_format", "mamoe")):
        with pytest.raises(ValueError, match=f"not of the encoding {wrong}; they look like"):
            build(panoptic_folder, SAMPLE, panoptic_dir=folder, panoptic_encoding=wrong, **options)


@needs(FACES)
def test_faces_have_maps_of_their_size():
    for split, n in (("train", 3), ("val", 1)):
        dataset = build(celebamask, FACES, split, image_dir=".", mask_dir=".")
        assert len(dataset) == n and dataset.unpaired["images without a map"] == ()
        for item in items(dataset):
            assert item["semantic"].shape == (1024, 1024)
            assert set(item["semantic"].unique().tolist()) <= {0, 1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13, 17, 18}
