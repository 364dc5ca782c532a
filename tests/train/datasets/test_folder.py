"""Trees of image files: listing, splits, classes, broken images."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from train.config import DataConfig
from train.data.image_cache import image_cache_key, load_or_decode
from train.data.loading import ImageSource
from train.data.transforms import to_item
from train.datasets import UnreadableImage
from train.datasets.folder import Config, build
from train.identity import run_identity


def splits(root, **options):
    return tuple(build(Config(data_dir=str(root), **options), split) for split in ("train", "val"))


def test_all_formats_are_listed_in_order_without_hidden_files(tmp_path, tiny):
    names = ["b/1.PNG", "a/2.jpg", "a/10.JPEG", "c.webp", "a/deep/er/0.bmp"]
    tiny.save_images(tmp_path, *names, ".hidden/0.png", "a/.hidden.png")
    (tmp_path / "notes.txt").write_text("no image")
    train, val = splits(tmp_path)
    assert train.names == sorted(train.names) and val.names == sorted(val.names)
    assert sorted([*train.names, *val.names]) == sorted(names)
    assert all(item["image"].mode == "RGB" for split in (train, val) for item in split)


def test_a_tree_without_split_folders_is_split_by_seed(tmp_path, tiny):
    tiny.save_images(tmp_path, *(f"{i:02}.png" for i in range(20)))
    train, val = splits(tmp_path, val_fraction=0.25)
    assert (len(train), len(val)) == (15, 5)
    assert not set(train.names) & set(val.names)
    assert splits(tmp_path, val_fraction=0.25)[1].names == val.names
    assert splits(tmp_path, val_fraction=0.25, split_seed=1)[1].names != val.names


@pytest.mark.parametrize(
    "folders, val_folder",
    [
        (["train", "valid", "test"], "valid"),
        (["train", "val", "test"], "val"),
        (["train", "validation", "test"], "validation"),
        (["train", "test"], "test"),
        (["Train", "Val"], "Val"),
    ],
)
def test_existing_folders_are_the_split(folders, val_folder, tmp_path, tiny):
    tiny.save_images(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in range(3)), "stray.png")
    train, val = splits(tmp_path)
    assert (train.root.name, val.root.name) == (folders[0], val_folder)
    assert train.names == val.names == ["0.png", "1.png", "2.png"]


def test_a_class_called_train_is_no_split(tmp_path, tiny):
    tiny.save_images(tmp_path, *(f"{name}/{i}.png" for name in ("bus", "car", "train", "tvmonitor") for i in range(5)))
    (tmp_path / "notes").mkdir()  # without images: says nothing about its siblings
    train, val = splits(tmp_path, label_from="folder")
    assert train.class_names == val.class_names == ("bus", "car", "train", "tvmonitor") and len(train) + len(val) == 20
    assert "train is not read as a split: beside it is bus" in train.notes
    for name in ("bus", "car", "tvmonitor"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    assert len(splits(tmp_path)[0]) + len(splits(tmp_path)[1]) == 20
    assert splits(tmp_path)[0].root == tmp_path / "train"


def test_an_unreadable_folder_beside_the_splits_is_ignored(tmp_path, tiny, monkeypatch):
    tiny.save_images(tmp_path, "train/0.png", "val/0.png")
    (tmp_path / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert splits(tmp_path)[1].root == tmp_path / "val"


def test_what_is_left_out_is_named(tmp_path, tiny):
    tiny.save_images(tmp_path, *(f"{split}/real/{i}.png" for split in ("train", "val", "test") for i in range(2)))
    tiny.save_images(tmp_path, "stray.png", "Train/0.png")
    for i in range(6):
        (tmp_path / f"train/{i}.psd").write_bytes(b"")
    (tmp_path / "train/README").write_text("")
    train, val = splits(tmp_path, only_folders=("real", "fake"))
    left_out = f"left out of {tmp_path}: folder Train, folder test, images outside the split folders: 1"
    assert train.notes == (
        f"images from {tmp_path / 'train'}; {tmp_path / 'val'} is for validation",
        left_out,
        f"no image of {tmp_path / 'train'} is in a folder named fake",
    )
    assert f"left out of {tmp_path / 'train'}: 6 .psd, 1 without a suffix" in splits(tmp_path)[0].notes
    assert left_out in val.notes


def test_a_train_folder_alone_is_split(tmp_path, tiny):
    tiny.save_images(tmp_path, *(f"train/{i}.png" for i in range(4)))
    train, val = splits(tmp_path)
    assert train.root == val.root == tmp_path / "train"
    assert sorted([*train.names, *val.names]) == ["0.png", "1.png", "2.png", "3.png"]


def test_folders_are_not_classes_by_default(tmp_path, tiny):
    tiny.save_images(tmp_path, *(f"{thousand:05}/{thousand + i:05}.png" for thousand in (0, 1000) for i in range(3)))
    for split in splits(tmp_path):
        assert split.n_classes == 0 and split.labels is None
        assert "label" not in split[0]
    assert splits(tmp_path, label_from="folder")[0].n_classes == 2


def test_both_splits_have_the_same_class_ids(tmp_path, tiny):
    tiny.save_images(tmp_path, "train/cat/0.png", "train/ant/x/1.png", "train/bee/2.png", "valid/bee/3.png")
    tiny.save_images(tmp_path, "valid/cat/0.png", "valid/ant/0.png")
    train, val = splits(tmp_path, label_from="folder")
    assert train.class_names == val.class_names == ("ant", "bee", "cat")
    assert train.labels.tolist() == val.labels.tolist() == [0, 1, 2]
    assert train.labels.dtype == np.int64


def test_a_held_out_split_has_all_classes_of_the_tree(tmp_path, tiny):
    tiny.save_images(tmp_path, "a/0.png", "b/0.png", "c/0.png")
    train, val = splits(tmp_path, label_from="folder")
    assert train.class_names == val.class_names == ("a", "b", "c")
    assert sorted([*train.labels, *val.labels]) == [0, 1, 2]


def test_differing_classes_of_the_splits_are_refused(tmp_path, tiny):
    tiny.save_images(tmp_path, "train/a/0.png", "train/b/0.png", "val/a/0.png", "val/c/0.png")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="same class folders, but b, c exist in only one"):
            build(Config(data_dir=str(tmp_path), label_from="folder"), split)


def test_an_image_outside_the_class_folders_is_refused(tmp_path, tiny):
    tiny.save_images(tmp_path, "a/0.png", "stray.png")
    with pytest.raises(ValueError, match="stray.png is not in a class folder"):
        splits(tmp_path, label_from="folder")


def test_only_folders_selects_images(tmp_path, tiny):
    folders = [f"{split}/{kind}" for split in ("train", "valid") for kind in ("real", "fake")]
    tiny.save_images(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in range(2)))
    tiny.save_images(tmp_path, "train/deep/real/x.png", "train/real.png")
    train, val = splits(tmp_path, only_folders=("real",))
    assert train.names == ["deep/real/x.png", "real/0.png", "real/1.png"]
    assert val.names == ["real/0.png", "real/1.png"]
    with pytest.raises(ValueError, match="no image below a folder named genuine or true"):
        splits(tmp_path, only_folders=("genuine", "true"))


def test_an_empty_tree_and_a_single_image_are_refused(tmp_path, tiny):
    with pytest.raises(ValueError, match=f"{tmp_path} has no image, wanted .jpg"):
        splits(tmp_path)
    tiny.save_images(tmp_path, "only.png")
    with pytest.raises(ValueError, match="hold out images of 1"):
        splits(tmp_path)


def test_an_empty_validation_folder_is_refused(tmp_path, tiny):
    tiny.save_images(tmp_path, "train/0.png")
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="val has no image"):
        splits(tmp_path)


def test_a_tree_without_a_readable_image_is_refused(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match=f"{tmp_path}: none of its 2 images can be read; first error: .*jpg"):
        build(Config(data_dir=str(tmp_path)), "train")


def test_a_broken_image_is_reported_on_access(tmp_path, tiny):
    tiny.save_images(tmp_path, "train/1.png", "val/1.png")
    (tmp_path / "train/0.png").write_bytes(b"broken")
    train, _ = splits(tmp_path)
    with pytest.raises(UnreadableImage, match="train/0.png: "):
        train[0]
    assert train[1]["image"].size == (6, 5)


def save_photographs(folder, size=(320, 240)):
    """A smooth picture as a JPEG, as one that EXIF rotates, and as a PNG."""
    wave = np.sin(np.linspace(0, 9, size[0])) * np.cos(np.linspace(0, 7, size[1]))[:, None]
    image = Image.fromarray((128 + 100 * np.stack([wave, -wave, wave * wave], -1)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    for split in ("train", "val"):
        (folder / split).mkdir()
        image.save(folder / split / "0.jpg", quality=95)
        image.save(folder / split / "1.jpg", quality=95, exif=exif)
        image.save(folder / split / "2.png")


@pytest.mark.parametrize("size, decoded", [((16, 16), (80, 60)), ((16, 32), (160, 120)), ((64, 64), (320, 240))])
def test_jpeg_draft_decodes_twice_the_size_or_more(tmp_path, size, decoded):
    save_photographs(tmp_path)
    plain, drafted = (splits(tmp_path, jpeg_draft=flag)[0] for flag in (False, True))
    sizes = [drafted.read_at_size(i, size)["image"].size for i in range(3)]
    assert sizes == [decoded, decoded[::-1], (320, 240)]
    for i in range(3):
        assert plain.read_at_size(i, size)["image"].size == plain[i]["image"].size == drafted[i]["image"].size
        whole, reduced = (to_item(each.read_at_size(i, size), size, 3)["image"].int() for each in (plain, drafted))
        assert (whole - reduced).abs().max() <= 6


def test_drafted_pixels_have_caches_of_their_own(tmp_path):
    save_photographs(tmp_path)
    (plain, _), (drafted, _) = splits(tmp_path), splits(tmp_path, jpeg_draft=True)
    assert plain.content_fingerprint() == drafted.content_fingerprint()  # the flag itself identifies the run
    assert run_identity({"reader": {"jpeg_draft": True}}) == {"jpeg_draft": True}
    assert image_cache_key(plain, (3, 16, 16)) != image_cache_key(drafted, (3, 16, 16))
    data = DataConfig(img_size=16, crop_margin=4)
    for source in (ImageSource(drafted, data, margin=4), load_or_decode(drafted, "a", (3, 20, 20), folder=tmp_path)):
        assert torch.equal(source[0]["image"], to_item(drafted.read_at_size(0, (20, 20)), (20, 20), 3)["image"])
        assert not torch.equal(source[0]["image"], to_item(plain[0], (20, 20), 3)["image"])


def test_a_jpeg_is_resized_once_as_pillow_does(tmp_path):
    save_photographs(tmp_path)
    image = Image.open(tmp_path / "train/0.jpg").convert("RGB").resize((85, 64), Image.Resampling.BICUBIC)
    expected = np.asarray(image.crop((10, 0, 74, 64))).transpose(2, 0, 1)
    assert np.array_equal(ImageSource(splits(tmp_path)[0], DataConfig(img_size=64))[0]["image"], expected)


def test_changed_files_or_labels_change_the_fingerprint(tmp_path, tiny):
    tiny.save_images(tmp_path, "train/a/0.png", "val/a/0.png")
    plain, labelled = splits(tmp_path)[0], splits(tmp_path, label_from="folder")[0]
    fingerprint = plain.fingerprint()
    assert fingerprint != labelled.fingerprint()
    (tmp_path / "train/a/0.png").write_bytes(tiny.png(200, size=(60, 50)))
    assert fingerprint != plain.fingerprint()


def test_a_link_back_into_the_tree_is_followed_once(tmp_path, tiny):
    tiny.save_images(tmp_path / "data", "a/0.png", "a/1.png")
    tiny.save_images(tmp_path / "elsewhere", "2.png")
    try:
        (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
        (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("this file system has no symbolic links")
    train, val = splits(tmp_path / "data")
    assert sorted([*train.names, *val.names]) == ["a/0.png", "a/1.png", "b/2.png"]
