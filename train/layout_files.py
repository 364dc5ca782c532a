"""Files of layouts: boxes in JSON, COCO's JSON, LayoutDiffuse's lines, maps of segments.

Classes are matched by name with those of the data set that a model was trained on.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.class_names import class_index
from train.data.formats import coco, layout_lines, panoptic
from train.data.formats.categories import Categories
from train.datasets import Dataset, Ragged
from train.datasets._coco_json import CocoFile, read_coco, segment_rows
from train.datasets._regions import (
    CLASS_FILES,
    MAPS_CHECKED,
    UNLABELLED,
    RegionDataset,
    box_fields,
    make_boxes,
    make_map,
    make_masks,
    naming,
    panoptic_fields,
    read_categories,
    read_colors,
    read_map,
    read_text,
)
from train.files import parse_unique_json
from train.registry import did_you_mean

BOX_FIELDS = ("boxes", "masks", "box_class", "box_color")
SEGMENT_FIELDS = ("panoptic", "segment_id", "segment_class")
WORD_FIELDS = ("box_id", "box_words")  # that a model may read beside them: the words of instances
REMEDY = "pass a .json file, or a folder of .txt files or .png maps, as --layouts"
LISTED = 12  # names in a message
ROUNDING = 1e-3  # by which a fraction in a file may be outside the image
Color = tuple[int, int, int]
Item = tuple[str, dict[str, Any]]  # a name, and the fields of an item of a data set except the image


@dataclass(frozen=True)
class LayoutVocabulary:
    """The classes and colours of a model's layouts, what it reads of them, and the size of its images."""

    categories: Categories  # the classes by number, with their ids in files
    palette: tuple[tuple[str, Color], ...]  # names of colours by number, and RGB; () if the data have none
    fields: tuple[str, ...]  # of a batch that the model reads, beside the class of the image
    size: tuple[int, int]  # height and width in pixels
    n_classes: int = 0  # of the classes of whole images; 0 without
    class_names: tuple[str, ...] = ()  # their names by number; () without

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes by number."""
        return self.categories.names

    @property
    def colors(self) -> tuple[str, ...]:
        """The names of the colours by number."""
        return tuple(name for name, _ in self.palette)

    @property
    def regions(self) -> tuple[str, ...]:
        """The fields of regions that the model reads."""
        return tuple(name for name in self.fields if name in BOX_FIELDS + SEGMENT_FIELDS)


def vocabulary_of(dataset: Dataset, fields: Sequence[str], size: tuple[int, int]) -> LayoutVocabulary:
    """Returns the vocabulary of a data set for a model that reads `fields`. Where the data do not name the classes of
    boxes, they are numbers; ValueError for maps of such classes."""
    classes = tuple(getattr(dataset, "region_classes", ()))
    if not classes and "panoptic" in fields:
        raise ValueError("got layouts for data without names of classes, by which maps are read: leave --layouts out")
    categories = Categories(tuple(range(len(classes))), classes, tuple(getattr(dataset, "region_things", ())))
    categories = dataset.categories if isinstance(dataset, RegionDataset) else categories
    return LayoutVocabulary(categories, tuple(getattr(dataset, "palette", ())), tuple(fields), size)


def number_of(value: Any, names: Sequence[str], what: str) -> int:
    """Returns the number of a class or a colour, which is given by its name or its number; ValueError: no such.

    Without names, every number from 0 on is one.
    """
    if isinstance(value, str) and value in names:
        return names.index(value)
    if type(value) is int and 0 <= value and (not names or value < len(names)):
        return value
    if not names:
        raise ValueError(f"got the {what} {value!r}, but the data have no {what} names: pass numbers from 0 on")
    listed = ", ".join(names[:LISTED]) + (f", ... ({len(names)} names)" if len(names) > LISTED else "")
    hint = did_you_mean(value, names) if isinstance(value, str) else ""
    raise ValueError(f"got the {what} {value!r}{hint}, wanted one of {listed}, or a number from 0 to {len(names) - 1}")


def name_of(number: int, names: Sequence[str]) -> str | int:
    """Returns the name of the number of a class or a colour, or the number itself where it has no name."""
    return names[number] if number < len(names) else number


def renumber(numbers: Tensor, own: Categories, vocabulary: LayoutVocabulary) -> Ragged:
    """Converts numbers (n,) of the classes of a file to those of the model, which have the same names."""
    names = [own.names[number] for number in numbers.tolist()]
    return Ragged(torch.tensor([number_of(name, vocabulary.classes, "class") for name in names], dtype=torch.int64))


def class_names_in(path: Path) -> tuple[str, ...]:
    """Returns the names of the classes in a file or folder of boxes, for a model that reads them as words."""
    if path.suffix.lower() == ".json":
        with naming(path):
            content = parse_unique_json(read_text(path, REMEDY))
        if not isinstance(content, list):
            return read_listed(path, ("category_id", "bbox"))[1].names
        lists = [entry.get("classes") for entry in content if isinstance(entry, dict)]
        names = [name for each in lists if isinstance(each, list) for name in each]
    else:
        files = [each for each in (list_files(path) if path.is_dir() else [path]) if each.suffix.lower() == ".txt"]
        names = [name for each in files for name in layout_lines.decode_lines(read_text(each, REMEDY)).names]
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))


# Files


def read_file(path: Path, vocabulary: LayoutVocabulary) -> list[Item]:
    """Reads a JSON file of layouts or of COCO, or the text or map of a single image."""
    if path.suffix.lower() != ".json":
        return read_files([path], path, vocabulary)
    with naming(path):
        content = parse_unique_json(read_text(path, REMEDY))
        if isinstance(content, list):
            return [read_entry(number, entry, vocabulary) for number, entry in enumerate(content)]
        if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
            raise ValueError(
                'wanted a list such as [{"boxes": [[0.1, 0.2, 0.4, 0.6]], "classes": ["car"]}], or the images, '
                "annotations and categories of COCO"
            )
    of_maps = any(isinstance(row, dict) and "segments_info" in row for row in content["annotations"])
    return read_panoptic(path, vocabulary) if of_maps else read_instances(path, vocabulary)


def read_folder(folder: Path, vocabulary: LayoutVocabulary) -> list[Item]:
    """Reads a folder of text files or of maps."""
    return read_files(list_files(folder), folder, vocabulary)


def list_files(folder: Path) -> list[Path]:
    """Returns the text files and maps of a folder, sorted, without lists of classes."""
    names = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS)
    return [path for path in names if path.name not in CLASS_FILES]


def read_files(paths: Sequence[Path], source: Path, vocabulary: LayoutVocabulary) -> list[Item]:
    """Reads files of one kind, each the layout of an image."""
    kinds = {path.suffix.lower() for path in paths}
    if not kinds <= READERS.keys() or len(kinds) != 1:
        got = " and ".join(sorted(kinds)) or "neither .txt nor .png"
        raise ValueError(f"{source}: got {got} files, wanted one of these kinds: {REMEDY}")
    return READERS[kinds.pop()](paths, source, vocabulary)


def file_stem(name: str) -> str:
    """Returns the name of a file, perhaps below folders, as a word for the names of other files."""
    return re.sub(r"[^\w.+-]+", "_", os.path.splitext(name)[0]).strip(".") or "_"


# JSON of layouts


def read_entry(number: int, entry: Any, vocabulary: LayoutVocabulary) -> Item:
    """Reads a layout of a JSON list."""
    if not isinstance(entry, dict) or "classes" not in entry or ("boxes" in entry) == ("masks" in entry):
        got = f"layout {number} is {str(entry)[:60]}"
        raise ValueError(f"{got}, wanted an object with boxes and classes, or masks in place of boxes")
    name = file_stem(f"{entry.get('name', f'layout_{number:03d}')}.json")
    with naming(f"layout {number}, {name}" if "name" in entry else f"layout {number}"):
        own = {"boxes", "masks", "classes", "colors", "words", "size", "name"}
        others = {key: value for key, value in entry.items() if key not in own}
        if unknown := sorted(others.keys() - {*vocabulary.fields, "label"} | others.keys() & {*SEGMENT_FIELDS}):
            hint = did_you_mean(unknown[0], [*own, *vocabulary.fields])
            raise ValueError(f"got {unknown[0]!r}{hint}, wanted {', '.join(sorted(own))} or another field of the model")
        if "masks" in entry:
            fields = read_masks(entry["masks"], entry.get("size"))
        else:
            fields = {"boxes": read_boxes(entry["boxes"], entry.get("size"))}
        n = len(fields["boxes"])
        fields["box_class"] = read_numbers(entry, "classes", vocabulary.classes, "class", n)
        if "colors" in entry:
            fields["box_color"] = read_numbers(entry, "colors", vocabulary.colors, "color", n)
        if "words" in entry or "box_words" in vocabulary.fields:
            fields["box_words"] = read_words(entry.get("words", [""] * n), n)
        if isinstance(entry.get("label"), str) and vocabulary.n_classes:
            others["label"] = class_index(entry["label"], vocabulary.n_classes, vocabulary.class_names)
        return name, fields | others


def read_boxes(boxes: Any, size: Any) -> Tensor:
    """Returns boxes (n, 4) of an image: fractions, or with `size`, its height and width, pixels."""
    try:
        values = torch.tensor(boxes, dtype=torch.float32).reshape(len(boxes), 4)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"got the boxes {str(boxes)[:60]}, wanted a list of [x0, y0, x1, y1]") from error
    if size is None:
        check_fractions(values.numpy(), 'give the layout "size": [height, width] for boxes in pixels')
        return Ragged(values.clamp(0, 1))
    return make_boxes(values.numpy(), read_size(size))


def read_masks(masks: Any, size: Any) -> dict[str, Any]:
    """Returns the masks, polygons or run lengths, of an image of `size`, [height, width], and the boxes around them."""
    if not isinstance(masks, list):
        raise ValueError(f"got the masks {str(masks)[:60]}, wanted a list of polygons or run lengths")
    pixels = [coco.decode_segmentation(each, read_size(size)) for each in masks]
    return {
        "masks": make_masks(pixels, read_size(size)),
        "boxes": make_boxes([coco.box_of_mask(each) for each in pixels], read_size(size)),
    }


def read_size(size: Any) -> tuple[int, int]:
    """Returns the height and width of an image; ValueError for anything but two whole numbers above 0."""
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise ValueError(f"got size {size}, wanted [height, width] in pixels")
    return tuple(size)


def check_fractions(boxes: np.ndarray, remedy: str) -> None:
    """Raises ValueError, ending in `remedy`, unless boxes (n, 4) are fractions of an image."""
    outside = ~((boxes >= -ROUNDING) & (boxes <= 1 + ROUNDING)).all(1)  # nan, too
    if outside.any():
        raise ValueError(f"got the box {boxes[outside][0].tolist()}, wanted fractions from 0 to 1: {remedy}")


def read_numbers(entry: Mapping[str, Any], key: str, names: Sequence[str], what: str, count: int) -> Ragged:
    """Returns the numbers (n,) of the classes or colours of `count` boxes."""
    values = entry[key]
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else repr(values)
        raise ValueError(f"got {got} {key} for {count} boxes, wanted one for each")
    return Ragged(torch.tensor([number_of(value, names, what) for value in values], dtype=torch.int64))


def read_words(words: Any, count: int) -> list[str]:
    """Returns the words of `count` regions, "" for none; ValueError for another number, and for what is no text."""
    if not isinstance(words, list) or len(words) != count or not all(isinstance(each, str) for each in words):
        got = f"{len(words)} words" if isinstance(words, list) else f"words {words!r}"
        raise ValueError(f'got {got} for {count} regions, wanted a text for each: "" for the name of its class')
    return list(words)


# COCO's JSON


def read_instances(path: Path, vocabulary: LayoutVocabulary) -> list[Item]:
    """Reads the boxes of COCO's instances, and the masks if the model reads them; an image without any has none."""
    of_masks = "masks" in vocabulary.fields
    content, categories = read_listed(path, ("category_id", "bbox", *(["segmentation"] if of_masks else [])))
    items = []
    for key, image in content.images.items():
        rows = content.annotations.get(key, [])
        with naming(f"{path}: {image['file_name']}"):
            if not {"height", "width"} <= image.keys():
                raise ValueError("got no height and width of the image, which its boxes are measured by: add them")
            numbers = Ragged(categories.numbers([row["category_id"] for row in rows]))
            size = int(image["height"]), int(image["width"])
            boxes = coco.to_xyxy([row["bbox"] for row in rows])
            fields = box_fields(boxes, renumber(numbers, categories, vocabulary), size)
            if of_masks:
                masks = [coco.decode_segmentation(row["segmentation"], size) for row in rows]
                fields["masks"] = make_masks(masks, size)
        items.append((file_stem(image["file_name"]), fields))
    return items


def read_panoptic(path: Path, vocabulary: LayoutVocabulary) -> list[Item]:
    """Reads COCO's panoptic JSON, and the maps in the folder of its name; a segment may have "words" of its own."""
    content, categories = read_listed(path, ("file_name", "segments_info"))
    items = []
    for key, image in content.images.items():
        for row in content.annotations.get(key, [])[:1]:
            file = path.with_suffix("") / row["file_name"]
            colors = read_colors(file, None)
            with naming(file):
                fields = panoptic_fields(panoptic.decode(colors, "coco"), categories, segment_rows(row))
                fields = renumber_fields(fields, categories, vocabulary)
                if "box_words" in vocabulary.fields:
                    fields |= words_of_segments(row["segments_info"], fields["segment_id"])
                items.append((file_stem(image["file_name"]), fields))
    return items


def words_of_segments(listed: Sequence[Mapping[str, Any]], ids: Tensor) -> dict[str, Any]:
    """Returns the words of the segments with these ids, things and stuff, as fields of instances."""
    words = {int(each["id"]): each.get("words", "") for each in listed}
    return {"box_id": Ragged(ids), "box_words": read_words([words[each] for each in ids.tolist()], len(ids))}


def read_listed(path: Path, keys: Sequence[str]) -> tuple[CocoFile, Categories]:
    """Reads a JSON file of COCO and its categories; ValueError if it has none."""
    content = read_coco(path, keys, REMEDY)
    if content.categories is None:
        raise ValueError(f"{path} has no categories, by whose names its classes are known: add them")
    return content, content.categories


def renumber_fields(fields: dict[str, Any], own: Categories, vocabulary: LayoutVocabulary) -> dict[str, Any]:
    """Converts the classes of the regions of a map, numbers of a file's own list, to those of the model, and adds the
    masks of its things if the model reads them."""
    if "masks" in vocabulary.fields and "box_id" in fields:
        ids = fields["panoptic"].as_subclass(Tensor).numpy()
        masks = [(ids == each).astype(np.uint8) for each in fields["box_id"].tolist()]
        fields = fields | {"masks": make_masks(masks, ids.shape)}
    classes = {name: fields[name] for name in ("box_class", "segment_class") if name in fields}
    return fields | {name: renumber(numbers, own, vocabulary) for name, numbers in classes.items()}


# Text files and maps


def read_lines(paths: Sequence[Path], source: Path, vocabulary: LayoutVocabulary) -> list[Item]:
    """Reads files of lines x,y,w,h,class name, in fractions of the image; an empty one has no boxes."""
    items = []
    for path in paths:
        text = read_text(path, REMEDY)
        with naming(path):
            layout = layout_lines.decode_lines(text)
            check_fractions(layout.boxes, "divide them by the sides of the image")
            numbers = [number_of(name, vocabulary.classes, "class") for name in layout.names]
            boxes = torch.from_numpy(layout.boxes).float().clamp(0, 1)
        items.append(
            (file_stem(path.name), {"boxes": Ragged(boxes), "box_class": Ragged(torch.tensor(numbers).long())})
        )
    return items


def read_maps(paths: Sequence[Path], source: Path, vocabulary: LayoutVocabulary) -> list[Item]:
    """Reads maps of segments: grey levels are ids of classes, 255 where there is none; colours are decoded.

    The ids are those of the list of classes in the folder, or else those of the data that the model was trained on.
    """
    listed = source.is_dir() and any((source / name).is_file() for name in CLASS_FILES)
    categories, items = read_categories(source, None) if listed else vocabulary.categories, []
    encoding = find_encoding(paths[:MAPS_CHECKED], source, categories)
    for path in paths:
        pixels = read_map(path, None) if encoding is None else read_colors(path, None)
        with naming(path):
            if encoding is None:
                fields = semantic_fields(pixels, categories)
            else:
                fields = panoptic_fields(panoptic.decode(pixels, encoding), categories)
            items.append((file_stem(path.name), renumber_fields(fields, categories, vocabulary)))
    return items


def find_encoding(paths: Sequence[Path], source: Path, categories: Categories) -> panoptic.Encoding | None:
    """Returns the encoding of panoptic maps, None for maps of grey levels; ValueError unless it is the only one."""
    maps = [read_map(path, None) for path in paths]
    if all(map(is_grey, maps)):
        return None
    things = dict(zip(categories.ids, categories.things, strict=True))
    possible = panoptic.possible_encodings([read_colors(path, None) for path in paths], things)
    impossible = {"coco"} | ({"two_channel"} if 0 in categories.ids else set())  # a category of 0 is unlabelled
    possible = [each for each in possible if each not in impossible]
    if len(possible) != 1:
        got = " or ".join(possible) or "neither two_channel nor mamoe, by the ids of the classes"
        raise ValueError(
            f"{source}: the colours of the maps may be {got}: put the classes with their ids beside them as "
            "categories.json, or pass COCO's panoptic JSON"
        )
    return possible[0]


def is_grey(pixels: np.ndarray) -> bool:
    """Returns whether a map (H, W) or (H, W, 3) has grey levels."""
    return pixels.ndim == 2 or bool((pixels == pixels[..., :1]).all())


def semantic_fields(levels: np.ndarray, categories: Categories) -> dict[str, Any]:
    """Returns the fields of a map whose levels are ids of classes: a segment for each class. It has no boxes, for it
    does not part two things of a class. ValueError for a picture in colours, and for a level that is no id."""
    if not is_grey(levels):
        raise ValueError("got a map in colours beside others in grey levels, wanted one kind")
    levels = (levels if levels.ndim == 2 else levels[..., 0]).astype(np.int64)
    present = np.unique(levels[levels != UNLABELLED])
    ids = np.where(levels == UNLABELLED, 0, levels + 1)
    segments = {"segment_id": Ragged(present + 1), "segment_class": Ragged(categories.numbers(present))}
    return {"panoptic": make_map(ids, torch.int32), **segments}


READERS: dict[str, Callable[[Sequence[Path], Path, LayoutVocabulary], list[Item]]] = {
    ".txt": read_lines,
    ".png": read_maps,
}
