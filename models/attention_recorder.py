"""Records the attention maps of a network while a sampler calls it: a running mean over the steps for each image.

`record_maps` keeps every map of every call. A `MapRecorder` adds them up as they come, so that its memory does not grow
with the steps. A guided denoiser evaluates an image under several conditions in one call, and codes that are equal in
several images once, so the recorder is given the rows of each call: which image they are of, and which condition of the
chain they are under.

Shapes: B images, C conditions of a guidance chain, N places of a layer's grid (h, w), M keys.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from models.attention import Attention, CrossAttention, GatedCrossAttention, record_maps
from models.conditioning import Condition
from models.streams import GatedTokens, Tokens

Reads = Literal["tokens", "gated", "self"]
Box = tuple[float, float, float, float]
STREAMS: dict[str, type[Tokens]] = {"tokens": Tokens, "gated": GatedTokens}
OTHER_NETWORKS = ("encoders.", "control.")  # prefixes of layers that are not the denoiser's own


class AttentionMaps(NamedTuple):
    """Attention maps of B images."""

    layers: dict[str, Tensor]  # (B, heads, h, w, M) float32, by the name of the layer, in the order of the network
    spans: dict[str, slice]  # which of the M keys are tokens of each condition; {} for self-attention
    size: tuple[int, int]  # height and width of the network's input
    counts: Tensor  # (B,) int64: the calls that they are of


class RecordedStep(NamedTuple):
    """The maps of one call of the network."""

    images: Tensor  # (k,) int64: which of the B images it evaluated
    times: Tensor  # (k,)
    layers: dict[str, Tensor]  # (k, heads, h, w, M), as in `AttentionMaps`


@dataclass(frozen=True, eq=False)
class RowsOfChain:
    """An encoded condition whose rows are numbered through a guidance chain: row c B + b is image b, condition c."""

    condition: Condition
    rows: Tensor  # (n,) int64

    def __getitem__(self, rows: Tensor) -> Self:
        return RowsOfChain(self.condition[rows], self.rows[rows])

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Concatenates conditions along the batch."""
        return cls(Condition.cat([part.condition for part in parts]), torch.cat([part.rows for part in parts]))


class MapRecorder:
    """Adds up the attention maps of a sampler's network calls; pass it to `draw`, `sample` or `make_denoiser`.

    reads: "tokens", the cross-attention to tokens of conditions; "gated", that to gated tokens; "self", the attention
    of places to each other.
    part: which condition of the guidance chain, from the null, 0; -1 is the last, which has all conditions.
    layers: names of layers (see `find_layers`); default: all of them.
    per_head: False keeps the mean over the heads, as one.
    per_step: also keep the maps of every call, in `steps`; memory then grows with them.
    box: left, top, right and bottom as fractions of the image, for self-attention: keeps only how much the places that
    the box touches attend to each place of the grid, on average, as (B, heads, h, w, 1).
    """

    def __init__(
        self,
        reads: Reads = "tokens",
        *,
        part: int = -1,
        layers: Sequence[str] | None = None,
        per_head: bool = True,
        per_step: bool = False,
        box: Box | None = None,
    ):
        if reads not in get_args(Reads):
            raise ValueError(f"got reads {reads!r}, wanted one of {', '.join(get_args(Reads))}")
        if box is not None and (reads != "self" or not is_box(box)):
            wanted = "wanted left < right and top < bottom in [0, 1], for reads='self'"
            raise ValueError(f"got the box {' '.join(map(str, box))} of attention to {reads}, {wanted}")
        self.reads, self.part, self.names, self.box = reads, part, layers, box
        self.per_head, self.per_step = per_head, per_step
        self.network: nn.Module | None = None
        self.steps: list[RecordedStep] = []

    def start(self, network: nn.Module, condition: Condition, images: int, parts: int, size: tuple[int, int]) -> None:
        """Forgets what was recorded, and prepares for calls of a network with inputs of a `size`, height and width.

        `condition` is the recorded one of a chain of `parts` conditions, or all of them, for a number of `images`.
        ValueError for a part that the chain does not have, layers that the network does not have, and a network without
        such layers.
        """
        if not -parts <= self.part < parts:
            raise ValueError(f"got part {self.part} of a chain of {parts} conditions, wanted {-parts} to {parts - 1}")
        known = find_layers(network, self.reads)
        if unknown := sorted({*(self.names or ())} - {*known}):
            raise ValueError(f"got layers {', '.join(unknown)}, wanted some of {', '.join(known)}")
        self.network, self.images, self.size = network, images, size
        self.chosen_part, self.layers = self.part % parts, [name for name in known if name in (self.names or known)]
        self.spans = {} if self.reads == "self" else condition.spans(STREAMS[self.reads])
        self.counts, self.sums, self.steps = torch.zeros(images, dtype=torch.int64), {}, []

    def observe(
        self, network: nn.Module, denoise: Callable[..., Any], conditions: Sequence[Condition], x: Tensor
    ) -> tuple[Callable[..., Any], list[RowsOfChain]]:
        """Returns a denoiser (x, t, condition) and the conditions of its chain, for `guided`, that are recorded.

        `denoise` is that of the network without guidance, x (B, ..., H, W) a batch.
        """
        count, size = len(x), tuple(x.shape[-2:])
        self.start(network, conditions[self.part % len(conditions)], count, len(conditions), size)
        rows = torch.arange(len(conditions) * count, device=x.device).split(count)
        parts = [RowsOfChain(condition, own) for condition, own in zip(conditions, rows, strict=True)]

        def recorded(x: Tensor, t: Tensor, condition: RowsOfChain) -> Any:
            with self.record_call(condition.rows, t, condition.condition):
                return denoise(x, t, condition.condition)

        return recorded, parts

    @contextmanager
    def record_call(
        self, rows: Tensor, t: Tensor, condition: Condition, source: Tensor | None = None
    ) -> Iterator[None]:
        """Records the one call of the network that is made within.

        rows: (n,) int64, numbered through the chain; t: (n,) their times; `condition`: that of the call.
        source: (n,) int64, the row of the network's batch that each is evaluated in; default: in order.
        """
        chosen = rows // self.images == self.chosen_part
        if not chosen.any():
            yield
            return
        with record_maps(self.network, self.layers) as maps:
            yield
        images = rows[chosen] % self.images
        source = chosen.nonzero()[:, 0] if source is None else source[chosen]
        keys, step = self.own_keys(condition), {}
        for name in self.layers:
            (weights,) = maps[name]
            step[name] = self.reduce(weights.detach()[source], keys)
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(step[name][:1]).repeat(self.images, 1, 1, 1, 1)
            self.sums[name].index_add_(0, images, step[name])
        self.counts[images.cpu()] += 1
        if self.per_step:
            times = t.expand(len(rows))[chosen.to(t.device)]
            self.steps.append(RecordedStep(images.cpu(), times.cpu(), step))

    def own_keys(self, condition: Condition) -> Tensor | None:
        """Returns which keys of a call are the tokens of the recorded condition, (M,) int64: where conditions of a
        chain differ in length, the shorter streams are padded. None for self-attention."""
        if self.reads == "self":
            return None
        starts = {name: span.start for name, span in condition.spans(STREAMS[self.reads]).items()}
        keys = [torch.arange(span.stop - span.start) + starts[name] for name, span in self.spans.items()]
        return torch.cat(keys)

    def reduce(self, weights: Tensor, keys: Tensor | None) -> Tensor:
        """Returns what is kept of maps (k, heads, N, M): (k, heads, h, w, M)."""
        grid = grid_of(weights.shape[2], self.size)
        if not self.per_head:
            weights = weights.mean(1, keepdim=True)
        if keys is not None:
            return weights[..., keys.to(weights.device)].unflatten(2, grid)
        if self.box is None:
            return weights.unflatten(2, grid)
        left, top, right, bottom = self.box
        places = touched(top, bottom, grid[0])[:, None] & touched(left, right, grid[1])
        mean = weights[:, :, places.flatten().to(weights.device)].mean(2)  # (k, heads, N)
        return mean.unflatten(2, grid).unsqueeze(-1)

    def maps(self, mean: bool = True) -> AttentionMaps:
        """Returns the mean of each image's maps over its calls or, without `mean`, their sum, as daam has it.

        An image that no call evaluated, since its codes were known, has zeros. ValueError if that is so of all images:
        guidance may leave a condition out.
        """
        if self.network is None or not self.counts.any():
            why = "nothing was sampled" if self.network is None else f"no call evaluated part {self.part} of the chain"
            raise ValueError(f"got no attention maps, {why}: pass the recorder to draw, and another part or guidance")
        layers = dict(self.sums)
        if mean:
            counts = self.counts.clamp(min=1).view(-1, 1, 1, 1, 1)
            layers = {name: total / counts.to(total.device) for name, total in layers.items()}
        return AttentionMaps(layers, self.spans, self.size, self.counts.clone())


def is_box(box: Box) -> bool:
    """Whether a box is in the image and has an extent."""
    left, top, right, bottom = box
    return 0 <= left < right <= 1 and 0 <= top < bottom <= 1


def touched(start: float, end: float, cells: int) -> Tensor:
    """Returns which of the cells that divide [0, 1] an interval touches, (cells,) bool."""
    first = torch.arange(cells)
    return (first < end * cells) & (first + 1 > start * cells)


def grid_of(places: int, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the grid (h, w) of a number of places, which is a `size` (H, W) divided by a whole number."""
    factor = max(1, round((size[0] * size[1] / places) ** 0.5))
    grid = size[0] // factor, size[1] // factor
    if grid[0] * grid[1] != places:
        raise ValueError(f"got {places} places of an input of {size[0]}x{size[1]}, wanted its size by a whole number")
    return grid


def find_layers(network: nn.Module, reads: Reads = "tokens") -> list[str]:
    """Returns the names of a network's attention layers of a kind, without those of its encoders and control branches.

    ValueError if there are none: classes and numbers that are vectors are added to the embedding of the time, or scale
    and shift features, and nothing attends to them.
    """
    gated = {module.cross for module in network.modules() if isinstance(module, GatedCrossAttention)}
    kinds: Mapping[str, str] = {
        name: "gated" if module in gated else "tokens" if isinstance(module, CrossAttention) else "self"
        for name, module in network.named_modules()
        if isinstance(module, Attention) and not name.startswith(OTHER_NETWORKS)
    }
    names = [name for name, kind in kinds.items() if kind == reads]
    if not names:
        there = ", ".join(network.encoders) or "none"
        why = "whose values are vectors or maps: they are added or joined to features, and nothing attends to them"
        reason = "which has no self-attention" if reads == "self" else f"of the conditions {there}, {why}"
        wanted = "wanted attn_factors" if reads == "self" else "wanted a condition of tokens, such as text or objects"
        raise ValueError(f"got a network {reason}; {wanted}")
    return names
