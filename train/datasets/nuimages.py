"""nuImages (Caesar et al. 2020) in COCO's form, with camera, time, weather, light and location from the file names.

annotations/nuimages_v1.0-train.json   images with names such as samples/CAM_BACK/n013__CAM_BACK__153.jpg, or
samples/CAM_BACK/n013__CAM_BACK__153.jpg   with __rain__night__boston-seaport before the suffix: such names are
                                       only in the JSON file, and the file on disk has the first three parts
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from train.data.formats import metadata
from train.data.sides import Sides
from train.datasets import check_split, data_root
from train.datasets import coco as coco_files
from train.datasets.coco import CocoImages, build_images

FIELDS = ("camera", "time", "weather", "light", "location")
SIDES = Sides(words=(("left", "right"), ("CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"), ("CAM_BACK_LEFT", "CAM_BACK_RIGHT")))


@dataclass(frozen=True, kw_only=True)
class Config(coco_files.Config):
    """Options of nuImages; data_dir has the folder samples and JSON files of COCO's form."""

    image_dir: str = "."
    annotation_file: str = "annotations/nuimages_v1.0-{split}.json"


class DrivingImages(CocoImages):
    """A `Dataset` of images with boxes, and what their names say: camera, time, weather, light, location."""

    sides = SIDES

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        fields = super().annotations(index, size)
        parsed = metadata.decode_name(self.records[index]["name"])
        return {
            **fields,
            **{name: getattr(parsed, name) for name in FIELDS},
        }

    @property
    def metadata_values(self) -> dict[str, tuple[str, ...]]:
        """The values of each field in the names of the images and of mirrored ones, sorted; not of the time, which is a
        time stamp."""
        names = [metadata.decode_name(self.records[index]["name"]) for index in range(len(self))]
        values = {field: {getattr(each, field) for each in names} - {metadata.UNKNOWN} for field in FIELDS}
        mirrored = {field: {SIDES.swap_field(field, value) for value in values[field]} for field in FIELDS}
        return {
            field: tuple(sorted(values[field] | mirrored[field]))
            for field in FIELDS
            if values[field] and field != "time"
        }


def build(config: Config, split: str, n_channels: int = 3) -> DrivingImages:
    """Returns the images of one split with their annotations, sorted by name.

    FileNotFoundError for missing folders and files; ValueError for another split, JSON files of another structure, and
    names without metadata.
    """
    check_split(split)
    return build_images(DrivingImages, config, data_root(config, "nuimages"), split, n_channels, locate)


def locate(name: str, files: Collection[str]) -> str:
    """Returns the file of a listed image: its name, or the first three parts of it."""
    return name if name in files else metadata.name_on_disk(name)
