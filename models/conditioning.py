"""Conditions of a network: named streams of vectors, tokens and maps, the regions they describe, and their encoders.

Shapes: R regions, M condition tokens, E embedding width, N = H W cells of a grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from models.ranges import check_ranges
from models.regions import Regions, Rule, check_region_fields, check_window, crop_cells
from models.streams import (
    NDIM,
    Context,
    Hint,
    Map,
    Stream,
    Tokens,
    Vector,
    cat_streams,
    cat_tokens,
    check_tokens,
    map_tensors,
)

REGIONS = "regions"  # the name of the drop of all encoders of regions
POOLED = "_pooled"  # after the name of an encoder: the vector made of its tokens


@dataclass(frozen=True, eq=False)
class Condition:
    """The encoded condition of a batch: named streams and regions. Blocks read it; processes and solvers pass it on.

    `condition[rows]` selects examples by a slice, or a tensor of indices or bools.
    """

    streams: Mapping[str, Stream] = field(default_factory=dict)
    regions: Regions | None = None
    # keys and values of the tokens, (B, M, heads, d) each, in layers that computed them before
    keys: Mapping[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # attention masks by (height, width, rule, kind)
    attention_mask_cache: dict[tuple[int, int, Rule, type[Tokens]], Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self):
        for name, stream in self.streams.items():
            ndim = NDIM.get(type(stream))
            if ndim is None or stream.values.ndim != ndim:
                got = type(stream).__name__ if ndim is None else f"{type(stream).__name__} {tuple(stream.values.shape)}"
                wanted = "Vector (B, E), Tokens or GatedTokens (B, M, D), Map, DecoderMap or Hint (B, C, h, w)"
                raise ValueError(f"got stream {name}: {got}, wanted {wanted}")
            if isinstance(stream, Tokens):
                check_tokens(name, stream, self.regions)
        sizes = {name: len(stream.values) for name, stream in self.streams.items()}
        if self.regions is not None:
            sizes["regions"] = len(self.regions.present)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"got streams for batches of {sizes}, wanted one size")

    @property
    def batch_size(self) -> int | None:
        """B, or None for a condition without streams and regions, which fits any batch."""
        parts = [stream.values for stream in self.streams.values()]
        parts += [] if self.regions is None else [self.regions.present]
        return len(parts[0]) if parts else None

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        """Returns the condition of some examples."""
        return self.map_tensors(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "Condition":
        """Returns the condition on a device."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "Condition":
        """Returns the condition with `fn` applied to every tensor."""
        streams = {name: map_tensors(stream, fn) for name, stream in self.streams.items()}
        keys = {layer: (fn(keys), fn(values)) for layer, (keys, values) in self.keys.items()}
        return Condition(streams, None if self.regions is None else self.regions.map_tensors(fn), keys)

    @classmethod
    def cat(cls, conditions: Sequence["Condition"]) -> "Condition":
        """Concatenates conditions along the batch; tokens and regions are padded to the largest number.

        ValueError if their streams differ.
        """
        names = {tuple(sorted(condition.streams)) for condition in conditions}
        if len(names) != 1:
            raise ValueError(f"got conditions with the streams {sorted(names)}, wanted the same in all")
        first, regions = conditions[0].streams, _cat_regions(conditions)
        count = 0 if regions is None else regions.present.shape[1]
        streams = {name: cat_streams([condition.streams[name] for condition in conditions], count) for name in first}
        return cls(streams, regions)

    def window(self, top: int, left: int, height: int, width: int, grid: tuple[int, int]) -> "Condition":
        """Returns the condition of a window of cells of a grid: maps and regions are cropped to it, tokens stay."""
        rows, columns = check_window(top, left, height, width, grid)
        streams = {
            name: stream._replace(
                values=crop_cells(crop_cells(stream.values, -2, top, height, rows), -1, left, width, columns)
            )
            if isinstance(stream, Map | Hint)
            else stream
            for name, stream in self.streams.items()
        }
        return Condition(streams, None if self.regions is None else self.regions.window(top, left, height, width, grid))

    def row_ids(self) -> Tensor | None:
        """Returns (B,) int64, equal for examples with equal conditions; None without streams and regions.

        Vectors made of tokens are not compared: they follow from these, but equal ones may be rounded differently.
        """
        pooled = {f"{name}{POOLED}" for name in self.streams}
        streams = [stream for name, stream in self.streams.items() if name not in pooled]
        parts = [tensor for stream in streams for tensor in stream if tensor is not None]
        parts += [] if self.regions is None else self.regions.tensors().values()
        tensors = [part.flatten(1) if part.ndim > 1 else part.unsqueeze(1) for part in parts]
        if not tensors:
            return None
        rows = torch.cat([tensor.cpu().double() for tensor in tensors], 1)
        return rows.unique(dim=0, return_inverse=True)[1].to(tensors[0].device)

    def streams_of(self, kind: type[Stream]) -> list[Stream]:
        """Returns all streams of exactly this type, in order."""
        return [stream for stream in self.streams.values() if type(stream) is kind]

    def vector(self) -> Tensor | None:
        """Returns the sum of the vectors, (B, E); None without any."""
        vectors = [stream.values for stream in self.streams_of(Vector)]
        return sum(vectors[1:], vectors[0]) if vectors else None

    def map(self, kind: type[Map] = Map) -> Tensor | None:
        """Returns the maps of a type concatenated along the channels, (B, C, h, w); None without any."""
        maps = [stream.values for stream in self.streams_of(kind)]
        return torch.cat(maps, 1) if maps else None

    def tokens(self, kind: type[Tokens] = Tokens) -> Tokens | None:
        """Returns all tokens of a type as one sequence, with a mask and regions if any stream has them; None without
        any."""
        streams = self.streams_of(kind)
        if len(streams) < 2:
            return streams[0] if streams else None
        return cat_tokens(streams, 1)

    def context(self, height: int, width: int, kind: type[Tokens] = Tokens) -> Context | None:
        """Returns the tokens of a type and their mask for cross-attention from a grid, None without tokens.

        The mask differs between cells if tokens describe regions; see `attention_mask`.
        """
        tokens = self.tokens(kind)
        if tokens is None:
            return None
        mask = self.attention_mask(height, width, kind=kind)
        return Context(tokens.values, tokens.mask if mask is None else mask)

    def spans(self, kind: type[Tokens] = Tokens) -> dict[str, slice]:
        """Returns the slice of each stream's tokens in `tokens(kind)`."""
        spans, stop = {}, 0
        for name, stream in self.streams.items():
            if type(stream) is kind:
                start, stop = stop, stop + stream.values.shape[1]
                spans[name] = slice(start, stop)
        return spans

    def attention_mask(
        self, height: int, width: int, rule: Rule = "touched", kind: type[Tokens] = Tokens
    ) -> Tensor | None:
        """Returns which tokens of a type each cell of a grid attends to, (B, height * width, M) bool; computed once.

        Cells attend to a token if any of the regions that it describes covers them by this rule (see `Regions.at`), to
        tokens of the whole image always, to padding never. None if no token describes a region. A cell may have no
        token to attend to: attention must give zeros there, before its output projection.
        """
        tokens, key = self.tokens(kind), (height, width, rule, kind)
        if tokens is None or tokens.membership is None:
            return None
        if key not in self.attention_mask_cache:
            if self.regions is None:
                raise ValueError("got tokens of regions, and no regions: pass Condition(..., regions=)")
            covered = self.regions.at(height, width, rule).flatten(2)  # (B, R, N)
            seen = covered.mT.float() @ tokens.membership.mT.float() > 0  # (B, N, M)
            seen = seen if tokens.everywhere is None else seen | tokens.everywhere.unsqueeze(1)
            seen = seen if tokens.mask is None else seen & tokens.mask.unsqueeze(1)
            self.attention_mask_cache[key] = seen
        return self.attention_mask_cache[key]


def tokens_after_null(null: Tensor, values: Tensor, present: Tensor, drop: Tensor | None) -> Tokens:
    """Returns the null (B, N, D), which only dropped examples see, and tokens (B, M, D) of those `present`, (B, M)."""
    dropped = present.new_zeros(len(present), 1) if drop is None else drop.unsqueeze(1)
    values = values.masked_fill(~present.unsqueeze(-1), 0)  # padding is the same in all images
    mask = torch.cat([dropped.expand(-1, null.shape[1]), present], 1)
    return Tokens(torch.cat([null.to(values.dtype), values], 1), mask)


def _cat_regions(conditions: Sequence[Condition]) -> Regions | None:
    """Concatenates regions along the batch, padded to the largest R; None if no condition has regions."""
    known = [condition.regions for condition in conditions if condition.regions is not None]
    if not known:
        return None
    return Regions.cat([known[0].empty(c.batch_size) if c.regions is None else c.regions for c in conditions])


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """Options of conditions."""  # a subclass declares its RANGES; its __post_init__ calls super().__post_init__()

    OF_DATA = ()  # of a subclass: options that describe the data, and that another data set replaces

    def __post_init__(self):
        check_ranges(self)

    def for_data(
        self,
        region_classes: int,
        metadata: Mapping[str, Sequence[str]] | None = None,
        numbers: Mapping[str, Any] | None = None,
        names: Sequence[str] = (),
        things: Sequence[bool] = (),
    ) -> "ConditionConfig":
        """Returns the options with the number of classes of regions in the data (0: none) where they leave it to them.

        `CLASSES` of a subclass names its option; others may take values of `metadata`, the ranges of `numbers`, and the
        `names` of the classes of regions with which of them are `things`, that the data declare. ValueError for other
        options.
        """
        options = [vars(base)["CLASSES"] for base in type(self).__mro__ if "CLASSES" in vars(base)]
        for name in options:
            if getattr(self, name) and region_classes not in (0, getattr(self, name)):
                got = f"got {name} {getattr(self, name)}"
                raise ValueError(f"{got}, the data set has {region_classes}: leave --{name} out")
        return replace(self, **{name: getattr(self, name) or region_classes for name in options})

    @classmethod
    def options_of_data(cls) -> set[str]:
        """Returns the names of the options that describe the data, which runs on other data do not take over."""
        return {name for base in cls.__mro__ for name in vars(base).get("OF_DATA", ())}


class ConditionEncoder(nn.Module, ABC):
    """Encodes one raw condition of a batch as one stream, with a learned null; see `pool` for a second one.

    A file `models/conditions/<name>.py` defines:
    - the encoder. It returns a Map, a DecoderMap, Tokens, GatedTokens or a Hint if it says how wide they are, else a
      Vector;
    - `Config`, a `ConditionConfig` whose fields become flags; they begin with the condition's name, to avoid clashes;
    - `FIELDS`, the batch fields that the encoder reads; `fields` of the encoder, if they depend on its options;
    - `build(config, width, n_classes)`, with the width E of vectors and the number of classes in the data (0: none);
    - perhaps `SHARES`, the name of another condition, whose encoder `build` takes as a last argument, None without it.

    The raw condition is the field itself or, for several or ragged fields, a dict of them and their padding masks.
    """

    fields: tuple[str, ...] = ()  # batch fields that it reads; none: the FIELDS of its file
    optional_fields: tuple[str, ...] = ()  # that it reads beside them, from batches that have them
    prepared_fields: tuple[str, ...] = ()  # made of other fields while data are loaded, and read instead of them
    map_channels: int = 0  # C of its Map
    decoder_channels: int = 0  # C of its DecoderMap
    token_width: int = 0  # D of its Tokens
    gated_width: int = 0  # D of its GatedTokens
    hint_channels: int = 0  # C of its Hint
    pools: bool = False  # True: `pool` makes a Vector of its Tokens, another stream
    describes_regions: bool = False  # True: its tokens have membership, and Tokens are prompts of region attention

    @abstractmethod
    def forward(self, raw: Any, x: Tensor, drop: Tensor | None = None) -> Stream:
        """Encodes the raw condition of a batch x (B, C, H, W); examples where `drop` (B,) bool is True get the null.

        `raw=None` is the null for all examples.
        """

    def pool(self, tokens: Tokens) -> Vector:
        """Returns a vector of width E for the tokens of each example, if the encoder `pools`."""
        raise NotImplementedError

    def kept_modules(self) -> set[nn.Module]:
        """Returns the modules whose weights a network that contains the encoder does not initialise anew."""
        return set()


class RegionEncoder(ConditionEncoder):
    """Encodes the regions of images and what else a batch has of them.

    All such encoders of a network share one `Regions`, made of the fields that they read, and one drop, named REGIONS:
    the regions of an example are null for all of them, or for none.
    """

    limits: Mapping[str, int] = MappingProxyType({})  # how many numbers a field may have, such as {"box_class": 10}
    null_length: int = 0  # of its tokens, how many come before those of the regions
    tokens_per_region: int = 1

    def tokens_of_region(self, region: int) -> range:
        """Returns the tokens of a region, by their numbers in the condition."""
        first = self.null_length + region * self.tokens_per_region
        return range(first, first + self.tokens_per_region)

    @abstractmethod
    def forward(self, raw: Any, x: Tensor, drop: Tensor | None = None, regions: Regions | None = None) -> Stream:
        """As in ConditionEncoder, with the regions of the batch; dropped examples have none. None: the null."""


def check_classes(condition: str, count: int) -> None:
    """Raises ValueError for an encoder of regions without classes."""
    if count < 1:
        raise ValueError(
            f"got no classes for the condition {condition}, and none from the data: pass --{condition}_classes N"
        )


class Conditioner(nn.ModuleDict):
    """The condition encoders of a network, by name; encodes raw fields to a `Condition`."""

    def __init__(self, encoders: Mapping[str, ConditionEncoder] | None = None):
        super().__init__(encoders)
        for kind in ("token_width", "gated_width"):
            widths = {name: getattr(encoder, kind) for name, encoder in self.items() if getattr(encoder, kind)}
            if len(set(widths.values())) > 1:
                raise ValueError(f"got encoders whose tokens have widths {widths}, wanted one width for all")

    @property
    def token_width(self) -> int:
        """D of the encoders' Tokens, 0 if none returns any."""
        return max((encoder.token_width for encoder in self.values()), default=0)

    @property
    def prompt_width(self) -> int:
        """D of the encoders' Tokens that describe regions, 0 if none does."""
        return max((encoder.token_width for encoder in self.values() if encoder.describes_regions), default=0)

    @property
    def gated_width(self) -> int:
        """D of the encoders' GatedTokens, 0 if none returns any."""
        return max((encoder.gated_width for encoder in self.values()), default=0)

    @property
    def map_channels(self) -> int:
        """Sum of the channels of all Maps."""
        return sum(encoder.map_channels for encoder in self.values())

    @property
    def decoder_channels(self) -> int:
        """Sum of the channels of all DecoderMaps."""
        return sum(encoder.decoder_channels for encoder in self.values())

    @property
    def makes_vectors(self) -> bool:
        """Whether any encoder returns a vector."""
        sizes = ("map_channels", "decoder_channels", "token_width", "gated_width", "hint_channels")
        return any(each.pools or not any(getattr(each, size) for size in sizes) for each in self.values())

    @property
    def stream_names(self) -> list[str]:
        """The names of the streams: those of the encoders, and of vectors that are made of their tokens."""
        return [*self, *(f"{name}{POOLED}" for name, encoder in self.items() if encoder.pools)]

    @property
    def region_encoders(self) -> dict[str, RegionEncoder]:
        """The encoders that read regions, by name."""
        return {name: encoder for name, encoder in self.items() if isinstance(encoder, RegionEncoder)}

    @property
    def hints(self) -> list[str]:
        """The names of the encoders of hints."""
        return [name for name, encoder in self.items() if encoder.hint_channels]

    @property
    def region_limits(self) -> dict[str, int]:
        """How many numbers fields of regions may have, by field."""
        return {field: limit for each in self.region_encoders.values() for field, limit in each.limits.items()}

    @property
    def drop_names(self) -> dict[str, str]:
        """The name of each encoder's drop: its own or, for all that read regions, REGIONS."""
        return {name: REGIONS if name in self.region_encoders else name for name in self}

    def forward(
        self, fields: Mapping[str, Any] | None, x: Tensor, drop: Mapping[str, Tensor] | None = None
    ) -> Condition:
        """Encodes raw fields, keyed by encoder name, for a batch x (B, C, H, W).

        Fields left out are null. `drop` maps names of drops to (B,) bools, True for examples that get the null. Raises
        ValueError for regions that cannot be, except in training, whose data have been checked where they were loaded.
        """
        fields, drop = {} if fields is None else fields, {} if drop is None else drop
        if not isinstance(fields, Mapping):
            got = type(fields).__name__
            raise ValueError(f"got a {got} as condition, wanted a Condition or raw fields such as {{'label': labels}}")
        names = self.drop_names
        for got, known in ((fields, names), (drop, dict.fromkeys(names.values()))):
            if unknown := sorted({*got} - {*known}):
                raise ValueError(f"got conditions {unknown}, this network takes: {', '.join(known) or 'none'}")
        regions, streams = self.regions(fields, drop.get(REGIONS)), {}
        for name, encoder in self.items():
            raw, dropped = fields.get(name), drop.get(names[name])
            if name in self.region_encoders:
                streams[name] = encoder(raw, x, dropped, None if raw is None else regions)
            else:
                streams[name] = encoder(raw, x, dropped)
            if encoder.pools:
                streams[f"{name}{POOLED}"] = encoder.pool(streams[name])
        return Condition(streams, regions)

    def regions(self, fields: Mapping[str, Any], drop: Tensor | None) -> Regions | None:
        """Returns the regions of raw fields, without those of dropped examples; None for the null."""
        raw = {field: value for name in self.region_encoders for field, value in (fields.get(name) or {}).items()}
        if not raw:
            return None
        if not (self.training or torch.compiler.is_compiling()):
            check_region_fields(raw, self.region_limits)
        regions = Regions.from_fields(raw)
        return regions if drop is None else regions.drop(drop)

    def resolve(
        self, condition: Condition | Mapping[str, Any] | None, x: Tensor, drop: Mapping[str, Tensor] | None = None
    ) -> Condition:
        """Returns the encoded condition: a `Condition` is checked, raw fields (None: all null) are encoded.

        ValueError if a `Condition` lacks a stream or its batch size differs from x.
        """
        if not isinstance(condition, Condition):
            return self(condition, x, drop)
        if drop is not None:
            raise ValueError("got drop and an encoded condition: pass drop to encode")
        missing = [name for name in self.stream_names if name not in condition.streams]
        if missing:
            raise ValueError(f"got a condition without {', '.join(missing)}: create it with encode, which adds nulls")
        if condition.batch_size not in (None, len(x)):
            raise ValueError(f"got a condition of {condition.batch_size} examples for {len(x)}: take condition[rows]")
        return condition
