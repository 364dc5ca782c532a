"""Satellite images: what their JSON files say of place, time and view, as numbers, words, captions and boxes."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import tiny_regions
from helpers.tiny_regions import save_json, save_picture, wkt
from train.config import DataConfig
from train.data.annotations import pack, unpack
from train.data.collate import collate
from train.data.formats.satellite import (
    FIELDS,
    decode_date,
    decode_polygon,
    decode_years,
    find_number,
    mean_position,
)
from train.data.loading import ImageSource
from train.data.transforms import View, to_item
from train.datasets import SPLITS, fmow, xbd


def build(reader, root, split="train", **options):
    return reader.build(reader.Config(data_dir=str(root), **options), split)


def change(path, section, **values):
    """Changes a JSON file; None removes a value."""
    content = json.loads(path.read_text())
    (content[section] if section else content).update(values)
    save_json(path, content)


# Polygons and dates


def test_polygons_are_read_without_their_last_point():
    assert decode_polygon("POLYGON ((1 2, 3.5 2, -3 4e1, 1 2))").tolist() == [[1, 2], [3.5, 2], [-3, 40]]
    assert decode_polygon("POLYGON((0 0,1 0,1 1,0 0),(2 2,3 2,3 3,2 2))").shape == (3, 2)  # without the hole
    for text in (
        "",
        "POINT (1 2)",
        "POLYGON ((1 2, 3 4, 1 2))",
        "POLYGON ((1 2, 3 x, 3 4, 1 2))",
        "POLYGON ((1, 2, 3, 4",
    ):
        with pytest.raises(ValueError, match="wanted POLYGON"):
            decode_polygon(text)


def test_the_mean_position_counts_each_building_once():
    square = np.array([[0.0, 0], [2, 0], [2, 2], [0, 2]])
    many_corners = np.array([[10.0, 4], [12, 4], [12, 5], [12, 6], [10, 6], [10, 5]])
    assert mean_position([square, many_corners]) == {"lon": 6.0, "lat": 3.0}
    assert all(math.isnan(each) for each in mean_position([]).values())


def test_dates_are_numbers():
    assert decode_date("2017-05-21T19:19:19.000Z") == {"year": 2017, "month": 5, "day": 21}
    assert all(math.isnan(each) for text in (None, "") for each in decode_date(text).values())
    with pytest.raises(ValueError, match="got the date '21.5.2017', wanted one such as 2017-05-21"):
        decode_date("21.5.2017")


def test_numbers_that_are_null_are_missing():
    assert find_number({"gsd": 2}, "gsd") == 2 and math.isnan(find_number({"gsd": None}, "gsd"))
    with pytest.raises(ValueError, match="got gsd '2.1', wanted a number"):
        find_number({"gsd": "2.1"}, "gsd")


# xBD


def test_an_item_has_what_its_file_says(tmp_path):
    dataset = build(xbd, tiny_regions.save_xbd(tmp_path))
    item = dataset[dataset.names.index("images/some-fire_00000001_post_disaster.png")]
    assert {name: item[name] for name in FIELDS if name != "cloud_cover"} == pytest.approx(
        {
            **{"lon": -121.4, "lat": 38.2, "gsd": 4.0},  # half the pixels
            **{"off_nadir_angle": 21.5, "sun_azimuth": 167, "sun_elevation": 43.5, "target_azimuth": 109},
            **{"year": 2017, "month": 10, "day": 11},
        }
    )
    assert math.isnan(item["cloud_cover"])
    assert (item["disaster"], item["disaster_type"], item["moment"]) == ("some-fire", "fire", "post")
    assert item["captions"] == [
        "a satellite image after being affected by a fire natural disaster",
        "a satellite image after being affected by a natural disaster",
        "a satellite image",
    ]
    assert item["boxes"].tolist() == [[2, 1, 6, 5]] and item["boxes"].canvas_size == (6, 8)
    assert dataset.region_classes[item["box_class"][0]] == "destroyed"
    before = dataset[dataset.names.index("images/some-fire_00000001_pre_disaster.png")]
    assert dataset.region_classes[before["box_class"][0]] == "building" and before["month"] == 6
    assert before["captions"][0].startswith("a satellite image before being")
    assert dataset.metadata_values == {
        **{"disaster": ("some-fire",), "disaster_type": ("fire",), "moment": ("pre", "post")}
    }
    assert dataset.number_fields == FIELDS


def test_without_buildings_the_position_is_that_of_the_other(tmp_path):
    dataset = build(xbd, tiny_regions.save_xbd(tmp_path), xbd_image="post", val_fraction=0.25)
    items = {item["file_name"][-26:-18]: item for split in ("train", "val") for item in build(xbd, tmp_path, split)}
    assert math.isnan(items["00000003"]["lon"]) and math.isnan(items["00000003"]["lat"])
    path = tmp_path / "labels" / "some-fire_00000001_post_disaster.json"
    change(path, "features", xy=[], lng_lat=[])
    item = dataset[dataset.names.index("images/some-fire_00000001_post_disaster.png")]
    assert item["lon"] == pytest.approx(-121.4) and len(item["boxes"]) == 0


def test_both_images_of_a_place_are_in_one_split(tmp_path):
    tiny_regions.save_xbd(tmp_path, 10)
    names = {split: build(xbd, tmp_path, split, val_fraction=0.3).names for split in ("train", "val")}
    places = {split: {name[:27] for name in each} for split, each in names.items()}
    assert len(names["val"]) == 6 and len(places["val"]) == 3 and not places["train"] & places["val"]
    assert len(names["train"]) == 14
    for moment in ("pre", "post"):
        some = [name for split in ("train", "val") for name in build(xbd, tmp_path, split, xbd_image=moment).names]
        assert len(some) == 10 and all(f"_{moment}_" in name for name in some)


def test_the_image_before_comes_with_the_one_after(tmp_path):
    """Images are known by their red levels: 2 i before, 2 i + 1 after."""
    tiny_regions.save_xbd(tmp_path)
    dataset = build(xbd, tmp_path, xbd_image="post", xbd_source=True, val_fraction=0.25)
    for index, name in enumerate(dataset.names):
        item, place = dataset[index], int(name[-19])
        assert (np.asarray(item["image"])[0, 0, 0], np.asarray(item["source_image"])[0, 0, 0]) == (
            2 * place + 1,
            2 * place,
        )
    plain = build(xbd, tmp_path, xbd_image="post", val_fraction=0.25)
    assert plain.names == dataset.names and "source_image" not in plain[0]
    assert plain.fingerprint() != dataset.fingerprint()
    (tmp_path / "images" / "some-fire_00000001_pre_disaster.png").unlink()
    (tmp_path / "labels" / "some-fire_00000001_pre_disaster.json").unlink()
    splits = [build(xbd, tmp_path, each, xbd_image="post", xbd_source=True, val_fraction=0.25) for each in SPLITS]
    assert sum(map(len, splits)) == 3
    assert [each for split in splits for each in split.unpaired["images without one before the disaster"]] == [
        "some-fire_00000001_post_disaster.png"
    ]
    for moment in ("pre", "both"):
        with pytest.raises(ValueError, match=f"got xbd_source for xbd_image {moment}.*--xbd_image post"):
            xbd.Config(xbd_image=moment, xbd_source=True)


def test_no_disaster_is_in_both_splits(tmp_path):
    tiny_regions.save_xbd(tmp_path, 3)
    for path in [*tmp_path.glob("*/*")]:
        for name in ("some-flood", "other-fire"):
            shutil.copy(path, path.with_name(path.name.replace("some-fire", name)))
    options = {"xbd_image": "post", "split_by": "disaster", "val_fraction": 0.4}
    names = {split: build(xbd, tmp_path, split, **options).names for split in SPLITS}
    disasters = {split: {xbd.parse_name(name).disaster for name in each} for split, each in names.items()}
    assert len(disasters["val"]) == 1 and not disasters["train"] & disasters["val"]
    assert (len(names["train"]), len(names["val"])) == (6, 3)
    folders = {"image_dir": "{split}/images", "label_dir": "{split}/labels"}
    for split in ("train", "test"):
        tiny_regions.save_xbd(tmp_path / "folders" / split)
    with pytest.raises(ValueError, match="split_by disaster, and .* is a folder for each split"):
        build(xbd, tmp_path / "folders", split_by="disaster", **folders)


def test_held_out_disasters_have_a_fraction_of_the_images():
    disasters = [name for name, count in (("fire", 74), ("flood", 8), ("volcano", 5)) for _ in range(count)]
    assert all(xbd.choose_disasters(disasters, 0.2, seed) == {"flood", "volcano"} for seed in range(5))
    assert {*(xbd.choose_disasters(disasters, 0.1, seed).pop() for seed in range(9))} == {"flood", "volcano"}
    assert xbd.choose_disasters(disasters, 0.01, 0) == {"volcano"}  # none fits: the smallest
    assert len(xbd.choose_disasters(["a", "b"], 0.99, 0)) == 1
    with pytest.raises(ValueError, match="split_by disaster for images of fire alone"):
        xbd.choose_disasters(["fire", "fire"], 0.5, 0)


def test_folders_of_splits_are_read_too(tmp_path):
    tiny_regions.save_xbd(tmp_path / "train")
    tiny_regions.save_xbd(tmp_path / "test", 2)
    folders = {"image_dir": "{split}/images", "label_dir": "{split}/labels"}
    assert len(build(xbd, tmp_path, **folders)) == 8 and len(build(xbd, tmp_path, "val", **folders)) == 4


def test_wrong_files_are_refused_by_name(tmp_path):
    root = tiny_regions.save_xbd(tmp_path)
    path = root / "labels" / "some-fire_00000000_pre_disaster.json"
    content, dataset = path.read_text(), build(xbd, root, val_fraction=0.25)
    for changes, message in (
        ({"features": {"xy": [{"properties": {"subtype": "gone"}, "wkt": wkt([(0, 0)] * 3)}]}}, "the damage 'gone'"),
        ({"features": {"xy": [{"wkt": "LINE"}]}}, "got 'LINE', wanted POLYGON"),
        ({"metadata": {"width": 16, "height": 12}}, "its metadata have no disaster_type"),
        ({"metadata": {"width": 16, "height": 12, "disaster_type": "fire", "capture_date": "now"}}, "the date 'now'"),
    ):
        change(path, None, **changes)
        with pytest.raises(ValueError, match=f"some-fire_00000000_pre_disaster.json: .*{message}"):
            [dataset[i] for i in range(len(dataset))] + [build(xbd, root, "val", val_fraction=0.25)[i] for i in (0, 1)]
        path.write_text(content)
    save_picture(root / "images" / "fire_post.png", 0)
    save_json(root / "labels" / "fire_post.json", {})
    with pytest.raises(ValueError, match="fire_post.png is not named as the images of xBD, wanted such as santa-rosa"):
        build(xbd, root)


def test_missing_numbers_survive_caches(tmp_path):
    dataset = build(xbd, tiny_regions.save_xbd(tmp_path / "data"))
    config = DataConfig(dataset="xbd", img_size=4, cache_images=True)
    cached, plain = ImageSource(dataset, config, tmp_path / "cache"), to_item(dataset[0], (4, 4), 3)
    assert all(isinstance(cached[0][name], float) for name in FIELDS)
    batch = collate([cached[i] for i in range(len(dataset))])
    assert batch["cloud_cover"].isnan().all() and batch["year"].dtype == torch.float32
    assert [batch[name][0] for name in ("lon", "gsd", "day")] == pytest.approx(
        [plain["lon"], plain["gsd"], plain["day"]]
    )
    assert math.isnan(unpack(pack({"lon": math.nan}))["lon"])  # beside codes


# fMoW


def test_an_item_of_fmow_has_what_its_file_says(tmp_path):
    dataset = build(fmow, tiny_regions.save_fmow(tmp_path))
    assert (dataset.n_classes, dataset.class_names, dataset.labels.tolist()) == (2, ("airport", "zoo"), [0, 1, 1])
    item = dataset[0]
    assert item["label"] == 0 and item["country_code"] == "USA"
    expected = {"lon": -95.35, "lat": 29.75, "gsd": 1.0, "cloud_cover": 0.12, "off_nadir_angle": 12.5}
    expected |= {"year": 2015, "month": 8, "day": 30}
    assert {name: item[name] for name in expected} == pytest.approx(expected)
    assert math.isnan(item["sun_azimuth"])
    assert item["captions"] == [
        *("a satellite image of an airport in USA", "a satellite image of an airport", "a satellite image"),
    ]
    assert all(math.isnan(dataset[2][name]) for name in FIELDS) and dataset[2]["country_code"] == "FRA"
    assert dataset.metadata_values == {"country_code": ("FRA", "USA")}


def test_images_of_fmow_outside_the_classes_are_refused(tmp_path):
    root = tiny_regions.save_fmow(tmp_path)
    save_picture(root / "val" / "port" / "port_0_0_rgb.png", 1)
    save_json(root / "val" / "port" / "port_0_0_rgb.json", {})
    with pytest.raises(ValueError, match="port_0_0_rgb.png is in no folder of a class of the training images"):
        build(fmow, root, "val")
    save_json(root / "train" / "zoo" / "zoo_1" / "zoo_1_0_rgb.json", [])
    with pytest.raises(ValueError, match="zoo_1_0_rgb.json: it is not a JSON object"):
        build(fmow, root)[1]


# Earlier images


def test_items_of_fmow_have_the_latest_earlier_images(tmp_path):
    tiny_regions.save_fmow(tmp_path)
    place = tmp_path / "train" / "zoo" / "zoo_1"
    dates = {"zoo_1_1_rgb": "2014-08-30", "zoo_1_2_rgb": "2016-01-01", "zoo_1_3_rgb": "2012-08-30", "zoo_1_4_rgb": None}
    for i, (name, date) in enumerate({**dates, "zoo_1_1_msrgb": "2015-01-01"}.items()):
        save_picture(place / f"{name}.png", 10 + i)
        save_json(place / f"{name}.json", {"timestamp": date})
    dataset = build(fmow, tmp_path, condition_images=3)
    item = dataset[dataset.names.index("train/zoo/zoo_1/zoo_1_0_rgb.png")]
    images, years = item["condition_images"], item["condition_dates"]
    height, width = item["image"].height, item["image"].width
    assert images.shape == (3, 3, height, width) and images.dtype == torch.uint8
    assert years[:2].tolist() == pytest.approx([-3, -1], abs=1e-3) and math.isnan(years[2]) and not images[2].any()
    for k, name in enumerate(("zoo_1_3_rgb", "zoo_1_1_rgb")):
        picture = dataset[dataset.names.index(f"train/zoo/zoo_1/{name}.png")]["image"]
        assert torch.equal(images[k], torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    latest = build(fmow, tmp_path, condition_images=1)[dataset.names.index("train/zoo/zoo_1/zoo_1_0_rgb.png")]
    assert torch.equal(latest["condition_images"][0], images[1])
    assert "condition_images" not in build(fmow, tmp_path)[0]
    assert build(fmow, tmp_path).fingerprint() != dataset.fingerprint()


def test_an_image_after_a_disaster_has_the_one_before(tmp_path):
    dataset = build(xbd, tiny_regions.save_xbd(tmp_path), xbd_image="post", condition_images=2)
    item = dataset[dataset.names.index("images/some-fire_00000001_post_disaster.png")]
    both = build(xbd, tmp_path)
    before = both[both.names.index("images/some-fire_00000001_pre_disaster.png")]["image"]
    assert torch.equal(item["condition_images"][0], torch.from_numpy(np.array(before)).permute(2, 0, 1))
    assert item["condition_dates"][0] == pytest.approx(-(4 / 12 - 10 / 365.25), abs=1e-4)
    assert item["condition_dates"][1:].isnan().all()
    pre = build(xbd, tmp_path, xbd_image="pre", condition_images=2)[0]
    assert pre["condition_dates"].isnan().all() and not pre["condition_images"].any()


def test_earlier_images_are_transformed_with_their_image(tmp_path):
    dataset = build(xbd, tiny_regions.save_xbd(tmp_path), xbd_image="post", condition_images=2)
    pixels = np.random.default_rng(0).integers(0, 256, (*tiny_regions.SIZE, 3), np.uint8)
    save_picture(tmp_path / dataset.names[0].replace("post", "pre"), pixels)
    raw = dataset[0]
    item = View(flip=True)(to_item(raw, (4, 4), 3))
    assert item["condition_images"].shape == (2, 3, 4, 4)
    earlier = Image.fromarray(raw["condition_images"][0].permute(1, 2, 0).numpy())
    alone = View(flip=True)(to_item({"image": earlier}, (4, 4), 3))["image"]
    assert (item["condition_images"][0].int() - alone.int()).abs().max() <= 2  # Pillow's resizing, and torch's
    batch = collate([item, item])
    assert batch["condition_images"].shape == (2, 2, 3, 4, 4) and batch["condition_images"].dtype == torch.float32
    assert batch["condition_images"].min() >= -1 and batch["condition_dates"].shape == (2, 2)
    assert torch.equal(unpack(pack({"a": item["condition_images"]}))["a"], item["condition_images"])


def test_earlier_images_of_other_channels_are_refused(tmp_path):
    tiny_regions.save_xbd(tmp_path)
    with pytest.raises(ValueError, match="got condition_images 2 for images of 4 channels, wanted 1 or 3"):
        xbd.build(xbd.Config(data_dir=str(tmp_path), condition_images=2), "train", n_channels=4)


def test_dates_in_years_follow_the_calendar():
    days = [f"2016-{month:02d}-{day:02d}" for month in range(1, 13) for day in (1, 15, 29)] + ["2017-01-01"]
    years = [decode_years(day) for day in days]
    assert all(a < b for a, b in zip(years, years[1:], strict=False)) and years[0] == 2016 and years[-1] == 2017
    assert math.isnan(decode_years(None))
