"""Folders of panoptic maps with prompts: what each map becomes, and the refusals of files that do not fit."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from experiments.harness import panoptic_inputs
from experiments.harness.panoptic_inputs import (
    PanopticMapsConfig,
    check_ids,
    find_captions,
    find_words,
    list_maps,
    name_classes,
    open_reader,
    provenance_of,
    segment_vocabulary,
    with_words,
)
from helpers.tiny_regions import IDS, SIZE, save_json, save_picture, save_text
from train.data.formats import panoptic
from train.data.formats.categories import Categories
from train.layout_files import LayoutVocabulary

KNOWN = Categories((8, 13), ("vegetation", "car"), (False, True))  # by number: 0 and 1
VOCABULARY = LayoutVocabulary(KNOWN, (), ("panoptic", "segment_id", "segment_class", "box_id", "box_words"), SIZE)
SEGMENTS = np.array([1, 2]), np.array([13, 8])  # ids and categories: a car over vegetation
NAMES = {"vegetation": 8, "car": 13}


@pytest.fixture
def folder(tmp_path):
    """Maps of two images in the encoding mamoe."""
    for name in ("b.png", "a.png"):
        save_picture(tmp_path / "maps" / name, panoptic.encode(IDS, "mamoe", *SEGMENTS))
    return tmp_path


def settings_of(folder, **options):
    return PanopticMapsConfig(maps=str(folder / "maps"), **{"panoptic_encoding": "mamoe", **options})


def files_of(folder, **options):
    """The maps of a folder, each with the fields that are read of it."""
    settings = settings_of(folder, **options)
    files = list_maps(settings)
    reader = open_reader(settings, files, VOCABULARY)
    return [SimpleNamespace(**file._asdict(), fields=reader.read(file)) for file in files]


def write_coco(folder, step=5_000_000, categories=None):
    rows = [{"id": step, "category_id": 13}, {"id": 2 * step, "category_id": 8}]
    for name in ("a.png", "b.png"):
        save_picture(folder / "maps" / name, panoptic.encode(IDS * step, "coco"))
    annotations = [{"image_id": name, "file_name": name, "segments_info": rows} for name in ("a.png", "b.png", "c.png")]
    categories = categories or [
        {"id": number, "name": name, "isthing": name == "car"} for name, number in NAMES.items()
    ]
    images = [{"id": row["image_id"], "file_name": row["file_name"]} for row in annotations]
    content = {"images": images, "annotations": annotations, "categories": categories}
    save_json(folder / "maps.json", content)


# Maps


def test_all_encodings_give_the_same_map(folder):
    for encoding in reversed(panoptic.ENCODINGS):  # coco last: its JSON file stays
        colors = panoptic.encode(IDS, encoding, *SEGMENTS)
        save_picture(folder / "maps" / "a.png", colors)
        save_picture(folder / "maps" / "b.png", colors)
        if encoding == "coco":
            write_coco(folder)
        for given in (encoding, None):
            if (encoding, given) == ("mamoe", None):  # mamoe of few segments may be two_channel
                continue
            file, _ = files_of(folder, panoptic_encoding=given)
            assert file.name == file.key == "a"
            numbers = dict(zip(file.fields["segment_id"].tolist(), file.fields["segment_class"].tolist(), strict=True))
            ids = file.fields["panoptic"].as_subclass(Tensor).numpy()
            classes = np.array([numbers.get(each, -1) for each in ids.flatten().tolist()]).reshape(SIZE)
            assert (classes == np.array([-1, 1, 0])[IDS]).all()
            assert file.fields["box_class"].tolist() == [1] and len(file.fields["box_id"]) == 1


def test_classes_are_matched_by_name_not_by_id(folder):
    write_coco(folder, categories=[{"id": 13, "name": "car"}, {"id": 8, "name": "vegetation", "isthing": 0}])
    file, _ = files_of(folder, panoptic_encoding="coco")
    assert file.fields["segment_class"].tolist() == [1, 0]  # its own numbers are 0 and 1
    save_picture(folder / "maps" / "a.png", panoptic.encode(IDS, "mamoe", SEGMENTS[0], np.array([0, 1])))
    (folder / "maps" / "b.png").unlink()
    save_text(folder / "maps" / "classes.txt", "car\nvegetation\n")
    assert files_of(folder)[0].fields["segment_class"].tolist() == [1, 0]
    (folder / "maps" / "classes.txt").rename(folder / "mine.txt")
    listed = files_of(folder, categories=str(folder / "mine.txt"))
    assert listed[0].fields["segment_class"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="not of the encoding mamoe.* or check the ids of the categories"):
        files_of(folder)


def test_maps_in_subfolders_and_with_endings_are_found(folder):
    colors = panoptic.encode(IDS, "mamoe", *SEGMENTS)
    save_picture(folder / "maps" / "berlin" / "c_gtFine_panoptic.png", colors)
    files = files_of(folder, panoptic_ending="_gtFine_panoptic")
    assert [file.name for file in files] == ["a", "b", "berlin_c_gtFine_panoptic"]
    assert [file.key for file in files] == ["a", "b", "c"]
    save_picture(folder / "maps" / "berlin_c_gtFine_panoptic.png", colors)
    with pytest.raises(ValueError, match="have the same name"):
        files_of(folder)
    save_picture(folder / "maps" / "bonn" / "a.png", colors)
    (folder / "maps" / "berlin_c_gtFine_panoptic.png").unlink()
    with pytest.raises(ValueError, match="have one name, by which prompts and words are found"):
        files_of(folder)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"panoptic_encoding": "two_channel"}, "not of the encoding two_channel; they look like mamoe"),
        ({"panoptic_encoding": "coco"}, "maps.json does not exist: pass the JSON file of the maps as --panoptic_json"),
        ({"categories": "none.json"}, "none.json does not exist: pass the list of classes as --categories"),
    ],
)
def test_maps_that_cannot_be_read_are_refused(folder, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        files_of(folder, **options)


def test_maps_that_fit_no_list_are_refused(folder):
    write_coco(folder)
    save_picture(folder / "maps" / "d.png", panoptic.encode(IDS, "coco"))
    with pytest.raises(ValueError, match="d.png not in the JSON file: pass theirs as --panoptic_json"):
        files_of(folder, panoptic_encoding="coco")
    (folder / "maps" / "d.png").unlink()
    write_coco(folder, categories=[{"id": 13, "name": "lorry"}, {"id": 8, "name": "vegetation"}])
    with pytest.raises(ValueError, match=r"a.png: got the class 'lorry', wanted one of vegetation, car"):
        files_of(folder, panoptic_encoding="coco")
    with pytest.raises(ValueError, match="got --categories beside .*maps.json, which has the classes"):
        files_of(folder, panoptic_encoding=None, categories="mine.txt")


def test_folders_without_maps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got no maps: pass a folder"):
        list_maps(PanopticMapsConfig())
    with pytest.raises(FileNotFoundError, match="maps is not a folder"):
        files_of(tmp_path)
    (tmp_path / "maps").mkdir()
    save_text(tmp_path / "maps" / "readme.txt", "")
    with pytest.raises(ValueError, match="has no .png or .bmp or .tif or .tiff file"):
        files_of(tmp_path)


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="got --prompts and --prompt"):
        PanopticMapsConfig(prompts="a.csv", prompt="a street")
    with pytest.raises(ValueError, match="got --panoptic_json for maps of mamoe"):
        PanopticMapsConfig(panoptic_encoding="mamoe", panoptic_json="a.json")


@pytest.mark.parametrize(
    "reads, options, message",
    [
        (("panoptic", "segment_class"), {"instances": "a.json"}, "got --instances for logs/run, which reads panoptic"),
        (("panoptic", "segment_class"), {"prompts": "a.csv"}, "got --prompts .* pass a run with --conditions text"),
        (("label",), {}, "which reads label: pass a run with --conditions region_words, or with --layout_regions"),
        (("boxes", "box_class"), {}, "boxes and masks: run_layout_to_image.py"),
        ((), {}, "which reads no conditions"),
    ],
)
def test_models_that_do_not_read_them_are_refused(monkeypatch, reads, options, message):
    trained = SimpleNamespace(run="logs/run", sampler=SimpleNamespace(conditions=reads))
    monkeypatch.setattr(panoptic_inputs, "trained_vocabulary", lambda trained: replace(VOCABULARY, fields=reads))
    with pytest.raises(ValueError, match=message):
        segment_vocabulary(trained, PanopticMapsConfig(**options))


# Prompts


def captions_of(folder, text, name="prompts.csv", **options):
    save_text(folder / name, text)
    settings = settings_of(folder, prompts=str(folder / name), **options)
    return find_captions(settings, list_maps(settings))


def test_prompts_are_found_by_names_without_suffixes(folder):
    assert captions_of(folder, 'img_name,prompt\nb.jpg,"a car, far"\na.png,grass\n') == ["grass", "a car, far"]
    ending = "img_name,prompt\nb_leftImg8bit.png,b\nx/a_leftImg8bit.png,a\n"
    assert captions_of(folder, ending, image_ending="_leftImg8bit") == ["a", "b"]
    assert captions_of(folder, '{"a.png": "one", "b.png": ["two", "three"]}', "prompts.json") == ["one", "two"]


def test_maps_and_prompts_without_partners_are_refused(folder):
    lines = "img_name,prompt\na.png,grass\n"
    with pytest.raises(ValueError, match="has no prompt for b.png: add one for each, or pass --allow_unmatched"):
        captions_of(folder, lines)
    assert captions_of(folder, lines, allow_unmatched=True) == ["grass", None]
    assert captions_of(folder, lines, n_images=1) == ["grass", None]  # b.png is not drawn
    stray = f"{lines}b.png,car\nc.png,sky\nd.png,sea\n"
    with pytest.raises(ValueError, match=r"prompts of c.png and 1 more, but .*maps has no such map: check"):
        captions_of(folder, stray)
    assert captions_of(folder, stray, allow_unmatched=True) == ["grass", "car"]
    with pytest.raises(ValueError, match="has no such map"):  # of another folder: nothing fits
        captions_of(folder, "img_name,prompt\nc.png,sky\n", allow_unmatched=True)
    with pytest.raises(ValueError, match="a.png and a.jpg are the same but for the suffix"):
        captions_of(folder, f"{lines}a.jpg,car\n")
    with pytest.raises(ValueError, match="wanted img_name and prompt"):
        captions_of(folder, "name,text\na,b\n")


def words_of(folder, content, **options):
    save_json(folder / "instances.json", content)
    settings = settings_of(folder, instances=str(folder / "instances.json"), **options)
    return find_words(settings, list_maps(settings))


def test_words_are_those_of_the_instances_named(folder):
    assert words_of(folder, {"b.png": {"1": "a red car"}}) == [{}, {1: "a red car"}]
    file, _ = files_of(folder)
    assert words_and_ids(with_words(file.fields, {1: "a red car"})) == (["a red car"], [1])
    assert words_and_ids(with_words(file.fields, {})) == ([""], [1])  # the name of its class
    assert words_and_ids(with_words(file.fields, {2: "a lawn"})) == (["", "a lawn"], [1, 2])  # of stuff


def words_and_ids(fields):
    return fields["box_words"], fields["box_id"].tolist()


def test_words_of_other_images_or_ids_are_refused(folder):
    with pytest.raises(ValueError, match="prompts of c.png, but "):
        words_of(folder, {"c.png": {"1": "a man"}})
    with pytest.raises(ValueError, match="wanted {image: {instance id: prompt}}"):
        words_of(folder, ["a man"])
    file, _ = files_of(folder)
    check_ids({1: "a car", 2: "a lawn"}, file.fields, "a.png")
    with pytest.raises(ValueError, match="a.png has no id 7; its ids are 1, 2: check the ids"):
        check_ids({1: "a car", 7: "a man"}, file.fields, "a.png")


def test_maps_of_grey_levels_part_no_instances(folder):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.array([255, 13, 8], np.uint8)[IDS]).save(folder / "maps" / name)
    file, _ = files_of(folder, panoptic_encoding=None)
    assert file.fields["segment_class"].tolist() == [0, 1] and "box_id" not in file.fields
    assert words_and_ids(with_words(file.fields, {9: "a lawn"})) == (["a lawn"], [9])


def test_classes_are_named_once_larger_first(folder):
    ids = np.array([[1, 1, 2], [3, 3, 2], [3, 3, 3]], np.int32)
    classes = np.array([13, 8, 13])
    save_picture(folder / "maps" / "a.png", panoptic.encode(ids, "mamoe", np.array([1, 2, 3]), classes))
    assert name_classes(files_of(folder)[0].fields, KNOWN.names) == "car, vegetation"
    ids[0] = 2
    save_picture(folder / "maps" / "a.png", panoptic.encode(ids, "mamoe", np.array([1, 2, 3]), classes))
    ids[1:] = 2
    save_picture(folder / "maps" / "b.png", panoptic.encode(ids, "mamoe", np.array([1, 2, 3]), classes))
    assert [name_classes(file.fields, KNOWN.names) for file in files_of(folder)] == ["car, vegetation", "vegetation"]


# Identity


def test_inputs_are_identified_by_their_content(folder, tmp_path):
    save_json(folder / "instances.json", {"a.png": {"1": "a car"}})
    settings = settings_of(folder, instances=str(folder / "instances.json"))
    first = provenance_of(settings, list_maps(settings))
    assert first.keys() == {"maps_sha256", "instances_sha256"}
    (folder / "maps").rename(folder / "moved")
    moved = PanopticMapsConfig(
        maps=str(folder / "moved") + "/", panoptic_encoding="mamoe", instances=settings.instances
    )
    assert provenance_of(moved, list_maps(moved)) == first
    save_json(folder / "instances.json", {"a.png": {"1": "a red car"}})
    changed = provenance_of(moved, list_maps(moved))
    assert changed["maps_sha256"] == first["maps_sha256"] != changed["instances_sha256"] != first["instances_sha256"]
    save_json(folder / "moved" / "categories.json", [{"id": 13, "name": "car"}, {"id": 8, "name": "vegetation"}])
    assert provenance_of(moved, list_maps(moved))["maps_sha256"] != first["maps_sha256"]
