"""Images with panoptic maps of the same names, and prompts: the layout of MaMoE, and that of Cityscapes.

    train/a.png   panoptic/train/a.png   prompts.csv (img_name, prompt)
    val/b.png     panoptic/val/b.png     instance_prompts.json ({"a.png": {"24001": "a man"}})
    test/         is not read if there is val

Three encodings of such maps look alike: --panoptic_encoding names theirs, and maps that contradict it are refused.
"""

import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from train.data.formats.categories import Categories
from train.data.formats.panoptic import Encoding, decode
from train.data.formats.prompts import decode_instance_prompts, decode_prompts
from train.data.sides import Sides
from train.datasets import SPLITS, UnreadableImage, check_split, data_root, require_readable
from train.datasets._coco_json import read_segments, require_same_categories
from train.datasets._pairs import AnnotationFiles, SplitName, find_split, pair_split
from train.datasets._regions import (
    CLASS_FILES,
    MAP_SUFFIXES,
    MAPS_CHECKED,
    ClassListConfig,
    Packed,
    RegionDataset,
    check_maps,
    naming,
    panoptic_fields,
    read_categories,
    read_colors,
    read_text,
)

T = TypeVar("T")
CITYSCAPES = (  # by training id; the first 11 are stuff
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
CITYSCAPES_CATEGORIES = Categories(tuple(range(19)), CITYSCAPES, tuple(number > 10 for number in range(19)))
SIDES = Sides(words=(("left", "right"),))  # in prompts


@dataclass(frozen=True, kw_only=True)
class Config(ClassListConfig):
    """Options of panoptic_folder; data_dir has images and panoptic maps. The classes are those of categories.json, or
    else the 19 of Cityscapes."""

    image_dir: str = "{split}"
    panoptic_dir: str = "panoptic/{split}"
    """Folder of the panoptic maps, relative to data_dir."""
    panoptic_encoding: Encoding = "mamoe"
    """What the colours mean. coco: id = R + 256 G + 65536 B, with a JSON file; two_channel: R = category, G = number;
    mamoe: id = 256 R + G, B = class."""
    panoptic_json: str = "{panoptic_dir}.json"
    """JSON file with the segments, for coco, relative to data_dir."""
    image_ending: str = ""
    """What names of images end in, before the suffix, and names of maps do not, such as _leftImg8bit."""
    panoptic_ending: str = ""
    """What names of maps end in, before the suffix, such as _gtFine_panoptic."""
    prompts: str | None = None
    """CSV file with columns img_name and prompt, relative to data_dir; may contain {split}."""
    instance_prompts: str | None = None
    """JSON file with the prompts of instances by image and id, relative to data_dir; may contain {split}."""

    EVERYDAY = ("panoptic_dir", "panoptic_encoding", "prompts")


class PanopticImages(RegionDataset):
    """A `Dataset` of images with a panoptic map, the boxes of its things, and prompts, if there are any."""

    sides = SIDES

    def __init__(
        self,
        *args: Any,
        encoding: Encoding,
        segments: Sequence[Sequence[Sequence[int]]] | None = None,
        captions: Mapping[str, str] | None = None,
        words: Mapping[str, Mapping[int, str]] | None = None,
        **options: Any,
    ):
        """`segments` are id, category and iscrowd of the segments of each map, for coco; `captions`, and `words` of
        instances, are by the name of the image."""
        super().__init__(*args, context=(encoding,), **options)
        self.encoding, self.captions, self.words = encoding, captions, words
        self.segments = None if segments is None else Packed(segments)

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        path, name = self.root / self.files[index], posixpath.basename(self.names[index])
        colors = read_colors(path, size, self.max_pixels)
        with naming(path):
            segments = None if self.segments is None else self.segments[index]
            fields = panoptic_fields(decode(colors, self.encoding), self.categories, segments)
        if self.captions is not None:
            fields["captions"] = [self.captions[name]] if name in self.captions else []
        if self.words is not None:
            own = self.words.get(name, {})
            rows = zip(fields["box_id"].tolist(), fields["box_class"].tolist(), strict=True)
            fields["box_words"] = [own.get(each, self.region_classes[number]) for each, number in rows]
        return fields


def build(config: Config, split: str, n_channels: int = 3) -> PanopticImages:
    """Returns the images of one split with their panoptic maps and prompts, sorted by path.

    FileNotFoundError for missing folders and files; ValueError for another split, files that cannot be paired, and maps
    that contradict the encoding.
    """
    check_split(split)
    root = data_root(config, "panoptic_folder")
    endings = config.image_ending, config.panoptic_ending
    files = AnnotationFiles(config.panoptic_dir, "--panoptic_dir", MAP_SUFFIXES, "panoptic map", endings)
    pairs = pair_split(config, root, split, files)
    splits = [find_split(root, config.image_dir, each) for each in SPLITS]
    name = splits[SPLITS.index(split)]
    has_list = config.categories or any((root / each).is_file() for each in CLASS_FILES)
    categories = read_categories(root, config.categories) if has_list else CITYSCAPES_CATEGORIES
    sources, segments = [name.fill(file) for file in (config.prompts, config.instance_prompts) if file], None
    if config.panoptic_encoding == "coco":
        template = config.panoptic_json.replace("{panoptic_dir}", config.panoptic_dir)
        sources.append(name.fill(template))
        categories, segments_of = read_segments(root / sources[-1])
        require_same_categories(*(root / each.fill(template) for each in splits))
        segments = [segments_of.get(posixpath.basename(file), ()) for file in pairs.annotations]
    captions = read_prompts(root, name, config.prompts, "--prompts", decode_prompts)
    words = read_prompts(root, name, config.instance_prompts, "--instance_prompts", decode_instance_prompts)
    ids = None if segments is None else [[row[0] for row in own] for own in segments]
    check_maps(root, pairs.annotations, config.panoptic_encoding, categories, ids, config.max_pixels)
    dataset = PanopticImages(
        root,
        pairs._replace(notes=(*pairs.notes, *count_prompts(pairs.images, captions))),
        categories,
        split,
        encoding=config.panoptic_encoding,
        segments=segments,
        captions=captions,
        words=words,
        sources=sources,
        max_pixels=config.max_pixels,
        n_channels=n_channels,
    )
    require_readable(dataset, root)
    require_words(dataset)
    return dataset


def read_prompts(
    root: Path, name: SplitName, file: str | None, flag: str, decode_text: Callable[[str], dict[str, T]]
) -> dict[str, T] | None:
    """Reads the prompts in a file that `flag` names; None for no file."""
    if file is None:
        return None
    text = read_text(root / name.fill(file), f"pass its name, relative to {root}, as {flag}")
    with naming(root / name.fill(file)):
        return decode_text(text)


def count_prompts(images: Sequence[str], captions: Mapping[str, str] | None) -> tuple[str, ...]:
    """Returns a note if images have no prompt."""
    without = 0 if captions is None else sum(posixpath.basename(image) not in captions for image in images)
    return (f"images without a prompt: {without}",) if without else ()


def require_words(dataset: PanopticImages) -> None:
    """Raises ValueError if the prompts of instances name ids, but none of those in the first maps."""
    pairs = []
    for index, name in enumerate(dataset.names[:MAPS_CHECKED] if dataset.words is not None else ()):
        try:
            ids = dataset[index]["segment_id"].tolist()
        except UnreadableImage:
            continue
        pairs.append((name, sorted(dataset.words.get(posixpath.basename(name), {})), ids))
    pairs = [each for each in pairs if each[1]]
    if pairs and not any(set(words) & set(ids) for _, words, ids in pairs):
        name, words, ids = pairs[0]
        raise ValueError(
            f"the prompts of instances of {name} have the ids {words[:3]}, and its map {ids[:3]}: wanted the same ids "
            "in --instance_prompts, or another --panoptic_encoding"
        )
