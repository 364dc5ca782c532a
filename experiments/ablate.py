"""Draws a grid of models and sampling settings, declared in a YAML file, as one labelled sheet: ablate.py FILE.yaml.

All cells have the same noise, and each is a file: an interrupted grid resumes, and of a changed one only what is new is
drawn.
"""

import csv
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import numpy as np
import torch
from torch import Tensor

from experiments.harness.ablation_cells import (
    CellInputs,
    ModelFacts,
    Models,
    PlannedCell,
    missing_cells,
    plan_cells,
)
from experiments.harness.ablation_file import Axis, read_ablation
from experiments.harness.batches import single_process_world
from experiments.harness.experiment import OutputConfig, peek_settings
from experiments.harness.report import table, three_digits
from experiments.harness.results import write_results
from experiments.metrics.ablation_sheet import SheetCell, save_sheet
from experiments.metrics.classifier import classifier_for, predict_classes
from experiments.metrics.cost import count_nfe
from experiments.metrics.distances import compute_statistics, features_provenance, real_statistics, statistics_cache
from experiments.metrics.features import FeaturesConfig
from experiments.metrics.frechet import frechet_distance
from models.ranges import COUNT, check_ranges
from train.cli.files import read_run_config, run_folder
from train.cli.parse import BaseSettings, flag_names, run_script, to_dict
from train.data.loading import build_dataset
from train.data.transforms import grey_to_rgb
from train.distributed import DistContext
from train.files import atomic_write, read_arrays
from train.progress import Progress
from train.registry import did_you_mean
from train.runs import is_new, run_lock, write_config
from train.samplers import NotFiniteError

MEASURES = ("classes", "distance", "mse", "seconds", "evaluations")
GRID = "grid"  # section of config.yaml and results.json: the file in full
DEFAULT_FILE = "configs/ablation/digits.yaml"
LISTED = 10  # cells in a message
SHOWN = 16  # images of a cell in the sheet

Row = dict[str, Any]  # of results.json: a cell with its measures


@dataclass(frozen=True, kw_only=True)
class AblationConfig(FeaturesConfig):
    """Ablation."""

    grid: str | None = None
    """YAML file of the models, settings and axes; the first word of the command line may be it."""
    n_images: int = 1
    """Images in each cell; the sheet shows the first 16."""
    measures: tuple[str, ...] = ()
    """What the sheet shows of each cell: classes (share recognised as the class that was asked for), distance (Fréchet
    distance to the training images), mse (to the image that is redrawn, in 8-bit levels), seconds and evaluations (of
    an image)."""
    sheet_size: int = 128
    """Longer side of an image in the sheet, in pixels; small images are enlarged by whole numbers."""
    allow: tuple[str, ...] = ()
    """Dotted paths of your own classes and functions that the runs may import; without it, loading runs no such
    code."""

    EVERYDAY = ("grid", "n_images", "measures", "features", "sheet_size")
    RANGES = {"n_images": COUNT, "sheet_size": "[16, 2048]"}

    def __post_init__(self):
        check_ranges(self)
        for name in self.measures:
            if name not in MEASURES:
                hint = did_you_mean(name, MEASURES)
                raise ValueError(f"got measures {name!r}{hint}, wanted some of {', '.join(MEASURES)}: see --measures")
        if "distance" in self.measures and self.n_images < 2:
            raise ValueError("got the measure distance of 1 image: pass --n_images 100, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draws a grid of models and sampling settings; writes sheet.png, results.json, results.csv and cells/ (an .npz
    file of images for each cell) to <logs_root>/<log_dir>. The first word may be the file of the grid, which may give
    values of the other flags, too."""

    EXAMPLES = (
        f"python experiments/ablate.py {DEFAULT_FILE}",
        f"python experiments/ablate.py {DEFAULT_FILE} --n_images 100 --measures classes distance",
    )

    ablation: AblationConfig
    output: OutputConfig


FILE_FLAGS = flag_names(Config) - {"grid", "allow"}


def file_values(argv: list[str], section: str) -> BaseSettings:
    """Returns the values of flags in the file of the grid."""
    path = peek_settings(argv, section, "grid").get("grid")
    return BaseSettings({}) if path is None else BaseSettings(dict(read_ablation(path, FILE_FLAGS).flags), Path(path))


def main(config: Config) -> None:
    own, output = config.ablation, config.output
    if own.grid is None:
        raise ValueError(f"got no file of a grid: pass one, such as python experiments/ablate.py {DEFAULT_FILE}")
    ablation, world = read_ablation(own.grid, FILE_FLAGS), single_process_world(output.device)
    for note in ablation.notes:
        print(f"{own.grid}: {note}", flush=True)
    folder = run_folder(output.logs_root, output.log_dir or f"ablation_{Path(own.grid).stem}")
    if not is_new(folder) and GRID not in read_run_config(folder / "config.yaml"):
        raise ValueError(f"{folder} holds other results: pass another --log_dir")
    models = Models(ablation.models, output, own.allow, world)
    plans = plan_cells(ablation, models, own.n_images, output.seed, folder)
    judges = open_judges(own.measures, own, models.facts, output.logs_root, world)
    check_measures(own.measures, plans, judges)
    with run_lock(folder):
        write_config(folder, to_dict(config) | {GRID: ablation.content()})
        missing = missing_cells(plans, folder)
        failed = draw_cells(missing, models, own.n_images, output.batch_size, output.seed, folder)
        plans = [plan._replace(reason=failed.get(plan.digest, plan.reason)) for plan in plans]
        rows = measure_cells(ablation.axes, plans, judges, folder)
        results = {"models": describe_models(models.facts, judges), "n_images": own.n_images, "seed": output.seed}
        write_results(folder, results | {GRID: ablation.content(), "cells": rows})
        write_table(folder / "results.csv", rows)
        pictures = [sheet_cell(plan, row, own.measures, folder) for plan, row in zip(plans, rows, strict=True)]
        cells = {plan.cell.place: picture for plan, picture in zip(plans, pictures, strict=True)}
        save_sheet(folder / "sheet.png", ablation.axes, cells, redrawn_images(plans), own.sheet_size)
    print(report(rows, own.measures, len(missing) - len(failed), folder))


def draw_cells(
    missing: Sequence[PlannedCell], models: Models, n_images: int, batch_size: int, seed: int, folder: Path
) -> dict[str, str]:
    """Draws cells, model by model, and saves each as it is complete; returns why some failed, by digest."""
    failed: dict[str, str] = {}
    names = dict.fromkeys(plan.cell.model for plan in missing)
    with Progress("drawing", len(missing), "cell") as bar:
        for name in sorted(names, key=lambda name: name != models.name):  # that in memory first
            for plan in (plan for plan in missing if plan.cell.model == name):
                try:
                    arrays = draw_cell(models.open_cell(plan.cell, seed), n_images, batch_size)
                except NotFiniteError as error:
                    failed[plan.digest] = str(error)
                else:
                    with atomic_write(plan.path(folder)) as scratch:
                        np.savez(scratch, **arrays)
                bar.update()
    return failed


def draw_cell(inputs: CellInputs, n_images: int, batch_size: int) -> dict[str, np.ndarray]:
    """Draws the images of a cell; returns the arrays of its file.

    arr_0 uint8 (N, H, W, 3), or (N, H, W, C) of other images than grey and RGB; labels (N,) of models with classes;
    seconds and evaluations, of an image.
    """
    start = time.perf_counter()
    with count_nfe(inputs.trained.sampler.network) as nfe:
        batches = [inputs.draw(indices.tolist()) for indices in torch.arange(n_images).split(batch_size)]
    seconds = time.perf_counter() - start
    images = torch.cat([grey_to_rgb(batch["image"]) for batch in batches]).permute(0, 2, 3, 1)
    arrays = {"arr_0": images.numpy(), "seconds": seconds / n_images, "evaluations": nfe.evaluations / n_images}
    labels = [batch["label"] for batch in batches if "label" in batch]
    return arrays | ({"labels": torch.cat(labels).numpy()} if labels else {})


def read_cell(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a cell's file; ValueError if it is damaged."""
    wanted = "delete it, and the cell is drawn again"
    arrays = read_arrays(path, ("arr_0", "labels", "seconds", "evaluations"), wanted)
    if missing := sorted({"arr_0", "seconds", "evaluations"} - arrays.keys()):
        raise ValueError(f"{path} has no {', '.join(missing)}: {wanted}")
    return arrays


class Judge:
    """Measures cells of models of one data set."""

    def __init__(
        self, measures: Sequence[str], features: FeaturesConfig, facts: ModelFacts, cache: Path, world: DistContext
    ):
        self.measures, self.n_channels, self.n_classes = measures, facts.data.n_channels, facts.n_classes
        self.classifier = classifier_for(facts.data) if "classes" in measures else None
        self.provenance: dict[str, str | int] = {}  # of the features
        if "distance" in measures:
            self.features = features.load(facts.data, world.device)
            self.provenance = features_provenance(self.features, features.inception_weights)
            real = build_dataset(facts.data, facts.reader, "train")
            self.real = real_statistics(real, facts.data, self.features, features.inception_weights, cache, 50, world)

    def measure(self, arrays: Mapping[str, np.ndarray], image: Tensor | None) -> dict[str, float | str | None]:
        """Returns the measures of a cell, None where it has none; `image` is the one that it redraws."""
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
        images = images[:, :1] if self.n_channels == 1 else images  # grey ones are saved as RGB
        values: dict[str, float | str | None] = {name: float(arrays[name]) for name in ("seconds", "evaluations")}
        if "classes" in self.measures:
            values["classes"] = None
            labels = torch.from_numpy(arrays.get("labels", np.full(len(images), self.n_classes)))
            asked = labels < self.n_classes  # not the null class
            if self.classifier is not None and asked.any():
                right = predict_classes(self.classifier, images[asked]) == labels[asked]
                values["classes"] = right.double().mean().item()
        if "distance" in self.measures:
            batches = ({"features": self.features.extract(part)} for part in images.split(50))
            values["distance"] = frechet_distance(compute_statistics(batches), self.real)
            values["distance_of"] = self.features.module.METRIC
        if "mse" in self.measures:
            values["mse"] = None if image is None else (images.float() - image.float()).square().mean().item()
        return values


def open_judges(
    measures: Sequence[str],
    features: FeaturesConfig,
    facts: Mapping[str, ModelFacts],
    logs_root: str,
    world: DistContext,
) -> dict[str, Judge]:
    """Returns what measures the cells of each model; models of one data set share it."""
    keys = {name: repr((each.data, each.reader, each.n_classes)) for name, each in facts.items()}
    judges: dict[str, Judge] = {}
    for name, key in keys.items():
        if key not in judges:
            judges[key] = Judge(measures, features, facts[name], statistics_cache(logs_root), world)
    return {name: judges[key] for name, key in keys.items()}


def check_measures(measures: Sequence[str], plans: Sequence[PlannedCell], judges: Mapping[str, Judge]) -> None:
    """Raises ValueError for a measure that no cell has."""
    if "mse" in measures and all(plan.image is None for plan in plans):
        raise ValueError("got the measure mse, but no cell redraws an image: add image: FILE to the settings")
    if "classes" in measures and all(judge.classifier is None for judge in judges.values()):
        raise ValueError("got the measure classes, but no model's data set has a classifier: leave it out")


def measure_cells(
    axes: Sequence[Axis], plans: Sequence[PlannedCell], judges: Mapping[str, Judge], folder: Path
) -> list[Row]:
    """Returns a row for each cell, in their order."""
    rows = []
    for plan in plans:
        row: Row = {"at": {axis.name: label for axis, label in zip(axes, plan.cell.labels, strict=True)}}
        row |= {"model": plan.cell.model, "reason": plan.reason, "file": None}
        if not plan.reason:
            path, judge = plan.path(folder), judges[plan.cell.model]
            row["file"] = str(path.relative_to(folder))
            row |= judge.measure(read_cell(path), plan.image)
        rows.append(row)
    return rows


def describe_models(facts: Mapping[str, ModelFacts], judges: Mapping[str, Judge]) -> dict[str, Any]:
    """Returns what identifies each model, and the features that its cells are measured with, for results.json."""
    return {
        name: {"run": str(each.run), "step": each.step} | each.provenance | judges[name].provenance
        for name, each in facts.items()
    }


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes a CSV file with a line for each cell."""
    columns = dict.fromkeys(name for row in rows for name in row if name != "at")
    with atomic_write(path) as scratch, scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]["at"], *(name for name in columns if name not in rows[0]["at"])])
        writer.writeheader()
        writer.writerows({name: each for name, each in row.items() if name != "at"} | row["at"] for row in rows)


def format_measures(row: Row, measures: Sequence[str]) -> list[str]:
    """Returns the measures of a cell in words, "-" for one that it does not have."""
    words = []
    for name in measures:
        value = row.get(name)
        if name == "classes":
            words.append("classes -" if value is None else f"classes {100 * value:.0f} %")
        elif name == "distance":
            words.append(f"{row.get('distance_of', 'distance')} {three_digits(value)}")
        else:
            words.append({"mse": "MSE {}", "seconds": "{} s"}.get(name, "{} evaluations").format(three_digits(value)))
    return words


def sheet_cell(plan: PlannedCell, row: Row, measures: Sequence[str], folder: Path) -> SheetCell:
    """Returns what the sheet shows of a cell."""
    if plan.reason:
        return SheetCell(None, ("not possible:", plan.reason))
    images = torch.from_numpy(read_cell(plan.path(folder))["arr_0"][:SHOWN]).permute(0, 3, 1, 2)
    return SheetCell(images, format_measures(row, measures))


def redrawn_images(plans: Sequence[PlannedCell]) -> dict[str, Tensor]:
    """Returns the images that cells redraw, by name."""
    found = {(plan.cell.settings["image"], *plan.image.shape): plan.image for plan in plans if plan.image is not None}
    names = Counter(Path(path).name for path, *_ in found)
    return {
        Path(path).name if names[Path(path).name] == 1 else f"{path} {height}x{width}": image
        for (path, _, height, width), image in found.items()
    }


def report(rows: Sequence[Row], measures: Sequence[str], n_drawn: int, folder: Path) -> str:
    """Formats the measures of all cells, why some are empty, and the paths of the files."""
    lines = []
    if measures:
        heading = (*rows[0]["at"], *measures)
        lines += [table([heading, *((*row["at"].values(), *format_measures(row, measures)) for row in rows)]), ""]
    empty = [row for row in rows if row["reason"]]
    lines += [f"not possible: {', '.join(row['at'].values())}: {row['reason']}" for row in empty[:LISTED]]
    lines += [f"and {len(empty) - LISTED} more"] * (len(empty) > LISTED)
    counts = f"{len(rows)} cells: {n_drawn} drawn now" + f", {len(empty)} not possible" * bool(empty)
    return "\n".join([*lines, counts, *(str(folder / name) for name in ("sheet.png", "results.json", "results.csv"))])


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv[1:2] = ["--grid", sys.argv[1]]
    run_script(main, Config, "ablate", base_values=file_values)
