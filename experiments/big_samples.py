"""Canvases larger than the training grid: how they are made and kept, and what they cost."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from experiments.experiment import write_results
from experiments.kept import forget, kept_batches
from experiments.metrics.atomic import whole_file
from experiments.metrics.calls import counted
from experiments.progress import progress
from experiments.table import table
from train.cli import to_dict
from train.generate import TrainedSampler


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


def save_with_settings(path: Path, image: Tensor, settings: dict[str, Any]) -> None:
    """A PNG of an image (C, H, W) uint8 that holds, as its text "settings", the JSON of what made it."""
    notes = PngInfo()
    notes.add_text("settings", json.dumps(settings))
    with whole_file(path) as scratch:
        picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        picture.save(scratch, format="PNG", pnginfo=notes)


def cost_table(results: dict[str, Any]) -> str:
    rows = [
        ("cost", ""),
        ("network calls, of a batch", f"{results['network_calls_per_batch']:.0f}"),
        ("evaluations of the network, an image", f"{results['evaluations_per_image']:.1f}"),
        ("seconds, an image", f"{results['seconds_per_image']:.2f}"),
    ]
    return table(rows)
