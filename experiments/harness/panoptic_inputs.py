"""Panoptic maps with the prompts of images and of instances, as layouts of images to generate; and their files.

    maps/a.png              a map in one of three encodings; maps.json with its segments, for coco
    prompts.csv             img_name,prompt
    instances.json          {"a.png": {"24001": "a man"}}, by the ids in the map, of things or of stuff

Images, maps and prompts belong together by their names without suffixes, as in training.
"""

import hashlib
import posixpath
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from experiments.harness.layout_inputs import LayoutInputs, source_of
from models.ranges import COUNT, check_ranges
from train.config import SamplingConfig
from train.data.formats.categories import Categories
from train.data.formats.panoptic import Encoding, check_encoding, decode
from train.data.formats.prompts import (
    decode_captions,
    decode_instance_prompts,
    encode_instance_prompts,
    encode_prompts,
)
from train.datasets import Ragged
from train.datasets._coco_json import read_segments
from train.datasets._regions import (
    CLASS_FILES,
    MAP_SUFFIXES,
    MAPS_CHECKED,
    naming,
    panoptic_fields,
    read_categories,
    read_colors,
    read_text,
)
from train.datasets.folder import walk_files
from train.files import sha256, write_text
from train.layout_files import LayoutVocabulary, file_stem, find_encoding, renumber_fields, semantic_fields
from train.layouts import Layout, read_row, trained_vocabulary, write_maps
from train.trained_sampler import TrainedSampler

T = TypeVar("T")
CAPTION, WORDS = "caption", "box_words"  # batch fields of the prompts of images and of instances
PROMPTS_FILE, INSTANCES_FILE = "prompts.csv", "instances.json"
LISTED = 8  # ids in a message
UNMATCHED = "or pass --allow_unmatched"


@dataclass(frozen=True, kw_only=True)
class PanopticMapsConfig:
    """Maps."""

    maps: str | None = None
    """Folder of panoptic maps; they are resized and cropped as in training."""
    panoptic_encoding: Encoding | None = None
    """What the colours mean. coco: id = R + 256 G + 65536 B, with a JSON file; two_channel: R = category, G = number;
    mamoe: id = 256 R + G, B = class. If omitted, coco where there is a JSON file, else what the colours can mean."""
    panoptic_json: str | None = None
    """JSON file with the segments of the maps, for coco; if omitted, <maps>.json."""
    categories: str | None = None
    """File with the classes of the maps: JSON or YAML with ids and names, or a name a line; if omitted, the one in the
    folder of the maps, such as categories.json, or else the classes of the data set of the training."""
    prompts: str | None = None
    """CSV file with columns img_name and prompt, or JSON; if omitted, the prompt of a map is its classes, by name."""
    prompt: str | None = None
    """Prompt of all maps, instead of --prompts."""
    instances: str | None = None
    """JSON file with the words of instances by image and id, {"a.png": {"24001": "a man"}}; those of other segments
    are the names of their classes. Stuff may have words, too."""
    image_ending: str = ""
    """What names of images in --prompts and --instances end in, before the suffix, and names of maps do not, such as
    _leftImg8bit."""
    panoptic_ending: str = ""
    """What names of maps end in, before the suffix, such as _gtFine_panoptic."""
    allow_unmatched: bool = False
    """Draw maps without a prompt by the names of their classes, and ignore prompts without a map."""
    n_images: int | None = None
    """Number of maps, the first ones; if omitted, all."""
    n_seeds: int = 4
    """Images of each map."""

    EVERYDAY = ("maps", "prompts", "instances")
    RANGES = {"n_images": COUNT, "n_seeds": COUNT}

    def __post_init__(self):
        check_ranges(self)
        if self.prompts is not None and self.prompt is not None:
            raise ValueError("got --prompts and --prompt: pass one of them")
        if self.panoptic_json is not None and self.panoptic_encoding not in (None, "coco"):
            raise ValueError(f"got --panoptic_json for maps of {self.panoptic_encoding}: leave one of them out")


class MapFile(NamedTuple):
    """A panoptic map in a folder."""

    path: Path
    name: str  # of the pictures of it
    key: str  # by which its prompts are found


def open_maps(settings: PanopticMapsConfig, trained: TrainedSampler, options: SamplingConfig) -> LayoutInputs:
    """Opens the maps and their prompts for a model, as layouts with all that it reads of them.

    Fields that neither the maps nor the prompts have come from where they come from without maps. All ranks must call
    it. FileNotFoundError, ValueError: they cannot be used, or do not belong together.
    """
    vocabulary = segment_vocabulary(trained, settings)
    if options.condition_file is not None:
        raise ValueError("got --maps and --condition_file: pass one of them")
    files = list_maps(settings)
    captions, words = find_captions(settings, files), find_words(settings, files)
    reader, layouts = open_reader(settings, files, vocabulary), []
    for file, caption, own in list(zip(files, captions, words, strict=True))[: settings.n_images]:
        fields = reader.read(file)
        check_ids(own, fields, f"{settings.instances}: {file.path.name}")
        caption = name_classes(fields, vocabulary.classes) if caption is None else caption
        fields = with_words(fields, own) | {CAPTION: caption}
        layouts.append(Layout(file.name, read_row(file.path, file.name, fields, vocabulary)))
    source = source_of(layouts, trained, options)
    return LayoutInputs(tuple(layouts), vocabulary, source, provenance_of(settings, files))


def segment_vocabulary(trained: TrainedSampler, settings: PanopticMapsConfig) -> LayoutVocabulary:
    """Returns the vocabulary of a model; ValueError unless it reads segments, and the prompts that are given."""
    vocabulary, fields = None, trained.sampler.conditions
    if "panoptic" in fields:
        vocabulary = trained_vocabulary(trained)
        fields = vocabulary.fields
    reads = f"{trained.run}, which reads {', '.join(fields) or 'no conditions'}"
    if vocabulary is None:
        wanted = "--conditions region_words, or with --layout_regions segments"
        others = " (boxes and masks: run_layout_to_image.py)" if {"boxes", "masks"} & {*fields} else ""
        raise ValueError(f"got panoptic maps for {reads}: pass a run with {wanted}{others}")
    given = {"prompts": settings.prompts, "prompt": settings.prompt, "instances": settings.instances}
    for flag, value in given.items():
        field, condition = (WORDS, "region_words") if flag == "instances" else (CAPTION, "text")
        if value is not None and field not in fields:
            raise ValueError(f"got --{flag} for {reads}: leave it out, or pass a run with --conditions {condition}")
    return vocabulary


# Maps


def list_maps(settings: PanopticMapsConfig) -> list[MapFile]:
    """Returns the maps of the settings, sorted by name. FileNotFoundError, ValueError: there are none, or two have one
    name."""
    folder = require_folder(settings.maps)
    names = [name for name in walk_files(folder) if name.lower().endswith(MAP_SUFFIXES)]
    if not names:
        raise ValueError(f"{folder} has no {' or '.join(MAP_SUFFIXES)} file: pass the folder of the maps as --maps")
    keys = [posixpath.splitext(posixpath.basename(name))[0].removesuffix(settings.panoptic_ending) for name in names]
    pairs = zip(names, keys, strict=True)
    files = sorted((MapFile(folder / name, file_stem(name), key) for name, key in pairs), key=lambda file: file.name)
    for one, other in pairwise(files):
        if one.name == other.name:
            raise ValueError(f"{one.path} and {other.path} have the same name but for signs: rename one of them")
    by_key: dict[str, MapFile] = {}
    for file in files:
        if (first := by_key.setdefault(file.key, file)) is not file:
            got = f"{first.path} and {file.path} have one name, by which prompts and words are found"
            raise ValueError(f"{got}: rename one of them, or draw the folders one after the other")
    return files


def require_folder(path: str | None) -> Path:
    """Returns the folder of --maps; ValueError without one, FileNotFoundError if it is none."""
    if path is None:
        raise ValueError("got no maps: pass a folder of panoptic maps as --maps")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: pass the folder of the maps as --maps")
    return folder


class SegmentTable(NamedTuple):
    """The classes of maps by their ids and, of coco, the segments of each map: rows of id, category and iscrowd."""

    categories: Categories
    segments: Mapping[str, Sequence[Sequence[int]]] | None = None


@dataclass(frozen=True)
class MapReader:
    """Reads maps of one encoding."""

    table: SegmentTable
    encoding: Encoding | None  # None: grey levels that are classes
    vocabulary: LayoutVocabulary

    def read(self, file: MapFile) -> dict[str, Any]:
        """Returns the fields of a map as those of an item of a data set, with the classes of the model; ValueError for
        others."""
        colors, (categories, segments) = read_colors(file.path, None), self.table
        with naming(file.path):
            if self.encoding is None:
                fields = semantic_fields(colors, categories)
            else:
                rows = None if segments is None else segments.get(file.path.name)
                fields = panoptic_fields(decode(colors, self.encoding), categories, rows)
            return renumber_fields(fields, categories, self.vocabulary)


def open_reader(settings: PanopticMapsConfig, files: Sequence[MapFile], vocabulary: LayoutVocabulary) -> MapReader:
    """Returns the reader of maps. FileNotFoundError, ValueError: a list of classes or segments is missing, or the first
    maps are of another encoding."""
    table = find_table(settings, require_folder(settings.maps), vocabulary)
    return MapReader(table, choose_encoding(settings, files, table), vocabulary)


def find_table(settings: PanopticMapsConfig, folder: Path, vocabulary: LayoutVocabulary) -> SegmentTable:
    """Reads the classes of the maps, and their segments if they are of coco. FileNotFoundError: a file is missing;
    ValueError: there are two lists of classes."""
    path = Path(settings.panoptic_json or f"{folder}.json").expanduser()
    wanted = settings.panoptic_encoding == "coco" or settings.panoptic_json is not None
    if wanted or (settings.panoptic_encoding is None and path.is_file()):
        if settings.categories is not None:
            got = f"got --categories beside {path}, which has the classes of maps of coco"
            raise ValueError(f"{got}: leave it out, or pass another --panoptic_encoding")
        return SegmentTable(*read_segments(path))
    if settings.categories is not None:
        return SegmentTable(read_categories(Path(), str(Path(settings.categories).expanduser())))
    listed = any((folder / name).is_file() for name in CLASS_FILES)
    return SegmentTable(read_categories(folder, None) if listed else vocabulary.categories)


def choose_encoding(settings: PanopticMapsConfig, files: Sequence[MapFile], table: SegmentTable) -> Encoding | None:
    """Returns the encoding of maps, None for grey levels that are classes; ValueError if it is not the one that the
    settings name, or the colours leave it open."""
    folder, first = require_folder(settings.maps), [file.path for file in files[:MAPS_CHECKED]]
    if settings.panoptic_encoding is None and table.segments is None:
        return find_encoding(first, folder, table.categories)
    encoding, listed = settings.panoptic_encoding or "coco", None
    if table.segments is not None:
        missing = [file.path.name for file in files if file.path.name not in table.segments]
        if missing:
            raise ValueError(f"{folder}: {name_some(missing)} not in the JSON file: pass theirs as --panoptic_json")
        listed = [[row[0] for row in table.segments[path.name]] for path in first]
    things = dict(zip(table.categories.ids, table.categories.things, strict=True))
    with naming(folder):
        check_encoding([read_colors(path, None) for path in first], encoding, things, listed)
    return encoding


def with_words(fields: Mapping[str, Any], words: Mapping[int, str]) -> dict[str, Any]:
    """Returns the fields of a map with the words of its segments by id: of its things, "" for the name of the class,
    then of stuff that has words of its own."""
    things = fields["box_id"].tolist() if "box_id" in fields else []
    ids = [*things, *(each for each in fields["segment_id"].tolist() if each in words and each not in things)]
    texts = [words.get(each, "") for each in ids]
    return {**fields, "box_id": Ragged(torch.tensor(ids, dtype=torch.int64)), WORDS: texts}


def name_classes(fields: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Returns the names of the classes of a map, each once, those of larger areas first: "road, car, sky"."""
    ids = fields["panoptic"].as_subclass(Tensor).numpy()
    pixels = dict(zip(*(each.tolist() for each in np.unique(ids, return_counts=True)), strict=True))
    areas: dict[str, int] = {}
    for each, number in zip(fields["segment_id"].tolist(), fields["segment_class"].tolist(), strict=True):
        areas[classes[number]] = areas.get(classes[number], 0) + pixels.get(each, 0)
    return ", ".join(sorted(areas, key=lambda name: -areas[name]))


# Prompts


def find_captions(settings: PanopticMapsConfig, files: Sequence[MapFile]) -> list[str | None]:
    """Returns the prompt of each map, None: it has none; ValueError for those that do not belong together, but for maps
    that are not drawn."""
    if settings.prompts is None:
        return [settings.prompt] * len(files)
    path = Path(settings.prompts).expanduser()
    text = read_text(path, "pass a CSV file with columns img_name and prompt as --prompts")
    with naming(path):
        captions = {image: each[0].text for image, each in decode_captions(text, path.suffix.lower()).items()}
    found = match_names(captions, files, path, settings)
    drawn = list(zip(files, found, strict=True))[: settings.n_images]
    missing = [file.path.name for file, caption in drawn if caption is None]
    if missing and not settings.allow_unmatched:
        raise ValueError(f"{path} has no prompt for {name_some(missing)}: add one for each, {UNMATCHED}")
    return found


def find_words(settings: PanopticMapsConfig, files: Sequence[MapFile]) -> list[Mapping[int, str]]:
    """Returns the words of the segments of each map, by id; ValueError for those of other images."""
    if settings.instances is None:
        return [{}] * len(files)
    path = Path(settings.instances).expanduser()
    text = read_text(path, 'pass a JSON file such as {"a.png": {"24001": "a man"}} as --instances')
    with naming(path):
        words = decode_instance_prompts(text)
    return [own or {} for own in match_names(words, files, path, settings)]


def check_ids(words: Collection[int], fields: Mapping[str, Any], where: str) -> None:
    """Raises ValueError unless all ids are those of segments of a map; the message begins with `where`."""
    segments = fields["segment_id"].tolist()
    if odd := sorted({*words} - {*segments}):
        known = f"its ids are {', '.join(map(str, segments[:LISTED]))}" + ", ..." * (len(segments) > LISTED)
        got = f"{where} has no id {odd[0]}; {known if segments else 'it has no segments'}"
        raise ValueError(f"{got}: check the ids, and --panoptic_encoding")


def match_names(
    values: Mapping[str, T], files: Sequence[MapFile], path: Path, settings: PanopticMapsConfig
) -> list[T | None]:
    """Returns the value of each map from those by name of the image; ValueError for two of one map, and for those of
    which there is no map."""
    by_key: dict[str, str] = {}
    for name in values:
        key = posixpath.splitext(posixpath.basename(name))[0].removesuffix(settings.image_ending)
        if key in by_key:
            raise ValueError(f"{path}: {by_key[key]} and {name} are the same but for the suffix: keep one of them")
        by_key[key] = name
    if strays := [name for key, name in by_key.items() if key not in {file.key for file in files}]:
        if not settings.allow_unmatched or len(strays) == len(by_key):
            got = f"{path} has prompts of {name_some(strays)}, but {settings.maps} has no such map"
            raise ValueError(f"{got}: check --image_ending and --panoptic_ending, {UNMATCHED}")
    return [values[by_key[file.key]] if file.key in by_key else None for file in files]


def name_some(names: Sequence[str]) -> str:
    """Returns the first of names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# Results


def provenance_of(settings: PanopticMapsConfig, files: Sequence[MapFile]) -> dict[str, str]:
    """Returns what identifies the inputs by their content: hashes of maps, of prompts and of those of instances."""
    digests = [f"{file.name} {sha256(file.path)}" for file in files[: settings.n_images]]
    folder = require_folder(settings.maps)
    tables = [Path(each).expanduser() for each in (settings.panoptic_json, settings.categories) if each is not None]
    tables += [Path(f"{folder}.json"), *(folder / name for name in CLASS_FILES)]
    digests += [sha256(each) for each in tables if each.is_file()]
    given = {"prompts_sha256": settings.prompts, "instances_sha256": settings.instances}
    hashes = {name: sha256(Path(path).expanduser()) for name, path in given.items() if path is not None}
    return {"maps_sha256": hashlib.sha256("\n".join(digests).encode()).hexdigest(), **hashes}


def write_inputs(folder: Path, inputs: LayoutInputs) -> None:
    """Writes maps of the size of the images, as coco, and the prompts of images and instances, so that `open_maps`
    reads them again: maps/, maps.json, prompts.csv and instances.json."""
    write_maps(folder, inputs.layouts, inputs.vocabulary, "maps")
    rows = {f"{layout.name}.png": layout.row for layout in inputs.layouts}
    if any(CAPTION in row for row in rows.values()):
        write_text(folder / PROMPTS_FILE, encode_prompts({name: row[CAPTION] for name, row in rows.items()}))
    if any(WORDS in row for row in rows.values()):
        words = {name: words_in(row) for name, row in rows.items()}
        write_text(folder / INSTANCES_FILE, encode_instance_prompts(words) + "\n")


def words_in(row: Mapping[str, Any]) -> dict[int, str]:
    """Returns the words of the segments of which there is something in the image, by id."""
    present = np.unique(row["panoptic"].as_subclass(Tensor).numpy()).tolist()
    rows = zip(row["box_id"].tolist(), row[WORDS], strict=True)
    return {each: words for each, words in rows if words and each in present}
