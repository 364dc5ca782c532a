"""Panoptic maps that a user paints: from a canvas, a picture or an item of data, and as conditions of images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.harness.panoptic_inputs import CAPTION, WORDS, name_classes, with_words
from train.condition_source import Row
from train.data.formats.panoptic import PanopticMap, segments_of
from train.datasets._regions import make_map, panoptic_fields
from train.layout_files import LayoutVocabulary, renumber_fields
from train.layouts import fit_fields, make_row, trained_vocabulary
from train.loop import Batch
from train.trained_sampler import TrainedSampler

MOST_REGIONS = 65_535  # numbers that a pixel of the canvas can have
UNPAINTED = (128, 128, 128)  # the colour of what is in no region
RGB = tuple[int, int, int]


class PaintedRegion(NamedTuple):
    """An instance of a thing, or all of a class of stuff."""

    number: int  # of the class
    words: str = ""  # "": the name of its class


@dataclass(frozen=True)
class PaintedMap:
    """The region of each pixel: k + 1 for region k, 0 for none. Regions without pixels are not in the image."""

    ids: np.ndarray  # (H, W) int32
    regions: tuple[PaintedRegion | None, ...] = ()  # None: removed

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The ids row by row: each with how many pixels in a row have it."""
        flat = self.ids.ravel()
        starts = np.flatnonzero(np.diff(flat, prepend=-1))
        return list(zip(flat[starts].tolist(), np.diff(starts, append=flat.size).tolist(), strict=True))


def painted_vocabulary(trained: TrainedSampler) -> LayoutVocabulary | None:
    """Returns the vocabulary of maps for a model; None if it reads no segments, or more of regions than a painted map
    has, or if its data do not name classes."""
    fields = {*trained.sampler.conditions}
    if "panoptic" not in fields or "box_color" in fields or not trained.region_classes:
        return None
    return trained_vocabulary(trained)


def empty_map(size: tuple[int, int]) -> PaintedMap:
    """Returns a map (height, width) without regions."""
    return PaintedMap(np.zeros(size, np.int32))


def parse_painting(text: str, vocabulary: LayoutVocabulary) -> PaintedMap:
    """Reads the map on a canvas: {"size": [h, w], "runs": [[id, length], ...], "regions": [{"number", "words"}, ...]}.

    ValueError for another size than the model's, and for ids and classes that are not there.
    """
    content = json.loads(text)
    size, runs = tuple(content["size"]), np.array(content["runs"], np.int64).reshape(-1, 2)
    if size != vocabulary.size or runs[:, 1].sum() != size[0] * size[1]:
        wanted = "x".join(map(str, vocabulary.size))
        raise ValueError(f"got a map of {size[0]}x{size[1]} pixels, wanted {wanted}: clear it")
    regions = tuple(each and PaintedRegion(each["number"], each["words"].strip()) for each in content["regions"])
    present = {*runs[:, 0].tolist()} - {0}
    if odd := [each for each in present if not 0 < each <= len(regions) or regions[each - 1] is None]:
        raise ValueError(f"got a pixel of region {odd[0]}, which is not there: clear the map")
    if odd := [each.number for each in regions if each and not 0 <= each.number < len(vocabulary.classes)]:
        raise ValueError(f"got class {odd[0]}, wanted one of the {len(vocabulary.classes)} of the model: clear the map")
    return PaintedMap(np.repeat(runs[:, 0], runs[:, 1]).reshape(size).astype(np.int32), regions)


def row_of(painted: PaintedMap, vocabulary: LayoutVocabulary) -> Row:
    """Returns a painted map as fields of one image, those that the model reads: its segments with their words, and the
    boxes of its things, as those of a data set. Its caption is the names of its classes."""
    categories, segment_id = vocabulary.categories, segments_of(painted.ids)
    numbers = [painted.regions[each - 1].number for each in segment_id.tolist()]
    segment_class = np.array([categories.ids[number] for number in numbers], np.int64)
    fields = panoptic_fields(PanopticMap(painted.ids, segment_id, segment_class), categories)
    words = {k + 1: region.words for k, region in enumerate(painted.regions) if region and region.words}
    fields = with_words(renumber_fields(fields, categories, vocabulary), words)
    fields[CAPTION] = name_classes(fields, vocabulary.classes)
    return make_row({name: value for name, value in fields.items() if name in vocabulary.fields})


def painting_of(batch: Batch, vocabulary: LayoutVocabulary) -> PaintedMap:
    """Returns the map of the first image of a batch of conditions, its segments numbered from 1; words that are the
    name of the class are left out."""
    present = {name: batch[f"{name}_mask"][0] for name in ("segment_id", "box_id") if name in batch}
    segments = batch["segment_id"][0][present["segment_id"]].tolist()
    numbers = batch["segment_class"][0][present["segment_id"]].tolist()
    words: dict[int, str] = {}
    if "box_id" in batch and WORDS in batch:
        words = dict(zip(batch["box_id"][0][present["box_id"]].tolist(), batch[WORDS][0], strict=True))
    ids, table = batch["panoptic"][0].numpy(), dict(zip(segments, range(1, len(segments) + 1), strict=True))
    values, where = np.unique(ids, return_inverse=True)
    renumbered = np.array([table.get(each, 0) for each in values.tolist()], np.int32)[where].reshape(ids.shape)
    regions = []
    for each, number in zip(segments, numbers, strict=True):
        own = words.get(each, "")
        regions.append(PaintedRegion(number, "" if own == vocabulary.classes[number] else own))
    return PaintedMap(renumbered, tuple(regions))


# Pictures in the colours of classes


def painting_in_picture(picture: Image.Image, colors: Sequence[RGB], vocabulary: LayoutVocabulary) -> PaintedMap:
    """Returns the map in a picture that is painted in the `colors` of the classes, by number; grey is no region.

    The picture is resized to cover the model's size and cropped at its centre. Connected pixels of a thing are an
    instance, all of a class of stuff a region. See `nearest_classes` for other colours. ValueError for a picture
    without any of the colours, and for more instances than there are numbers.
    """
    from scipy import ndimage

    numbers = nearest_classes(np.asarray(picture.convert("RGB")), colors)
    fitted = fit_fields({"panoptic": make_map(numbers, torch.int32)}, vocabulary.size)
    numbers = fitted["panoptic"].as_subclass(Tensor).numpy()
    ids, regions = np.zeros(vocabulary.size, np.int32), []
    for number in np.unique(numbers[numbers >= 0]).tolist():
        parts, count = (numbers == number).astype(np.int32), 1
        if vocabulary.categories.things[number]:
            parts, count = ndimage.label(parts)
        ids = np.where(parts > 0, parts + len(regions), ids)
        regions += [PaintedRegion(number)] * count
    if len(regions) > MOST_REGIONS:
        raise ValueError(f"got a picture with {len(regions)} instances, wanted a painted one, up to {MOST_REGIONS}")
    return PaintedMap(ids.astype(np.int32), tuple(regions))


def nearest_classes(rgb: np.ndarray, colors: Sequence[RGB]) -> np.ndarray:
    """Returns the class (H, W) int32 of each pixel of a picture (H, W, 3) uint8, -1 for UNPAINTED.

    Another colour, such as those of soft edges between two classes, may be near that of a third: such a pixel has the
    class of the nearest one of an exact colour. ValueError if there is none.
    """
    from scipy import ndimage

    numbers = np.full(rgb.shape[:2], -2, np.int32)
    for number, color in enumerate((UNPAINTED, *colors), -1):
        numbers[(rgb == np.array(color, np.uint8)).all(-1)] = number
    exact = numbers > -2
    if not (numbers >= 0).any():
        raise ValueError("got a picture without the colours of classes: save one here, and paint in its colours")
    rows, columns = ndimage.distance_transform_edt(~exact, return_distances=False, return_indices=True)
    return numbers[rows, columns]
