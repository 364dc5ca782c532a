"""Layouts from files: every format gives the regions of its images, cropped as in training; odd files are refused."""

import dataclasses
import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch

from experiments.export_shapes import WRITERS, draw
from helpers.tiny_regions import save_coco, save_layout_lines, save_panoptic_folder, save_picture, save_text
from train.data.collate import collate
from train.data.formats.categories import Categories
from train.data.transforms import to_item
from train.datasets import coco, panoptic_folder, shapes
from train.layout_files import LayoutVocabulary, class_names_in, vocabulary_of
from train.layouts import layouts_provenance, read_layouts, write_layouts

BOXES, COLORS = ("boxes", "box_class"), ("boxes", "box_class", "box_color")
MASKS = ("masks", "box_class")
SEGMENTS = ("panoptic", "segment_id", "segment_class")
SIZE, COUNT = 32, 6
ENTRY = {"boxes": [[0.1, 0.2, 0.4, 0.6], [0, 0, 1, 0.5]], "classes": ["ring", 1], "colors": ["blue", 0]}


@cache
def scenes():
    return shapes.build(shapes.Config(shapes_size=SIZE), "val")


def of_shapes(fields, size=(SIZE, SIZE)):
    return vocabulary_of(scenes(), fields, size)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The first scenes of the validation split in files of each format."""
    folder = tmp_path_factory.mktemp("written")
    for name in ("coco", "two_channel", "mamoe", "semantic", "layout_lines"):
        WRITERS[name](folder / name, "val", [draw(scenes().scene(index), SIZE) for index in range(COUNT)])
    return folder


def save(tmp_path, content):
    path = tmp_path / "layouts.json"
    path.write_text(json.dumps(content))
    return path


def classes_of_pixels(row):
    """The class (H, W) of each pixel of a row with segments, 255 where there is none."""
    classes = torch.full(row["panoptic"].shape, 255)
    for number, label in zip(row["segment_id"].tolist(), row["segment_class"].tolist(), strict=True):
        classes[row["panoptic"] == number] = label
    return classes


# Formats


def test_a_list_has_boxes_classes_and_colors_in_its_order(tmp_path):
    empty = {"boxes": [], "classes": [], "colors": [], "name": "a/b c"}
    first, second = read_layouts(save(tmp_path, [ENTRY, empty]), of_shapes(COLORS))
    assert (first.name, second.name) == ("layout_000", "a_b_c")
    assert torch.equal(first.row["boxes"], torch.tensor(ENTRY["boxes"]))
    assert first.row["box_class"].tolist() == [4, 1] and first.row["box_color"].tolist() == [4, 0]
    batch = collate([first.row, second.row])
    assert batch["boxes"].shape == (2, 2, 4) and batch["boxes_mask"].tolist() == [[True, True], [False, False]]


def test_a_list_has_words_of_its_regions(tmp_path):
    """Layouts without words stand beside others; what is outside the image keeps none when it is written."""
    entries = [ENTRY | {"words": ["a blue ring", ""]}, ENTRY, {"boxes": [], "classes": [], "colors": [], "words": []}]
    vocabulary = of_shapes((*BOXES, "box_words"))
    layouts = read_layouts(save(tmp_path, entries), vocabulary)
    assert [layout.row["box_words"] for layout in layouts] == [["a blue ring", ""], ["", ""], []]
    again = read_layouts(write_layouts(tmp_path / "again", layouts, vocabulary), vocabulary)
    assert [layout.row["box_words"] for layout in again] == [layout.row["box_words"] for layout in layouts]
    assert "box_words" not in read_layouts(save(tmp_path, entries), of_shapes(BOXES))[0].row
    wide = {"boxes": [[-20, 2, -12, 9], [2, 1, 29, 6]], "classes": [0, 1], "words": ["gone", "here"], "size": [10, 30]}
    layouts = read_layouts(save(tmp_path, [wide]), vocabulary)
    (again,) = read_layouts(write_layouts(tmp_path / "wide", layouts, vocabulary), vocabulary)
    assert layouts[0].row["box_words"] == ["gone", "here"] and again.row["box_words"] == ["here"]


def test_written_words_of_segments_are_read_again(tmp_path, written):
    """Of things by their ids, and of stuff where a file has them; maps alone have none."""
    vocabulary = of_shapes((*SEGMENTS, "box_id", "box_words"))
    layouts = read_layouts(written / "mamoe/panoptic/val", vocabulary)
    assert all("box_words" not in layout.row and "box_id" in layout.row for layout in layouts)
    rows = [layout.row | {"box_words": [f"thing {i}" for i in layout.row["box_id"].tolist()]} for layout in layouts]
    layouts = [layout._replace(row=row) for layout, row in zip(layouts, rows, strict=True)]
    path = write_layouts(tmp_path / "maps", layouts, vocabulary)
    for one, other in zip(rows, read_layouts(path, vocabulary), strict=True):
        words = dict(zip(other.row["box_id"].tolist(), other.row["box_words"], strict=True))
        assert {i: each for i, each in words.items() if each} == {i: f"thing {i}" for i in one["box_id"].tolist()}
        assert {*words} == {*other.row["segment_id"].tolist()}
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"][-1]["words"] = "a wide sky"
    path.write_text(json.dumps(content))
    assert "a wide sky" in read_layouts(path, vocabulary)[0].row["box_words"]


def test_the_label_of_a_layout_is_a_number_or_a_name(tmp_path):
    labels = ["hat", "2", 0, None]
    path = save(tmp_path, [ENTRY | {"label": label} for label in labels])
    vocabulary = dataclasses.replace(of_shapes(BOXES), n_classes=3, class_names=("bag", "hat", "2 shoes"))
    assert [layout.row["label"] for layout in read_layouts(path, vocabulary)] == [1, 2, 0, None]
    path = save(tmp_path, [ENTRY, ENTRY | {"label": "hats"}])
    with pytest.raises(ValueError, match="layouts.json: layout 1: got label 'hats', did you mean 'hat'?"):
        read_layouts(path, vocabulary)


def test_a_key_twice_in_a_layout_is_refused(tmp_path):
    path = tmp_path / "layouts.json"
    path.write_text('[{"boxes": [],\n"classes": [], "classes": []}]')
    with pytest.raises(ValueError, match="layouts.json: line 2 column 29: got the key 'classes' twice in an object"):
        read_layouts(path, of_shapes(BOXES))
    path.write_text('{"images": [], "annotations": [],\n"images": []}')
    with pytest.raises(ValueError, match="layouts.json: line 2 column 13: got the key 'images' twice in an object"):
        read_layouts(path, of_shapes(BOXES))


def test_pixels_of_a_stated_size_are_cropped_as_in_training(tmp_path):
    entry = {"boxes": [[10, 0, 20, 10]], "classes": ["disc"], "size": [10, 30]}
    (layout,) = read_layouts(save(tmp_path, [entry]), of_shapes(BOXES))
    assert torch.allclose(layout.row["boxes"], torch.tensor([[0.0, 0, 1, 1]]), atol=1e-6)  # the middle third is seen
    (layout,) = read_layouts(save(tmp_path, [entry]), of_shapes(BOXES, (8, 24)))
    assert torch.allclose(layout.row["boxes"], torch.tensor([[1 / 3, 0, 2 / 3, 1]]), atol=1e-6)  # all of it


@pytest.mark.parametrize("path", ["coco/annotations/instances_val2017.json", "layout_lines/layouts/val"])
def test_boxes_of_exported_scenes_are_those_of_the_scenes(written, path):
    layouts = read_layouts(written / path, of_shapes(BOXES))
    assert len(layouts) == COUNT
    for index, (name, row) in enumerate(layouts):
        things = scenes().scene(index).things
        assert name.startswith("scene-") and scenes().scene(index).file_name.endswith(f"{name}.png")
        boxes, n = torch.tensor([thing.box for thing in things]), len(things)  # of COCO's file a crowd may follow
        assert len(row["boxes"]) - n in ((0, 1) if "coco" in path else (0,))
        assert torch.allclose(row["boxes"][:n], boxes.float(), atol=1e-5)
        assert row["box_class"][:n].tolist() == [thing.kind for thing in things]


@pytest.mark.parametrize("path", ["coco/annotations/instances_val2017.json", "layout_lines/layouts/val"])
def test_names_of_classes_are_those_of_a_file(written, path):
    """For models that read them as words."""
    assert {*class_names_in(written / path)} <= {*scenes().region_classes} and class_names_in(written / path)


def test_names_of_a_list_are_those_of_its_boxes(tmp_path):
    entries = [ENTRY, {"boxes": [[0, 0, 1, 1]], "classes": ["tower"]}, {"classes": "disc"}, "no layout"]
    assert class_names_in(save(tmp_path, entries)) == ("ring", "tower")
    with pytest.raises(ValueError, match="layouts.json: "):
        class_names_in(save(tmp_path, {"boxes": []}))
    with pytest.raises(FileNotFoundError, match="none.json does not exist: pass a .json file"):
        class_names_in(tmp_path / "none.json")


MAPS = [
    "coco/annotations/panoptic_val2017.json",
    "two_channel/panoptic/val",
    "mamoe/panoptic/val",
    "semantic/masks/val",
]


@pytest.mark.parametrize("path", MAPS)
def test_segments_of_exported_scenes_have_their_classes(written, path):
    if path.startswith("two_channel"):  # whose categories count from 1
        shutil.copy(written / "two_channel" / "categories.json", written / path)
    layouts = read_layouts(written / path, of_shapes(SEGMENTS))
    assert len(layouts) == COUNT
    for index, (_, row) in enumerate(layouts):
        item = scenes()[index]
        assert row.keys() == {*SEGMENTS} and row["panoptic"].dtype == torch.int32
        assert torch.equal(classes_of_pixels(row), item["semantic"].as_subclass(torch.Tensor).long())
        if not path.startswith("semantic"):  # which has one segment for each class
            present = item["panoptic"].unique()
            assert len(row["panoptic"].unique()) == len(present)


def test_classes_are_matched_by_name_not_by_number(tmp_path):
    save_coco(tmp_path)
    reversed_order = Categories((0, 1, 2), ("tree", "car", "grass"), (True, True, False))
    vocabulary = LayoutVocabulary(reversed_order, (), BOXES, (6, 8))
    layouts = read_layouts(tmp_path / "annotations" / "instances_train2017.json", vocabulary)
    assert [row["box_class"].tolist() for _, row in sorted(layouts)] == [[1, 1], [1, 1], []]
    vocabulary = LayoutVocabulary(reversed_order, (), SEGMENTS, (6, 8))
    for _, row in read_layouts(tmp_path / "annotations" / "panoptic_train2017.json", vocabulary):
        assert row["segment_id"].tolist() == [1, 2] and row["segment_class"].tolist() == [1, 2]


def item_fields(dataset, index, size, fields):
    item = to_item(dataset[index], size, 3)
    return collate([{name: item[name] for name in fields}])


@pytest.mark.parametrize("size", [(6, 8), (4, 4), (9, 3)])
def test_what_is_read_is_what_training_sees(tmp_path, size):
    save_coco(tmp_path / "coco")
    dataset = coco.build(coco.Config(data_dir=str(tmp_path / "coco")), "train")
    instances = tmp_path / "coco/annotations/instances_train2017.json"
    for fields in (BOXES, MASKS):
        for index, (_, row) in enumerate(sorted(read_layouts(instances, vocabulary_of(dataset, fields, size)))):
            expected = item_fields(dataset, index, size, fields)
            assert all(torch.equal(collate([row])[name], expected[name]) for name in expected)
    save_panoptic_folder(tmp_path / "maps")
    dataset = panoptic_folder.build(panoptic_folder.Config(data_dir=str(tmp_path / "maps")), "train")
    for fields in (SEGMENTS, BOXES):
        for index, (_, row) in enumerate(
            read_layouts(tmp_path / "maps/panoptic/train", vocabulary_of(dataset, fields, size))
        ):
            expected = item_fields(dataset, index, size, fields)
            assert all(torch.equal(collate([row])[name], expected[name]) for name in expected)


@pytest.mark.parametrize("path", MAPS)
def test_masks_of_maps_are_their_things(written, path):
    if path.startswith("semantic"):
        with pytest.raises(ValueError, match="has no masks, which the model reads: pass masks"):
            read_layouts(written / path, of_shapes(MASKS))
        return
    if path.startswith("two_channel"):
        shutil.copy(written / "two_channel" / "categories.json", written / path)
    things = torch.tensor(scenes().region_things)
    for _, row in read_layouts(written / path, of_shapes((*SEGMENTS, *MASKS))):
        classes = classes_of_pixels(row)
        for mask, number in zip(row["masks"].as_subclass(torch.Tensor), row["box_class"], strict=True):
            assert mask.any() and (classes[mask > 0] == number).all()
        known = classes < len(things)
        assert torch.equal(row["masks"].as_subclass(torch.Tensor).any(0), known & things[classes.where(known, 0)])


# Writing and identity


def test_written_layouts_are_read_again(tmp_path, written):
    wide = {"boxes": [[-20, 2, 12, 9], [2, 1, 29, 6], [35, 2, 60, 9]], "classes": [0, 1, 2], "colors": [0, 1, 2]}
    vocabulary = of_shapes(COLORS)
    layouts = read_layouts(save(tmp_path, [ENTRY, wide | {"size": [10, 30], "name": "wide"}]), vocabulary)
    assert layouts[1].row["boxes"].min() < 0  # as in training
    again = read_layouts(write_layouts(tmp_path / "again", layouts, vocabulary), vocabulary)
    assert [name for name, _ in again] == ["layout_000", "wide"]
    assert all(torch.equal(layouts[0].row[name], again[0].row[name]) for name in COLORS)
    assert again[1].row["box_class"].tolist() == again[1].row["box_color"].tolist() == [0, 1]
    assert torch.equal(again[1].row["boxes"], layouts[1].row["boxes"][:2].clamp(0, 1))
    vocabulary = of_shapes(SEGMENTS)
    layouts = read_layouts(written / "mamoe/panoptic/val", vocabulary)
    again = read_layouts(write_layouts(tmp_path / "maps", layouts, vocabulary), vocabulary)
    for one, other in zip(layouts, again, strict=True):
        assert one.name == other.name and torch.equal(classes_of_pixels(one.row), classes_of_pixels(other.row))


def test_written_masks_are_read_again(tmp_path):
    """Overlapping ones, in their order, with their colours; boxes are those around them."""
    ring = {"size": [SIZE, SIZE], "counts": [2 * SIZE, 3, SIZE * SIZE - 2 * SIZE - 3]}  # the top of the third column
    entry = {
        "name": "a",
        "masks": [[[4, 4, 12, 4, 12, 20, 4, 20]], ring, [[60, 60, 70, 60, 70, 70]], [[8, 0, 30, 0, 30, 30, 8, 30]]],
        "classes": ["disc", "ring", "bow", "disc"],
        "colors": ["red", "blue", "red", "green"],
        "size": [SIZE, SIZE],
    }
    fields = ("masks", *COLORS)
    layouts = read_layouts(save(tmp_path, [entry]), of_shapes(fields))
    (row,), masks = [layout.row for layout in layouts], layouts[0].row["masks"].as_subclass(torch.Tensor)
    assert masks.flatten(1).sum(1).tolist() == [8 * 16, 3, 0, 22 * 30] and masks[[0, 3]].all(0).sum() == 4 * 16
    assert torch.equal(row["boxes"][0], torch.tensor([4.0, 4, 12, 20]) / SIZE)
    (again,) = read_layouts(write_layouts(tmp_path / "again", layouts, of_shapes(fields)), of_shapes(fields))
    kept = [0, 1, 3]  # the other one is outside the image
    assert again.name == "a" and all(torch.equal(again.row[name], row[name][kept]) for name in fields)
    (wide,) = read_layouts(save(tmp_path, [entry]), of_shapes(MASKS, (8, 16)))  # cropped as in training
    assert wide.row["masks"].shape == (4, 8, 16)


def test_the_provenance_changes_with_any_file_that_is_read(tmp_path):
    folder = save_layout_lines(tmp_path) / "layouts" / "train"
    before = layouts_provenance(folder)
    assert before == layouts_provenance(shutil.copytree(folder, tmp_path / "elsewhere"))
    save_text(folder / "b.txt", "0,0,1,1,car\n")
    assert layouts_provenance(folder) != before and layouts_provenance(None) == {}
    path = save_coco(tmp_path / "coco") / "annotations" / "panoptic_val2017.json"
    before = layouts_provenance(path)
    save_picture(path.with_suffix("") / "d.png", 3)
    assert layouts_provenance(path) != before


# Refusals

REFUSED = {
    "pixels": ([{"boxes": [[3, 2, 14, 16]], "classes": ["disc"]}], r'layout 0: got the box .*"size": \[height'),
    "class": ([{"boxes": [[0, 0, 1, 1]], "classes": ["disk"]}], "layout 0: got the class 'disk', did you mean 'disc'"),
    "number": ([{"boxes": [[0, 0, 1, 1]], "classes": [10]}], "got the class 10, wanted .* a number from 0 to 9"),
    "true": ([{"boxes": [[0, 0, 1, 1]], "classes": [True]}], "got the class True"),
    "count": ([{"boxes": [[0, 0, 1, 1]], "classes": []}], "got 0 classes for 1 boxes"),
    "words": ([{"boxes": [[0, 0, 1, 1]], "classes": [0], "words": ["a", "b"]}], "got 2 words for 1 regions, wanted"),
    "no words": ([{"boxes": [[0, 0, 1, 1]], "classes": [0], "words": "a"}], "got words 'a' for 1 regions"),
    "number as words": ([{"boxes": [[0, 0, 1, 1]], "classes": [0], "words": [3]}], "got 1 words for 1 regions"),
    "corners": ([{"boxes": [[0, 0, 1]], "classes": [0]}], r"wanted a list of \[x0, y0, x1, y1\]"),
    "empty box": ([{"boxes": [[0.5, 0, 0.5, 1]], "classes": [0], "name": "thin"}], "thin: got boxes .* x0 < x1"),
    "nan": ([{"boxes": [[0.5, 0, float("nan"), 1]], "classes": [0]}], "wanted fractions from 0 to 1"),
    "size": ([{"boxes": [], "classes": [], "size": [0, 3]}], r"got size \[0, 3\]"),
    "key": ([{"boxes": [], "classes": [], "colour": []}], "got 'colour', did you mean 'colors'"),
    "no boxes": ([{"classes": []}], "layout 0 is .*, wanted an object with boxes and classes"),
    "both": ([{"boxes": [], "masks": [], "classes": []}], "or masks in place of boxes"),
    "no size": ([{"masks": [[[0, 0, 4, 0, 4, 4]]], "classes": [0]}], "layout 0: got size None, wanted .height, width"),
    "mask": ([{"masks": [[0, 0, 4]], "classes": [0], "size": [8, 8]}], "got a segmentation"),
    "twice": ([{"boxes": [], "classes": [], "name": "a"}] * 2, "two layouts have the name a"),
    "empty": ([], "has no layouts"),
    "object": ({}, "wanted a list such as"),
    "no list": ({"images": [], "annotations": None}, "wanted a list such as"),
    "no categories": ({"images": [], "annotations": []}, "has no categories"),
}  # fmt: skip


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED)
def test_odd_files_are_refused_by_name(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"layouts.json.*{message}"):
        read_layouts(save(tmp_path, content), of_shapes(BOXES))


def test_what_the_model_reads_must_be_there(tmp_path, written):
    with pytest.raises(ValueError, match='layout_000 has no box_color, .* "colors"'):
        read_layouts(save(tmp_path, [{"boxes": [], "classes": []}]), of_shapes(COLORS))
    with pytest.raises(ValueError, match="has no panoptic, which the model reads: pass a folder of .png"):
        read_layouts(save(tmp_path, [ENTRY]), of_shapes(SEGMENTS))
    with pytest.raises(ValueError, match="has no boxes, which the model reads: pass boxes"):
        read_layouts(written / "semantic/masks/val", of_shapes(BOXES))
    plain = LayoutVocabulary(Categories((0,), ("disc",), (True,)), (), COLORS, (8, 8))
    entry = {"boxes": [[0, 0, 1, 1]], "classes": [0], "colors": [9]}
    assert read_layouts(save(tmp_path, [entry]), plain)[0].row["box_color"].tolist() == [9]
    with pytest.raises(ValueError, match="the data have no color names: pass numbers"):
        read_layouts(save(tmp_path, [entry | {"colors": ["red"]}]), plain)


def test_without_names_classes_are_numbers(tmp_path):
    """Of data that do not name them; a number beyond the names stays one, too."""
    boxes = vocabulary_of(object(), COLORS, (8, 8))
    path = save(tmp_path, [{"name": "a", "boxes": [[0, 0, 1, 1]], "classes": [3], "colors": [9]}])
    layouts = read_layouts(path, boxes)
    assert json.loads(write_layouts(tmp_path / "again", layouts, boxes).read_text()) == json.loads(path.read_text())
    (entry,) = json.loads(write_layouts(tmp_path / "named", layouts, of_shapes(COLORS)).read_text())
    assert (entry["classes"], entry["colors"]) == ([scenes().region_classes[3]], [9])
    with pytest.raises(ValueError, match="the data have no class names: pass numbers"):
        read_layouts(save(tmp_path, [{"boxes": [[0, 0, 1, 1]], "classes": ["disc"]}]), boxes)
    with pytest.raises(ValueError, match="without names of classes, by which maps are read"):
        vocabulary_of(object(), SEGMENTS, (8, 8))


def test_folders_of_other_files_are_refused(tmp_path, written):
    with pytest.raises(FileNotFoundError, match="nowhere not found: pass a .json file"):
        read_layouts(tmp_path / "nowhere", of_shapes(BOXES))
    with pytest.raises(ValueError, match="neither .txt nor .png"):
        read_layouts(tmp_path, of_shapes(BOXES))
    save_text(tmp_path / "a.txt", "0 0.5 0.5 0.2 0.2\n")  # YOLO
    with pytest.raises(ValueError, match="a.txt: line 1 is .* wanted x,y,w,h,class name"):
        read_layouts(tmp_path, of_shapes(BOXES))
    save_text(tmp_path / "a.txt", "4,5,10,8,disc\n")
    with pytest.raises(ValueError, match="a.txt: got the box .* divide them by the sides"):
        read_layouts(tmp_path, of_shapes(BOXES))
    save_picture(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="got .png and .txt files"):
        read_layouts(tmp_path, of_shapes(BOXES))
    (tmp_path / "a.txt").unlink()
    save_picture(tmp_path / "a.png", np.full((4, 4), 30, np.uint8))
    with pytest.raises(ValueError, match="a.png: got the category 30"):
        read_layouts(tmp_path, of_shapes(SEGMENTS))
    shutil.copytree(written / "two_channel/panoptic/val", tmp_path / "bare", ignore=lambda *_: ["categories.json"])
    with pytest.raises(ValueError, match="categories.json"):  # the categories of shapes count from 0
        read_layouts(tmp_path / "bare", of_shapes(SEGMENTS))
