"""Samples images larger than those in training: the whole canvas at once, or by windows of the training grid."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import save_with_settings
from experiments.harness.layout_inputs import LayoutInputs, open_layouts
from experiments.harness.report import progress, table
from experiments.metrics.cost import count_nfe
from experiments.metrics.layout.layout_pictures import PictureRows, save_picture
from models.ranges import COUNT, SIZE, check_ranges
from train.config import SamplingConfig
from train.distributed import DistContext
from train.layouts import write_layouts
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class CanvasConfig:
    """Canvas."""

    shape: tuple[int, int] = (32, 16)
    """Height and width in codes or latents, or in pixels for models of pixels."""
    window_stride: int | None = None
    """Stride between windows, in codes or latents; if omitted, half of the training grid, or the whole canvas at once
    for networks with relative positions."""
    layouts: str | None = None
    """File or folder of layouts of the whole canvas, used in turn; as of get_samples.py."""
    n_samples: int = 4
    """Number of images."""

    EVERYDAY = ("shape", "layouts", "n_samples")
    RANGES = {"shape": SIZE, "window_stride": SIZE, "n_samples": COUNT}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Samples larger canvases; writes each as <logs_root>/<log_dir>/big_<number>.png, with its settings as metadata;
    with --layouts also layouts.json and layouts.png."""

    EXAMPLES = (
        "python experiments/generate_big_samples.py --sampler {sampler} --dataset mnist --shape 32 16",
        "python experiments/generate_big_samples.py --load_dir {sampler}_mnist --n_samples 1",
    )

    canvas: CanvasConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Passes on the canvas and its layouts, so that what the model does not support is refused before the folder is
    created."""
    canvas, sampling, inputs = config.canvas, config.sampling, None
    options = {"shape": canvas.shape, "window_stride": canvas.window_stride, "timed": True}
    if canvas.layouts is not None:
        height, width = (model.space.factor * side for side in canvas.shape)
        inputs = open_layouts(canvas.layouts, model, sampling, (height, width))
        options |= {"provenance": inputs.provenance, "source": inputs.source}
    return ExperimentSetup((canvas, sampling, inputs), **options)


def measure(
    canvas: CanvasConfig,
    sampling: SamplingConfig,
    inputs: LayoutInputs | None,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Saves the canvases as big_<number>.png and measures their cost. All ranks must call it; only the main rank gets
    the results."""
    source = model.condition_source(sampling) if inputs is None else inputs.source
    size = {"shape": canvas.shape, "window_stride": canvas.window_stride}

    def make(indices: list[int]) -> dict[str, Tensor]:
        start = time.perf_counter()
        with count_nfe(model.sampler.network) as nfe:
            batch = model.draw(indices, batches.seed, sampling, source.draw(batches.seed, indices), **size)
        seconds = time.perf_counter() - start
        cost = torch.tensor([nfe.calls, nfe.evaluations, seconds], dtype=torch.float64)
        return {"image": batch["image"], "spent": cost}

    resumed = batches.resume("canvas", range(canvas.n_samples), make)
    written, costs, pictures = 0, [], None if inputs is None else PictureRows(inputs)
    for batch in progress(resumed, canvas.n_samples, "sampling", model.world.is_main):
        if pictures is not None:
            pictures.add(batch["image"])
        for image in batch["image"]:
            path = batches.folder / f"big_{written:03d}.png"
            save_with_settings(path, image, batches.run | {"number": written})
            written += 1
        costs.append(batch["spent"])
    if not model.world.is_main:
        return None
    if pictures is not None:
        write_layouts(batches.folder, inputs.layouts, inputs.vocabulary)
        save_picture(batches.folder / "layouts.png", pictures.draw())
    total = torch.stack(costs)  # (batches, 3)
    return {
        "n_samples": canvas.n_samples,
        "network_calls_per_batch": total[:, 0].max().item(),
        "evaluations_per_image": total[:, 1].sum().item() / canvas.n_samples,
        "seconds_per_image": total[:, 2].sum().item() / canvas.n_samples,
        "run": batches.run,
    }


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the cost of the images."""
    size = " x ".join(map(str, results["run"]["canvas"]["shape"]))
    rows = [
        ("cost", ""),
        ("network calls per batch", f"{results['network_calls_per_batch']:.0f}"),
        ("evaluations per image", f"{results['evaluations_per_image']:.1f}"),
        ("seconds per image", f"{results['seconds_per_image']:.2f}"),
    ]
    return f"\n{results['n_samples']} images of {size}\n{table(rows)}\n\n{folder}"


if __name__ == "__main__":
    run_experiment("big_samples", Config, measure, report, prepare=prepare)
