"""Checks whether the attention to words and boxes lies on their objects, in held-out images whose masks are known.

The images are noised and read under their own captions and boxes. A map marks the places above a threshold, which is
chosen on one half of the images and applied to the other; so is the layer, on wish. Beside each figure stands that of
the word, or the box, of another object of the same image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from torch import Tensor

from experiments.harness.attention_targets import RealImages, Target, find_targets, relative_heat
from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.report import progress, table
from experiments.metrics.heat_pictures import draw_sheet, heat_panels
from experiments.metrics.layout.layout_pictures import save_picture
from models.attention_recorder import MapRecorder, Reads, find_layers
from models.conditioning import RegionEncoder
from models.conditions.text import CaptionEncoder, find_words
from models.heat_maps import enlarge, heat_maps, intersection_over_union, mean_heat, share_inside
from models.ranges import COUNT, MILLION, check_ranges
from train.config import SamplingConfig
from train.distributed import DistContext
from train.loop import Batch
from train.trained_sampler import TrainedSampler

WORDS, BOXES = "words", "boxes"
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))  # of the range of an image's heat
MOST_ROWS = 8  # images in the picture
PICTURE = "attention_maps.png"
Choices = dict[Reads, list[tuple[str, ...] | None]]  # of the layers that maps are averaged over; None: as in DAAM


@dataclass(frozen=True, kw_only=True)
class CheckMapsConfig:
    """Check."""

    n_images: int = 200
    """Number of held-out images, a fixed random subset."""
    real_times: int = 10
    """Noise levels of each image, one network call each."""
    map_layers: tuple[str, ...] = ()
    """Layers to average, such as up_blocks.0.1.cross; if omitted, those going up and down, as DAAM, or all."""
    best_layer: bool = False
    """Compare each layer alone with the mean of all, and choose the one with the largest overlap with the objects, on
    the half of the images on which the threshold is chosen."""

    relative: bool = False
    """Divide the heat in each place by that of all words and objects of the image."""

    EVERYDAY = ("n_images", "real_times", "best_layer", "relative")
    RANGES = {"n_images": COUNT, "real_times": MILLION}

    def __post_init__(self):
        check_ranges(self)
        if self.best_layer and self.map_layers:
            raise ValueError("got best_layer and map_layers: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks attention maps; writes results.json and attention_maps.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/check_attention_maps.py --config configs/digit_pairs.yaml",
        "python experiments/check_attention_maps.py --load_dir {sampler}_shapes_words",
    )

    check: CheckMapsConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


class Thing(NamedTuple):
    """An object of an image, and what stands for it in the conditions."""

    kind: str  # WORDS or BOXES
    target: Target
    mask: Tensor  # (H, W) bool: where it is visible; for BOXES its box


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Finds the objects. ValueError: the model reads neither captions nor boxes, or the data have no masks for them."""
    settings, output = config.check, config.output
    images = RealImages.open(model, settings.n_images, config.sampling, output.seed, settings.real_times)
    things = [find_things(model, images, index) for index in range(settings.n_images)]
    if not any(things):
        got = f"got {settings.n_images} images of {model.data.dataset} without words or boxes of objects"
        raise ValueError(f"{got}: train with --conditions text or boxes on data with masks, as digit_pairs or shapes")
    choices = find_choices(settings, model, streams_of(model, things))
    return ExperimentSetup((settings, images, things, choices), draws=False)


def find_things(model: TrainedSampler, images: RealImages, index: int) -> list[Thing]:
    """Returns the objects of an image that the model is given.

    Those of words are the objects whose words occur once in the caption, if nothing else there has them.
    """
    item, things = images.source[images.items[index]], []
    size, encoders = tuple(item["image"].shape[-2:]), model.sampler.network.encoders
    for name, encoder in encoders.items():
        if isinstance(encoder, CaptionEncoder) and {"masks", "box_words"} <= item.keys():
            caption, masks = images.conditions([index])["caption"][0], visible_masks(item["masks"].as_subclass(Tensor))
            for words, mask in zip(item["box_words"], masks, strict=True):
                if is_named_once(caption, words, item["box_words"], encoder) and mask.any():
                    (target,) = find_targets(model, {"caption": [caption]}, 1, [words])[0]
                    things.append(Thing(WORDS, target, mask))
        reads_boxes = isinstance(encoder, RegionEncoder) and "segment_id" not in encoder.fields  # regions are its boxes
        if reads_boxes and encoder.tokens_per_region == 1 and "boxes" in item:
            if encoder.token_width or encoder.gated_width:
                for region, box in enumerate(item["boxes"].as_subclass(Tensor)):
                    target = Target(f"box {region}", name, tuple(encoder.tokens_of_region(region)))
                    things.append(Thing(BOXES, target, box_mask(box, size)))
    return [thing for thing in things if thing.mask.any()]


def is_named_once(caption: str, words: str, others: Sequence[str], encoder: CaptionEncoder) -> bool:
    """Whether the words of an object, of all `others` of its image too, stand for it alone in a caption."""
    if list(others).count(words) > 1:
        return False
    try:
        return len(find_words(caption, words, encoder.tokenizer)) == 1
    except ValueError:  # the caption says it in other words, such as a plural
        return False


def visible_masks(masks: Tensor) -> Tensor:
    """Returns the visible parts of objects (R, H, W), of which later ones are in front: (R, H, W) bool."""
    masks = masks > 0
    in_front = masks.flip(0).cumsum(0).flip(0) - masks.long()  # how many cover each place
    return masks & (in_front == 0)


def box_mask(box: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the pixels (H, W) bool whose centres a box covers: left, top, right and bottom in pixels."""
    left, top, right, bottom = box.tolist()
    rows, columns = (torch.arange(side) + 0.5 for side in size)
    return ((top <= rows) & (rows < bottom))[:, None] & ((left <= columns) & (columns < right))


def measure(
    settings: CheckMapsConfig,
    images: RealImages,
    things: list[list[Thing]],
    choices: Choices,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Records the maps, computes all figures and saves attention_maps.png. All ranks must call it; only the main rank
    gets the results."""
    is_main, most = batches.world.is_main, max(map(len, things))
    draw = compared_images(settings, images, things, most, choices)
    parts = batches.resume("compared", range(settings.n_images), draw)
    parts = list(progress(parts, settings.n_images, "mapping", is_main))
    if not is_main:
        return None
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    kinds = torch.zeros(len(things), most, dtype=torch.long)  # 1 and 2: WORDS and BOXES
    for row, own in enumerate(things):
        kinds[row, : len(own)] = torch.tensor([1 + (thing.kind == BOXES) for thing in own], dtype=torch.long)
    names = {WORDS: kinds == 1, BOXES: kinds == 2}
    results = {name: compute_figures(whole, chosen) for name, chosen in names.items() if chosen.any()}
    rows = []
    for number, (image, own) in enumerate(list(zip(whole["image"], things, strict=True))[:MOST_ROWS]):
        heat = [whole[f"heat_{results[thing.kind]['choice']}"][number, i] for i, thing in enumerate(own)]
        rows.append(heat_panels(image, heat, [thing.target.name for thing in own]))
    save_picture(batches.folder / PICTURE, draw_sheet(rows))
    return {kind: {**figures, "layers": name_layers(choices, figures["choice"])} for kind, figures in results.items()}


def streams_of(model: TrainedSampler, things: Sequence[Sequence[Thing]]) -> list[Reads]:
    """Returns which attention the objects of all images are read from: to tokens, to gated tokens, or both."""
    encoders = model.sampler.network.encoders
    gated = {bool(encoders[thing.target.condition].gated_width) for own in things for thing in own}
    return ["gated" if each else "tokens" for each in sorted(gated)]


def find_choices(settings: CheckMapsConfig, model: TrainedSampler, streams: Sequence[Reads]) -> Choices:
    """Returns the layers that maps may be averaged over: those of the settings and, for the best layer, each alone.

    ValueError: words and gated boxes are read by layers of their own.
    """
    given: list[tuple[str, ...] | None] = [settings.map_layers or None]
    if not settings.best_layer:
        return dict.fromkeys(streams, given)
    if len(streams) > 1:
        got = "got best_layer for a model whose words and gated boxes are read by layers of their own"
        raise ValueError(f"{got}: leave it out, or name layers with --map_layers")
    return {reads: given + [(name,) for name in find_layers(model.sampler.network, reads)] for reads in streams}


def name_layers(choices: Choices, choice: int) -> str:
    """Returns the names of the layers of a choice; all streams have the same choices, or one alone."""
    layers = next(iter(choices.values()))[choice]
    return "mean of layers" if layers is None else " ".join(layers)


def compared_images(
    settings: CheckMapsConfig,
    images: RealImages,
    things: Sequence[Sequence[Thing]],
    most: int,
    choices: Choices,
) -> Callable[[list[int]], Batch]:
    """Returns a function from indices to batches of images with T objects, whose maps are of C choices of layers.

    "image"; "heat_0" (B, T, h, w) of the first choice, and so on; the overlaps with the objects at each of K
    thresholds, "iou", and those of "other" objects' maps (B, T, C, K); the shares of the heat "inside" the objects and
    of other objects' heat, "inside_other" (B, T, C); the "area" of the objects, (B, T). NaN where there is none.
    """
    count = max(map(len, choices.values()))

    def draw(indices: list[int]) -> Batch:
        own = [things[i] for i in indices]
        pixels, heats = record_things(settings, images, indices, own, most, choices)
        size = tuple(pixels.shape[2:])
        columns = {"area": ()} | dict.fromkeys(("inside", "inside_other"), (count,))
        columns |= dict.fromkeys(("iou", "other"), (count, len(THRESHOLDS)))
        batch = {name: torch.full((len(indices), most, *shape), torch.nan) for name, shape in columns.items()}
        for row, each in enumerate(own):
            for i, thing in enumerate(each):
                same_kind = [j for j, other in enumerate(each) if other.kind == thing.kind]
                other = same_kind[(same_kind.index(i) + 1) % len(same_kind)]
                batch["area"][row, i] = thing.mask.float().mean()
                for choice, heat in enumerate(heats):
                    batch["iou"][row, i, choice] = overlaps(heat[row, i], thing.mask, size)
                    batch["inside"][row, i, choice] = share_in(heat[row, i], thing.mask, size)
                    if other != i:
                        batch["other"][row, i, choice] = overlaps(heat[row, other], thing.mask, size)
                        batch["inside_other"][row, i, choice] = share_in(heat[row, other], thing.mask, size)
        return batch | {"image": pixels} | {f"heat_{choice}": heat for choice, heat in enumerate(heats)}

    return draw


def record_things(
    settings: CheckMapsConfig,
    images: RealImages,
    indices: list[int],
    things: Sequence[Sequence[Thing]],
    most: int,
    choices: Choices,
) -> tuple[Tensor, list[Tensor]]:
    """Returns images uint8 (B, C, H, W) and, for each choice of layers, the heat (B, most, h, w) of their objects: NaN
    after the last, and of objects that are read by other layers."""
    pixels, heats = None, {}
    for reads, options in choices.items():
        recorder = MapRecorder(reads, layers=settings.map_layers or None)
        pixels, maps = images.record(indices, recorder), recorder.maps()
        others = []
        if settings.relative:
            others = find_targets(images.model, images.conditions(indices), len(indices), gated=reads == "gated")
        for choice, names in enumerate(options):
            whole = heat_maps(maps, names).cpu()
            whole = relative_heat(whole, others, maps.spans) if settings.relative else whole
            if choice not in heats:
                heats[choice] = whole.new_full((len(indices), most, *whole.shape[2:]), torch.nan)
            for row, own in enumerate(things):
                for i, thing in enumerate(own):
                    if thing.target.condition in maps.spans:
                        heats[choice][row, i] = mean_heat(whole[row, None], thing.target.keys(maps.spans))[0]
    return pixels, list(heats.values())


def overlaps(heat: Tensor, mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the intersection over union of a mask (H, W) with what heat (h, w) marks at each threshold, (K,)."""
    marked = enlarge(heat, size) > torch.tensor(THRESHOLDS).view(-1, 1, 1)
    return intersection_over_union(marked, mask)


def share_in(heat: Tensor, mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the share of heat (h, w) that lies in a mask (H, W), at the size of the image, ()."""
    return share_inside(torch.nn.functional.interpolate(heat[None, None], size=size, mode="area")[0, 0], mask)


def compute_figures(whole: Batch, chosen: Tensor) -> dict[str, Any]:
    """Computes the mean figures of the objects `chosen` (N, T) bool: overlaps of the images with odd numbers, at the
    threshold that is best on the others, and shares inside the objects of all images; of the "choice" of layers that is
    best on the others too."""
    even = (torch.arange(len(chosen)) % 2 == 0)[:, None]
    fitted = mean_of_finite(whole["iou"][even & chosen])  # (C, K)
    choice = int(fitted.amax(1).argmax())
    figures: dict[str, Any] = {"n": int(chosen.sum()), "choice": choice}
    for name in ("iou", "other"):
        fitted, tested = (whole[name][half & chosen][:, choice] for half in (even, ~even))  # (n, K)
        fitted, tested = (part[part.isfinite().all(1)] for part in (fitted, tested))
        if not len(fitted) or not len(tested):
            continue
        best = int(fitted.mean(0).argmax())
        figures[name] = {"n": len(tested), "threshold": THRESHOLDS[best], **spread(tested[:, best])}
    for name in ("inside", "inside_other", "area"):
        values = whole[name][chosen]
        values = values if name == "area" else values[:, choice]
        values = values[values.isfinite()]
        if len(values):
            figures[name] = {"n": len(values), **spread(values)}
    return figures


def mean_of_finite(values: Tensor) -> Tensor:
    """Returns the mean of the finite values (n, ...) in each place, 0 where there are none: (...)."""
    return values.where(values.isfinite(), 0).sum(0) / values.isfinite().sum(0).clamp(min=1)


def spread(values: Tensor) -> dict[str, float]:
    """Returns the mean of values (n,) and its standard error."""
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": values.mean().item(), "error": error}


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the figures of words and boxes."""
    headings = {
        "iou": "overlap (IoU) of its map with the object",
        "other": "  of the map of another object",
        "inside": "share of its map in the object",
        "inside_other": "  of the map of another object",
        "area": "share of the image that the object is",
    }
    rows = [("", "objects", "threshold", "mean")]
    chosen = [f"{kind}: maps of {results[kind]['layers']}" for kind in (WORDS, BOXES) if kind in results]
    for kind in (WORDS, BOXES):
        for name, heading in headings.items() if kind in results else ():
            if name in results[kind]:
                each = results[kind][name]
                threshold = f"{each['threshold']:.2f}" if "threshold" in each else ""
                rows.append(
                    (f"{kind}: {heading}", str(each["n"]), threshold, f"{each['mean']:.3f} ± {each['error']:.3f}")
                )
    return "\n".join((table(rows), "", *chosen, "± standard error", str(folder / PICTURE)))


if __name__ == "__main__":
    run_experiment("checked_maps", Config, measure, report, prepare=prepare)
