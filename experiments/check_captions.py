"""Checks whether generated images show what their captions say, by a classifier trained on the real images.

The captions are made of the classes of the data by sentences (--captions templates), of which those of validation never
occur in training. Saves a table and a picture of captions with samples.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import cycle, islice
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from PIL import Image
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.report import progress, share, share_words, table
from experiments.metrics.contact_sheet import GAP, draw_lines
from experiments.metrics.image_classifier import RECIPE, classify, load_labelled_images, train_image_classifier
from experiments.metrics.layout.layout_pictures import save_picture
from models.conditions.text import tokenize
from models.prompts import PromptTokenizer
from models.ranges import COUNT, check_ranges
from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.data.templates import TemplateCaptions
from train.distributed import DistContext
from train.logging import grid_image
from train.loop import Batch
from train.progress import Progress
from train.trained_sampler import TrainedSampler

SEEN, HELD_OUT = "sentences of training", "sentences held out"
SWAPPED = "the same noise, another noun"
REPEATED, LAST = "long, the noun again and again", "long, the noun at its end"
MOST_SEEN = 5  # sentences of training that are asked for
LONG_WORDS = 150  # of a long caption
MOST_ROWS, MOST_IMAGES = 10, 8  # in the picture, and images of a caption there
MOST_WORDS = 50  # of a caption there
PICTURE = "captions.png"


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """Captions."""

    n_samples: int = 10
    """Images of each caption: of each class with each sentence."""

    EVERYDAY = ("n_samples",)
    RANGES = {"n_samples": COUNT}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks whether images show what their captions say; writes results.json and captions.png to
    <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/check_captions.py --sampler {sampler} --load_dir {sampler}_digits_captions",
        "python experiments/check_captions.py --load_dir {sampler}_digits_captions --n_samples 50 --guidance 3",
    )

    captions: CaptionsConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


class Sentences(NamedTuple):
    """The sentences of a split, and the captions that they make of the classes."""

    templates: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]  # by class, in the order of the sentences


class Request(NamedTuple):
    """An image to generate. Those of a class have the same noise with each sentence."""

    kind: str
    template: str  # its sentence
    caption: str
    label: int  # class that the caption names
    noise: int  # index of the image's random numbers
    before: int  # class of the sample with this noise that has its own noun


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Plans the images.

    ValueError: a model that does not read captions alone, or whose captions are not made of classes by sentences.
    """
    if "text" not in model.sampler.network.encoders:
        raise ValueError(f"{model.run} reads no captions: train with --conditions text")
    if model.sampler.n_classes:
        raise ValueError(f"{model.run} reads the class beside the caption: train with --no_class_conditional")
    training, held_out = (read_sentences(model, split) for split in ("train", "val"))
    requests = plan_requests(training, held_out, config.captions.n_samples)
    source = model.condition_source(config.sampling, skip=("caption",)).with_values(caption="")
    draw = captioned_images(requests, model, config.output.seed, config.sampling, source)
    texts = "\n".join(request.caption for request in requests)
    provenance = {"captions_sha256": sha256(texts.encode()).hexdigest()}
    return ExperimentSetup((requests, draw), provenance, source=source)


def read_sentences(model: TrainedSampler, split: str) -> Sentences:
    """Returns the sentences of a split; ValueError for data whose captions are not made of at least two classes."""
    dataset = model.dataset(split)
    if not isinstance(dataset, TemplateCaptions) or dataset.n_classes < 2:
        wanted = "captions made of two or more classes: train with --captions templates on data with classes"
        raise ValueError(f"{model.run} has other captions, wanted {wanted}")
    captions = tuple(tuple(dataset.captions({"label": label})) for label in range(dataset.n_classes))
    return Sentences(dataset.sentences, captions)


def plan_requests(training: Sentences, held_out: Sentences, n_samples: int) -> list[Request]:
    """Returns the images to generate: `n_samples` of each caption.

    Of the sentences of training, at most MOST_SEEN are asked for, evenly spaced. Long captions are made of sentences
    that training has seen, so that their words are known.
    """
    K, requests = len(held_out.captions), []

    def add(kind: str, template: str, caption: str, label: int, before: int) -> None:
        noises = range(before * n_samples, (before + 1) * n_samples)
        requests.extend(Request(kind, template, caption, label, noise, before) for noise in noises)

    for kind, sentences in ((SEEN, training), (HELD_OUT, held_out)):
        step = ceil(len(sentences.templates) / MOST_SEEN) if kind == SEEN else 1
        for i, template in list(enumerate(sentences.templates))[::step]:
            for label in range(K):
                add(kind, template, sentences.captions[label][i], label, label)
    for i, template in enumerate(held_out.templates):
        for before in range(K):
            label = swapped_label(before, i, K)
            add(SWAPPED, template, held_out.captions[label][i], label, before)
    phrases = [re.sub(r"\W*\{\w+\}", "", template).strip(" ,:") for template in training.templates]
    for label in range(K):
        add(REPEATED, "", repeat_words(training.captions[label], LONG_WORDS), label, label)
    for label, (last, *_) in enumerate(held_out.captions):
        before_it = repeat_words([phrase for phrase in phrases if phrase], LONG_WORDS - len(last.split()))
        add(LAST, held_out.templates[0], f"{before_it} {last}".strip(), label, label)
    return requests


def swapped_label(label: int, sentence: int, n_classes: int) -> int:
    """Returns another class, whose noun takes the place of that of `label` in a sentence."""
    return (label + 1 + sentence % (n_classes - 1)) % n_classes


def repeat_words(phrases: Sequence[str], count: int) -> str:
    """Returns `count` words: the phrases, with commas between them, again and again; "" without phrases."""
    words = [word for phrase in phrases for word in f"{phrase},".split()]
    return " ".join(islice(cycle(words), count))


def captioned_images(
    requests: Sequence[Request], model: TrainedSampler, seed: int, options: SamplingConfig, source: ConditionSource
) -> Callable[[list[int]], Batch]:
    """Returns a function from indices of requests to batches of their images; `source` gives other conditions."""

    def draw(indices: list[int]) -> Batch:
        chosen = [requests[i] for i in indices]
        noises = [request.noise for request in chosen]
        conditions = source.draw(seed, noises) | {"caption": [request.caption for request in chosen]}
        return {"image": model.draw(noises, seed, options, conditions)["image"]}

    return draw


def measure(
    requests: Sequence[Request],
    draw: Callable[[list[int]], Batch],
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Generates the images, trains the classifier, computes all figures and saves captions.png. All ranks must call it;
    only the main rank gets the results."""
    is_main = batches.world.is_main
    samples = progress(batches.resume("captioned", range(len(requests)), draw), len(requests), "sampling", is_main)
    images = [batch["image"] for batch in samples]
    if not is_main:
        return None
    images = torch.cat(images)
    training, real = (load_labelled_images(model.dataset(split), model.data) for split in ("train", "val"))
    names, flip = model.dataset("val").class_names, model.data.horizontal_flip
    with Progress("classifier", RECIPE.epochs * len(training.labels), "image") as bar:
        classifier = train_image_classifier(*training, len(names), flip, batches.seed, model.device, bar.update)
    of_real = classify(classifier, real.images) == real.labels
    save_picture(batches.folder / PICTURE, draw_picture(requests, images))
    long_captions = {request.caption for request in requests if request.kind in (REPEATED, LAST)}
    figures = compute_figures(requests, classify(classifier, images), of_real, real.labels, names)
    encoder = model.sampler.network.encoders["text"]
    counts = count_tokens(sorted(long_captions), encoder.length, encoder.tokenizer)
    return figures | {"long_captions": counts}


def compute_figures(
    requests: Sequence[Request], predicted: Tensor, real_right: Tensor, real_labels: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """Computes the shares of images that show the class of their caption, by classes `predicted` (N,) of the requests.

    `real_right` (M,) says which real held-out images, of classes `real_labels` (M,), the classifier recognises. Their
    total is the mean over classes, since the samples have as many images of each; classes without one are left out.
    """
    results = list(zip(requests, predicted.tolist(), strict=True))
    shown = [(request, found == request.label) for request, found in results]
    kinds = {kind: share(right for request, right in shown if request.kind == kind) for kind in kinds_of(requests)}
    kept = share(found == request.before for request, found in results if request.kind == SWAPPED)
    templates = dict.fromkeys((each.kind, each.template) for each in requests if each.kind in (SEEN, HELD_OUT))
    sentences = [
        {"kind": kind, "sentence": template}
        | share(right for request, right in shown if request[:2] == (kind, template))
        for kind, template in templates
    ]
    classes = []
    for label, name in enumerate(names):
        of_class = share(right for request, right in shown if request.kind == HELD_OUT and request.label == label)
        classes.append({"class": name, **of_class, "real": share(real_right[real_labels == label].tolist())})
    real = [row["real"]["right"] for row in classes if row["real"]["n"]]
    total = {"n": len(real_labels), "right": sum(real) / len(real) if real else None}
    return {"kinds": kinds, "kept": kept, "real": total, "sentences": sentences, "classes": classes}


def kinds_of(requests: Sequence[Request]) -> list[str]:
    """Returns the kinds of requests, in order."""
    return list(dict.fromkeys(request.kind for request in requests))


def count_tokens(captions: Sequence[str], length: int, tokenizer: PromptTokenizer) -> dict[str, Any]:
    """Returns the least and the greatest number of words, tokens and chunks of captions, and how many tokens of all of
    them are lost where they are cut into chunks of at most `length` tokens."""
    counts: dict[str, list[int]] = {"words": [], "tokens": [], "chunks": []}
    cut = 0
    for caption in captions:
        tokens, (ids, mask) = len(tokenizer.encode(caption)), tokenize([caption], length, tokenizer)
        chunks = ids.shape[1]
        for name, count in (("words", len(caption.split())), ("tokens", tokens), ("chunks", chunks)):
            counts[name].append(count)
        cut += tokens + 2 * chunks - int(mask.sum())  # each chunk has a start and an end
    return {name: [min(values), max(values)] for name, values in counts.items()} | {"cut": cut}


def draw_picture(requests: Sequence[Request], images: Tensor) -> Image.Image:
    """Draws a row for each class of images uint8 (N, C, H, W): one of its held-out sentences with samples and, on the
    right, the same noise with another noun; below them the long captions of the first class."""
    templates = list(dict.fromkeys(request.template for request in requests if request.kind == HELD_OUT))
    pairs = [
        ((HELD_OUT, templates[label % len(templates)]), (SWAPPED, templates[label % len(templates)]))
        for label in range(min(MOST_ROWS, 1 + max(request.label for request in requests)))
    ]
    rows = [[draw_strip(requests, images, label, *each) for each in pair] for label, pair in enumerate(pairs)]
    rows.append([draw_strip(requests, images, 0, *each) for each in ((REPEATED, ""), (LAST, templates[0]))])
    width = max(strip.width for row in rows for strip in row) + GAP
    heights = [max(strip.height for strip in row) + GAP for row in rows]
    picture, top = Image.new("RGB", (GAP + 2 * width, GAP + sum(heights)), "white"), GAP
    for row, height in zip(rows, heights, strict=True):
        for column, strip in enumerate(row):
            picture.paste(strip, (GAP + column * width, top))
        top += height
    return picture


def draw_strip(requests: Sequence[Request], images: Tensor, before: int, kind: str, template: str) -> Image.Image:
    """Draws the caption of the images of a kind and a sentence that have the noise of class `before`, and the first of
    them below it."""
    wanted = (kind, template, before)
    chosen = [i for i, each in enumerate(requests) if (each.kind, each.template, each.before) == wanted][:MOST_IMAGES]
    grid = grid_image(images[chosen], columns=MOST_IMAGES)
    text = draw_lines([shorten(requests[chosen[0]].caption)], grid.width)
    strip = Image.new("RGB", (grid.width, text.height + grid.height), "white")
    strip.paste(text, (0, 0))
    strip.paste(grid, (0, text.height))
    return strip


def shorten(caption: str) -> str:
    """Returns a caption without the middle of a long one."""
    words = caption.split()
    return caption if len(words) <= MOST_WORDS else " ".join([*words[: MOST_WORDS - 10], "…", *words[-10:]])


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the shares by kind of caption, by sentence and by class."""
    rows = [("captions", "images", "right")]
    for kind, each in results["kinds"].items():
        rows.append((kind, *share_words(each)))
        if kind == SWAPPED:
            rows.append(("  of them still the noun before", *share_words(results["kept"])))
    rows.append(("real held-out images", *share_words(results["real"])))
    sentences = [("sentence", "", "images", "right")]
    for each in results["sentences"]:
        sentences.append((each["sentence"], "held out" if each["kind"] == HELD_OUT else "", *share_words(each)))
    classes = [("class", "samples", "right", "real images", "right")]
    for each in results["classes"]:
        classes.append((each["class"], *share_words(each), *share_words(each["real"])))
    long = {name: span(*values) for name, values in results["long_captions"].items() if name != "cut"}
    return "\n".join(
        [
            *(table(rows), "", table(sentences), "", f"{HELD_OUT}, by class:", table(classes), ""),
            "right: the share that the classifier takes for the class of the caption, ± standard error",
            f"long captions: {long['words']} words, {long['tokens']} tokens in {long['chunks']} chunks, of which "
            f"{results['long_captions']['cut'] or 'none'} are lost",
            *("", str(folder / "results.json"), str(folder / PICTURE)),
        ]
    )


def span(least: int, most: int) -> str:
    """Returns the words for numbers from `least` to `most`."""
    return str(least) if least == most else f"{least} to {most}"


if __name__ == "__main__":
    run_experiment("check_captions", Config, measure, report, prepare=prepare)
