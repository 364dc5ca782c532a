"""The pictures of --hint: hints of control branches, or images that hints are made from."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from train.condition_source import Row
from train.config import DataConfig
from train.control import ControlSampling, refuse_settings
from train.data.hints import NOT_OF_PICTURES, HintMaker
from train.data.transforms import range_for_image, to_item
from train.datasets._decode import decode
from train.datasets.folder import SUFFIXES
from train.files import sha256


def read_hints(
    options: ControlSampling, channels: Mapping[str, int], makers: Mapping[str, HintMaker | None], data: DataConfig
) -> list[Row]:
    """Returns rows of hints, from one file or folder of --hint for each batch field of `channels`, those of its hints;
    shorter folders repeat. [] without --hint.

    Hints are made from the pictures by `makers`, by field; with --hint_ready, the pictures are hints. ValueError for
    another number of paths, and for hints that are made in a way that is not known, None, or of more than a picture.
    """
    paths = options.hint
    if not paths:
        return []
    if not channels:
        refuse_settings(options)
    if len(paths) != len(channels):
        got = f"got {len(paths)} paths as --hint for {len(channels)} control branches"
        raise ValueError(f"{got}, wanted one for each: pass --hint PATH ..., or --control_files FILE ...")
    columns: dict[str, list[Tensor]] = {}
    for path, (field, count) in zip(paths, channels.items(), strict=True):
        how = makers[field], count, data, options.hint_ready
        columns[field] = [make_hint(decode(file), *how) for file in picture_files(path)]
    count = max(map(len, columns.values()))
    return [{field: images[i % len(images)] for field, images in columns.items()} for i in range(count)]


def make_hint(
    picture: Image.Image, maker: HintMaker | None, channels: int, data: DataConfig, ready: bool = False
) -> Tensor:
    """Makes the hint of a picture (C, H, W), cropped as in training; one of the kind "image" is made of it as source.

    With `ready`, the picture is a hint, and gets its `channels`. ValueError for hints that are made in a way that is
    not known, None, or of more than a picture.
    """
    data_range = range_for_image(picture, data.data_range)
    if ready:
        return to_item({"image": picture}, data.size, channels, data_range)["image"]
    if maker is None or maker.kind in NOT_OF_PICTURES:
        kind = "whose kind is not known" if maker is None else f"of the kind {maker.kind}, which no picture has"
        raise ValueError(f"got --hint for hints {kind}: pass pictures of hints, and --hint_ready")
    image = to_item({"image": picture}, data.size, data.n_channels, data_range)["image"]
    return maker({"image": image, "source_image": image})


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
    """Returns rows with hints, both of which are used in turn; as many rows as it takes until they repeat together."""
    if not hints:
        return list(rows)
    rows = rows or [{}]
    return [{**rows[i % len(rows)], **hints[i % len(hints)]} for i in range(math.lcm(len(rows), len(hints)))]


def hint_provenance(paths: Sequence[str]) -> dict[str, Any]:
    """Returns {"hint_sha256": digest} of the pictures of --hint; {} without any."""
    digests = [sha256(file) for path in paths for file in picture_files(path)]
    return {"hint_sha256": hashlib.sha256("/".join(digests).encode()).hexdigest()} if digests else {}
