"""What attention is recorded of: the words, objects and fields of the conditions of each image, and real images, which
are noised for it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from diffusion.process import ContinuousProcess
from diffusion.rng import Streams, seed_of, to_device
from experiments.harness.editing import encode_images
from models.attention_recorder import MapRecorder
from models.conditioning import RegionEncoder
from models.conditions.metadata import UNKNOWN, MetadataEncoder
from models.conditions.region_words import RegionWords
from models.conditions.text import CaptionEncoder, distinct_words, tokens_of_words
from models.heat_maps import share_of_tokens
from models.regions import find_present, kind_of_regions
from train.config import SamplingConfig
from train.data.collate import collate
from train.data.loading import ImageSource, fixed_subset
from train.data.transforms import as_uint8
from train.loop import Batch
from train.trained_sampler import TrainedSampler


class Target(NamedTuple):
    """What a map is of: a word of a caption, an object, or a field."""

    name: str
    condition: str
    tokens: tuple[int, ...]  # by their numbers in the condition

    def keys(self, spans: dict[str, slice]) -> list[int]:
        """Returns the keys of recorded maps that are its tokens."""
        return [spans[self.condition].start + token for token in self.tokens]


def find_targets(
    model: TrainedSampler, batch: Batch, count: int, words: Sequence[str] = (), gated: bool = False
) -> list[list[Target]]:
    """Returns the targets of each of `count` images with a batch of conditions: these words or phrases of its caption,
    or all of its words, objects and fields of metadata; with `gated` those that are gated tokens.

    ValueError for words that a caption does not have, captions that come encoded, and a model without such tokens.
    """
    targets: list[list[Target]] = [[] for _ in range(count)]
    encoders, found = model.sampler.network.encoders, False
    for name, encoder in encoders.items():
        if not (encoder.gated_width if gated else encoder.token_width):
            continue
        if isinstance(encoder, CaptionEncoder):
            own = [word_targets(name, encoder, caption, words) for caption in batch["caption"]]
        elif isinstance(encoder, RegionWords):
            own = text_targets(name, encoder, batch, words)
        elif isinstance(encoder, RegionEncoder) and not words:
            own = region_targets(name, encoder, batch, model.region_classes)
        elif isinstance(encoder, MetadataEncoder) and not words:
            own = [field_targets(name, encoder, batch, row) for row in range(count)]
        else:
            continue
        found, targets = True, [before + more for before, more in zip(targets, own, strict=True)]
    if not found:
        there, kind = ", ".join(encoders) or "none", "words" if words else "gated tokens" if gated else "tokens"
        got = f"got {model.run}, whose network attends to no {kind} of its conditions ({there})"
        why = "what is a vector, as classes are, is added to the embedding of the time"
        wanted = "a run with --conditions text" + ("" if words else ", objects, boxes, or --metadata_as tokens")
        raise ValueError(f"{got}: {why}; wanted {wanted}")
    return targets


def word_targets(name: str, encoder: CaptionEncoder, caption: str | Tensor, words: Sequence[str]) -> list[Target]:
    """Returns these words of a caption, or all."""
    if not isinstance(caption, str):
        raise ValueError("got captions that are encoded already, whose words are not known: pass --prompt TEXT")
    words = words or distinct_words(caption, encoder.tokenizer)
    return [Target(word, name, tuple(tokens_of_words(caption, word, encoder))) for word in words]


def text_targets(name: str, encoder: RegionWords, batch: Batch, words: Sequence[str]) -> list[list[Target]]:
    """Returns the different texts of the regions of each image or, of these words, those that the texts have."""
    rows = encoder.tokens_of_texts(batch)
    if words:
        of_words = [encoder.tokens_of_words(batch, word) for word in words]
        rows = [dict(zip(words, own, strict=True)) for own in zip(*of_words, strict=True)]
    return [[Target(text, name, tuple(tokens)) for text, tokens in own.items() if tokens] for own in rows]


def region_targets(name: str, encoder: RegionEncoder, batch: Batch, class_names: Sequence[str]) -> list[list[Target]]:
    """Returns the objects of each image by the names of their classes, of which the second has a 2 behind it."""
    names = [*encoder.fields, *(f"{field}_mask" for field in encoder.fields)]
    fields = {field: batch[field] for field in names if field in batch}
    kind, targets = kind_of_regions(fields), []
    present, numbers = find_present(fields, kind).tolist(), fields[f"{kind}_class"].tolist()
    for is_there, classes in zip(present, numbers, strict=True):
        counts, own = Counter[str](), []
        for region in (region for region, each in enumerate(is_there) if each):
            word = class_names[classes[region]] if classes[region] < len(class_names) else str(classes[region])
            counts[word] += 1
            label = word if counts[word] == 1 else f"{word} {counts[word]}"
            own.append(Target(label, name, tuple(encoder.tokens_of_region(region))))
        targets.append(own)
    return targets


def field_targets(name: str, encoder: MetadataEncoder, batch: Batch, row: int) -> list[Target]:
    """Returns the fields of metadata of an image with their values, such as light=night."""
    targets = []
    for i, field in enumerate(encoder.fields):
        value = batch[field][row] if field in batch else UNKNOWN
        word = value if isinstance(value, str) else (UNKNOWN, *encoder.values[field])[int(value)]
        targets.append(Target(f"{field}={word}", name, (i,)))
    return targets


def relative_heat(heat: Tensor, targets: Sequence[Sequence[Target]], spans: dict[str, slice]) -> Tensor:
    """Returns the heat (B, M, h, w) of each image divided in each place by the sum over the tokens of its targets."""
    keys = [[key for target in own for key in target.keys(spans)] for own in targets]
    return torch.cat([share_of_tokens(each[None], own) for each, own in zip(heat, keys, strict=True)])


class MappedImages(Protocol):
    """Images whose attention is recorded, by their indices."""

    model: TrainedSampler

    def conditions(self, indices: list[int]) -> Batch | None:
        """Returns the raw fields of their conditions, None without any."""

    def record(self, indices: list[int], recorder: MapRecorder) -> Tensor:
        """Records them; returns them as uint8 (B, C, H, W) on the CPU."""


@dataclass(frozen=True)
class RealImages:
    """Held-out images, noised at several times, one network call each, without guidance: `MappedImages`.

    The times are evenly spaced quantiles of those of training. The noise of an image follows from the seed and its
    index.
    """

    model: TrainedSampler
    source: ImageSource
    items: tuple[int, ...]  # in the validation split
    options: SamplingConfig
    seed: int
    times: int

    @classmethod
    def open(cls, model: TrainedSampler, count: int, options: SamplingConfig, seed: int, times: int) -> Self:
        """Returns a fixed random subset of held-out images. ValueError for more than there are, and for options with
        other conditions than theirs."""
        if given := [name for name in ("condition_file", "metadata", "hint") if getattr(options, name)]:
            got = f"got {given[0]} for held-out images, which have conditions of their own"
            raise ValueError(f"{got}: leave --{given[0]} out")
        data = replace(model.data.without_augmentation, in_memory=False, cache_images=False)
        source = ImageSource(model.dataset("val"), data)
        if count > len(source):
            raise ValueError(f"got {count} images of {len(source)} held-out ones: pass a number up to {len(source)}")
        return cls(model, source, tuple(fixed_subset(len(source), count)), options, seed, times)

    def conditions(self, indices: list[int]) -> Batch | None:
        rows = []
        for index in (self.items[i] for i in indices):
            item = self.source[index]
            label = {"label": item["label"]} if self.model.sampler.n_classes else {}
            rows.append({**self.model.conditions_of(item, index), **label})
        return collate(rows) or None

    def record(self, indices: list[int], recorder: MapRecorder) -> Tensor:
        images = torch.stack([as_uint8(self.source[self.items[i]]["image"].as_subclass(Tensor)) for i in indices])
        model, process, x0 = self.model, self.model.sampler.process, encode_images(images, self.model)
        rng = Streams([seed_of(self.seed, "noise", i) for i in indices], model.device)
        times = (torch.arange(self.times, dtype=torch.float64) + 0.5) / self.times
        is_continuous, options = isinstance(process, ContinuousProcess), self.options.without_guidance()
        with model.inference():
            denoise = model.make_denoiser(x0, options, self.conditions(indices), recorder=recorder)
            for t in process.quantile(times).float():
                t = t.repeat(len(x0))  # on the CPU, as denoisers take it
                if is_continuous:
                    x = process.corrupt(x0, t, rng.normal(tuple(x0.shape)))
                else:
                    x = process.corrupt(x0, to_device(t, model.device), rng)
                denoise(x, t)
        return images
