"""Distances of images and their yardsticks: real against real, and a VQGAN's reconstructions, of as many images."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.experiment import write_results
from experiments.images import GRID, read_samples, save_grid
from experiments.kept import forget, kept_batches
from experiments.metrics import features as all_features
from experiments.metrics.features import Features
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.kid import MOST, KeptFeatures, kernel_distance
from experiments.metrics.reference import Reference
from experiments.processes import in_order, own_indices, shared
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


def code_of(features: Features, weights: str | None) -> list[str | None]:
    """What makes the features, by content: their file's, and that of their weights where a file of these is named."""
    return [sha256(Path(features.module.__file__)), weights and sha256(Path(weights))]


def real_reference(
    dataset: Dataset,
    data: DataConfig,
    features: Features,
    weights: str | None,
    cache: Path,
    batch_size: int,
    world: World,
) -> Reference:
    """Of a whole split, cached by the content of the images and of what makes the features. Of larger splits, features
    of `MOST` images drawn at random, always the same.

    All processes take part; the main one writes them, and where they were not cached, it alone is given them.
    """
    made_of = [dataset.fingerprint(), *data.sides, data.n_channels, *code_of(features, weights), MOST]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    path = cache / f"{data.dataset}_{features.name}_{key}.npz"
    if not any(world.any(not path.is_file())):
        return Reference.load(path)
    source = ImageSource(dataset, data)
    own = images_in_order(source, batch_size, own_indices(world, list(range(len(source))), batch_size))
    found = KeptFeatures(with_features(features, own, world), fixed_subset(len(source), MOST))
    statistics = statistics_of(progress(found, len(source), "reference", world.is_main))
    if not world.is_main:
        return Reference(statistics, None)
    reference = Reference(statistics, found.features)
    reference.save(path)
    return reference


def real_statistics(
    dataset: Dataset,
    data: DataConfig,
    features: Features,
    weights: str | None,
    cache: Path,
    batch_size: int,
    world: World,
) -> Statistics:
    """The statistics of `real_reference`."""
    return real_reference(dataset, data, features, weights, cache, batch_size, world).statistics


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


def given_files(distance) -> dict[str, str]:
    """The content, as SHA-256, of the files there are that a report is made of: a path alone does not tell."""
    named = {name: getattr(distance, name) for name in ("samples", "ref_stats", "inception_weights")}
    paths = {name: Path(path) for name, path in named.items() if path is not None}
    return {name: sha256(path) for name, path in paths.items() if path.is_file()}


def measured_images(config, trained: TrainedSampler) -> tuple[int, Callable[[list[int]], Tensor]]:
    """How many images are measured, and a function from indices to uint8 (B, C, H, W): of --samples, else new ones."""
    distance, output = config.distance, config.output
    if distance.samples is not None:
        images = read_samples(Path(distance.samples))["image"]
        return len(images), lambda indices: images[indices]
    held_out = trained.held_out()

    def drawn(indices: list[int]) -> Tensor:
        return trained.draw(indices, output.seed, config.sampling, held_out=held_out)["image"]

    return distance.n_samples, drawn


def generated(config, trained: TrainedSampler, features: Features, folder: Path) -> tuple[int, Batches]:
    """How many images are measured, and their "features" (B, D), with "image" (B, C, H, W) of the first: in the main
    process alone, while all make them. What an earlier start made is not made again."""
    count, images_of = measured_images(config, trained)

    def make(indices: list[int]) -> dict[str, Tensor]:
        images = images_of(indices)
        found = {"features": features.extract(images.expand(-1, 3, -1, -1))}
        return found | ({"image": images} if indices[0] < GRID else {})

    distance = config.distance
    made_of = [given_files(distance).get("samples"), *code_of(features, distance.inception_weights)]
    name = f"{features.name}_{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}"
    return count, kept_batches(folder, name, list(range(count)), config.output.batch_size, make, trained.world)


def reference_of(config, trained: TrainedSampler, features: Features) -> Reference:
    """What --ref_stats holds of the real images, else what a split does."""
    distance, output = config.distance, config.output
    if distance.ref_stats is not None:
        return Reference.load(distance.ref_stats)
    real, cache = trained.dataset(distance.split), statistics_cache(output.logs_root)
    weights = distance.inception_weights
    return real_reference(real, trained.data, features, weights, cache, output.batch_size, trained.world)


def statistics_cache(logs_root: str) -> Path:
    return Path(os.path.expanduser(logs_root)) / ".cache" / "statistics"


def measure(config, trained: TrainedSampler, folder: Path) -> dict[str, Any] | None:
    """All the distances of one report, written to results.json. In the main process alone; the others take part."""
    distance, output, data = config.distance, config.output, trained.data
    first, world = trained.space.first, trained.world
    features = all_features.choose(distance.features, data, trained.device, distance.inception_weights)
    reference = reference_of(config, trained, features)
    held_out = ImageSource(trained.dataset("val" if distance.split == "train" else "train"), data)
    count, found = generated(config, trained, features, folder)
    same = min(count, len(held_out))  # as many images of each kind as there are held-out real ones
    chosen = own_indices(world, fixed_subset(len(held_out), same), output.batch_size)

    kept = {"generated": KeptFeatures(progress(found, count, "sampling", world.is_main))}
    everything, as_many = generated_statistics(kept["generated"], same, folder / "samples.png")
    real = images_in_order(held_out, output.batch_size, chosen)
    kept["real_vs_real"] = KeptFeatures(with_features(features, real, world))
    real_again, rebuilt = statistics_of(kept["real_vs_real"]), None
    if first is not None:
        own = reconstructed(first, images_in_order(held_out, output.batch_size, chosen))
        kept["reconstructions"] = KeptFeatures(with_features(features, own, world))
        rebuilt = statistics_of(progress(kept["reconstructions"], same, "reconstructing", world.is_main))
    if not world.is_main:
        return None
    if first is not None:
        save_reconstructions(folder / "reconstructions.png", first, held_out, min(same, 16))
    results = {
        "metric": features.module.METRIC,
        "value": frechet_distance(everything, reference.statistics),
        "real_vs_real": frechet_distance(real_again, reference.statistics),
        "reconstructions": None if rebuilt is None else frechet_distance(rebuilt, reference.statistics),
        "n_samples": count,
        "features": features.name,
        "n_compared": real_again.count,
        "value_at_n_compared": frechet_distance(as_many, reference.statistics),
        "reference": distance.ref_stats or f"{data.dataset}, {distance.split} split",
        "n_reference": reference.statistics.count,
        "kernel": kernel_distances(distance, features, kept, reference),
        "run": to_dict(config) | {"step": trained.step, "files": given_files(distance)} | trained.origin,
    }
    write_results(folder, results)
    return results


def kernel_distances(
    distance, features: Features, kept: dict[str, KeptFeatures], reference: Reference
) -> dict[str, Any] | None:
    """{"metric": its name, and of each kind of images its mean, deviation, subsets and size}; None where the reference
    has no features."""
    if reference.features is None:
        return None
    found: dict[str, Any] = {"metric": features.module.METRIC.replace("F", "K", 1)}  # FID, FD(pixels): KID, KD(pixels)
    for kind, each in kept.items():
        value = kernel_distance(each.features, reference.features, distance.kid_subsets, distance.kid_subset_size)
        found[kind] = value._asdict()
    return found


def save_reconstructions(path: Path, first: FirstStage, held_out: ImageSource, count: int) -> None:
    """A grid of held-out images above their reconstructions."""
    batches = images_in_order(held_out, count, fixed_subset(len(held_out), count))
    shown = torch.cat([batch["image"] for batch in batches])
    save_grid(path, torch.cat([shown, first.decode(first.encode(shown)).cpu()]), columns=len(shown))


def saved_report(folder: Path, world: World) -> dict[str, Any] | None:
    """The results of this very experiment, if it was finished before: what the main process finds, in all of them."""
    path = folder / "results.json"
    there = world.is_main and path.is_file()
    if there:
        forget(folder)  # what a start that was cut off then has left
    return shared(world, json.loads(path.read_text()) if there else None)


def print_report(results: dict[str, Any], folder: Path) -> None:
    """The table a person reads: the distances between what they would be for perfect codes and for real images."""
    same, kernel = str(results["n_compared"]), results.get("kernel")

    def row(words: str, count: str, value: str, kind: str = "") -> tuple[str, ...]:
        return (words, count, f"{results[value]:.4g}", *([mean_and_deviation(kernel.get(kind))] if kernel else []))

    rows = [("images", "count", results["metric"], *([kernel["metric"]] if kernel else []))]
    rows.append(row("generated", str(results["n_samples"]), "value", "generated"))
    if results["n_compared"] != results["n_samples"]:
        rows.append(row("generated, as many as held out", same, "value_at_n_compared"))
    if results["reconstructions"] is not None:
        rows.append(row("reconstructions of held-out images", same, "reconstructions", "reconstructions"))
    rows.append(row("held-out real images", same, "real_vs_real", "real_vs_real"))
    to = f"to {results['reference']} ({results['n_reference']} images), features: {results['features']}"
    print(f"\n{results['metric']} {to}\n{table(rows)}")
    if kernel:
        sizes = sorted({kernel[kind]["size"] for kind in kernel.keys() - {"metric"}})
        of = f"{kernel['generated']['subsets']} subsets of {' or '.join(map(str, sizes))} images"
        print(f"{kernel['metric']}: mean and deviation over {of}, 0 at best, below it by chance")
    elif "kernel" in results:
        print(f"no kernel distance (KID): {results['reference']} has statistics alone, no features")
    print(f"\n{folder / 'results.json'}\n{folder / 'samples.png'}")


def mean_and_deviation(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['mean']:.3g} ± {found['deviation']:.2g}"
