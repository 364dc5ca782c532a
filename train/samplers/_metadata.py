"""Metadata of images, words and numbers: the values that a user gives for generated images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from models.conditions.metadata import UNKNOWN, MetadataEncoder, Values, check_value, parse_metadata, split_word
from models.conditions.numbers import MISSING, NumberField, NumbersEncoder, parse_number


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


def find_metadata(network: nn.Module) -> MetadataEncoder | None:
    """Returns the encoder of metadata of a network; None if it has none."""
    return next((each for each in network.modules() if isinstance(each, MetadataEncoder)), None)


def find_numbers(network: nn.Module) -> NumbersEncoder | None:
    """Returns the encoder of numbers of a network; None if it has none."""
    return next((each for each in network.modules() if isinstance(each, NumbersEncoder)), None)
