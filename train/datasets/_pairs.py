"""Pairs the images of a folder with the files that annotate them, by name: never by their order.

An image and its annotation have the same path below their folders, without suffix, or the same name if one of the
folders has no subfolders. What has no partner is left out and counted.
"""

import os
import posixpath
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from train.datasets import SPLITS, DatasetConfig, train_val_split
from train.datasets.folder import SUFFIXES, VAL_FOLDERS, walk_files

T = TypeVar("T")
SPLIT = "{split}"  # in the name of a folder or file: train; val, valid, validation or test
MOST_NAMES = 3  # of files without a partner that a note names


@dataclass(frozen=True, kw_only=True)
class RegionConfig(DatasetConfig):
    """Options of data sets of images with regions."""

    image_dir: str = "images/{split}"
    """Folder of the images, relative to data_dir. {split} stands for train, and for the first of valid, val, validation
    and test that exists; without it, or without a second folder, val_fraction of the images is held out."""


class SplitName(NamedTuple):
    """How the folders of a split are called, and whether the images are to be divided."""

    word: str  # that replaces {split}
    held_out: bool  # True: both splits are parts of the same folder

    def fill(self, template: str) -> str:
        """Returns the name of a folder or file of this split."""
        return template.replace(SPLIT, self.word)

    def select(self, rows: Sequence[T], split: str, fraction: float, seed: int) -> list[T]:
        """Returns the rows of a split, in their order."""
        if not self.held_out:
            return list(rows)
        return [rows[i] for i in train_val_split(len(rows), fraction, seed)[SPLITS.index(split)]]

    def describe(self, root: Path, template: str, split: str, fraction: float) -> str:
        """Returns a note on where the images are from."""
        how = f"; a fraction {fraction:g} is held out" if self.held_out else f", for {split}"
        return f"images from {root / self.fill(template)}{how}"


def find_split(root: Path, template: str, split: str, flag: str = "--image_dir") -> SplitName:
    """Finds how a split is called from the name of its folder or file, such as "images/{split}".

    Validation has the first of `VAL_FOLDERS` that exists; without one, or without {split} in the template, it is held
    out of the training images. FileNotFoundError, naming `flag`, if there is nothing to train on.
    """
    train = root / template.replace(SPLIT, "train")
    if not train.exists():
        raise FileNotFoundError(f"{train} does not exist: pass its name, relative to {root}, as {flag}")
    if SPLIT in template:
        word = next((word for word in VAL_FOLDERS if (root / template.replace(SPLIT, word)).exists()), None)
        if word is not None:
            return SplitName(word if split == "val" else "train", False)
    return SplitName("train", True)


def list_files(root: Path, folder: str, suffixes: Sequence[str], flag: str) -> list[str]:
    """Lists the files below a folder that have one of the suffixes: sorted paths relative to this folder.

    FileNotFoundError, naming `flag`, if there is no such folder, and ValueError if it has no such file.
    """
    if not (root / folder).is_dir():
        raise FileNotFoundError(f"{root / folder} is not a folder: pass it, relative to {root}, as {flag}")
    names = sorted(name for name in walk_files(root / folder) if name.lower().endswith(tuple(suffixes)))
    if not names:
        raise ValueError(f"{root / folder} has no {' or '.join(suffixes)} file: pass another folder as {flag}")
    return names


def list_folders(root: Path, names: Set[str], flag: str) -> set[str]:
    """Lists the files in the folders of `names`, which are relative to `root`, as the files themselves.

    FileNotFoundError, naming `flag`, if `root` does not exist.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: pass it, relative to data_dir, as {flag}")
    folders = {posixpath.dirname(name) for name in names}
    existing = [folder for folder in folders if (root / folder).is_dir()]
    return {posixpath.join(folder, name) for folder in existing for name in os.listdir(root / folder)}


class Pairs(NamedTuple):
    """Images with their annotations, and the files that have no partner."""

    images: list[str]  # paths relative to the folder of the data, sorted
    annotations: list[str]  # of each image; "": it has none
    unpaired: dict[str, tuple[str, ...]]  # "images without a label file": their paths, and so on
    notes: tuple[str, ...] = ()


class AnnotationFiles(NamedTuple):
    """Where the annotations of images are."""

    folder: str  # relative to the folder of the data; may contain {split}
    flag: str  # that sets it
    suffixes: Sequence[str]
    noun: str  # of one file
    endings: tuple[str, str] = ("", "")  # of the names of images and annotations before their suffixes, left out to
    # compare them, such as _leftImg8bit and _gtFine_labelTrainIds
    image_flag: str = "--image_dir"  # that sets the folder of the images


def pair_split(config: RegionConfig, root: Path, split: str, files: AnnotationFiles, *, keep: bool = False) -> Pairs:
    """Pairs the images of a split with their annotations; `keep` keeps images without.

    FileNotFoundError for missing folders; ValueError for files that cannot be paired.
    """
    name = find_split(root, config.image_dir, split)
    folders = [name.fill(folder) for folder in (config.image_dir, files.folder)]
    images = list_files(root, folders[0], SUFFIXES, "--image_dir")
    annotations = list_files(root, folders[1], files.suffixes, files.flag)
    if folders[0] == folders[1]:
        images = sorted(set(images) - set(annotations))
    pairs = pair_files(images, annotations, files)
    if keep:
        pairs = keep_unpaired(pairs, files.noun)
    return select_split(config, root, split, pairs, folders)


def select_split(config: RegionConfig, root: Path, split: str, pairs: Pairs, folders: Sequence[str]) -> Pairs:
    """Returns the pairs of a split with their notes, their paths relative to `root`.

    They are relative to `folders`, that of the images and that of the annotations.
    """
    name = find_split(root, config.image_dir, split)
    rows = list(zip(pairs.images, pairs.annotations, strict=True))
    rows = name.select(rows, split, config.val_fraction, config.split_seed)
    notes = name.describe(root, config.image_dir, split, config.val_fraction), *describe_unpaired(pairs.unpaired)
    images, annotations = ([join(folder, row[i]) for row in rows] for i, folder in enumerate(folders))
    return Pairs(images, annotations, pairs.unpaired, notes)


def join(folder: str, name: str) -> str:
    """Returns the path of a file, "" for none."""
    return name and posixpath.normpath(posixpath.join(folder, name))


def keep_unpaired(pairs: Pairs, noun: str) -> Pairs:
    """Returns the pairs and the images without an annotation, sorted."""
    without = f"images without a {noun}"
    rows = sorted(
        [*zip(pairs.images, pairs.annotations, strict=True), *((each, "") for each in pairs.unpaired[without])]
    )
    images, annotations = map(list, zip(*rows, strict=True))
    return Pairs(images, annotations, {**pairs.unpaired, without: ()})


def pair_files(images: Sequence[str], annotations: Sequence[str], files: AnnotationFiles) -> Pairs:
    """Pairs two lists of paths, relative to their folders.

    ValueError for files whose names do not distinguish them, and if there is no pair.
    """
    keys = [strip_names(images, files.endings[0]), strip_names(annotations, files.endings[1])]
    if any(not any("/" in key for key in each) for each in keys):  # a folder without subfolders
        keys = [[posixpath.basename(key) for key in each] for each in keys]
    image_of, annotation_of = index_once(keys[0], images), index_once(keys[1], annotations)
    common = [key for key in image_of if key in annotation_of]
    if not common:
        raise ValueError(
            f"no image has the name of a {files.noun}: got {images[0]} and {annotations[0]}, wanted the same names but "
            f"for the suffix: check {files.image_flag} and {files.flag}"
        )
    unpaired = {
        f"images without a {files.noun}": tuple(name for key, name in image_of.items() if key not in annotation_of),
        f"{files.noun}s without an image": tuple(name for key, name in annotation_of.items() if key not in image_of),
    }
    return Pairs([image_of[key] for key in common], [annotation_of[key] for key in common], unpaired)


def strip_names(names: Sequence[str], ending: str) -> list[str]:
    """Returns paths without suffix and ending."""
    return [posixpath.splitext(name)[0].removesuffix(ending) for name in names]


def index_once(keys: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Returns the name of each key; ValueError if two names have the same."""
    name_of: dict[str, str] = {}
    for key, name in zip(keys, names, strict=True):
        if key in name_of:
            raise ValueError(f"{name_of[key]} and {name} have the same name {key}: keep one of them, or rename it")
        name_of[key] = name
    return name_of


def describe_unpaired(unpaired: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Returns a note on each kind of file that has no partner."""
    return tuple(
        f"left out: {len(names)} {what} ({', '.join(names[:MOST_NAMES])}{', ...' if len(names) > MOST_NAMES else ''})"
        for what, names in unpaired.items()
        if names
    )
