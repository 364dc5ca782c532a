"""Checks whether generated images show the words they were asked for, such as the weather of a scene.

Samples images for the words of held-out images, and as many in which the word of one field changes and all else stays.
A classifier trained on the real images says which words they show.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from PIL import Image
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.report import progress, share, share_words, table, three_digits
from experiments.metrics.contact_sheet import GAP, draw_lines
from experiments.metrics.image_classifier import BATCH, FIELDS_RECIPE, classify_fields, train_field_classifier
from experiments.metrics.layout.layout_pictures import save_picture
from models.conditions.metadata import NULL, Values, to_numbers
from models.ranges import check_ranges
from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.data.transforms import as_uint8
from train.distributed import DistContext
from train.logging import grid_image
from train.loop import Batch
from train.progress import Progress
from train.samplers._metadata import find_metadata
from train.spaces import PixelSpace
from train.trained_sampler import TrainedSampler

MAX_IMAGES = 10_000  # of a split that are loaded
GIVEN, SWAPPED, STRIP = "the words of a held-out image", "one word changed", "strip"  # what is asked for
SAMPLES, REAL, FLOOR = "samples", "real images", "any words"  # what is measured
NEW, BEFORE, STAYS = "the new word", "the word before", "stays"  # what samples with a changed word show
ALIKE = "any two samples"  # how often they show the same word
STRIP_ROWS, MOST_WORDS = 2, 8  # images of a field in the picture, and words of each
STRIP_SIDE = 128  # pixels of an image there, at least
PICTURE = "metadata.png"

Numbers = dict[str, Tensor]  # by field: the numbers of the words of N images, (N,) int64, NULL where unknown


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """Words."""

    n_samples: int = 100
    """Number of images with the words of held-out images, in turn, and of images in which a field changes, for each."""

    EVERYDAY = ("n_samples",)
    RANGES = {"n_samples": "[2, 1000000000]"}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks the words of generated images; writes results.json and metadata.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/check_metadata.py --sampler ddpm --load_dir ddpm_shapes_metadata",
        "python experiments/check_metadata.py --sampler {sampler} --load_dir {sampler}_scenes --n_samples 500",
    )

    words: WordsConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


class WordedImages(NamedTuple):
    """Images with the words that they have."""

    images: Tensor  # uint8 (N, C, H, W)
    numbers: Numbers


class Request(NamedTuple):
    """An image to generate, with the noise and the conditions of a held-out image but for one word."""

    kind: str
    index: int  # of the held-out image
    field: str = ""  # whose word is replaced; "": none
    number: int = NULL  # of the new word


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Opens the source of the conditions. ValueError: a model without words, or --metadata."""
    if find_metadata(model.sampler.network) is None:
        raise ValueError(f"{model.run} is not conditioned on words: train it with --conditions metadata")
    if config.sampling.metadata:
        got = f"got metadata {' '.join(config.sampling.metadata)}, but words that differ are compared"
        raise ValueError(f"{got}: leave --metadata out, or pass a --condition_file with them")
    source = model.condition_source(config.sampling)
    return ExperimentSetup((config.words, config.sampling, source), source=source)


def measure(
    settings: WordsConfig,
    sampling: SamplingConfig,
    source: ConditionSource,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any]:
    """Samples, trains the classifier, computes all figures and saves the picture. ValueError: no field has two words in
    the training images."""
    values = find_metadata(model.sampler.network).values
    training, real = (load_worded_images(model, split, values) for split in ("train", "val"))
    occurring = find_occurring(training.numbers)
    if not occurring:
        got = f"got no field of {', '.join(values)} with two words in the training images"
        raise ValueError(f"{got}, wanted one at least: train on images whose words differ")
    given = numbers_of(source.draw(batches.seed, range(settings.n_samples)), values)
    requests = plan_requests(given, occurring)
    draw = requested_images(requests, values, model, batches.seed, sampling, source)
    samples = progress(batches.resume("worded", range(len(requests)), draw), len(requests), "sampling")
    images = torch.cat([batch["image"] for batch in samples])
    sizes = {name: len(values[name]) for name in occurring}
    labels = {name: training.numbers[name] - 1 for name in occurring}  # NULL becomes UNKNOWN
    with Progress("classifier", FIELDS_RECIPE.steps, "step") as bar:
        classifier = train_field_classifier(training.images, labels, sizes, batches.seed, model.device, bar.update)

    def read(images: Tensor) -> Numbers:
        return {name: labels + 1 for name, labels in classify_fields(classifier, images, sizes).items()}

    save_picture(batches.folder / PICTURE, draw_strips(requests, images, values))
    return {
        "n_samples": settings.n_samples,
        "n_training_images": len(training.images),
        "n_held_out": len(real.images),
        "fields": compute_figures(requests, given, read(images), real.numbers, read(real.images)),
    }


def load_worded_images(model: TrainedSampler, split: str, values: Values) -> WordedImages:
    """Loads the images of a split as the model is trained on them, each once in a random view, with their words.

    Of a large split it is a fixed random part.
    """
    source = PixelSpace(model.data).source(model.dataset(split), split, model.data, 0, model.world, model.adapt)
    images, numbers = [], []
    for positions in torch.arange(min(len(source), MAX_IMAGES)).split(BATCH):
        batch = source[positions.tolist()]
        images.append(as_uint8(batch["image"]))
        numbers.append(numbers_of(batch, values))
    return WordedImages(torch.cat(images), {name: torch.cat([each[name] for each in numbers]) for name in values})


def numbers_of(batch: Batch, values: Values) -> Numbers:
    """Returns the numbers of the words of a batch."""
    return {name: to_numbers(name, batch[name], words) for name, words in values.items()}


def find_occurring(numbers: Numbers) -> dict[str, list[int]]:
    """Returns the numbers of the words that occur, the most frequent first, of the fields that have two or more."""
    occurring = {}
    for name, each in numbers.items():
        counts = torch.bincount(each[each != NULL])  # of the numbers from 0
        order = counts.argsort(descending=True, stable=True)
        occurring[name] = order[counts[order] > 0].tolist()
    return {name: each for name, each in occurring.items() if len(each) > 1}


def plan_requests(given: Numbers, occurring: Mapping[str, Sequence[int]]) -> list[Request]:
    """Returns the images to generate: first one with each of the words `given`, in order, then for each field of
    `occurring` as many in which its word is another of those that occur, and the strips of the picture."""
    requests = [Request(GIVEN, index) for index in range(len(next(iter(given.values()))))]
    for field, numbers in occurring.items():
        for index, before in enumerate(given[field].tolist()):
            others = [number for number in numbers if number != before]
            requests.append(Request(SWAPPED, index, field, others[index % len(others)]))
    for field, numbers in occurring.items():
        most = sorted(numbers[:MOST_WORDS])
        requests += [Request(STRIP, row, field, number) for row in range(STRIP_ROWS) for number in most]
    return requests


def requested_images(
    requests: Sequence[Request],
    values: Values,
    model: TrainedSampler,
    seed: int,
    options: SamplingConfig,
    source: ConditionSource,
) -> Callable[[list[int]], Batch]:
    """Returns a function from positions of requests to batches of their images; `source` gives the conditions."""

    def draw(positions: list[int]) -> Batch:
        chosen = [requests[position] for position in positions]
        indices = [request.index for request in chosen]
        conditions = source.draw(seed, indices)
        numbers = numbers_of(conditions, values)
        for row, request in enumerate(chosen):
            if request.field:
                numbers[request.field][row] = request.number
        return {"image": model.draw(indices, seed, options, conditions | numbers)["image"]}

    return draw


def compute_figures(
    requests: Sequence[Request], given: Numbers, predicted: Numbers, real: Numbers, real_predicted: Numbers
) -> list[dict[str, Any]]:
    """Computes how often images show their words: those `predicted` of the requests, of which the first ask for those
    `given`, and those `real_predicted` of real images, which have those of `real`.

    Images whose word is unknown are left out where it is compared.
    """
    rows = []
    for name in predicted:
        first = predicted[name][: len(given[name])]
        known, real_known = given[name] != NULL, real[name] != NULL
        changed = [i for i, each in enumerate(requests) if (each.kind, each.field) == (SWAPPED, name)]
        index, new = torch.tensor([(requests[i].index, requests[i].number) for i in changed]).T
        after, before = predicted[name][changed], given[name][index]
        others = {other: each for other, each in predicted.items() if other != name}
        rows.append(
            {
                "field": name,
                SAMPLES: share((first == given[name])[known].tolist()),
                FLOOR: share_of_matches(first[known], given[name][known]),
                REAL: share((real_predicted[name] == real[name])[real_known].tolist()),
                NEW: share((after == new).tolist()),
                BEFORE: share((after == before)[before != NULL].tolist()),
                STAYS: {other: share((each[changed] == each[index]).tolist()) for other, each in others.items()},
                ALIKE: share_of_matches(first, first),
            }
        )
    return rows


def share_of_matches(a: Tensor, b: Tensor) -> float | None:
    """Returns how often a[i] and b[j] are equal, of all different i and j; None for fewer than two numbers (N,)."""
    N = len(a)
    if N < 2:
        return None
    counts = torch.bincount(b, minlength=int(a.max()) + 1)
    return (counts[a] - (a == b).long()).sum().item() / (N * (N - 1))


def draw_strips(requests: Sequence[Request], images: Tensor, values: Values) -> Image.Image:
    """Draws the strips of images uint8 (N, C, H, W): below the name of a field its words, and below each of these the
    same images with it."""
    strips = []
    for field in dict.fromkeys(request.field for request in requests if request.kind == STRIP):
        rows = [i for i, each in enumerate(requests) if (each.kind, each.field) == (STRIP, field)]
        words = [values[field][requests[i].number - 1] for i in rows[: len(rows) // STRIP_ROWS]]
        grid = grid_image(images[rows], len(words), STRIP_SIDE, words)
        strips += [draw_lines([field], grid.width), grid]
    width, height = max(strip.width for strip in strips), sum(strip.height for strip in strips)
    picture, top = Image.new("RGB", (2 * GAP + width, 2 * GAP + height), "white"), GAP
    for strip in strips:
        picture.paste(strip, (GAP, top))
        top += strip.height
    return picture


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats how often images show their words, and what changes with one of them."""
    fields = results["fields"]
    names = [each["field"] for each in fields]
    words = [("field", "images", SAMPLES, FLOOR, REAL)]
    changed = [("changed", "images", NEW, BEFORE, *(f"{name} {STAYS}" for name in names))]
    for each in fields:
        real, before = share_words(each[REAL])[1], share_words(each[BEFORE])[1]
        words.append((each["field"], *share_words(each[SAMPLES]), three_digits(each[FLOOR]), real))
        stays = {name: share_words(other)[1] for name, other in each[STAYS].items()}
        changed.append((each["field"], *share_words(each[NEW]), before, *(stays.get(name, "") for name in names)))
    changed.append((ALIKE, "", "", "", *(three_digits(each[ALIKE]) for each in fields)))
    return "\n".join(
        [
            *("images that show the word, ± standard error:", table(words)),
            f"as a classifier says that was trained on {results['n_training_images']:,} real images; {REAL}: "
            f"{results['n_held_out']:,} held out",
            *(f"{FLOOR}: the samples, for the words of other images", ""),
            *("the same noise and other words, but one word changed:", table(changed)),
            f"{ALIKE}: how often two of different noise and words show the same word",
            *("", str(folder / "results.json"), str(folder / PICTURE)),
        ]
    )


if __name__ == "__main__":
    run_experiment("check_metadata", Config, measure, report, prepare=prepare, one_process=True)
