"""Layouts of images to generate: read from files, as rows of conditions, and written so that they can be read again.

    layouts.json            [{"boxes": [[x0, y0, x1, y1], ...], "classes": ["disc", ...]}, ...], perhaps with "words"
                            or "masks" in place of "boxes", as in COCO's JSON, with the "size" of their image
    instances_val.json      COCO's instances, or its panoptic JSON beside the folder panoptic_val/ of its maps
    folder/a.txt            lines x,y,w,h,class name (LayoutDiffuse)
    folder/a.png            grey levels that are classes, or a panoptic map in colours; perhaps with a categories.json

Classes are matched by name with those of the data set that the model was trained on. What is in pixels is resized and
cropped as its images are in training; what is in fractions refers to the image that is generated. A region that comes
later is in front.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from models.regions import check_region_fields
from train.condition_source import Row
from train.data.collate import box_fractions, collate, is_boxes
from train.data.formats import panoptic
from train.data.formats.categories import encode_categories
from train.data.formats.coco import encode_rle
from train.data.transforms import cover_size, is_spatial, resize_and_crop, trim
from train.datasets import Ragged
from train.datasets._regions import CLASS_FILES, naming
from train.files import atomic_write, sha256, write_text
from train.layout_files import (
    BOX_FIELDS,
    REMEDY,
    SEGMENT_FIELDS,
    WORD_FIELDS,
    LayoutVocabulary,
    list_files,
    name_of,
    read_file,
    read_folder,
    vocabulary_of,
)
from train.trained_sampler import TrainedSampler

REMEDIES = {  # for fields of regions that a file does not have
    "boxes": "pass boxes: JSON, a folder of .txt files, or maps of instances",
    "masks": "pass masks: JSON, or maps of instances",
    "box_color": 'pass a JSON file of layouts with "colors" beside "classes"',
    "panoptic": "pass a folder of .png maps, or COCO's panoptic JSON beside the folder of its maps",
}


class Layout(NamedTuple):
    """The regions of an image to generate, as fields of a batch, and its name."""

    name: str  # for files; no two layouts of a list have the same
    row: Row  # "boxes" are Ragged (R, 4) x0, y0, x1, y1 as fractions of the image; "panoptic" has the image's size


def trained_vocabulary(trained: TrainedSampler, size: tuple[int, int] | None = None) -> LayoutVocabulary:
    """Returns the vocabulary of a model, for images of `size` or, without, of the size of its training.

    ValueError if it reads no regions.
    """
    fields = [name for name in trained.sampler.conditions if name != "label"]
    fields += [name for name in WORD_FIELDS if name in trained.sampler.optional_conditions]
    if not {"boxes", "masks", "panoptic"} & {*fields}:
        reads = ", ".join(trained.sampler.conditions) or "no conditions"
        raise ValueError(
            f"got layouts for {trained.run}, which reads {reads}: pass a run with boxes, masks or segments"
        )
    vocabulary = vocabulary_of(trained.dataset("val"), fields, size or trained.data.size)
    return replace(vocabulary, n_classes=trained.sampler.n_classes, class_names=trained.class_names)


def read_layouts(path: str | Path, vocabulary: LayoutVocabulary) -> list[Layout]:
    """Reads the layouts in a file or a folder; each row has all fields of regions that the model reads.

    In a JSON list, boxes are fractions of the generated image, or pixels of an image of "size": [height, width], and
    masks are polygons or run lengths of pixels of such an image. An entry may have "colors", "words" of the regions, a
    "name", a "label" (the number or name of the image's class), and other fields of the model. FileNotFoundError,
    ValueError: there is nothing, or it cannot be used; the message names the image.
    """
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: {REMEDY}")
    items = read_folder(path, vocabulary) if path.is_dir() else read_file(path, vocabulary)
    if not items:
        raise ValueError(f"{path} has no layouts: {REMEDY}")
    layouts = [Layout(name, read_row(path, name, fields, vocabulary)) for name, fields in items]
    names = [layout.name for layout in layouts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: two layouts have the name {twice}: give each its own")
    for layout in layouts:
        if layout.row.keys() != layouts[0].row.keys():
            odd = ", ".join(sorted(layout.row.keys() ^ layouts[0].row.keys()))
            raise ValueError(f"{path}: {layout.name} and {names[0]} differ in {odd}, wanted the same fields in all")
    return layouts


def layouts_provenance(path: str | Path | None) -> dict[str, str]:
    """Returns {"layouts_sha256": digest} of the files that `read_layouts` reads; {} without a path."""
    path = None if path is None else Path(os.path.expanduser(path))
    if path is None or not path.exists():
        return {}
    maps = path.with_suffix("")  # of COCO's panoptic JSON
    folders = [folder for folder in (path, maps) if folder.is_dir()]
    files = [file for folder in folders for file in list_files(folder) if file.is_file()]
    files += [path / name for name in CLASS_FILES if (path / name).is_file()]
    contents = [sha256(path)] if path.is_file() else []
    contents += [f"{file.name} {sha256(file)}" for file in files]
    return {"layouts_sha256": hashlib.sha256("\n".join(contents).encode()).hexdigest()}


# Rows


def read_row(path: Path, name: str, fields: dict[str, Any], vocabulary: LayoutVocabulary) -> Row:
    """Returns the row of conditions of an item's fields; ValueError if it lacks regions, or has some that cannot be."""
    with naming(path):
        for field in vocabulary.regions:
            if field not in fields:
                remedy = REMEDIES.get(field, REMEDIES["boxes" if field in BOX_FIELDS else "panoptic"])
                raise ValueError(f"{name} has no {field}, which the model reads: {remedy}")
        wanted = {field: value for field, value in fields.items() if field in (*vocabulary.fields, "label")}
        row = make_row(fit_fields(wanted, vocabulary.size))
        for kind in (BOX_FIELDS, SEGMENT_FIELDS):
            if regions := {field: row[field] for field in vocabulary.regions if field in kind}:
                check_region_fields(collate([regions]), names=[name])
    return row


def make_row(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of fields whose boxes are fractions of the image, (R, 4) float32."""
    boxes = {name: value for name, value in fields.items() if isinstance(value, Tensor) and is_boxes(value)}
    return dict(fields) | {name: Ragged(box_fractions(value)) for name, value in boxes.items()}


def fit_fields(fields: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Resizes boxes and maps of one image to cover `size` and crops their centre, as `to_item` does with the image."""
    from torchvision.transforms.v2 import functional as F

    spatial = [value for value in fields.values() if is_spatial(value)]
    if not spatial:
        return fields
    resized = cover_size(*F.get_size(trim(spatial[0], size)), size)
    return {
        name: resize_and_crop(value, resized, size) if is_spatial(value) else value for name, value in fields.items()
    }


# Writing


def write_layouts(folder: Path, layouts: Sequence[Layout], vocabulary: LayoutVocabulary) -> Path:
    """Writes layouts to <folder>/layouts.json so that `read_layouts` reads them again; segments as COCO's panoptic
    JSON with its maps in <folder>/layouts/. Boxes are clipped to the image; where there are masks, the boxes are not
    written, but those around the masks are read. Returns the path of the JSON file."""
    path = folder / "layouts.json"
    folder.mkdir(parents=True, exist_ok=True)
    if {"boxes", "masks"} & layouts[0].row.keys():
        entries = [json.dumps(describe_objects(layout, vocabulary)) for layout in layouts]
        write_text(path, "[\n" + ",\n".join(entries) + "\n]\n")
        return path
    images, annotations = [], []
    for number, (name, row) in enumerate(layouts, 1):
        ids = row["panoptic"].as_subclass(Tensor).numpy()
        present = {*np.unique(ids).tolist()}
        rows = zip(row["segment_id"].tolist(), row["segment_class"].tolist(), strict=True)
        segments = [{"id": i, "category_id": vocabulary.categories.ids[c]} for i, c in rows if i in present]
        words = dict(zip(row["box_id"].tolist(), row["box_words"], strict=True)) if "box_words" in row else {}
        segments = [each | ({"words": words[each["id"]]} if words.get(each["id"]) else {}) for each in segments]
        ids = np.where(np.isin(ids, [each["id"] for each in segments]), ids, 0)
        with atomic_write(folder / "layouts" / f"{name}.png") as scratch:
            Image.fromarray(panoptic.encode(ids, "coco")).save(scratch, format="PNG")
        images.append({"id": number, "file_name": f"{name}.png", "height": ids.shape[0], "width": ids.shape[1]})
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
    categories = json.loads(encode_categories(vocabulary.categories))
    write_text(path, json.dumps({"images": images, "annotations": annotations, "categories": categories}) + "\n")
    return path


def describe_objects(layout: Layout, vocabulary: LayoutVocabulary) -> dict[str, Any]:
    """Returns a layout of masks or boxes as an entry of a JSON file; those outside the image are left out."""
    row = layout.row
    if "masks" in row:
        masks = row["masks"].as_subclass(Tensor) > 0
        inside = masks.flatten(1).any(1)
        shapes = {"masks": [*map(encode_rle, masks[inside].numpy())], "size": [*masks.shape[1:]]}
    else:
        boxes = row["boxes"].as_subclass(Tensor).clamp(0, 1)
        inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
        shapes = {"boxes": [[float(str(side)) for side in box] for box in boxes[inside].numpy()]}  # digits of float32
    classes = [name_of(number, vocabulary.classes) for number in row["box_class"][inside].tolist()]
    entry = {"name": layout.name, **shapes, "classes": classes}
    if "box_color" in row:
        entry["colors"] = [name_of(number, vocabulary.colors) for number in row["box_color"][inside].tolist()]
    if "box_words" in row:
        entry["words"] = [words for words, kept in zip(row["box_words"], inside.tolist(), strict=True) if kept]
    return entry | {name: value for name, value in row.items() if isinstance(value, str)}
