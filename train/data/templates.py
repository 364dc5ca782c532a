"""Captions by template: sentences made of the class of an image, or of how many things of each class it shows.

Sentences are held apart and nouns are not: those of validation never occur in training, with the same nouns.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from train.data.captions import SHARES
from train.data.nouns import count_noun, join_words, with_article
from train.data.patches import COPIED
from train.datasets import Dataset, Templates, UnreadableImage, content_fingerprint, read_item

OF_CLASSES = Templates(
    train=(
        *("{a_noun}", "{noun}", "a photo of {a_noun}", "an image of {a_noun}", "a picture that shows {a_noun}"),
        *("photo: {noun}", "{a_noun} in a picture", "{a_noun} and nothing else", "here one sees {a_noun}"),
        *("a picture of {a_noun}, seen up close", "this photo shows {a_noun}", "what you see here: {a_noun}"),
    ),
    val=("this is {a_noun}", "a photograph in which one sees {a_noun}"),
)
OF_REGIONS = Templates(
    train=(
        *("{things}", "a photo of {things}", "an image with {things}", "a picture that shows {things}"),
        *("photo: {things}", "{things} in a picture", "{things} and nothing else", "here one sees {things}"),
    ),
    val=("this is {things}", "a photograph in which one sees {things}"),
)
NOTHING = "nothing"  # the things of an image without any
MOST_NOUNS = 6  # of the things of an image, the most frequent


class TemplateCaptions:
    """A `Dataset` whose items have `captions` made of their classes; they replace captions of their own."""

    def __init__(self, dataset: Dataset, split: str):
        """ValueError for data without classes, classes without names, and data of regions without boxes."""
        self.dataset, self.n_classes, self.labels = dataset, dataset.n_classes, dataset.labels
        for name in (*COPIED, "notes", "unpaired", "blocks", "number_measures"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))
        names = dataset.class_names if dataset.n_classes else getattr(dataset, "region_classes", ())
        if not names:
            reason = "whose classes have no names: pass --class_names, or" if dataset.n_classes else "without classes:"
            raise ValueError(f"got --captions templates for data {reason} leave --captions out")
        if not dataset.n_classes and not has_boxes(dataset):
            raise ValueError(
                "got --captions templates for data whose things cannot be counted, such as maps of classes, wanted "
                "boxes: leave --captions out"
            )
        templates = getattr(dataset, "templates", None) or (OF_CLASSES if dataset.n_classes else OF_REGIONS)
        self.sentences = templates.val if split == "val" else templates.train
        self.nouns = templates.nouns or tuple(map(noun_of, names))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.with_captions(self.dataset[index])

    def read_at_size(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """Returns an item to be resized to `size`: its image may have been decoded to fewer pixels."""
        return self.with_captions(read_item(self.dataset, index, size))

    def with_captions(self, item: dict[str, Any]) -> dict[str, Any]:
        """Returns an item with all sentences on it in place of captions of its own."""
        rest = {name: value for name, value in item.items() if name not in ("caption", SHARES)}
        return rest | {"captions": self.captions(item)}

    def captions(self, item: dict[str, Any]) -> list[str]:
        """Returns all sentences on an item."""
        if not self.n_classes:
            words = {"things": describe_things(item, self.nouns, self.region_things)}
        else:
            noun = self.nouns[item["label"]]
            words = {"name": self.class_names[item["label"]], "noun": noun, "a_noun": with_article(noun)}
        return [sentence.format(**words) for sentence in self.sentences]

    def fingerprint(self) -> str:
        return self.digest(self.dataset.fingerprint())

    def content_fingerprint(self) -> str:
        return self.digest(content_fingerprint(self.dataset))

    def digest(self, fingerprint: str) -> str:
        return hashlib.sha256(f"{fingerprint} {self.sentences} {self.nouns} {MOST_NOUNS}".encode()).hexdigest()


def has_boxes(dataset: Dataset) -> bool:
    """Returns whether items have boxes with classes, by the first one that can be read."""
    for index in range(len(dataset)):
        with suppress(UnreadableImage):
            return "box_class" in dataset[index]
    return False


def noun_of(name: str) -> str:
    """Returns the noun for a class: "ankle boot" for "Ankle boot", "traffic light" for "traffic_light"."""
    return name.replace("_", " ").lower()


def describe_things(item: dict[str, Any], nouns: Sequence[str], things: Sequence[bool]) -> str:
    """Returns the things of an item with their numbers, the most frequent first: "three dogs and a person".

    They are its `box_words`, such as "red disc", or the nouns of its `box_class`; crowds are left out.
    """
    classes = item["box_class"].tolist()
    words = item["box_words"] if "box_words" in item else [nouns[number] for number in classes]
    crowds = item["box_crowd"].tolist() if "box_crowd" in item else [0] * len(classes)
    single = [word for word, number, crowd in zip(words, classes, crowds, strict=True) if things[number] and not crowd]
    counts = Counter(single).most_common(MOST_NOUNS)
    return join_words([count_noun(noun, count) for noun, count in counts]) if counts else NOTHING
