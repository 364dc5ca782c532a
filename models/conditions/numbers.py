"""Numbers of an image, such as its place and its year: named fields of known ranges -> a vector, the sum of all."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditioning import ConditionConfig, ConditionEncoder, Vector
from models.embeddings import sinusoidal_embedding
from models.ranges import SIZE
from models.registry import did_you_mean
from models.sdpa import upcast

FIELDS = ()  # batch fields that the encoder reads: those of its options
MISSING = math.nan  # a value that is not known: the null of its field
SCALE = 1000  # of a place in its range, so that the frequencies of a time in steps resolve it
OCTAVES = 8  # of a cyclic field: up to 128 periods in its range
EXAMPLE = "lat=-90:90, or lon=-180:180:cyclic where both ends are the same"


class NumberField(NamedTuple):
    """The range of a field. The ends of a cyclic one are the same, as midnight is 0 and 24 hours."""

    low: float
    high: float
    cyclic: bool = False


PRESETS: dict[str, dict[str, NumberField]] = {
    "none": {},
    # Khanna et al. 2024: their vector of lon + 180, lat + 90, gsd, cloud, year - 1980, month and day, each divided by
    # 360, 180, 1, 1, 120, 12 and 31
    "diffusionsat": {
        "lon": NumberField(-180, 180),
        "lat": NumberField(-90, 90),
        "gsd": NumberField(0, 1),
        "cloud_cover": NumberField(0, 1),
        "year": NumberField(1980, 2100),
        "month": NumberField(0, 12),
        "day": NumberField(0, 31),
    },
}


@dataclass(frozen=True, kw_only=True)
class Config(ConditionConfig):
    """Fields of numbers, such as the place and the year, for the whole image."""

    numbers_fields: tuple[str, ...] = ()
    """Fields to read, such as lon lat; by default those of the preset or else all whose ranges are known."""
    numbers_ranges: tuple[str, ...] = ()
    """Lowest and highest values of fields, such as lat=-90:90, with :cyclic where both ends are the same, such as
    lon=-180:180:cyclic or month=0:12:cyclic; by default those of the preset, or those that the data set declares."""
    numbers_preset: Literal["none", "diffusionsat"] = "none"
    """diffusionsat: the fields and ranges of DiffusionSat, lon lat gsd cloud_cover year month day, none cyclic."""
    numbers_field_drop: float = 0.1
    """Probability of replacing a field by its null in training, independently for each, beside --condition_drop, which
    replaces all of them; 0: images are sampled worse if some fields are given and others are not."""
    numbers_width: int | None = None
    """Width of the sinusoids of a number, even; default: a quarter of that of the network's embeddings."""

    RANGES = {"numbers_field_drop": "[0, 1)", "numbers_width": SIZE}

    def __post_init__(self):
        super().__post_init__()
        if (self.numbers_width or 0) % 2:
            raise ValueError(f"got numbers_width {self.numbers_width}, wanted an even number: half are cosines")
        self.known_ranges  # noqa: B018 (validates the options)

    @property
    def known_ranges(self) -> dict[str, NumberField]:
        """The ranges by field: those of the preset, and those given, which override them. ValueError for wrong ones."""
        given = [parse_range(word) for word in self.numbers_ranges]
        names = [name for name, _ in given]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"got numbers_ranges with {twice[0]} twice: leave one of them out")
        return PRESETS[self.numbers_preset] | dict(given)

    @property
    def ranges(self) -> dict[str, NumberField]:
        """The range of each field to read, in their order. ValueError for a field without one."""
        known = self.known_ranges
        for name in self.numbers_fields:
            if name not in known:
                got = f"got numbers_fields {name}{did_you_mean(name, known)}"
                raise ValueError(f"{got}, whose range is not known: pass --numbers_ranges {name}=LOW:HIGH")
        return {name: known[name] for name in self.numbers_fields or known}

    def for_data(
        self,
        region_classes: int,
        metadata: Mapping[str, Sequence[str]] | None = None,
        numbers: Mapping[str, NumberField] | None = None,
        names: Sequence[str] = (),
        things: Sequence[bool] = (),
    ) -> "Config":
        """Returns the options with the fields and ranges that data declare, where they leave them to the data.

        ValueError for a field whose range is not known.
        """
        options, own = super().for_data(region_classes, metadata, numbers, names, things), self.known_ranges
        known = {**(numbers or {}), **own}
        fields = self.numbers_fields or (own if PRESETS[self.numbers_preset] else known)
        complete = replace(options, numbers_ranges=tuple(format_range(*each) for each in known.items()))
        ranges = replace(complete, numbers_fields=tuple(fields)).ranges
        return replace(
            options, numbers_fields=tuple(ranges), numbers_ranges=tuple(format_range(*each) for each in ranges.items())
        )


class NumberEmbedding(nn.Module):
    """Embeds one field: sines and cosines of its value, and two linear layers, (B,) -> (B, E).

    Of a linear field, they are the sinusoidal embedding of 0 at its lowest value to 1000 at its highest (Khanna et al.
    2024, DiffusionSat); of a cyclic one, the cosines and sines of 1, 2, 4, ..., 128 times its angle. The last layer
    starts at zero.
    """

    def __init__(self, field: NumberField, width: int, emb_width: int):
        super().__init__()
        self.field, self.width = field, width
        self.expand = nn.Linear(2 * OCTAVES if field.cyclic else width, emb_width)
        self.contract = nn.Linear(emb_width, emb_width)
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, values: Tensor) -> Tensor:
        low, high, cyclic = self.field
        place = (upcast(values) - low) / (high - low)  # 0 at the lowest value, 1 at the highest
        waves = cyclic_embedding(place) if cyclic else sinusoidal_embedding(SCALE * place, self.width)
        return self.contract(F.silu(self.expand(waves.to(self.expand.weight.dtype))))


def cyclic_embedding(place: Tensor) -> Tensor:
    """Returns cosines, then sines, of 2^i turns of a place (B,) in its period, i = 0, ..., 7: (B, 16).

    Places that differ by whole periods have the same embedding.
    """
    turns = torch.remainder(place[:, None], 1) * 2 ** torch.arange(OCTAVES, device=place.device)
    angle = 2 * math.pi * torch.remainder(turns, 1)  # (B, octaves)
    return torch.cat([angle.cos(), angle.sin()], 1)


class NumbersEncoder(ConditionEncoder):
    """Sums the embeddings of all fields, with a learned null of its own for each field that is missing.

    A field of a batch is numbers (B,), of which NaN is missing; so is a field that is left out. The nulls start at
    zero: what is missing is then left out of the sum. Values outside the range of a field are not clamped, since they
    would look like its ends; a warning names the first one of each field, except in training, whose data are checked
    where they are loaded. Those of a cyclic field come round again, without a warning.
    """

    def __init__(self, ranges: Mapping[str, NumberField], width: int, emb_width: int, field_drop: float = 0.0):
        """`field_drop` is for the loader of training batches: the probability of the null of each field."""
        super().__init__()
        if not ranges:
            raise ValueError(
                f"got no fields of numbers, and none from the data: pass their ranges as --numbers_ranges {EXAMPLE}"
            )
        self.ranges, self.fields, self.field_drop = dict(ranges), tuple(ranges), field_drop
        self.embeddings = nn.ModuleList(NumberEmbedding(field, width, emb_width) for field in ranges.values())
        self.nulls = nn.Parameter(torch.zeros(len(ranges), emb_width))  # no network initialises it again
        self.check = RangeCheck(self.ranges)

    def forward(self, raw: Mapping[str, Tensor] | Tensor | None, x: Tensor, drop: Tensor | None = None) -> Vector:
        columns = {} if raw is None else raw if isinstance(raw, Mapping) else {self.fields[0]: raw}
        embedded = []
        for name, embedding, null in zip(self.fields, self.embeddings, self.nulls, strict=True):
            values = self.column(name, columns.get(name), x)
            missing = values.isnan() if drop is None else values.isnan() | drop
            known = embedding(values.masked_fill(missing, self.ranges[name].low))
            embedded.append(torch.where(missing.unsqueeze(1), null.to(known.dtype), known))
        return Vector(torch.stack(embedded).sum(0))

    def column(self, name: str, values: Tensor | None, x: Tensor) -> Tensor:
        """Returns the values (B,) of a field for a batch x (B, C, H, W), on its device; None is missing for all.

        ValueError for another shape and, except in training, values that are not finite.
        """
        if values is None:
            return torch.full(x.shape[:1], MISSING, device=x.device)
        if values.shape != x.shape[:1]:
            raise ValueError(f"got {name} of shape {tuple(values.shape)} for {len(x)} images, wanted ({len(x)},)")
        if not (self.training or torch.compiler.is_compiling()):
            self.check(name, values)
        return values.to(x.device, values.dtype if values.is_floating_point() else torch.float32, non_blocking=True)

    @torch.no_grad()
    def set_null_to_zero_value(self) -> None:
        """Sets the null of each field to the embedding of its lowest value, 0 before the sinusoid.

        Weights trained with missing numbers set to 0 there, such as those of DiffusionSat, then behave as in training.
        """
        for name, embedding, null in zip(self.fields, self.embeddings, self.nulls, strict=True):
            null.copy_(embedding(null.new_tensor([self.ranges[name].low]))[0])


class RangeCheck:
    """Checks values of fields, and warns once of each linear field that has values outside its range.

    Each source of data has a check of its own, and each process that reads it a copy, which warns by itself.
    """

    def __init__(self, ranges: Mapping[str, NumberField]):
        self.ranges, self.warned = dict(ranges), set[str]()

    def __call__(self, name: str, values: Tensor, images: Sequence[str] | None = None) -> None:
        """Checks the values (B,) of a field, of the images of these names; ValueError for infinite ones."""
        if (infinite := values.isinf()).any():
            got = f"{name_of(infinite, images)}got {name} {values[infinite][0].item()}"
            raise ValueError(f"{got}, wanted a finite number, or nan for a missing one")
        low, high, cyclic = self.ranges[name]
        outside = (values < low) | (values > high)  # False for NaN
        if not cyclic and name not in self.warned and outside.any():
            self.warned.add(name)
            warnings.warn(
                f"{name_of(outside, images)}got {name} {values[outside][0].item():g}, outside its range {low:g} to "
                f"{high:g}, where nothing was learned: check its unit, or train with another --numbers_ranges",
                stacklevel=2,
            )


def name_of(chosen: Tensor, images: Sequence[str] | None) -> str:
    """Returns the name of the first chosen image (B,) and a colon, "" if images have no names."""
    return "" if images is None else f"{images[int(chosen.nonzero()[0])]}: "


def parse_range(word: str) -> tuple[str, NumberField]:
    """Reads "lat=-90:90" or "lon=-180:180:cyclic"; ValueError for anything else."""
    name, _, text = word.partition("=")
    ends = text.removesuffix(":cyclic").split(":")
    try:
        low, high = map(float, ends)
    except ValueError as error:
        raise ValueError(f"got numbers_ranges {word!r}, wanted a field and its range, such as {EXAMPLE}") from error
    if not (name and -math.inf < low < high < math.inf):
        raise ValueError(
            f"got numbers_ranges {word!r}, wanted the lower of two finite numbers first, such as {EXAMPLE}"
        )
    return name, NumberField(low, high, text.endswith(":cyclic"))


def format_range(name: str, field: NumberField) -> str:
    """Returns what `parse_range` reads."""
    low, high = (repr(float(end)).removesuffix(".0") for end in field[:2])
    return f"{name}={low}:{high}{':cyclic' if field.cyclic else ''}"


def parse_number(name: str, value: object) -> float:
    """Returns the number that a file, an item or the command line gives for a field, NaN for a missing one.

    Missing are None, "", "nan" and "unknown". ValueError for words, infinite numbers and several.
    """
    if value is None or (isinstance(value, str) and value in ("", "unknown")):
        return MISSING
    try:
        number = math.inf if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, RuntimeError):  # the last for a tensor of several numbers
        number = math.inf
    if math.isinf(number):
        raise ValueError(f"got {name} {value!r}, wanted a finite number, or unknown for a missing one")
    return number


def build(config: Config, width: int, n_classes: int) -> NumbersEncoder:
    """Builds the encoder, whose vectors are as wide as the embeddings; it does not depend on the number of classes."""
    sinusoids = config.numbers_width or 2 * max(1, width // 8)
    return NumbersEncoder(config.ranges, sinusoids, width, config.numbers_field_drop)
