"""The streams of a condition: vectors, sequences of tokens and maps of a batch.

Shapes: R regions, M condition tokens, E embedding width, N = H W cells of a grid.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.regions import Regions


class Vector(NamedTuple):
    """One vector per example, added to the embedding of the time."""

    values: Tensor  # (B, E)


class Tokens(NamedTuple):
    """A sequence per example, for cross-attention."""

    values: Tensor  # (B, M, D)
    mask: Tensor | None = None  # (B, M) bool, True for tokens, False for padding; None: all True
    membership: Tensor | None = None  # (B, M, R) bool, the regions that a token describes; None: none
    everywhere: Tensor | None = None  # (B, M) bool, tokens that describe the whole image; None: all without membership


class GatedTokens(Tokens):
    """Tokens that a gated cross-attention of their own reads, beside that of all others (Li et al. 2023, GLIGEN)."""

    __slots__ = ()


class Map(NamedTuple):
    """An image or feature map, concatenated to x along the channels (UNet) or added to the embeddings of codes."""

    values: Tensor  # (B, C, h, w)


class DecoderMap(Map):
    """A map of the size of x that scales and shifts the features of a UNet going up (Park et al. 2019, SPADE)."""

    __slots__ = ()


class Hint(NamedTuple):
    """An image for a control branch, which nothing else reads; a transformer's encoder of hints replaces its values."""

    values: Tensor  # (B, C, f h, f w) in [0, 1], for x of h x w; encoded, to be added to the embeddings: (B, D, h, w)
    strengths: Tensor  # (B, 1) or (B, n): factors of what the branch adds, of all or of each of its n outputs


class Context(NamedTuple):
    """Input of cross-attention from a grid: all tokens of a condition and their attention mask."""

    values: Tensor  # (B, M, D)
    mask: Tensor | None = None  # (B, M) or (B, N, M) bool, True where a cell attends to a token; None: all True

    def at_positions(self, positions: slice) -> "Context":
        """Returns the context of some of the N cells, in raster order."""
        per_cell = self.mask is not None and self.mask.ndim == 3
        return self._replace(mask=self.mask[:, positions]) if per_cell else self


class Cells(NamedTuple):
    """The cells of a grid that the rows of a layer's input are of, and the regions over it."""

    regions: Regions | None
    grid: tuple[int, int]
    positions: slice | None = None  # of the rows in each image, in raster order; None: all


Stream = Vector | Tokens | Map | Hint
NDIM = {Vector: 2, Tokens: 3, GatedTokens: 3, Map: 4, DecoderMap: 4, Hint: 4}  # of `values`


def check_tokens(name: str, tokens: Tokens, regions: Regions | None) -> None:
    """Raises ValueError for tokens of a stream whose mask and regions have other shapes."""
    size = tokens.values.shape[:2]
    if tokens.everywhere is not None and tokens.membership is None:
        raise ValueError(f"got stream {name} with everywhere and no membership: without it, all tokens are everywhere")
    wanted = {"mask": size, "everywhere": size}
    if tokens.membership is not None:
        count = tokens.membership.shape[-1] if regions is None else regions.present.shape[1]
        wanted["membership"] = (*size, count)
    for part, shape in wanted.items():
        got = getattr(tokens, part)
        if got is not None and got.shape != shape:
            raise ValueError(
                f"got stream {name} with tokens {tuple(tokens.values.shape)} and {part} {tuple(got.shape)}, "
                f"wanted {tuple(shape)}"
            )


def map_tensors(record: NamedTuple, fn: Callable[[Tensor], Tensor]) -> NamedTuple:
    """Applies `fn` to each tensor, of any shape, of a named tuple; None stays."""
    return type(record)(*(None if tensor is None else fn(tensor) for tensor in record))


def cat_tokens(streams: Sequence[Tokens], axis: int) -> Tokens:
    """Concatenates token sequences along the batch (0) or the sequence (1)."""
    if any(stream.mask is not None for stream in streams):
        streams = [s._replace(mask=_true(s)) if s.mask is None else s for s in streams]
    if counts := {s.membership.shape[-1] for s in streams if s.membership is not None}:
        streams = [_with_membership(stream, max(counts)) for stream in streams]
    parts = zip(*streams, strict=True)
    return type(streams[0])(*(None if part[0] is None else torch.cat(part, axis) for part in parts))


def _true(tokens: Tokens) -> Tensor:
    """Returns True for each token, (B, M)."""
    return tokens.values.new_ones(tokens.values.shape[:2], dtype=torch.bool)


def _with_membership(tokens: Tokens, count: int) -> Tokens:
    """Returns the tokens with membership in `count` regions, and with `everywhere`."""
    everywhere, membership = tokens.everywhere, tokens.membership
    if membership is None:
        membership = _true(tokens).unsqueeze(-1)[..., :0]
        everywhere = _true(tokens) if everywhere is None else everywhere
    everywhere = ~_true(tokens) if everywhere is None else everywhere
    return tokens._replace(membership=F.pad(membership, (0, count - membership.shape[-1])), everywhere=everywhere)


def cat_streams(streams: Sequence[Stream], count: int) -> Stream:
    """Concatenates streams of one type along the batch; `count` is the largest R."""
    cls = type(streams[0])
    if not issubclass(cls, Tokens):
        return cls(*map(torch.cat, zip(*streams, strict=True)))
    longest = max(stream.values.shape[1] for stream in streams)
    padded = [_pad_tokens(stream, longest) for stream in streams]
    if any(stream.membership is not None for stream in streams):
        padded = [_with_membership(stream, count) for stream in padded]
    return cat_tokens(padded, 0)


def _pad_tokens(tokens: Tokens, length: int) -> Tokens:
    """Pads token sequences to a length with masked tokens."""
    missing = length - tokens.values.shape[1]
    if missing == 0:
        return tokens
    mask = _true(tokens) if tokens.mask is None else tokens.mask
    membership = None if tokens.membership is None else F.pad(tokens.membership, (0, 0, 0, missing))
    everywhere = None if tokens.everywhere is None else F.pad(tokens.everywhere, (0, missing))
    padded = F.pad(tokens.values, (0, 0, 0, missing)), F.pad(mask, (0, missing)), membership, everywhere
    return type(tokens)(*padded)
