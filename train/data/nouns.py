"""English nouns in captions: articles, plurals, numbers and lists."""

import re
from collections.abc import Sequence

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
IRREGULAR = {
    **{"person": "people", "child": "children", "man": "men", "woman": "women", "mouse": "mice", "foot": "feet"},
    **{"knife": "knives", "leaf": "leaves", "shelf": "shelves"},
    **{"sheep": "sheep", "fish": "fish", "aircraft": "aircraft"},
}
PLURALS = ("skis", "taxis", "kiwis")  # whose ending is otherwise that of a singular
CONSONANT = re.compile(r"one\b|uni[cftv]|use|ute|eu", re.IGNORECASE)  # heard first, though a vowel is written
HISSING = ("s", "x", "z", "ch", "sh")  # endings that take -es


def is_plural(noun: str) -> bool:
    """Returns whether a noun has no singular of its own, such as "pants": by its ending, -s but not -ss, -us or -is."""
    return noun.endswith(PLURALS) or (noun.endswith("s") and not noun.endswith(("ss", "us", "is")))


def with_article(noun: str) -> str:
    """Returns a noun with its indefinite article: "an apple", "a unicycle"; plurals such as "pants" have none."""
    if is_plural(noun):
        return noun
    vowel = noun[:1].lower() in {*"aeiou"} and not CONSONANT.match(noun)
    return f"{'an' if vowel else 'a'} {noun}"


def pluralize(noun: str) -> str:
    """Returns the plural of a noun, of whose words the last changes: "wine glasses", "people", "cherries"."""
    start, space, last = noun.rpartition(" ")
    if last in IRREGULAR:
        plural = IRREGULAR[last]
    elif is_plural(last):
        plural = last
    elif last.endswith("y") and last[-2:-1] not in {*"aeiou"}:
        plural = f"{last[:-1]}ies"
    else:
        plural = f"{last}es" if last.endswith(HISSING) else f"{last}s"
    return f"{start}{space}{plural}"


def count_noun(noun: str, count: int) -> str:
    """Returns a noun with its number: "a dog", "two dogs", "13 dogs"."""
    if count == 1:
        return with_article(noun)
    return f"{NUMBERS[count] if count < len(NUMBERS) else count} {pluralize(noun)}"


def join_words(phrases: Sequence[str]) -> str:
    """Returns a list in words: "a dog", "a dog and a cat", "a dog, a cat and two birds"."""
    *front, last = phrases
    return f"{', '.join(front)} and {last}" if front else last
