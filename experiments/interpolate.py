"""Interpolates between pairs of images: mixes them, masks or noises the mixture in part, and redraws it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import _root
import torch
from torch import Tensor

from diffusion.inversion import ddim_inversion, slerp
from diffusion.rng import Streams, seed_of
from experiments.harness.batches import ResumableBatches
from experiments.harness.editing import (
    InputImages,
    InputImagesConfig,
    conditions_for,
    draw,
    encode_images,
    load_input_images,
    mean_abs_difference,
    redraw_input,
    save_comparison_grid,
    save_result_images,
)
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.inversion import check_invertible, ddim_steps, ddim_times, in_double_precision
from experiments.harness.report import progress, table
from models.ranges import NOT_NEGATIVE, check_ranges
from train.class_names import ClassLabel
from train.config import SamplingConfig
from train.distributed import DistContext
from train.loop import Batch
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class PairsConfig(InputImagesConfig):
    """Input images, in pairs."""

    n_images: int = 16
    """Number of held-out images, a fixed random subset."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_images % 2 or len(self.image) % 2:
            got = f"{len(self.image)} images" if self.image else f"n_images {self.n_images}"
            raise ValueError(f"got {got}, wanted pairs: pass two images as --image A B, or an even --n_images")


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """Interpolation path."""

    points: int = 7
    """Number of images on each path, both ends included."""
    strength: float = 0.5
    """How much of each mixture to redraw, in [0, 1]: the fraction of codes to mask, or the noise level to start at."""
    mix: Literal["images", "noise"] = "images"
    """What is mixed: the images, as pixels, codes or latents, or the noise from which DDIM returns to them, along an
    arc; Gaussian models only. --strength is then the level of that noise: 1 is pure noise."""
    label: ClassLabel | None = None
    """Class to draw, by name or number; if omitted, the label in the image's row of conditions. Without any condition,
    guidance is off."""

    EVERYDAY = ("points", "strength")
    RANGES = {"points": "[2, 65536]", "strength": "[0, 1]", "label": NOT_NEGATIVE}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Interpolates between pairs of images; writes interpolated.png (first | path | second), images/ and results.json
    to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/interpolate.py --sampler {sampler} --dataset mnist",
        "python experiments/interpolate.py --load_dir {sampler}_mnist --image one.png seven.png --points 9",
    )

    given: PairsConfig
    path: PathConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Loads the images. ValueError: the model does not support the class."""
    label, sampling = config.path.label, config.sampling
    if config.path.mix == "noise":
        check_invertible(model, sampling)
    inputs = load_input_images(config.given.image, config.given.n_images, model, sampling.condition_file)
    _, options = conditions_for(model, inputs, [0], None if label is None else [label], sampling)
    if config.path.mix == "noise":
        ddim_times(model, options, config.path.strength)
    return ExperimentSetup((inputs, config.path, config.sampling), {"given_images": inputs.fingerprint})


def conditions_of_pairs(
    pairs: list[int], inputs: InputImages, path: PathConfig, sampling: SamplingConfig, model: TrainedSampler
) -> tuple[Batch | None, SamplingConfig]:
    """Returns the conditions of results of these pairs, and matching options: those of the first image of each."""
    labels = None if path.label is None else [path.label] * len(pairs)
    return conditions_for(model, inputs, [2 * pair for pair in pairs], labels, sampling)


def draw_between_noise(
    pairs: list[int],
    fractions: list[float],
    inputs: InputImages,
    path: PathConfig,
    sampling: SamplingConfig,
    model: TrainedSampler,
) -> dict[str, Tensor]:
    """Returns "image", uint8 (B, C, H, W), from noise at fractions of the way between the images of pairs, one each,
    and "residual" (B,), the error of the worst step of their inversion.

    ValueError: what it found, or what it leads to, is not finite.
    """
    inverted, noises, residuals = sorted({*pairs}), [], []
    for side in (0, 1):
        x0 = in_double_precision(encode_images(inputs.image[[2 * pair + side for pair in inverted]], model))
        conditions, options = conditions_of_pairs(inverted, inputs, path, sampling, model)
        with model.inference():
            ddim = ddim_steps(model, options, conditions, x0, path.strength)
            found = ddim_inversion(ddim.denoise, ddim.process, x0, ddim.times)
        noises.append(found.states[-1])
        residuals.append(found.residual.amax(0))
    rows = [inverted.index(pair) for pair in pairs]
    ends = [noise[rows].split(1) for noise in noises]
    x = torch.cat([slerp(a, b, fraction) for a, b, fraction in zip(*ends, fractions, strict=True)])
    conditions, options = conditions_of_pairs(pairs, inputs, path, sampling, model)
    with model.inference():
        x0 = ddim_steps(model, options, conditions, x, path.strength).sample(x)
        if not all(each.isfinite().all() for each in (x, x0)):
            remedy = "pass more --sample_steps, --no_amp, less --guidance, or --mix images"
            raise ValueError(f"mix noise gave values that are not finite: {remedy}")
        image = model.space.decode(x0.float()).cpu()
    return {"image": image, "residual": torch.maximum(*residuals)[rows].cpu()}


def measure(
    inputs: InputImages, path: PathConfig, sampling: SamplingConfig, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any] | None:
    """Interpolates between images 0 and 1, 2 and 3, ..., saves the paths and measures distances. All ranks must call
    it; only the main rank gets the results."""
    points, strength, pairs = path.points, path.strength, len(inputs) // 2

    def draw_points(numbers: list[int]) -> dict[str, Tensor]:
        rows, fractions = [n // points for n in numbers], [n % points / (points - 1) for n in numbers]
        if path.mix == "noise":
            return draw_between_noise(rows, fractions, inputs, path, sampling, model)
        ends = [encode_images(inputs.image[[2 * row + side for row in rows]], model) for side in (0, 1)]
        x0 = []
        for i, (row, fraction) in enumerate(zip(rows, fractions, strict=True)):  # all points of a pair share its noise
            rng = Streams([seed_of(batches.seed, "between", row)], model.device)
            x0.append(model.space.interpolate(ends[0][i : i + 1], ends[1][i : i + 1], fraction, rng))
        start = redraw_input(torch.cat(x0), model, strength)
        conditions, options = conditions_of_pairs(rows, inputs, path, sampling, model)
        return {"image": draw(model, options, batches.seed, start, rows, conditions)}

    resumed = batches.resume("interpolated", range(pairs * points), draw_points)
    parts = list(progress(resumed, pairs * points, "interpolated", batches.world.is_main))
    if not batches.world.is_main:
        return None
    paths = torch.cat([part["image"] for part in parts])
    paths = paths.view(pairs, points, *paths.shape[1:])
    first, last = inputs.image[0 : 2 * pairs : 2], inputs.image[1 : 2 * pairs : 2]
    names = tuple(f"{inputs.names[2 * i]}_{Path(inputs.names[2 * i + 1]).stem}" for i in range(pairs))
    save_result_images(batches.folder, names, paths, [str(k) for k in range(points)], batches.run)
    save_comparison_grid(batches.folder / "interpolated.png", first, paths, last)
    rows = []
    for k in range(points):
        row = {
            "share": k / (points - 1),
            "to_first": mean_abs_difference(paths[:, k], first),
            "to_last": mean_abs_difference(paths[:, k], last),
        }
        to_next = mean_abs_difference(paths[:, k], paths[:, k + 1]) if k + 1 < points else None
        rows.append(row | {"to_next": to_next})
    residual = {}
    if path.mix == "noise":
        residual["residual"] = torch.cat([part["residual"] for part in parts]).max().item()
    return {"n_pairs": pairs, "strength": strength, "points": rows, **residual, "run": batches.run}


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the distances of the points of the paths to their ends and to the next point."""
    rows = [("weight of the second image", "distance to the first", "to the second", "to the next point")]
    for row in results["points"]:
        numbers = (
            "" if row[name] is None else f"{100 * row[name]:.1f} %" for name in ("to_first", "to_last", "to_next")
        )
        rows.append((f"{100 * row['share']:.0f} %", *numbers))
    summary = f"{results['n_pairs']} pairs, strength {results['strength']:g}; mean absolute differences, % of the range"
    if "residual" in results:
        summary += f"; error of a step of the inversion: at most {results['residual']:.2g}"
    return f"\n{summary}\n{table(rows)}\n\n{folder / 'interpolated.png'}\n{folder / 'images'}"


if __name__ == "__main__":
    run_experiment("interpolated", Config, measure, report, prepare=prepare)
