"""Checks whether drawn scenes show the things that their captions ask for, by a detector trained on real scenes.

Asks for each colour of each class of things, also for the pairs held out of training, one to three at a time. Beside
every figure stands that of real scenes with the same captions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.report import progress, share, share_words, table
from experiments.metrics.contact_sheet import GAP, LINE, TEXT, cut_text
from experiments.metrics.edit_tasks import kinds_apart
from experiments.metrics.layout.judges import load_judges, open_scenes
from experiments.metrics.layout.layout_pictures import save_picture
from experiments.metrics.layout.scene_network import Contents, find_contents
from models.ranges import check_ranges
from train.config import DataConfig, SamplingConfig
from train.data.nouns import NUMBERS
from train.data.transforms import as_uint8
from train.datasets import shapes
from train.datasets._shapes_scene import COLORS, GROUNDS, PAIRS, THINGS
from train.distributed import DistContext
from train.logging import grid_image
from train.loop import Batch
from train.trained_sampler import TrainedSampler

COUNTS = (1, 2, 3)  # things that a caption asks for
JUDGE_SEED = 0
SEEN, HELD_OUT = "of training", "held out"  # pairs of a colour and a class
SAMPLES, REAL, FLOOR = "samples", "real scenes", "any caption"  # what is measured
PARTS = CLASS, COLOR, BOTH = "class", "colour", "both"  # what an image shows of its caption
NUMBER, PLACES = "number", "grounds"
MOST_ROWS, MOST_IMAGES = 6, 8  # in the picture, and images of a pair there
PICTURE = "scenes.png"


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """Scenes."""

    n_samples: int = 10
    """Images of each pair of a colour and a class, for each number of things."""

    EVERYDAY = ("n_samples",)
    RANGES = {"n_samples": "[1, 100]"}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks whether scenes show what their captions ask for; writes results.json and scenes.png to
    <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/check_scenes.py --load_dir {sampler}_shapes_captions",
        "python experiments/check_scenes.py --load_dir {sampler}_shapes_captions --n_samples 50 --guidance 3",
    )

    scenes: ScenesConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


class Request(NamedTuple):
    """A scene to generate, of `count` things; numbers are those in THINGS, COLORS and GROUNDS."""

    caption: str
    thing: int
    color: int
    count: int
    grounds: tuple[int, int]  # at the top and at the bottom
    held_out: bool
    scene: int  # number of the real scene with this caption, and of the random numbers of the sample

    @property
    def pair(self) -> tuple[int, int]:
        """The class and the colour."""
        return self.thing, self.color

    @property
    def kind(self) -> str:
        """Whether training had the pair."""
        return HELD_OUT if self.held_out else SEEN


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Plans the scenes. ValueError: a model of other data than coloured shapes, or not of captions alone."""
    if not isinstance(model.reader, shapes.Config) or model.data.n_channels != 3:
        got = f"{model.run} was trained on {model.data.dataset} with {model.data.n_channels} channels"
        raise ValueError(f"{got}, wanted scenes in colour: train with --dataset shapes --n_channels 3")
    if (conditions := model.sampler.conditions) != ("caption",):
        got = f"{model.run} reads {', '.join(conditions) or 'no conditions'}"
        raise ValueError(f"{got}, wanted captions alone: train with --conditions text")
    requests, real = plan_requests(model.data, model.reader, config.scenes.n_samples)
    texts = "\n".join(request.caption for request in requests)
    provenance = {"captions_sha256": sha256(texts.encode()).hexdigest()}
    source = model.condition_source(config.sampling, skip=("caption",)).with_values(caption="")
    draw = requested_images(requests, model, config.output.seed, config.sampling)
    judge_folder = Path(config.output.logs_root).expanduser() / ".cache" / "judges"
    return ExperimentSetup((requests, real, draw, judge_folder), provenance, source=source)


def plan_requests(data: DataConfig, reader: shapes.Config, n_samples: int) -> tuple[list[Request], Tensor]:
    """Returns the scenes to generate, `n_samples` of each pair and number of things, and the real scenes with their
    captions, uint8 (N, 3, H, W): validation scenes in which one pair alone occurs, the same ones for every pair."""
    requests, real = [], []
    for pair in (pair for pair in PAIRS if pair.partition("-")[2] in reader.shapes_things):
        color, thing = pair.split("-")
        for index, item in scenes_of(pair, data, reader, n_samples):
            grounds = [GROUNDS.index(name) for name in item["location"].split("-")]
            request = Request(
                caption=item["captions"][index % len(item["captions"])],
                thing=THINGS.index(thing),
                color=COLORS.index(color),
                count=len(item["boxes"]),
                grounds=(grounds[0], grounds[-1]),
                held_out=pair in reader.shapes_held_out,
                scene=index,
            )
            requests.append(request)
            real.append(as_uint8(item["image"].as_subclass(Tensor)))
    return requests, torch.stack(real)


def scenes_of(pair: str, data: DataConfig, reader: shapes.Config, n: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the first `n` validation scenes of each of COUNTS things, all of a pair such as "red-disc", by number.

    They are of the kinds that the model was trained on, if their things are apart from each other.
    """
    only = {"shapes_things": (pair.partition("-")[2],), "shapes_held_out": (pair,), "shapes_val_pairs": "held_out"}
    source = open_scenes(data, replace(reader, shapes_kinds=kinds_apart(reader), **only), "val")
    missing = dict.fromkeys(COUNTS, n)
    for index in range(len(source)):
        item = source[index]
        if missing.get(len(item["boxes"])):
            missing[len(item["boxes"])] -= 1
            yield index, item
        if not any(missing.values()):
            return


def requested_images(
    requests: Sequence[Request], model: TrainedSampler, seed: int, options: SamplingConfig
) -> Callable[[list[int]], Batch]:
    """Returns a function from indices of requests to batches of their images."""

    def draw(indices: list[int]) -> Batch:
        chosen = [requests[i] for i in indices]
        conditions = {"caption": [request.caption for request in chosen]}
        return {"image": model.draw([request.scene for request in chosen], seed, options, conditions)["image"]}

    return draw


def measure(
    requests: Sequence[Request],
    real: Tensor,
    draw: Callable[[list[int]], Batch],
    judge_folder: Path,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Generates the scenes, opens or trains the detector, computes all figures and saves scenes.png. All ranks must
    call it; only the main rank gets the results."""
    is_main = batches.world.is_main
    samples = progress(batches.resume("scenes", range(len(requests)), draw), len(requests), "sampling", is_main)
    images = [batch["image"] for batch in samples]
    if not is_main:
        return None
    images = torch.cat(images)
    every_scene = shapes.Config(shapes_seed=model.reader.shapes_seed)  # also those that the model is not trained on
    judging = open_scenes(replace(model.data, captions="own"), every_scene, shapes.JUDGE_SPLIT)
    judges = load_judges(judging, judge_folder, JUDGE_SEED)
    save_picture(batches.folder / PICTURE, draw_picture(requests, images, real))
    figures = compute_figures(requests, find_contents(judges.scenes, images), find_contents(judges.scenes, real))
    if model.data.captions != "own":
        del figures[PLACES]  # of which sentences by template say nothing
    return figures | {"judge": judges.hashes["scene network"]}


def compute_figures(requests: Sequence[Request], samples: Contents, real: Contents) -> dict[str, Any]:
    """Computes the shares of samples, and of the real scenes with their captions, that show what these ask for.

    Of captions of one thing: its class, its colour, and both in one thing; FLOOR is the share of samples that show
    these of a pair, averaged over all pairs that are asked for. Of all captions: the number of things of their pair,
    and the grounds.
    """
    pairs = dict.fromkeys(each.pair for each in requests)
    swapped = [judge([each._replace(thing=k, color=c) for each in requests], samples) for k, c in pairs]
    right = {SAMPLES: judge(requests, samples), REAL: judge(requests, real)}
    right[FLOOR] = {name: torch.stack([each[name] for each in swapped]).double().mean(0) for name in PARTS}

    def shares(name: str, rows: Sequence[int]) -> dict[str, Any]:
        return {images: share(each[name][rows].tolist()) for images, each in right.items() if name in each}

    ones = [i for i, each in enumerate(requests) if each.count == 1]
    of_pairs = {pair: [i for i in ones if requests[i].pair == pair] for pair in pairs}
    of_kinds = {kind: [i for i in ones if requests[i].kind == kind] for kind in (SEEN, HELD_OUT)}
    of_counts = {count: [i for i, each in enumerate(requests) if each.count == count] for count in COUNTS}
    return {
        "kinds": {kind: {name: shares(name, rows) for name in PARTS} for kind, rows in of_kinds.items() if rows},
        "pairs": [
            {"color": COLORS[color], "thing": THINGS[thing], "kind": requests[rows[0]].kind} | shares(BOTH, rows)
            for (thing, color), rows in of_pairs.items()
        ],
        NUMBER: [{"count": count} | shares(NUMBER, rows) for count, rows in of_counts.items()],
        PLACES: shares(PLACES, [*range(len(requests))]),
    }


def judge(requests: Sequence[Request], contents: Contents) -> dict[str, Tensor]:
    """Returns what of its request each image shows, (N,) bool each."""
    rows = torch.arange(len(requests))
    thing, color, count = torch.tensor([(*each.pair, each.count) for each in requests]).T
    of_pair = contents.things[rows, thing, color]
    return {
        CLASS: contents.things[rows, thing].any(1),
        COLOR: contents.things[rows, :, color].any(1),
        BOTH: of_pair > 0,
        NUMBER: of_pair == count,
        PLACES: (contents.grounds == torch.tensor([each.grounds for each in requests])).all(1),
    }


def draw_picture(requests: Sequence[Request], images: Tensor, real: Tensor) -> Image.Image:
    """Draws samples uint8 (N, 3, H, W) of captions of one thing above the real scenes with these captions: of held-out
    pairs on the left, and of pairs of training of the same classes on the right."""
    ones = [i for i, each in enumerate(requests) if each.count == 1]
    firsts = sorted({requests[i].pair: i for i in reversed(ones)}.values())  # of each pair
    held_out, seen = ([i for i in firsts if requests[i].kind == kind] for kind in (HELD_OUT, SEEN))
    beside = [next(j for j in seen if requests[j].thing == requests[i].thing) for i in held_out]
    shown = [i for both in zip(held_out, beside, strict=True) for i in both] or seen
    strips = []
    for first in shown[: 2 * MOST_ROWS]:
        rows = [i for i in ones if requests[i].pair == requests[first].pair][:MOST_IMAGES]
        grid = grid_image(torch.cat([images[rows], real[rows]]), columns=len(rows))
        strips.append((f"{requests[first].kind}: {requests[first].caption}", grid))
    width, height = grid.width + GAP, grid.height + LINE + GAP
    picture = Image.new("RGB", (GAP + 2 * width, GAP + -(-len(strips) // 2) * height), "white")
    ink, font = ImageDraw.Draw(picture), ImageFont.load_default(size=TEXT)
    for place, (heading, grid) in enumerate(strips):
        left, top = GAP + place % 2 * width, GAP + place // 2 * height
        ink.text((left, top), cut_text(heading, grid.width), "black", font)
        picture.paste(grid, (left, top + LINE))
    return picture


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the shares by kind of pair, by pair, by number of things, and of the grounds."""
    kinds = [("captions of one thing", "images", *PARTS)]
    for kind, parts in results["kinds"].items():
        for images in (SAMPLES, REAL):
            shares = [share_words(parts[name][images]) for name in PARTS]
            kinds.append((f"pairs {kind}, {images}", shares[0][0], *(right for _, right in shares)))
        kinds.append((f"  {FLOOR}", "", *(f"{parts[name][FLOOR]['right']:.3f}" for name in PARTS)))
    by_pair = {(each["color"], each["thing"]): each for each in results["pairs"]}
    colors, things = (dict.fromkeys(names) for names in zip(*by_pair, strict=True))
    pairs = [(BOTH, *things)]
    for color in colors:
        cells = [by_pair[color, thing] for thing in things]
        marks = ["*" if each["kind"] == HELD_OUT else "" for each in cells]
        pairs.append((color, *(f"{each[SAMPLES]['right']:.2f}{mark}" for each, mark in zip(cells, marks, strict=True))))
    others = [("all captions", "images", SAMPLES, REAL)]
    shares = {f"{NUMBER}: {NUMBERS[each['count']]}": each for each in results[NUMBER]}
    shares |= {PLACES: results[PLACES]} if PLACES in results else {}
    for name, each in shares.items():
        others.append((name, *share_words(each[SAMPLES]), share_words(each[REAL])[1]))
    return "\n".join(
        [
            *(table(kinds), "", table(pairs), "", table(others), ""),
            "class, colour, both: images in which a thing of this class, colour, or pair is found, ± standard error",
            f"{FLOOR}: the samples, for all pairs instead of that of their caption; *: a pair held out of training",
            f"{NUMBER}: images with as many things of the pair as the caption says",
            *("", str(folder / "results.json"), str(folder / PICTURE)),
        ]
    )


if __name__ == "__main__":
    run_experiment("check_scenes", Config, measure, report, prepare=prepare)
