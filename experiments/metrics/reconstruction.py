"""How well a VQGAN rebuilds the images of a split, how evenly it uses its codes, and how many bits they take."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.harness.batches import in_order, own_indices
from experiments.harness.experiment import write_results
from experiments.harness.report import progress, table
from experiments.metrics import features as all_features
from experiments.metrics.distances import Batches, real_statistics, save_reconstructions, statistics_cache
from experiments.metrics.features import Features
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.image_pairs import WINDOW, l1, psnr, ssim
from train.cli.parse import to_dict
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.data.transforms import to_float
from train.datasets import Dataset
from train.distributed import World
from train.files import whole_file
from train.first_stage import FirstStage
from train.runs import read_run
from vq.perceptual import load_perceptual
from vq.quantizer import count, perplexity, usage

SHOWN = 16  # columns of the grid of reconstructions
LPIPS = ("vgg", "alex", "squeeze")


def rebuilt(
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


def summed_up(
    batches: Batches, reference: Statistics, codebook_size: int, pixels: int
) -> tuple[dict[str, Any], Tensor]:
    """Batches of `rebuilt` -> the numbers of a report, None where nothing was measured, and counts of the codes (K,).

    `pixels` is height times width of an image. Images rebuilt without any error have no PSNR: they are counted as
    `exact_images` and its mean is of the others.
    """
    statistics, chosen, codes = Statistics(), torch.zeros(codebook_size, dtype=torch.float64), 0
    parts: dict[str, list[Tensor]] = {"l1": [], "psnr": [], "ssim": [], "lpips": []}
    for batch in batches:
        statistics.update(batch["features"])
        chosen += count(batch["ids"], codebook_size)
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


def chosen_perceptual(net: str, weights: str | None, run: Path) -> tuple[str, nn.Module | None]:
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


def measure(
    config, first: FirstStage, dataset: Dataset, name: str, perceptual: nn.Module | None, folder: Path, world: World
) -> dict[str, Any] | None:
    """All that one report says of a split's images, LPIPS by the network of that name where there is one, written to
    results.json beside its pictures. In the main process alone, while the others take part."""
    c, data = config.reconstruction, first.data
    if perceptual is not None:
        perceptual.to(first.device)
    features = all_features.choose(c.features, data, first.device, c.inception_weights)
    cache = statistics_cache(config.output.logs_root)
    reference = real_statistics(dataset, data, features, c.inception_weights, cache, c.batch_size, world)
    source = ImageSource(dataset, data)
    n = len(source) if c.n_images is None else min(c.n_images, len(source))
    own = images_in_order(source, c.batch_size, own_indices(world, sorted(fixed_subset(len(source), n)), c.batch_size))
    found = in_order(world, rebuilt(first, own, features, perceptual))
    found = progress(found, n, "reconstructing", world.is_main)
    if not world.is_main:
        list(found)
        return None
    codebook_size = first.vqgan.quantizer.codebook_size
    numbers, chosen = summed_up(found, reference, codebook_size, math.prod(data.size))
    save_reconstructions(folder / "reconstructions.png", first, source, min(n, SHOWN))
    results = {"metric": features.module.METRIC, **numbers, "codebook_size": codebook_size, "lpips_net": name}
    results |= {"split": c.split, "n_reference": reference.count, "features": features.name}
    results["run"] = to_dict(config) | {"step": first.step} | first.origin
    plot(folder / "codes.png", chosen, results)
    write_results(folder, results)
    return results


def print_report(results: dict[str, Any], folder: Path) -> None:
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
    print(f"\n{where}, features: {results['features']}\n{table(rows)}\n")
    for name in ("results.json", "reconstructions.png", "codes.png"):
        print(folder / name)


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
    with whole_file(path) as scratch:
        figure.savefig(scratch, format="png")
