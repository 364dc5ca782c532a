"""Shows where each word or object of an image is attended to while it is generated, or what a place of it attends to.

Maps of words follow DAAM (Tang et al. 2023), for samples and for real images. Saves the maps, pictures of them over the
images, and how much those of an image overlap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import _root
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from experiments.harness.attention_targets import (
    MappedImages,
    RealImages,
    Target,
    conditions_of_part,
    file_word,
    find_targets,
    read_masks,
    relative_heat,
)
from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.layout_inputs import open_layouts
from experiments.harness.prompt_inputs import FIELD as CAPTION
from experiments.harness.prompt_inputs import check_reads_prompts, encode_with_weights
from experiments.harness.report import progress, table
from experiments.metrics.heat_pictures import Panel, draw_heat, draw_sheet, heat_panels
from experiments.metrics.layout.layout_pictures import panel_size, save_picture
from models.attention_recorder import AttentionMaps, Box, MapRecorder
from models.heat_maps import enlarge, heat_maps, intersection_over_union
from models.ranges import COUNT, MILLION, check_ranges
from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.distributed import DistContext
from train.files import atomic_write
from train.loop import Batch
from train.samplers._conditions import fields_by_condition
from train.trained_sampler import TrainedSampler

MOST_ROWS, MOST_STEPS = 8, 10  # images of a sheet, and steps of an image
OVERLAP = 0.5  # of the range of an image's heat: places above it belong to a word
PLACE = Target("what it attends to", "", (0,))


@dataclass(frozen=True, kw_only=True)
class MapsConfig:
    """Maps."""

    n_samples: int = 4
    """Number of images."""
    prompt: str | None = None
    """Text that all images show, for a run with --conditions text; if omitted, captions are those of held-out
    images."""
    negative: str | None = None
    """Text that guidance moves away from, in place of the null; --chain_part 0 maps its words."""
    prompt_syntax: Literal["plain", "a1111", "compel"] = "plain"
    """Syntax of --prompt and --negative; see get_samples.py. --words are plain: red of (red:1.3)."""
    words: tuple[str, ...] = ()
    """Words or phrases of the text to map, such as hat "red disc"; if omitted, all words, objects and fields."""
    layouts: str | None = None
    """File or folder of layouts, used in turn, whose objects are mapped; see get_samples.py."""
    masks: str | None = None
    """Folder of pictures, white where a word or object is, to compare the maps with: red_disc.png for the red disc of
    all images, 000001_red_disc.png for that of image 1."""
    look_from: Box | None = None
    """Instead, what this part of the image attends to by self-attention: left, top, right and bottom as fractions."""
    real: bool = False
    """Map held-out images instead of samples: they are noised at --real_times levels, one network call each."""
    real_times: int = 10
    """Noise levels of --real."""
    gated: bool = False
    """Read the attention to gated tokens, of --boxes_gated, instead of the other cross-attention."""
    chain_part: int = -1
    """Which condition of the guidance chain is mapped, with its words and objects: -1 is the last, which has all, 0 the
    null, or --negative."""
    map_layers: tuple[str, ...] = ()
    """Layers to average, such as up_blocks.0.1.cross; if omitted, those going up and down, as DAAM, or all."""
    relative: bool = False
    """Divide the heat in each place by that of all words and objects of the image."""
    signed: bool = False
    """Keep negative values, as maps of differential attention have them."""
    daam: bool = False
    """Add up the steps as DAAM does, instead of their mean."""
    by_layer: bool = False
    """Also save the maps of each layer and head."""
    by_step: bool = False
    """Also save the maps of each network call, and steps.png."""

    EVERYDAY = ("prompt", "words", "layouts", "look_from")
    RANGES = {"n_samples": COUNT, "real_times": MILLION, "chain_part": "[-4, 3]", "look_from": "[0, 1]"}

    def __post_init__(self):
        check_ranges(self)
        if self.prompt is not None and self.layouts is not None:
            raise ValueError("got --prompt and --layouts: pass one of them")
        given = next((name for name in ("prompt", "layouts") if getattr(self, name) is not None), None)
        if self.real and given is not None:
            raise ValueError(f"got real images, which have conditions of their own, and {given}: leave one of them out")
        if self.relative and self.signed:
            raise ValueError("got --relative and --signed, whose negative values have no shares: leave one of them out")
        if self.real and self.negative is not None:
            raise ValueError("got negative for real images, which are read without guidance: leave --negative out")
        if self.prompt_syntax != "plain" and self.prompt is None:
            raise ValueError(f"got prompt_syntax {self.prompt_syntax} without a prompt: pass --prompt TEXT")
        if not self.real and self.real_times != MapsConfig.real_times:
            raise ValueError(f"got real_times {self.real_times} without --real: pass --real, or leave --real_times out")
        if self.look_from is not None:
            if given := [name for name in ("words", "masks", "gated", "relative") if getattr(self, name)]:
                raise ValueError(f"got look_from, which reads self-attention, and {given[0]}: leave one of them out")
            self.make_recorder()

    def make_recorder(self) -> MapRecorder:
        """Returns a recorder of these maps."""
        reads = "self" if self.look_from is not None else "gated" if self.gated else "tokens"
        options = {"layers": self.map_layers or None, "per_step": self.by_step, "box": self.look_from}
        return MapRecorder(reads, part=self.chain_part, **options)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Maps attention; writes maps.npz (heat: N x words x h x w), maps.png, overlays/ and results.json to
    <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/attention_maps.py --load_dir {sampler}_shapes_captions",
        "python experiments/attention_maps.py --load_dir {sampler}_mnist --look_from 0.4 0 0.6 0.2",
    )

    maps: MapsConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Plans the images and what is mapped. ValueError: the model has no such conditions or layers."""
    settings, sampling, output = config.maps, config.sampling, config.output
    provenance, source = {}, None
    if settings.real:
        images = RealImages.open(model, settings.n_samples, sampling, output.seed, settings.real_times)
    else:
        source, provenance = open_source(settings, model, sampling)
        images = GeneratedImages(model, output.seed, sampling, source, settings.negative, settings.prompt_syntax)
    targets = [[PLACE]] * settings.n_samples
    if settings.look_from is None:
        targets = targets_of(model, images, settings, output.batch_size)
    masks = None
    if settings.masks is not None:
        masks, digest = read_masks(settings.masks, targets, model.data.size)
        provenance |= {"masks_sha256": digest}
    draw = mapped_images(settings, images, targets)
    arguments = settings, targets, masks, draw
    return ExperimentSetup(arguments, provenance, source=source, draws=source is not None)


def open_source(
    settings: MapsConfig, model: TrainedSampler, options: SamplingConfig
) -> tuple[ConditionSource, dict[str, str]]:
    """Returns the source of the conditions of samples, and what identifies its file."""
    if settings.negative is not None:
        check_reads_prompts(model, replace(options, condition_file=None))
        if options.guidance == 1:
            got = f"got negative {settings.negative!r} with guidance 1, which ignores it"
            raise ValueError(f"{got}: pass --guidance 3, or so")
    if settings.layouts is not None:
        inputs = open_layouts(settings.layouts, model, options)
        return inputs.source, inputs.provenance
    if settings.prompt is None:
        return model.condition_source(options), {}
    check_reads_prompts(model, options)
    return model.condition_source(options, skip=("caption",)).with_values(caption=settings.prompt), {}


@dataclass(frozen=True)
class GeneratedImages:
    """Samples, whose conditions come from a source: `MappedImages`."""

    model: TrainedSampler
    seed: int
    options: SamplingConfig
    source: ConditionSource
    negative: str | None  # text that guidance moves away from
    syntax: str  # of texts

    def conditions(self, indices: list[int]) -> Batch | None:
        return self.source.draw(self.seed, indices)

    def conditions_of_part(self, indices: list[int], part: int) -> Batch:
        negative = None if self.negative is None else {CAPTION: [self.negative] * len(indices)}
        return conditions_of_part(self.model, self.options, self.conditions(indices), part, negative)

    def record(self, indices: list[int], recorder: MapRecorder) -> Tensor:
        conditions, negative = self.conditions(indices), None
        if self.syntax != "plain":
            conditions |= encode_with_weights(conditions[CAPTION], self.syntax, self.model)
        if self.negative is not None:
            negative = encode_with_weights([self.negative] * len(indices), self.syntax, self.model)
        options = {"negative": negative, "recorder": recorder}
        return self.model.draw(indices, self.seed, self.options, conditions, **options)["image"]


def targets_of(
    model: TrainedSampler, images: MappedImages, settings: MapsConfig, batch_size: int
) -> list[list[Target]]:
    """Returns what is mapped in each image. ValueError for a model without conditions that are attended to."""
    targets, count = [], settings.n_samples
    for indices in torch.arange(count).split(batch_size):
        if images.conditions(indices.tolist()) is None:
            raise ValueError(f"got {model.run}, which has no conditions: pass --look_from, or a run with --conditions")
        targets += targets_in_batch(images, settings, indices.tolist(), settings.words)
    if not any(targets):
        raise ValueError(f"got {count} images without words or objects to map: pass --prompt TEXT or --layouts FILE")
    return targets


def targets_in_batch(
    images: MappedImages, settings: MapsConfig, indices: list[int], words: Sequence[str] = ()
) -> list[list[Target]]:
    """Returns these words of images, or all of their targets, in the part of the chain that is mapped.

    ValueError: that part is null.
    """
    batch = images.conditions_of_part(indices, settings.chain_part)
    encoders = images.model.sampler.network.encoders
    fields_of = fields_by_condition(encoders)
    mapped = {
        field
        for name in encoders
        if encoders[name].token_width or encoders[name].gated_width
        for field in fields_of[name]
    }
    if settings.chain_part != -1 and mapped.isdisjoint(batch):
        got = f"got chain_part {settings.chain_part}, which has no words or objects"
        raise ValueError(f"{got}: pass --negative TEXT, whose words part 0 has, or leave --chain_part out")
    return find_targets(images.model, batch, len(indices), words, settings.gated, settings.prompt_syntax)


def mapped_images(
    settings: MapsConfig, images: MappedImages, targets: Sequence[Sequence[Target]]
) -> Callable[[list[int]], Batch]:
    """Returns a function from indices to batches of images and their maps: "heat" (B, T, h, w), NaN where an image has
    fewer than T targets, "calls" (B,); and if they are wanted "times" (B, S), "heat_by_step" (B, S, T, h, w), and
    "layer/<name>" (B, heads, T, h, w)."""
    most = max(map(len, targets))

    def draw(indices: list[int]) -> Batch:
        recorder, own = settings.make_recorder(), [targets[i] for i in indices]
        batch: Batch = {"image": images.record(indices, recorder)}
        maps = recorder.maps(mean=not settings.daam)
        layers, others = settings.map_layers or None, None
        if settings.relative:
            others = targets_in_batch(images, settings, indices)

        def heat_of(maps: AttentionMaps, rows: Sequence[int]) -> Tensor:
            heat = heat_maps(maps, layers, signed=settings.signed).cpu()
            if others is not None:
                heat = relative_heat(heat, [others[row] for row in rows], maps.spans)
            return select_targets(heat, [own[row] for row in rows], maps.spans, most)

        batch |= {"heat": heat_of(maps, range(len(indices))), "calls": maps.counts}
        if settings.by_step:
            times = torch.full((len(indices), len(recorder.steps)), torch.nan)
            by_step = torch.full((len(indices), len(recorder.steps), *batch["heat"].shape[1:]), torch.nan)
            for i, step in enumerate(recorder.steps):
                times[step.images, i] = step.times.float()
                part = AttentionMaps(step.layers, maps.spans, maps.size, torch.ones_like(step.images))
                by_step[step.images, i] = heat_of(part, step.images.tolist())
            batch |= {"times": times, "heat_by_step": by_step}
        for name, layer in maps.layers.items() if settings.by_layer else ():
            planes = [select_targets(head.permute(0, 3, 1, 2).cpu(), own, maps.spans, most) for head in layer.unbind(1)]
            batch[f"layer/{name}"] = torch.stack(planes, 1)
        return batch

    return draw


def select_targets(heat: Tensor, targets: Sequence[Sequence[Target]], spans: dict[str, slice], most: int) -> Tensor:
    """Returns the mean heat of the tokens of each image's targets: (B, M, h, w) -> (B, most, h, w), then NaN."""
    selected = heat.new_full((len(heat), most, *heat.shape[2:]), torch.nan)
    for row, own in enumerate(targets):
        for i, target in enumerate(own):
            keys = list(target.tokens) if not target.condition else target.keys(spans)
            selected[row, i] = heat[row, keys].mean(0)
    return selected


def measure(
    settings: MapsConfig,
    targets: list[list[Target]],
    masks: list[list[Tensor | None]] | None,
    draw: Callable[[list[int]], Batch],
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Saves the maps and their pictures. All ranks must call it; only the main rank gets the results."""
    is_main, count = batches.world.is_main, settings.n_samples
    parts = list(progress(batches.resume("maps", range(count), draw), count, "mapping", is_main))
    if not is_main:
        return None
    arrays = join_batches(parts)
    names = [[target.name for target in own] for own in targets]
    most = max(map(len, names))
    words = np.array([own + [""] * (most - len(own)) for own in names])
    with atomic_write(batches.folder / "maps.npz") as scratch, scratch.open("wb") as file:
        np.savez_compressed(file, names=words, **{name: array.numpy() for name, array in arrays.items()})
    save_pictures(batches.folder, arrays["image"], arrays["heat"], names)
    if settings.by_step:
        first = next(i for i, own in enumerate(names) if own)
        sheet = draw_steps(arrays["image"][first], arrays["heat_by_step"][first], arrays["times"][first], names[first])
        save_picture(batches.folder / "steps.png", sheet)
    size = tuple(arrays["image"].shape[2:])
    records = [
        {"names": own, "calls": calls, "overlaps": overlaps(heat[: len(own)], size)}
        for own, calls, heat in zip(names, arrays["calls"].tolist(), arrays["heat"], strict=True)
    ]
    if masks is not None:
        for record, heat, own in zip(records, arrays["heat"], masks, strict=True):
            record["mask_overlaps"] = mask_overlaps(heat[: len(own)], own)
    results = {"n_samples": count, "seed": batches.seed, "prompt": settings.prompt, "images": records}
    return results if settings.negative is None else results | {"negative": settings.negative}


def join_batches(parts: Sequence[Batch]) -> dict[str, Tensor]:
    """Concatenates batches; those with fewer steps than others get NaN at the end."""
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name in ("times", "heat_by_step"):
            longest = max(tensor.shape[1] for tensor in tensors)
            gaps = [[0] * (2 * tensor.ndim - 4) + [0, longest - tensor.shape[1]] for tensor in tensors]
            tensors = [pad(tensor, gap, value=torch.nan) for tensor, gap in zip(tensors, gaps, strict=True)]
        joined[name] = torch.cat(tensors)
    return joined


def overlaps(heat: Tensor, size: tuple[int, int]) -> list[list[float]]:
    """Returns the intersection over union of what heat (T, h, w) marks in an image, of each map with each: T x T."""
    if not len(heat):
        return []
    masks = enlarge(heat, size) > OVERLAP
    return intersection_over_union(masks.unsqueeze(1), masks.unsqueeze(0)).tolist()


def mask_overlaps(heat: Tensor, masks: Sequence[Tensor | None]) -> list[float | None]:
    """Returns the intersection over union of what heat (T, h, w) marks in an image with the mask (H, W) bool of each
    map, None without one."""
    return [
        None if mask is None else intersection_over_union(enlarge(own, tuple(mask.shape)) > OVERLAP, mask).item()
        for own, mask in zip(heat, masks, strict=True)
    ]


def save_pictures(folder: Path, images: Tensor, heat: Tensor, names: Sequence[Sequence[str]]) -> None:
    """Saves maps.png, the first images with their maps, and overlays/, each map of all images."""
    rows = []
    for i, (image, own, words) in enumerate(zip(images, heat, names, strict=True)):
        panels = heat_panels(image, own[: len(words)], words, f"image {i}")
        rows += [panels] if i < MOST_ROWS else []
        for k, panel in enumerate(panels[1:]):
            save_picture(folder / "overlays" / f"{i:06d}_{k:02d}_{file_word(panel.name)}.png", panel.picture)
    save_picture(folder / "maps.png", draw_sheet(rows))


def draw_steps(image: Tensor, heat: Tensor, times: Tensor, names: Sequence[str]) -> Image.Image:
    """Draws the maps of an image uint8 (C, H, W) in some of the calls that evaluated it, heat (S, T, h, w) at times
    (S,): a row for each name."""
    calls = times.isfinite().nonzero()[:, 0]
    chosen = calls[torch.linspace(0, len(calls) - 1, min(len(calls), MOST_STEPS)).round().long()].tolist()
    size = panel_size(tuple(image.shape[1:]))
    return draw_sheet(
        [
            [Panel(f"{name}, t = {times[call]:.2f}", draw_heat(image, heat[call, k], size)) for call in chosen]
            for k, name in enumerate(names[:MOST_ROWS])
        ]
    )


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the mean overlap of the maps of each word with its masks, if there are any, and with those of the other
    words, if all images have the same."""
    lines, images = (
        [f"{results['n_samples']} images: {folder / 'maps.npz'}", f"{folder / 'maps.png'}"],
        results["images"],
    )
    names = images[0]["names"]
    if len(names) > 1 and all(image["names"] == names for image in images):
        mean = np.mean([image["overlaps"] for image in images], 0)
        rows = [
            ("overlap", *names),
            *((name, *(f"{each:.2f}" for each in row)) for name, row in zip(names, mean, strict=True)),
        ]
        lines = [table(rows), "", *lines]
    if "mask_overlaps" in images[0]:
        lines = [mask_table(images), "", *lines]
    return "\n".join(lines)


def mask_table(images: Sequence[dict[str, Any]]) -> str:
    """Formats the mean overlap of the maps of each word with its masks."""
    found: dict[str, list[float]] = {}
    for image in images:
        for name, overlap in zip(image["names"], image["mask_overlaps"], strict=True):
            if overlap is not None:
                found.setdefault(name, []).append(overlap)
    rows = [(name, f"{np.mean(own):.2f}", f"{len(own):,}") for name, own in found.items()]
    return table([("overlap with masks", "mean", "images"), *rows])


if __name__ == "__main__":
    run_experiment("maps", Config, measure, report, prepare=prepare)
