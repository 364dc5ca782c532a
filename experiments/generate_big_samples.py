"""Images larger than those a sampler was trained on: one pass over a larger canvas of codes, or windows of its grid."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import torch
from torch import Tensor

from experiments.harness.batches import experiment_world, forget, kept_batches
from experiments.harness.experiment import (
    ModelConfig,
    OutputConfig,
    load_model,
    open_results,
    saved_report,
    settings_of_run,
    write_results,
)
from experiments.harness.images import save_with_settings
from experiments.harness.report import progress, table
from experiments.metrics.cost import counted
from train.cli.parse import run_script, to_dict
from train.config import SamplingConfig
from train.inference import TrainedSampler


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


def main(config: Config) -> None:
    canvas = config.canvas
    how = {"shape": canvas.shape, "window_stride": canvas.window_stride}
    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        folder = open_results("big_samples", config, trained, **how)
        results = saved_report(folder, world) or sample(config, trained, folder)
        if results is not None:
            size = " x ".join(map(str, canvas.shape))
            print(f"\n{canvas.n_samples} images of {size}\n{cost_table(results)}\n\n{folder}")


def sample(config, trained: TrainedSampler, folder: Path) -> dict[str, Any] | None:
    """big_<number>.png of each canvas, and results.json. In the main process alone; the others take part."""
    canvas, output, world = config.canvas, config.output, trained.world
    held_out, how = trained.held_out(), {"shape": canvas.shape, "window_stride": canvas.window_stride}

    def made(indices: list[int]) -> dict[str, Tensor]:
        begun = time.perf_counter()
        with counted(trained.sampler.network) as cost:
            batch = trained.draw(indices, output.seed, config.sampling, held_out=held_out, **how)
        seconds = time.perf_counter() - begun
        spent = torch.tensor([cost.calls, cost.evaluations, seconds], dtype=torch.float64)
        return {"image": batch["image"], "spent": spent}

    run = to_dict(config) | {"step": trained.step} | trained.origin
    batches = kept_batches(folder, "canvas", list(range(canvas.n_samples)), output.batch_size, made, world)
    written, spent = 0, []
    for batch in progress(batches, canvas.n_samples, "sampling", world.is_main):
        for image in batch["image"]:
            save_with_settings(folder / f"big_{written:03d}.png", image, run | {"number": written})
            written += 1
        spent.append(batch["spent"])
    if not world.is_main:
        return None
    total = torch.stack(spent)  # (batches, 3)
    results = {
        "n_samples": canvas.n_samples,
        "network_calls_per_batch": total[:, 0].max().item(),
        "evaluations_per_image": total[:, 1].sum().item() / canvas.n_samples,
        "seconds_per_image": total[:, 2].sum().item() / canvas.n_samples,
        "run": run,
    }
    write_results(folder, results)
    forget(folder)
    return results


def cost_table(results: dict[str, Any]) -> str:
    rows = [
        ("cost", ""),
        ("network calls, of a batch", f"{results['network_calls_per_batch']:.0f}"),
        ("evaluations of the network, an image", f"{results['evaluations_per_image']:.1f}"),
        ("seconds, an image", f"{results['seconds_per_image']:.2f}"),
    ]
    return table(rows)


if __name__ == "__main__":
    run_script(main, Config, "generate_big_samples", under=settings_of_run)
