"""Makes panoptic maps of semantic maps and the masks or polygons of instances.

python experiments/make_panoptic.py --semantic semantic/train --instances instances.json --categories categories.json \\
    --out panoptic/train --encoding mamoe
"""

import json
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _root
import numpy as np
from PIL import Image

from models.ranges import check_ranges
from train.cli.parse import run_script
from train.data.formats import yolo
from train.data.formats.categories import Categories, decode_categories
from train.data.formats.coco import box_of_mask, decode_segmentation, fill_polygons
from train.data.formats.panoptic import Encoding, decode, encode
from train.data.formats.prompts import decode_instance_prompts, encode_instance_prompts
from train.datasets._decode import decode as decode_image
from train.datasets.folder import SUFFIXES, walk_files
from train.datasets.panoptic_folder import CITYSCAPES_CATEGORIES
from train.files import atomic_write, parse_json, write_text
from train.progress import Progress

PROMPTS = "instance_prompts.json"
Front = Literal["small", "large", "first", "last"]


@dataclass(frozen=True, kw_only=True)
class PanopticConfig:
    """Panoptic maps."""

    semantic: str | None = None
    """Folder of semantic maps: images of one channel with the id of a category at each pixel."""
    instances: str | None = None
    """Masks or polygons of the things: a JSON file of COCO's form, or a folder with, for each map a/b.png, a file
    a/b.txt (YOLO polygons), a map a/b.png of a number per instance, or a folder a/b of one mask per instance. Of the
    last two, the category is the most frequent one of the semantic map below an instance."""
    categories: str | None = None
    """File of the categories: JSON or YAML with id, name and isthing; by default the 19 of Cityscapes."""
    out: str | None = None
    """Folder to write the maps to; for coco a JSON file of the same name is beside it."""
    encoding: Encoding = "mamoe"
    """What the colours of the maps mean: mamoe, coco or two_channel."""
    front: Front = "small"
    """Which of two instances that overlap is in front: the smaller, the larger, the first or the last listed."""
    unlabelled: tuple[int, ...] = (255,)
    """Ids in semantic maps that are no category; they stay unlabelled."""
    crops: str | None = None
    """Also write each thing to this folder, cut out on black, and instance_prompts.json with its class name, to be
    replaced by a caption; existing captions are kept. Needs --images."""
    images: str | None = None
    """Folder of the images, named like the semantic maps."""
    semantic_ending: str = ""
    """What names of semantic maps end in before the suffix and others do not, such as _gtFine_labelTrainIds."""
    instance_ending: str = ""
    """The same of instances, such as _gtFine_instanceIds."""
    image_ending: str = ""
    """The same of images, such as _leftImg8bit."""

    EVERYDAY = ("semantic", "instances", "categories", "out", "encoding", "front", "crops", "images")

    RANGES = {"unlabelled": "[0, 2147483647]"}

    def __post_init__(self):
        check_ranges(self)
        if self.crops is not None and self.images is None:
            raise ValueError("got --crops, which are cut out of the images: pass their folder as --images")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Makes panoptic maps of semantic maps and instances, as COCO, panopticapi or MaMoE write them."""

    EXAMPLES = (
        "python experiments/make_panoptic.py --semantic seg --instances masks --categories classes.json --out panoptic",
        "python experiments/make_panoptic.py --semantic seg --instances coco.json --categories coco.json --out maps "
        "--encoding coco --images images --crops crops",
    )

    panoptic: PanopticConfig


class Instance(NamedTuple):
    """A thing of an image; `category` None: the most frequent one of the semantic map below it."""

    mask: np.ndarray  # (H, W) bool
    category: int | None
    crowd: bool = False


class Segment(NamedTuple):
    """A segment of a panoptic map; its id is its position in the list, from 1."""

    category: int
    crowd: bool  # several things under one label


class EncodedMap(NamedTuple):
    """A panoptic map that was written."""

    ids: np.ndarray  # (H, W) int32, 0 = unlabelled
    segments: list[Segment]
    colors: np.ndarray  # (H, W, 3) uint8, as in the file
    encoding: Encoding


class Sources(NamedTuple):
    """What panoptic maps are made of."""

    maps: dict[str, Path]  # semantic ones, by name without suffix
    images: dict[str, Path]  # by the same name; empty without --images
    read: Callable[[str, tuple[int, int]], list[Instance]]  # name of a map, its (height, width) -> its instances
    categories: Categories


def main(config: Config) -> None:
    settings, sources = config.panoptic, open_sources(config.panoptic)
    out, crops = require_path(settings, "out", exists=False), settings.crops and Path(settings.crops)
    kept = read_prompts(crops / PROMPTS) if crops else {}
    records, prompts, things = [], {}, 0
    with Progress("panoptic maps", len(sources.maps), "map") as bar:
        for name in sources.maps:
            encoded_map = make_map(name, sources, settings)
            save_picture(out / f"{name}.png", encoded_map.colors)
            records.append(describe(name, len(records) + 1, encoded_map, sources))
            if crops:
                key = sources.images[name].name
                if key in prompts:
                    raise ValueError(f"two images have the name {key}, wanted each once in {PROMPTS}: rename one")
                prompts[key] = write_crops(crops / name, sources.images[name], encoded_map, sources.categories)
                prompts[key] |= {each: text for each, text in kept.get(key, {}).items() if each in prompts[key]}
            things += len(thing_numbers(encoded_map.segments, sources.categories))
            bar.update()
    if settings.encoding == "coco":
        write_text(out.with_name(f"{out.name}.json"), coco_json(records, sources.categories))
    print(f"{len(sources.maps):,} maps with {things:,} things in {out}: {settings.encoding}, {settings.front} in front")
    if crops:
        write_text(crops / PROMPTS, encode_instance_prompts(kept | prompts) + "\n")
        print(f"the things cut out, and {PROMPTS} to be captioned, in {crops}")


def open_sources(settings: PanopticConfig) -> Sources:
    """Finds all files. FileNotFoundError, ValueError: a flag is missing, or a folder or an image is."""
    maps = list_images(require_path(settings, "semantic"), settings.semantic_ending)
    instances, categories = require_path(settings, "instances"), CITYSCAPES_CATEGORIES
    if settings.categories is not None:
        file = require_path(settings, "categories")
        categories = decode_categories(file.read_text(encoding="utf-8"), file.suffix.lower())
    images = list_images(require_path(settings, "images"), settings.image_ending) if settings.images else {}
    if settings.images and (missing := sorted(maps.keys() - images.keys())):
        raise ValueError(f"{settings.images} has no image {missing[0]}, nor {len(missing) - 1} others: check --images")
    read = open_coco(instances) if instances.is_file() else open_folder(instances, settings.instance_ending)
    return Sources(maps, images, read, categories)


def require_path(settings: PanopticConfig, flag: str, exists: bool = True) -> Path:
    """Returns the path that a flag gives. ValueError without one, FileNotFoundError if it must exist and does not."""
    if getattr(settings, flag) is None:
        raise ValueError(f"wanted --{flag} PATH: see make_panoptic.py --help")
    path = Path(getattr(settings, flag)).expanduser()
    if exists and not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check --{flag}")
    return path


def list_images(root: Path, ending: str) -> dict[str, Path]:
    """Returns the images below a folder by their paths without `ending` and suffix; ValueError without any."""
    paths = sorted(name for name in walk_files(root) if name.lower().endswith(SUFFIXES))
    named = {posixpath.splitext(path)[0]: root / path for path in paths}
    found = {name.removesuffix(ending): path for name, path in named.items() if name.endswith(ending)}
    if not found:
        raise ValueError(f"{root} has no image{f' whose name ends in {ending}' if ending else ''}: check the path")
    return found


def open_coco(path: Path) -> Callable[[str, tuple[int, int]], list[Instance]]:
    """Reads a JSON file of COCO's form; its images are found by their names without folder and suffix."""
    content = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise ValueError(f"{path} has no images and annotations, wanted a JSON file of COCO's form")
    name_of = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in name_of.values()}
    for row in content["annotations"]:
        if row["image_id"] in name_of:
            rows[name_of[row["image_id"]]].append(row)

    def read(name: str, size: tuple[int, int]) -> list[Instance]:
        own = rows.get(posixpath.basename(name), [])
        masks = [decode_segmentation(row["segmentation"], size) > 0 for row in own]
        return [
            Instance(mask, int(row["category_id"]), bool(row.get("iscrowd", 0)))
            for mask, row in zip(masks, own, strict=True)
        ]

    return read


def open_folder(root: Path, ending: str) -> Callable[[str, tuple[int, int]], list[Instance]]:
    """Reads a folder with polygons, a map or a folder of masks for each image; an image without has no instances."""

    def read(name: str, size: tuple[int, int]) -> list[Instance]:
        base = root / f"{name}{ending}"
        polygons, numbered = base.with_name(f"{base.name}.txt"), base.with_name(f"{base.name}.png")
        if polygons.is_file():
            objects = yolo.decode_lines(polygons.read_text())
            if any(polygon is None for polygon in objects.polygons):
                raise ValueError(f"{polygons} has a box where a polygon is wanted: give the instances as masks")
            scaled = [polygon * (size[1], size[0]) for polygon in objects.polygons]
            masks = [fill_polygons([polygon], size) > 0 for polygon in scaled]
            return [Instance(*row) for row in zip(masks, objects.classes.tolist(), strict=True)]
        if numbered.is_file():
            numbers = read_levels(numbered, size)
            return [Instance(numbers == number, None) for number in np.unique(numbers) if number]
        files = sorted(path for path in base.iterdir() if path.suffix.lower() in SUFFIXES) if base.is_dir() else []
        return [Instance(read_levels(path, size) > 0, None) for path in files]

    return read


def read_levels(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads an image of one channel (H, W) int32; ValueError for another size, or colours."""
    levels = np.asarray(decode_image(path, convert=lambda image: image)).astype(np.int32)
    if levels.ndim != 2:
        raise ValueError(f"{path} has {levels.shape[-1]} channels, wanted one with numbers")
    if size is not None and levels.shape != size:
        raise ValueError(f"{path} has {levels.shape[0]}x{levels.shape[1]} pixels, wanted {size[0]}x{size[1]}")
    return levels


def make_map(name: str, sources: Sources, settings: PanopticConfig) -> EncodedMap:
    """Makes the panoptic map of an image; ValueError naming it for contents that cannot be one."""
    path = sources.maps[name]
    semantic = read_levels(path)
    try:
        instances = sources.read(name, semantic.shape)
        ids, segments = merge(semantic, instances, sources.categories, settings.front, settings.unlabelled)
        categories, crowd = (np.array([each[i] for each in segments], np.int64) for i in range(2))
        colors = encode(ids, settings.encoding, np.arange(1, len(segments) + 1), categories, crowd)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return EncodedMap(ids, segments, colors, settings.encoding)


def merge(
    semantic: np.ndarray,
    instances: Sequence[Instance],
    categories: Categories,
    front: Front,
    unlabelled: Sequence[int] = (),
) -> tuple[np.ndarray, list[Segment]]:
    """Merges a semantic map (H, W) of category ids with instances, which are over it, to disjoint segments.

    Returns their ids (H, W) int32 and the segments: the things in their order, then the rest of the map by category.
    Instances without a visible pixel, and those whose category is no thing, are left out. What a semantic map has of
    things that no instance covers is a crowd. ValueError for an id that is neither a category nor unlabelled.
    """
    thing_of = dict(zip(categories.ids, categories.things, strict=True))
    levels = [int(each) for each in np.unique(semantic) if int(each) not in unlabelled]
    if unknown := [each for each in levels if each not in thing_of]:
        raise ValueError(f"got the id {unknown[0]}, which is no category: add it to --categories or to --unlabelled")
    named = [each._replace(category=category_below(each, semantic, unlabelled)) for each in instances]
    if unknown := [each.category for each in named if each.category not in {*thing_of, None}]:
        raise ValueError(f"got an instance of category {unknown[0]}, which is not in --categories")
    things = [each for each in named if thing_of.get(each.category, False)]
    ids = np.zeros(semantic.shape, np.int32)
    for position in from_back_to_front(things, front):
        ids[things[position].mask] = position + 1
    visible = [int(each) for each in np.unique(ids) if each]
    ids = np.searchsorted([0, *visible], ids).astype(np.int32)  # without the numbers of hidden ones
    segments = [Segment(things[each - 1].category, things[each - 1].crowd) for each in visible]
    for level in levels:
        rest = (ids == 0) & (semantic == level)
        segment = Segment(level, thing_of[level])
        if not rest.any():
            continue
        if not segment.crowd or segment not in segments:
            segments.append(segment)
        ids[rest] = segments.index(segment) + 1
    return ids, segments


def category_below(instance: Instance, semantic: np.ndarray, unlabelled: Sequence[int]) -> int | None:
    """Returns the category of an instance, if it has none the most frequent one below it; None without any."""
    if instance.category is not None:
        return instance.category
    levels, counts = np.unique(semantic[instance.mask], return_counts=True)
    counts = np.where(np.isin(levels, unlabelled), 0, counts)
    return int(levels[counts.argmax()]) if counts.any() else None


def from_back_to_front(things: Sequence[Instance], front: Front) -> list[int]:
    """Returns the positions of things in the order in which they are painted."""
    positions = list(range(len(things)))
    if front in ("small", "large"):
        sign = -1 if front == "small" else 1
        return sorted(positions, key=lambda position: sign * int(things[position].mask.sum()))
    return positions if front == "last" else positions[::-1]


def thing_numbers(segments: Sequence[Segment], categories: Categories) -> list[int]:
    """Returns the ids of the segments that are one thing."""
    things = {category for category, thing in zip(categories.ids, categories.things, strict=True) if thing}
    return [i for i, each in enumerate(segments, 1) if each.category in things and not each.crowd]


def write_crops(folder: Path, image: Path, encoded_map: EncodedMap, categories: Categories) -> dict[int, str]:
    """Writes each thing of an image to <folder>/<id>.png, cut out on black; returns the names of their classes by id.

    The ids are those that a reader of the map gets. ValueError for an image of another size than its map.
    """
    pixels = np.asarray(decode_image(image).convert("RGB"))
    if pixels.shape[:2] != encoded_map.ids.shape:
        sizes = [f"{size[0]}x{size[1]}" for size in (pixels.shape, encoded_map.ids.shape)]
        raise ValueError(f"{image} has {sizes[0]} pixels, and its map {sizes[1]}: resize one of them")
    encoded = decode(encoded_map.colors, encoded_map.encoding).ids
    name_of, words = dict(zip(categories.ids, categories.names, strict=True)), {}
    for number in thing_numbers(encoded_map.segments, categories):
        mask = encoded_map.ids == number
        left, top, right, bottom = box_of_mask(mask)
        key = int(encoded[mask][0])
        cut = np.where(mask[..., None], pixels, 0)[top:bottom, left:right]
        save_picture(folder / f"{key}.png", cut.astype(np.uint8))
        words[key] = name_of[encoded_map.segments[number - 1].category]
    return words


def describe(name: str, number: int, encoded_map: EncodedMap, sources: Sources) -> dict[str, Any]:
    """Returns what COCO's JSON file says of a map: its image and its segments."""
    height, width = encoded_map.ids.shape
    infos = []
    for i, segment in enumerate(encoded_map.segments, 1):
        mask = encoded_map.ids == i
        left, top, right, bottom = box_of_mask(mask)
        box = [left, top, right - left, bottom - top]
        info = {"id": i, "category_id": segment.category, "iscrowd": int(segment.crowd), "bbox": box}
        infos.append(info | {"area": int(mask.sum())})
    file = sources.images[name].name if name in sources.images else f"{posixpath.basename(name)}.png"
    image = {"id": number, "file_name": file, "height": height, "width": width}
    return {"image": image, "annotation": {"image_id": number, "file_name": f"{name}.png", "segments_info": infos}}


def coco_json(records: Sequence[dict[str, Any]], categories: Categories) -> str:
    """Returns a JSON file of COCO's form for panoptic maps."""
    rows = zip(*categories, strict=True)
    content = {
        "images": [record["image"] for record in records],
        "annotations": [record["annotation"] for record in records],
        "categories": [{"id": each, "name": name, "isthing": int(thing)} for each, name, thing in rows],
    }
    return json.dumps(content) + "\n"


def read_prompts(path: Path) -> dict[str, dict[int, str]]:
    """Reads the captions of an earlier run, {} if there are none; ValueError for a damaged file."""
    if not path.is_file():
        return {}
    try:
        return decode_instance_prompts(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; repair it, or move it away") from error


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """Writes a PNG atomically."""
    with atomic_write(path) as scratch:
        Image.fromarray(pixels).save(scratch, format="PNG")


if __name__ == "__main__":
    run_script(main, Config, "make_panoptic")
