"""Metadata of images, words and numbers: values that a user gives for generated images, and checks of training data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.rng import Streams, seed_of
from models.conditions.metadata import UNKNOWN, Values, check_value, parse_metadata, split_word
from models.conditions.numbers import MISSING, NumberField, NumbersEncoder, RangeCheck, parse_number
from train.data.loading import BatchSource
from train.loop import Batch
from train.samplers._conditions import find_metadata


@dataclass(frozen=True)
class MetadataFields:
    """The fields of a network's conditions `metadata` and `numbers`, whose values --metadata and files give."""

    words: Values  # the words of each field of `metadata`
    numbers: Mapping[str, NumberField]  # the range of each field of `numbers`

    @classmethod
    def of(cls, network: nn.Module) -> "MetadataFields":
        """Returns the fields of a network, none without these conditions."""
        words, numbers = find_metadata(network), find_numbers(network)
        return cls({} if words is None else words.values, {} if numbers is None else numbers.ranges)

    @property
    def unknown(self) -> dict[str, str | float]:
        """The null of each field."""
        return dict.fromkeys(self.words, UNKNOWN) | dict.fromkeys(self.numbers, MISSING)

    def parse(self, words: Sequence[str]) -> dict[str, str | float]:
        """Returns the values of words such as "light=night" and "lon=-90.8", by field.

        ValueError for unknown fields and values, and for a field that is there twice.
        """
        pairs = [split_word(word) for word in words]
        numbers: dict[str, str | float] = {}
        for name, value in pairs:
            if name in numbers:
                raise ValueError(f"got metadata {name}={value} and another {name}: pass one of them")
            if name in self.numbers:
                numbers[name] = parse_number(name, value)
        others = [word for word, (name, _) in zip(words, pairs, strict=True) if name not in self.numbers]
        return parse_metadata(others, {**self.words, **dict.fromkeys(self.numbers, ())}) | numbers

    def read_row(self, row: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Returns a row of conditions with its numbers as floats, NaN for missing ones.

        ValueError, with the `name` of the row, for words that are no value of their field, and for no numbers.
        """
        for field in self.words.keys() & row.keys():
            check_value(field, row[field], self.words[field], name)
        try:
            return {**row, **{each: parse_number(each, row[each]) for each in row if each in self.numbers}}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def find_numbers(network: nn.Module) -> NumbersEncoder | None:
    """Returns the encoder of numbers of a network; None if it has none."""
    return next((each for each in network.modules() if isinstance(each, NumbersEncoder)), None)


@dataclass(frozen=True)
class CheckedNumbers:
    """Batches of a source whose fields of numbers are checked and made float32 (B,), NaN where missing.

    With a seed, each field of an example becomes missing with probability `drop`, from the stream "number_fields" of
    the seed and its position. Images are known by the field file_name, if they have one.
    """

    source: BatchSource
    check: RangeCheck
    drop: float
    seed: int | None

    def __len__(self) -> int:
        return len(self.source)

    def item_index(self, position: int) -> int:
        """Returns the index in the data set of the item at a position."""
        return self.source.item_index(position)

    def __getitem__(self, positions: list[int]) -> Batch:
        batch = self.source[positions]
        names = [name for name in self.check.ranges if name in batch]
        numbers = {name: self.read(name, batch) for name in names}
        if self.seed is not None:
            streams = Streams([seed_of(self.seed, "number_fields", position) for position in positions])
            drop = streams.uniform((len(positions), len(self.check.ranges))) < self.drop
            for i, name in enumerate(names):
                numbers[name] = numbers[name].masked_fill(drop[:, i], MISSING)
        return batch | numbers

    def read(self, name: str, batch: Batch) -> Tensor:
        """Returns the values (B,) of a field; ValueError unless they are finite numbers, or NaN."""
        values, images = batch[name], batch.get("file_name")
        if not isinstance(values, Tensor) or values.ndim != 1 or values.dtype == torch.bool:
            got = f"a tensor {tuple(values.shape)}" if isinstance(values, Tensor) else f"{values[0]!r}"
            raise ValueError(f"field {name!r} of the items is {got}, wanted a number, or nan for a missing one")
        self.check(name, values, images)
        return values.float()


def with_checked_numbers(source: BatchSource, network: nn.Module, seed: int | None = None) -> BatchSource:
    """Returns a source whose numbers are checked, if the network has a condition that reads them; with the seed of a
    training some of them are missing, as the condition's options say."""
    encoder = find_numbers(network)
    if encoder is None:
        return source
    return CheckedNumbers(source, RangeCheck(encoder.ranges), encoder.field_drop, seed)
