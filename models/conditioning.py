"""What a network is told beside x and t: named streams, the regions that they speak of, and the encoders of both.

R counts regions, M condition tokens, E the embedding's width, N the places of a grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Vector(NamedTuple):
    """One vector per example, added to the embedding of the time."""

    values: Tensor  # (B, E)


class Tokens(NamedTuple):
    """A sequence per example, for cross-attention."""

    values: Tensor  # (B, M, D)
    mask: Tensor | None = None  # (B, M) bool, True where there is a token; None: everywhere
    region: Tensor | None = None  # (B, M) int64, the region a token speaks of, -1 for the whole image; None: all -1


class Map(NamedTuple):
    """An image or a feature map: joined to x along the channels, or added to the embeddings of a grid."""

    values: Tensor  # (B, C, h, w)


class Context(NamedTuple):
    """What cross-attention at one size looks at: all tokens of a condition, and who may see which."""

    values: Tensor  # (B, M, D)
    mask: Tensor | None = None  # (B, M) or (B, N, M) bool, True where a place may see a token; None: everywhere

    def at_positions(self, places: slice) -> "Context":
        """That of some of the N places, in raster order."""
        per_place = self.mask is not None and self.mask.ndim == 3
        return self._replace(mask=self.mask[:, places]) if per_place else self


Stream = Vector | Tokens | Map
AXES = {Vector: 2, Tokens: 3, Map: 4}


class Regions(NamedTuple):
    """Parts of the image, which may overlap. Behind those of an example with fewer than R lie empty ones of id -1."""

    masks: Tensor  # (B, R, H, W) bool
    class_ids: Tensor  # (B, R) int64
    instance_ids: Tensor  # (B, R) int64

    def coverage(self, height: int, width: int) -> Tensor:
        """(B, R, height, width) bool: the cells of another grid of which a region covers any share."""
        flat = self.masks.flatten(0, 1).float()  # (B R, H, W): a batch may have no region at all
        return F.adaptive_max_pool2d(flat, (height, width)).bool().unflatten(0, self.masks.shape[:2])


@dataclass(frozen=True, eq=False)
class Condition:
    """What the encoders of a network make of raw fields; blocks read it, processes and solvers never look inside.

    `condition[rows]` are the examples at `rows`: a slice, or a tensor (n,) of their numbers or of bools.
    """

    streams: Mapping[str, Stream] = field(default_factory=dict)
    regions: Regions | None = None
    attention_masks: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)  # by size

    def __post_init__(self):
        for name, stream in self.streams.items():
            axes = AXES.get(type(stream))
            if axes is None or stream.values.ndim != axes:
                got = type(stream).__name__ if axes is None else f"{type(stream).__name__} {tuple(stream.values.shape)}"
                wanted = "Vector (B, E), Tokens (B, M, D) or Map (B, C, h, w)"
                raise ValueError(f"got stream {name}: {got}, wanted {wanted}")
            parts = (stream.mask, stream.region) if isinstance(stream, Tokens) else ()
            for part in parts:
                if part is not None and part.shape != stream.values.shape[:2]:
                    raise ValueError(
                        f"got stream {name} with tokens {tuple(stream.values.shape)} and a mask or regions "
                        f"{tuple(part.shape)}, wanted {tuple(stream.values.shape[:2])}"
                    )
        sizes = {name: len(stream.values) for name, stream in self.streams.items()}
        if self.regions is not None:
            sizes["regions"] = len(self.regions.masks)
        if len(set(sizes.values())) > 1:
            raise ValueError(f"got streams for batches of {sizes}, wanted one size")

    @property
    def batch_size(self) -> int | None:
        """B; None without streams and regions, where a condition fits any batch."""
        parts = [stream.values for stream in self.streams.values()]
        parts += [] if self.regions is None else [self.regions.masks]
        return len(parts[0]) if parts else None

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        return self.map_tensors(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "Condition":
        """The condition on a device."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        """The condition with every tensor changed alike."""
        streams = {name: _map_tensors(stream, change) for name, stream in self.streams.items()}
        return Condition(streams, None if self.regions is None else _map_tensors(self.regions, change))

    @classmethod
    def cat(cls, conditions: Sequence["Condition"]) -> "Condition":
        """The examples of all, one after the other; tokens and regions are padded to the most that one of them has.

        ValueError where they have different streams.
        """
        names = {tuple(sorted(condition.streams)) for condition in conditions}
        if len(names) != 1:
            raise ValueError(f"got conditions with the streams {sorted(names)}, wanted the same in all")
        streams = {name: _cat([condition.streams[name] for condition in conditions]) for name in conditions[0].streams}
        return cls(streams, _cat_regions(conditions))

    def row_ids(self) -> Tensor | None:
        """(B,) int64, equal for examples of equal conditions; None without streams, where all are."""
        parts = [*self.streams.values(), *([] if self.regions is None else [self.regions])]
        tensors = [tensor.flatten(1) for part in parts for tensor in part if tensor is not None]
        if not tensors:
            return None
        rows = torch.cat([tensor.cpu().double() for tensor in tensors], 1)
        return rows.unique(dim=0, return_inverse=True)[1].to(tensors[0].device)

    def streams_of(self, kind: type[Stream]) -> list[Stream]:
        """The streams of a kind, in their order."""
        return [stream for stream in self.streams.values() if isinstance(stream, kind)]

    def vector(self) -> Tensor | None:
        """The sum of the vectors, (B, E)."""
        vectors = [stream.values for stream in self.streams_of(Vector)]
        return sum(vectors[1:], vectors[0]) if vectors else None

    def map(self) -> Tensor | None:
        """The maps, joined along the channels: (B, C, h, w)."""
        maps = [stream.values for stream in self.streams_of(Map)]
        return torch.cat(maps, 1) if maps else None

    def tokens(self) -> Tokens | None:
        """All tokens as one sequence; a mask or regions where one of the streams has them."""
        streams = self.streams_of(Tokens)
        if len(streams) < 2:
            return streams[0] if streams else None
        return _join(streams, 1)

    def context(self, height: int, width: int) -> Context | None:
        """The tokens and their mask for cross-attention from a grid, None without tokens.

        Places differ in what they may see where tokens speak of regions, see `attention_mask`.
        """
        tokens = self.tokens()
        if tokens is None:
            return None
        mask = self.attention_mask(height, width)
        return Context(tokens.values, tokens.mask if mask is None else mask)

    def spans(self) -> dict[str, slice]:
        """Where the tokens of each stream lie in `tokens`."""
        spans, stop = {}, 0
        for name, stream in self.streams.items():
            if isinstance(stream, Tokens):
                start, stop = stop, stop + stream.values.shape[1]
                spans[name] = slice(start, stop)
        return spans

    def attention_mask(self, height: int, width: int) -> Tensor | None:
        """Which of the M tokens each place of a grid may see: (B, height * width, M) bool, computed once for a size.

        A token that speaks of a region is seen by the cells of which the region covers any share, one that speaks of
        the whole image (-1) by all, a masked one by none. None where no token speaks of a region. A place may see
        nothing at all: attention must give it zeros.
        """
        tokens = self.tokens()
        if tokens is None or tokens.region is None:
            return None
        if (height, width) not in self.attention_masks:
            if self.regions is None:
                raise ValueError("got tokens that speak of regions, and no regions: pass Condition(..., regions=)")
            covered = self.regions.coverage(height, width).flatten(2)  # (B, R, N)
            covered = torch.cat(
                [covered.new_ones(len(covered), 1, height * width), covered], 1
            )  # the whole image first
            index = (tokens.region + 1).unsqueeze(-1).expand(-1, -1, height * width)  # (B, M, N)
            seen = covered.gather(1, index).mT
            mask = seen if tokens.mask is None else seen & tokens.mask.unsqueeze(1)
            self.attention_masks[height, width] = mask
        return self.attention_masks[height, width]


def _map_tensors(record: NamedTuple, change: Callable[[Tensor], Tensor]) -> NamedTuple:
    return type(record)(*(None if tensor is None else change(tensor) for tensor in record))


def _join(streams: Sequence[Tokens], axis: int) -> Tokens:
    """Token sequences along the batch (0) or one behind the other (1)."""
    masks, regions = [stream.mask for stream in streams], [stream.region for stream in streams]
    if any(mask is not None for mask in masks):
        masks = [s.values.new_ones(s.values.shape[:2], dtype=torch.bool) if s.mask is None else s.mask for s in streams]
    if any(region is not None for region in regions):
        everywhere = [torch.full(s.values.shape[:2], -1, device=s.values.device) for s in streams]
        regions = [e if s.region is None else s.region for e, s in zip(everywhere, streams, strict=True)]
    joined = (None if parts[0] is None else torch.cat(parts, axis) for parts in (masks, regions))
    return Tokens(torch.cat([stream.values for stream in streams], axis), *joined)


def _cat(streams: Sequence[Stream]) -> Stream:
    """Streams of one kind along the batch."""
    kind = type(streams[0])
    if kind is not Tokens:
        return kind(torch.cat([stream.values for stream in streams]))
    longest = max(stream.values.shape[1] for stream in streams)
    return _join([_pad_tokens(stream, longest) for stream in streams], 0)


def _pad_tokens(tokens: Tokens, length: int) -> Tokens:
    """Tokens with masked ones behind them, up to a length."""
    missing = length - tokens.values.shape[1]
    if missing == 0:
        return tokens
    mask = tokens.values.new_ones(tokens.values.shape[:2], dtype=torch.bool) if tokens.mask is None else tokens.mask
    region = None if tokens.region is None else F.pad(tokens.region, (0, missing), value=-1)
    return Tokens(F.pad(tokens.values, (0, 0, 0, missing)), F.pad(mask, (0, missing)), region)


def _cat_regions(conditions: Sequence[Condition]) -> Regions | None:
    """The regions of all along the batch; a condition without any has empty ones."""
    there = [condition.regions for condition in conditions if condition.regions is not None]
    if not there:
        return None
    most, parts = max(regions.masks.shape[1] for regions in there), []
    for condition in conditions:
        regions = condition.regions
        if regions is None:
            count = len(next(iter(condition.streams.values())).values)
            regions = _map_tensors(there[0], lambda tensor, n=count: tensor.new_zeros(n, 0, *tensor.shape[2:]))
        missing = most - regions.masks.shape[1]
        ids = (F.pad(each, (0, missing), value=-1) for each in regions[1:])
        parts.append(Regions(F.pad(regions.masks, (0, 0, 0, 0, 0, missing)), *ids))
    return Regions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """Options of conditions."""  # every Config's own __post_init__ calls that of the class it builds on

    def __post_init__(self):
        pass


class ConditionEncoder(nn.Module, ABC):
    """Turns one raw field of a batch into one stream, and owns its learned null.

    A file `models/conditions/<name>.py` defines one; its `Config`, a `ConditionConfig` whose fields are flags, named
    `<name>_...`; the `FIELDS` of a batch that it reads; and `build(config, width, n_classes)`, for a network whose
    embedding has a width (E, of vectors), and data of so many classes, or 0. Its raw condition is the field, or where
    there are several, or ragged ones, a dict of them and of their masks. It makes a Map where it has `map_channels`,
    Tokens where it has a `token_width`, and a Vector where it has neither.
    """

    map_channels: int = 0  # C of the map it makes
    token_width: int = 0  # D of the tokens it makes
    pretrained: bool = False  # its weights come from elsewhere: a network that it joins leaves them as they are

    @abstractmethod
    def forward(self, raw: Any, x: Tensor, drop: Tensor | None = None) -> Stream:
        """The stream for a batch like x (B, C, H, W): of the raw field, or of the null where `drop` (B,) bool is True.

        `raw=None` is the null for everyone.
        """

    def regions(self, raw: Any, x: Tensor) -> Regions | None:
        """The regions that its tokens speak of, of a batch like x; None without any. `raw=None` is the null."""
        return None


class Conditioner(nn.ModuleDict):
    """The encoders of a network by name, and what they make of raw fields: the Condition for a batch."""

    def __init__(self, encoders: Mapping[str, ConditionEncoder] | None = None):
        super().__init__(encoders)
        if len(set(self._token_widths().values())) > 1:
            raise ValueError(f"got encoders whose tokens have widths {self._token_widths()}, wanted one width for all")

    def _token_widths(self) -> dict[str, int]:
        return {name: encoder.token_width for name, encoder in self.items() if encoder.token_width}

    @property
    def token_width(self) -> int:
        """D of the tokens that the encoders make, 0 if they make none."""
        return next(iter(self._token_widths().values()), 0)

    @property
    def map_channels(self) -> int:
        """C of all maps together."""
        return sum(encoder.map_channels for encoder in self.values())

    @property
    def makes_vectors(self) -> bool:
        """Whether one of the encoders makes a vector."""
        return any(not (encoder.map_channels or encoder.token_width) for encoder in self.values())

    def forward(
        self, fields: Mapping[str, Any] | None, x: Tensor, drop: Mapping[str, Tensor] | None = None
    ) -> Condition:
        """Raw fields by the names of their encoders -> the condition for a batch like x (B, C, H, W).

        What is left out is null. `drop` holds (B,) bools by name: the examples that get the null of that stream.
        """
        fields, drop = {} if fields is None else fields, {} if drop is None else drop
        if not isinstance(fields, Mapping):
            got = type(fields).__name__
            raise ValueError(f"got a {got} as condition, wanted a Condition or raw fields such as {{'label': labels}}")
        unknown = sorted({*fields, *drop} - {*self})
        if unknown:
            raise ValueError(f"got conditions {unknown}, this network takes: {', '.join(self) or 'none'}")
        streams = {name: encoder(fields.get(name), x, drop.get(name)) for name, encoder in self.items()}
        found = {name: encoder.regions(fields.get(name), x) for name, encoder in self.items()}
        found = {name: regions for name, regions in found.items() if regions is not None}
        if len(found) > 1:
            raise ValueError(f"got regions from {', '.join(found)}, wanted one condition of regions in a network")
        return Condition(streams, next(iter(found.values()), None))

    def resolve(
        self, condition: Condition | Mapping[str, Any] | None, x: Tensor, drop: Mapping[str, Tensor] | None = None
    ) -> Condition:
        """What a network was given as its condition, encoded: raw fields (None: all null) are encoded now.

        ValueError where an encoded one lacks a stream or is of another batch than x.
        """
        if not isinstance(condition, Condition):
            return self(condition, x, drop)
        if drop is not None:
            raise ValueError("got drop and an encoded condition: pass drop to encode")
        missing = [name for name in self if name not in condition.streams]
        if missing:
            raise ValueError(f"got a condition without {', '.join(missing)}: make it by encode, nulls included")
        if condition.batch_size not in (None, len(x)):
            raise ValueError(f"got a condition of {condition.batch_size} examples for {len(x)}: take condition[rows]")
        return condition
