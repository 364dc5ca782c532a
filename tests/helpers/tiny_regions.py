"""Writes tiny data sets of boxes, masks and maps in their file formats: one thing and one stuff on 6 x 8 pixels."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from train.data.formats import coco, panoptic

SIZE = 6, 8
IDS = np.zeros(SIZE, np.int32)
IDS[4:], IDS[1:5, 2:6] = 2, 1  # grass, and a car over it; the rest is unlabelled
BOX = [2, 1, 6, 5]  # of the car, left, top, right, bottom
CATEGORIES = [{"id": 90, "name": "grass", "isthing": 0}, {"id": 3, "name": "car", "isthing": 1}]
TREES = {"train": ("a", "b", "c"), "val": ("d", "e")}


def save_picture(path: Path, pixels: np.ndarray | int) -> None:
    """Saves an array as PNG; a number is an image of this red level, by which it can be recognised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, int):
        pixels = np.full((*SIZE, 3), (pixels, 7, 9), np.uint8)
    Image.fromarray(pixels).save(path)


def save_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def save_json(path: Path, content: object) -> None:
    save_text(path, json.dumps(content))


def instance(image_id: object, **changes: object) -> dict[str, object]:
    """An annotation of the car, with a polygon."""
    corners = [2, 1, 6, 1, 6, 5, 2, 5]
    row = {"image_id": image_id, "category_id": 3, "bbox": [2, 1, 4, 4], "iscrowd": 0, "segmentation": [corners]}
    return {**row, **changes}


def save_coco(root: Path, suffix: str = "2017") -> Path:
    """Writes the four kinds of JSON files; the last image of each split has no instance and no caption."""
    level = 0
    for split, names in TREES.items():
        images, files = [], {kind: [] for kind in ("instances", "stuff", "captions", "panoptic")}
        for name in names:
            level += 1
            save_picture(root / f"{split}{suffix}" / f"{name}.png", level)
            images.append({"id": level, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1]})
            if name != names[-1]:
                crowd = instance(level, segmentation=coco.encode_rle(IDS == 1, compressed=False), iscrowd=1)
                files["instances"] += [instance(level), crowd]
                files["captions"] += [{"image_id": level, "caption": text} for text in (f"left {name}", f"two {name}")]
            rle = coco.encode_rle(IDS == 2)
            files["stuff"].append(instance(level, category_id=90, bbox=[0, 4, 8, 2], segmentation=rle))
            segments = [{"id": 1, "category_id": 3, "iscrowd": 0}, {"id": 2, "category_id": 90, "iscrowd": 0}]
            files["panoptic"].append({"image_id": level, "file_name": f"{name}.png", "segments_info": segments})
            folder = root / "annotations" / f"panoptic_{split}{suffix}"
            save_picture(folder / f"{name}.png", panoptic.encode(IDS, "coco"))
        for kind, rows in files.items():
            categories = {} if kind == "captions" else {"categories": CATEGORIES}
            content = {"images": images[::-1], "annotations": rows, **categories}  # not in the order of the files
            save_json(root / "annotations" / f"{kind}_{split}{suffix}.json", content)
    return root


def save_nuimages(root: Path) -> Path:
    for split, names in TREES.items():
        images = []
        for number, name in enumerate(names):
            stem = f"samples/CAM_FRONT_LEFT/{name}__CAM_FRONT_LEFT__15{number}"
            save_picture(root / f"{stem}.png", number)
            more = "" if number else "__Rain__night__boston-seaport"
            images.append({"id": name, "file_name": f"{stem}{more}.png"})
        annotations = [instance(names[0], segmentation=[])]
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        save_json(root / "annotations" / f"nuimages_v1.0-{split}.json", content)
    return root


def save_yolo(root: Path) -> Path:
    save_text(root / "data.yaml", "names: {0: grass, 2: car}\n")
    for split, names in TREES.items():
        for number, name in enumerate(names):
            save_picture(root / "images" / split / f"{name}.png", number)
            text = "2 0.5 0.5 0.5 0.6666667\n0 0.5 0.8333333 1 0.3333333\n" if number else ""
            save_text(root / "labels" / split / f"{name}.txt", text)
    return root


def save_layout_lines(root: Path) -> Path:
    for split, names in TREES.items():
        for number, name in enumerate(names):
            save_picture(root / "images" / split / f"{name}.png", number)
            text = "0.25,0.1666667,0.5,0.6666667,car\n" if split == "train" else "0,0.5,1,0.5,bus stop\n"
            save_text(root / "layouts" / split / f"{name}.txt", text if number else "")
    return root


def save_semantic(root: Path) -> Path:
    save_json(root / "categories.json", CATEGORIES)
    for split, names in TREES.items():
        for number, name in enumerate(names):
            save_picture(root / "images" / split / f"{name}.png", number)
            save_picture(root / "masks" / split / f"{name}.png", np.array([255, 3, 90], np.uint8)[IDS])
    return root


def save_celebamask(root: Path, count: int = 4) -> Path:
    """Writes faces whose parts overlap: skin, a left eye, hair."""
    for number in range(count):
        save_picture(root / "CelebA-HQ-img" / f"{number}.png", number)
        for part, rows in (("hair", slice(0, 2)), ("l_eye", slice(1, 4)), ("skin", slice(1, 6))):
            inside = np.zeros((*SIZE, 3), np.uint8)
            inside[rows] = 255
            save_picture(root / "CelebAMask-HQ-mask-anno" / "0" / f"{number:05}_{part}.png", inside)
    return root


def save_panoptic_folder(root: Path, encoding: panoptic.Encoding = "mamoe") -> Path:
    """Writes car and grass, of classes 13 and 8; without prompts for the last image of each split."""
    classes, step = np.array([13, 8]), 5_000_000 if encoding == "coco" else 1  # small ids fit other encodings, too
    for split, names in TREES.items():
        for number, name in enumerate(names):
            save_picture(root / split / f"{name}.png", number)
            colors = panoptic.encode(IDS * step, encoding, np.array([1, 2]), classes)
            save_picture(root / "panoptic" / split / f"{name}.png", colors)
        rows = [f'{name}.png,"left, {name}"' for name in names[:-1]]
        save_text(root / f"prompts_{split}.csv", "\n".join(["img_name,prompt", *rows, ""]))
        save_json(root / f"words_{split}.json", {f"{name}.png": {"1": "a red car"} for name in names[:-1]})
        segments = [{"id": step, "category_id": 13}, {"id": 2 * step, "category_id": 8}]
        maps = [{"image_id": name, "file_name": f"{name}.png", "segments_info": segments} for name in names]
        categories = [{"id": 13, "name": "car", "isthing": 1}, {"id": 8, "name": "vegetation", "isthing": 0}]
        images = [{"id": name, "file_name": f"{name}.png"} for name in names]
        content = {"images": images, "annotations": maps, "categories": categories}
        save_json(root / "panoptic" / f"{split}.json", content)
    return root


def save_captions(root: Path) -> Path:
    """Writes two captions for each image but the last of a split."""
    for split, names in TREES.items():
        for number, name in enumerate(names):
            save_picture(root / "images" / split / f"{name}.png", number)
        rows = [f'{name}.png,"{text}, {name}"' for name in (*names[:-1], "nothing") for text in ("left", "two")]
        save_text(root / f"prompts_{split}.csv", "\n".join(["img_name,prompt", *rows, ""]))
    return root


def save_pairs(root: Path) -> Path:
    """Writes targets and, of the same names in another folder, the sources that they are made of: their negatives."""
    for name in "abcd":
        target = np.random.default_rng(ord(name)).integers(0, 256, (*SIZE, 3), np.uint8)
        save_picture(root / "target" / f"{name}.png", target)
        save_picture(root / "source" / f"{name}.png", 255 - target)
    return root


def save_xbd(root: Path, count: int = 4) -> Path:
    """Both images of some places, of half the pixels that the polygons count in: a building, and none in the last."""
    for place in range(count):
        for moment, date in (("pre", "2017-06-21T18:55:00.000Z"), ("post", "2017-10-11T19:04:21.000Z")):
            name = f"some-fire_{place:08d}_{moment}_disaster"
            save_picture(root / "images" / f"{name}.png", 2 * place + (moment == "post"))
            damage = {"subtype": "destroyed"} if moment == "post" else {}
            building = {"properties": {"feature_type": "building", "uid": "u", **damage}}
            lon, lat = -122.5 + place, 38.0
            ring = ((lon, lat), (lon + 0.2, lat), (lon + 0.2, lat + 0.4), (lon, lat + 0.4))
            rows = [] if place == count - 1 else [building]
            save_json(
                root / "labels" / f"{name}.json",
                {
                    "features": {
                        "xy": [{**each, "wkt": wkt([(4, 2), (12, 2), (12, 10), (4, 10)])} for each in rows],
                        "lng_lat": [{**each, "wkt": wkt(ring)} for each in rows],
                    },
                    "metadata": {
                        **{"gsd": 2.0, "capture_date": date, "off_nadir_angle": 21.5, "sun_azimuth": 167.0},
                        **{"sun_elevation": 43.5, "target_azimuth": 109.0, "disaster": "some-fire"},
                        **{"disaster_type": "fire", "width": 2 * SIZE[1], "height": 2 * SIZE[0]},
                    },
                },
            )
    return root


def wkt(points: Iterable[tuple[float, float]]) -> str:
    """A polygon, closed by its first point."""
    points = [*points]
    return f"POLYGON (({', '.join(f'{x} {y}' for x, y in [*points, points[0]])}))"


def save_fmow(root: Path) -> Path:
    """Images of two classes, with a JSON file beside each; the second of each class has no more than its country."""
    for split in TREES:
        for i, place in enumerate(("airport", "zoo", "zoo")):
            path = root / split / place / f"{place}_{i}" / f"{place}_{i}_0_rgb"
            save_picture(path.with_suffix(".png"), i)
            content = {
                **{"gsd": 0.5, "cloud_cover": 12, "timestamp": "2015-08-30T17:03:15Z", "country_code": "USA"},
                **{"img_filename": f"{path.name}.png", "img_width": 2 * SIZE[1], "off_nadir_angle_dbl": 12.5},
                "raw_location": wkt([(-95.4, 29.7), (-95.3, 29.7), (-95.3, 29.8), (-95.4, 29.8)]),
            }
            save_json(path.with_suffix(".json"), content if i < 2 else {"country_code": "FRA"})
    return root


WRITERS = {
    "captions": save_captions,
    "celebamask": save_celebamask,
    "coco": save_coco,
    "layout_lines": save_layout_lines,
    "nuimages": save_nuimages,
    "pairs": save_pairs,
    "panoptic_folder": save_panoptic_folder,
    "semantic": save_semantic,
    "xbd": save_xbd,
    "yolo": save_yolo,
}


class Arrays(dict):
    """Stands for an open h5py.File: arrays by name."""

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        pass


def save_visual_genome(root: Path, save) -> Path:
    """Writes Visual Genome; `save(path, arrays)` writes an .h5 file."""
    save_json(root / "vocab.json", {"object_idx_to_name": ["__image__", "grass", "car"]})
    for split, names in TREES.items():
        for number, name in enumerate(names):
            save_picture(root / "images" / "VG_100K" / f"{name}.png", number)
        counts = np.arange(len(names)) % 3
        arrays = {
            "image_paths": np.array([f"VG_100K/{name}.png".encode() for name in names[::-1]]),
            "object_names": np.where(np.arange(2) < counts[:, None], [2, 1], -1),
            "object_boxes": np.where(np.arange(2)[:, None] < counts[:, None, None], [[2, 1, 4, 4], [0, 4, 8, 2]], -1),
            "objects_per_image": counts,
        }
        save(root / f"{split}.h5", arrays)
    return root
