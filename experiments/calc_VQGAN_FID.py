"""How well a trained VQGAN rebuilds images it was not trained on: rFID, PSNR, SSIM, LPIPS, L1, use of its codes, bits.

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
from experiments.harness.experiment import (
    ExperimentSetup,
    FirstStageModelConfig,
    FirstStageOutputConfig,
    run_experiment,
)
from experiments.harness.report import progress, table
from experiments.metrics import features as all_features
from experiments.metrics.distances import real_statistics, save_reconstructions, statistics_cache
from experiments.metrics.image_pairs import WINDOW
from experiments.metrics.reconstruction import (
    SHOWN_IMAGES,
    choose_lpips,
    measure_reconstructions,
    summarize_reconstructions,
)
from train.data.loading import ImageSource, build_dataset, fixed_subset, images_in_order
from train.datasets import Dataset
from train.distributed import DistContext
from train.files import atomic_write
from train.first_stage import FirstStage
from train.runs import perceptual_provenance


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


def prepare(config: Config, model: FirstStage, world: DistContext) -> ExperimentSetup:
    """The images of the split and the network of LPIPS; a report by another network is outdated."""
    settings = config.reconstruction
    dataset = build_dataset(model.data, model.reader, settings.split)
    origin = {"images": dataset.fingerprint()} | perceptual_provenance(settings.perceptual_weights)
    net, perceptual = choose_lpips(settings.lpips_net, settings.perceptual_weights, model.run)
    if any(world.any(perceptual is None)):  # all measure the same, also where one machine lacks the weights
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
    model: FirstStage,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """All that one report says of the images of a split, LPIPS by `perceptual` where there is one, and its pictures. On
    the main rank alone; the others take part."""
    data, size, world = model.data, settings.batch_size, batches.world
    if perceptual is not None:
        perceptual.to(model.device)
    features = all_features.choose_features(settings.features, data, model.device, settings.inception_weights)
    reference = real_statistics(dataset, data, features, settings.inception_weights, cache, size, world)
    source = ImageSource(dataset, data)
    n = len(source) if settings.n_images is None else min(settings.n_images, len(source))
    own = images_in_order(source, size, rank_indices(world, sorted(fixed_subset(len(source), n)), size))
    found = gather_in_order(world, measure_reconstructions(model, own, features, perceptual))
    found = progress(found, n, "reconstructing", world.is_main)
    if not world.is_main:
        list(found)
        return None
    codebook_size = model.vqgan.quantizer.codebook_size
    numbers, chosen = summarize_reconstructions(found, reference, codebook_size, math.prod(data.size))
    save_reconstructions(batches.folder / "reconstructions.png", model, source, min(n, SHOWN_IMAGES))
    results = {"metric": features.module.METRIC, **numbers, "codebook_size": codebook_size, "lpips_net": net}
    results |= {"split": settings.split, "n_reference": reference.count, "features": features.name, "run": batches.run}
    plot(batches.folder / "codes.png", chosen, results)
    return results


def report(results: dict[str, Any], folder: Path) -> str:
    """The table a person reads."""
    dataset, K = results["run"]["model"]["dataset"], results["codebook_size"]
    exact = f"; without {results['exact_images']} images rebuilt exactly" if results["exact_images"] else ""
    used = round(results["codebook_usage"] * K)
    coded = f"{results['entropy_coded_bits_per_pixel']:.4g} if coded by how often each is chosen"
    rows = [
        ("measure", "value", ""),
        (f"r{results['metric']}", number(results["rfd"]), f"to the {results['n_reference']} originals, 0 at best"),
        ("PSNR", number(results["psnr"], " dB"), f"mean over images, of levels 0 to 255{exact}"),
        ("SSIM", number(results["ssim"]), f"mean over images of at least {WINDOW}x{WINDOW}, 1 at best"),
        ("LPIPS", number(results["lpips"]), f"network: {results['lpips_net']}; 0 at best"),
        ("L1", number(results["l1"]), "of values in [-1, 1]"),
        ("codebook usage", number(100 * results["codebook_usage"], " %"), f"{used} of {K} codes"),
        ("perplexity", number(results["perplexity"]), f"of at most {K}"),
        ("bits per pixel", number(results["bits_per_pixel"]), coded),
    ]
    where = f"{dataset}, {results['split']} split: {results['n_images']} images and their reconstructions"
    files = "\n".join(str(folder / name) for name in ("results.json", "reconstructions.png", "codes.png"))
    return f"\n{where}, features: {results['features']}\n{table(rows)}\n\n{files}"


def number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.4g}{unit}"


def plot(path: Path, chosen: Tensor, results: dict[str, Any]) -> None:
    """How often each code is chosen, from the most frequent on; codes never chosen leave the right of it empty."""
    from matplotlib.figure import Figure  # without pyplot: a PNG is drawn by Agg, and no window is asked for

    K = len(chosen)
    shares = (chosen / chosen.sum()).sort(descending=True).values
    shares = shares.where(shares > 0, torch.nan)  # what is never chosen has no place on a logarithmic scale
    figure = Figure(figsize=(6.5, 4.2), dpi=150, layout="constrained")
    panel = figure.subplots()
    panel.stairs(shares.numpy(), torch.arange(K + 1).numpy(), baseline=None, color="#0072b2")
    panel.axhline(1 / K, color="0.4", linestyle="--", linewidth=1)
    place = {"transform": panel.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    panel.text(0.99, 1 / K, f"if all were alike: 1/{K}", color="0.3", **place)
    panel.set(yscale="log", xlim=(0, K), xlabel="codes, the most frequent first", ylabel="share of all positions")
    panel.grid(color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    title = f"Codes: {100 * results['codebook_usage']:.4g} % of {K} used, perplexity {results['perplexity']:.4g}\n"
    title += f"{results['n_images']} images ({results['split']} split)"
    panel.set_title(title, fontsize=11, loc="left")
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png")


if __name__ == "__main__":
    run_experiment("VQGAN_FID", Config, measure, report, files=("inception_weights",), prepare=prepare)
