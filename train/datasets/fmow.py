"""Functional Map of the World (Christie et al. 2018): satellite images of places of 62 classes, with JSON files.

train/airport/airport_0/airport_0_0_rgb.jpg    train/airport/airport_0/airport_0_0_rgb.json
val/zoo/zoo_3/zoo_3_1_rgb.jpg                  val/zoo/zoo_3/zoo_3_1_rgb.json
"""

import json
import posixpath
from dataclasses import dataclass
from typing import Any

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
from train.datasets._pairs import AnnotationFiles, find_split, pair_split
from train.datasets._regions import LISTED, naming, read_text

UNKNOWN = "unknown"  # a country that is not given
SUFFIX = "_dbl"  # of the names of some numbers


@dataclass(frozen=True, kw_only=True)
class Config(EarlierConfig):
    """Options of fMoW; data_dir has the folders train and val, and in them a folder of each class."""

    image_dir: str = "{split}"


class WorldImages(RepeatedImages):
    """A `Dataset` of satellite images with classes, captions, the country, and numbers of place, time and view.

    lon and lat are the middle of the polygon raw_location, gsd is in metres per pixel of the image file, cloud_cover a
    share in [0, 1]; what a JSON file does not have is missing.
    """

    number_fields: dict[str, NumberField] = FIELDS

    def __init__(self, *args: Any, folder: str, classes: tuple[str, ...], **options: Any):
        """The folders of the classes are in `folder`. ValueError for an image that is in none of them."""
        super().__init__(*args, context=classes, **options)
        number_of = {name: number for number, name in enumerate(classes)}
        found = [posixpath.relpath(name, folder).partition("/")[0] for name in self.names]
        if stray := next((name for name, each in zip(self.names, found, strict=True) if each not in number_of), None):
            got = f"{self.root / stray} is in no folder of a class of the training images"
            raise ValueError(f"{got}, wanted one of {', '.join(classes)}: move it into one")
        self.n_classes, self.class_names = len(classes), classes
        self.labels = np.array([number_of[each] for each in found], np.int64)
        self.places: dict[tuple[str, str], list[int]] = {}  # indices of the images of a place, of one kind
        for index, name in enumerate(self.names):
            self.places.setdefault(place_of(name), []).append(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"label": int(self.labels[index])}

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        content = self.read(index)
        with naming(self.root / self.files[index]):
            numbers = {name: find_number(content, name if name in content else name + SUFFIX) for name in FIELDS}
            numbers["cloud_cover"] /= 100  # percent
            if "img_width" in content:
                numbers["gsd"] *= find_number(content, "img_width") / size[1]
            numbers |= decode_date(content.get("timestamp"))
            polygon = content.get("raw_location")
            numbers |= mean_position([decode_polygon(polygon)] if polygon else [])
        country, name = self.country(content), self.class_names[self.labels[index]].replace("_", " ")
        return {
            "captions": captions_of(name, country),
            "country_code": country,
            **{each: numbers[each] for each in FIELDS},
        }

    def others(self, index: int) -> list[DatedImage]:
        years = self.years(index)
        others = [each for each in self.places[place_of(self.names[index])] if each != index]
        return [DatedImage(self.names[each], self.years(each) - years) for each in others]

    def years(self, index: int) -> float:
        """Returns the date of an image in years, NaN if it is not given."""
        content = self.read(index)
        with naming(self.root / self.files[index]):
            return decode_years(content.get("timestamp"))

    def read(self, index: int) -> dict[str, Any]:
        """Reads the JSON file of an image; ValueError, with its name, for another structure."""
        text = read_text(self.root / self.files[index], LISTED)
        with naming(self.root / self.files[index]):
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ValueError("it is not a JSON object: download the file again")
        return content

    @staticmethod
    def country(content: dict[str, Any]) -> str:
        return str(content.get("country_code") or UNKNOWN)

    @property
    def metadata_values(self) -> dict[str, tuple[str, ...]]:
        """The country codes of all JSON files, sorted."""
        countries = {self.country(self.read(index)) for index in range(len(self))}
        return {"country_code": tuple(sorted(countries - {UNKNOWN}))}


def place_of(name: str) -> tuple[str, str]:
    """Returns the folder and the kind of an image: "train/zoo/zoo_3/zoo_3_1_rgb.jpg" -> ("train/zoo/zoo_3", "rgb")."""
    folder, _, file = name.rpartition("/")
    return folder, posixpath.splitext(file)[0].rpartition("_")[2]


def captions_of(name: str, country: str) -> list[str]:
    """Returns the caption of an image, and what is left of it without some phrases."""
    short = f"a satellite image of {with_article(name)}"
    return [*([] if country == UNKNOWN else [f"{short} in {country}"]), short, "a satellite image"]


def build(config: Config, split: str, n_channels: int = 3) -> WorldImages:
    """Returns the images of one split that have a JSON file, sorted by path.

    FileNotFoundError for missing folders; ValueError for another split, and images that are in no folder of a class.
    """
    check_split(split)
    root = data_root(config, "fmow")
    pairs = pair_split(config, root, split, AnnotationFiles(config.image_dir, "--image_dir", (".json",), "JSON file"))
    folders = [find_split(root, config.image_dir, each).fill(config.image_dir) for each in ("train", split)]
    classes = tuple(sorted(path.name for path in (root / folders[0]).iterdir() if path.is_dir()))
    dataset = WorldImages(
        root,
        pairs,
        Categories((), (), ()),
        split,
        folder=folders[1],
        classes=classes,
        max_pixels=config.max_pixels,
        n_channels=n_channels,
        condition_images=config.condition_images,
    )
    require_readable(dataset, root)
    return dataset
