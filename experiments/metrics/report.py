"""A Frechet distance and its yardsticks: real against real, and a VQGAN's reconstructions, of as many images."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.experiment import write_results
from experiments.images import GRID, read_samples, save_grid
from experiments.metrics import features as all_features
from experiments.metrics.features import Features
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.progress import progress
from experiments.table import table
from train.checkpoint import sha256
from train.cli import to_dict
from train.config import DataConfig
from train.data import ImageSource, fixed_subset, images_in_order
from train.datasets import Dataset
from train.first_stage import FirstStage
from train.generate import TrainedSampler

Batches = Iterable[dict[str, Tensor]]


def statistics_of(features: Features, batches: Batches) -> Statistics:
    """Streams {"image": uint8 (B, C, H, W)} into the statistics of their features."""
    statistics = Statistics()
    for batch in batches:
        statistics.update(features.extract(batch["image"].expand(-1, 3, -1, -1)))
    return statistics


def real_statistics(
    dataset: Dataset, data: DataConfig, features: Features, weights: str | None, cache: Path, batch_size: int
) -> Statistics:
    """Statistics of a whole split, cached by the content of the images and of what makes the features."""
    code = sha256(Path(features.module.__file__))
    made_of = [dataset.fingerprint(), data.img_size, data.n_channels, code, weights and sha256(Path(weights))]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    path = cache / f"{data.dataset}_{features.name}_{key}.npz"
    if path.is_file():
        return Statistics.load(path)
    source = ImageSource(dataset, data)
    statistics = statistics_of(features, progress(images_in_order(source, batch_size), len(source), "reference"))
    path.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(path)
    return statistics


def reconstructed(first: FirstStage, batches: Batches) -> Iterator[dict[str, Tensor]]:
    """The VQGAN's reconstructions of batches of images."""
    for batch in batches:
        yield {"image": first.decode(first.encode(batch["image"])).cpu()}


def generated_statistics(features: Features, batches: Batches, same: int, grid: Path) -> tuple[Statistics, Statistics]:
    """Statistics of all generated images, and of the first `same`; the first 64 images become a grid."""
    everything, first, shown = Statistics(), Statistics(), []
    for batch in batches:
        f = features.extract(batch["image"].expand(-1, 3, -1, -1))
        everything.update(f)
        if (missing := same - (first.count or 0)) > 0:
            first.update(f[:missing])
        if sum(map(len, shown)) < GRID:
            shown.append(batch["image"])
    save_grid(grid, torch.cat(shown)[:GRID])
    return everything, first


def generated_images(config, trained: TrainedSampler) -> tuple[int, Batches]:
    """How many images are measured, and they: those of --samples, else new ones."""
    distance, output = config.distance, config.output
    if distance.samples is None:
        n = distance.n_samples
        batches = trained.sample(n, output.seed, config.sampling, batch_size=output.batch_size)
        return n, batches
    images = read_samples(Path(distance.samples))["image"]
    return len(images), ({"image": part} for part in images.split(output.batch_size))


def measure(config, trained: TrainedSampler, folder: Path) -> dict[str, Any]:
    """All the distances of one report, written to results.json."""
    distance, output, data, first = config.distance, config.output, trained.data, trained.space.first
    weights = distance.inception_weights
    features = all_features.choose(distance.features, data, trained.device, weights)
    if distance.ref_stats is None:
        real = trained.dataset(distance.split)
        cache = Path(output.logs_root).expanduser() / ".cache" / "statistics"
        reference = real_statistics(real, data, features, weights, cache, output.batch_size)
    else:
        reference = Statistics.load(distance.ref_stats)
    held_out = ImageSource(trained.dataset("val" if distance.split == "train" else "train"), data)
    count, batches = generated_images(config, trained)
    same = min(count, len(held_out))  # as many images of each kind as there are held-out real ones

    def held_out_batches(n: int = same) -> Batches:
        return images_in_order(held_out, output.batch_size, fixed_subset(len(held_out), n))

    sampled = progress(batches, count, "sampling")
    generated, as_many = generated_statistics(features, sampled, same, folder / "samples.png")
    real_again = statistics_of(features, held_out_batches())
    rebuilt = None
    if first is not None:
        rebuilt = statistics_of(features, progress(reconstructed(first, held_out_batches()), same, "reconstructing"))
        shown = torch.cat([batch["image"] for batch in held_out_batches(min(same, 16))])
        pairs = torch.cat([shown, first.decode(first.encode(shown)).cpu()])
        save_grid(folder / "reconstructions.png", pairs, columns=len(shown))
    results = {
        "metric": features.module.METRIC,
        "value": frechet_distance(generated, reference),
        "real_vs_real": frechet_distance(real_again, reference),
        "reconstructions": None if rebuilt is None else frechet_distance(rebuilt, reference),
        "n_samples": count,
        "features": features.name,
        "n_compared": real_again.count,
        "value_at_n_compared": frechet_distance(as_many, reference),
        "reference": distance.ref_stats or f"{data.dataset}, {distance.split} split",
        "n_reference": reference.count,
        "run": to_dict(config) | {"step": trained.step} | trained.origin,
    }
    write_results(folder, results)
    return results


def saved_report(folder: Path) -> dict[str, Any] | None:
    """The results of this very experiment, if it was finished before."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def print_report(results: dict[str, Any], folder: Path) -> None:
    """The table a person reads: the distance between what it would be for perfect codes and for real images."""
    same, metric = str(results["n_compared"]), results["metric"]
    rows = [("images", "count", metric), ("generated", str(results["n_samples"]), f"{results['value']:.4g}")]
    if results["n_compared"] != results["n_samples"]:
        rows.append(("generated, as many as held out", same, f"{results['value_at_n_compared']:.4g}"))
    if results["reconstructions"] is not None:
        rows.append(("reconstructions of held-out images", same, f"{results['reconstructions']:.4g}"))
    rows.append(("held-out real images", same, f"{results['real_vs_real']:.4g}"))
    print(f"\n{metric} to {results['reference']} ({results['n_reference']} images), features: {results['features']}")
    print(table(rows))
    print(f"\n{folder / 'results.json'}\n{folder / 'samples.png'}")
