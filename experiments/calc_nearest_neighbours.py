"""Finds the training images nearest to a sampler's images, to detect memorisation: distances and a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches, broadcast_object
from experiments.harness.experiment import ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import match_data_channels
from experiments.harness.report import table
from experiments.metrics import image_pairs
from experiments.metrics.classifier import copied_fraction
from experiments.metrics.distances import (
    batches_name,
    concatenate,
    features_version,
    real_features,
    sampled_features,
    sampled_images,
)
from experiments.metrics.features import Features, FeaturesConfig
from experiments.metrics.image_pairs import ImageDistance
from experiments.metrics.nearest_neighbours import (
    PictureRow,
    RankedNeighbours,
    find_candidates,
    rerank_candidates,
    save_neighbour_picture,
    training_view,
)
from models.ranges import COUNT, SIZE, check_ranges
from train.class_names import class_captions
from train.config import SamplingConfig
from train.data.loading import ImageSource, fixed_subset
from train.data.transforms import training_views
from train.datasets import Dataset
from train.trained_sampler import TrainedSampler

CLOSE_QUANTILE = 0.05  # of the held-out images' distances; samples nearer than that are suspicious


@dataclass(frozen=True, kw_only=True)
class NeighboursConfig(FeaturesConfig):
    """Nearest neighbours."""

    n_samples: int = 100
    """Number of generated images; they are compared with as many held-out real ones."""
    samples: str | None = None
    """Use the images of this samples.npz instead of new ones."""
    neighbours: int = 10
    """Nearest training images reported for each image."""
    candidates: int = 100
    """Nearest training images by features, over all training views, that are then reranked."""
    rerank: Literal["auto", "lpips", "pixels"] = "auto"
    """Distance that reranks candidates: LPIPS (images below 64 pixels are enlarged by an integer factor), or the
    Euclidean distance of pixels in [0, 1]. auto: LPIPS, or pixels, with a message, if its weights are unavailable."""
    perceptual_net: Literal["alex", "vgg", "squeeze"] = "alex"
    """LPIPS network."""
    perceptual_weights: str | None = None
    """File of its ImageNet weights (torchvision's state dict); if omitted, torch's cache or a download."""
    rows: int = 4
    """Rows of the picture per section: samples nearest to a training image, other samples, held-out images."""

    EVERYDAY = ("n_samples", "samples", "neighbours", "features")
    RANGES = {"n_samples": COUNT, "neighbours": COUNT, "candidates": COUNT, "rows": SIZE}

    def __post_init__(self):
        check_ranges(self)
        if self.candidates < self.neighbours:
            raise ValueError(
                f"got candidates {self.candidates}, wanted at least {self.neighbours}: pass --candidates N"
            )
        if self.rerank == "pixels" and self.perceptual_weights is not None:
            raise ValueError("got --perceptual_weights with --rerank pixels, which uses none: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Finds the nearest training images; writes results.json and neighbours.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/calc_nearest_neighbours.py --sampler {sampler} --dataset mnist",
        "python experiments/calc_nearest_neighbours.py --load_dir {sampler}_mnist --samples samples.npz",
    )

    neighbours: NeighboursConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


class Queries(NamedTuple):
    """Images whose nearest training images are searched: n samples, then up to as many held-out real images."""

    images: Tensor  # uint8 (n + m, C, H, W)
    codes: Tensor | None  # (n, h, w), from samplers of codes
    n_samples: int
    features: Tensor  # (n + m, D)
    classes: list[str]  # n + m captions, empty where the class is not known


def measure(
    settings: NeighboursConfig, sampling: SamplingConfig, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any] | None:
    """Searches, ranks and saves neighbours.png. All ranks must call it; only the main rank gets the results."""
    size, data, world = batches.batch_size, model.data, model.world
    features = settings.load(data, model.device)
    net, weights = settings.perceptual_net, settings.perceptual_weights
    image_distance = image_pairs.choose_distance(settings.rerank, net, weights, world, size, data.n_channels)
    training = ImageSource(model.dataset("train"), data, margin=data.crop_margin)
    held_out = ImageSource(model.dataset("val"), data)
    images, codes, n_samples, vectors, classes = make_queries(settings, sampling, model, features, held_out, batches)
    inputs = [training.dataset.fingerprint(), batches.files, *features_version(features, settings.inception_weights)]
    name = batches_name("candidates", *inputs)
    near = find_candidates(vectors, training, features, settings.candidates, batches, name)
    name = batches_name("ranked", *inputs, image_distance.name)
    ranked = rerank_candidates(images, near, training, image_distance, settings.neighbours, batches, name)
    fields = concatenate(ranked, len(images), RankedNeighbours._fields)
    same_codes = None if codes is None else code_copies(codes, model, size)
    if not world.is_main:
        return None
    ranking = RankedNeighbours(**fields)
    rows = sections(ranking, images, classes, n_samples, training, settings.rows)
    save_neighbour_picture(batches.folder / "neighbours.png", rows, title(image_distance))
    return summarize_distances(ranking, n_samples) | {
        "equal_codes": same_codes,
        "ranked_by": image_distance.name,
        "features": features.name,
        "n_samples": n_samples,
        "n_held_out": len(images) - n_samples,
        "n_training": len(training),
        "candidates": near.images.shape[1],
        "data": data.dataset,
        "views": [view.to_list() for view in training_views(data)],  # flip, shift, crop
        **neighbour_lists(ranking, n_samples),
        "run": batches.run,
    }


def make_queries(
    settings: NeighboursConfig,
    sampling: SamplingConfig,
    model: TrainedSampler,
    features: Features,
    held_out: ImageSource,
    batches: ResumableBatches,
) -> Queries:
    """Collects samples and held-out images with their features. All ranks must call it, and all get the result."""
    size, world = batches.batch_size, model.world
    count, images_of = sampled_images(settings.samples, settings.n_samples, model, sampling, batches.seed)
    sampled = sampled_features(images_of, range(count), range(count), features, batches, batches.files)
    samples = concatenate(sampled, count, ("features", "image", "codes", "label"))
    same = min(count, len(held_out))
    real = real_features(held_out, fixed_subset(len(held_out), same), features, size, world, "held-out images")
    real = concatenate(real, same, ("features", "image", "index"))
    samples, real = broadcast_object(world, (samples, real))
    images = torch.cat([match_data_channels(samples["image"], model.data), real["image"]])
    classes = model.captions(samples.get("label")) or [""] * count
    classes += data_captions(held_out.dataset, real["index"])
    return Queries(images, samples.get("codes"), count, torch.cat([samples["features"], real["features"]]), classes)


def data_captions(dataset: Dataset, indices: Tensor) -> list[str]:
    """Returns the names of the classes of images of a data set, empty strings without classes."""
    if dataset.labels is None:
        return [""] * len(indices)
    return class_captions(torch.from_numpy(dataset.labels)[indices], dataset.n_classes, dataset.class_names)


def code_copies(codes: Tensor, model: TrainedSampler, batch_size: int) -> float:
    """Returns the fraction of samples whose codes equal those of a training image in some view. All ranks must call
    it."""
    training = model.space.first_stage.encode_dataset(
        model.dataset("train"), "train", model.data, batch_size, model.world
    )
    return copied_fraction(codes, training.ids[:].flatten(0, 1))


def summarize_distances(ranking: RankedNeighbours, n_samples: int) -> dict[str, Any]:
    """Summarises the distances to the nearest training image of the samples (first) and the held-out images (rest)."""
    samples, real = ranking.distances[:n_samples, 0], ranking.distances[n_samples:, 0]
    usual, close = real.quantile(0.5), real.quantile(CLOSE_QUANTILE)
    return {
        "median": samples.quantile(0.5).item(),
        "median_held_out": usual.item(),
        "ratio": None if usual == 0 else (samples.quantile(0.5) / usual).item(),
        "nearer_than_usual": (samples < usual).double().mean().item(),
        "closer_than_held_out": (samples < close).double().mean().item(),
        "equal_pixels": ranking.equal[:n_samples].double().mean().item(),
        "equal_pixels_held_out": ranking.equal[n_samples:].double().mean().item(),
    }


def neighbour_lists(ranking: RankedNeighbours, n_samples: int) -> dict[str, Any]:
    """Returns, for each sample, the indices, views and distances of its neighbours, nearest first."""
    tensors = ranking._asdict()
    tensors.pop("equal")
    names = {"images": "neighbours", "views": "neighbour_views"}
    return {names.get(name, name): tensor[:n_samples].tolist() for name, tensor in tensors.items()}


def title(image_distance: ImageDistance) -> str:
    """Returns the title of the picture."""
    name = "Euclidean distance of pixels in [0, 1]" if image_distance.name == "pixels" else image_distance.name
    return f"left: image; right: nearest training images with {name}"


def sections(
    ranking: RankedNeighbours, images: Tensor, classes: list[str], n_samples: int, source: ImageSource, rows: int
) -> dict[str, list[PictureRow]]:
    """Returns the rows of the picture by section: nearest samples, other samples and held-out images, the latter two
    evenly spaced by distance."""
    views = training_views(source.config)
    order = ranking.distances[:n_samples, 0].argsort(stable=True).tolist()
    real = (ranking.distances[n_samples:, 0].argsort(stable=True) + n_samples).tolist()

    def row(i: int) -> PictureRow:
        near = [training_view(source, views, *each) for each in zip(ranking.images[i], ranking.views[i], strict=True)]
        caption = f"sample {i}" if i < n_samples else "held-out"
        named = [classes[i], *data_captions(source.dataset, ranking.images[i])]
        return PictureRow(images[i], caption, torch.stack(near), ranking.distances[i].tolist(), named)

    indices_by_heading = {
        "samples nearest to a training image": order[:rows],
        "other samples, from near to far": evenly_spaced(order[rows:], rows),
        "held-out real images, from near to far": evenly_spaced(real, rows),
    }
    return {heading: [row(i) for i in indices] for heading, indices in indices_by_heading.items() if indices}


def evenly_spaced(items: list[int], count: int) -> list[int]:
    """Returns up to `count` evenly spaced items, including the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the table of distances and copies."""
    n, m = results["n_samples"], results["n_held_out"]

    def percent(name: str) -> str:
        return f"{100 * results[name]:.1f} %"

    ratio = "-" if results["ratio"] is None else f"{results['ratio']:.3g}"
    rows = [("distance to the nearest training image", "generated", "held-out real")]
    rows.append(("median", f"{results['median']:.3g}", f"{results['median_held_out']:.3g}"))
    rows.append(("median relative to held-out images", ratio, "1"))
    rows.append(("below the median of held-out images", percent("nearer_than_usual"), "50 %"))
    quantile = f"{100 * CLOSE_QUANTILE:.0f} %"
    rows.append((f"below the {quantile} quantile of held-out images", percent("closer_than_held_out"), quantile))
    rows.append(("exact copies (pixels)", percent("equal_pixels"), percent("equal_pixels_held_out")))
    if results["equal_codes"] is not None:
        rows.append(("exact copies (codes)", percent("equal_codes"), "-"))
    search = f"{results['candidates']} candidates by features ({results['features']})"
    return f"""
{n} generated and {m} held-out images against {results["n_training"]} training images of {results["data"]}
in {len(results["views"])} views; {search}, ranked by {results["ranked_by"]}
{table(rows)}
smaller distances than those of held-out images indicate memorisation

{folder / "results.json"}
{folder / "neighbours.png"}"""


if __name__ == "__main__":
    files = ("samples", "inception_weights", "clip_dir", "perceptual_weights")
    run_experiment("neighbours", Config, measure, report, files=files)
