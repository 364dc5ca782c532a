"""What the data sets of boxes, masks and maps share: their options, their items, and how annotation files are read."""

import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.data.formats.categories import Categories, decode_categories
from train.data.formats.coco import box_of_mask
from train.data.formats.panoptic import Encoding, PanopticMap, check_encoding
from train.data.sides import Sides
from train.data.transforms import to_pixels
from train.datasets import (
    MAX_PIXELS,
    Ragged,
    UnreadableImage,
    files_fingerprint,
    limit_context,
)
from train.datasets._channels import decode_channels, image_size
from train.datasets._decode import decode
from train.datasets._pairs import Pairs, RegionConfig

MAPS_CHECKED = 8  # of a data set, for the plausibility of their encoding
UNLABELLED = 255  # of semantic maps
CLASS_FILES = ("categories.json", "data.yaml", "config.yaml", "classes.txt")
LISTED = "it was there when the data were listed"
MAP_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # without loss: a JPEG mixes the numbers of classes


@dataclass(frozen=True, kw_only=True)
class ClassListConfig(RegionConfig):
    """Options of data sets whose classes are in a list of their own."""

    categories: str | None = None
    """File with the classes of regions, relative to data_dir: JSON or YAML with ids and names, or a name a line. None:
    the one that comes with the data."""


class RegionDataset:
    """A `Dataset` of image files with annotations: a subclass defines `annotations`.

    Its classes are those of the regions: `region_classes` by number, and which of them are things. Images have none.
    """

    n_classes, labels, class_names = 0, None, ()
    sides: Sides | None = None  # class numbers and words that swap when an image is mirrored

    def __init__(
        self,
        root: Path,
        pairs: Pairs,
        categories: Categories,
        split: str,
        *,
        sources: Sequence[str] = (),
        context: Sequence[Any] = (),
        max_pixels: int = MAX_PIXELS,
        n_channels: int = 3,
    ):
        """`pairs` are images and the files that annotate them, and `sources` files that annotate many, relative to
        `root`; `context` is what else changes an item."""
        self.root, self.names, self.files, self.categories = root, pairs.images, pairs.annotations, categories
        self.split, self.notes, self.unpaired = split, pairs.notes, pairs.unpaired
        self.sources, self.context = tuple(sources), tuple(context)
        self.max_pixels, self.n_channels = max_pixels, n_channels
        self.region_classes, self.region_things = categories.names, categories.things

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        image = decode_channels(self.root / name, self.n_channels, max_pixels=self.max_pixels)
        return {"image": image, **self.annotations(index, image_size(image)), "file_name": name}

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """Returns the fields of an item but its image, which has `size` (height, width), and its file name."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        return self._fingerprint(limit_context(self.max_pixels))

    def content_fingerprint(self) -> str:
        return self._fingerprint((), times=False)

    def _fingerprint(self, context: Sequence[str], times: bool = True) -> str:
        files = [*self.names, *filter(None, self.files), *self.sources]
        described = [repr(each) for each in (self.categories, *self.context)]
        return files_fingerprint(self.root, files, self.split, *described, *context, times=times)


class Packed:
    """Annotations of many images in one array of bytes in memory, from which each is restored when it is asked for.

    Lists of millions of objects would be copied into every worker process.
    """

    def __init__(self, records: Iterable[Any]):
        encoded = [pickle.dumps(record) for record in records]  # much faster than JSON
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __getitem__(self, index: int) -> Any:
        return pickle.loads(self.bytes[self.ends[index] : self.ends[index + 1]].tobytes())


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """Adds the name of a file to the ValueErrors raised within."""
    try:
        yield
    except ValueError as error:  # that of UnicodeDecodeError and JSONDecodeError, too
        raise ValueError(f"{file}: {error}") from error


def read_text(path: Path, remedy: str) -> str:
    """Reads a file of UTF-8, without its byte order mark if it has one; FileNotFoundError, ending in `remedy`, if it
    does not exist."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {remedy}")
    with naming(path):
        return path.read_text(encoding="utf-8-sig")


def read_categories(root: Path, name: str | None) -> Categories:
    """Reads the list of classes `name`, or else the first of CLASS_FILES that exists in `root`.

    FileNotFoundError if there is none.
    """
    name = name or next((each for each in CLASS_FILES if (root / each).is_file()), None)
    if name is None:
        raise FileNotFoundError(
            f"{root} has none of {', '.join(CLASS_FILES)}: pass the list of classes as --categories"
        )
    text = read_text(root / name, "pass the list of classes as --categories")
    with naming(root / name):
        return decode_categories(text, Path(name).suffix.lower())


def read_map(path: Path, size: tuple[int, int] | None, max_pixels: int = MAX_PIXELS, mode: str = "") -> np.ndarray:
    """Reads a map of numbers (H, W), or of colours (H, W, 3), at the `size` (height, width) of its image, or its own.

    A map of another size is resized to the nearest pixel. `mode` converts it, else the numbers of a palette are kept.
    UnreadableImage for a broken file, and for another shape than the image's.
    """
    image = decode(path, max_pixels=max_pixels, convert=lambda image: image)
    if mode or image.mode in ("RGBA", "1", "LA"):
        image = image.convert(mode or {"RGBA": "RGB"}.get(image.mode, "L"))
    height, width = size or (image.height, image.width)
    if image.size != (width, height):
        slack = max(1, width / image.width, height / image.height)  # a pixel of the smaller of the two
        if abs(image.height * width - height * image.width) > slack * max(image.width, image.height, height, width):
            raise UnreadableImage(
                f"{path} has {image.width} x {image.height} pixels, and its image {width} x {height}: wanted one shape"
            )
        image = image.resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(image)


def read_source(target: Path, path: Path, size: tuple[int, int], n_channels: int, max_pixels: int) -> Any:
    """Reads the image that belongs to `target`, of this size (height, width): a PIL image or `tv_tensors.Image`.

    UnreadableImage for a broken file, and for one of another size.
    """
    source = decode_channels(path, n_channels, max_pixels=max_pixels)
    if image_size(source) != size:
        (height, width), (wanted_height, wanted_width) = image_size(source), size
        raise UnreadableImage(
            f"{path} has {width} x {height} pixels, and its partner {target} {wanted_width} x {wanted_height}: wanted "
            "one size: resize one of them"
        )
    return to_pixels(source, n_channels, None)


def read_colors(path: Path, size: tuple[int, int] | None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads a panoptic map (H, W, 3) uint8; see `read_map`."""
    return read_map(path, size, max_pixels, "RGB")


def make_boxes(boxes: Any, size: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) of left, top, right, bottom in pixels -> `tv_tensors.BoundingBoxes`, which keep what is outside."""
    from torchvision import tv_tensors

    values = torch.as_tensor(np.asarray(boxes, np.float32).reshape(-1, 4))
    return tv_tensors.BoundingBoxes(values, format="XYXY", canvas_size=size, clamping_mode=None)


def make_masks(masks: Sequence[np.ndarray], size: tuple[int, int]) -> Tensor:
    """Masks (H, W) of n regions -> `tv_tensors.Mask` (n, H, W) uint8."""
    from torchvision import tv_tensors

    return tv_tensors.Mask(torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *size, dtype=torch.uint8))


def make_map(numbers: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A map of numbers (H, W) -> `tv_tensors.Mask`."""
    from torchvision import tv_tensors

    return tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype))


def class_map_fields(numbers: np.ndarray, segments: bool) -> dict[str, Any]:
    """Returns the fields of a map of class numbers (H, W) uint8, 255 where there is none; with `segments` also those of
    a segment for each class, which conditions of regions read. It does not part two things of a class."""
    fields: dict[str, Any] = {"semantic": make_map(numbers, torch.uint8)}
    if segments:
        present = np.unique(numbers[numbers != UNLABELLED]).astype(np.int64)
        ids = np.where(numbers == UNLABELLED, 0, numbers.astype(np.int32) + 1)
        segment_fields = {"segment_id": Ragged(present + 1), "segment_class": Ragged(present)}
        fields |= {"panoptic": make_map(ids, torch.int32), **segment_fields}
    return fields


def box_fields(boxes: Any, classes: Any, size: tuple[int, int], ids: Any = None) -> dict[str, Any]:
    """Returns the fields of n boxes in pixels, with their classes; the ids are 1 to n unless given."""
    n = len(boxes)
    return {
        "boxes": make_boxes(boxes, size),
        "box_class": Ragged(np.asarray(classes, np.int64).reshape(n)),
        "box_id": Ragged(np.arange(1, n + 1) if ids is None else np.asarray(ids, np.int64).reshape(n)),
    }


def panoptic_fields(decoded: PanopticMap, categories: Categories, segments: Any = None) -> dict[str, Any]:
    """Returns the fields of a panoptic map: its k segments, and the boxes of its things, as far as they are visible.

    `segments` are rows of id, category and iscrowd, for an encoding that has only ids; of these, what is not in the map
    is left out. ValueError for ids and categories that are not listed.
    """
    category, crowd = decoded.segment_class, decoded.segment_crowd
    if category is None:
        row_of = {row[0]: row for row in segments or ()}
        if unknown := sorted(set(decoded.segment_id.tolist()) - row_of.keys()):
            raise ValueError(f"the map has the segment {unknown[0]}, which is not in the JSON file: check both")
        rows = np.array([row_of[each] for each in decoded.segment_id.tolist()], np.int64).reshape(-1, 3)
        category, crowd = rows[:, 1], rows[:, 2]
    numbers = categories.numbers(category)
    is_thing = np.array(categories.things, bool)[numbers]
    ids = decoded.segment_id[is_thing]
    boxes = [box_of_mask(decoded.ids == each) for each in ids]
    fields = {
        "panoptic": make_map(decoded.ids, torch.int32),
        "segment_id": Ragged(decoded.segment_id),
        "segment_class": Ragged(numbers),
        **box_fields(boxes, numbers[is_thing], decoded.ids.shape, ids),
    }
    return fields if crowd is None else {**fields, "box_crowd": Ragged(crowd[is_thing])}


def check_maps(
    root: Path,
    files: Sequence[str],
    encoding: Encoding,
    categories: Categories,
    segments: Sequence[Sequence[int]] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Raises ValueError if the first panoptic maps contradict the encoding; see `check_encoding`.

    `segments` are the ids of each map in a JSON file.
    """
    colors, listed = [], []
    for index, file in enumerate(files[:MAPS_CHECKED]):
        try:
            colors.append(read_colors(root / file, None, max_pixels))
        except UnreadableImage:
            continue  # the item is skipped and counted
        listed.append(segments[index] if segments is not None else ())
    things = dict(zip(categories.ids, categories.things, strict=True))
    with naming(root / Path(files[0]).parent):
        check_encoding(colors, encoding, things, None if segments is None else listed)
