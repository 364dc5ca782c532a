"""Draws scenes of the data set `shapes`: colours, masks and maps of segments at any size in pixels."""

import numpy as np
from numpy.typing import NDArray

from train.datasets._shapes_scene import (
    BAR,
    CAMERAS,
    GROUNDS,
    N_GRAINS,
    NIGHT,
    THINGS,
    Array,
    Scene,
    mask_in_window,
)

SAMPLES = 4  # of a pixel, along each side
BAR_COLOR = (20, 20, 26)
RAIN_COLOR = (236, 242, 250)
RAIN_WEIGHT = 0.7  # of a streak, over what is behind it
RAIN_LENGTH, RAIN_WIDTH = 0.24, 0.024  # of a streak: its height, its width along a row
RAIN_SLOPE = -0.5  # columns per row
UNLABELLED = 255  # in maps of classes


def draw_image(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Returns a scene in colour, (size, size, 3), each pixel the mean of SAMPLES x SAMPLES points."""
    n = size * SAMPLES
    canvas = draw_grounds(scene, n)  # (3, n, n)
    for thing, color in zip(scene.things, scene.colors, strict=True):
        rows, columns, inside = mask_in_window(thing.kind, thing.box, n)
        window = canvas[:, rows, columns]
        np.copyto(window, color.astype(np.float32)[:, None, None], where=inside)
    if scene.weather == "rain":
        draw_rain(canvas, scene.streaks)
    for columns in bar_columns(scene, n):
        canvas[:, :, columns] = np.array(BAR_COLOR, np.float32)[:, None, None]
    pixels = average(average(canvas).transpose(0, 2, 1)).transpose(2, 1, 0)  # (size, size, 3)
    return np.rint(pixels * (NIGHT if scene.light == "night" else 1)).astype(np.uint8)


def average(canvas: Array) -> Array:
    """Returns the means of each SAMPLES rows of (3, n, m), always added in the same order."""
    total = canvas[:, ::SAMPLES] + canvas[:, 1::SAMPLES]
    for start in range(2, SAMPLES):
        total += canvas[:, start::SAMPLES]
    return total / SAMPLES


def draw_grounds(scene: Scene, n: int) -> Array:
    """Returns the grounds of a scene on a grid of n x n points, (3, n, n) float32."""
    canvas = np.empty((3, n, n), np.float32)
    points = ((np.arange(n) + 0.5) / n).astype(np.float32)
    split = int(np.searchsorted(points, scene.horizon)) if len(scene.grounds) == 2 else n
    for number, rows in zip(scene.grounds, (slice(0, split), slice(split, n))[: len(scene.grounds)], strict=True):
        TEXTURES[GROUNDS[number]](canvas[:, rows], points[None, :], points[rows, None], scene)
    return canvas


def draw_sky(canvas: Array, x: Array, y: Array, scene: Scene) -> None:
    """Fills (3, rows, columns) with a gradient, lighter downwards."""
    for channel, (high, low) in enumerate(((132, 214), (170, 222), (206, 228))):
        canvas[channel] = high + (low - high) * y


def draw_grass(canvas: Array, x: Array, y: Array, scene: Scene) -> None:
    """Fills (3, rows, columns) with green grains of random brightness."""
    rows, columns = ((N_GRAINS * place.ravel()).astype(int) for place in (y, x))
    grains = (44 * scene.grains.astype(np.float32) - 22)[rows[:, None], columns]
    for channel, level in enumerate((118, 134, 88)):
        canvas[channel] = level + grains


def draw_sand(canvas: Array, x: Array, y: Array, scene: Scene) -> None:
    """Fills (3, rows, columns) with checks."""
    light = ((8 * x).astype(int) + (8 * y).astype(int)) % 2 == 0
    for channel, (one, other) in enumerate(((214, 192), (196, 172), (156, 132))):
        canvas[channel] = np.where(light, np.float32(one), np.float32(other))


def draw_water(canvas: Array, x: Array, y: Array, scene: Scene) -> None:
    """Fills (3, rows, columns) with waves; parabolas, since sines differ between machines in the last bit."""
    waves = 30 * wave(7 * y + np.float32(0.3) * wave(2 * x + np.float32(scene.phase))) - 15
    for channel, level in enumerate((70, 112, 132)):
        canvas[channel] = level + waves


def wave(t: Array) -> Array:
    """Returns a smooth function of period 1 in [0, 1]."""
    t = np.abs(2 * (t - np.floor(t)) - 1)
    return t * t * (3 - 2 * t)


TEXTURES = {"sky": draw_sky, "grass": draw_grass, "sand": draw_sand, "water": draw_water}


def draw_rain(canvas: Array, streaks: Array) -> None:
    """Blends light slanting streaks into (3, n, n)."""
    n = canvas.shape[1]
    length, width = round(RAIN_LENGTH * n), RAIN_WIDTH * n
    offsets = np.arange(length)
    across = np.arange(max(round(width), 1))
    wet = np.zeros((n, n), bool)
    for x, y in streaks * n:
        rows = int(np.floor(y)) + offsets
        columns = (np.floor(x + RAIN_SLOPE * offsets).astype(int)[:, None] + across).ravel()
        rows = rows.repeat(len(across))
        inside = (rows >= 0) & (rows < n) & (columns >= 0) & (columns < n)
        wet[rows[inside], columns[inside]] = True
    for channel, level in enumerate(RAIN_COLOR):
        dry = canvas[channel, wet]
        canvas[channel, wet] = dry + np.float32(RAIN_WEIGHT) * (level - dry)


def bar_columns(scene: Scene, n: int) -> list[slice]:
    """Returns the columns, of n, whose centres are in the dark bars of the scene's camera."""
    width = int(np.ceil(BAR * n - 0.5))
    left, right = CAMERAS[scene.camera]
    return [slice(0, width)] * left + [slice(n - width, n)] * right


def draw_masks(scene: Scene, size: int) -> NDArray[np.uint8]:
    """Returns the whole extent of each thing, (n, size, size) of 0 and 1: whether it covers the centre of a pixel."""
    masks = np.zeros((len(scene.things), size, size), np.uint8)
    for mask, thing in zip(masks, scene.things, strict=True):
        rows, columns, inside = mask_in_window(thing.kind, thing.box, size)
        mask[rows, columns] = inside
    return masks


def draw_segments(scene: Scene, masks: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Returns the segment that is visible at the centre of each pixel, (size, size).

    Things are numbered 1..n from the back to the front, grounds n + 1... from top to bottom; bars are 0, unlabelled.
    """
    n, size = len(masks), masks.shape[1]
    segments = np.full((size, size), n + 1, np.int32)
    if len(scene.grounds) == 2:
        segments[int(np.ceil(scene.horizon * size - 0.5)) :] = n + 2
    for columns in bar_columns(scene, size):
        segments[:, columns] = 0
    for number, mask in enumerate(masks, 1):
        np.copyto(segments, np.int32(number), where=mask.astype(bool))
    return segments


def segment_classes(scene: Scene) -> list[int]:
    """Returns the class of each segment from 1 on: things have their own numbers, grounds follow."""
    return [thing.kind for thing in scene.things] + [len(THINGS) + number for number in scene.grounds]


def draw_semantic(scene: Scene, segments: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Returns the class of each pixel of a map of segments, UNLABELLED in bars."""
    return np.array([UNLABELLED, *segment_classes(scene)], np.uint8)[segments]
