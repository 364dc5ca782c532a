"""Reconstruction metrics of a VQGAN on a split: image quality, codebook usage and bits."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.metrics.distances import Batches
from experiments.metrics.features import Features
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.image_pairs import WINDOW, l1, psnr, ssim
from train.data.transforms import to_float
from train.datasets._channels import PICTURES
from train.first_stage import VQGANStage
from train.runs import read_run
from vq.perceptual import load_perceptual
from vq.quantizer import count_codes, perplexity, usage

SHOWN_IMAGES = 16  # columns of the grid of reconstructions
LPIPS = ("vgg", "alex", "squeeze")


def measure_reconstructions(
    first_stage: VQGANStage, batches: Batches, features: Features, perceptual: nn.Module | None
) -> Iterator[dict[str, Tensor]]:
    """Yields, for each batch of "image" uint8 (B, C, H, W), the metrics of its reconstructions, on the CPU.

    "l1", "psnr", "ssim" (for images at least as large as its window) and "lpips" (if there is a network), each float64
    (B,); "ids" int32 (B, h w); "features" (B, D).
    """
    for batch in batches:
        real = batch["image"].to(first_stage.device)
        ids = first_stage.encode(real)
        fake = first_stage.decode(ids)
        metrics = {"l1": l1(real, fake), "psnr": psnr(real, fake)}
        if min(real.shape[2:]) >= WINDOW:
            metrics["ssim"] = ssim(real, fake)
        if perceptual is not None:
            metrics["lpips"] = perceptual(to_float(real), to_float(fake))
        metrics = {name: value.cpu().double() for name, value in metrics.items()}
        metrics["ids"] = ids.flatten(1).int().cpu()
        yield metrics | {"features": features.extract(fake).cpu()}


def summarize_reconstructions(
    batches: Batches, reference: Statistics | None, codebook_size: int, pixels: int
) -> tuple[dict[str, Any], Tensor]:
    """Summarises batches of `measure_reconstructions`: the numbers of a report (None if not measured) and the counts of
    the codes (K,).

    `reference` is None if there are too few images for one.
    `pixels` is the height times the width of an image. Images reconstructed exactly have infinite PSNR: they are
    counted as `exact_images`, and the mean PSNR is over the others.
    """
    statistics, counts, codes = Statistics(), torch.zeros(codebook_size, dtype=torch.float64), 0
    parts: dict[str, list[Tensor]] = {"l1": [], "psnr": [], "ssim": [], "lpips": []}
    for batch in batches:
        statistics.update(batch["features"])
        counts += count_codes(batch["ids"], codebook_size)
        codes = batch["ids"].shape[1]
        for name in parts.keys() & batch.keys():
            parts[name].append(batch[name])
    values = {name: torch.cat(each) for name, each in parts.items() if each}
    exact = values["psnr"].isinf()
    values["psnr"] = values["psnr"][~exact]
    means = {name: values[name].mean().item() if len(values.get(name, ())) else None for name in parts}
    effective_codes = perplexity(counts).item()
    return {
        "rfd": frechet_distance(statistics, reference) if reference and statistics.has_covariance else None,
        **means,
        "exact_images": int(exact.sum()),
        "codebook_usage": usage(counts).item(),
        "perplexity": effective_codes,
        "bits_per_pixel": codes * math.log2(codebook_size) / pixels,
        "entropy_coded_bits_per_pixel": codes * math.log2(effective_codes) / pixels,
        "n_images": len(values["l1"]),
    }, counts


def choose_lpips(net: str, weights: str | None, run: Path) -> tuple[str, nn.Module | None]:
    """Returns the (name, module) of --lpips_net; auto is the network the run trained with, or none, with a message.

    ValueError: --perceptual_weights is given but there is no network to load it into.
    """
    content = read_run(run)
    n_channels = content.get("data", {}).get("n_channels", 3)
    if n_channels not in PICTURES and net != "none":
        reason = f"it takes grey or RGB images, not {n_channels} channels"
        if net != "auto":
            raise ValueError(f"got --lpips_net {net}, but {reason}: pass --lpips_net none")
        print(f"LPIPS skipped: {reason}", flush=True)
        return "none", None
    if net != "auto":
        return load_perceptual(net, weights)
    loss = content.get("loss", {})
    trained = loss.get("perceptual_net", "none") if loss.get("perceptual_weight", 1.0) else "none"
    remedy = f"pass --lpips_net {', '.join(LPIPS)}"
    if trained not in LPIPS:
        if weights is not None:
            raise ValueError(f"got --perceptual_weights, but {run} trained without an LPIPS network: {remedy} as well")
        print(
            f"LPIPS skipped: {run.name} was trained with --perceptual_net {trained}; {remedy} to measure it", flush=True
        )
        return "none", None
    if weights is not None:
        return load_perceptual(trained, weights)
    try:
        return load_perceptual(trained, loss.get("perceptual_weights"))
    except (ValueError, OSError) as error:
        print(f"LPIPS skipped: {error}", flush=True)
        return "none", None
