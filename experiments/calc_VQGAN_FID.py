"""Reconstruction quality of a trained VQGAN on held-out images: rFID, PSNR, SSIM, LPIPS, L1, codebook usage, bits.

python experiments/calc_VQGAN_FID.py --dataset digits
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import _root
import torch
from torch import Tensor, nn

from experiments.harness.batches import ResumableBatches, gather_in_order, rank_indices
from experiments.harness.experiment import ExperimentSetup, FirstStageOutputConfig, run_experiment
from experiments.harness.first_stage import FirstStageModelConfig
from experiments.harness.report import progress, table
from experiments.metrics.distances import real_statistics, save_reconstructions, statistics_cache
from experiments.metrics.features import FeaturesConfig
from experiments.metrics.image_pairs import WINDOW
from experiments.metrics.reconstruction import (
    SHOWN_IMAGES,
    choose_lpips,
    measure_reconstructions,
    summarize_reconstructions,
)
from models.ranges import MILLION, check_ranges
from train.data.loading import ImageSource, build_dataset, fixed_subset, images_in_order
from train.datasets import Dataset, content_fingerprint
from train.distributed import DistContext
from train.files import atomic_write
from train.first_stage import VQGANStage
from train.runs import perceptual_provenance


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(FeaturesConfig):
    """Reconstructions."""

    split: Literal["train", "val"] = "val"
    """Split to reconstruct; all of its images are the reference of the Fréchet distance."""
    n_images: int | None = None
    """Number of images to reconstruct, a fixed random subset; if omitted, all."""
    lpips_net: Literal["auto", "vgg", "alex", "squeeze", "none"] = "auto"
    """LPIPS network; auto: the one the VQGAN was trained with, if any."""
    perceptual_weights: str | None = None
    """File of its ImageNet weights; if omitted, the one used in training, else torch's cache or a download."""
    batch_size: int = 50
    """Images reconstructed at once in each process; does not change the results."""

    EVERYDAY = ("split", "n_images", "features", "batch_size")
    RANGES = {"n_images": "[2, 1000000000]", "batch_size": MILLION}

    def __post_init__(self):
        check_ranges(self)
        if self.perceptual_weights is not None and self.lpips_net == "none":
            raise ValueError("got --perceptual_weights with --lpips_net none: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures a VQGAN's reconstructions; writes results.json, reconstructions.png and codes.png to
    <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/calc_VQGAN_FID.py --dataset mnist",
        "python experiments/calc_VQGAN_FID.py --load_dir vqgan_mnist --n_images 1000",
    )

    reconstruction: ReconstructionConfig
    model: FirstStageModelConfig
    output: FirstStageOutputConfig


def prepare(config: Config, model: VQGANStage, world: DistContext) -> ExperimentSetup:
    """Opens the images and the LPIPS network; results with another network are outdated. ValueError for an autoencoder
    without codes."""
    if not isinstance(model, VQGANStage):
        raise ValueError(f"the autoencoder in {model.run} has no codes to measure: pass it to reconstruct.py")
    settings = config.reconstruction
    dataset = build_dataset(model.data, model.reader, settings.split)
    origin = {"data_fingerprint": content_fingerprint(dataset)} | perceptual_provenance(settings.perceptual_weights)
    net, perceptual = choose_lpips(settings.lpips_net, settings.perceptual_weights, model.run)
    if any(world.any(perceptual is None)):  # all ranks measure the same, even if only one lacks the weights
        net, perceptual = "none", None
    cache = statistics_cache(config.output.logs_root)
    name = f"VQGAN_FID_{settings.split}"

    def is_of_this_net(results: dict[str, Any]) -> bool:
        return results["lpips_net"] == net

    return ExperimentSetup((settings, dataset, net, perceptual, cache), origin, name, is_current=is_of_this_net)


def measure(
    settings: ReconstructionConfig,
    dataset: Dataset,
    net: str,
    perceptual: nn.Module | None,
    cache: Path,
    model: VQGANStage,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Measures the reconstructions of a split, with LPIPS if there is a network, and saves the pictures. All ranks must
    call it; only the main rank gets the results."""
    data, size, world = model.data, settings.batch_size, batches.world
    if perceptual is not None:
        perceptual.to(model.device)
    features = settings.load(data, model.device)
    args = dataset, data, features, settings.inception_weights, cache, size, world
    reference = real_statistics(*args) if len(dataset) > 1 else None  # a covariance needs at least 2 images
    source = ImageSource(dataset, data)
    n = len(source) if settings.n_images is None else min(settings.n_images, len(source))
    own = images_in_order(source, size, rank_indices(world, sorted(fixed_subset(len(source), n)), size))
    metrics = gather_in_order(world, measure_reconstructions(model, own, features, perceptual))
    metrics = progress(metrics, n, "reconstructing", world.is_main)
    if not world.is_main:
        list(metrics)
        return None
    codebook_size = model.vqgan.quantizer.codebook_size
    numbers, counts = summarize_reconstructions(metrics, reference, codebook_size, math.prod(data.size))
    save_reconstructions(batches.folder / "reconstructions.png", model, source, min(n, SHOWN_IMAGES))
    results = {"metric": features.module.METRIC, **numbers, "codebook_size": codebook_size, "lpips_net": net}
    results |= {"split": settings.split, "n_reference": reference and reference.count, "features": features.name}
    results["run"] = batches.run
    plot(batches.folder / "codes.png", counts, results)
    return results


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the table of all metrics."""
    dataset, K = results["run"]["model"]["dataset"], results["codebook_size"]
    exact = f", without {results['exact_images']} exact reconstructions" if results["exact_images"] else ""
    used = round(results["codebook_usage"] * K)
    coded = f"lower is better; {results['entropy_coded_bits_per_pixel']:.4g} with entropy coding"
    against = f"lower is better; against all {results['n_reference']} originals"
    if results["rfd"] is None:
        against = f"left out: a covariance needs at least 2 images, got {results['n_images']}"
    rows = [
        ("metric", "value", ""),
        (f"r{results['metric']}", number(results["rfd"]), against),
        ("PSNR", number(results["psnr"], " dB"), f"higher is better; mean over images{exact}"),
        ("SSIM", number(results["ssim"]), f"higher is better, at most 1; images of at least {WINDOW}x{WINDOW}"),
        ("LPIPS", number(results["lpips"]), f"lower is better; network: {results['lpips_net']}"),
        ("L1", number(results["l1"]), "lower is better; of values in [-1, 1]"),
        ("codebook usage", number(100 * results["codebook_usage"], " %"), f"higher is better; {used} of {K} codes"),
        ("perplexity", number(results["perplexity"]), f"higher is better, at most {K}"),
        ("bits per pixel", number(results["bits_per_pixel"]), coded),
    ]
    where = f"{dataset}, {results['split']} split: {results['n_images']} images and their reconstructions"
    files = "\n".join(str(folder / name) for name in ("results.json", "reconstructions.png", "codes.png"))
    return f"\n{where}, features: {results['features']}\n{table(rows)}\n\n{files}"


def number(value: float | None, unit: str = "") -> str:
    """Formats a value to four significant digits, "-" for None."""
    return "-" if value is None else f"{value:.4g}{unit}"


def plot(path: Path, counts: Tensor, results: dict[str, Any]) -> None:
    """Plots the frequency of each code, in descending order; unused codes leave the right of the plot empty."""
    from matplotlib.figure import Figure  # not pyplot: no display is needed

    K = len(counts)
    frequencies = (counts / counts.sum()).sort(descending=True).values
    frequencies = frequencies.where(frequencies > 0, torch.nan)  # zeros cannot be shown on a logarithmic scale
    figure = Figure(figsize=(6.5, 4.2), dpi=150, layout="constrained")
    panel = figure.subplots()
    panel.stairs(frequencies.numpy(), torch.arange(K + 1).numpy(), baseline=None, color="#0072b2")
    panel.axhline(1 / K, color="0.4", linestyle="--", linewidth=1)
    place = {"transform": panel.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    panel.text(0.99, 1 / K, f"uniform: 1/{K}", color="0.3", **place)
    panel.set(yscale="log", xlim=(0, K), xlabel="codes, by descending frequency", ylabel="relative frequency")
    panel.grid(color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    title = f"Code usage: {100 * results['codebook_usage']:.4g} % of {K}, perplexity {results['perplexity']:.4g}\n"
    title += f"{results['n_images']} images ({results['split']} split)"
    panel.set_title(title, fontsize=11, loc="left")
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png")


if __name__ == "__main__":
    run_experiment("VQGAN_FID", Config, measure, report, files=("inception_weights", "clip_dir"), prepare=prepare)
