"""Pairs of images: by name or in a list with prompts, of one size, and in the same view."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers import tiny_regions
from train.config import DataConfig
from train.data.loading import ImageSource, TrainingImages
from train.data.transforms import to_item
from train.datasets import pairs

FILL50K = {"source": "source/{}.png", "target": "target/{}.png", "prompt": "a circle, number {}"}


def build(root, split="train", n_channels=3, **options):
    return pairs.build(pairs.Config(data_dir=str(root), **options), split, n_channels)


def save_fill50k(root, names="abcd"):
    """Writes pairs and their list, whose order is not that of the names."""
    tiny_regions.save_pairs(root)
    rows = [{key: text.format(name) for key, text in FILL50K.items()} for name in reversed(names)]
    (root / "prompt.json").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return root


def assert_negative(item):
    """The source of a pair of `save_pairs` is the negative of its target."""
    assert np.array_equal(255 - np.asarray(item["source_image"]), np.asarray(item["image"]))


def test_folders_are_paired_by_name(tmp_path):
    tiny_regions.save_pairs(tmp_path)
    (tmp_path / "source" / "b.png").rename(tmp_path / "source" / "b.bmp")
    splits = {split: build(tmp_path, split, val_fraction=0.25) for split in ("train", "val")}
    assert [len(each) for each in splits.values()] == [3, 1]
    items = [each[i] for each in splits.values() for i in range(len(each))]
    assert sorted(item["file_name"] for item in items) == [f"target/{name}.png" for name in "abcd"]
    for item in items:
        assert_negative(item)
        assert "captions" not in item
    assert splits["train"].fingerprint() != splits["val"].fingerprint()


def test_a_missing_partner_is_named_and_left_out(tmp_path):
    tiny_regions.save_pairs(tmp_path)
    (tmp_path / "source" / "b.png").unlink()
    (tmp_path / "target" / "d.png").unlink()
    dataset = build(tmp_path, val_fraction=0.5)
    assert dataset.unpaired == {"targets without a source": ("b.png",), "sources without a target": ("d.png",)}
    assert "left out: 1 targets without a source (b.png)" in dataset.notes
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(FileNotFoundError, match="source is not a folder: pass it.*--source_dir"):
        build(tmp_path)
    tiny_regions.save_picture(tmp_path / "source" / "z.png", 3)
    with pytest.raises(ValueError, match="no image has the name of a source.*check --target_dir and --source_dir"):
        build(tmp_path)


def test_folders_of_splits_are_read(tmp_path):
    for split in ("train", "val"):
        tiny_regions.save_pairs(tmp_path / split)
    (tmp_path / "val" / "target" / "a.png").unlink()
    folders = {"source_dir": "{split}/source", "target_dir": "{split}/target"}
    assert len(build(tmp_path, **folders)) == 4 and len(build(tmp_path, "val", **folders)) == 3


def test_the_list_of_fill50k_gives_pairs_and_captions(tmp_path):
    dataset = build(save_fill50k(tmp_path / "data"), val_fraction=0.25)
    for item in (dataset[i] for i in range(len(dataset))):
        assert_negative(item)
        assert item["captions"] == [f"a circle, number {item['file_name'][7]}"]
    assert "prompt.json" in dataset.notes[0]
    save_fill50k(tmp_path / "below" / "data")
    below = build(tmp_path / "below", pair_file="data/prompt.json", val_fraction=0.25)  # paths begin at the list
    assert [below[i]["captions"] for i in range(3)] == [dataset[i]["captions"] for i in range(3)]
    before = dataset.fingerprint()
    text = (tmp_path / "data" / "prompt.json").read_text()
    (tmp_path / "data" / "prompt.json").write_text(text.replace("a circle", "another circle"))
    assert build(tmp_path / "data", val_fraction=0.25).fingerprint() != before


def test_listed_files_that_do_not_exist_are_named(tmp_path):
    dataset = build(save_fill50k(tmp_path, "abcdxy"), val_fraction=0.25)
    assert len(dataset) == 3
    assert dataset.unpaired["sources that are listed and do not exist"] == ("source/x.png", "source/y.png")
    save_fill50k(tmp_path, "xy")
    with pytest.raises(ValueError, match="no pair exists in .* got target/x.png and source/x.png: check --pair_file"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", r"line 2: got \[1\], wanted an object with the strings source, target and prompt"),
        ('{"source": "a.png", "target": "b.png"}', "line 2: .*wanted an object with"),
        ('{"source": "a.png"', "line 2: "),
        (json.dumps({key: text.format("a") for key, text in FILL50K.items()}), "the target target/a.png twice"),
    ],
)
def test_wrong_lists_are_refused_by_line(line, message, tmp_path):
    save_fill50k(tmp_path, "a")
    file = tmp_path / "prompt.json"
    file.write_text(f"{file.read_text().strip()}\n{line}\n")
    with pytest.raises(ValueError, match=f"prompt.json.*{message}"):
        build(tmp_path)
    file.write_text("\n")
    with pytest.raises(ValueError, match="prompt.json has no pairs"):
        build(tmp_path)
    with pytest.raises(FileNotFoundError, match="pairs.json does not exist.*--pair_file"):
        build(tmp_path, pair_file="pairs.json")


def test_pairs_of_two_sizes_are_refused_by_name(tmp_path):
    tiny_regions.save_pairs(tmp_path)
    dataset = build(tmp_path, val_fraction=0.25)
    Image.new("RGB", (4, 3)).save(tmp_path / dataset.files[1])
    dataset[0]
    name = dataset.files[1]
    with pytest.raises(ValueError, match=f"{name} has 4 x 3 pixels, and its partner .* 8 x 6: wanted one size"):
        dataset[1]
    for file in dataset.files:
        Image.new("RGB", (4, 3)).save(tmp_path / file)
    with pytest.raises(ValueError, match="none of its 3 images can be read; first error: .*a.png has 4 x 3"):
        build(tmp_path, val_fraction=0.25)


def test_pairs_are_mirrored_and_cropped_together(tmp_path):
    """In every view the source is the negative of the target, and the views are several."""
    tiny_regions.save_pairs(tmp_path)
    data = DataConfig(dataset="pairs", img_size=4, img_width=6, crop_margin=2, horizontal_flip=True)
    dataset = build(tmp_path, val_fraction=0.25)
    batch = TrainingImages(ImageSource(dataset, data, margin=2), seed=0)[[*range(60)]]
    assert batch["image"].shape == batch["source_image"].shape == (60, 3, 4, 6)
    assert (batch["source_image"] + batch["image"]).abs().max() < 1e-6
    assert len(batch["image"].unique(dim=0)) > 20  # of 3 images, 5 crops, mirrored or not


def test_pairs_have_the_channels_of_the_run(tmp_path):
    item = to_item(build(tiny_regions.save_pairs(tmp_path), n_channels=1)[0], (6, 6), 1)
    assert item["image"].shape == item["source_image"].shape == (1, 6, 6)
    difference = item["image"].int() + item["source_image"].int() - 255
    assert difference.abs().max() <= 1  # luma is rounded
