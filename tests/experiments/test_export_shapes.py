"""What `export_shapes.py` writes is what the scenes are: ids, classes, boxes and masks, in every format."""

import csv
import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from helpers.tiny_runs import call
from train.data.formats import coco, layout_lines, panoptic, prompts, yolo
from train.data.formats.metadata import decode_name
from train.datasets import panoptic_folder, shapes
from train.datasets._shapes_render import draw_semantic

SIZE, COUNT = 48, 30
FORMATS = ("coco", "two_channel", "mamoe", "yolo", "semantic", "layout_lines", "captions")
FIELDS = ("boxes", "box_class", "masks", "panoptic", "segment_class")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "new" / "folder"
    call("experiments/export_shapes.py", f"--out {out} --splits train val judge --limit {COUNT} --shapes_size {SIZE}")
    return out


@cache
def truths(split="val"):
    """The scenes, and their items as arrays."""
    dataset = shapes.build(shapes.Config(shapes_size=SIZE), split)
    return [make_truth(dataset[index], dataset.scene(index)) for index in range(COUNT)]


def make_truth(item, scene):
    arrays = {name: item[name].numpy() for name in FIELDS}
    name = scene.file_name.rpartition("/")[2]
    return SimpleNamespace(image=item["image"], name=name, scene=scene, item=item, **arrays)


def read(path):
    with Image.open(path) as picture:
        return np.array(picture)


def read_json(path):
    return json.loads(path.read_text())


def differing(mask, other):
    return int((mask != other).sum())


def test_each_format_has_all_images(exported):
    assert {path.name for path in exported.iterdir()} == set(FORMATS)  # and no temporary folder
    for split, word in (("train", "train"), ("val", "val"), ("judge", "test")):
        names = {truth.name: truth.image for truth in truths(split)}
        for kind in FORMATS:
            folder = {"coco": f"{word}2017", "two_channel": word, "mamoe": word}.get(kind, f"images/{word}")
            files = sorted((exported / kind / folder).iterdir())
            assert [file.name for file in files] == sorted(names)
            assert np.array_equal(read(files[3]), names[files[3].name])


def test_coco_instances_are_the_things(exported):
    content = read_json(exported / "coco" / "annotations" / "instances_val2017.json")
    ids = [each["id"] for each in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    names = {each["id"]: each["name"] for each in content["categories"]}
    off = []
    for image, truth in zip(content["images"], truths(), strict=True):
        assert (image["file_name"], image["height"], image["width"]) == (truth.name, SIZE, SIZE)
        own = [each for each in content["annotations"] if each["image_id"] == image["id"] and not each["iscrowd"]]
        assert [names[each["category_id"]] for each in own] == [
            shapes.Shapes.region_classes[number] for number in truth.box_class
        ]
        np.testing.assert_allclose(coco.to_xyxy([each["bbox"] for each in own]), truth.boxes, atol=1e-3)
        for each, mask in zip(own, truth.masks, strict=True):
            is_ring = names[each["category_id"]] == "ring"
            assert isinstance(each["segmentation"], dict if is_ring else list)
            decoded = coco.decode_segmentation(each["segmentation"], (SIZE, SIZE))
            off.append(differing(decoded, mask))
            assert off[-1] == 0 or (names[each["category_id"]] == "disc" and off[-1] <= 2)  # it has 128 corners
            assert each["area"] == mask.sum()
    assert sum(off) <= 8


@pytest.mark.parametrize(("split", "word"), [("train", "train"), ("val", "val"), ("judge", "test")])
def test_coco_has_one_crowd_of_several_things(split, word, exported):
    content = read_json(exported / "coco" / "annotations" / f"instances_{word}2017.json")
    (crowd,) = (each for each in content["annotations"] if each["iscrowd"])
    assert isinstance(crowd["segmentation"]["counts"], list)
    several = [len(set(truth.box_class)) < len(truth.box_class) for truth in truths(split)]
    assert crowd["image_id"] == several.index(True) + 1
    truth = truths(split)[crowd["image_id"] - 1]
    members = truth.masks[truth.box_class == crowd["category_id"] - 1]
    assert len(members) > 1
    mask = coco.decode_segmentation(crowd["segmentation"], (SIZE, SIZE))
    assert np.array_equal(mask, members.max(0)) and crowd["area"] == mask.sum()
    assert coco.to_xyxy(crowd["bbox"])[0].tolist() == [*coco.box_of_mask(mask)]


def test_coco_panoptic_maps_and_their_json_agree(exported):
    folder = exported / "coco" / "annotations"
    content = read_json(folder / "panoptic_val2017.json")
    classes = {each["id"]: (each["name"], each["isthing"]) for each in content["categories"]}
    assert list(classes.values()) == [(name, int(i < 6)) for i, name in enumerate(shapes.Shapes.region_classes)]
    for image, truth in zip(content["annotations"], truths(), strict=True):
        decoded = panoptic.decode(read(folder / "panoptic_val2017" / image["file_name"]), "coco")
        assert np.array_equal(decoded.ids, truth.panoptic)
        assert [each["id"] for each in image["segments_info"]] == decoded.segment_id.tolist()
        for each in image["segments_info"]:
            mask = truth.panoptic == each["id"]
            assert each["category_id"] == truth.segment_class[each["id"] - 1] + 1
            assert each["area"] == mask.sum()
            assert coco.to_xyxy(each["bbox"])[0].tolist() == [*coco.box_of_mask(mask)]


def test_coco_captions_are_those_of_the_scenes(exported):
    content = read_json(exported / "coco" / "annotations" / "captions_train2017.json")
    for image, truth in zip(content["images"], truths("train"), strict=True):
        own = [each["caption"] for each in content["annotations"] if each["image_id"] == image["id"]]
        assert own == truth.item["captions"]


@pytest.mark.parametrize(("encoding", "first"), [("two_channel", 1), ("mamoe", 0)])
def test_other_encodings_hold_the_same_segments(encoding, first, exported):
    folder, pictures = exported / encoding, []
    categories = read_json(folder / "categories.json")
    assert [each["id"] for each in categories] == list(range(first, first + 10))
    for truth in truths():
        pictures.append(read(folder / "panoptic" / "val" / truth.name))
        decoded = panoptic.decode(pictures[-1], encoding)
        segments = list(zip(decoded.segment_id, decoded.segment_class, strict=True))
        assert len(segments) == len(np.unique(truth.panoptic[truth.panoptic > 0]))
        for number, category in segments:
            (inside,) = np.unique(truth.panoptic[decoded.ids == number])  # one segment, and not 0
            assert (decoded.ids == number).sum() == (truth.panoptic == inside).sum()
            assert truth.segment_class[inside - 1] == category - first
            assert encoding != "mamoe" or number == inside
        assert np.array_equal(decoded.ids == 0, truth.panoptic == 0)
    things = {each["id"]: bool(each["isthing"]) for each in categories}
    panoptic.check_encoding(pictures, encoding, things)
    other = {"two_channel": "mamoe", "mamoe": "two_channel"}[encoding]
    with pytest.raises(ValueError, match=f"they look like {encoding}"):
        panoptic.check_encoding(pictures, other, things)


@pytest.mark.parametrize("encoding", ["two_channel", "mamoe"])
def test_words_of_things_are_read_beside_their_segments(encoding, exported):
    config = panoptic_folder.Config(
        data_dir=str(exported / encoding),
        panoptic_encoding=encoding,
        prompts="prompts_{split}.csv",
        instance_prompts="instance_prompts_{split}.json",
    )
    dataset = panoptic_folder.build(config, "val")
    items = {item["file_name"].rpartition("/")[2]: item for item in map(dataset.__getitem__, range(len(dataset)))}
    assert len(items) == COUNT
    for truth in truths():
        item = items[truth.name]
        read_words = dict(zip(item["box_id"].tolist(), item["box_words"], strict=True))
        for number, words in read_words.items():
            (inside,) = np.unique(truth.panoptic[item["panoptic"].numpy() == number])
            assert truth.item["box_words"][inside - 1] == words
        assert len(read_words) == len(truth.boxes)


def test_yolo_boxes_and_polygons_are_the_things(exported):
    names = yaml.safe_load((exported / "yolo" / "data.yaml").read_text())["names"]
    assert list(names.items()) == list(enumerate(shapes.THINGS))
    off = []
    for truth in truths():
        label = truth.name.replace(".png", ".txt")
        boxes = yolo.decode_lines((exported / "yolo" / "labels" / "val" / label).read_text())
        outlines = yolo.decode_lines((exported / "yolo" / "polygons" / "val" / label).read_text())
        for objects in (boxes, outlines):
            assert objects.classes.tolist() == truth.box_class.tolist()
            np.testing.assert_allclose(SIZE * objects.boxes, truth.boxes, atol=1e-4)
        assert boxes.polygons == [None] * len(truth.boxes)
        for kind, polygon, mask in zip(outlines.classes, outlines.polygons, truth.masks, strict=True):
            off.append(differing(coco.fill_polygons([SIZE * polygon], (SIZE, SIZE)), mask))
            assert off[-1] == 0 or (shapes.THINGS[kind] in ("disc", "ring") and off[-1] <= 3)
    assert sum(off) <= 12


def test_semantic_maps_layouts_and_captions(exported):
    categories = read_json(exported / "semantic" / "categories.json")
    assert [(each["id"], each["name"]) for each in categories] == list(enumerate(shapes.Shapes.region_classes))
    captions = prompts.decode_prompts((exported / "captions" / "prompts_val.csv").read_text())
    words = prompts.decode_instance_prompts((exported / "captions" / "instance_prompts_val.json").read_text())
    assert len(captions) == len(words) == COUNT
    for truth in truths():
        levels = read(exported / "semantic" / "masks" / "val" / truth.name)
        assert np.array_equal(levels, draw_semantic(truth.scene, truth.panoptic))
        text = (exported / "layout_lines" / "layouts" / "val" / truth.name.replace(".png", ".txt")).read_text()
        layout = layout_lines.decode_lines(text)
        assert layout.names == [shapes.THINGS[number] for number in truth.box_class]
        np.testing.assert_allclose(SIZE * layout.boxes, truth.boxes, atol=1e-4)
        assert captions[truth.name] == truth.item["captions"][0]
        assert words[truth.name] == dict(enumerate(truth.item["box_words"], 1))


def test_mamoe_has_prompts_under_the_same_names(exported):
    folder = exported / "mamoe"
    for word, split in (("train", "train"), ("val", "val"), ("test", "judge")):
        names = sorted(truth.name for truth in truths(split))
        for path in (folder / word, folder / "panoptic" / word):
            assert sorted(file.name for file in path.iterdir()) == names
        with (folder / f"prompts_{word}.csv").open(newline="") as file:
            assert sorted(row["img_name"] for row in csv.DictReader(file)) == names


def test_file_names_say_what_the_pictures_show(exported):
    for truth in truths():
        data = decode_name(f"val2017/{truth.name}")
        metadata = (data.camera, data.time, data.weather, data.light, data.location)
        assert metadata == tuple(truth.item[name] for name in ("camera", "time", "weather", "light", "location"))


def test_classes_that_are_left_out_keep_their_numbers(tmp_path):
    flags = "--format semantic --splits val --limit 3 --shapes_size 24 --shapes_things ring bow --shapes_grounds sand"
    call("experiments/export_shapes.py", f"--out {tmp_path} {flags}")
    maps = [read(path) for path in sorted((tmp_path / "semantic" / "masks" / "val").iterdir())]
    assert len(maps) == 3 and {4, 5} & (found := {int(level) for each in maps for level in np.unique(each)})
    assert 8 in found and found <= {4, 5, 8, 255}
    categories = read_json(tmp_path / "semantic" / "categories.json")
    assert [each["name"] for each in categories] == list(shapes.Shapes.region_classes)


def refusal(flags, capfd):
    with pytest.raises(SystemExit) as stop:
        call("experiments/export_shapes.py", flags)
    assert stop.value.code == 2
    return capfd.readouterr().err


def test_nothing_is_overwritten(tmp_path, capfd):
    (tmp_path / "yolo").mkdir()
    message = refusal(f"--out {tmp_path} --format semantic yolo --limit 1", capfd)
    assert "yolo exists already: delete it, or pass another --out" in message
    assert [path.name for path in tmp_path.iterdir()] == ["yolo"]
    assert "pass --out" in refusal("--limit 1", capfd)
    assert "pass --format" in refusal(f"--out {tmp_path} --format", capfd)


def test_an_interrupted_export_leaves_no_folder(tmp_path, monkeypatch):
    saves = []

    def fail_at_the_third(picture, path):
        saves.append(path)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail_at_the_third)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        call("experiments/export_shapes.py", f"--out {tmp_path / 'out'} --format semantic --limit 5")
    assert len(saves) == 3 and list((tmp_path / "out").iterdir()) == []
