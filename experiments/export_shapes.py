"""Writes the scenes of `shapes` in the file formats of other data sets, each in a folder that its reader takes.

With them readers can be tried, and other programs can be trained on scenes whose every annotation is known.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _root
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from models.ranges import COUNT, check_ranges
from train.cli.parse import run_script
from train.data.formats import coco, layout_lines, panoptic, prompts, yolo
from train.data.formats.panoptic import Encoding
from train.datasets._shapes_render import draw_image, draw_masks, draw_segments, draw_semantic, segment_classes
from train.datasets._shapes_scene import GROUNDS, PLUS_ARM, RING_HOLE, THINGS, Scene, Thing
from train.datasets.shapes import ScenesConfig, Shapes, captions_of, describe
from train.progress import Progress

Format = Literal["coco", "two_channel", "mamoe", "yolo", "semantic", "layout_lines", "captions"]
Split = Literal["train", "val", "judge"]
FOLDERS = {"train": "train", "val": "val", "judge": "test"}  # of splits
CLASSES = THINGS + GROUNDS
CIRCLE = 128  # points of a disc
DECIMALS = 4  # of coordinates in JSON, in pixels


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to write."""

    out: str | None = None
    """Folder in which each format gets a folder of its own, named after it; one that exists is refused."""
    format: tuple[Format, ...] = ("coco", "two_channel", "mamoe", "yolo", "semantic", "layout_lines", "captions")
    """coco: instances, captions and panoptic maps; two_channel, mamoe: panoptic maps in other encodings; yolo: boxes
    and polygons; semantic: maps of classes; layout_lines: x,y,w,h,class; captions: CSV, and JSON of things."""
    splits: tuple[Split, ...] = ("train", "val")
    """train, val, and judge, which is written as test."""
    limit: int | None = None
    """At most so many scenes of each split."""

    EVERYDAY = ("out", "format", "splits", "limit")
    RANGES = {"limit": COUNT}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class ShapesConfig(ScenesConfig):
    """Which scenes there are."""

    EVERYDAY = ("shapes_size", "shapes_seed")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes the scenes of `shapes` as COCO, panoptic maps, YOLO, semantic maps, layouts and captions."""

    EXAMPLES = (
        "python experiments/export_shapes.py --out shapes_files --limit 100",
        "python experiments/export_shapes.py --out shapes_coco --format coco --shapes_size 128",
    )

    export: ExportConfig
    scenes: ShapesConfig


class Drawing(NamedTuple):
    """A scene in pixels, with its annotations."""

    scene: Scene
    number: int  # of the image, from 1
    name: str  # of the file, whose parts say what it shows
    image: NDArray[np.uint8]  # (H, W, 3)
    masks: NDArray[np.uint8]  # (n, H, W), the whole things
    segments: NDArray[np.int32]  # (H, W), 0 = unlabelled
    classes: NDArray[np.int64]  # (k,) class of segment 1, 2, ...: things first

    @property
    def size(self) -> int:
        return len(self.image)

    @property
    def boxes(self) -> NDArray[np.float64]:
        """The whole things' left, top, right, bottom in pixels, (n, 4)."""
        return self.size * np.array([thing.box for thing in self.scene.things])


def draw(scene: Scene, size: int) -> Drawing:
    """Draws a scene of size x size pixels."""
    masks = draw_masks(scene, size)
    classes = np.array(segment_classes(scene), np.int64)
    name = os.path.basename(scene.file_name)
    image, segments = draw_image(scene, size), draw_segments(scene, masks)
    return Drawing(scene, scene.index + 1, name, image, masks, segments, classes)


def main(config: Config) -> None:
    """Writes each format; ValueError, before anything is written, for a folder that exists."""
    export, scenes = config.export, config.scenes
    if export.out is None:
        raise ValueError("got no folder to write to: pass --out FOLDER")
    if not export.format or not export.splits:
        raise ValueError("got nothing to write: pass --format coco ... and --splits train ...")
    out = Path(os.path.expanduser(export.out))
    for name in export.format:
        if (out / name).exists():
            raise ValueError(f"{out / name} exists already: delete it, or pass another --out")
    sets = {FOLDERS[split]: Shapes(scenes, split) for split in export.splits}
    counts = {word: min(len(each), export.limit or len(each)) for word, each in sets.items()}
    for name in dict.fromkeys(export.format):
        with Progress(name, sum(counts.values()), "scene") as bar, complete_or_absent(out / name) as folder:
            for word, images in sets.items():
                drawings = (draw(images.scene(index), scenes.shapes_size) for index in range(counts[word]))
                WRITERS[name](folder, word, count_drawings(drawings, bar))
        listed = ", ".join(f"{count:,} {word}" for word, count in counts.items())
        print(f"{out / name}: {listed}", flush=True)


def count_drawings(drawings: Iterable[Drawing], bar: Progress) -> Iterator[Drawing]:
    for drawing in drawings:
        yield drawing
        bar.update()


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `folder`, which gets its name if the block succeeds and is deleted otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes folders for their owner alone
        os.sync()  # the files are on disk before their folder has its name
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def save_categories(folder: Path, first: int) -> None:
    """Writes categories.json; the ids of classes start at `first`."""
    save_text(folder / "categories.json", json.dumps(list_categories(first), indent=1))


def list_categories(first: int, n: int = len(CLASSES)) -> list[dict[str, Any]]:
    """Returns the first n classes as COCO's JSON lists them."""
    return [
        {
            "id": first + number,
            "name": name,
            "supercategory": "thing" if number < len(THINGS) else "ground",
            "isthing": int(number < len(THINGS)),
        }
        for number, name in enumerate(CLASSES[:n])
    ]


# COCO


def write_coco(folder: Path, word: str, drawings: Iterable[Drawing]) -> None:
    """Writes files under COCO's names: train2017/, and in annotations/ {instances,captions,panoptic}_train2017.json and
    the maps of panoptic_train2017/.

    The things of the first scene with several of one class get one annotation more, a crowd.
    """
    word, crowd = f"{word}2017", None
    images, instances, captions, segments = [], [], [], []
    for drawing in drawings:
        save_picture(folder / word / drawing.name, drawing.image)
        colors = panoptic.encode(drawing.segments, "coco")
        save_picture(folder / "annotations" / f"panoptic_{word}" / drawing.name, colors)
        images.append({"id": drawing.number, "file_name": drawing.name, "height": drawing.size, "width": drawing.size})
        instances += [describe_instance(drawing, row) for row in range(len(drawing.masks))]
        if crowd is None and (crowd := find_crowd(drawing)) is not None:
            instances.append(crowd)
        captions += [{"image_id": drawing.number, "caption": caption} for caption in captions_of(drawing.scene)]
        segments.append(
            {"image_id": drawing.number, "file_name": drawing.name, "segments_info": describe_segments(drawing)}
        )
    for rows in (instances, captions):
        for number, row in enumerate(rows, 1):
            row["id"] = number
    things, all_classes = {"categories": list_categories(1, len(THINGS))}, {"categories": list_categories(1)}
    for kind, rows, more in (
        ("instances", instances, things),
        ("captions", captions, {}),
        ("panoptic", segments, all_classes),
    ):
        content = {"info": {"description": "shapes"}, "licenses": [], "images": images, "annotations": rows} | more
        save_text(folder / "annotations" / f"{kind}_{word}.json", json.dumps(content, separators=(",", ":")))


def describe_instance(drawing: Drawing, row: int) -> dict[str, Any]:
    """Returns COCO's annotation of a thing: a polygon, or run lengths for a ring, which has a hole."""
    thing, mask = drawing.scene.things[row], drawing.masks[row]
    if THINGS[thing.kind] == "ring":
        segmentation: Any = coco.encode_rle(mask)
    else:
        segmentation = [round_list(drawing.size * outline(thing))]
    return {
        "image_id": drawing.number,
        "category_id": thing.kind + 1,
        "bbox": round_list(coco.to_xywh(drawing.boxes[row])),
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def find_crowd(drawing: Drawing) -> dict[str, Any] | None:
    """Returns an annotation of all things of one class as a crowd, with run lengths as a list; None if none has
    several."""
    kinds = np.array([thing.kind for thing in drawing.scene.things])
    several = np.flatnonzero(np.bincount(kinds) > 1)
    if not len(several):
        return None
    mask = drawing.masks[kinds == several[0]].max(0)
    return {
        "image_id": drawing.number,
        "category_id": int(several[0]) + 1,
        "bbox": round_list(coco.to_xywh(coco.box_of_mask(mask))),
        "area": int(mask.sum()),
        "iscrowd": 1,
        "segmentation": coco.encode_rle(mask, compressed=False),
    }


def describe_segments(drawing: Drawing) -> list[dict[str, Any]]:
    """Returns what COCO's panoptic JSON says of the segments that are in the map."""
    rows = []
    for number in panoptic.segments_of(drawing.segments).tolist():
        mask = drawing.segments == number
        category = int(drawing.classes[number - 1]) + 1
        box = round_list(coco.to_xywh(coco.box_of_mask(mask)))
        rows.append({"id": number, "category_id": category, "area": int(mask.sum()), "bbox": box, "iscrowd": 0})
    return rows


def round_list(numbers: Any) -> list[float]:
    """Returns an array as a flat list with few decimals."""
    return np.round(np.asarray(numbers, np.float64), DECIMALS).ravel().tolist()


def outline(thing: Thing) -> NDArray[np.float64]:
    """Returns the outline of a thing in the unit square, (n, 2), x and y; it contains what it goes round an odd number
    of times. A ring is its outer circle, and from there its inner circle."""
    angles = np.linspace(0, 2 * np.pi, CIRCLE + 1)
    circle, arm = np.stack([np.cos(angles), np.sin(angles)], 1), PLUS_ARM
    corners = {
        "disc": circle[:-1],
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
        "plus": [
            *((-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)),
            *((arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)),
        ],
        "ring": np.concatenate([circle, RING_HOLE * circle[::-1]]),
        "bow": [(-1, -1), (0, 0), (1, -1), (1, 1), (0, 0), (-1, 1)],
    }[THINGS[thing.kind]]
    x1, y1, x2, y2 = thing.box
    return np.array([x1, y1]) + (np.array(corners) + 1) / 2 * np.array([x2 - x1, y2 - y1])


# Panoptic maps in other encodings


def write_encoded(encoding: Encoding, first: int, folder: Path, word: str, drawings: Iterable[Drawing]) -> None:
    """Writes <word>/, panoptic/<word>/ with maps of the same names, categories.json, and prompts as `write_prompts`."""
    save_categories(folder, first)
    kept = []
    for drawing in drawings:
        save_picture(folder / word / drawing.name, drawing.image)
        ids, classes = np.arange(1, len(drawing.classes) + 1), drawing.classes + first
        colors = panoptic.encode(drawing.segments, encoding, ids, classes)
        save_picture(folder / "panoptic" / word / drawing.name, colors)
        if encoding == "two_channel":  # which are read as these
            ids = 256 * classes + panoptic.number_segments(classes)
        kept.append((drawing.name, drawing.scene, ids.tolist()))
    write_prompts(folder, word, kept)


def write_prompts(folder: Path, word: str, scenes: Sequence[tuple[str, Scene, list[int]]]) -> None:
    """Writes prompts_<word>.csv, the first caption of each image, and instance_prompts_<word>.json, words for each
    thing by the id of its segment; ids are those of the things, and of grounds after them."""
    captions = {name: captions_of(scene)[0] for name, scene, _ in scenes}
    words = {
        name: dict(zip(ids[: len(scene.things)], map(describe, scene.things), strict=True))
        for name, scene, ids in scenes
    }
    save_text(folder / f"prompts_{word}.csv", prompts.encode_prompts(captions))
    save_text(folder / f"instance_prompts_{word}.json", prompts.encode_instance_prompts(words))


# Others


def write_yolo(folder: Path, word: str, drawings: Iterable[Drawing]) -> None:
    """Writes images/, labels/ with boxes, polygons/ with outlines, and data.yaml."""
    names = dict(enumerate(THINGS))
    data = {"path": ".", "train": "images/train", "val": "images/val", "names": names}
    save_text(folder / "data.yaml", yaml.safe_dump(data, sort_keys=False))
    for drawing in drawings:
        save_picture(folder / "images" / word / drawing.name, drawing.image)
        things, label = drawing.scene.things, f"{Path(drawing.name).stem}.txt"
        kinds, boxes = np.array([thing.kind for thing in things]), np.array([thing.box for thing in things])
        for kind, outlines in (("labels", [None] * len(things)), ("polygons", [outline(thing) for thing in things])):
            text = yolo.encode_lines(yolo.YoloObjects(kinds, boxes, outlines))
            save_text(folder / kind / word / label, text)


def write_semantic(folder: Path, word: str, drawings: Iterable[Drawing]) -> None:
    """Writes images/, masks/ whose levels are the numbers of classes, 255 where there is none, and categories.json."""
    save_categories(folder, 0)
    for drawing in drawings:
        save_picture(folder / "images" / word / drawing.name, drawing.image)
        save_picture(folder / "masks" / word / drawing.name, draw_semantic(drawing.scene, drawing.segments))


def write_layout_lines(folder: Path, word: str, drawings: Iterable[Drawing]) -> None:
    """Writes images/, and layouts/ with a line x,y,w,h,class for each thing, later ones in front."""
    for drawing in drawings:
        save_picture(folder / "images" / word / drawing.name, drawing.image)
        things = drawing.scene.things
        layout = layout_lines.Layout([THINGS[t.kind] for t in things], np.array([t.box for t in things]))
        save_text(folder / "layouts" / word / f"{Path(drawing.name).stem}.txt", layout_lines.encode_lines(layout))


def write_captions(folder: Path, word: str, drawings: Iterable[Drawing]) -> None:
    """Writes images/ and prompts as `write_prompts`."""
    kept = []
    for drawing in drawings:
        save_picture(folder / "images" / word / drawing.name, drawing.image)
        kept.append((drawing.name, drawing.scene, list(range(1, len(drawing.classes) + 1))))
    write_prompts(folder, word, kept)


WRITERS: dict[Format, Callable[[Path, str, Iterable[Drawing]], None]] = {
    "coco": write_coco,
    "two_channel": partial(write_encoded, "two_channel", 1),  # a category of 0 is unlabelled
    "mamoe": partial(write_encoded, "mamoe", 0),
    "yolo": write_yolo,
    "semantic": write_semantic,
    "layout_lines": write_layout_lines,
    "captions": write_captions,
}


if __name__ == "__main__":
    run_script(main, Config, "export_shapes")
