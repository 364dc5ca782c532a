"""Formats of text: YOLO's lines, lines of layouts, names of files, prompts and lists of classes, both ways."""

import numpy as np
import pytest

from helpers.tiny_runs import ROOT
from train.data.formats import layout_lines, metadata, prompts, yolo
from train.data.formats.categories import Categories, decode_categories, encode_categories

FIXTURES = ROOT / "tests" / "fixtures" / "spatial"


def test_yolo_lines_have_boxes_and_polygons():
    objects = yolo.decode_lines("45 0.5 0.25 0.5 0.1\n\n1 0 0 1 0 0.5 0.75\n")
    assert objects.classes.tolist() == [45, 1]
    assert np.allclose(objects.boxes, [[0.25, 0.2, 0.75, 0.3], [0, 0, 1, 0.75]])
    assert objects.polygons[0] is None and objects.polygons[1].tolist() == [[0, 0], [1, 0], [0.5, 0.75]]


def test_yolo_lines_survive_a_round_trip():
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.random((5, 2, 2)), 1).reshape(5, 4)
    polygon = rng.random((4, 2))
    boxes[3] = [*polygon.min(0), *polygon.max(0)]
    objects = yolo.YoloObjects(np.arange(5), boxes, [None, None, None, polygon, None])
    again = yolo.decode_lines(yolo.encode_lines(objects))
    assert again.classes.tolist() == [0, 1, 2, 3, 4] and np.allclose(again.boxes, boxes, atol=1e-8)
    assert np.allclose(again.polygons[3], polygon, atol=1e-8) and again.polygons[0] is None
    assert yolo.decode_lines("").boxes.shape == (0, 4) and yolo.encode_lines(yolo.decode_lines("")) == ""


@pytest.mark.parametrize("line", ["1 2 3", "1 0 0 1 0 1", "car 0 0 1 1", "1 0 0 1 x"])
def test_broken_yolo_lines_are_named(line):
    with pytest.raises(ValueError, match="line 2"):
        yolo.decode_lines(f"1 0.5 0.5 1 1\n{line}\n")


def test_layout_lines_survive_a_round_trip():
    layout = layout_lines.decode_lines("0.25,0.5,0.5,0.25,fire hydrant\n\n0.75,1,-0.5,-1,a, b\n")
    assert layout.names == ["fire hydrant", "a, b"]
    assert layout.boxes.tolist() == [[0.25, 0.5, 0.75, 0.75], [0.25, 0, 0.75, 1]]
    again = layout_lines.decode_lines(layout_lines.encode_lines(layout))
    assert again.names == layout.names and again.boxes.tolist() == layout.boxes.tolist()
    for line in ("0,0,1,car", "0,0,1,x,car", "car"):
        with pytest.raises(ValueError, match="line 1 is .*wanted x,y,w,h,class name"):
            layout_lines.decode_lines(line)


def test_metadata_of_official_names():
    names = np.load(FIXTURES / "prompts.npz")["file_name"].tolist()
    wanted = {  # of some names the public code reads another location, "1" or "data": it splits the whole path at dots
        "n013": ("CAM_FRONT_LEFT", "1536039065504810", "rain", "night", "singapore-onenorth"),
        "n008-2018": ("CAM_BACK", "1533151603537558", "sunny", "daytime", "boston-seaport"),
        "n015": ("CAM_FRONT", "153", "sunny", "daytime", "singapore-hollandvillage"),
        "n003": ("CAM_BACK_RIGHT", "1.5e9", "rain", "night", "boston"),
    }
    for name in set(names[:12]):
        parsed = metadata.decode_name(name)
        assert parsed[1:] == wanted[parsed.info]
        folder, info = name.rpartition("/")[0], parsed.info
        assert metadata.name_on_disk(name) == f"{folder}/{info}__{parsed.camera}__{parsed.time}.jpg"
        assert metadata.encode_name(parsed, folder).lower() == name.lower()
    assert metadata.decode_name(names[12]).location == "boston"
    short = metadata.decode_name(names[15])
    assert short[3:] == ("unknown", "unknown", "unknown") and metadata.name_on_disk(names[15]) == names[15]
    assert metadata.encode_name(short, "samples/CAM_FRONT") == names[15]


@pytest.mark.parametrize("name", ["a.jpg", "a__b.png", "a__b__c__d.png", "a__b__c__d__e__f__g", "a____c.jpg"])
def test_names_of_other_parts_are_refused(name):
    with pytest.raises(ValueError, match="rename the file"):
        metadata.decode_name(name)


def test_a_dot_in_the_time_is_no_suffix():
    assert metadata.decode_name("a__b__1.5").time == "1.5"
    assert metadata.name_on_disk("a__b__1.5__rain__night__x.png") == "a__b__1.5.png"


def test_prompts_of_a_csv_file():
    of = np.load(FIXTURES / "mamoe_prompts.npz")
    expected = dict(zip(of["names"].tolist(), of["prompts"].tolist(), strict=True))
    assert prompts.decode_prompts(str(of["csv_text"])) == expected
    assert prompts.decode_prompts("\ufeff" + prompts.encode_prompts(expected)) == expected
    with pytest.raises(ValueError, match="wanted img_name and prompt"):
        prompts.decode_prompts("name,text\na,b\n")
    with pytest.raises(ValueError, match="line 2.*quote commas"):
        prompts.decode_prompts("img_name,prompt\na,b,c\n")


def test_prompts_of_instances():
    of = np.load(FIXTURES / "mamoe_prompts.npz")
    decoded = prompts.decode_instance_prompts(str(of["json_text"]))
    rows = [(image, key, each) for image, own in decoded.items() for key, each in own.items()]
    columns = (of["instance_image"], of["instance_id"], of["instance_prompt"])
    assert rows == list(zip(*(column.tolist() for column in columns), strict=True))
    assert prompts.decode_instance_prompts(prompts.encode_instance_prompts(decoded)) == decoded
    with pytest.raises(ValueError, match="wanted {image: {instance id: prompt}}"):
        prompts.decode_instance_prompts('{"a": ["b"]}')
    with pytest.raises(ValueError, match="line 1 column 24: got the key '3' twice in an object that ends there"):
        prompts.decode_instance_prompts('{"a": {"3": "", "3": ""}}')


def test_classes_are_numbered_by_their_order():
    categories = decode_categories('{"categories": [{"id": 90, "name": "b"}, {"id": 2, "name": "a", "isthing": 0}]}')
    assert categories == Categories((90, 2), ("b", "a"), (True, False))
    assert categories.numbers([2, 90, 2]).tolist() == [1, 0, 1] and categories.numbers([]).shape == (0,)
    assert decode_categories(encode_categories(categories)) == categories
    with pytest.raises(ValueError, match="category 3.*from 2 to 90"):
        categories.numbers([90, 3])


def test_classes_may_be_a_list_of_names():
    assert decode_categories("names:\n  1: person\n  13: stop sign\n", ".yaml").ids == (1, 13)
    assert decode_categories("names: [person, car]", ".yaml") == decode_categories("person\ncar\n", ".txt")
    assert decode_categories("classes: {0: {name: road, isthing: false}}", ".yml").things == (False,)


@pytest.mark.parametrize("text", ["3", '[{"id": 1}]', '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', '["a", "a"]'])
def test_other_lists_of_classes_are_refused(text):
    with pytest.raises(ValueError, match="wanted a list|two classes have"):
        decode_categories(text)
