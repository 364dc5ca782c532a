"""How well images obey their layouts: every figure, over all objects and over each kind of difficult ones."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.layout.colors import Palette, nearest_colors
from experiments.metrics.layout.crop_classifier import (
    classify_crops,
    crop_features,
    train_crop_classifier,
)
from experiments.metrics.layout.crops import cut_crops
from experiments.metrics.layout.detections import Detections, average_precision, count_spurious
from experiments.metrics.layout.fitting import Recipe
from experiments.metrics.layout.judges import (
    REFERENCE_SCENES,
    Judges,
    Scenes,
    judge_split,
    load_scenes,
    training_indices,
)
from experiments.metrics.layout.layouts import SMALL_AREA, UNKNOWN, UNLABELLED, Layouts, find_buckets
from experiments.metrics.layout.map_obedience import Groups, MapFigures, measure_maps
from experiments.metrics.layout.scene_network import detect, segment
from train.config import DataConfig
from train.data.loading import ImageSource
from train.datasets import SPLITS

ALL, OBJECTS = "all", "objects"  # a bucket; a count
CROP_ACCURACY, MIOU = "crop accuracy", "mIoU"  # figures, by the first of which judges are checked
MIN_JUDGE = 0.95  # what judges must recognise of real scenes that are made for them
FLOOR_FACTOR = 2  # by which other real scenes must exceed wrong layouts
CAS_RECIPE = Recipe(steps=250, batch_size=128, peak_lr=4e-3)

Figures = dict[str, dict[str, float | None]]  # by bucket, by figure


@dataclass(frozen=True)
class Reference:
    """Crops of objects in real scenes that no sample was drawn for."""

    crops: Tensor  # uint8 (M, C, SIDE, SIDE)
    classes: Tensor  # (M,)
    buckets: dict[str, Tensor]  # which crops are in each, (M,) bool


def make_reference(scenes: Scenes) -> Reference:
    """Cuts the objects out of real scenes, but for ignored ones."""
    layouts = scenes.layouts
    kept = ~layouts.ignored
    crops = cut_crops(scenes.images, layouts.image[kept], layouts.boxes[kept])
    return Reference(crops, layouts.classes[kept], {name: rows[kept] for name, rows in with_all(layouts).items()})


def with_all(layouts: Layouts) -> dict[str, Tensor]:
    """Returns which objects (M,) are in each bucket, the first of which has all of them."""
    return {ALL: torch.ones(len(layouts)).bool()} | find_buckets(layouts)


def wrong_layouts(layouts: Layouts, sources: Tensor) -> Layouts:
    """Returns for each image the layout of another: the next one, or as many further as it takes for all to differ.

    `sources` (N,) says which layout each image has. ValueError: all images have the same.
    """
    for step in range(1, layouts.count):
        if (sources != sources.roll(-step)).all():
            return layouts.take([(index + step) % layouts.count for index in range(layouts.count)])
    raise ValueError(f"got {layouts.count} images with too few different layouts: measure samples of more layouts")


@dataclass(frozen=True)
class Measurement:
    """What images are measured with."""

    judges: Judges
    reference: Reference | None  # None: the data have no boxes
    palette: Palette | None  # None: colours are no attribute
    n_classes: int
    seed: int  # of the classifiers trained on the images

    def __call__(self, images: Tensor, layouts: Layouts, external: Detections | None = None) -> Figures:
        """Measures images uint8 (N, C, H, W) against layouts; `external` are objects in them by another
        detector."""
        kept, buckets = ~layouts.ignored, with_all(layouts)
        figures: Figures = {name: {OBJECTS: int((rows & kept).sum())} for name, rows in buckets.items()}
        parts = []
        if self.judges.crops is not None:
            crops = cut_crops(images, layouts.image, layouts.boxes)
            parts += [self.of_crops(crops, layouts, buckets), self.trained_on(images, layouts)]
        if self.palette is not None and layouts.colors is not None and layouts.owner is not None:
            right, named = nearest_colors(images, layouts, self.palette) == layouts.colors, layouts.colors != UNKNOWN
            parts.append({name: {"colour": share(right[rows & kept & named])} for name, rows in buckets.items()})
        if self.judges.scenes.objects is not None:
            parts.append(of_detections(detect(self.judges.scenes, images), layouts, buckets))
        if external is not None:
            named = of_detections(external, layouts, buckets)
            parts.append({b: {f"{key}, --detections": v for key, v in row.items()} for b, row in named.items()})
        if layouts.pixels is not None and self.judges.scenes.pixels is not None:
            predicted = segment(self.judges.scenes, images)
            parts.append(of_pixels(predicted, layouts, buckets, self.n_classes))
        return {name: figures[name] | {k: v for part in parts for k, v in part[name].items()} for name in buckets}

    def of_maps(self, images: Tensor, layouts: Layouts, groups: Groups) -> MapFigures | None:
        """Returns the figures of the regions of panoptic maps by group of classes, see `measure_maps`; None for layouts
        without maps of classes."""
        if layouts.pixels is None or self.judges.scenes.pixels is None:
            return None
        predicted = segment(self.judges.scenes, images)
        return measure_maps(images, layouts, predicted, groups, self.n_classes, self.palette)

    def recognise(self, images: Tensor, layouts: Layouts) -> tuple[str, float | None]:
        """Returns the figure by which judges are checked, and its value for images with these layouts: how often crops
        show their class, or, without boxes, the mean intersection over union."""
        if self.judges.crops is not None:
            kept = ~layouts.ignored
            crops = cut_crops(images, layouts.image[kept], layouts.boxes[kept])
            return CROP_ACCURACY, share(classify_crops(self.judges.crops, crops) == layouts.classes[kept])
        predicted = segment(self.judges.scenes, images)
        return MIOU, of_pixels(predicted, layouts, {ALL: torch.zeros(0)}, self.n_classes)[ALL][MIOU]

    def of_crops(self, crops: Tensor, layouts: Layouts, buckets: dict[str, Tensor]) -> Figures:
        """Returns how often the crops show their class, and the Fréchet distance of their features to real crops."""
        kept, classifier = ~layouts.ignored, self.judges.crops
        right = classify_crops(classifier, crops) == layouts.classes
        features, real = crop_features(classifier, crops), crop_features(classifier, self.reference.crops)
        return {
            name: {
                CROP_ACCURACY: share(right[rows & kept]),
                "crop FD": feature_distance(features[rows & kept], real[self.reference.buckets[name]]),
            }
            for name, rows in buckets.items()
        }

    def trained_on(self, images: Tensor, layouts: Layouts) -> Figures:
        """Returns the accuracy on real crops of a classifier trained on the crops of these images (CAS)."""
        if not (~layouts.ignored).any():
            return {name: {"CAS": None} for name in self.reference.buckets}
        classifier = train_crop_classifier(images, layouts, self.n_classes, CAS_RECIPE, self.seed, with_nothing=False)
        right = classify_crops(classifier, self.reference.crops) == self.reference.classes
        return {name: {"CAS": share(right[rows])} for name, rows in self.reference.buckets.items()}


def open_measurement(judges: Judges, judging: ImageSource, seed: int) -> Measurement:
    """Loads the real crops that samples are compared with."""
    reference, dataset = None, judging.dataset
    if judges.crops is not None:
        indices = training_indices(judging)[:REFERENCE_SCENES]
        reference = make_reference(load_scenes(judging, indices, "reference scenes"))
    palette = getattr(dataset, "palette", None) if judging.config.n_channels == 3 else None
    return Measurement(judges, reference, palette, len(dataset.region_classes), seed)


def check_judges(
    measurement: Measurement, real: Scenes, wrong: Layouts, min_judge: float | None, data: DataConfig
) -> dict[str, Any]:
    """Returns what the judges recognise of real scenes, and of real scenes under wrong layouts.

    ValueError: less than `min_judge`, or by default than MIN_JUDGE for data with a split of their own for judges and
    than FLOOR_FACTOR times the floor for others.
    """
    name, value = measurement.recognise(real.images, real.layouts)
    _, floor = measurement.recognise(real.images, wrong)
    if value is None or floor is None:
        raise ValueError(f"got {len(real.items)} images without a visible object: pass a larger --n_images")
    own_split = judge_split(data) != SPLITS[0]
    wanted = min_judge if min_judge is not None else MIN_JUDGE if own_split else FLOOR_FACTOR * floor
    if value < wanted:
        raise ValueError(
            f"the judges reach a {name} of {value:.3f} on real scenes ({floor:.3f} under wrong layouts), wanted "
            f"{wanted:.3f}: train them on more or larger images (--img_size), or accept them with --min_judge"
        )
    return {"figure": name, "real": value, "wrong": floor, "wanted": wanted}


def share(right: Tensor) -> float | None:
    """Returns the share of True; None of nothing."""
    return right.double().mean().item() if len(right) else None


def feature_distance(a: Tensor, b: Tensor) -> float | None:
    """Returns the Fréchet distance of two sets of features (n, D); None for fewer than 2."""
    if min(len(a), len(b)) < 2:
        return None
    return frechet_distance(Statistics().update(a), Statistics().update(b))


def of_detections(detections: Detections, layouts: Layouts, buckets: dict[str, Tensor]) -> Figures:
    """Returns the average precisions, and the spurious objects per image, in a bucket of images with such objects."""
    area = (detections.boxes[:, 2:] - detections.boxes[:, :2]).prod(1)
    spurious, figures = count_spurious(detections, layouts).double(), {}
    for name, rows in buckets.items():
        precision = average_precision(detections, layouts, rows, area < SMALL_AREA if name == "small" else None)
        images = torch.arange(layouts.count) if name == ALL else layouts.image[rows].unique()
        mean = spurious[images].mean().item() if len(images) else None
        figures[name] = precision._asdict() | {"spurious": mean}
    return figures


def of_pixels(predicted: Tensor, layouts: Layouts, buckets: dict[str, Tensor], n_classes: int) -> Figures:
    """Returns the mean intersection over union of the classes asked for, and the share of right pixels: in a bucket,
    of the pixels in the boxes of its objects."""
    figures = {}
    for name, rows in buckets.items():
        counted = layouts.pixels != UNLABELLED
        if name != ALL:
            counted &= inside_boxes(layouts, rows)
        asked, given = layouts.pixels[counted].long(), predicted[counted].long()
        counts = torch.bincount(asked * n_classes + given, minlength=n_classes**2).view(n_classes, n_classes).double()
        right, wanted = counts.diagonal(), counts.sum(1)
        iou = (right / (wanted + counts.sum(0) - right))[wanted > 0]
        mean = iou.mean().item() if len(iou) else None
        figures[name] = {MIOU: mean, "pixel accuracy": share(asked == given)}
    return figures


def inside_boxes(layouts: Layouts, rows: Tensor) -> Tensor:
    """Returns the pixels (N, H, W) whose centres are in the box of one of these objects, rows (M,) bool."""
    _, H, W = layouts.pixels.shape
    inside = torch.zeros(layouts.pixels.shape, dtype=torch.bool)
    sides = layouts.boxes * torch.tensor([W, H, W, H])
    for index, (left, top, right, bottom) in zip(
        layouts.image[rows].tolist(), (sides[rows] - 0.5).ceil().long().tolist(), strict=True
    ):
        inside[index, top:bottom, left:right] = True
    return inside
