"""What a comparison of methods of editing asks for, and whether images show it: other classes of images with classes,
and another colour, class or place of one thing of a scene of `shapes`."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.harness.edit_methods import EditingConfig, own_conditions
from experiments.harness.editing import InputImages, load_input_images
from experiments.metrics.classifier import classifier_for, predict_classes
from experiments.metrics.image_classifier import RECIPE, classify, load_labelled_images, train_image_classifier
from experiments.metrics.layout.colors import nearest_colors
from experiments.metrics.layout.crop_classifier import classify_crops
from experiments.metrics.layout.crops import NOTHING_IOU, cut_crops
from experiments.metrics.layout.judges import Judges, load_judges, load_scenes, open_scenes
from experiments.metrics.layout.layouts import Layouts
from experiments.metrics.layout.scene_network import find_contents
from train.condition_source import Row
from train.config import DataConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.data.templates import TemplateCaptions
from train.datasets import shapes
from train.datasets._shapes_render import SAMPLES, draw_masks
from train.datasets._shapes_scene import (
    BAR,
    CAMERAS,
    COLORS,
    GRID,
    LEAST_VISIBLE,
    PALETTE,
    THINGS,
    Box,
    Scene,
    Thing,
    box_iou,
    visible_shares,
)
from train.progress import Progress
from train.trained_sampler import TrainedSampler

CHANGES = COLOR, CLASS, MOVE = "color", "class", "move"  # of one thing
PLACES = {"boxes", "masks", "panoptic", "semantic"}  # fields of conditions that say where things are
APART = ("free", "large")  # kinds of scenes whose things are apart from each other
JUDGE_SEED = 0
TRIES = 200  # places for a thing that moves
ASKED, OTHERS = "asked", "others"  # what images are judged by, beside the colour and the class
Shown = dict[str, Tensor]  # (M,) each: what each of M images shows of what was asked for


class Judge(Protocol):
    """Says what images show of what was asked for."""

    hashes: dict[str, str]  # SHA-256 of networks that were trained for it, by name

    def __call__(self, images: Tensor) -> Shown:
        """Judges uint8 images (M, C, H, W), one for each edit: ASKED (M,) bool, and more."""


@dataclass(frozen=True)
class Edits:
    """R edits of each of N images, M = N R in all: those of the first image come first."""

    by: str  # "class", "caption" or "layout"
    inputs: InputImages  # N, with their own conditions
    targets: tuple[Row, ...]  # (M,) fields that differ from those of the image
    texts: tuple[str, ...]  # (M,) what is asked for
    changes: tuple[str, ...]  # (R,) kinds of edits of each image
    open_judge: Callable[[], Judge]
    regions: Tensor | None = None  # (M, H, W) bool: where the thing is that changes
    real: Tensor | None = None  # uint8 (M, C, H, W): real images that show what is asked for

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def originals(self) -> Tensor:
        """The image of each edit, uint8 (M, C, H, W)."""
        return self.inputs.image.repeat_interleave(len(self.changes), 0)

    def images_of(self, numbers: Sequence[int]) -> list[int]:
        """Returns the numbers of the images of these edits."""
        return [number // len(self.changes) for number in numbers]


def plan_edits(
    model: TrainedSampler, n_images: int, n_classes: int, changes: Sequence[str], judge_folder: Path
) -> Edits:
    """Returns the edits of held-out images that a model can be asked for: of a thing of drawn scenes, each in these
    ways (all that it reads, without any), or of the class, each to `n_classes` others. ValueError: it has neither."""
    fields = [name for name in model.sampler.conditions if name != "label"]
    if isinstance(model.reader, shapes.Config) and model.data.n_channels == 3 and fields:
        return edits_of_scenes(model, n_images, changes, judge_folder)
    if changes:
        raise ValueError(f"got changes for {model.run}, whose images are no drawn scenes: leave --changes out")
    if not model.sampler.n_classes:
        wanted = "wanted classes, or drawn scenes with captions or layouts"
        raise ValueError(f"got {model.run}, {wanted}: train with --dataset digits, or shapes with --conditions text")
    return edits_of_classes(model, n_images, n_classes)


def edits_of_classes(model: TrainedSampler, n_images: int, n_others: int) -> Edits:
    """Returns edits of held-out images, each to `n_others` other classes, so that no class is favoured.

    ValueError: there are too few classes, or the model reads more than classes.
    """
    if others := [name for name in model.sampler.conditions if name != "label"]:
        got = f"{model.run} reads {', '.join(others)} beside classes"
        raise ValueError(f"{got}, wanted classes alone: redraw images with edit.py")
    n_classes = model.sampler.n_classes
    if n_others >= n_classes:
        raise ValueError(f"got classes {n_others}, wanted at most {n_classes - 1}, the other ones")
    inputs = load_input_images((), n_images, model)
    inputs = replace(inputs, rows=own_conditions(inputs, EditingConfig(), model))
    names, labels, texts = model.captions(torch.arange(n_classes)), [], []
    for image, own in enumerate(inputs.labels):
        for k in range(n_others):
            step = 1 + (image * n_others + k) % (n_classes - 1)
            labels.append((own + step) % n_classes)
            texts.append(f"{names[own]} to {names[labels[-1]]}")
    return Edits(
        by=CLASS,
        inputs=inputs,
        targets=tuple({"label": label} for label in labels),
        texts=tuple(texts),
        changes=(CLASS,) * n_others,
        open_judge=lambda: open_class_judge(model, torch.tensor(labels)),
        real=real_images_of(labels, model),
    )


def real_images_of(labels: Sequence[int], model: TrainedSampler) -> Tensor | None:
    """Returns held-out images of these classes, in turn, uint8 (M, C, H, W); None if a class has none, or one cannot be
    read."""
    dataset = model.dataset("val")
    of_class = {label: np.flatnonzero(dataset.labels == label).tolist() for label in {*labels}}
    if not all(of_class.values()):
        return None
    items = [of_class[label][number % len(of_class[label])] for number, label in enumerate(labels)]
    batches = images_in_order(ImageSource(dataset, model.data), len(items), items)  # without those that cannot be read
    images = torch.cat([batch["image"] for batch in batches])
    return images if len(images) == len(labels) else None


def open_class_judge(model: TrainedSampler, labels: Tensor) -> "ClassJudge":
    """Returns the judge with the classifier of the data set or, without one, that of check_classes.py, which is trained
    first: minutes on a CPU."""
    classifier, data = classifier_for(model.data), model.data
    if classifier is not None:
        return ClassJudge(partial(predict_classes, classifier), labels)
    training, n_classes = load_labelled_images(model.dataset("train"), data), model.sampler.n_classes
    with Progress("classifier", RECIPE.epochs * len(training.labels), "image") as bar:
        trained = train_image_classifier(
            *training, n_classes, data.horizontal_flip, JUDGE_SEED, model.device, bar.update
        )
    return ClassJudge(partial(classify, trained), labels)


def edits_of_scenes(model: TrainedSampler, n_images: int, changes: Sequence[str], judge_folder: Path) -> Edits:
    """Returns edits of one thing of held-out scenes, to the conditions of the changed scenes. ValueError: the model
    does not read such changes."""
    data, reader = model.data, model.reader
    fields = (*model.sampler.conditions, *model.sampler.optional_conditions)
    if data.size[0] != data.size[1]:
        got = f"got images of {data.size[0]} x {data.size[1]} of drawn scenes, which are square and cropped to them"
        raise ValueError(f"{got}: compare edits of a run with --img_size alone")
    readable = readable_changes(fields)
    changes = tuple(changes) or readable
    if unread := [change for change in changes if change not in readable] or ([] if readable else [*CHANGES]):
        reads = f"{model.run} reads {', '.join(fields)}"
        raise ValueError(f"got changes {unread[0]}, which are not seen in its conditions: {reads}")
    edits, n = plan_scene_edits(reader, n_images, changes), len(changes)
    befores = [edit.before for edit in edits[::n]]
    source = open_given_scenes(befores, data, reader)
    inputs = load_scenes(source, range(len(befores)), "scenes")
    after = load_scenes(open_given_scenes([edit.after for edit in edits], data, reader), range(len(edits)), "changes")
    targets: list[Row] = [{} for _ in edits]
    for k in range(n):  # by number of the scene, as those of the source: what depends on it stays
        changed = open_given_scenes([edit.after for edit in edits[k::n]], data, reader)
        targets[k::n] = [model.conditions_of(changed[i], i) for i in range(len(befores))]
    placed = bool(PLACES & {*fields})

    def open_judge() -> Judge:
        every_scene = shapes.Config(shapes_seed=reader.shapes_seed)  # the judges of check_scenes.py
        judging = open_scenes(replace(data, captions="own"), every_scene, shapes.JUDGE_SPLIT)
        judges = load_judges(judging, judge_folder, JUDGE_SEED)
        return SceneJudge(judges, edits, after.layouts, placed, COLOR in readable)

    images = InputImages(
        image=inputs.images,
        mask=torch.zeros(len(befores), *data.size, dtype=torch.bool),
        names=tuple(f"val_{scene.index:06d}" for scene in befores),
        rows=tuple(model.conditions_of(source[i], i) for i in range(len(befores))),
    )
    return Edits(
        by="layout" if placed else "caption",
        inputs=images,
        targets=tuple(targets),
        texts=tuple(edit.text for edit in edits),
        changes=changes,
        open_judge=open_judge,
        regions=thing_regions(edits, data.size[0]),
        real=after.images,
    )


@dataclass(frozen=True)
class ClassJudge:
    """Says which images are of the class that was asked for."""

    classify: Callable[[Tensor], Tensor]  # uint8 (M, C, H, W) -> classes (M,)
    labels: Tensor  # (M,)
    hashes: dict[str, str] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> Shown:
        """Judges uint8 images (M, C, H, W)."""
        return {ASKED: self.classify(images) == self.labels}


# Scenes


class SceneEdit(NamedTuple):
    """A scene before and after a change of one of its things."""

    change: str  # of CHANGES
    number: int  # of the thing, the same before and after
    before: Scene
    after: Scene

    @property
    def things(self) -> tuple[Thing, Thing]:
        """The thing before and after."""
        return self.before.things[self.number], self.after.things[self.number]

    @property
    def text(self) -> str:
        """What is asked for: "red disc to blue disc", or "red disc to another place"."""
        old, new = map(shapes.describe, self.things)
        return f"{old} to {'another place' if self.change == MOVE else new}"


@dataclass(frozen=True, eq=False)
class GivenScenes(shapes.Shapes):
    """A `Dataset` of these scenes."""

    scenes: tuple[Scene, ...] = ()

    def __len__(self) -> int:
        return len(self.scenes)

    def scene(self, index: int) -> Scene:
        """Returns a scene without pixels."""
        return self.scenes[index]


def kinds_apart(reader: shapes.ScenesConfig) -> tuple[str, ...]:
    """Returns the kinds of scenes that occur and whose things are apart from each other, or "free" if none does."""
    return tuple(kind for kind in APART if kind in reader.shapes_kinds) or APART[:1]


def readable_changes(fields: Collection[str]) -> tuple[str, ...]:
    """Returns the changes that a model with these fields of conditions can be asked for."""
    colors = bool({"box_color", "box_words", "caption"} & {*fields})
    placed = bool(PLACES & {*fields})
    known = {COLOR: colors, CLASS: placed or "caption" in fields, MOVE: placed}
    return tuple(change for change in CHANGES if known[change])


def plan_scene_edits(reader: shapes.Config, n_scenes: int, changes: Sequence[str]) -> list[SceneEdit]:
    """Returns edits of a fixed random subset of `n_scenes` held-out scenes, all of `changes` of each, one after the
    other. Scenes that a change does not fit are left out.

    ValueError: there are not as many scenes.
    """
    dataset = shapes.Shapes(replace(reader, shapes_kinds=kinds_apart(reader)), "val")
    edits: list[SceneEdit] = []
    for index in fixed_subset(len(dataset), len(dataset)):
        scene = dataset.scene(index)
        rng = np.random.RandomState([scene.index, len(scene.things)])
        of_scene = [change_scene(scene, change, reader, rng) for change in changes]
        if None not in of_scene:
            edits += of_scene
        if len(edits) == n_scenes * len(changes):
            return edits
    got = f"got n_images {n_scenes}, but {len(edits) // len(changes)} held-out scenes can be changed"
    raise ValueError(f"{got}: pass fewer, or fewer --changes")


def change_scene(scene: Scene, change: str, reader: shapes.Config, rng: np.random.RandomState) -> SceneEdit | None:
    """Returns a random edit of a scene; None if none is possible.

    A new colour or class is one that no thing of the scene has, so that the scene does not show what is asked for; a
    moved thing leaves its place and meets no other one. All things stay visible.
    """
    for number in rng.permutation(len(scene.things)).tolist():
        thing = scene.things[number]
        if change == MOVE:
            changed = [thing._replace(box=box) for box in free_boxes(scene, number, rng)]
        else:
            changed = new_things(scene, thing, change, reader)
            changed = [changed[k] for k in rng.permutation(len(changed)).tolist()]
        for new in changed:
            after = with_thing(scene, number, new)
            if after.visible.min() >= LEAST_VISIBLE:
                return SceneEdit(change, number, scene, after)
    return None


def new_things(scene: Scene, thing: Thing, change: str, reader: shapes.Config) -> list[Thing]:
    """Returns a thing of a scene in all colours, or of all classes, that occur in validation and not in the scene."""
    colors, kinds = ({getattr(each, name) for each in scene.things} for name in ("color", "kind"))
    if change == COLOR:
        things = [thing._replace(color=color) for color in range(len(COLORS)) if color not in colors]
    else:
        occurring = [THINGS.index(name) for name in reader.occurring("shapes_things")]
        things = [thing._replace(kind=kind) for kind in occurring if kind not in kinds]
    pairs = reader.pairs_of("val")
    return [each for each in things if f"{COLORS[each.color]}-{THINGS[each.kind]}" in pairs]


def free_boxes(scene: Scene, number: int, rng: np.random.RandomState) -> list[Box]:
    """Returns random boxes between the bars, as large as that of a thing, that meet no other thing and hardly that
    one."""
    x1, y1, x2, y2 = scene.things[number].box
    width, height = x2 - x1, y2 - y1
    left, right = (BAR * bar for bar in CAMERAS[scene.camera])
    boxes = []
    for u, v in rng.random_sample((TRIES, 2)).tolist():
        x, y = left + u * (1 - left - right - width), v * (1 - height)
        box = (x, y, x + width, y + height)
        overlaps = [box_iou(box, other.box) for other in scene.things]
        if overlaps.pop(number) < NOTHING_IOU and not any(overlaps):
            boxes.append(box)
    return boxes


def with_thing(scene: Scene, number: int, thing: Thing) -> Scene:
    """Returns a scene in which one thing is another; the jitter of its colour and all else stay."""
    things = (*scene.things[:number], thing, *scene.things[number + 1 :])
    colors, old = scene.colors.copy(), PALETTE[scene.things[number].color][1]
    colors[number] = np.clip(colors[number] - old + PALETTE[thing.color][1], 0, 255)
    changed = replace(scene, things=things, colors=colors)
    return replace(changed, visible=visible_shares(draw_masks(changed, GRID).astype(bool)))


def open_given_scenes(scenes: Sequence[Scene], data: DataConfig, reader: shapes.Config) -> ImageSource:
    """Opens scenes as items of the data set, with the captions that its config says."""
    dataset = GivenScenes(reader, "val", tuple(scenes))
    data = replace(data.without_augmentation, in_memory=False, cache_images=False)
    return ImageSource(dataset if data.captions == "own" else TemplateCaptions(dataset, "val"), data)


def thing_regions(edits: Sequence[SceneEdit], size: int) -> Tensor:
    """Returns the pixels (M, size, size) bool of which the thing of each edit covers any part, before or after it."""
    masks = []
    for edit in edits:  # a pixel is the mean of SAMPLES x SAMPLES points
        before, after = (draw_masks(scene, size * SAMPLES)[edit.number] for scene in (edit.before, edit.after))
        masks.append(torch.from_numpy(before | after))
    return F.max_pool2d(torch.stack(masks).float(), SAMPLES) > 0


@dataclass(frozen=True)
class SceneJudge:
    """Says what M images show of what M edits ask for, by networks trained on real scenes."""

    judges: Judges
    edits: Sequence[SceneEdit]
    layouts: Layouts  # of the M scenes after the edits
    placed: bool  # whether the model knows the places of things; otherwise a thing counts wherever it is
    colored: bool = True  # whether the model knows the colours of things; otherwise any counts

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the networks, by name."""
        return self.judges.hashes

    def __call__(self, images: Tensor) -> Shown:
        """Returns what images uint8 (M, 3, H, W) show of the things that were changed: the class, the colour, and both
        (ASKED), where a moved thing has left its old place. OTHERS is the share of the other things whose class and
        colour are recognised at their boxes, NaN without any. Colours count only where the model knows them."""
        rows = self.layouts.first + torch.tensor([edit.number for edit in self.edits])
        crops = cut_crops(images, self.layouts.image, self.layouts.boxes)
        of_class = classify_crops(self.judges.crops, crops) == self.layouts.classes  # (things,)
        of_color = nearest_colors(images, self.layouts, PALETTE) == self.layouts.colors
        of_color = of_color if self.colored else torch.ones_like(of_color)
        right = (of_class & of_color).double()
        total = torch.bincount(self.layouts.image, minlength=self.layouts.count)
        shown = torch.zeros(self.layouts.count, dtype=torch.float64).index_add_(0, self.layouts.image, right)
        others = {OTHERS: (shown - right[rows]) / (total - 1)}
        if self.placed:
            asked, colors = of_class[rows] & of_color[rows] & self.has_left(images), {COLOR: of_color[rows]}
            return {ASKED: asked, CLASS: of_class[rows], **(colors if self.colored else {}), **others}
        things = find_contents(self.judges.scenes, images).things  # (M, classes, colours)
        image, kind, color = torch.arange(len(rows)), self.layouts.classes[rows], self.layouts.colors[rows]
        found = {ASKED: things[image, kind, color] > 0, CLASS: things[image, kind].any(1)}
        return {**found, COLOR: things[image, :, color].any(1), **others}

    def has_left(self, images: Tensor) -> Tensor:
        """Returns which images (M,) do not show a moved thing at its old place; True of other changes."""
        boxes = torch.tensor([edit.things[0].box for edit in self.edits], dtype=torch.float64)
        kinds = torch.tensor([edit.things[0].kind for edit in self.edits])
        moved = torch.tensor([edit.change == MOVE for edit in self.edits])
        crops = cut_crops(images, torch.arange(len(images)), boxes)
        return ~moved | (classify_crops(self.judges.crops, crops) != kinds)
