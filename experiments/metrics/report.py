"""A Frechet distance and its yardsticks: real against real, and a VQGAN's reconstructions, of as many images."""

import hashlib
import json
import os
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
from experiments.processes import in_order, own_indices
from experiments.progress import progress
from experiments.table import table
from train.cli import to_dict
from train.config import DataConfig
from train.data import ImageSource, fixed_subset, images_in_order
from train.datasets import Dataset
from train.distributed import World
from train.files import sha256
from train.first_stage import FirstStage
from train.generate import TrainedSampler

Batches = Iterable[dict[str, Tensor]]


def with_features(features: Features, own: Batches, world: World) -> Iterator[dict[str, Tensor]]:
    """Batches of "image" uint8 (B, C, H, W) that each process makes, and their "features" (B, D) beside them: of all
    processes in order in the main one, nothing in others."""

    def extracted() -> Iterator[dict[str, Tensor]]:
        for batch in own:
            yield batch | {"features": features.extract(batch["image"].expand(-1, 3, -1, -1)).cpu()}

    return in_order(world, extracted())


def statistics_of(batches: Batches) -> Statistics:
    """Streams features into their statistics."""
    statistics = Statistics()
    for batch in batches:
        statistics.update(batch["features"])
    return statistics


def real_statistics(
    dataset: Dataset,
    data: DataConfig,
    features: Features,
    weights: str | None,
    cache: Path,
    batch_size: int,
    world: World,
) -> Statistics:
    """Statistics of a whole split, cached by the content of the images and of what makes the features.

    All processes take part; the main one writes them, and where they were not cached, it alone is given them.
    """
    code = sha256(Path(features.module.__file__))
    made_of = [dataset.fingerprint(), *data.sides, data.n_channels, code, weights and sha256(Path(weights))]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    path = cache / f"{data.dataset}_{features.name}_{key}.npz"
    if not any(world.any(not path.is_file())):
        return Statistics.load(path)
    source = ImageSource(dataset, data)
    own = images_in_order(source, batch_size, own_indices(world, list(range(len(source))), batch_size))
    found = with_features(features, own, world)
    statistics = statistics_of(progress(found, len(source), "reference", world.is_main))
    if world.is_main:
        statistics.save(path)
    return statistics


def reconstructed(first: FirstStage, batches: Batches) -> Iterator[dict[str, Tensor]]:
    """The VQGAN's reconstructions of batches of images."""
    for batch in batches:
        yield {"image": first.decode(first.encode(batch["image"])).cpu()}


def generated_statistics(batches: Batches, same: int, grid: Path) -> tuple[Statistics, Statistics]:
    """Statistics of all generated images, and of the first `same`; the first 64 images become a grid."""
    everything, first, shown = Statistics(), Statistics(), []
    for batch in batches:
        everything.update(batch["features"])
        if (missing := same - (first.count or 0)) > 0:
            first.update(batch["features"][:missing])
        if sum(map(len, shown)) < GRID:
            shown.append(batch["image"])
    if shown:
        save_grid(grid, torch.cat(shown)[:GRID])
    return everything, first


def generated_images(config, trained: TrainedSampler) -> tuple[int, Batches]:
    """How many images are measured, and this process's share of them: those of --samples, else new ones."""
    distance, output = config.distance, config.output
    if distance.samples is None:
        n = distance.n_samples
        return n, trained.sample(n, output.seed, config.sampling, batch_size=output.batch_size)
    images = read_samples(Path(distance.samples))["image"]
    own = trained.world.share_of(list(images.split(output.batch_size)))
    return len(images), ({"image": part} for part in own)


def reference_of(config, trained: TrainedSampler, features: Features) -> Statistics:
    """Statistics of the real images: those of --ref_stats, else a split's."""
    distance, output = config.distance, config.output
    if distance.ref_stats is not None:
        return Statistics.load(distance.ref_stats)
    real, cache = trained.dataset(distance.split), statistics_cache(output.logs_root)
    weights = distance.inception_weights
    return real_statistics(real, trained.data, features, weights, cache, output.batch_size, trained.world)


def statistics_cache(logs_root: str) -> Path:
    return Path(os.path.expanduser(logs_root)) / ".cache" / "statistics"


def measure(config, trained: TrainedSampler, folder: Path) -> dict[str, Any] | None:
    """All the distances of one report, written to results.json. In the main process alone; the others take part."""
    distance, output, data = config.distance, config.output, trained.data
    first, world = trained.space.first, trained.world
    features = all_features.choose(distance.features, data, trained.device, distance.inception_weights)
    reference = reference_of(config, trained, features)
    held_out = ImageSource(trained.dataset("val" if distance.split == "train" else "train"), data)
    count, own = generated_images(config, trained)
    same = min(count, len(held_out))  # as many images of each kind as there are held-out real ones
    chosen = own_indices(world, fixed_subset(len(held_out), same), output.batch_size)

    sampled = progress(with_features(features, own, world), count, "sampling", world.is_main)
    generated, as_many = generated_statistics(sampled, same, folder / "samples.png")
    real = images_in_order(held_out, output.batch_size, chosen)
    real_again = statistics_of(with_features(features, real, world))
    rebuilt = None
    if first is not None:
        own = reconstructed(first, images_in_order(held_out, output.batch_size, chosen))
        found = with_features(features, own, world)
        rebuilt = statistics_of(progress(found, same, "reconstructing", world.is_main))
    if not world.is_main:
        return None
    if first is not None:
        save_reconstructions(folder / "reconstructions.png", first, held_out, min(same, 16))
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


def save_reconstructions(path: Path, first: FirstStage, held_out: ImageSource, count: int) -> None:
    """A grid of held-out images above their reconstructions."""
    batches = images_in_order(held_out, count, fixed_subset(len(held_out), count))
    shown = torch.cat([batch["image"] for batch in batches])
    save_grid(path, torch.cat([shown, first.decode(first.encode(shown)).cpu()]), columns=len(shown))


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
