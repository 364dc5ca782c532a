"""Metadata of an image, such as the camera and the weather: words of a few fields -> a vector, or a token for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.conditioning import ConditionConfig, ConditionEncoder, Tokens, Vector
from models.ranges import SIZE
from models.registry import did_you_mean

FIELDS = ()  # batch fields that the encoder reads: those of its options
UNKNOWN = "unknown"  # the word for a value that is not known: the null of its field
NULL = 0  # its number

Values = Mapping[str, Sequence[str]]  # the words that a field may have besides UNKNOWN, by field: numbers 1, 2, ...
Column = Tensor | Sequence[str]  # a field of a batch: numbers (B,) or B words


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """Fields of words, such as camera, weather, light and location, for the whole image."""

    metadata_fields: tuple[str, ...] = ()
    """Fields to read, such as camera light; by default all whose values the data set declares."""
    metadata_values: tuple[str, ...] = ()
    """Values of the fields, each as field=value, in the order of their numbers; by default those that the data set
    declares. The value unknown is the null, and always there."""
    metadata_as: Literal["vector", "tokens"] = "vector"
    """vector: the sum of the fields' embeddings, added to that of the time; tokens: one for each field, read by
    cross-attention."""
    metadata_field_drop: float = 0.1
    """Probability of replacing a field by its null in training, independently for each, beside --condition_drop, which
    replaces all of them; 0: images are sampled worse if some fields are given and others are not."""
    metadata_width: int | None = None
    """Width of the tokens, the same for all conditions with tokens; default: that of the network's embeddings."""

    RANGES = {"metadata_field_drop": "[0, 1)", "metadata_width": SIZE}

    def __post_init__(self):
        super().__post_init__()
        if self.metadata_width is not None and self.metadata_as == "vector":
            got = f"got metadata_width {self.metadata_width} for a vector, which is as wide as the network's embeddings"
            raise ValueError(f"{got}: leave --metadata_width out, or pass --metadata_as tokens")
        self.values  # noqa: B018 (validates the options)

    @property
    def values(self) -> dict[str, tuple[str, ...]]:
        """The values by field; empty if they are left to the data. ValueError for malformed ones."""
        values: dict[str, tuple[str, ...]] = {}
        for field, value in map(split_word, self.metadata_values):
            if value == UNKNOWN or value in values.get(field, ()):
                reason = "the null, which is always there" if value == UNKNOWN else "there twice"
                raise ValueError(f"got metadata_values {field}={value}, which is {reason}: leave it out")
            values[field] = (*values.get(field, ()), value)
        if values and set(self.metadata_fields) - values.keys():
            missing = [field for field in self.metadata_fields if field not in values]
            raise ValueError(f"got no metadata_values of {', '.join(missing)}: pass --metadata_values {missing[0]}=...")
        return {field: values[field] for field in self.metadata_fields or values} if values else {}

    def for_data(
        self,
        region_classes: int,
        metadata: Values | None = None,
        numbers: Mapping[str, Any] | None = None,
        names: Sequence[str] = (),
        things: Sequence[bool] = (),
    ) -> "Config":
        """Returns the options with the fields and values that data declare, where they leave them to the data.

        ValueError for a field that the data do not have, and if they have a value that is not among those given.
        """
        options = super().for_data(region_classes, metadata, numbers, names, things)
        own, declared = self.values, dict(metadata or {})
        words = []
        for field in own or self.metadata_fields or declared:
            if declared and field not in {**declared, **own}:
                hint = did_you_mean(field, declared)
                wanted = f"wanted some of {', '.join(declared)}, whose values the data set declares"
                raise ValueError(f"got metadata_fields {field}{hint}, {wanted}")
            values = own.get(field, declared.get(field, ()))
            if missing := [value for value in declared.get(field, ()) if value not in values]:
                got = f"got metadata_values without {field}={missing[0]}, which the data set has"
                raise ValueError(f"{got}: add it, or leave --metadata_values out")
            words += [(field, value) for value in values]
        fields = tuple(dict.fromkeys(field for field, _ in words)) or self.metadata_fields
        return replace(options, metadata_fields=fields, metadata_values=tuple(map("=".join, words)))


class MetadataEncoder(ConditionEncoder):
    """Looks up a learned vector for each field: one row per value, and one for the null.

    A field of a batch is words or numbers (B,), whose `NULL` is the null; so is a field that is left out.
    """

    def __init__(
        self, values: Values, width: int, kind: Literal["vector", "tokens"] = "vector", field_drop: float = 0.0
    ):
        """`field_drop` is for the loader of training batches: the probability of the null of each field."""
        super().__init__()
        if not values or not all(values.values()):
            raise ValueError(
                "got no values of metadata, and none from the data: pass --metadata_values light=daytime light=night"
            )
        self.values = {field: tuple(words) for field, words in values.items()}
        self.field_drop = field_drop
        self.fields, self.token_width = tuple(values), width if kind == "tokens" else 0
        sizes = [1 + len(words) for words in values.values()]
        self.nulls = tuple(accumulate(sizes[:-1], initial=0))  # the row of each field's null; its values follow
        self.embedding = nn.Embedding(sum(sizes), width)

    def forward(
        self, raw: Mapping[str, Column] | Column | None, x: Tensor, drop: Tensor | None = None
    ) -> Vector | Tokens:
        fields = {} if raw is None else raw if isinstance(raw, Mapping) else {self.fields[0]: raw}
        rows = []
        for field, null in zip(self.fields, self.nulls, strict=True):
            numbers = self.numbers(field, fields.get(field), x)
            rows.append(null + (numbers if drop is None else numbers.masked_fill(drop, NULL)))
        embedded = self.embedding(torch.stack(rows, 1))  # (B, F, D)
        return Tokens(embedded) if self.token_width else Vector(embedded.sum(1))

    def numbers(self, field: str, column: Column | None, x: Tensor) -> Tensor:
        """Returns the numbers (B,) of a field for a batch x (B, C, H, W), on its device; None is the null for all.

        ValueError for unknown words and, except in training, numbers.
        """
        if column is None:
            return torch.full(x.shape[:1], NULL, device=x.device)
        if not isinstance(column, Tensor):
            column = to_numbers(field, column, self.values[field]).to(x.device, non_blocking=True)
        elif not (self.training or torch.compiler.is_compiling()):
            count = len(self.values[field])
            if column.is_floating_point() or ((column < 0) | (column > count)).any():
                raise ValueError(f"got {field} {column.tolist()}, wanted whole numbers from 0 (unknown) to {count}")
        if column.shape != x.shape[:1]:
            raise ValueError(f"got {field} of shape {tuple(column.shape)} for {len(x)} images, wanted ({len(x)},)")
        return column


def split_word(word: str) -> tuple[str, str]:
    """Splits "camera=CAM_FRONT" into a field and a value; ValueError unless there are both."""
    field, sign, value = word.partition("=")
    if not (field and sign and value):
        raise ValueError(f"got metadata {word!r}, wanted a field and its value, such as camera=CAM_FRONT")
    return field, value


def parse_metadata(words: Sequence[str], values: Values) -> dict[str, str]:
    """Returns the values of words such as "camera=CAM_FRONT", by field; ValueError for unknown fields and values."""
    given: dict[str, str] = {}
    for field, value in map(split_word, words):
        if field not in values:
            hint = did_you_mean(field, values)
            owners = [f"{each}={value}" for each, known in values.items() if value in known]
            hint = f", did you mean {owners[0]!r}?" if owners else hint
            raise ValueError(f"got metadata {field}={value}{hint}, wanted a value of {', '.join(values)}")
        if field in given:
            raise ValueError(f"got metadata {field}={given[field]} and {field}={value}: pass one of them")
        check_value(field, value, values[field])
        given[field] = value
    return given


def check_value(field: str, value: object, words: Sequence[str], name: str | None = None) -> None:
    """Raises ValueError, with the name of the image if there is one, unless a value is one of `words` or unknown."""
    if value != UNKNOWN and value not in words:
        got = f"{'' if name is None else f'{name}: '}got {field} {value!r}{did_you_mean(str(value), words)}"
        raise ValueError(f"{got}, wanted one of {', '.join(words)}, or {UNKNOWN}")


def to_numbers(field: str, column: Sequence[str], words: Sequence[str], names: Sequence[str] | None = None) -> Tensor:
    """Returns the numbers of B values of a field, (B,) int64: 1 for the first of `words`, 0 for unknown.

    ValueError, with the name of its image if `names` are given, for a value that is not one of `words`.
    """
    for i, value in enumerate(column):
        check_value(field, value, words, None if names is None else names[i])
    numbers = {UNKNOWN: NULL} | {word: number for number, word in enumerate(words, NULL + 1)}
    return torch.tensor([numbers[value] for value in column])


def build(config: Config, width: int, n_classes: int) -> MetadataEncoder:
    """Builds the encoder, whose vectors are as wide as the embeddings; it does not depend on the number of classes."""
    width = config.metadata_width or width
    return MetadataEncoder(config.values, width, config.metadata_as, config.metadata_field_drop)
