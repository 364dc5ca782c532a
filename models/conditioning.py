"""What a network is told beside x and t: named streams, and the regions that they speak of.

R counts regions, M condition tokens, E the embedding's width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
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
    """An image or a feature map, joined to x along the channels."""

    values: Tensor  # (B, C, h, w)


Stream = Vector | Tokens | Map
AXES = {Vector: 2, Tokens: 3, Map: 4}


class Regions(NamedTuple):
    """Parts of the image, which may overlap."""

    masks: Tensor  # (B, R, H, W) bool
    class_ids: Tensor  # (B, R) int64
    instance_ids: Tensor  # (B, R) int64


@dataclass(frozen=True, eq=False)
class Condition:
    """What the encoders of a network make of raw fields; blocks read it, processes and solvers never look inside."""

    streams: Mapping[str, Stream] = field(default_factory=dict)
    regions: Regions | None = None

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
        if len(set(sizes.values())) > 1:
            raise ValueError(f"got streams for batches of {sizes}, wanted one size")

    def of(self, kind: type[Stream]) -> list[Stream]:
        """The streams of a kind, in their order."""
        return [stream for stream in self.streams.values() if isinstance(stream, kind)]

    def vector(self) -> Tensor | None:
        """The sum of the vectors, (B, E)."""
        vectors = [stream.values for stream in self.of(Vector)]
        return sum(vectors[1:], vectors[0]) if vectors else None

    def map(self) -> Tensor | None:
        """The maps, joined along the channels: (B, C, h, w)."""
        maps = [stream.values for stream in self.of(Map)]
        return torch.cat(maps, 1) if maps else None

    def tokens(self) -> Tokens | None:
        """All tokens as one sequence."""
        streams = self.of(Tokens)
        if len(streams) < 2:
            return streams[0] if streams else None
        masks, regions = [], []
        for values, mask, region in streams:
            places, device = values.shape[:2], values.device
            masks.append(torch.ones(places, dtype=torch.bool, device=device) if mask is None else mask)
            regions.append(torch.full(places, -1, device=device) if region is None else region)
        values = torch.cat([stream.values for stream in streams], 1)
        return Tokens(values, torch.cat(masks, 1), torch.cat(regions, 1))


class ConditionEncoder(nn.Module, ABC):
    """Turns one raw field of a batch into one stream, and owns what stands for "not said", its learned null.

    A file `models/conditions/<name>.py` defines one, its frozen `Config`, and `build(config, width)`, where `width` is
    that of the network's embedding (E, for vectors).
    """

    map_channels: int = 0  # C of the map it makes
    token_width: int = 0  # D of the tokens it makes

    @abstractmethod
    def forward(self, raw: Any, x: Tensor, drop: Tensor | None = None) -> Stream:
        """The stream for a batch like x (B, C, H, W): of the raw field, or of the null where `drop` (B,) bool is True.

        `raw=None` is the null for everyone.
        """
