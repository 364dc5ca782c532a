"""Images with annotation files of the same names: YOLO, layouts, semantic and panoptic maps, faces, Visual Genome."""

import importlib
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import tiny_regions
from helpers.tiny_regions import BOX, IDS, save_json, save_picture, save_text
from train.data.collate import collate
from train.data.transforms import View, to_item
from train.datasets import (
    UnreadableImage,
    captions,
    celebamask,
    layout_lines,
    panoptic_folder,
    semantic,
    visual_genome,
    yolo,
)


def build(reader, root, split="train", **options):
    return reader.build(reader.Config(data_dir=str(root), **options), split)


def level(item):
    return item["image"].getpixel((0, 0))[0]


@pytest.mark.parametrize("name", sorted(tiny_regions.WRITERS))
def test_items_are_resized_mirrored_and_batched(name, tmp_path):
    reader = importlib.import_module(f"train.datasets.{name}")
    dataset = build(reader, tiny_regions.WRITERS[name](tmp_path))
    assert dataset.n_classes == 0 and dataset.labels is None
    assert len(dataset.region_classes) == len(dataset.region_things) and (
        dataset.region_classes or name in ("captions", "pairs")
    )
    items = [View(flip=True)(to_item(dataset[i], (4, 4), 3)) for i in range(len(dataset))]
    batch = collate(items)  # with items without a region
    assert batch["image"].shape == (len(dataset), 3, 4, 4) and batch["file_name"] == dataset.names


# YOLO


def test_label_files_are_paired_by_name(tmp_path):
    tiny_regions.save_yolo(tmp_path)
    (tmp_path / "images" / "train" / "a.png").unlink()
    (tmp_path / "labels" / "train" / "b.txt").unlink()
    dataset = build(yolo, tmp_path)
    assert dataset.names == ["images/train/c.png"] and level(dataset[0]) == 2
    assert len(dataset[0]["boxes"]) == 2  # a.txt has none
    assert dataset.unpaired == {"images without a label file": ("b.png",), "label files without an image": ("a.txt",)}
    assert any("1 images without a label file (b.png)" in note for note in dataset.notes)
    everything = build(yolo, tmp_path, missing_labels="empty")
    assert everything.names == ["images/train/b.png", "images/train/c.png"]
    assert everything[0]["boxes"].shape == (0, 4) and len(everything[1]["boxes"]) == 2


def test_boxes_are_pixels_and_classes_are_positions(tmp_path):
    item = build(yolo, tiny_regions.save_yolo(tmp_path))[1]
    assert np.allclose(item["boxes"].numpy(), [BOX, [0, 4, 8, 6]], atol=1e-5)
    assert item["box_class"].tolist() == [1, 0]  # ids 2 and 0
    assert item["box_id"].tolist() == [1, 2]


def test_polygons_give_masks(tmp_path):
    tiny_regions.save_yolo(tmp_path)
    for name in "abc":
        save_text(
            tmp_path / "labels" / "train" / f"{name}.txt", "2 0.25 0.16667 0.75 0.16667 0.75 0.8333 0.25 0.8333\n"
        )
    item = build(yolo, tmp_path, region_masks=True)[0]
    assert np.array_equal(item["masks"][0].numpy(), IDS == 1)
    save_text(tmp_path / "labels" / "train" / "a.txt", "2 0.5 0.5 1 1\n")
    with pytest.raises(ValueError, match="a.txt: .*no polygon.*--region_masks"):
        build(yolo, tmp_path, region_masks=True)


@pytest.mark.parametrize(("line", "message"), [("7 0 0 1 1", "category 7"), ("2 0 0 1", "line 1"), ("\udcff", "a.txt")])
def test_wrong_label_files_are_named(tmp_path, line, message):
    tiny_regions.save_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").write_bytes(line.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"a.txt: .*{message}|{message}: "):
        build(yolo, tmp_path)


def test_missing_folders_and_classes_name_the_flag(tmp_path):
    tiny_regions.save_yolo(tmp_path)
    for options, flag in (
        ({"image_dir": "pictures"}, "--image_dir"),
        ({"label_dir": "texts"}, "--label_dir"),
        ({"categories": "x.txt"}, "--categories"),
    ):
        with pytest.raises(FileNotFoundError, match=flag):
            build(yolo, tmp_path, **options)
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="--categories"):
        build(yolo, tmp_path)
    with pytest.raises(ValueError, match="has no .txt file: .*--label_dir"):
        build(yolo, tmp_path, label_dir="images/train")


def test_without_a_val_folder_images_are_held_out(tmp_path):
    tiny_regions.save_yolo(tmp_path)
    (tmp_path / "images" / "val").rename(tmp_path / "elsewhere")
    names = [build(yolo, tmp_path, split, val_fraction=0.3).names for split in ("train", "val")]
    assert sorted(sum(names, [])) == [f"images/train/{name}.png" for name in "abc"] and len(names[1]) == 1


def test_two_images_of_one_name_are_refused(tmp_path):
    tiny_regions.save_yolo(tmp_path)
    save_picture(tmp_path / "images" / "train" / "a.bmp", 1)
    with pytest.raises(ValueError, match="a.bmp and a.png have the same name"):
        build(yolo, tmp_path)


# Layouts


def test_layouts_of_all_splits_share_their_classes(tmp_path):
    tiny_regions.save_layout_lines(tmp_path)
    train, val = (build(layout_lines, tmp_path, split) for split in ("train", "val"))
    assert train.region_classes == val.region_classes == ("bus stop", "car")
    assert train[1]["box_class"].tolist() == [1] and val[1]["box_class"].tolist() == [0]
    assert np.allclose(train[1]["boxes"].numpy(), [BOX], atol=1e-5)
    assert train[0]["boxes"].shape == (0, 4)
    save_text(tmp_path / "names.txt", "bus\n")
    with pytest.raises(ValueError, match=r"b.txt: got the class 'car'.*--categories"):
        build(layout_lines, tmp_path, categories="names.txt")[1]


# Semantic maps


@pytest.mark.parametrize("reader", [semantic, celebamask])
def test_classes_of_a_map_are_segments_if_asked_for(reader, tmp_path):
    save = {semantic: tiny_regions.save_semantic, celebamask: tiny_regions.save_celebamask}[reader]
    save(tmp_path)
    plain, dataset = build(reader, tmp_path), build(reader, tmp_path, semantic_segments=True)
    assert plain.fingerprint() != dataset.fingerprint()
    item, levels = dataset[0], plain[0]["semantic"]
    assert torch.equal(item["semantic"], levels) and "panoptic" not in plain[0]
    ids = dict(zip(item["segment_id"].tolist(), item["segment_class"].tolist(), strict=True))
    assert [*ids.values()] == sorted({*levels.flatten().tolist()} - {255})
    named = torch.tensor([[ids.get(number, 255) for number in row] for row in item["panoptic"].tolist()])
    assert 0 not in ids and torch.equal(named, levels.long())


def test_levels_become_class_numbers(tmp_path):
    dataset = build(semantic, tiny_regions.save_semantic(tmp_path))
    assert np.array_equal(dataset[0]["semantic"].numpy(), np.array([255, 1, 0])[IDS])
    assert dataset[0]["semantic"].dtype == torch.uint8 and dataset.region_classes == ("grass", "car")
    grassless = build(semantic, tmp_path, unlabelled=(255, 90))
    assert grassless.region_classes == ("car",)
    assert np.array_equal(grassless[0]["semantic"].numpy(), np.array([255, 0, 255])[IDS])
    with pytest.raises(ValueError, match="a.png: got the category 255.*--unlabelled"):
        build(semantic, tmp_path, unlabelled=())


def test_names_may_have_endings_and_folders_of_cities(tmp_path):
    save_json(tmp_path / "categories.json", [str(number) for number in range(20)])
    for city, frame in (("bern", 1), ("bern", 2), ("ulm", 3)):
        save_picture(tmp_path / "images" / "train" / city / f"{city}_{frame}_leftImg8bit.png", frame)
        levels = np.arange(12, dtype=np.uint8).reshape(3, 4) + frame  # half of the size of its image
        save_picture(tmp_path / "flat" / f"{city}_{frame}_gtFine.png", levels)
        save_picture(tmp_path / "nested" / "train" / city / f"{city}_{frame}_gtFine.png", levels)
    for folder in ("flat", "nested/{split}"):
        options = {"image_ending": "_leftImg8bit", "mask_ending": "_gtFine", "mask_dir": folder, "val_fraction": 0.4}
        dataset = build(semantic, tmp_path, **options)
        for item in (dataset[0], dataset[1]):
            wanted = np.arange(12).reshape(3, 4) + level(item)
            assert np.array_equal(item["semantic"].numpy(), np.kron(wanted, np.ones((2, 2))))


def test_maps_in_colours_or_of_another_shape_are_no_maps(tmp_path):
    tiny_regions.save_semantic(tmp_path)
    save_picture(tmp_path / "masks" / "train" / "a.png", np.zeros((6, 6), np.uint8))
    with pytest.raises(UnreadableImage, match="6 x 6 pixels, and its image 8 x 6"):
        build(semantic, tmp_path)[0]
    save_picture(tmp_path / "masks" / "train" / "a.png", 3)
    with pytest.raises(ValueError, match="a.png: got a picture in colours"):
        build(semantic, tmp_path)


# Faces


def test_parts_of_a_face_are_merged_in_their_order(tmp_path):
    tiny_regions.save_celebamask(tmp_path)
    dataset = build(celebamask, tmp_path)
    # hair (13) lies over an eye (4), and that over skin (1), though the files have another order
    assert dataset[0]["semantic"][:, 0].tolist() == [13, 13, 4, 4, 1, 1]
    assert dataset.region_classes[4:6] == ("l_eye", "r_eye") and dataset.sides.classes == ((4, 5), (6, 7), (8, 9))
    assert [level(dataset[i]) for i in range(3)] == [int(name[14]) for name in dataset.names]


def test_maps_with_a_palette_have_its_numbers_or_its_colours(tmp_path):
    tiny_regions.save_panoptic_folder(tmp_path)
    wanted = build(panoptic_folder, tmp_path)[0]["panoptic"]
    path = tmp_path / "panoptic" / "train" / "a.png"
    Image.open(path).quantize(8).save(path)
    assert torch.equal(build(panoptic_folder, tmp_path)[0]["panoptic"], wanted)
    levels = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    levels.putpalette([200, 100, 50] * 256)
    save_json(tmp_path / "categories.json", [str(number) for number in range(48)])
    levels.save(path)
    dataset = build(semantic, tmp_path, image_dir="{split}", mask_dir="panoptic/{split}")
    assert dataset[0]["semantic"].flatten().tolist() == list(range(48))


def test_maps_and_parts_of_faces_agree(tmp_path):
    tiny_regions.save_celebamask(tmp_path, 12)
    parts = build(celebamask, tmp_path)
    for i in range(len(parts)):
        save_picture(tmp_path / "maps" / f"{parts.names[i][14:]}", parts[i]["semantic"].numpy())
    maps = build(celebamask, tmp_path, mask_dir="maps")
    assert len(maps) == 10 and len(maps.unpaired["images without a map"]) == 1  # that of validation
    wanted = {name: parts[i]["semantic"] for i, name in enumerate(parts.names)}
    assert all(torch.equal(maps[i]["semantic"], wanted[name]) for i, name in enumerate(maps.names))


def test_faces_without_a_partner_are_counted(tmp_path):
    tiny_regions.save_celebamask(tmp_path)
    (tmp_path / "CelebA-HQ-img" / "2.png").unlink()
    save_picture(tmp_path / "CelebA-HQ-img" / "7.png", 7)
    dataset = build(celebamask, tmp_path)
    assert dataset.unpaired == {"images without parts": ("7.png",), "faces without an image": ("2",)}


# Panoptic maps


@pytest.mark.parametrize("encoding", ["mamoe", "two_channel", "coco"])
def test_panoptic_maps_of_each_encoding_read_alike(tmp_path, encoding):
    tiny_regions.save_panoptic_folder(tmp_path, encoding)
    dataset = build(panoptic_folder, tmp_path, panoptic_encoding=encoding)
    item = dataset[0]
    names = [dataset.region_classes[number] for number in item["segment_class"]]
    assert sorted(names) == ["car", "vegetation"]
    assert [dataset.region_things[number] for number in item["segment_class"]] == [name == "car" for name in names]
    car = int(item["segment_id"][names.index("car")])
    assert np.array_equal(item["panoptic"].numpy() == car, IDS == 1)
    assert np.array_equal(item["panoptic"].numpy() > 0, IDS > 0)
    assert item["boxes"].tolist() == [BOX] and item["box_id"].tolist() == [car] and "captions" not in item


def test_json_files_that_number_classes_differently_are_refused(tmp_path):
    tiny_regions.save_panoptic_folder(tmp_path, "coco")
    content = json.loads((tmp_path / "panoptic" / "val.json").read_text())
    save_json(tmp_path / "panoptic" / "val.json", {**content, "categories": content["categories"][::-1]})
    with pytest.raises(ValueError, match="different categories, or in another order"):
        build(panoptic_folder, tmp_path, panoptic_encoding="coco")


@pytest.mark.parametrize("written", ["mamoe", "two_channel", "coco"])
def test_a_wrong_encoding_is_refused(tmp_path, written):
    tiny_regions.save_panoptic_folder(tmp_path, written)
    for read in {"mamoe", "two_channel", "coco"} - {written}:
        with pytest.raises(ValueError, match=f"train: the panoptic maps are not of the encoding {read}"):
            build(panoptic_folder, tmp_path, panoptic_encoding=read)


def test_prompts_of_images_and_instances_are_read(tmp_path):
    tiny_regions.save_panoptic_folder(tmp_path)
    options = {"prompts": "prompts_{split}.csv", "instance_prompts": "words_{split}.json"}
    dataset = build(panoptic_folder, tmp_path, **options)
    assert dataset[0]["captions"] == ["left, a"] and dataset[0]["box_words"] == ["a red car"]
    assert dataset[2]["captions"] == [] and dataset[2]["box_words"] == ["car"]  # without a prompt: its class
    assert "images without a prompt: 1" in dataset.notes
    assert dataset.fingerprint() != build(panoptic_folder, tmp_path).fingerprint()
    assert build(panoptic_folder, tmp_path, "val", **options)[0]["captions"] == ["left, d"]
    with pytest.raises(FileNotFoundError, match="--instance_prompts"):
        build(panoptic_folder, tmp_path, instance_prompts="nothing.json")
    save_text(tmp_path / "prompts_train.csv", "a,b\n")
    with pytest.raises(ValueError, match="prompts_train.csv: .*img_name and prompt"):
        build(panoptic_folder, tmp_path, **options)


def test_names_of_any_kind_are_sorted(tmp_path):
    tiny_regions.save_panoptic_folder(tmp_path)
    for folder in ("train", "panoptic/train"):
        for old, new in (("a", "frame"), ("b", "frame_000010"), ("c", "frame_2")):
            (tmp_path / folder / f"{old}.png").rename(tmp_path / folder / f"{new}.png")
    save_picture(tmp_path / "test" / "x.png", 9)
    dataset = build(panoptic_folder, tmp_path)
    assert dataset.names == ["train/frame.png", "train/frame_000010.png", "train/frame_2.png"]
    assert [level(dataset[i]) for i in range(3)] == [0, 1, 2]
    assert build(panoptic_folder, tmp_path, "val").names == ["val/d.png", "val/e.png"]


def test_prompts_of_ids_that_no_map_has_are_refused(tmp_path):
    tiny_regions.save_panoptic_folder(tmp_path, "two_channel")  # its ids are 256 times the category, and a number
    with pytest.raises(ValueError, match=r"have the ids \[1\], and its map \[2048, 3328\].*--instance_prompts"):
        options = {"panoptic_encoding": "two_channel", "instance_prompts": "words_{split}.json"}
        build(panoptic_folder, tmp_path, **options)


# Captions


def test_an_image_may_have_several_captions(tmp_path):
    dataset = build(captions, tiny_regions.save_captions(tmp_path))
    assert [dataset[i]["captions"] for i in range(2)] == [["left, a", "two, a"], ["left, b", "two, b"]]
    assert dataset.unpaired == {
        "images without a caption": ("c.png",),
        "captions without an image": ("nothing.png",),
    }
    save_text(tmp_path / "prompts_train.csv", "img_name,prompt\nx.png,nothing\n")
    with pytest.raises(ValueError, match="no image of .*train has a caption in prompts_train.csv"):
        build(captions, tmp_path)
    with pytest.raises(FileNotFoundError, match="--prompts"):
        build(captions, tmp_path, prompts="nothing.csv")


# Visual Genome


@pytest.fixture
def genome(tmp_path, monkeypatch):
    """A tiny Visual Genome whose .h5 files are arrays in memory: h5py is optional."""
    files = {}
    module = types.ModuleType("h5py")
    module.File = lambda path, mode: tiny_regions.Arrays(files[str(path)])
    monkeypatch.setitem(sys.modules, "h5py", module)

    def save(path, arrays):
        files[str(path)] = {name: np.asarray(array) for name, array in arrays.items()}
        path.write_bytes(b"")

    return tiny_regions.save_visual_genome(tmp_path, save), files


def test_objects_of_visual_genome(genome):
    root, _ = genome
    dataset = build(visual_genome, root)
    assert dataset.region_classes == ("grass", "car")
    assert dataset.names == [f"images/VG_100K/{name}.png" for name in "abc"]
    assert [level(dataset[i]) for i in range(3)] == [0, 1, 2]
    assert [len(dataset[i]["boxes"]) for i in range(3)] == [2, 1, 0]  # the .h5 file has the reverse order
    assert dataset[0]["boxes"].tolist() == [BOX, [0, 4, 8, 6]] and dataset[0]["box_class"].tolist() == [1, 0]
    (root / "images" / "VG_100K" / "b.png").unlink()
    assert build(visual_genome, root).unpaired == {"images that are listed but do not exist": ("VG_100K/b.png",)}


def test_wrong_files_of_visual_genome_are_named(genome, monkeypatch):
    root, files = genome
    del files[str(root / "train.h5")]["object_boxes"]
    with pytest.raises(ValueError, match="train.h5 has no object_boxes"):
        build(visual_genome, root)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match="pip install h5py"):
        build(visual_genome, root)
