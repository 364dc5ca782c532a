"""How well a VQGAN rebuilds the images of a split, how evenly it uses its codes, and how many bits they take."""

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
from train.first_stage import FirstStage
from train.runs import read_run
from vq.perceptual import load_perceptual
from vq.quantizer import count_codes, perplexity, usage

SHOWN_IMAGES = 16  # columns of the grid of reconstructions
LPIPS = ("vgg", "alex", "squeeze")


def measure_reconstructions(
    first: FirstStage, batches: Batches, features: Features, perceptual: nn.Module | None
) -> Iterator[dict[str, Tensor]]:
    """For each batch of "image" uint8 (B, C, H, W), what is measured of its reconstructions, on the CPU.

    "l1", "psnr", "ssim" (of images as large as its window) and "lpips" (where there is a network), each (B,) float64;
    "ids" (B, h w) int32; "features" (B, D).
    """
    for batch in batches:
        real = batch["image"].to(first.device)
        ids = first.encode(real)
        fake = first.decode(ids)
        found = {"l1": l1(real, fake), "psnr": psnr(real, fake)}
        if min(real.shape[2:]) >= WINDOW:
            found["ssim"] = ssim(real, fake)
        if perceptual is not None:
            found["lpips"] = perceptual(to_float(real), to_float(fake))
        found = {name: value.cpu().double() for name, value in found.items()}
        found["ids"] = ids.flatten(1).int().cpu()
        yield found | {"features": features.extract(fake.expand(-1, 3, -1, -1)).cpu()}


def summarize_reconstructions(
    batches: Batches, reference: Statistics, codebook_size: int, pixels: int
) -> tuple[dict[str, Any], Tensor]:
    """Batches of `measure_reconstructions` -> the numbers of a report, None where nothing was measured, and counts of the codes (K,).

    `pixels` is height times width of an image. Images rebuilt without any error have no PSNR: they are counted as
    `exact_images` and its mean is of the others.
    """
    statistics, chosen, codes = Statistics(), torch.zeros(codebook_size, dtype=torch.float64), 0
    parts: dict[str, list[Tensor]] = {"l1": [], "psnr": [], "ssim": [], "lpips": []}
    for batch in batches:
        statistics.update(batch["features"])
        chosen += count_codes(batch["ids"], codebook_size)
        codes = batch["ids"].shape[1]
        for name in parts.keys() & batch.keys():
            parts[name].append(batch[name])
    values = {name: torch.cat(each) for name, each in parts.items() if each}
    exact = values["psnr"].isinf()
    values["psnr"] = values["psnr"][~exact]
    means = {name: values[name].mean().item() if len(values.get(name, ())) else None for name in parts}
    used = perplexity(chosen).item()
    return {
        "rfd": frechet_distance(statistics, reference),
        **means,
        "exact_images": int(exact.sum()),
        "codebook_usage": usage(chosen).item(),
        "perplexity": used,
        "bits_per_pixel": codes * math.log2(codebook_size) / pixels,
        "entropy_coded_bits_per_pixel": codes * math.log2(used) / pixels,
        "n_images": len(values["l1"]),
    }, chosen


def choose_lpips(net: str, weights: str | None, run: Path) -> tuple[str, nn.Module | None]:
    """(name, module) of --lpips_net; auto is what the run trained with, or none, which is said.

    ValueError where --perceptual_weights have no network to be of.
    """
    if net != "auto":
        return load_perceptual(net, weights)
    loss = read_run(run).get("loss", {})
    trained = loss.get("perceptual_net", "none") if loss.get("perceptual_weight", 1.0) else "none"
    remedy = f"pass --lpips_net {', '.join(LPIPS)}"
    if trained not in LPIPS:
        if weights is not None:
            raise ValueError(f"got --perceptual_weights, but {run} trained with no network of LPIPS: {remedy} as well")
        print(f"LPIPS is left out: {run.name} trained with --perceptual_net {trained}; {remedy} to have it", flush=True)
        return "none", None
    if weights is not None:
        return load_perceptual(trained, weights)
    try:
        return load_perceptual(trained, loss.get("perceptual_weights"))
    except (ValueError, OSError) as error:
        print(f"LPIPS is left out: {error}", flush=True)
        return "none", None
