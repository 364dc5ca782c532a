"""A Frechet distance and its yardsticks: real against real, and reconstructions, at the same number of images."""

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.experiment import dataset_of, table, write_results
from experiments.images import GRID, read_samples, save_grid
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.progress import progress
from train.cli import to_dict
from train.config import DataConfig
from train.data import ImageSource, images_in_order
from train.datasets import Dataset
from train.generate import TrainedSampler
from train.registry import plugin

FEATURES = "experiments.metrics.features"
Features = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) -> (B, D)


def choose_features(
    name: str, data: DataConfig, device: torch.device, weights: str | None
) -> tuple[str, Any, Features]:
    """(name, module, callable) of --features; auto is what the data set's reader names, else inception, else pixels."""
    options = {} if weights is None else {"weights": weights}
    if name == "auto":
        reader = plugin("train.datasets", data.reader or data.dataset, "data set")
        name = getattr(reader, "FEATURES", None) if weights is None else None
        if name is None:
            try:
                module = plugin(FEATURES, "inception", "features")
                return "inception", module, module.build(device, **options)
            except FileNotFoundError as error:
                if weights is not None:
                    raise
                warnings.warn(f"{error}. Measuring FD(pixels), which is no FID", stacklevel=2)
                name = "pixels"
    module = plugin(FEATURES, name, "features")
    if options and "weights" not in inspect.signature(module.build).parameters:
        raise ValueError(f"--inception_weights goes with --features inception, got --features {name}")
    return name, module, module.build(device, **options)


def statistics_of(features: Features, batches: Iterable[dict[str, Tensor]]) -> Statistics:
    """Streams {"image": uint8 (B, C, H, W)} into the statistics of their features."""
    statistics = Statistics()
    for batch in batches:
        statistics.update(features(batch["image"].expand(-1, 3, -1, -1)))
    return statistics


def reference_statistics(
    dataset: Dataset,
    data: DataConfig,
    features: Features,
    module: Any,
    weights: str | None,
    folder: Path,
    batch_size: int,
) -> Statistics:
    """Statistics of all images of a split, kept under a key of the images, their size and the features' code and weights."""
    code = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    made_of = [
        dataset.fingerprint(),
        data.img_size,
        data.n_channels,
        code,
        weights and Path(weights).stat().st_mtime_ns,
    ]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    path = folder / f"{data.dataset}_{module.__name__.rpartition('.')[2]}_{key}.npz"
    if path.is_file():
        return Statistics.load(path)
    source = ImageSource(dataset, data)
    statistics = statistics_of(features, progress(images_in_order(source, batch_size), len(source), "reference"))
    path.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(path)
    return statistics


def reconstructed(trained: TrainedSampler, batches: Iterable[dict[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    """The VQGAN's reconstructions of batches of images."""
    for batch in batches:
        yield {"image": trained.first.decode(trained.first.encode(batch["image"])).cpu()}


def measure(config, trained: TrainedSampler, folder: Path) -> dict[str, Any]:
    """All the distances of one report, written to results.json."""
    distance, output, data = config.distance, config.output, trained.data
    name, module, features = choose_features(distance.features, data, trained.first.device, distance.inception_weights)
    other = "val" if distance.split == "train" else "train"
    held_out = ImageSource(dataset_of(trained, config.model, other), data)
    if distance.ref_stats is not None:
        reference = Statistics.load(distance.ref_stats)
    else:
        cache = Path(output.logs_root).expanduser() / ".cache" / "statistics"
        real = dataset_of(trained, config.model, distance.split)
        reference = reference_statistics(
            real, data, features, module, distance.inception_weights, cache, output.batch_size
        )

    if distance.samples is not None:
        images = read_samples(Path(distance.samples))["image"]
        total, batches = len(images), ({"image": part} for part in images.split(output.batch_size))
    else:
        total = distance.n_samples
        batches = trained.generate(output.seed, total, output.batch_size, config.sampling)
    same = min(total, len(held_out))  # as many images of each kind as there are held-out real ones
    generated = generated_statistics(features, progress(batches, total, "sampling"), same, folder)

    def held_out_batches() -> Iterable[dict[str, Tensor]]:
        return images_in_order(held_out, output.batch_size, list(range(same)))

    real_vs_real = statistics_of(features, held_out_batches())
    reconstructions = statistics_of(
        features, progress(reconstructed(trained, held_out_batches()), same, "reconstructing")
    )
    shown = next(images_in_order(held_out, min(same, 16)))["image"]
    pairs = torch.cat([shown, next(iter(reconstructed(trained, [{"image": shown}])))["image"]])
    save_grid(folder / "reconstructions.png", pairs, columns=len(shown))
    results = {
        "metric": module.METRIC,
        "value": frechet_distance(generated["all"], reference),
        "real_vs_real": frechet_distance(real_vs_real, reference),
        "reconstructions": frechet_distance(reconstructions, reference),
        "n_samples": total,
        "features": name,
        "n_compared": real_vs_real.count,
        "value_at_n_compared": frechet_distance(generated["same"], reference),
        "reference": distance.ref_stats or f"{data.dataset}, {distance.split} split",
        "n_reference": reference.count,
        "run": to_dict(config)
        | {"step": trained.step, "weights": trained.weights, "ae_weights": trained.first.weights},
    }
    write_results(folder, results)
    return results


def generated_statistics(
    features: Features, batches: Iterable[dict[str, Tensor]], same: int, folder: Path
) -> dict[str, Statistics]:
    """Statistics of all generated images and of the first `same`; the first 64 become samples.png."""
    all_of_them, first, shown = Statistics(), Statistics(), []
    for batch in batches:
        images = batch["image"]
        f = features(images.expand(-1, 3, -1, -1))
        if first.count < same:
            first.update(f[: same - first.count])
        all_of_them.update(f)
        if sum(map(len, shown)) < GRID:
            shown.append(images)
    save_grid(folder / "samples.png", torch.cat(shown)[:GRID])
    return {"all": all_of_them, "same": first}


def saved_report(folder: Path) -> dict[str, Any] | None:
    """The results of this very experiment, if it was finished before."""
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def print_report(results: dict[str, Any], folder: Path) -> None:
    same, metric = str(results["n_compared"]), results["metric"]
    rows = [("images", "count", metric), ("generated", str(results["n_samples"]), f"{results['value']:.4g}")]
    if results["n_compared"] != results["n_samples"]:
        rows.append(("generated, as many as held out", same, f"{results['value_at_n_compared']:.4g}"))
    rows.append(("reconstructions of held-out images", same, f"{results['reconstructions']:.4g}"))
    rows.append(("held-out real images", same, f"{results['real_vs_real']:.4g}"))
    print(f"\n{metric} to {results['reference']} ({results['n_reference']} images), features: {results['features']}")
    print(table(rows))
    print(f"\n{folder / 'results.json'}\n{folder / 'samples.png'}")
