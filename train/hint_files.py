"""The pictures of --hint: hints of control branches, or images that hints are made from."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from train.condition_source import Row, read_images
from train.config import DataConfig
from train.data.hints import HintMaker, HintsConfig
from train.data.transforms import to_item
from train.datasets._decode import decode
from train.datasets.folder import SUFFIXES
from train.files import sha256


def read_hints(
    paths: Sequence[str], fields: Sequence[str], kinds: Mapping[str, str], data: DataConfig, options: HintsConfig
) -> list[Row]:
    """Returns rows of the batch fields of hints, from one file or folder of pictures for each; shorter folders repeat.

    Hints of the `kinds`, by field, are made from the pictures; without any kind, the pictures are hints. ValueError for
    another number of paths, and for kinds that are not known or need more than a picture.
    """
    if len(paths) != len(fields):
        got = f"got {len(paths)} paths as --hint for {len(fields)} control branches"
        raise ValueError(f"{got}, wanted one for each: pass --hint PATH ..., or --control_files FILE ...")
    columns: dict[str, list[Tensor]] = {}
    for path, field in zip(paths, fields, strict=True):
        files = picture_files(path)
        columns[field] = make_hints(files, kinds[field], data, options) if kinds else read_images(files, data)
    count = max(map(len, columns.values()))
    return [{field: images[i % len(images)] for field, images in columns.items()} for i in range(count)]


def make_hints(files: Sequence[Path], kind: str, data: DataConfig, options: HintsConfig) -> list[Tensor]:
    """Makes hints of a kind from pictures, cropped as in training; of kind "image" the pictures are the sources."""
    if kind == "":
        got = "got --hint for a control branch whose kind of hints is not known"
        raise ValueError(f"{got}: pass pictures of hints, and --hint_ready")
    hints = []
    for file in files:
        image = to_item({"image": decode(file)}, data.size, data.n_channels, data.data_range)["image"]
        hints.append(HintMaker(kind, options)({"image": image, "source_image": image}))
    return hints


def picture_files(path: str) -> list[Path]:
    """Returns the file of a path, or the files of a folder that are images, by name; FileNotFoundError without any."""
    place = Path(path).expanduser()
    files = [place] if place.is_file() else []
    if place.is_dir():
        files = sorted(each for each in place.iterdir() if each.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no pictures in {place}: pass a picture, or a folder of pictures, as --hint")
    return files


def combine_rows(rows: Sequence[Row], hints: Sequence[Row]) -> list[Row]:
    """Returns rows with the hints of other rows, as many as the longer of the two has; both are used in turn."""
    count = max(len(rows), len(hints))
    return [{**row, **hint} for row, hint in islice(zip(cycle(rows or [{}]), cycle(hints), strict=False), count)]


def hint_provenance(paths: Sequence[str]) -> dict[str, Any]:
    """Returns {"hint_sha256": digest} of the pictures of --hint; {} without any."""
    digests = [sha256(file) for path in paths for file in picture_files(path)]
    return {"hint_sha256": hashlib.sha256("/".join(digests).encode()).hexdigest()} if digests else {}
