"""xBD (Gupta et al. 2019): satellite images before and after natural disasters, with the damage to each building.

images/santa-rosa-wildfire_00000012_pre_disaster.png    labels/santa-rosa-wildfire_00000012_pre_disaster.json
images/santa-rosa-wildfire_00000012_post_disaster.png   labels/santa-rosa-wildfire_00000012_post_disaster.json

Both images of a place are in the same split. With --xbd_source, the image before the disaster comes with the one after
it, as its source_image. Images may be smaller than the 1,024 pixels of the release, whose units
the polygons have.
"""

import json
import posixpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from models.conditions.numbers import NumberField
from train.data.formats.categories import Categories
from train.data.formats.satellite import (
    FIELDS,
    decode_date,
    decode_polygon,
    decode_years,
    find_number,
    mean_position,
)
from train.data.nouns import with_article
from train.datasets import check_split, data_root, require_readable
from train.datasets._earlier import DatedImage, EarlierConfig, RepeatedImages
from train.datasets._pairs import (
    AnnotationFiles,
    Pairs,
    SplitName,
    describe_unpaired,
    find_split,
    join,
    list_files,
    pair_files,
)
from train.datasets._regions import LISTED, box_fields, naming, read_source, read_text
from train.datasets.folder import SUFFIXES

DAMAGE = ("building", "no-damage", "minor-damage", "major-damage", "destroyed", "un-classified")  # building: before
MOMENTS = {"pre": "before", "post": "after"}
NAME = re.compile(r"(?P<place>(?P<disaster>.+)_\d+)_(?P<moment>pre|post)_disaster")
Row = tuple[str, str]  # an image and its JSON file
ANGLES = ("off_nadir_angle", "sun_azimuth", "sun_elevation", "target_azimuth")


@dataclass(frozen=True, kw_only=True)
class Config(EarlierConfig):
    """Options of xBD; data_dir has images, and their JSON files in another folder."""

    image_dir: str = "images"
    label_dir: str = "labels"
    """Folder of the JSON files, relative to data_dir; may contain {split}, as image_dir."""
    xbd_image: Literal["pre", "post", "both"] = "both"
    """Images to read: those before the disaster, those after it, or both, as items of their own."""
    xbd_source: bool = False
    """xbd_image post: give the image before the disaster as source_image, such as for --condition_image image."""
    split_by: Literal["place", "disaster"] = "place"
    """What is never in both splits. disaster: validation shows disasters of which no image is trained on, with no more
    than val_fraction of the images, or the smallest disaster."""

    EVERYDAY = ("image_dir", "label_dir", "xbd_image", "xbd_source")

    def __post_init__(self):
        super().__post_init__()
        if self.xbd_source and self.xbd_image != "post":
            got = f"got xbd_source for xbd_image {self.xbd_image}"
            raise ValueError(f"{got}, wanted images after the disaster: pass --xbd_image post, or --no_xbd_source")


class Name(NamedTuple):
    """What the name of a file says."""

    place: str  # the same for both images
    disaster: str  # such as santa-rosa-wildfire
    moment: str  # of MOMENTS


class Label(NamedTuple):
    """A JSON file."""

    metadata: Mapping[str, Any]
    corners: list[np.ndarray]  # of each building, (n, 2) x, y in pixels of the release
    positions: list[np.ndarray]  # of each building, (n, 2) longitude, latitude
    damage: list[str]  # of each building, one of DAMAGE


class DisasterImages(RepeatedImages):
    """A `Dataset` of satellite images: boxes of buildings by damage, captions, numbers of place, time and view.

    lon and lat are the mean position of all buildings in the image, or else in the other image of the place, or else
    missing; gsd is in metres per pixel of the image file; xBD has no cloud_cover, which is always missing.
    """

    number_fields: dict[str, NumberField] = FIELDS

    def __init__(self, *args: Any, before: Sequence[str] = (), **options: Any):
        """`before` are the images before the disaster, relative to the folder of the data, if items have them."""
        super().__init__(*args, sources=before, **options)

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        path = self.root / self.files[index]
        name, label = parse_name(self.names[index]), read_label(self.root, self.files[index])
        with naming(path):
            height, width = (find_number(label.metadata, side) for side in ("height", "width"))
            scale = np.array([size[1] / width, size[0] / height])
            boxes = [np.concatenate([xy.min(0), xy.max(0)]) * np.tile(scale, 2) for xy in label.corners]
            numbers = {each: find_number(label.metadata, each) for each in (*ANGLES, "cloud_cover")}
            numbers["gsd"] = find_number(label.metadata, "gsd") / float(scale[0])
            numbers |= decode_date(label.metadata.get("capture_date"))
            numbers |= mean_position(label.positions or self.positions_in_other(index))
            kind = str(label.metadata["disaster_type"])
        source = {}
        if self.sources:
            paths = self.root / self.names[index], self.root / self.sources[index]
            source["source_image"] = read_source(*paths, size, self.n_channels, self.max_pixels)
        return {
            **source,
            **box_fields(boxes, [DAMAGE.index(each) for each in label.damage], size),
            "captions": captions_of(name.moment, kind),
            "disaster": name.disaster,
            "disaster_type": kind,
            "moment": name.moment,
            **{each: numbers[each] for each in FIELDS},
        }

    def positions_in_other(self, index: int) -> list[np.ndarray]:
        """Returns the positions of the buildings in the other image of the place, [] without its file."""
        file = other_moment(self.files[index])
        return read_label(self.root, file).positions if (self.root / file).is_file() else []

    def others(self, index: int) -> list[DatedImage]:
        name, file = other_moment(self.names[index]), other_moment(self.files[index])
        if not ((self.root / name).is_file() and (self.root / file).is_file()):
            return []
        return [DatedImage(name, self.years(file) - self.years(self.files[index]))]

    def years(self, file: str) -> float:
        """Returns the date in a JSON file in years, NaN if it is not given."""
        label = read_label(self.root, file)
        with naming(self.root / file):
            return decode_years(label.metadata.get("capture_date"))

    @property
    def metadata_values(self) -> dict[str, tuple[str, ...]]:
        """The words of each field, sorted: all disasters, and the type of each by its first file."""
        first: dict[str, str] = {}
        for name, file in zip(self.names, self.files, strict=True):
            first.setdefault(parse_name(name).disaster, file)
        kinds = {str(read_label(self.root, file).metadata["disaster_type"]) for file in first.values()}
        return {"disaster": tuple(sorted(first)), "disaster_type": tuple(sorted(kinds)), "moment": tuple(MOMENTS)}


def captions_of(moment: str, kind: str) -> list[str]:
    """Returns the caption of an image, and what is left of it without some phrases."""
    start = f"a satellite image {MOMENTS[moment]} being affected by"
    return [f"{start} {with_article(kind)} natural disaster", f"{start} a natural disaster", "a satellite image"]


def parse_name(file: str) -> Name:
    """Reads "images/santa-rosa-wildfire_00000012_pre_disaster.png"; ValueError for a name of another form."""
    stem = posixpath.splitext(posixpath.basename(file))[0]
    match = NAME.fullmatch(stem)
    if match is None:
        got = f"{file} is not named as the images of xBD"
        raise ValueError(f"{got}, wanted such as santa-rosa-wildfire_00000012_pre_disaster: rename it, or move it away")
    return Name(**match.groupdict())


def other_moment(file: str) -> str:
    """Returns the path of the same file of the other image of the place."""
    moment, other = ("pre", "post") if parse_name(file).moment == "pre" else ("post", "pre")
    start, _, end = file.rpartition(f"_{moment}_disaster")
    return f"{start}_{other}_disaster{end}"


def read_label(root: Path, file: str) -> Label:
    """Reads a JSON file; ValueError, with its name, for another structure."""
    text = read_text(root / file, LISTED)
    with naming(root / file):
        content = json.loads(text)
        if not isinstance(content, dict) or not {"metadata", "features"} <= content.keys():
            raise ValueError("it has no metadata and features, wanted a JSON file of xBD: check --label_dir")
        pixels, degrees = (content["features"].get(each, []) for each in ("xy", "lng_lat"))
        damage = [each.get("properties", {}).get("subtype") or DAMAGE[0] for each in pixels]
        if unknown := sorted({*damage} - {*DAMAGE}):
            raise ValueError(f"got the damage {unknown[0]!r}, wanted one of {', '.join(DAMAGE[1:])}")
        missing = [each for each in ("width", "height", "disaster_type") if each not in content["metadata"]]
        if missing:
            raise ValueError(f"its metadata have no {', '.join(missing)}: download the file again")
        corners, positions = ([decode_polygon(each["wkt"]) for each in rows] for rows in (pixels, degrees))
        return Label(content["metadata"], corners, positions, damage)


def build(config: Config, split: str, n_channels: int = 3) -> DisasterImages:
    """Returns the images of one split that have a JSON file, sorted by path.

    FileNotFoundError for missing folders; ValueError for another split, and files of other names or structure.
    """
    check_split(split)
    root = data_root(config, "xbd")
    word = find_split(root, config.image_dir, split)
    folders = [word.fill(folder) for folder in (config.image_dir, config.label_dir)]
    images = list_files(root, folders[0], SUFFIXES, "--image_dir")
    labels = list_files(root, folders[1], (".json",), "--label_dir")
    pairs = pair_files(images, labels, AnnotationFiles(config.label_dir, "--label_dir", (".json",), "JSON file"))
    rows = select_split(select_rows(pairs, config.xbd_image), word, split, config)
    unpaired, before = dict(pairs.unpaired), {}
    if config.xbd_source:
        rows, before, unpaired["images without one before the disaster"] = with_images_before(rows, images)
    notes = word.describe(root, config.image_dir, split, config.val_fraction), *describe_unpaired(unpaired)
    joined = ([join(folder, row[i]) for row in rows] for i, folder in enumerate(folders))
    categories = Categories(tuple(range(len(DAMAGE))), DAMAGE, (True,) * len(DAMAGE))
    dataset = DisasterImages(
        root,
        Pairs(*joined, unpaired, notes),
        categories,
        split,
        before=[join(folders[0], before[row[0]]) for row in rows] if before else (),
        max_pixels=config.max_pixels,
        n_channels=n_channels,
        condition_images=config.condition_images,
    )
    require_readable(dataset, root)
    return dataset


def with_images_before(rows: Sequence[Row], images: Sequence[str]) -> tuple[list[Row], dict[str, str], tuple[str, ...]]:
    """Returns the rows whose place has an image before the disaster among `images`, this image by that of the row, and
    the images of the other rows; ValueError if no place has one."""
    of_place = {name.place: image for image in images if (name := parse_name(image)).moment == "pre"}
    before = {image: of_place.get(parse_name(image).place, "") for image, _ in rows}
    if not any(before.values()):
        raise ValueError("got xbd_source, and no image has one before the disaster: pass --no_xbd_source")
    alone = tuple(image for image, source in before.items() if not source)
    return [row for row in rows if before[row[0]]], before, alone


def select_split(rows: Sequence[Row], word: SplitName, split: str, config: Config) -> list[Row]:
    """Returns the rows of a split; ValueError for --split_by disaster on data with a folder for each split."""
    names = [parse_name(image) for image, _ in rows]
    if config.split_by == "place":
        places = sorted({name.place for name in names})
        chosen = {*word.select(places, split, config.val_fraction, config.split_seed)}
        return [row for row, name in zip(rows, names, strict=True) if name.place in chosen]
    if not word.held_out:
        got = f"got split_by disaster, and {config.image_dir} is a folder for each split"
        raise ValueError(f"{got}: pass --split_by place")
    val = choose_disasters([name.disaster for name in names], config.val_fraction, config.split_seed)
    return [row for row, name in zip(rows, names, strict=True) if (name.disaster in val) == (split == "val")]


def choose_disasters(disasters: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Returns the disasters to hold out, given that of each image.

    In a random order, each is held out if no more than `fraction` of the images are; if none fits, the smallest is.
    ValueError for a single disaster.
    """
    counts = Counter(disasters)
    if len(counts) < 2:
        raise ValueError(f"got split_by disaster for images of {disasters[0]} alone: pass --split_by place")
    chosen, total = set[str](), 0
    for index in np.random.default_rng(seed).permutation(len(counts)):
        name = sorted(counts)[index]
        if total + counts[name] <= fraction * len(disasters) and len(chosen) < len(counts) - 1:
            chosen, total = chosen | {name}, total + counts[name]
    return chosen or {min(sorted(counts), key=counts.__getitem__)}


def select_rows(pairs: Pairs, images: str) -> Sequence[Row]:
    """Returns the images to read with their JSON files, sorted; ValueError if there is none."""
    rows = sorted(zip(pairs.images, pairs.annotations, strict=True))
    rows = [row for row in rows if images in ("both", parse_name(row[0]).moment)]
    if not rows:
        raise ValueError(f"got --xbd_image {images}, and no image of {len(pairs.images)} is one: pass --xbd_image both")
    return rows
