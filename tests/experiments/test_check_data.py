"""check_data.py counts what annotations hold and finds planted faults, and draws what it read."""

import json
from dataclasses import replace

import check_data
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from experiments.metrics.annotation_counts import AnnotationCounts, find_box_faults, guess_encoding
from experiments.metrics.contact_sheet import class_color, describe_item, save_contact_sheet
from helpers.region_images import NAMES, face_dataset
from train.cli import parse as cli
from train.config import DataConfig
from train.data.formats.categories import Categories
from train.data.formats.panoptic import encode
from train.data.loading import build_dataset
from train.datasets import Ragged, UnreadableImage
from train.datasets.digits import Config as Digits

SHARES = (0.002, 0.02)


def read_picture(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def count_faults(boxes, classes=None, **fields):
    n = len(boxes)
    values = torch.tensor(boxes, dtype=torch.float32).view(n, 4)
    item = {
        "boxes": tv_tensors.BoundingBoxes(values, format="XYXY", canvas_size=(100, 200), clamping_mode=None),
        "box_class": Ragged(torch.tensor(classes or [0] * n)),
    }
    return {fault: which.tolist() for fault, which in find_box_faults(item | fields, SHARES, 3).items()}


def of(faults):
    """The faults that the first box has."""
    return {fault for fault, which in faults.items() if which[0]}


@pytest.mark.parametrize(
    "box, expected",
    [
        ([10, 10, 60, 60], set()),
        ([0, 0, 200, 100], set()),
        ([float("nan"), 0, 9, 9], {"not finite"}),
        ([0, 0, float("inf"), 9], {"not finite"}),
        ([20, 20, 20, 40], {"empty"}),
        ([30, 20, 20, 40], {"empty"}),  # as if x, y, w, h were read as corners
        ([200, 10, 240, 60], {"outside the image"}),
        ([-50, -50, 0, 0], {"outside the image"}),
        ([-9, 10, 60, 60], {"partly outside"}),
        ([-0.4, 0, 200.4, 100], set()),  # rounded
        ([0, 0, 6.3, 6.3], {"below 0.002 of the image", "below 0.02 of the image"}),
        ([0, 0, 19, 19], {"below 0.02 of the image"}),
        ([-90, 0, 3, 90], {"partly outside", "below 0.02 of the image"}),  # after it is clipped
    ],
)
def test_every_fault_of_a_box_has_a_name(box, expected):
    assert of(count_faults([box])) == expected


def test_repeated_and_unknown_boxes_are_found():
    box = [10, 10, 60, 60]
    faults = count_faults([box, box, box, [10, 10, 60, 61]], [0, 0, 1, 0])
    assert faults["given twice"] == [False, True, False, False]  # another class is another box
    assert count_faults([box, box], [3, -1])["of an unknown class"] == [True, True]
    crowd = count_faults([box, box], [0, 1], box_crowd=Ragged(torch.tensor([0, 1])))
    assert crowd["crowd"] == [False, True]


@pytest.mark.parametrize("shift, wrong", [(0, False), (1, False), (3, True), (-3, True)])
def test_a_mask_that_leaves_its_box_is_found(shift, wrong):
    """As it does if corners are read as left, top, width, height."""
    mask = torch.zeros(1, 100, 200, dtype=torch.uint8)
    mask[:, 20 + shift : 40 + shift, 30:50] = 1
    assert count_faults([[30, 20, 50, 40]], masks=tv_tensors.Mask(mask))["whose mask does not fit"] == [wrong]


class NamedFaces:
    """Faces with the names of their classes."""

    region_classes = NAMES
    notes = ("left out: 1 images without a map (7.png)",)
    unpaired = {"images without a map": ("7.png",)}
    labels, n_classes, class_names = None, 0, ()

    def __init__(self, broken=()):
        self.faces, self.broken = face_dataset(), broken

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index in self.broken:
            raise UnreadableImage(f"{index}.png: cut short")
        return self.faces[index] | {"file_name": f"{index}.png"}

    def fingerprint(self):
        return "0"


def count_all(dataset, items=None):
    counts = AnnotationCounts(dataset, SHARES)
    for index in range(20):
        counts.add(index, dataset[index] if items is None else items[index])
    return counts.results()


def test_counts_are_those_of_the_items():
    results = count_all(NamedFaces())
    assert results["items"] == 20 and results["boxes"] == 4 * (0 + 1 + 2 + 3 + 4)
    assert results["boxes per image"] == {"min": 0, "mean": 2, "max": 4} and results["images without boxes"] == 4
    assert results["captions per image"]["mean"] == 1.5 and results["images without captions"] == 5
    assert results["partly outside"] == 4 and results["examples"]["partly outside"] == [
        f"{i}.png" for i in (4, 9, 14, 19)
    ]
    assert results["height"] == {"min": 8, "mean": 8, "max": 8} and results["width"]["max"] == 12
    assert results["duplicate images"] == 15 and results["duplicates"][0] == ("0.png", "5.png")
    by_class = {row["class"]: row for row in results["classes"]}
    assert [by_class[name]["boxes"] for name in NAMES] == [0, 4 * 5, 4 * 3, 4 * 2]
    assert by_class["mouth"]["images"] == 8 and by_class["background"]["images"] == 20
    pixels = sum(row["pixels"] for row in results["classes"])
    assert pixels == 20 * 8 * 12  # of the semantic maps, which label every pixel


def test_numbers_are_counted_and_those_missing():
    items = [
        NamedFaces()[index] | {"year": float("nan") if index < 3 else 2000.0 + index, "gsd": 0.5 + index}
        for index in range(20)
    ]
    results = count_all(NamedFaces(), items)
    assert results["year"] == {"min": 2003, "mean": 2011, "max": 2019} and results["images without year"] == 3
    assert results["gsd"]["max"] == 19.5 and results["images without gsd"] == 0
    assert check_data.format_count(results["gsd"]) == "0.5 / 10.0 / 19.5" and check_data.format_count({}) == "-"
    lines = describe_item(items[0] | {"gsd": 1.23456789, "sky": "clear"})
    assert lines[-1].endswith("sky: clear, year: missing, gsd: 1.2346")


def test_the_unlabelled_share_names_the_worst_image():
    items = [NamedFaces()[index] for index in range(20)]
    semantic = torch.zeros(8, 12, dtype=torch.uint8)
    semantic[:, :9] = 255
    items[13] |= {"semantic": tv_tensors.Mask(semantic)}
    results = count_all(NamedFaces(), items)
    assert results["unlabelled share of semantic"] == {"mean": 0.75 / 20, "max": 0.75, "image": "13.png"}
    assert results["unlabelled share of panoptic"]["max"] == 1 and results["unlabelled share of panoptic"]["image"]


def test_classes_of_whole_images_are_counted():
    digits = build_dataset(DataConfig(), Digits(), "val")
    counts = AnnotationCounts(digits, SHARES)
    for index in range(50):
        counts.add(index, digits[index])
    rows = counts.results()["classes"]
    assert [row["class"] for row in rows] == list("0123456789")
    assert [row["images"] for row in rows] == np.bincount(digits.labels[:50], minlength=10).tolist()


def test_maps_and_rows_that_contradict_each_other_are_found():
    items = [NamedFaces()[index] for index in range(20)]
    items[4] = items[4] | {"segment_id": Ragged(torch.tensor([1, 2])), "segment_class": Ragged(torch.tensor([1, 2]))}
    items[9] = items[9] | {"box_words": ["left eye"], "semantic": tv_tensors.Mask(torch.full((8, 12), 77))}
    items[3] = {name: value for name, value in items[3].items() if name != "camera"}
    results = count_all(NamedFaces(), items)
    assert results["segments without a class"] == 2 and results["items with other fields"] == 1
    assert results["box_words of another length than boxes"] == 1
    assert results["classes of a semantic map without a name"] == 1 and results["classes"][-1]["class"] == "no class 77"


@pytest.mark.parametrize("given, likely", [("two_channel", "two_channel"), ("coco", "two_channel")])
def test_the_encoding_is_guessed_from_the_files(tmp_path, given, likely):
    ids = np.zeros((8, 12), np.int32)
    ids[:4, :6], ids[:4, 6:], ids[4:] = 300, 301, 700
    rgb = encode(ids, "two_channel", np.array([300, 301, 700]), np.array([1, 1, 2]))
    Image.fromarray(rgb).save(tmp_path / "a.png")
    dataset = NamedFaces()
    dataset.root, dataset.files, dataset.encoding = tmp_path, ["a.png"], given
    dataset.categories = Categories((1, 2), ("cat", "sky"), (True, False))
    guess = guess_encoding(dataset, [0], [dataset[4]])
    assert guess["given"] == given and guess["possible"][0] == likely
    assert ("coco" in guess["possible"]) == (given != "coco")  # whose ids are listed, and are others
    assert guess_encoding(NamedFaces(), [0], [dataset[4]]) is None


def run(tmp_path, monkeypatch, capsys, *words, dataset=None):
    if dataset is not None:
        monkeypatch.setattr(check_data, "build_dataset", lambda *_: dataset)
    config = cli.parse(check_data.Config, "check_data", ["--logs_root", str(tmp_path), *words])
    check_data.main(config)
    return capsys.readouterr().out


def test_the_command_reports_and_draws(tmp_path, monkeypatch, capsys):
    words = ["--dataset", "shapes", "--shapes_count", "9", "--check_items", "6", "--sheet_items", "2"]
    printed = run(tmp_path, monkeypatch, capsys, *words, "--sheet_size", "64")
    folder = tmp_path / "check_data_shapes"
    results = json.loads((folder / "results.json").read_text())
    assert results["splits"]["train"]["images"] == 9 and results["splits"]["val"]["items"] == 6
    assert results["images in more than one split"] == 0
    for split in ("train", "val"):
        assert read_picture(folder / f"{split}.png").shape[1] > 2 * 64
    assert "whose mask does not fit" in printed and str(folder / "results.json") in printed
    run(tmp_path, monkeypatch, capsys, *words, "--sheet_size", "64")  # again, into the same folder
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["check_data_shapes"]


def test_the_report_names_what_is_left_out(tmp_path, monkeypatch, capsys):
    printed = run(tmp_path, monkeypatch, capsys, "--n_channels", "1", dataset=NamedFaces(broken=(3,)))
    assert (
        "train: left out: 1 images without a map (7.png)" in printed
        and "train: unreadable: 3.png: cut short" in printed
    )
    assert "images in more than one split: 5" in printed  # of five different ones, all
    assert "train: partly outside: 4.png, 9.png, 14.png, 19.png" in printed
    with pytest.raises(ValueError, match="none of 20 images of train can be read; first error: 0.png: cut short"):
        run(tmp_path, monkeypatch, capsys, dataset=NamedFaces(broken=range(20)))


def test_splits_are_given_once():
    with pytest.raises(ValueError, match="got splits"):
        check_data.CheckConfig(splits=("train", "train"))
    assert replace(check_data.CheckConfig(), splits=("judge",)).splits == ("judge",)


def test_boxes_and_maps_are_drawn_where_they_are(tmp_path):
    """The colours of a class are at the edges of its boxes, and over its pixels in the map."""
    item = face_dataset()[2]
    save_contact_sheet(tmp_path / "sheet.png", [item], NAMES, size=384, n_channels=1)
    sheet = read_picture(tmp_path / "sheet.png")
    panels = sheet[12 + 17 :, 12:]  # below the margin and the name
    edge = panels[200:256, 256]  # the left edge of box 2 (8 of 12 pixels), whose label is above
    outline = panels[100, 256 + 0]
    assert tuple(outline) == class_color(2) and tuple(edge[-1]) != class_color(2)
    inside = panels[110, 384 + 12 + 300]
    assert np.abs(inside - (0.45 * 10 + 0.55 * np.array(class_color(2)))).max() < 3
    assert (sheet[-17:] < 255).any()  # the camera is named at the end


def test_the_source_of_a_pair_is_drawn_before_it(tmp_path):
    target = np.full((16, 16, 3), (200, 0, 0), np.uint8)
    item = {"image": target, "source_image": Image.fromarray(255 - target)}
    save_contact_sheet(tmp_path / "sheet.png", [item], (), size=64, n_channels=3)
    panels = read_picture(tmp_path / "sheet.png")[12 + 17 :, 12:]
    assert panels[32, 32].tolist() == [55, 255, 255] and panels[32, 64 + 12 + 32].tolist() == [200, 0, 0]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", ["grey", "many channels", "no regions", "masks", "long"])
def test_every_kind_of_item_can_be_drawn(tmp_path, kind, n):
    item = face_dataset()[4] | {"file_name": "x" * 300, "captions": ["word " * 200]}
    if kind == "many channels":
        item["image"] = np.stack([item["image"]] * 5)
    if kind == "no regions":
        item = {"image": item["image"], "label": 3}
    if kind == "masks":
        item = {name: value for name, value in item.items() if name not in ("panoptic", "semantic")}
    if kind == "long":
        item = {"image": np.zeros((3, 90), np.uint8)}
    channels = 5 if kind == "many channels" else 1
    save_contact_sheet(tmp_path / "sheet.png", [item] * n, (), size=96, n_channels=channels)
    assert len(read_picture(tmp_path / "sheet.png")) > 96 / (20 if kind == "long" else 1)
