"""Folder: your own images, in any tree of jpg, png, webp, bmp, gif, tif and avif files, or of npy files alone."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from models.conditions.numbers import NumberField
from train.data.formats.metadata import UNKNOWN, NamePattern
from train.datasets import (
    MAX_PIXELS,
    SPLITS,
    DatasetConfig,
    check_split,
    data_root,
    files_fingerprint,
    limit_context,
    require_readable,
    train_val_split,
)
from train.datasets._channels import decode_channels

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
ARRAYS = (".npy",)  # images in a tree without files of the others
VAL_FOLDERS = ("valid", "val", "validation", "test")  # the first that exists
MOST_SUFFIXES = 5  # that are named of the files left out
DRAFT = 2  # times the size of the images: a side of a JPEG reduced while decoding is no shorter


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    """Options of folder; data_dir has split folders (train, and valid, val, validation or test), or images in any tree.

    A folder is a split only if all folders beside it that have images are named so, too: train among bus and car is a
    class. If there is no validation folder, val_fraction of the images is held out.
    """

    label_from: Literal["none", "folder"] = "none"
    """folder: the first folder level of a split gives the class; none: the images have no classes."""
    only_folders: tuple[str, ...] = ()
    """Use only images in folders with one of these names, at any depth; empty: all images."""
    jpeg_draft: bool = False
    """Decode large JPEG files to 1/2, 1/4 or 1/8 of their size, but to no less than twice the size of the images: some
    times as fast; the pixels differ slightly."""
    name_pattern: str | None = None
    """Form of the names of files without suffix, whose parts become fields of the items: words, such as {place}, for
    --conditions metadata, and numbers, such as {year:d} and {height:f}, for --conditions numbers."""

    EVERYDAY = ("label_from",)

    def __post_init__(self):
        super().__post_init__()
        if self.name_pattern is not None:
            NamePattern(self.name_pattern)  # ValueError for a wrong one


class ImageFolder:
    """A `Dataset` of image files, decoded on access."""

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        classes: Sequence[str],
        split: str,
        max_pixels: int = MAX_PIXELS,
        n_channels: int = 3,
        jpeg_draft: bool = False,
        name_pattern: str | None = None,
    ):
        """ValueError for a name that does not have the form of `name_pattern`."""
        self.root, self.names, self.classes, self.split, self.max_pixels = root, names, classes, split, max_pixels
        self.n_channels, self.jpeg_draft = n_channels, jpeg_draft
        self.name_pattern = None if name_pattern is None else NamePattern(name_pattern)
        self.n_classes, self.class_names = len(classes), tuple(classes)
        ids = {name: i for i, name in enumerate(classes)}
        self.labels = np.array([ids[class_of(name)] for name in names], np.int64) if classes else None
        if self.name_pattern is not None:
            rows = list(map(self.name_pattern.decode, names))
            columns = {name: [row[name] for row in rows] for name in self.name_pattern.names}
            words = {name: {*values} - {UNKNOWN} for name, values in columns.items() if isinstance(values[0], str)}
            self.metadata_values = {name: tuple(sorted(values)) for name, values in words.items()}
            self.number_fields = {name: range_of(values) for name, values in columns.items() if name not in words}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index)

    def read_at_size(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """Returns an item; with `jpeg_draft`, a JPEG that will be resized to `size` may be decoded to fewer pixels."""
        return self.read(index, DRAFT * max(size)) if self.jpeg_draft else self[index]

    def read(self, index: int, least_side: int | None = None) -> dict[str, Any]:
        """Reads an item; see `decode` for `least_side`."""
        options = {"max_pixels": self.max_pixels, "least_side": least_side}
        item: dict[str, Any] = {"image": decode_channels(self.root / self.names[index], self.n_channels, **options)}
        if self.labels is not None:
            item["label"] = int(self.labels[index])
        return item if self.name_pattern is None else item | self.name_pattern.decode(self.names[index])

    def fingerprint(self) -> str:
        context = *limit_context(self.max_pixels), *(("jpeg_draft",) if self.jpeg_draft else ()), *self.pattern_context
        return files_fingerprint(self.root, self.names, self.split, *self.classes, *context)

    def content_fingerprint(self) -> str:
        return files_fingerprint(self.root, self.names, self.split, *self.classes, *self.pattern_context, times=False)

    @property
    def pattern_context(self) -> tuple[str, ...]:
        """What a pattern of names adds to a fingerprint."""
        return () if self.name_pattern is None else (f"name_pattern {self.name_pattern.pattern}",)


def build(config: Config, split: str, n_channels: int = 3) -> ImageFolder:
    """Returns the images of one split, of `n_channels` channels, sorted by path.

    FileNotFoundError for a missing data_dir; ValueError for another split, a tree without a readable image, and classes
    that are ambiguous or differ between the splits.
    """
    train, val, notes = find_splits(data_root(config, "folder"))
    return build_split(config, split, n_channels, train=train, val=val, notes=notes)


def find_splits(root: Path) -> tuple[Path, Path | None, tuple[str, ...]]:
    """Returns the trees of the training and validation images below `root`, and notes on what is left out.

    The second is None if its images are to be held out of the first, which is `root` itself unless it has split
    folders.
    """
    folders = sorted(Path(entry) for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    splits = {path.name.lower(): path for path in folders if path.name.lower() in ("train", *VAL_FOLDERS)}
    if "train" not in splits:
        return root, None, ()
    others = [path for path in folders if path.name.lower() not in splits]
    suffixes = SUFFIXES if has_file(splits["train"], SUFFIXES) else (*SUFFIXES, *ARRAYS)
    if siblings := [path.name for path in others if has_file(path, suffixes)]:
        return root, None, (f"{splits['train'].name} is not read as a split: beside it is {siblings[0]}",)
    train, val = splits["train"], next((splits[name] for name in VAL_FOLDERS if name in splits), None)
    left_out = [f"folder {path.name}" for path in folders if path not in (train, val)]
    if stray := sum(name.lower().endswith(suffixes) and not name.startswith(".") for name in os.listdir(root)):
        left_out.append(f"images outside the split folders: {stray}")
    return train, val, (f"left out of {root}: {', '.join(left_out)}",) if left_out else ()


def build_split(
    config: Config, split: str, n_channels: int = 3, *, train: Path, val: Path | None, notes: Sequence[str] = ()
) -> ImageFolder:
    """Returns one split of the trees `train` and `val`; if `val` is None, part of `train` is held out."""
    check_split(split)
    root = val if split == "val" and val is not None else train
    names, others = list_images(root, config.only_folders)
    unused = [each for each in config.only_folders if not any(f"/{each}/" in f"/{name}" for name in names)]
    classes = class_folders(config, root, names)
    if val is None:
        indices = train_val_split(len(names), config.val_fraction, config.split_seed)[SPLITS.index(split)]
        names = [names[i] for i in indices]
    elif config.label_from == "folder":
        other = train if split == "val" else val
        other_classes = class_folders(config, other, list_images(other, config.only_folders).names)
        require_same_classes({root: classes, other: other_classes})
    options = config.max_pixels, n_channels, config.jpeg_draft, config.name_pattern
    dataset = ImageFolder(root, names, classes, split, *options)
    how = f"a fraction {config.val_fraction:g} is held out" if val is None else f"{val} is for validation"
    dataset.notes = (
        f"images from {train}; {how}",
        *notes,
        *(f"no image of {root} is in a folder named {each}" for each in unused),
        *([f"left out of {root}: {others}"] if others else []),
    )
    require_readable(dataset, root)
    return dataset


class ImageTree(NamedTuple):
    """The files below a folder, except hidden ones."""

    names: list[str]  # of images: sorted paths relative to the folder, with forward slashes
    others: str  # the other files, counted by suffix: "6 .psd, 1 .txt"


def list_images(root: Path, only_folders: Sequence[str] = ()) -> ImageTree:
    """Lists the images below `root`, only those in a folder of one of the names `only_folders`, if there are any."""
    files = list(walk_files(root, only_folders))
    suffixes = SUFFIXES if any(map(is_image, files)) else ARRAYS
    names = sorted(name for name in files if name.lower().endswith(suffixes))
    others = Counter(
        os.path.splitext(name)[1].lower() or "without a suffix" for name in files if not name.lower().endswith(suffixes)
    )
    if not names:
        below = f" below a folder named {' or '.join(only_folders)}" if only_folders else ""
        raise ValueError(f"{root} has no image{below}, wanted {' '.join((*SUFFIXES, *ARRAYS))} files: check the path")
    return ImageTree(names, ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(MOST_SUFFIXES)))


def is_image(name: str) -> bool:
    """Returns whether a file is an image, by its name."""
    return name.lower().endswith(SUFFIXES)


def has_file(folder: Path, suffixes: tuple[str, ...]) -> bool:
    """Returns whether a file below a folder has one of these suffixes."""
    return any(name.lower().endswith(suffixes) for name in walk_files(folder, skip_unreadable=True))


def walk_files(root: Path, only_folders: Sequence[str] = (), skip_unreadable: bool = False) -> Iterator[str]:
    """Yields the paths of files relative to `root`, with forward slashes, except hidden files and folders.

    OSError for an unreadable folder, unless these are skipped.
    """
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=None if skip_unreadable else _raise):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if os.path.realpath(folder) in visited:
            subfolders.clear()  # a link back into the tree
            continue
        visited.add(os.path.realpath(folder))
        parts = Path(folder).relative_to(root).parts
        if only_folders and not set(only_folders) & set(parts):
            continue
        yield from ("/".join((*parts, name)) for name in files if not name.startswith("."))


def range_of(values: Sequence[float]) -> NumberField:
    """Returns the range of some numbers; around a single one, half of a unit each way."""
    low, high = min(values), max(values)
    return NumberField(low, high) if low < high else NumberField(low - 0.5, high + 0.5)


def class_of(name: str) -> str:
    """Class name: the first folder of a relative path."""
    return name.partition("/")[0]


def class_folders(config: Config, root: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Returns the sorted names of the class folders, () with label_from none; ValueError for an image directly in
    `root`."""
    if config.label_from == "none":
        return ()
    stray = next((name for name in names if "/" not in name), None)
    if stray is not None:
        raise ValueError(f"{root / stray} is not in a class folder: move it into one, or use --label_from none")
    return tuple(sorted({class_of(name) for name in names}))


def require_same_classes(classes: dict[Path, tuple[str, ...]]) -> None:
    """Raises ValueError unless two folders have the same classes."""
    (one, ours), (two, theirs) = classes.items()
    if ours != theirs:
        raise ValueError(
            f"{one} and {two} must have the same class folders, but {', '.join(sorted(set(ours) ^ set(theirs)))} "
            "exist in only one of them: add or remove them, or use --label_from none"
        )


def _raise(error: OSError) -> NoReturn:
    raise error
