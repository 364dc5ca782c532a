"""Left and right: class numbers and words that change places when an image is mirrored.

In a mirrored face the left eye is where the right one was, and "a car on the left" is on the right. A data set declares
such pairs in an attribute `sides`; every mirrored view of an item then swaps them, beside its boxes and masks.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

CLASS_FIELDS = ("box_class", "segment_class", "semantic")  # fields that hold class numbers
FILE_FIELDS = ("file_name",)  # strings that name what is stored, which no view changes


@dataclass(frozen=True)
class Sides:
    """Pairs that change places when an image is mirrored.

    `classes` are numbers of classes in the fields `CLASS_FIELDS`. `words` are words or phrases, such as ("left",
    "right") or ("CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"), in all strings and lists of strings except file names: only whole
    words, also written "Left" and "LEFT". A letter, a digit and an underscore belong to a word. ValueError if a number
    or a word occurs twice.
    """

    classes: tuple[tuple[int, int], ...] = ()
    words: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        for name, pairs in (("classes", self.classes), ("words", self.words)):
            members = [str(each).lower() for pair in pairs for each in pair]
            if twice := sorted({each for each in members if members.count(each) > 1}):
                raise ValueError(f"got sides whose {name} have {', '.join(twice)} twice, wanted each in one pair")

    def swap(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Returns an item with its class numbers and words swapped; the rest is not copied."""
        return {name: self.swap_field(name, value) for name, value in item.items()}

    def swap_field(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return swap_numbers(value, self.classes) if name in CLASS_FIELDS else value
        if name in FILE_FIELDS or not self.words:
            return value
        if isinstance(value, list):
            return [swap_words(each, self.words) if isinstance(each, str) else each for each in value]
        return swap_words(value, self.words) if isinstance(value, str) else value


def swap_numbers(values: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """Returns a copy of integers of any shape, of the same type, in which the numbers of each pair are exchanged."""
    swapped = values.clone()
    for one, other in pairs:
        swapped[values == one], swapped[values == other] = other, one
    return swapped


def swap_words(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Returns a text in which the whole words of each pair are exchanged, all at once."""
    pattern, partners = word_table(pairs)
    return pattern.sub(lambda match: partners[match[0]], text)


@lru_cache
def word_table(pairs: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """Returns a pattern that finds the words of the pairs, longer ones first, and the partner of each spelling."""
    spellings = (str.upper, str.capitalize, str.lower, str)  # the last one wins: as declared
    both = [*pairs, *((other, one) for one, other in pairs)]
    partners = {spell(one): spell(other) for spell in spellings for one, other in both}
    found = "|".join(re.escape(word) for word in sorted(partners, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?:{found})(?!\w)"), partners
