"""How well a trained VQGAN rebuilds images it was not trained on: rFID, PSNR, SSIM, LPIPS, L1, use of its codes, bits.

python experiments/calc_VQGAN_FID.py --dataset digits
"""

from dataclasses import dataclass
from typing import Literal

import _root

from experiments.harness.batches import experiment_world
from experiments.harness.experiment import (
    FirstStageModelConfig,
    FirstStageOutputConfig,
    load_vqgan,
    open_vqgan_results,
    saved_report,
    settings_of_vqgan_run,
)
from experiments.metrics.reconstruction import chosen_perceptual, measure, print_report
from train.cli.parse import run_script
from train.data.loading import build_dataset
from train.runs import perceptual_origin


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Reconstructions."""

    split: Literal["train", "val"] = "val"
    """Images that are rebuilt; all of this split are the reference of the distance."""
    n_images: int | None = None
    """Rebuild so many of them, always the same, drawn at random; all if left out."""
    features: str = "auto"
    """A file of experiments/metrics/features, or auto: the data set's own, inception, or pixels with a warning."""
    inception_weights: str | None = None
    """Path of torch-fidelity's Inception weights; left out, its cache or download."""
    lpips_net: Literal["auto", "vgg", "alex", "squeeze", "none"] = "auto"
    """Network of LPIPS; auto: the one that the VQGAN trained with, if any."""
    perceptual_weights: str | None = None
    """File of its ImageNet weights; left out, the one trained with, or torch's cache or download."""
    batch_size: int = 50
    """Images rebuilt at once in each process; no number depends on it."""

    def __post_init__(self):
        if self.n_images is not None and self.n_images < 2:
            raise ValueError(f"got n_images {self.n_images}, wanted at least 2: pass --n_images N")
        if self.batch_size < 1:
            raise ValueError(f"got batch_size {self.batch_size}, wanted at least 1: pass --batch_size N")
        if self.perceptual_weights is not None and self.lpips_net == "none":
            raise ValueError("got --perceptual_weights with --lpips_net none: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures a VQGAN's reconstructions; results.json, reconstructions.png, codes.png lie in <logs_root>/<log_dir>."""

    reconstruction: ReconstructionConfig
    model: FirstStageModelConfig
    output: FirstStageOutputConfig


def main(config: Config) -> None:
    c, output = config.reconstruction, config.output
    with experiment_world(output.device) as world:
        first = load_vqgan(config.model, output.logs_root, world.device, output.amp)
        dataset = build_dataset(first.data, first.reader, c.split)
        origin = {"images": dataset.fingerprint()} | perceptual_origin(c.perceptual_weights)
        folder = open_vqgan_results(f"VQGAN_FID_{c.split}", config, first, origin, world)
        name, perceptual = chosen_perceptual(c.lpips_net, c.perceptual_weights, first.run)
        if any(world.any(perceptual is None)):  # all measure the same, also where one machine lacks the weights
            name, perceptual = "none", None
        results = saved_report(folder, world)
        if results is None or results["lpips_net"] != name:
            results = measure(config, first, dataset, name, perceptual, folder, world)
        if results is not None:
            print_report(results, folder)


if __name__ == "__main__":
    run_script(main, Config, "calc_VQGAN_FID", under=settings_of_vqgan_run)
