"""Batches as conditions read them: what is checked, looked up and tokenized where batches are loaded, so that no
training step does it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.rng import Streams, seed_of
from models.conditioning import Conditioner
from models.conditions.metadata import NULL, to_numbers
from models.conditions.numbers import MISSING, RangeCheck
from models.conditions.region_words import RegionWords, WordRule, arrange, different_texts, tokenize_words
from models.conditions.text import find_captions, tokenize
from models.prompts import PromptTokenizer
from models.regions import check_region_fields
from train.data.loading import BatchSource
from train.data.text_cache import TextCache
from train.loop import Batch
from train.samplers._conditions import fields_by_condition
from train.samplers._metadata import find_metadata, find_numbers


@dataclass(frozen=True)
class ConditionFields(ABC):
    """Batches of a source with other values of some fields; `raw_conditions` says which fields are missing."""

    source: BatchSource

    def __len__(self) -> int:
        return len(self.source)

    def item_index(self, position: int) -> int:
        """Returns the index in the data set of the item at a position."""
        return self.source.item_index(position)

    def __getitem__(self, positions: list[int]) -> Batch:
        batch = self.source[positions]
        return batch | self.read(batch, positions)

    @abstractmethod
    def read(self, batch: Batch, positions: list[int]) -> Batch:
        """Returns the fields of a batch that change. Images are known by the field file_name, if they have one."""


@dataclass(frozen=True)
class CheckedRegions(ConditionFields):
    """Checks the regions in `fields`, those that conditions read; `limits` are those of `check_region_fields`."""

    fields: frozenset[str]
    limits: Mapping[str, int]

    def read(self, batch: Batch, positions: list[int]) -> Batch:
        read = {name: value for name, value in batch.items() if name.removesuffix("_mask") in self.fields}
        check_region_fields(read, self.limits, batch.get("file_name"))
        return {}


@dataclass(frozen=True)
class NumberedMetadata(ConditionFields):
    """Metadata as numbers (B,) instead of words; ValueError for words that are not among the `values` of their field.

    With a seed, each field of an example becomes null with probability `drop`, from the stream "metadata_fields" of the
    seed and its position.
    """

    values: Mapping[str, Sequence[str]]  # by field
    drop: float
    seed: int | None

    def read(self, batch: Batch, positions: list[int]) -> Batch:
        images = batch.get("file_name")
        numbers = {
            name: to_numbers(name, batch[name], self.values[name], images) for name in self.values if name in batch
        }
        if self.seed is not None:
            drop = draw_field_drops(self.seed, "metadata_fields", positions, self.values, self.drop)
            numbers = {name: each.masked_fill(drop[name], NULL) for name, each in numbers.items()}
        return numbers


@dataclass(frozen=True)
class CheckedNumbers(ConditionFields):
    """Numbers as float32 (B,), NaN where missing; ValueError unless they are finite.

    With a seed, each field of an example becomes missing with probability `drop`, from the stream "number_fields" of
    the seed and its position.
    """

    check: RangeCheck
    drop: float
    seed: int | None

    def read(self, batch: Batch, positions: list[int]) -> Batch:
        numbers = {name: self.read_field(name, batch) for name in self.check.ranges if name in batch}
        if self.seed is not None:
            drop = draw_field_drops(self.seed, "number_fields", positions, self.check.ranges, self.drop)
            numbers = {name: each.masked_fill(drop[name], MISSING) for name, each in numbers.items()}
        return numbers

    def read_field(self, name: str, batch: Batch) -> Tensor:
        """Returns the values (B,) of a field."""
        values, images = batch[name], batch.get("file_name")
        if not isinstance(values, Tensor) or values.ndim != 1 or values.dtype == torch.bool:
            got = f"a tensor {tuple(values.shape)}" if isinstance(values, Tensor) else f"{values[0]!r}"
            raise ValueError(f"field {name!r} of the items is {got}, wanted a number, or nan for a missing one")
        self.check(name, values, images)
        return values.float()


@dataclass(frozen=True)
class TokenizedCaptions(ConditionFields):
    """Captions as ids and their mask, (B, C, L) each, in chunks of at most `length` tokens, filled with `pad_id` if it
    is given; with a cache of embeddings as tokens (B, M, D) and their mask."""

    length: int
    tokenizer: PromptTokenizer
    pad_id: int | None = None
    cache: TextCache | None = None

    def read(self, batch: Batch, positions: list[int]) -> Batch:
        if "caption" not in batch:
            return {}
        if self.cache is not None:
            return self.cache[batch["caption"]]
        ids, mask = tokenize(batch["caption"], self.length, self.tokenizer, self.pad_id)
        return {"caption": ids, "caption_mask": mask}


@dataclass(frozen=True)
class TokenizedWords(ConditionFields):
    """The words of regions as ids (B, T, C, L) of the T different texts of each image, which of them are read, and the
    text of each region, (B, R); with a cache of embeddings as tokens (B, T, M, D).

    They are fields of their own: `tokenize_words` has their names. ValueError for another number of words than regions.
    """

    rule: WordRule
    length: int
    tokenizer: PromptTokenizer
    cache: TextCache | None = None

    def read(self, batch: Batch, positions: list[int]) -> Batch:
        if f"{self.rule.kind}_class" not in batch:
            return {}
        found = self.rule.read(batch, batch.get("file_name"))
        if self.cache is None:
            return tokenize_words(found, self.length, self.tokenizer)
        places = different_texts(found)
        return arrange(found, *self.cache.words([*places]), places)


def draw_field_drops(
    seed: int, stream: str, positions: Sequence[int], fields: Iterable[str], drop: float
) -> dict[str, Tensor]:
    """Draws which fields of the examples at these positions are replaced by their null: (B,) bools by field."""
    names, streams = [*fields], Streams([seed_of(seed, stream, position) for position in positions])
    drops = streams.uniform((len(positions), len(names))) < drop
    return dict(zip(names, drops.unbind(1), strict=True))


def with_condition_fields(
    source: BatchSource, network: nn.Module, seed: int | None = None, cache: TextCache | None = None
) -> BatchSource:
    """Returns a source with the fields that the conditions of a network read, checked and as numbers.

    With the seed of a training, single fields of metadata and numbers are null, as the options of the conditions say.
    With a `cache` captions become embeddings, else ids.
    """
    for encoders in network.modules():
        if isinstance(encoders, Conditioner) and encoders.region_encoders:
            fields = frozenset().union(*fields_by_condition(encoders.region_encoders).values())
            source = CheckedRegions(source, fields, encoders.region_limits)
    if (metadata := find_metadata(network)) is not None:
        source = NumberedMetadata(source, metadata.values, metadata.field_drop, seed)
    if (numbers := find_numbers(network)) is not None:
        source = CheckedNumbers(source, RangeCheck(numbers.ranges), numbers.field_drop, seed)
    words = next((each for each in network.modules() if isinstance(each, RegionWords)), None)
    if words is not None:
        source = TokenizedWords(source, words.rule, words.captions.length, words.tokenizer, cache)
    captions = find_captions(network)
    if captions is None or (words is not None and words.own is captions):  # nothing reads the captions of images
        return source
    return TokenizedCaptions(source, captions.length, captions.tokenizer, captions.pad_id, cache)
