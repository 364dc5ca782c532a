"""COCO (Lin et al. 2014), and other data in its JSON files: instances, stuff, captions, panoptic maps.

    train2017/000000000009.jpg   annotations/instances_train2017.json, captions_train2017.json, ...
    val2017/000000000139.jpg     annotations/panoptic_train2017.json, with its maps in annotations/panoptic_train2017/

Images and annotations are paired by the ids of the JSON files alone. Classes have the order of their categories.
"""

import posixpath
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from train.data.formats import coco
from train.data.formats.categories import Categories
from train.data.formats.panoptic import decode
from train.data.sides import Sides
from train.datasets import Ragged, UnreadableImage, check_split, data_root, require_readable
from train.datasets._coco_json import CocoFile, merge_categories, read_coco, require_same_categories, segment_rows
from train.datasets._pairs import Pairs, RegionConfig, SplitName, describe_unpaired, find_split, list_folders
from train.datasets._regions import (
    Packed,
    RegionDataset,
    box_fields,
    check_maps,
    make_masks,
    naming,
    panoptic_fields,
    read_colors,
)
from train.datasets.folder import is_image

FIELDS = {  # of an annotation, by kind of file
    "instances": ("category_id", "bbox"),
    "stuff": ("category_id", "bbox"),
    "captions": ("caption",),
    "panoptic": ("file_name", "segments_info"),
}
SIDES = Sides(words=(("left", "right"),))  # in captions


@dataclass(frozen=True, kw_only=True)
class Config(RegionConfig):
    """Options of COCO; data_dir has the images and the JSON files."""

    image_dir: str = "{split}2017"
    annotations: tuple[str, ...] = ("instances",)
    """What to read: instances, stuff, both (stuff is behind), or panoptic; and captions."""
    annotation_file: str = "annotations/{kind}_{split}2017.json"
    """JSON files, relative to data_dir; {kind} stands for each of `annotations`. Without {split}, val_fraction of the
    images is held out."""
    region_masks: bool = True
    """Also the masks of instances and stuff, if the files have them."""

    EVERYDAY = ("annotations", "image_dir", "annotation_file")


class CocoImages(RegionDataset):
    """A `Dataset` of images, with a record of the annotations of each; see `make_record`."""

    sides = SIDES

    def __init__(self, *args: Any, records: Iterable[Any], region_masks: bool, **options: Any):
        super().__init__(*args, **options)
        self.records, self.region_masks = Packed(records), region_masks

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        record, path, fields = self.records[index], self.root / self.names[index], {}
        if record["size"] not in (None, [*size]):
            wanted = " x ".join(map(str, record["size"]))
            raise UnreadableImage(f"{path} has {size[0]} x {size[1]} pixels, wanted {wanted} as in the JSON file")
        if "boxes" in record:
            with naming(path):
                fields = box_fields(coco.to_xyxy(record["boxes"]), self.categories.numbers(record["category"]), size)
                fields["box_crowd"] = Ragged(record["crowd"]).long()
                if self.region_masks:
                    masks = [coco.decode_segmentation(each, size) for each in record["segmentation"]]
                    fields["masks"] = make_masks(masks, size)
        if "segments" in record:
            path = self.root / self.files[index]
            colors = read_colors(path, size, self.max_pixels)
            with naming(path):
                fields = panoptic_fields(decode(colors, "coco"), self.categories, record["segments"])
        return {**fields, "captions": record["captions"]} if "captions" in record else fields


def build(config: Config, split: str, n_channels: int = 3) -> CocoImages:
    """Returns the images of one split with their annotations, sorted by name.

    FileNotFoundError for missing folders and files; ValueError for another split, and JSON files of another structure.
    """
    check_split(split)
    return build_images(CocoImages, config, data_root(config, "coco"), split, n_channels)


Locate = Callable[[str, Collection[str]], str]  # the name of an image in a JSON file, the files there are -> its file


def build_images(
    dataset_class: type[CocoImages],
    config: Config,
    root: Path,
    split: str,
    n_channels: int,
    locate: Locate = lambda name, files: name,
) -> CocoImages:
    """Builds the data set of one split; see `build`."""
    sources = read_sources(config, root, split)
    listed, pairs = find_images(config, root, split, sources, locate)
    records = [make_record(image, sources.contents) for image in listed]
    region_masks, notes = choose_masks(config.region_masks, records)
    strays = sum(content.strays for content in sources.contents.values())
    notes += (f"left out: {strays} annotations of images that are not listed",) if strays else ()
    dataset = dataset_class(
        root,
        pairs._replace(notes=(*pairs.notes, *notes)),
        number_categories(sources.contents),
        split,
        records=records,
        region_masks=region_masks,
        sources=tuple(sources.files.values()),
        context=(tuple(sources.contents), region_masks),
        max_pixels=config.max_pixels,
        n_channels=n_channels,
    )
    if "panoptic" in sources.contents:
        segments = [[row[0] for row in record["segments"]] for record in records]
        check_maps(root, dataset.files, "coco", dataset.categories, segments, config.max_pixels)
    require_readable(dataset, root)
    return dataset


class Sources(NamedTuple):
    """The annotation files of a split, by kind."""

    name: SplitName
    files: dict[str, str]  # relative to the folder of the data
    contents: dict[str, CocoFile]


def read_sources(config: Config, root: Path, split: str) -> Sources:
    """Reads the JSON files of a split; ValueError for kinds that do not go together."""
    kinds = tuple(dict.fromkeys(config.annotations))
    if not kinds or set(kinds) - FIELDS.keys():
        raise ValueError(f"got --annotations {' '.join(kinds)}, wanted some of {', '.join(FIELDS)}")
    if "panoptic" in kinds and {"instances", "stuff"} & set(kinds):
        raise ValueError(f"got --annotations {' '.join(kinds)}: panoptic has its own instances and stuff, choose one")
    templates = {kind: config.annotation_file.replace("{kind}", kind) for kind in kinds}
    splits = [find_split(root, templates[kinds[0]], each, "--annotation_file") for each in ("train", "val")]
    if not splits[0].held_out and kinds[0] != "captions":
        require_same_categories(*(root / each.fill(templates[kinds[0]]) for each in splits))
    name = splits[split == "val"]
    files = {kind: name.fill(template) for kind, template in templates.items()}
    return Sources(name, files, {kind: read_coco(root / file, FIELDS[kind]) for kind, file in files.items()})


def find_images(
    config: Config, root: Path, split: str, sources: Sources, locate: Locate
) -> tuple[list[dict[str, Any]], Pairs]:
    """Returns the images of the first JSON file that are on disk, those of one split, and their files.

    An image without a panoptic map is left out; so is one that other JSON files do not list.
    """
    folder, (first, *others) = sources.name.fill(config.image_dir), sources.contents.values()
    listed = [image for key, image in first.images.items() if all(key in other.images for other in others)]
    files = list_folders(root / folder, {image["file_name"] for image in listed}, "--image_dir")
    images = {locate(image["file_name"], files): image for image in listed}
    missing = [name for name in images if name not in files]
    unlisted = sorted(name for name in files - images.keys() if is_image(name))
    unpaired = {"images that are listed but do not exist": tuple(sorted(missing))}
    unpaired["images that are not listed"] = tuple(unlisted)
    names, maps = sorted(images.keys() - set(missing)), {}
    if "panoptic" in sources.contents:
        maps = find_maps(root, sources.files["panoptic"].removesuffix(".json"), sources.contents["panoptic"])
        unpaired["images without a panoptic map"] = tuple(n for n in names if images[n]["id"] not in maps)
        names = [name for name in names if images[name]["id"] in maps]
    if not names:
        raise ValueError(f"{root / folder} has no image of {root / [*sources.files.values()][0]}: check --image_dir")
    names = sources.name.select(names, split, config.val_fraction, config.split_seed)
    rows = [images[name] for name in names]
    notes = sources.name.describe(root, config.image_dir, split, config.val_fraction), *describe_unpaired(unpaired)
    on_disk = [posixpath.normpath(posixpath.join(folder, name)) for name in names]
    return rows, Pairs(on_disk, [maps[row["id"]] for row in rows] if maps else [], unpaired, notes)


def find_maps(root: Path, folder: str, content: CocoFile) -> dict[Any, str]:
    """Returns the panoptic map of each image that has one, by the id of the image."""
    names = {key: rows[0]["file_name"] for key, rows in content.annotations.items()}
    files = list_folders(root / folder, set(names.values()), "--annotation_file, less .json,")
    return {key: posixpath.join(folder, name) for key, name in names.items() if name in files}


def make_record(image: Mapping[str, Any], contents: Mapping[str, CocoFile]) -> dict[str, Any]:
    """Collects the annotations of an image: stuff, then instances, in the order of their files."""
    rows = {kind: content.annotations.get(image["id"], []) for kind, content in contents.items()}
    record: dict[str, Any] = {"name": image["file_name"]}
    record["size"] = [image["height"], image["width"]] if {"height", "width"} <= image.keys() else None
    if contents.keys() & {"instances", "stuff"}:
        boxes = [*rows.get("stuff", ()), *rows.get("instances", ())]
        record["boxes"] = [row["bbox"] for row in boxes]
        record["category"] = [row["category_id"] for row in boxes]
        record["crowd"] = [int(row.get("iscrowd", 0)) for row in boxes]
        record["segmentation"] = [row.get("segmentation") or None for row in boxes]
    if "panoptic" in rows:
        record["segments"] = segment_rows(rows["panoptic"][0])
    if "captions" in rows:
        record["captions"] = [row["caption"] for row in rows["captions"]]
    return record


def choose_masks(wanted: bool, records: list[dict[str, Any]]) -> tuple[bool, tuple[str, ...]]:
    """Returns whether to read masks, and a note if there are none; ValueError if only some objects have one.

    Without masks, the records lose them.
    """
    given = [each is not None for record in records for each in record.get("segmentation", ())]
    if wanted and any(given) and not all(given):
        raise ValueError(
            f"{len(given) - sum(given)} of {len(given)} objects have no segmentation: pass --no_region_masks"
        )
    if wanted and any(given):
        return True, ()
    for record in records:
        record.pop("segmentation", None)
    return False, ("the objects have no masks",) if wanted and given else ()


def number_categories(contents: Mapping[str, CocoFile]) -> Categories:
    """Returns the categories of all files: instances are things, stuff is not, and panoptic says which is which."""
    numbered = Categories((), (), ())
    for kind in ("instances", "stuff", "panoptic"):
        own = contents[kind].categories if kind in contents else None
        if own is not None:
            things = own.things if kind == "panoptic" else (kind == "instances",) * len(own.ids)
            numbered = merge_categories(numbered, own._replace(things=things))
    return numbered
