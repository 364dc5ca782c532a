"""Checks whether generated images show the numbers they were asked for, such as the rotation of digits.

Samples images for the numbers of held-out images and measures them by a regressor trained on the real images; samples
as many without numbers, and some in which one number changes and all else stays.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import save_grid
from experiments.harness.report import progress, table, three_digits
from experiments.metrics.numbers import (
    BATCH,
    RECIPE,
    Fields,
    Numbers,
    compare_numbers,
    fit_line,
    spread_of,
    train_number_regressor,
)
from models.conditions.numbers import MISSING, NumberField
from models.ranges import check_ranges
from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.data.transforms import as_uint8
from train.datasets import Dataset, NumberMeasure
from train.distributed import DistContext
from train.files import atomic_write
from train.loop import Batch
from train.progress import Progress
from train.samplers._metadata import find_numbers
from train.spaces import PixelSpace
from train.trained_sampler import TrainedSampler

MAX_IMAGES = 20_000  # of a split that are loaded
SWEEP_ROWS, SWEEP_VALUES = 4, 9  # images in a sweep of a field, and values of each
SWEEP_TAIL = 0.02  # of the training values, left out at each end of a sweep
REGRESSOR, PIXELS = "regressor", "pixels"  # by what numbers are measured
GIVEN, WITHOUT, REAL = "samples", "without numbers", "real"  # the images that are measured


@dataclass(frozen=True, kw_only=True)
class NumbersConfig:
    """Numbers."""

    n_samples: int = 300
    """Number of images with the numbers of held-out images, in turn, and of images without numbers."""

    EVERYDAY = ("n_samples",)
    RANGES = {"n_samples": "[2, 1000000000]"}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks the numbers of generated images; writes results.json, numbers.png and sweep.png to
    <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/check_numbers.py --sampler ddpm --load_dir ddpm_digits_numbers",
        "python experiments/check_numbers.py --sampler {sampler} --load_dir {sampler}_turned --n_samples 1000",
    )

    numbers: NumbersConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


class NumberedImages(NamedTuple):
    """Images with the numbers that they have, or were asked for."""

    images: Tensor  # uint8 (N, C, H, W)
    numbers: Numbers


class Measurement(NamedTuple):
    """A field of images, given and measured in one way, by kind of images: GIVEN, WITHOUT, REAL."""

    name: str
    field: NumberField
    by: str  # REGRESSOR or PIXELS
    given: Numbers
    measured: Numbers


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Opens the source of the conditions. ValueError: a model without numbers, or --metadata."""
    if find_numbers(model.sampler.network) is None:
        raise ValueError(f"{model.run} is not conditioned on numbers: train it with --conditions numbers")
    if config.sampling.metadata:
        got = f"got metadata {' '.join(config.sampling.metadata)}, but numbers that differ are compared"
        raise ValueError(f"{got}: leave --metadata out, or pass a --condition_file with them")
    source = model.condition_source(config.sampling)
    return ExperimentSetup((config.numbers, config.sampling, source), source=source)


def measure(
    settings: NumbersConfig,
    sampling: SamplingConfig,
    source: ConditionSource,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any]:
    """Samples, trains the regressor, computes all figures and saves the pictures."""
    fields, dataset = find_numbers(model.sampler.network).ranges, model.dataset("train")
    training = load_numbered_images(model, dataset, "train", fields)
    held_out = load_numbered_images(model, model.dataset("val"), "val", fields)
    sweep = plan_sweep(training.numbers, fields)
    drawer = Drawer(model, sampling, source, fields, batches)
    images = {GIVEN: drawer.draw_given(settings.n_samples), WITHOUT: drawer.draw_without(settings.n_samples)}
    save_sweep(batches.folder / "sweep.png", drawer.draw_sweep(sweep).images, sweep)
    images[REAL] = held_out
    with Progress("regressor", RECIPE.steps, "step") as bar:
        regressor = train_number_regressor(*training, fields, batches.seed, model.device, bar.update)
    measured = {kind: regressor.measure(each.images) for kind, each in images.items()}
    measurements = [measurement_of(name, field, REGRESSOR, images, measured) for name, field in fields.items()]
    measures = getattr(dataset, "number_measures", {})
    for name in [name for name in fields if name in measures]:
        measured = measure_pixels(measures[name], name, training, images)
        measurements.append(measurement_of(name, fields[name], PIXELS, images, measured))
    save_plot(batches.folder / "numbers.png", measurements, f"{model.run.name}, step {model.step}")
    return {
        "n_samples": settings.n_samples,
        "n_training_images": len(training.images),
        "n_held_out": len(held_out.images),
        "fields": [figures_of(each) for each in measurements],
    }


def load_numbered_images(model: TrainedSampler, dataset: Dataset, split: str, fields: Fields) -> NumberedImages:
    """Loads the images of a split as the model is trained on them, each once in a random view, with their numbers.

    Of a large split it is a fixed random part.
    """
    source = PixelSpace(model.data).source(dataset, split, model.data, 0, model.world, model.adapt)
    positions = torch.arange(min(len(source), MAX_IMAGES))
    return join((source[part.tolist()] for part in positions.split(BATCH)), fields)


def join(batches: Iterable[Batch], fields: Fields) -> NumberedImages:
    """Joins the images of batches and their numbers, NaN where missing."""
    parts = [(as_uint8(batch["image"]), {name: batch[name].float() for name in fields}) for batch in batches]
    numbers = {name: torch.cat([each[name] for _, each in parts]) for name in fields}
    return NumberedImages(torch.cat([images for images, _ in parts]), numbers)


class Sweep(NamedTuple):
    """Images of which one field takes several values, while the noise and all else is that of their row: (M,) each."""

    field: list[str]
    row: Tensor  # index of the image whose noise and conditions these are
    value: Tensor

    def override(self, conditions: Batch, positions: list[int]) -> Numbers:
        """Returns the fields of the conditions of the images at these positions, with the values of the sweep."""
        numbers = {}
        for name in dict.fromkeys(self.field):
            swept = torch.tensor([self.field[position] == name for position in positions])
            numbers[name] = torch.where(swept, self.value[positions], conditions[name])
        return numbers


def plan_sweep(numbers: Numbers, fields: Fields) -> Sweep:
    """Plans SWEEP_ROWS images of SWEEP_VALUES values for each field, over the range of its values in training.

    That is the whole range of a cyclic field, and of others that of most training images, without SWEEP_TAIL at each
    end; of a field that no training image has, its range.
    """
    names, rows, values = [], [], []
    for name, field in fields.items():
        known, ends = numbers[name][~numbers[name].isnan()], torch.tensor([field.low, field.high])
        if len(known) and not field.cyclic:
            ends = known.quantile(torch.tensor([SWEEP_TAIL, 1 - SWEEP_TAIL]))
        for row in range(SWEEP_ROWS):
            names += [name] * SWEEP_VALUES
            rows += [row] * SWEEP_VALUES
            values.append(torch.linspace(*ends.tolist(), SWEEP_VALUES))
    return Sweep(names, torch.tensor(rows), torch.cat(values))


@dataclass(frozen=True)
class Drawer:
    """Samples images of a model; those of an interrupted command are kept."""

    model: TrainedSampler
    sampling: SamplingConfig
    source: ConditionSource
    fields: Fields
    batches: ResumableBatches

    def draw_given(self, count: int) -> NumberedImages:
        """Samples images with the numbers of the source."""
        return self.draw("given", count, lambda indices: (indices, self.conditions(indices)))

    def draw_without(self, count: int) -> NumberedImages:
        """Samples images of the same noise and other conditions, with all numbers missing."""

        def plan(indices: list[int]) -> tuple[list[int], Batch]:
            missing = torch.full((len(indices),), MISSING)
            return indices, self.conditions(indices) | dict.fromkeys(self.fields, missing)

        return self.draw("without", count, plan)

    def draw_sweep(self, sweep: Sweep) -> NumberedImages:
        """Samples the images of a sweep."""

        def plan(positions: list[int]) -> tuple[list[int], Batch]:
            indices = sweep.row[positions].tolist()
            conditions = self.conditions(indices)
            return indices, conditions | sweep.override(conditions, positions)

        return self.draw("sweep", len(sweep.row), plan)

    def conditions(self, indices: list[int]) -> Batch:
        """Returns the conditions of the images of these indices, with all numbers as floats."""
        conditions = self.source.draw(self.batches.seed, indices)
        return conditions | {name: conditions[name].float() for name in self.fields}

    def draw(self, name: str, count: int, plan: Callable[[list[int]], tuple[list[int], Batch]]) -> NumberedImages:
        """Samples `count` images; `plan` maps their positions to the indices of their noise, and their conditions."""

        def make(positions: list[int]) -> dict[str, Tensor]:
            indices, conditions = plan(positions)
            images = self.model.draw(indices, self.batches.seed, self.sampling, conditions)["image"]
            return {"image": images, **{field: conditions[field] for field in self.fields}}

        return join(progress(self.batches.resume(name, range(count), make), count, name), self.fields)


def measurement_of(
    name: str, field: NumberField, by: str, images: dict[str, NumberedImages], measured: dict[str, Numbers]
) -> Measurement:
    """Returns one field of images of all kinds."""
    given = {kind: each.numbers[name] for kind, each in images.items()}
    return Measurement(name, field, by, given, {kind: numbers[name] for kind, numbers in measured.items()})


def measure_pixels(
    quantity: NumberMeasure, name: str, training: NumberedImages, images: dict[str, NumberedImages]
) -> dict[str, Numbers]:
    """Measures a field as the data set computes it from the pixels of its images, in images of all kinds.

    These have another size. Training images give the line from the quantity in them to that in the originals.
    """

    def compute(images: Tensor) -> Tensor:  # (N, C, H, W) -> (N,)
        return torch.from_numpy(quantity(images.float().mean(1).round().byte().numpy())).double()

    line = fit_line(compute(training.images), training.numbers[name])
    return {kind: {name: line(compute(each.images))} for kind, each in images.items()}


def figures_of(measurement: Measurement) -> dict[str, Any]:
    """Returns the figures of a field: how samples and real images agree with their numbers, and the spread of all.

    "data" are the numbers of the real held-out images, "real" what is measured in them.
    """
    name, field, by, given, measured = measurement
    agreements = {kind: compare_numbers(given[kind], measured[kind], field)._asdict() for kind in (REAL, GIVEN)}
    values = {"data": given[REAL], REAL: measured[REAL], GIVEN: measured[GIVEN], WITHOUT: measured[WITHOUT]}
    spreads = {kind: spread_of(each, field)._asdict() for kind, each in values.items()}
    return {"name": name, **field._asdict(), "by": by, "agreement": agreements, "spread": spreads}


def save_sweep(path: Path, images: Tensor, sweep: Sweep) -> None:
    """Saves images (M, C, H, W) of a sweep as a grid: rows of one image, columns of values, the field at the left."""
    blank = torch.full_like(images[:1], 255)
    rows, captions = [], []
    for first in range(0, len(images), SWEEP_VALUES):
        rows += [blank, images[first : first + SWEEP_VALUES]]
        values = sweep.value[first : first + SWEEP_VALUES].tolist()
        captions += [sweep.field[first], *(f"{value:.3g}" for value in values)]
    save_grid(path, torch.cat(rows), columns=1 + SWEEP_VALUES, captions=captions)


def save_plot(path: Path, measurements: list[Measurement], title: str) -> None:
    """Plots measured against given numbers, of real held-out images and of samples, a row of panels per measurement."""
    from matplotlib.figure import Figure  # not pyplot: no display is needed

    figure = Figure(figsize=(8, 0.5 + 3.7 * len(measurements)), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    rows = figure.subplots(len(measurements), 2, squeeze=False, sharex="row", sharey="row")
    for panels, (name, field, by, given, measured) in zip(rows, measurements, strict=True):
        for panel, kind, heading, color in (
            (panels[0], REAL, "held-out real images", "0.35"),
            (panels[1], GIVEN, "samples", "#0072b2"),
        ):
            agreement = compare_numbers(given[kind], measured[kind], field)
            r2, error = three_digits(agreement.r2), three_digits(agreement.error)
            panel.plot(given[kind], measured[kind], ".", markersize=3, color=color)
            panel.plot(*[given[kind][~given[kind].isnan()].sort().values] * 2, color="0.6", linewidth=1, zorder=0)
            panel.set_title(f"{heading}: R² {r2}, mean error {error}", fontsize=9, loc="left")
            panel.set_xlabel(f"{name}, {'true' if kind == REAL else 'asked for'}")
            panel.grid(color="0.92")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel(f"{name}, measured by {by}")
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png")


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats how samples agree with their numbers beside real images, and what samples without numbers show."""
    agreement = [("field", "measured by", "R², real", "R², samples", "mean error, real", "mean error, samples")]
    spread = [("mean ± deviation", "measured by", "of the data", "real, measured", "samples", "without numbers")]
    for row in results["fields"]:
        pairs = [row["agreement"][kind] for kind in (REAL, GIVEN)]
        figures = [three_digits(pair[key]) for key in ("r2", "error") for pair in pairs]
        agreement.append((row["name"], row["by"], *figures))
        spreads = [row["spread"][kind] for kind in ("data", REAL, GIVEN, WITHOUT)]
        words = [f"{three_digits(each['mean'])} ± {three_digits(each['deviation'])}" for each in spreads]
        spread.append((row["name"], row["by"], *words))
    held_out, training = f"{results['n_held_out']:,} held-out", f"{results['n_training_images']:,} training"
    lines = [
        f"{results['n_samples']:,} samples, {held_out} images; the regressor was trained on {training} images",
        table(agreement),
        "R² of the real images shows how well the numbers can be measured",
        "",
        table(spread),
        "without numbers, samples should be spread like the real images",
        "",
        *(str(folder / name) for name in ("results.json", "numbers.png", "sweep.png")),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_experiment("check_numbers", Config, measure, report, prepare=prepare, one_process=True)
