"""Conditions of a network: named streams of vectors, tokens and maps, regions of the image, and their encoders.

Shapes: R regions, M condition tokens, E embedding width, N = H W cells of a grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ranges import check_ranges


class Vector(NamedTuple):
    """One vector per example, added to the embedding of the time."""

    values: Tensor  # (B, E)


class Tokens(NamedTuple):
    """A sequence per example, for cross-attention."""

    values: Tensor  # (B, M, D)
    mask: Tensor | None = None  # (B, M) bool, True for tokens, False for padding; None: all True
    region: Tensor | None = None  # (B, M) int64, index in [0, R) of a token's region, -1: the whole image; None: all -1


class Map(NamedTuple):
    """An image or feature map, concatenated to x along the channels (UNet) or added to the embeddings of codes."""

    values: Tensor  # (B, C, h, w)


class Context(NamedTuple):
    """Input of cross-attention from a grid: all tokens of a condition and their attention mask."""

    values: Tensor  # (B, M, D)
    mask: Tensor | None = None  # (B, M) or (B, N, M) bool, True where a cell attends to a token; None: all True

    def at_positions(self, positions: slice) -> "Context":
        """Returns the context of some of the N cells, in raster order."""
        per_cell = self.mask is not None and self.mask.ndim == 3
        return self._replace(mask=self.mask[:, positions]) if per_cell else self


Stream = Vector | Tokens | Map
NDIM = {Vector: 2, Tokens: 3, Map: 4}  # of `values`


class Regions(NamedTuple):
    """Regions of the image, which may overlap.

    Examples with fewer than R are padded with regions that have an empty mask and both ids -1; no token refers to them.
    """

    masks: Tensor  # (B, R, H, W) bool
    class_ids: Tensor  # (B, R) int64
    instance_ids: Tensor  # (B, R) int64

    def coverage(self, height: int, width: int) -> Tensor:
        """Returns the cells of a grid that each region covers, at least in part: (B, R, height, width) bool."""
        flat = self.masks.flatten(0, 1).float()  # (B R, H, W); R may be 0
        return F.adaptive_max_pool2d(flat, (height, width)).bool().unflatten(0, self.masks.shape[:2])


@dataclass(frozen=True, eq=False)
class Condition:
    """The encoded condition of a batch: named streams and regions. Blocks read it; processes and solvers pass it on.

    `condition[rows]` selects examples by a slice, or a tensor of indices or bools.
    """

    streams: Mapping[str, Stream] = field(default_factory=dict)
    regions: Regions | None = None
    # attention masks by (height, width)
    attention_mask_cache: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        for name, stream in self.streams.items():
            ndim = NDIM.get(type(stream))
            if ndim is None or stream.values.ndim != ndim:
                got = type(stream).__name__ if ndim is None else f"{type(stream).__name__} {tuple(stream.values.shape)}"
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
        """B, or None for a condition without streams and regions, which fits any batch."""
        parts = [stream.values for stream in self.streams.values()]
        parts += [] if self.regions is None else [self.regions.masks]
        return len(parts[0]) if parts else None

    def __getitem__(self, rows: slice | Tensor) -> "Condition":
        """Returns the condition of some examples."""
        return self.map_tensors(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "Condition":
        """Returns the condition on a device."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "Condition":
        """Returns the condition with `fn` applied to every tensor."""
        streams = {name: _map_tensors(stream, fn) for name, stream in self.streams.items()}
        return Condition(streams, None if self.regions is None else _map_tensors(self.regions, fn))

    @classmethod
    def cat(cls, conditions: Sequence["Condition"]) -> "Condition":
        """Concatenates conditions along the batch; tokens and regions are padded to the largest number.

        ValueError if their streams differ.
        """
        names = {tuple(sorted(condition.streams)) for condition in conditions}
        if len(names) != 1:
            raise ValueError(f"got conditions with the streams {sorted(names)}, wanted the same in all")
        first = conditions[0].streams
        streams = {name: _cat_streams([condition.streams[name] for condition in conditions]) for name in first}
        return cls(streams, _cat_regions(conditions))

    def row_ids(self) -> Tensor | None:
        """Returns (B,) int64, equal for examples with equal conditions; None without streams and regions."""
        parts = [*self.streams.values(), *([] if self.regions is None else [self.regions])]
        tensors = [tensor.flatten(1) for part in parts for tensor in part if tensor is not None]
        if not tensors:
            return None
        rows = torch.cat([tensor.cpu().double() for tensor in tensors], 1)
        return rows.unique(dim=0, return_inverse=True)[1].to(tensors[0].device)

    def streams_of(self, kind: type[Stream]) -> list[Stream]:
        """Returns all streams of a type, in order."""
        return [stream for stream in self.streams.values() if isinstance(stream, kind)]

    def vector(self) -> Tensor | None:
        """Returns the sum of the vectors, (B, E); None without any."""
        vectors = [stream.values for stream in self.streams_of(Vector)]
        return sum(vectors[1:], vectors[0]) if vectors else None

    def map(self) -> Tensor | None:
        """Returns the maps concatenated along the channels, (B, C, h, w); None without any."""
        maps = [stream.values for stream in self.streams_of(Map)]
        return torch.cat(maps, 1) if maps else None

    def tokens(self) -> Tokens | None:
        """Returns all tokens as one sequence, with a mask and regions if any stream has them; None without any."""
        streams = self.streams_of(Tokens)
        if len(streams) < 2:
            return streams[0] if streams else None
        return _cat_tokens(streams, 1)

    def context(self, height: int, width: int) -> Context | None:
        """Returns the tokens and their mask for cross-attention from a grid, None without tokens.

        The mask differs between cells if tokens describe regions; see `attention_mask`.
        """
        tokens = self.tokens()
        if tokens is None:
            return None
        mask = self.attention_mask(height, width)
        return Context(tokens.values, tokens.mask if mask is None else mask)

    def spans(self) -> dict[str, slice]:
        """Returns the slice of each stream's tokens in `tokens()`."""
        spans, stop = {}, 0
        for name, stream in self.streams.items():
            if isinstance(stream, Tokens):
                start, stop = stop, stop + stream.values.shape[1]
                spans[name] = slice(start, stop)
        return spans

    def attention_mask(self, height: int, width: int) -> Tensor | None:
        """Returns which tokens each cell of a grid attends to, (B, height * width, M) bool; cached per size.

        Cells attend to a token of a region if the region covers them at least in part, to tokens of the whole image
        (-1) always, to padding never. None if no token describes a region. A cell may have no token to attend to:
        attention must return zeros there.
        """
        tokens = self.tokens()
        if tokens is None or tokens.region is None:
            return None
        if (height, width) not in self.attention_mask_cache:
            if self.regions is None:
                raise ValueError("got tokens of regions, and no regions: pass Condition(..., regions=)")
            covered = self.regions.coverage(height, width).flatten(2)  # (B, R, N)
            whole_image = covered.new_ones(len(covered), 1, height * width)
            covered = torch.cat([whole_image, covered], 1)  # (B, 1 + R, N)
            index = (tokens.region + 1).unsqueeze(-1).expand(-1, -1, height * width)  # (B, M, N)
            mask = covered.gather(1, index).mT  # (B, N, M)
            mask = mask if tokens.mask is None else mask & tokens.mask.unsqueeze(1)
            self.attention_mask_cache[height, width] = mask
        return self.attention_mask_cache[height, width]


def _map_tensors(record: NamedTuple, fn: Callable[[Tensor], Tensor]) -> NamedTuple:
    """Applies `fn` to each tensor of a named tuple; None stays."""
    return type(record)(*(None if tensor is None else fn(tensor) for tensor in record))


def _cat_tokens(streams: Sequence[Tokens], axis: int) -> Tokens:
    """Concatenates token sequences along the batch (0) or the sequence (1)."""
    masks, regions = [stream.mask for stream in streams], [stream.region for stream in streams]
    if any(mask is not None for mask in masks):
        masks = [s.values.new_ones(s.values.shape[:2], dtype=torch.bool) if s.mask is None else s.mask for s in streams]
    if any(region is not None for region in regions):
        whole_image = [torch.full(s.values.shape[:2], -1, device=s.values.device) for s in streams]
        regions = [w if s.region is None else s.region for w, s in zip(whole_image, streams, strict=True)]
    mask, region = (None if parts[0] is None else torch.cat(parts, axis) for parts in (masks, regions))
    return Tokens(torch.cat([stream.values for stream in streams], axis), mask, region)


def _cat_streams(streams: Sequence[Stream]) -> Stream:
    """Concatenates streams of one type along the batch."""
    cls = type(streams[0])
    if cls is not Tokens:
        return cls(torch.cat([stream.values for stream in streams]))
    longest = max(stream.values.shape[1] for stream in streams)
    return _cat_tokens([_pad_tokens(stream, longest) for stream in streams], 0)


def _pad_tokens(tokens: Tokens, length: int) -> Tokens:
    """Pads token sequences to a length with masked tokens."""
    missing = length - tokens.values.shape[1]
    if missing == 0:
        return tokens
    mask = tokens.values.new_ones(tokens.values.shape[:2], dtype=torch.bool) if tokens.mask is None else tokens.mask
    region = None if tokens.region is None else F.pad(tokens.region, (0, missing), value=-1)
    return Tokens(F.pad(tokens.values, (0, 0, 0, missing)), F.pad(mask, (0, missing)), region)


def _cat_regions(conditions: Sequence[Condition]) -> Regions | None:
    """Concatenates regions along the batch, padded to the largest R; None if no condition has regions."""
    present = [condition.regions for condition in conditions if condition.regions is not None]
    if not present:
        return None
    largest, parts = max(regions.masks.shape[1] for regions in present), []
    for condition in conditions:
        regions = condition.regions
        if regions is None:
            count = len(next(iter(condition.streams.values())).values)
            regions = _map_tensors(present[0], lambda tensor, n=count: tensor.new_zeros(n, 0, *tensor.shape[2:]))
        missing = largest - regions.masks.shape[1]
        ids = (F.pad(tensor, (0, missing), value=-1) for tensor in regions[1:])
        parts.append(Regions(F.pad(regions.masks, (0, 0, 0, 0, 0, missing)), *ids))
    return Regions(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """Options of conditions."""  # a subclass declares its RANGES; its __post_init__ calls super().__post_init__()

    def __post_init__(self):
        check_ranges(self)


class ConditionEncoder(nn.Module, ABC):
    """Encodes one raw condition of a batch as one stream, with a learned null.

    A file `models/conditions/<name>.py` defines:
    - the encoder. With `map_channels` it returns a Map, with a `token_width` Tokens, with neither a Vector;
    - `Config`, a `ConditionConfig` whose fields become flags; they begin with the condition's name, to avoid clashes;
    - `FIELDS`, the batch fields that the encoder reads;
    - `build(config, width, n_classes)`, with the width E of vectors and the number of classes in the data (0: none).

    The raw condition is the field itself or, for several or ragged fields, a dict of them and their padding masks.
    """

    map_channels: int = 0  # C of its map
    token_width: int = 0  # D of its tokens
    pretrained: bool = False  # True: a network that contains it does not reinitialise its weights

    @abstractmethod
    def forward(self, raw: Any, x: Tensor, drop: Tensor | None = None) -> Stream:
        """Encodes the raw condition of a batch x (B, C, H, W); examples where `drop` (B,) bool is True get the null.

        `raw=None` is the null for all examples.
        """

    def regions(self, raw: Any, x: Tensor) -> Regions | None:
        """Returns the regions that its tokens describe, for a batch x; None without any. `raw=None` is the null."""
        return None


class Conditioner(nn.ModuleDict):
    """The condition encoders of a network, by name; encodes raw fields to a `Condition`."""

    def __init__(self, encoders: Mapping[str, ConditionEncoder] | None = None):
        super().__init__(encoders)
        if len(set(self._token_widths().values())) > 1:
            raise ValueError(f"got encoders whose tokens have widths {self._token_widths()}, wanted one width for all")

    def _token_widths(self) -> dict[str, int]:
        """Returns D of each encoder that returns tokens, by name."""
        return {name: encoder.token_width for name, encoder in self.items() if encoder.token_width}

    @property
    def token_width(self) -> int:
        """D of the encoders' tokens, 0 if none returns tokens."""
        return next(iter(self._token_widths().values()), 0)

    @property
    def map_channels(self) -> int:
        """Sum of the channels of all maps."""
        return sum(encoder.map_channels for encoder in self.values())

    @property
    def makes_vectors(self) -> bool:
        """Whether any encoder returns a vector."""
        return any(not (encoder.map_channels or encoder.token_width) for encoder in self.values())

    def forward(
        self, fields: Mapping[str, Any] | None, x: Tensor, drop: Mapping[str, Tensor] | None = None
    ) -> Condition:
        """Encodes raw fields, keyed by encoder name, for a batch x (B, C, H, W).

        Fields left out are null. `drop` maps encoder names to (B,) bools, True for examples that get the null.
        """
        fields, drop = {} if fields is None else fields, {} if drop is None else drop
        if not isinstance(fields, Mapping):
            got = type(fields).__name__
            raise ValueError(f"got a {got} as condition, wanted a Condition or raw fields such as {{'label': labels}}")
        unknown = sorted({*fields, *drop} - {*self})
        if unknown:
            raise ValueError(f"got conditions {unknown}, this network takes: {', '.join(self) or 'none'}")
        streams = {name: encoder(fields.get(name), x, drop.get(name)) for name, encoder in self.items()}
        regions = {name: encoder.regions(fields.get(name), x) for name, encoder in self.items()}
        regions = {name: value for name, value in regions.items() if value is not None}
        if len(regions) > 1:
            raise ValueError(f"got regions from {', '.join(regions)}, wanted one condition with regions in a network")
        return Condition(streams, next(iter(regions.values()), None))

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
        missing = [name for name in self if name not in condition.streams]
        if missing:
            raise ValueError(f"got a condition without {', '.join(missing)}: create it with encode, which adds nulls")
        if condition.batch_size not in (None, len(x)):
            raise ValueError(f"got a condition of {condition.batch_size} examples for {len(x)}: take condition[rows]")
        return condition
