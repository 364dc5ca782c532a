"""Checks what the experts of a model have learned: images with the same noise, with and without two experts swapped.

Where an expert's regions change, and are no longer taken for their classes, its weights were those of its classes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import torch
from torch import Tensor, nn

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.report import progress, table
from experiments.metrics.layout.judges import judge_split, load_judges, load_scenes, open_scenes
from experiments.metrics.layout.layout_pictures import draw_rows, pair_images, save_picture
from experiments.metrics.layout.layouts import Layouts
from experiments.metrics.layout.map_obedience import (
    CLASS,
    COLOR,
    MEANINGS,
    REGIONS,
    REST,
    Estimate,
    Groups,
    estimate_words,
    jackknife,
    name_groups,
)
from experiments.metrics.layout.obedience import open_measurement
from models.experts import Experts, experts_of
from models.ranges import SEED, check_ranges
from models.router import ClassRouter, Router, Routing
from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.distributed import DistContext
from train.loop import Batch
from train.trained_sampler import TrainedSampler

SAMPLES, SWAPPED, REAL_SCENES = "samples", "swapped", "real scenes"  # what is measured
GAIN = 2  # of the difference in the picture
PICTURE = "experts.png"


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """Experts."""

    swap_experts: tuple[int, int] = (0, 1)
    """Experts that change places, by number: the groups of --experts in their order, then that of all other places."""
    n_images: int = 100
    """Held-out maps, of each of which two images are drawn."""
    judge_seed: int = 0
    """Random seed of the judges."""

    EVERYDAY = ("swap_experts", "n_images")
    RANGES = {"swap_experts": "[0, 65535]", "n_images": "[2, 1000000000]", "judge_seed": SEED}

    def __post_init__(self):
        check_ranges(self)
        if self.swap_experts[0] == self.swap_experts[1]:
            raise ValueError(f"got swap_experts {' '.join(map(str, self.swap_experts))}, wanted two different ones")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks what experts have learned, by swapping two of them; writes results.json and experts.png to
    <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/check_experts.py --sampler ddpm --dataset shapes",
        "python experiments/check_experts.py --sampler ddpm --dataset shapes --swap_experts 0 2 --guidance 2",
    )

    experts: SwapConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Opens the held-out maps. ValueError: a model without experts, or without two such, or other conditions than those
    of held-out images."""
    layers = experts_of(model.sampler.network)
    if not layers:
        raise ValueError(f"{model.run} has no experts: train with --experts or --router_experts")
    count = next(iter(layers.values())).router.count
    if max(config.experts.swap_experts) >= count:
        got = f"got swap_experts {' '.join(map(str, config.experts.swap_experts))}"
        raise ValueError(f"{got} of {count} experts, wanted two numbers from 0 to {count - 1}")
    source = model.condition_source(config.sampling)
    if source.held_out_items([0]) is None:
        raise ValueError("got conditions that are not those of held-out images: leave --condition_file out")
    if config.experts.n_images > len(source.held_out):
        got = f"got n_images {config.experts.n_images} of {len(source.held_out)} held-out maps"
        raise ValueError(f"{got}: pass a number up to {len(source.held_out)}, since a map counts once")
    open_scenes(model.data, model.reader, "val")  # ValueError without regions
    judge_folder = Path(config.output.logs_root).expanduser() / ".cache" / "judges"
    draw = paired_images(model, config.experts.swap_experts, config.output.seed, config.sampling, source)
    return ExperimentSetup((config.experts, draw, judge_folder), source=source)


def paired_images(
    model: TrainedSampler, experts: tuple[int, int], seed: int, options: SamplingConfig, source: ConditionSource
) -> Callable[[list[int]], Batch]:
    """Returns a function from indices to batches: images (B, C, H, W) as the model draws them, those with two experts
    swapped, the held-out items of their conditions (B,), and the rows (B, E) of each expert, as means of a batch."""
    network = model.sampler.network

    def draw(indices: list[int]) -> Batch:
        batch = {"item": source.held_out_items(indices)}
        for name in (SAMPLES, SWAPPED):
            swap = swapped_experts(network, *experts) if name == SWAPPED else nullcontext()
            with swap, counted_rows(network) as rows:
                batch[name] = model.draw(indices, seed, options, source.draw(seed, indices))["image"]
            if name == SAMPLES:
                batch["rows"] = (rows / len(indices)).repeat(len(indices), 1)
        return batch

    return draw


@contextmanager
def swapped_experts(network: nn.Module, first: int, second: int) -> Iterator[None]:
    """Lets two experts change places, in all layers of a network, while it is open."""
    layers = experts_of(network).values()
    weights = [weight for layer in layers for part in (layer.expand, layer.contract) for weight in part.parameters()]

    @torch.no_grad()
    def swap() -> None:
        for weight in weights:
            weight[[first, second]] = weight[[second, first]]

    swap()
    try:
        yield
    finally:
        swap()


@contextmanager
def counted_rows(network: nn.Module) -> Iterator[Tensor]:
    """Yields the rows (E,) float64 that each expert computes while it is open, in all layers together."""
    routers = [layer.router for layer in experts_of(network).values()]
    rows = torch.zeros(routers[0].count, dtype=torch.float64)

    def add(router: Router, inputs: tuple[Any, ...], routing: Routing) -> None:
        rows.add_(routing.counts.cpu())

    handles = [router.register_forward_hook(add) for router in routers]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def measure(
    settings: SwapConfig,
    draw: Callable[[list[int]], Batch],
    judge_folder: Path,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Draws the images, opens or trains the judges, computes all figures and saves PICTURE. All ranks must call it;
    only the main rank gets the results."""
    is_main, count = batches.world.is_main, settings.n_images
    parts = [*progress(batches.resume("pairs", range(count), draw), count, "sampling", is_main)]
    if not is_main:
        return None
    drawn = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    source = open_scenes(model.data, model.reader, "val")
    real = load_scenes(source, drawn["item"].tolist(), "real scenes")
    if len(real.items) < count:
        raise ValueError("an image of the validation split cannot be read any more: repair the data")
    judging = open_scenes(model.data, model.reader, judge_split(model.data))
    judges = load_judges(judging, judge_folder, settings.judge_seed)
    measurement, names = open_measurement(judges, judging, settings.judge_seed), judging.dataset.region_classes
    groups = groups_of(model.sampler.network, names)
    images = {SAMPLES: drawn[SAMPLES], SWAPPED: drawn[SWAPPED], REAL_SCENES: real.images}
    maps = {name: measurement.of_maps(each, real.layouts, groups) for name, each in images.items()}
    if None in maps.values():
        raise ValueError("got a data set without maps of classes, wanted panoptic or semantic maps")
    difference = (drawn[SAMPLES].int() - drawn[SWAPPED].int()).abs()
    shown = {name: images[name] for name in (SAMPLES, SWAPPED)}
    shown["difference"] = (GAIN * difference).clamp(max=255).to(torch.uint8)
    rows, size = pair_images(real.layouts, [*shown.values()], maps=True), tuple(real.images.shape[2:])
    save_picture(batches.folder / PICTURE, draw_rows(rows, size, names, headings=("map", *shown)))
    rows = drawn["rows"].mean(0)
    return {
        "experts": expert_names(model.sampler.network, names),
        "swapped": [*settings.swap_experts],
        "n_images": count,
        "change": changes(difference, real.layouts, groups),
        "maps": maps,
        "rows": (rows / rows.sum()).tolist(),
        "distances": distances(model.sampler.network).tolist(),
        "judge": judges.hashes["scene network"],
    }


def groups_of(network: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Returns the groups of classes of the experts of a network by name or, of a learned router, each class by itself;
    all classes come first."""
    router = next(iter(experts_of(network).values())).router
    return name_groups(router.groups if isinstance(router, ClassRouter) else [(i,) for i in range(len(names))], names)


def expert_names(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Returns the classes of each expert in words, or of a learned router its number."""
    router = next(iter(experts_of(network).values())).router
    if not isinstance(router, ClassRouter):
        return [f"expert {number}" for number in range(router.count)]
    return [", ".join(names[number] for number in group) for group in router.groups] + [REST]


def changes(difference: Tensor, layouts: Layouts, groups: Groups) -> dict[str, Estimate | None]:
    """Returns the mean change of pixels, as a share of their range, inside the regions of each group of classes:
    differences (N, C, H, W) in [0, 255]."""
    change, figures = difference.double().mean(1) / 255, {}  # (N, H, W)
    for name, classes in groups.items():
        inside = torch.isin(layouts.pixels.long(), torch.tensor(classes, dtype=torch.long))
        sums = torch.stack([(change * inside).sum((1, 2)), inside.sum((1, 2)).double()], 1)
        figures[name] = jackknife(sums, lambda sums: sums[..., 0] / sums[..., 1])
    return figures


@torch.no_grad()
def distances(network: nn.Module) -> Tensor:
    """Returns how far experts have moved from each other since they started as copies, (E, E) float64: the norm of the
    difference of their weights, over all layers, as a share of the root of the mean square of their norms."""
    weights = [weights_of(layer) for layer in experts_of(network).values()]
    squares = sum(each.square().sum(1) for each in weights)  # (E,)
    exact = "donot_use_mm_for_euclid_dist"  # 0 between copies
    apart = sum(torch.cdist(each, each, compute_mode=exact).square() for each in weights)
    return (apart / ((squares[:, None] + squares[None]) / 2)).sqrt()


def weights_of(layer: Experts) -> Tensor:
    """Returns the weights of each expert of a layer, (E, numbers) float64."""
    return torch.cat([part.weight.double().flatten(1) for part in (layer.expand, layer.contract)], 1).cpu()


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats what changes in the regions of each group, and the use and the distances of experts."""
    maps, names = results["maps"], results["experts"]
    first, second = (names[number] for number in results["swapped"])
    groups = [("regions", "number", "change", *(f"{name}, {kind}" for name in (CLASS, COLOR) for kind in maps))]
    for group, change in results["change"].items():
        figures = (estimate_words(maps[kind][group][name]) for name in (CLASS, COLOR) for kind in maps)
        groups.append((group, f"{maps[SAMPLES][group][REGIONS]:,}", estimate_words(change), *figures))
    experts = [("expert", "classes", "rows", *(f"to {number}" for number in range(len(names))))]
    for number, (name, rows, own) in enumerate(zip(names, results["rows"], results["distances"], strict=True)):
        experts.append((str(number), name, f"{rows:.3f}", *(f"{each:.3f}" for each in own)))
    return "\n".join(
        [
            f"{results['n_images']} held-out maps, the same noise; swapped: {first} and {second}",
            *("", table(groups), "", table(experts), ""),
            "change: mean difference of pixels there, as a share of their range, ± standard error over images",
            f"class: {MEANINGS[CLASS]}; colour: {MEANINGS[COLOR]}",
            "rows: share of the rows that an expert computes, in all layers",
            "to 0, 1, ...: distance of the weights of two experts, as a share of their size: 0 at the start",
            *("", str(folder / "results.json"), str(folder / PICTURE)),
        ]
    )


if __name__ == "__main__":
    run_experiment("check_experts", Config, measure, report, prepare=prepare)
