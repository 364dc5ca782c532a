"""Contact sheets: items of a data set with their boxes, class names, maps and captions, and pairs of images with their
differences, each as one picture to look at."""

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from experiments.metrics.annotation_counts import UNLABELLED, image_size, numbers
from train.data.hints import class_color
from train.data.transforms import ValueRange, as_uint8, grey_to_rgb, to_item
from train.datasets._channels import PICTURES
from train.files import atomic_write

GAP, TEXT, LINE = 12, 13, 17  # pixels between tiles; of letters; of a line of text
STRENGTH = 0.55  # of the colours of a map over its image
MOST_LINES = 6  # of text below an item
MOST_LABELS = 20  # in one panel, the largest first; the legend has all classes
WIDEST = 0.7  # of a panel: longer names are cut
LEAST_SHARE = 0.004  # of a panel: smaller segments get no label
GAIN = 2  # of the differences between two images, which would be too dark to see

Color = tuple[int, int, int]
Pixels = np.ndarray  # (H, W, 3) uint8


class Label(NamedTuple):
    """The name of a class at a place of a panel."""

    text: str
    color: Color  # behind the text
    left: float
    top: float
    area: float  # larger ones are drawn first; others where there is room


def save_contact_sheet(
    path: Path,
    items: Sequence[dict[str, Any]],
    names: Sequence[str],
    *,
    size: int,
    n_channels: int,
    data_range: ValueRange | None = None,
) -> None:
    """Saves a PNG of items, as a data set gives them, two to a row: each as an image with its boxes and, beside it,
    with its map or masks. `names` are those of the classes by number; the longer side of an image is `size` pixels."""
    tiles = [draw_tile(fit_item(item, size, n_channels, data_range), names) for item in items]
    rows = [tiles[i : i + 2] for i in range(0, len(tiles), 2)]
    across = max(tile.width for tile in tiles) + GAP
    heights = [max(tile.height for tile in row) + GAP for row in rows]
    sheet, top = Image.new("RGB", (GAP + across * min(2, len(tiles)), GAP + sum(heights)), "white"), GAP
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (GAP + column * across, top))
        top += height
    with atomic_write(path) as scratch:
        sheet.save(scratch, format="PNG")


class PairOfImages(NamedTuple):
    """Two images of the same size, uint8 (3, H, W), and the text above them."""

    text: str
    image: Tensor
    other: Tensor


def save_pair_sheet(path: Path, pairs: Sequence[PairOfImages], names: tuple[str, str], *, size: int) -> None:
    """Saves a PNG of pairs of images, one to a row: both images, whose `names` stand above all rows, and GAIN times
    their absolute difference. The longer side of an image is `size` pixels."""
    rows = [draw_pair(pair, size) for pair in pairs]
    width = max(row.width for row in rows)
    heading = Image.new("RGB", (width, LINE), "white")
    for i, name in enumerate((*names, f"{GAIN} x difference")):
        heading.paste(draw_lines([name], size), (i * (size + GAP), 0))
    sheet = Image.new("RGB", (width + 2 * GAP, 2 * GAP + LINE + sum(row.height + GAP for row in rows)), "white")
    top = GAP
    for row in (heading, *rows):
        sheet.paste(row, (GAP, top))
        top += row.height + GAP
    with atomic_write(path) as scratch:
        sheet.save(scratch, format="PNG")


def draw_pair(pair: PairOfImages, size: int) -> Image.Image:
    """Draws a pair and its difference side by side, with its text above; small images are enlarged as they are."""
    difference = (GAIN * (pair.image.int() - pair.other.int()).abs()).clamp(max=255).byte()
    panels = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in (pair.image, pair.other, difference)]
    height, width = (max(1, round(side * size / max(pair.image.shape[1:]))) for side in pair.image.shape[1:])
    smooth = Image.Resampling.NEAREST if width >= pair.image.shape[2] else Image.Resampling.BOX
    row = Image.new("RGB", (3 * size + 2 * GAP, LINE + height), "white")
    ImageDraw.Draw(row).text((0, 0), cut_text(pair.text, row.width), "black", ImageFont.load_default(size=TEXT))
    for i, panel in enumerate(panels):
        row.paste(panel.resize((width, height), smooth), (i * (size + GAP), LINE))
    return row


def fit_item(item: dict[str, Any], size: int, n_channels: int, data_range: ValueRange | None) -> dict[str, Any]:
    """Resizes an item, with its boxes and masks as in training, so that the longer side of its image is `size`."""
    sides = image_size(item["image"])
    height, width = (max(1, round(side * size / max(sides))) for side in sides)
    return to_item(item, (height, width), n_channels, data_range)


def draw_tile(item: dict[str, Any], names: Sequence[str]) -> Image.Image:
    """Draws a resized item: its name, its source image, the image with boxes, that with its map, a legend, and lines of
    text."""
    pixels = draw_picture(item["image"])
    sources = [draw_picture(item["source_image"])] if "source_image" in item else []
    boxes, regions = draw_boxes(pixels, item, names), draw_map(pixels, item, names)
    panels = [*map(Image.fromarray, sources), boxes, *([] if regions is None else [regions])]
    width = max(2 * max(pixels.shape[:2]) + GAP, sum(panel.width + GAP for panel in panels))
    below = [draw_legend(class_counts(item), names, width), draw_lines(describe_item(item), width)]
    height = LINE + pixels.shape[0] + sum(each.height for each in below) + 4
    tile = Image.new("RGB", (width, height), "white")
    tile.paste(draw_lines([item.get("file_name", "")], width), (0, 0))
    for i, panel in enumerate(panels):
        tile.paste(panel, (i * (pixels.shape[1] + GAP), LINE))
    top = LINE + pixels.shape[0] + 4
    for each in below:
        tile.paste(each, (0, top))
        top += each.height
    return tile


def draw_picture(image: Tensor) -> Pixels:
    """Returns an image (C, H, W) in colours; of other images than grey and RGB the mean of the channels is shown."""
    image = as_uint8(image.as_subclass(Tensor))
    if len(image) not in PICTURES:
        image = image.float().mean(0, keepdim=True).to(image.dtype)
    return grey_to_rgb(image).permute(1, 2, 0).contiguous().numpy()


def draw_boxes(pixels: Pixels, item: dict[str, Any], names: Sequence[str]) -> Image.Image:
    """Draws the boxes of an item, if it has any, over its image, crowds with thin lines."""
    panel = Image.fromarray(pixels.copy())
    if "boxes" not in item:
        return panel
    ink = ImageDraw.Draw(panel)
    boxes = item["boxes"].as_subclass(Tensor).nan_to_num().tolist()
    classes = numbers(item["box_class"]) if "box_class" in item else [0] * len(boxes)
    crowd = numbers(item["box_crowd"]) if "box_crowd" in item else [0] * len(boxes)
    labels = []
    for (left, top, right, bottom), number, is_crowd in zip(boxes, classes, crowd, strict=True):
        corners = sorted((left, right - 1)), sorted((top, bottom - 1))
        (x1, x2), (y1, y2) = corners
        text, color = class_name(number, names), class_color(number)
        ink.rectangle((x1, y1, x2, y2), outline=color, width=1 if is_crowd else 2)
        labels.append(Label(text, color, max(x1, 0), max(y1, 0), (x2 - x1) * (y2 - y1)))
    write_labels(panel, labels)
    return panel


def draw_map(pixels: Pixels, item: dict[str, Any], names: Sequence[str]) -> Image.Image | None:
    """Draws the panoptic or semantic map of an item, or else its masks, over its image; None without any.

    Colours are those of the classes, and black lines part the segments; what is unlabelled is as the image is.
    Instances of a panoptic map have their words, if there are any, others the names of their classes.
    """
    segments, class_of = read_segments(item)
    if segments is None:
        return None
    canvas, labels, words = pixels.astype(np.float64), [], read_words(item)
    for each, number in class_of.items():
        inside, color = segments == each, class_color(number)
        canvas[inside] += STRENGTH * (np.array(color) - canvas[inside])
        if inside.mean() >= LEAST_SHARE:
            text = words.get(each) or class_name(number, names)
            labels.append(Label(text, color, *central_pixel(inside), float(inside.sum())))
    edges = np.zeros(segments.shape, bool)
    edges[1:] |= segments[1:] != segments[:-1]
    edges[:, 1:] |= segments[:, 1:] != segments[:, :-1]
    canvas[edges] = 0
    panel = Image.fromarray(canvas.round().astype(np.uint8))
    write_labels(panel, labels)
    return panel


def read_segments(item: dict[str, Any]) -> tuple[np.ndarray | None, dict[int, int]]:
    """Returns a map of segments (H, W) of an item, and the class of each; None and {} for an item without regions.

    Of masks, later ones are in front, and their segments are -1, -2, ...
    """
    if "panoptic" in item:
        classes = dict(zip(numbers(item["segment_id"]), numbers(item["segment_class"]), strict=True))
        return item["panoptic"].numpy(), classes
    if "semantic" in item:
        semantic = item["semantic"].numpy().astype(np.int64)
        return semantic, {number: number for number in np.unique(semantic).tolist() if number != UNLABELLED}
    if "masks" not in item:
        return None, {}
    segments, classes = np.zeros(item["masks"].shape[-2:], np.int64), {}
    of_boxes = numbers(item["box_class"]) if "box_class" in item else [0] * len(item["masks"])
    for i, (mask, number) in enumerate(zip(item["masks"].numpy(), of_boxes, strict=True), 1):
        segments[mask > 0], classes[-i] = -i, number
    return segments, classes


def read_words(item: dict[str, Any]) -> dict[int, str]:
    """Returns the words of the instances of a panoptic map, by their ids; {} without any."""
    if not {"panoptic", "box_id", "box_words"} <= item.keys():
        return {}
    return dict(zip(numbers(item["box_id"]), item["box_words"], strict=True))


def central_pixel(inside: np.ndarray) -> tuple[float, float]:
    """Returns x and y of a pixel in the middle of a segment (H, W): of its middle row, the middle."""
    rows = np.flatnonzero(inside.any(1))
    row = rows[len(rows) // 2]
    columns = np.flatnonzero(inside[row])
    return float(columns[len(columns) // 2]), float(row)


def write_labels(panel: Image.Image, labels: Sequence[Label]) -> None:
    """Writes names on a panel where they do not cover each other, those of larger regions first, each at its place or
    else just below or above; long ones are cut."""
    ink, font, taken = ImageDraw.Draw(panel), ImageFont.load_default(size=TEXT), []
    for label in sorted(labels, key=lambda each: -each.area)[:MOST_LABELS]:
        text = cut_text(label.text, WIDEST * panel.width)
        width, height = font.getlength(text) + 4, TEXT + 3
        left = max(0, min(label.left, panel.width - width))
        for shift in (0, height + 1, -height - 1):
            top = max(0, min(label.top + shift, panel.height - height))
            if not any(left < x2 and x1 < left + width and top < y2 and y1 < top + height for x1, y1, x2, y2 in taken):
                taken.append((left, top, left + width, top + height))
                ink.rectangle(taken[-1], fill=label.color)
                ink.text((left + 2, top), text, text_color(label.color), font)
                break


def cut_text(text: str, width: float) -> str:
    """Returns a text that is not wider than `width` pixels, with an ellipsis where it is cut."""
    font = ImageFont.load_default(size=TEXT)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def draw_legend(counts: Counter[int], names: Sequence[str], width: int) -> Image.Image:
    """Draws a square in the colour of each class with its name and number, the most frequent first."""
    font, places, left, top = ImageFont.load_default(size=TEXT), [], 0.0, 0
    for number, count in counts.most_common():
        text = f"{class_name(number, names)} {count}" if count > 1 else class_name(number, names)
        across = LINE + font.getlength(text) + 10
        if left and left + across > width:
            left, top = 0.0, top + LINE
        places.append((left, top, number, text))
        left += across
    legend = Image.new("RGB", (width, top + LINE if places else 0), "white")
    ink = ImageDraw.Draw(legend)
    for left, top, number, text in places:
        ink.rectangle((left, top + 2, left + TEXT - 1, top + TEXT + 1), fill=class_color(number), outline="black")
        ink.text((left + LINE, top), text, "black", font)
    return legend


def draw_lines(lines: Sequence[str], width: int) -> Image.Image:
    """Draws lines of text, wrapped to a width in pixels; no more than MOST_LINES."""
    font = ImageFont.load_default(size=TEXT)
    wrapped = [part for line in lines for part in textwrap.wrap(line, max(20, int(width / (0.52 * TEXT))))][:MOST_LINES]
    picture = Image.new("RGB", (width, LINE * len(wrapped)), "white")
    for i, line in enumerate(wrapped):
        ImageDraw.Draw(picture).text((0, i * LINE), line, "black", font)
    return picture


def describe_item(item: dict[str, Any]) -> list[str]:
    """Returns lines on an item: its captions, words such as camera and weather, and numbers such as the year."""
    captions = item.get("captions", [item["caption"]] if "caption" in item else [])
    words = {name: value for name, value in item.items() if isinstance(value, str) and name != "file_name"}
    floats = {name: value for name, value in item.items() if isinstance(value, float)}
    words |= {name: "missing" if math.isnan(value) else f"{value:.5g}" for name, value in floats.items()}
    fields = [f"{name}: {value}" for name, value in words.items()]
    return [*captions[:2], *([", ".join(fields)] if fields and "caption" not in item else [])]


def class_counts(item: dict[str, Any]) -> Counter[int]:
    """Returns how many boxes each class of an item has, and of the classes of its map without boxes, 1 each."""
    counts = Counter(numbers(item["box_class"])) if "box_class" in item else Counter[int]()
    segments, class_of = read_segments(item)
    present = set() if segments is None else set(np.unique(segments).tolist())
    return counts | Counter({number for each, number in class_of.items() if each in present})


def class_name(number: int, names: Sequence[str]) -> str:
    return names[number] if 0 <= number < len(names) else str(number)


def text_color(background: Color) -> str:
    """Returns black or white, which can be read on a colour (ITU-R BT.601 luma)."""
    return "black" if np.dot(background, (0.299, 0.587, 0.114)) > 140 else "white"
