"""Checks whether generated images follow their hints, such as edges: makes the hints of samples anew, and compares.

Beside samples with the hints of held-out images stand these images, which the first stage limits, samples of a run that
has no hints, and the images with each other's hints.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import save_grid
from experiments.harness.prompt_models import load_run
from experiments.harness.report import progress, table, three_digits
from experiments.metrics.edges import count_edges
from experiments.metrics.image_pairs import psnr
from models.ranges import check_ranges
from train.cli.files import run_folder
from train.config import SamplingConfig
from train.control import ControlSampling
from train.data.hints import HintMaker
from train.data.loading import TrainingImages
from train.data.transforms import as_uint8, grey_to_rgb
from train.distributed import DistContext
from train.loop import Batch
from train.spaces import PixelSpace
from train.trained_sampler import TrainedSampler

SAMPLES, BASE, REAL, OTHERS = "samples", "base", "real", "others"
NAMES = {SAMPLES: "samples", BASE: "samples without hints", REAL: "real images", OTHERS: "real images, other hints"}
OF_IMAGES = ("edges", "grey", "small")  # kinds that are made of an image alone
HEADINGS = {SAMPLES: "samples", BASE: "no hints", REAL: "real"}  # of rows in the picture, as wide as an image
PICTURED = 8  # images in the picture


@dataclass(frozen=True, kw_only=True)
class HintsCheckConfig:
    """Hints."""

    n_samples: int = 200
    """Number of images with the hints of held-out images, in turn."""
    base: str | None = None
    """Run without hints, such as that of --load_dir in training, whose samples are compared with the hints too."""

    EVERYDAY = ("n_samples", "base")
    RANGES = {"n_samples": "[2, 1000000000]"}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks the hints of generated images; writes results.json and hints.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/check_hints.py --sampler {sampler} --load_dir {sampler}_edges",
        "python experiments/check_hints.py --sampler {sampler} --load_dir {sampler}_edges --base {sampler}_mnist",
    )

    hints: HintsCheckConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


class Images(NamedTuple):
    """Images and the hints they belong to."""

    images: Tensor  # uint8 (N, C, H, W)
    hints: Tensor  # uint8 (N, C', H, W)


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Loads the base. ValueError: a model without hints, or with several, and hints that no image shows."""
    field, maker = find_hint(model)
    if config.sampling.condition_file is not None:
        raise ValueError("got condition_file, but the hints of held-out images are checked: leave --condition_file out")
    base, provenance = None, {}
    if config.hints.base is not None:
        folder = run_folder(config.output.logs_root, config.hints.base)
        base, _ = load_run(folder, model, config.output.logs_root, config.model.allow)
        other = base.sampler.config.sampler != model.sampler.config.sampler or base.data.shape != model.data.shape
        if other or field in base.sampler.conditions:
            got = f"got the base {folder}, which reads {field}, is of another sampler or has images of another size"
            raise ValueError(f"{got}: pass a run without hints on the same data")
        options = base_options(config.sampling, base)
        base.dry_run(options, base.condition_source(options))
        provenance = {"base_weights": base.weights}
    sampling = dataclasses.replace(config.sampling, hint=(), hint_ready=False)  # of the run's own previews
    return ExperimentSetup((config.hints, sampling, field, maker, base), provenance)


def base_options(options: SamplingConfig, base: TrainedSampler) -> SamplingConfig:
    """Returns the settings for a base: without those of hints, and guidance of conditions that it does not have."""
    plain = {each.name: each.default for each in dataclasses.fields(ControlSampling)}
    options = dataclasses.replace(options, **plain, image_guidance=None)
    return options if base.sampler.conditions else options.without_guidance()


def find_hint(model: TrainedSampler) -> tuple[str, HintMaker]:
    """Returns the batch field of a model's hint, and what makes it."""
    makers = model.makers
    if len(makers) != 1 or None in makers.values():
        got = f"{len(makers)} kinds of hints" if len(makers) != 1 else "hints that are made in a way that is not known"
        wanted = "wanted one kind: train with --control edges, or --conditions image --condition_image edges"
        raise ValueError(f"{model.run} has {got}, {wanted}")
    ((field, maker),) = makers.items()
    if maker.kind not in OF_IMAGES:
        got = f"got hints of the kind {maker.kind}, which are not made of an image alone"
        raise ValueError(f"{got}: wanted {', '.join(OF_IMAGES)}; calc_pairs.py compares samples with real images")
    return field, maker


def measure(
    settings: HintsCheckConfig,
    sampling: SamplingConfig,
    field: str,
    maker: HintMaker,
    base: TrainedSampler | None,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any]:
    """Samples, makes the hints anew, computes the figures and saves the picture."""
    dataset = model.dataset("val")
    real = PixelSpace(model.data).source(dataset, "val", model.data, 0, model.world, model.adapt)

    def draw_from(model: TrainedSampler, options: SamplingConfig) -> Callable[[list[int]], Batch]:
        """Returns a function that draws images with the conditions of held-out ones, of indices."""

        def draw(indices: list[int]) -> Batch:
            items = held_out(real, indices)
            conditions = {name: value for name, value in items.items() if is_read(name, model.sampler.conditions)}
            images = model.draw(indices, batches.seed, options, conditions or None)["image"]
            return {"image": images, "hint": as_uint8(items[field])}

        return draw

    def reconstruct(indices: list[int]) -> Batch:
        """Returns held-out images as the first stage gives them back."""
        items, stage = held_out(real, indices), model.space.first_stage
        images = as_uint8(items["image"]) if stage is None else stage.reconstruct(items["image"])
        return {"image": images.cpu(), "hint": as_uint8(items[field])}

    drawn = {SAMPLES: draw_from(model, sampling)}
    drawn |= {} if base is None else {BASE: draw_from(base, base_options(sampling, base))}
    drawn[REAL] = reconstruct
    sets = {kind: collect(kind, settings.n_samples, make, batches) for kind, make in drawn.items()}
    sets[OTHERS] = sets[REAL]._replace(hints=sets[REAL].hints.roll(1, 0))
    save_picture(batches.folder / "hints.png", sets)
    figures = {kind: compare_hints(each, maker) for kind, each in sets.items()}
    return {"n_samples": settings.n_samples, "kind": maker.kind, "figures": figures}


def held_out(real: TrainingImages, indices: list[int]) -> Batch:
    """Returns held-out items, in turn."""
    return real[[index % len(real) for index in indices]]


def is_read(name: str, conditions: tuple[str, ...]) -> bool:
    """Returns whether a field of a batch is one of the conditions, or the mask of one."""
    return name in conditions or name.removesuffix("_mask") in conditions


def collect(name: str, count: int, make: Callable[[list[int]], Batch], batches: ResumableBatches) -> Images:
    """Returns `count` images with their hints; those of an interrupted command are kept."""
    parts = [*progress(batches.resume(name, range(count), make), count, NAMES[name])]
    return Images(*(torch.cat([part[key] for part in parts]) for key in ("image", "hint")))


def compare_hints(images: Images, maker: HintMaker) -> dict[str, float | None]:
    """Compares the hints of images with those that they belong to: the agreement of edges, or the mean PSNR in dB of
    those that differ."""
    own = torch.stack([maker({"image": image}).as_subclass(Tensor) for image in images.images])
    if maker.kind == "edges":
        counts = count_edges(images.hints[:, 0] > 127, own[:, 0] > 127)
        return {"precision": counts.precision, "recall": counts.recall, "f1": counts.f1}
    values = psnr(images.hints, own)
    finite = values[values.isfinite()]
    return {"psnr": finite.mean().item() if len(finite) else None, "equal": len(values) - len(finite)}


def save_picture(path: Path, sets: dict[str, Images]) -> None:
    """Saves the first images of each set in a row each, below their hints."""
    rows = {"hint": sets[SAMPLES].hints}
    rows |= {heading: sets[kind].images for kind, heading in HEADINGS.items() if kind in sets}
    images = [grey_to_rgb(each[:PICTURED]) if each.shape[1] == 1 else each[:PICTURED] for each in rows.values()]
    count = len(images[0])
    captions = [caption for name in rows for caption in (name, *[""] * (count - 1))]
    save_grid(path, torch.cat(images), columns=count, captions=captions)


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the figures by set of images."""
    names = [*results["figures"][SAMPLES]]
    rows = [("", *names)]
    for kind, figures in results["figures"].items():
        rows.append((NAMES[kind], *(three_digits(figures[name]) for name in names)))
    hints = f"{results['n_samples']:,} images; hints of their own, of the kind {results['kind']}, against those given"
    if results["kind"] == "edges":
        hints += "; an edge may be a pixel off"
    return "\n".join([table(rows), "", hints, "", str(folder / "results.json"), str(folder / "hints.png")])


if __name__ == "__main__":
    run_experiment("check_hints", Config, measure, report, prepare=prepare, one_process=True)
