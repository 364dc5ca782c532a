"""Images larger than those a sampler was trained on: one pass over a larger canvas of codes, or windows of its grid."""

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
from experiments.harness.report import progress, table
from experiments.metrics.cost import count_nfe
from train.config import SamplingConfig
from train.distributed import DistContext
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class CanvasConfig:
    """Canvas."""

    shape: tuple[int, int] = (32, 16)
    """Height and width in codes or latents, or in pixels of models of pixels."""
    window_stride: int | None = None
    """Codes from one window to the next; left out, the whole canvas at once where positions are relative, else half the
    grid."""
    n_samples: int = 4
    """Number of images."""

    def __post_init__(self):
        if min(self.shape) < 1 or self.n_samples < 1:
            raise ValueError(f"got shape {self.shape}, n_samples {self.n_samples}: wanted at least 1 of each")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Samples larger canvases; each becomes <logs_root>/<log_dir>/big_<number>.png, which holds its settings."""

    canvas: CanvasConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """A canvas that the model cannot draw is refused before there is a folder."""
    canvas = config.canvas
    return ExperimentSetup((canvas, config.sampling), shape=canvas.shape, window_stride=canvas.window_stride)


def measure(
    canvas: CanvasConfig, sampling: SamplingConfig, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any] | None:
    """big_<number>.png of each canvas, and what they cost. On the main rank alone; the others take part."""
    source, how = model.condition_source(sampling), {"shape": canvas.shape, "window_stride": canvas.window_stride}

    def made(indices: list[int]) -> dict[str, Tensor]:
        begun = time.perf_counter()
        with count_nfe(model.sampler.network) as nfe:
            batch = model.draw(indices, batches.seed, sampling, source.draw(batches.seed, indices), **how)
        seconds = time.perf_counter() - begun
        spent = torch.tensor([nfe.calls, nfe.evaluations, seconds], dtype=torch.float64)
        return {"image": batch["image"], "spent": spent}

    drawn = batches.resume("canvas", range(canvas.n_samples), made)
    written, spent = 0, []
    for batch in progress(drawn, canvas.n_samples, "sampling", model.world.is_main):
        for image in batch["image"]:
            path = batches.folder / f"big_{written:03d}.png"
            save_with_settings(path, image, batches.run | {"number": written})
            written += 1
        spent.append(batch["spent"])
    if not model.world.is_main:
        return None
    total = torch.stack(spent)  # (batches, 3)
    return {
        "n_samples": canvas.n_samples,
        "network_calls_per_batch": total[:, 0].max().item(),
        "evaluations_per_image": total[:, 1].sum().item() / canvas.n_samples,
        "seconds_per_image": total[:, 2].sum().item() / canvas.n_samples,
        "run": batches.run,
    }


def report(results: dict[str, Any], folder: Path) -> str:
    """What the images cost, and where they are."""
    size = " x ".join(map(str, results["run"]["canvas"]["shape"]))
    rows = [
        ("cost", ""),
        ("network calls, of a batch", f"{results['network_calls_per_batch']:.0f}"),
        ("evaluations of the network, an image", f"{results['evaluations_per_image']:.1f}"),
        ("seconds, an image", f"{results['seconds_per_image']:.2f}"),
    ]
    return f"\n{results['n_samples']} images of {size}\n{table(rows)}\n\n{folder}"


if __name__ == "__main__":
    run_experiment("big_samples", Config, measure, report, prepare=prepare)
