"""A comparison of arms: runs that are trained, sampled and measured once each, and kept in a folder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.harness.images import GRID_IMAGES, read_samples, save_grid
from experiments.harness.results import write_results
from experiments.metrics.layout.bench import Bench, Run
from experiments.metrics.layout.judges import Scenes, judge_split, load_judges, load_scenes, open_scenes
from experiments.metrics.layout.layout_pictures import draw_rows, pair_images, save_picture
from experiments.metrics.layout.layouts import Layouts
from experiments.metrics.layout.obedience import Measurement, check_judges, open_measurement, wrong_layouts
from train.cli.parse import flatten_group
from train.config import DataConfig, TrainingConfig
from train.data.loading import TrainingImages
from train.data.transforms import grey_to_rgb
from train.datasets import DatasetConfig
from train.files import atomic_write
from train.identity import comparison_identity, find_differences, format_differences

PICTURE = "layouts.png"
REAL_SCENES = "real scenes"
Results = dict[str, dict[str, Any]]  # by name
Order = Callable[[dict[str, Any]], Any]  # of what was measured, for sorting


class Judged(NamedTuple):
    """What the samples of all runs are measured with."""

    measurement: Measurement
    real: Scenes  # the held-out scenes
    wrong: Layouts  # of the same images, each that of another
    names: Sequence[str]  # of the classes, by number
    hashes: dict[str, str]  # of the judges


def check_fresh(training: TrainingConfig) -> None:
    """Raises ValueError for settings with which runs would not start from scratch, or have side effects."""
    if training.load_dir is not None or training.hooks or training.resume != "auto":
        raise ValueError(
            "every run of a comparison starts from scratch and without hooks: leave --load_dir, --hooks, --resume out"
        )


def open_held_out(data: DataConfig, reader: DatasetConfig, n_images: int) -> TrainingImages:
    """Opens the validation scenes in a fixed order, each with its first caption. ValueError: fewer than `n_images`."""
    held_out = open_scenes(data, reader, "val")
    if len(held_out) < n_images:
        raise ValueError(f"got n_images {n_images}, the validation split has {len(held_out)}: pass --n_images N")
    return TrainingImages(held_out, seed=0, first_caption=True)


def load_judged(
    bench: Bench, judging_reader: DatasetConfig, n_images: int, min_judge: float | None, seed: int, cache: Path
) -> Judged:
    """Loads the held-out scenes and the judges, which are trained on scenes of `judging_reader` unless they are in the
    folder `cache`. ValueError: they do not recognise real scenes well enough."""
    source, items = bench.held_out.source, []
    for number in range(n_images):
        bench.held_out[[number]]  # an unreadable scene is replaced when it is read
        items.append(bench.held_out.item_index(number))
    real = load_scenes(source, items, "held-out scenes")
    judging = open_scenes(bench.data, judging_reader, judge_split(bench.data))
    judges = load_judges(judging, cache, seed)
    measurement = open_measurement(judges, judging, seed)
    wrong = wrong_layouts(real.layouts, torch.tensor(real.items))
    check_judges(measurement, real, wrong, min_judge, judging.config)
    return Judged(measurement, real, wrong, judging.dataset.region_classes, judges.hashes)


@dataclass(frozen=True)
class Comparison(ABC):
    """The runs of a comparison; each is trained and measured once, and kept in the folder."""

    bench: Bench
    judged: Judged
    folder: Path
    results: Results  # "trained" by name of a run, "measured" by name of its samples

    @abstractmethod
    def measure(self, images: Tensor) -> Any:
        """Returns the figures of samples uint8 (N, C, H, W) of the held-out layouts, as JSON has them."""

    @abstractmethod
    def describe(self, figures: Any) -> str:
        """Returns the first of the figures in words."""

    def run(self, run: Run, guidance: float) -> None:
        """Trains a run and measures its samples, unless the results have it. ValueError: with other settings."""
        trained, measured = self.results["trained"], self.results["measured"]
        weights, name = self.folder / f"{run.name}.safetensors", samples_name(run.name, guidance)
        if run.name in trained:
            self.check_unchanged(run)
        if name in measured and (self.folder / f"{name}.npz").is_file():
            return
        if run.name not in trained or not weights.is_file():
            trained[run.name] = self.bench.train(run, weights)
            write_results(self.folder, self.results)  # an interrupted comparison resumes with what is missing
        images = self.bench.sample(run, weights, guidance, len(self.judged.real.items))
        self.save_samples(name, images)
        figures = self.measure(images)
        known = {"arm": run.arm, "seed": run.seed, "guidance": guidance, "run": run.name}
        measured[name] = {**known, "figures": figures}
        write_results(self.folder, self.results)
        print(f"{name}: {self.describe(figures)}", flush=True)

    def check_unchanged(self, run: Run) -> None:
        """Raises ValueError if a run was trained with other settings of its arm."""
        there = self.results["trained"][run.name]["settings"]
        now = {key: value for key, value in flatten_group(run.settings).items() if key in there}
        if differences := find_differences({"settings": there}, {"settings": now}, comparison_identity):
            text = format_differences(differences)
            raise ValueError(f"{self.folder} holds {run.name} with other settings ({text}): pass another --log_dir")

    def save_samples(self, name: str, images: Tensor) -> None:
        """Saves samples uint8 (N, C, H, W) as calc_layout.py reads them, and the first of them as a picture."""
        pixels = grey_to_rgb(images).permute(0, 2, 3, 1).numpy()
        with atomic_write(self.folder / f"{name}.npz") as scratch, scratch.open("wb") as file:
            np.savez(file, arr_0=pixels, held_out=np.array(self.judged.real.items))
        save_grid(self.folder / f"{name}.png", images[:GRID_IMAGES])

    def figures_of(self, arm: str, guidance: float = 1.0) -> list[Any]:
        """Returns what was measured of each run of an arm."""
        measured = self.results["measured"].values()
        return [each["figures"] for each in measured if (each["arm"], each["guidance"]) == (arm, guidance)]

    def save_picture(self, order: Order, names: Sequence[str] = (), *, maps: bool = False) -> None:
        """Saves a picture of some layouts, as `pair_images` shows them, with the sample of the first run of each arm,
        and the real scene."""
        columns, real, measured = {}, self.judged.real, self.results["measured"]
        alike = len({each["guidance"] for each in measured.values()}) == 1
        for name, each in sorted(measured.items(), key=lambda item: order(item[1])):
            heading = each["arm"] if alike or each["guidance"] == 1 else f"{each['arm']}, {each['guidance']:g}"
            if heading not in columns:
                columns[heading] = read_samples(self.folder / f"{name}.npz", None)["image"]
        columns[REAL_SCENES] = grey_to_rgb(real.images)
        rows = pair_images(real.layouts, [*columns.values()], names, maps=maps)
        headings = "map" if maps else "layout", *columns
        size, palette = tuple(real.images.shape[2:]), self.judged.measurement.palette or ()
        save_picture(self.folder / PICTURE, draw_rows(rows, size, self.judged.names, palette, headings))


def samples_name(run: str, guidance: float) -> str:
    """Returns the name of the samples of a run."""
    return run if guidance == 1 else f"{run}_guidance_{guidance:g}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows of cells as a table of Markdown; the first row is the heading."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ("---",) * len(rows[0]), *rows[1:]))
