"""The training images nearest to a sampler's images: does it copy? A picture and distances."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches, broadcast_object
from experiments.harness.experiment import ModelConfig, OutputConfig, run_experiment
from experiments.harness.report import table
from experiments.metrics import features as all_features
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
from experiments.metrics.features import Features
from experiments.metrics.image_pairs import ImageDistance
from experiments.metrics.nearest_neighbours import (
    PictureRow,
    RankedNeighbours,
    find_candidates,
    rerank_candidates,
    save_neighbour_picture,
    training_view,
)
from train.config import DataConfig, SamplingConfig
from train.data.loading import ImageSource, fixed_subset
from train.data.transforms import training_views
from train.trained_sampler import TrainedSampler

CLOSE_QUANTILE = 0.05  # a quantile of the held-out images' distances: nearer than that is suspicious


@dataclass(frozen=True, kw_only=True)
class NeighboursConfig:
    """Nearest neighbours."""

    n_samples: int = 100
    """Number of generated images; as many held-out real ones are what they are compared with."""
    samples: str | None = None
    """Take the images of this samples.npz instead of new ones."""
    neighbours: int = 10
    """Nearest training images told of each."""
    candidates: int = 100
    """Nearest training images by features, in the views it was trained on, that are then ranked anew."""
    features: str = "auto"
    """A file of experiments/metrics/features, or auto: the data set's own, inception, or pixels with a warning."""
    inception_weights: str | None = None
    """Path of torch-fidelity's Inception weights; left out, its cache or download."""
    rerank: Literal["auto", "lpips", "pixels"] = "auto"
    """Distance that ranks candidates: LPIPS (of images below 64 pixels, bilinearly enlarged by a whole number), or the
    Euclidean one of pixels in [0, 1]. auto: LPIPS, or pixels with one sentence where its weights are not to be had."""
    perceptual_net: Literal["alex", "vgg", "squeeze"] = "alex"
    """Network of LPIPS."""
    perceptual_weights: str | None = None
    """File of its ImageNet weights (torchvision's state dict); left out, torch's cache or download."""
    rows: int = 4
    """Rows of the picture for each kind: the samples nearest to a training image, others, held-out images."""

    def __post_init__(self):
        lowest = {"n_samples": 1, "neighbours": 1, "candidates": self.neighbours, "rows": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"got {name} {value}, wanted at least {low}: pass --{name} N")
        if self.rerank == "pixels" and self.perceptual_weights is not None:
            raise ValueError("got --perceptual_weights with --rerank pixels, which needs none: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Finds nearest training images; results.json and neighbours.png lie in <logs_root>/<log_dir>."""

    neighbours: NeighboursConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


class Queries(NamedTuple):
    """What nearest training images are looked for: n samples, then up to as many held-out real images."""

    images: Tensor  # uint8 (n + m, C, H, W)
    codes: Tensor | None  # (n, h, w), of samplers of codes
    n_samples: int
    features: Tensor  # (n + m, D)


def measure(
    settings: NeighboursConfig, sampling: SamplingConfig, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any] | None:
    """Everything of one report, and neighbours.png. On the main rank alone; the others take part."""
    size, data, world = batches.batch_size, model.data, model.world
    features = all_features.choose_features(settings.features, data, model.device, settings.inception_weights)
    net, weights = settings.perceptual_net, settings.perceptual_weights
    image_distance = image_pairs.choose_distance(settings.rerank, net, weights, world, size)
    training = ImageSource(model.dataset("train"), data, margin=data.crop_margin)
    held_out = ImageSource(model.dataset("val"), data)
    images, codes, n_samples, vectors = make_queries(settings, sampling, model, features, held_out, batches)
    made_of = [training.dataset.fingerprint(), batches.files, *features_version(features, settings.inception_weights)]
    name = batches_name("candidates", *made_of)
    near = find_candidates(vectors, training, features, settings.candidates, batches, name)
    name = batches_name("ranked", *made_of, image_distance.name)
    ranked = rerank_candidates(images, near, training, image_distance, settings.neighbours, batches, name)
    found = concatenate(ranked, len(images), RankedNeighbours._fields)
    same_codes = None if codes is None else code_copies(codes, model, size)
    if not world.is_main:
        return None
    ranking = RankedNeighbours(**found)
    rows = sections(ranking, images, n_samples, training, settings.rows)
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
        "views": [view.to_list() for view in training_views(data)],  # mirrored, moved right and down, cut
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
    """The same on every rank."""
    size, world = batches.batch_size, model.world
    count, images_of = sampled_images(settings.samples, settings.n_samples, model, sampling, batches.seed)
    own = sampled_features(images_of, count, count, features, batches, batches.files)
    samples = concatenate(own, count, ("features", "image", "codes"))
    same = min(count, len(held_out))
    real = real_features(held_out, fixed_subset(len(held_out), same), features, size, world, "held-out")
    real = concatenate(real, same, ("features", "image"))
    samples, real = broadcast_object(world, (samples, real))
    images = torch.cat([match_data_channels(samples["image"], model.data), real["image"]])
    return Queries(images, samples.get("codes"), count, torch.cat([samples["features"], real["features"]]))


def match_data_channels(images: Tensor, data: DataConfig) -> Tensor:
    """Images uint8 (N, C, H, W) in the channels of the training data; ValueError where their size is another."""
    if tuple(images.shape[2:]) != data.size:
        got, wanted = ("x".join(map(str, each)) for each in (images.shape[2:], data.size))
        raise ValueError(f"got samples of {got} pixels, wanted {wanted} as in training: pass other --samples")
    if images.shape[1] == data.n_channels:
        return images
    if data.n_channels == 3:
        return images.expand(-1, 3, -1, -1)
    return images.float().mean(1, keepdim=True).round().byte()


def code_copies(codes: Tensor, model: TrainedSampler, batch_size: int) -> float:
    """The share in [0, 1] of samples with the codes of a training image in some view. All ranks take part."""
    known = model.space.first.codes(model.dataset("train"), "train", model.data, batch_size, model.world)
    return copied_fraction(codes, known.ids[:].flatten(0, 1))


def summarize_distances(found: RankedNeighbours, n_samples: int) -> dict[str, Any]:
    """How near to training images samples are, the first of `found`, and held-out images, the rest."""
    samples, real = found.distances[:n_samples, 0], found.distances[n_samples:, 0]
    usual, close = real.quantile(0.5), real.quantile(CLOSE_QUANTILE)
    return {
        "median": samples.quantile(0.5).item(),
        "median_held_out": usual.item(),
        "ratio": None if usual == 0 else (samples.quantile(0.5) / usual).item(),
        "nearer_than_usual": (samples < usual).double().mean().item(),
        "closer_than_held_out": (samples < close).double().mean().item(),
        "equal_pixels": found.equal[:n_samples].double().mean().item(),
        "equal_pixels_held_out": found.equal[n_samples:].double().mean().item(),
    }


def neighbour_lists(found: RankedNeighbours, n_samples: int) -> dict[str, Any]:
    """Of each sample, from the nearest on: indices in the training split, numbers of their views, distances."""
    tensors = found._asdict()
    tensors.pop("equal")
    names = {"images": "neighbours", "views": "neighbour_views"}
    return {names.get(name, name): tensor[:n_samples].tolist() for name, tensor in tensors.items()}


def title(image_distance: ImageDistance) -> str:
    words = "Euclidean, of pixels" if image_distance.name == "pixels" else image_distance.name
    return f"left: the image; right: its nearest training images with their distances: {words}"


def sections(
    found: RankedNeighbours, images: Tensor, n_samples: int, source: ImageSource, rows: int
) -> dict[str, list[PictureRow]]:
    """Rows of the picture: the samples nearest to a training image, others, and held-out images, evenly by distance."""
    views = training_views(source.config)
    order = found.distances[:n_samples, 0].argsort(stable=True).tolist()
    real = (found.distances[n_samples:, 0].argsort(stable=True) + n_samples).tolist()

    def row(i: int) -> PictureRow:
        near = [training_view(source, views, *each) for each in zip(found.images[i], found.views[i], strict=True)]
        words = f"sample {i}" if i < n_samples else "held out"
        return PictureRow(images[i], words, torch.stack(near), found.distances[i].tolist())

    chosen = {
        "generated: those nearest to a training image": order[:rows],
        "generated: others, from near to far": evenly_spaced(order[rows:], rows),
        "held-out real images, from near to far": evenly_spaced(real, rows),
    }
    return {heading: [row(i) for i in indices] for heading, indices in chosen.items() if indices}


def evenly_spaced(things: list[int], count: int) -> list[int]:
    """Up to `count` of them, the first and the last among them, at even steps."""
    if len(things) <= count:
        return things
    return [things[round(i * (len(things) - 1) / max(1, count - 1))] for i in range(count)]


def report(results: dict[str, Any], folder: Path) -> str:
    """The table a person reads."""
    n, m, held = results["n_samples"], results["n_held_out"], "expected of new images"

    def share(name: str) -> str:
        return f"{100 * results[name]:.1f} %"

    ratio = "-" if results["ratio"] is None else f"{results['ratio']:.3g}"
    rows = [("to the nearest training image", "generated", held)]
    rows.append(("median distance", f"{results['median']:.3g}", f"{results['median_held_out']:.3g}"))
    rows.append(("... over that of held-out images", ratio, "1"))
    rows.append(("nearer than half of the held-out images", share("nearer_than_usual"), "50 %"))
    rows.append(("nearer than 95 % of them", share("closer_than_held_out"), f"{100 * CLOSE_QUANTILE:.0f} %"))
    rows.append(("copies, pixel by pixel", share("equal_pixels"), share("equal_pixels_held_out")))
    if results["equal_codes"] is not None:
        rows.append(("copies, code by code", share("equal_codes"), "-"))
    views = f"in {len(results['views'])} views; {results['candidates']} found by features ({results['features']})"
    return f"""
{n} generated and {m} held-out images of {results["data"]} among {results["n_training"]} training images
{views}, ranked by {results["ranked_by"]}
{table(rows)}

{folder / "results.json"}
{folder / "neighbours.png"}"""


if __name__ == "__main__":
    files = ("samples", "inception_weights", "perceptual_weights")
    run_experiment("neighbours", Config, measure, report, files=files)
