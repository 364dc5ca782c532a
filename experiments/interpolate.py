"""Walks from one image to another: mixed, forgotten in part, and drawn again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import torch
from torch import Tensor

from diffusion.rng import Streams, seed_of
from experiments.harness.batches import ResumableBatches
from experiments.harness.editing import (
    InputImages,
    InputImagesConfig,
    check_strength,
    conditions_for,
    draw,
    encode_images,
    generate_in_batches,
    load_input_images,
    mean_abs_difference,
    redraw_input,
    save_comparison_grid,
    save_result_images,
)
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.report import table
from train.config import SamplingConfig
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class PairsConfig(InputImagesConfig):
    """Images to begin from, two for each walk."""

    n_images: int = 16
    """So many held-out images, drawn at random, always the same."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_images % 2 or len(self.image) % 2:
            got = f"{len(self.image)} images" if self.image else f"n_images {self.n_images}"
            raise ValueError(f"got {got}, wanted pairs: name two as --image A B, or pass an even --n_images")


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """The walk."""

    points: int = 7
    """Images on it, both ends included."""
    strength: float = 0.5
    """How much of a mixture is forgotten before it is drawn, 0 to 1: the share of its codes, or of noise put on it."""
    label: int | None = None
    """The class to draw; left out, the one in the image's row of conditions, if any. With no condition at all,
    guidance is 1."""

    def __post_init__(self):
        check_strength(self.strength)
        if self.points < 2:
            raise ValueError(f"got points {self.points}, wanted at least 2, the ends: pass --points N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Interpolates between images; interpolated.png (first | the walk | second), images/ and results.json lie in
    <logs_root>/<log_dir>."""

    given: PairsConfig
    path: PathConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """The images. ValueError for a class that the model does not know."""
    label, sampling = config.path.label, config.sampling
    inputs = load_input_images(config.given.image, config.given.n_images, model, sampling.condition_file)
    conditions_for(model, inputs, [0], None if label is None else [label], sampling)
    return ExperimentSetup((inputs, config.path, config.sampling), {"given_images": inputs.fingerprint})


def measure(
    inputs: InputImages, path: PathConfig, sampling: SamplingConfig, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any] | None:
    """Between images 0 and 1, 2 and 3, ...: the pictures, and how far they are from their ends. On the main rank alone;
    the others take part."""
    points, strength, pairs = path.points, path.strength, len(inputs) // 2

    def draw_points(places: list[int]) -> Tensor:
        rows, shares = [place // points for place in places], [place % points / (points - 1) for place in places]
        ends = [encode_images(inputs.image[[2 * row + side for row in rows]], model) for side in (0, 1)]
        x0 = []
        for i, (row, share) in enumerate(zip(rows, shares, strict=True)):  # all of a pair's points share its noise
            rng = Streams([seed_of(batches.seed, "between", row)], model.device)
            x0.append(model.space.between(ends[0][i : i + 1], ends[1][i : i + 1], share, rng))
        start = redraw_input(torch.cat(x0), model, strength)
        labels = None if path.label is None else [path.label] * len(places)
        conditions, options = conditions_for(model, inputs, [2 * row for row in rows], labels, sampling)
        return draw(model, options, batches.seed, start, rows, conditions)

    made = generate_in_batches("interpolated", pairs * points, draw_points, batches)
    if made is None:
        return None
    made = made.view(pairs, points, *made.shape[1:])
    first, last = inputs.image[0 : 2 * pairs : 2], inputs.image[1 : 2 * pairs : 2]
    names = tuple(f"{inputs.names[2 * i]}_{Path(inputs.names[2 * i + 1]).stem}" for i in range(pairs))
    save_result_images(batches.folder, names, made, [str(k) for k in range(points)], batches.run)
    save_comparison_grid(batches.folder / "interpolated.png", first, made, last)
    found = {"n_pairs": pairs, "strength": strength, "points": []}
    for k in range(points):
        row = {
            "share": k / (points - 1),
            "to_first": mean_abs_difference(made[:, k], first),
            "to_last": mean_abs_difference(made[:, k], last),
        }
        found["points"].append(
            row | {"to_next": mean_abs_difference(made[:, k], made[:, k + 1]) if k + 1 < points else None}
        )
    return found | {"run": batches.run}


def report(results: dict[str, Any], folder: Path) -> str:
    """How far the points of the walks are from their ends and from each other, and where the pictures are."""
    rows = [("share of the second", "distance to the first", "to the second", "to the next point")]
    for row in results["points"]:
        numbers = (
            "" if row[name] is None else f"{100 * row[name]:.1f} %" for name in ("to_first", "to_last", "to_next")
        )
        rows.append((f"{100 * row['share']:.0f} %", *numbers))
    asked = f"{results['n_pairs']} pairs, {100 * results['strength']:.0f} % forgotten"
    return f"\n{asked}\n{table(rows)}\n\n{folder / 'interpolated.png'}\n{folder / 'images'}"


if __name__ == "__main__":
    run_experiment("interpolated", Config, measure, report, prepare=prepare)
