"""Shapes: drawn scenes of up to six coloured things on one or two grounds, with all annotations. Nothing to download.

Each scene has boxes, masks, a panoptic map, captions and metadata, and follows from (seed, split, index) and the
options alone. It is drawn at the size in which it is read, and is the same scene at every size.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from models.ranges import COUNT, SIZE, check_ranges
from train.data.nouns import count_noun, join_words
from train.data.sides import Sides
from train.datasets import SPLITS, DatasetConfig, Ragged
from train.datasets._shapes_render import draw_image, draw_masks, draw_segments, draw_semantic, segment_classes
from train.datasets._shapes_scene import (
    CAMERAS,
    COLORS,
    GROUNDS,
    KINDS,
    MORE_KINDS,
    PAIRS,
    PALETTE,
    SPLIT_NUMBERS,
    THINGS,
    Scene,
    Thing,
    draw_scene,
)
from train.registry import did_you_mean

FEATURES = "pixels"  # what `--features auto` means for this data set
JUDGE_SPLIT = "judge"  # on which networks that judge samples are trained
VERSION = 1  # of the scenes and how they are drawn: a change makes all caches anew
N_VAL = 1000  # scenes for validation
PAIRS_OF_GROUNDS = tuple(f"{upper}-{lower}" for upper in GROUNDS for lower in GROUNDS if upper != lower)
ALL_KINDS = (*KINDS, *MORE_KINDS)
CHOICES = {"shapes_kinds": ALL_KINDS, "shapes_things": THINGS, "shapes_grounds": GROUNDS}  # of what occurs


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Which scenes there are."""

    shapes_count: int = 10_000
    """Number of training scenes, and of scenes for judges; validation has 1,000."""
    shapes_size: int = 64
    """Side in pixels where no other size is asked for; a training draws at its --img_size."""
    shapes_kinds: tuple[str, ...] = tuple(KINDS)
    """Kinds of scenes that occur: free, neighbours (of one class), occlusion, small, nested, and, only if named here,
    large (up to three things apart from each other). Scenes of kinds left out are replaced; the others stay, except
    beside large."""
    shapes_things: tuple[str, ...] = THINGS
    """Classes of things that occur: disc, square, triangle, plus, ring, bow. Things of classes left out are replaced by
    others. Numbers of classes stay: a model has 10 classes of regions whatever occurs, so that files and judges fit."""
    shapes_grounds: tuple[str, ...] = GROUNDS
    """Grounds that occur: sky, grass, sand, water. Those left out are replaced by others; with one, every scene has
    just that one. Numbers of classes stay."""
    shapes_held_out: tuple[str, ...] = ()
    """Pairs of a colour and a class that no training scene has, such as red-disc blue-ring: their things have other
    colours. Validation has them, and so have the scenes for judges."""
    shapes_val_pairs: Literal["all", "held_out"] = "all"
    """Things of validation: of all pairs of a colour and a class, or only of those held out from training."""
    shapes_seed: int = 0
    """Seed of all scenes."""

    EVERYDAY = ("shapes_count", "shapes_kinds", "shapes_things", "shapes_grounds")
    RANGES = {"shapes_count": COUNT, "shapes_size": SIZE, "shapes_seed": "[0, 4294967295]"}

    def __post_init__(self):
        check_ranges(self)
        for flag, names in CHOICES.items():
            given, wanted = getattr(self, flag), f"wanted some of {', '.join(names)}"
            for name in given:
                if name not in names:
                    raise ValueError(f"got {flag} {name}, {wanted}{did_you_mean(name, names)}")
            if not given:
                raise ValueError(f"got no {flag}, {wanted}: pass --{flag} {names[0]} ...")
        self.check_pairs()

    def check_pairs(self) -> None:
        """Raises ValueError for pairs held out that do not exist, or that leave nothing to train or validate on."""
        pairs = self.shapes_held_out
        for pair in pairs:
            if pair not in PAIRS:
                wanted = "wanted a colour and a class, such as red-disc"
                raise ValueError(f"got shapes_held_out {pair}, {wanted}{did_you_mean(pair, PAIRS)}")
        for thing in self.shapes_things:
            if {f"{color}-{thing}" for color in COLORS} <= {*pairs}:
                raise ValueError(f"got shapes_held_out with all colours of {thing}: leave one of them for training")
        occurring = [pair for pair in pairs if pair.partition("-")[2] in self.shapes_things]
        if self.shapes_val_pairs == "held_out" and not occurring:
            raise ValueError("got shapes_val_pairs held_out and no pair held out: pass --shapes_held_out red-disc ...")

    def pairs_of(self, split: str) -> tuple[str, ...]:
        """Returns the pairs of a colour and a class that occur in a split, in the order of PAIRS."""
        if split == SPLITS[0]:
            return tuple(pair for pair in PAIRS if pair not in self.shapes_held_out)
        only = split == SPLITS[1] and self.shapes_val_pairs == "held_out"
        return tuple(pair for pair in PAIRS if pair in self.shapes_held_out) if only else PAIRS

    def occurring(self, flag: str) -> list[str]:
        """Returns the names given to a flag of CHOICES, in the order of the full list: theirs has no effect."""
        return [name for name in CHOICES[flag] if name in getattr(self, flag)]


@dataclass(frozen=True, kw_only=True)
class Config(ScenesConfig, DatasetConfig):
    """Options of shapes."""


def build(config: Config, split: str) -> "Shapes":
    """Returns the scenes of a split: train, val, or judge, on which networks that judge samples are trained.

    ValueError for another split or a data_dir.
    """
    if split not in SPLIT_NUMBERS:
        raise ValueError(f"there is no split {split!r}, wanted one of {', '.join(SPLIT_NUMBERS)}")
    if config.data_dir is not None:
        raise ValueError(f"shapes reads no folder, got {config.data_dir}: leave --data_dir out or use --dataset folder")
    return Shapes(config, split)


@dataclass(frozen=True, eq=False)
class Shapes:
    """A `Dataset` of scenes, drawn when they are read. The order of things is their depth: later ones are in front."""

    config: ScenesConfig
    split: str

    n_classes = 0
    labels = None
    class_names = ()
    region_classes = THINGS + GROUNDS
    region_things = (True,) * len(THINGS) + (False,) * len(GROUNDS)
    sides = Sides(words=(("CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"),))
    metadata_values = {
        **{"camera": tuple(CAMERAS), "weather": ("sunny", "rain"), "light": ("daytime", "night")},
        "location": GROUNDS + PAIRS_OF_GROUNDS,
    }
    palette = PALETTE  # by day; at night all colours are NIGHT times as bright

    def __len__(self) -> int:
        return N_VAL if self.split == SPLITS[1] else self.config.shapes_count

    def scene(self, index: int) -> Scene:
        """Returns a scene without pixels; IndexError if there is none."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no scene {index} of {len(self):,} in split {self.split}")
        config = self.config
        choices = config.shapes_kinds, config.shapes_things, config.shapes_grounds, config.pairs_of(self.split)
        return draw_scene(config.shapes_seed, self.split, int(index), *choices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return item_of(self.scene(index), self.config.shapes_size)

    def read_at_size(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """Returns an item drawn as a square that just covers `size` (height, width)."""
        return item_of(self.scene(index), max(size))

    def fingerprint(self) -> str:
        """Returns a hash of all that the scenes depend on."""
        config = self.config
        kinds, things, grounds = map(config.occurring, CHOICES)
        settings = (VERSION, config.shapes_seed, self.split, len(self), config.shapes_size, kinds)
        if len(things) < len(THINGS) or len(grounds) < len(GROUNDS):
            settings += things, grounds  # with all of them, fingerprints are those of earlier releases
        if (pairs := config.pairs_of(self.split)) != PAIRS:
            settings += ("pairs", pairs)
        return hashlib.sha256(repr(settings).encode()).hexdigest()


def item_of(scene: Scene, size: int) -> dict[str, Any]:
    """Draws a scene of size x size pixels, with all its annotations."""
    from torchvision import tv_tensors

    masks = draw_masks(scene, size)
    segments = draw_segments(scene, masks)
    classes = segment_classes(scene)
    n = len(scene.things)
    boxes = size * np.array([thing.box for thing in scene.things], np.float32).reshape(n, 4)
    return {
        "image": draw_image(scene, size),
        "boxes": tv_tensors.BoundingBoxes(
            torch.from_numpy(boxes), format="XYXY", canvas_size=(size, size), clamping_mode=None
        ),
        "box_class": ragged(classes[:n]),
        "box_id": ragged(range(1, n + 1)),
        "box_color": ragged(thing.color for thing in scene.things),
        "box_visible": Ragged(torch.from_numpy(scene.visible.astype(np.float32))),
        "box_words": [describe(thing) for thing in scene.things],
        "masks": tv_tensors.Mask(torch.from_numpy(masks)),
        "panoptic": tv_tensors.Mask(torch.from_numpy(segments)),
        "segment_id": ragged(range(1, len(classes) + 1)),
        "segment_class": ragged(classes),
        "semantic": tv_tensors.Mask(torch.from_numpy(draw_semantic(scene, segments))),
        "captions": captions_of(scene),
        "scene_kind": scene.kind,
        "camera": scene.camera,
        "time": scene.time,
        "weather": scene.weather,
        "light": scene.light,
        "location": scene.location,
        "file_name": scene.file_name,
    }


def ragged(numbers: Iterator[int] | list[int]) -> Ragged:
    return Ragged(torch.tensor(list(numbers), dtype=torch.int64))


def describe(thing: Thing) -> str:
    """Returns the words for a thing, such as "red disc"."""
    return f"{PALETTE[thing.color][0]} {THINGS[thing.kind]}"


def captions_of(scene: Scene) -> list[str]:
    """Returns two captions, such as "a red disc, two blue rings, sky over sand" and "two blue rings and a red disc in
    front of sky over sand, a rainy night"."""
    groups = Counter(describe(thing) for thing in scene.things)
    phrases = [count_noun(words, count) for words, count in groups.items()]
    grounds = " over ".join(GROUNDS[number] for number in scene.grounds)
    day = "night" if scene.light == "night" else "day"
    sky = "rainy" if scene.weather == "rain" else {"night": "clear", "day": "sunny"}[day]
    return [", ".join([*phrases, grounds]), f"{join_words(phrases[::-1])} in front of {grounds}, a {sky} {day}"]
