"""Attention within the regions of an image, each with the prompt of its object (Cheng et al. 2023, LayoutDiffuse).

Shapes: R regions, N = h w cells of a grid, D width of prompts, C channels, L cells of a group's regions.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention
from models.conditioning import Condition
from models.regions import Regions

REGION_ATTENTION = ("v2", "v1", "no_partial", "segmentation")
OVERLAPS = ("mean", "mean_prompt", "front")
LENGTHS = 6  # groups of regions, at most: those of up to N, N / 2, ... N / 32 cells are padded to that many
EIGHTHS = 8  # cells that attend to the whole map are also padded to the next eighth of N
FREQUENCIES = 4  # of the sines and cosines of a place in a box, in half turns: 1, 2, 4, 8
FEATURES = 4 * FREQUENCIES  # of a place


class Group(NamedTuple):
    """Sets of cells of similar size, padded to L cells."""

    owners: Tensor  # (n,) int64: whose cells they are, regions in [0, B R) or images in [0, B)
    cells: Tensor  # (n, L) int64 in [0, B N)
    inside: Tensor  # (n, L) bool, False for padding


class Branches(NamedTuple):
    """Which cells attend together, and which of their outputs are added up in each cell."""

    objects: list[Group]  # the cells of each region
    null: list[Group]  # of each image, the cells that attend to the whole map
    rows: Tensor  # (B N, K) int64: the outputs for each cell, counted through all groups; the number of outputs: none
    count: Tensor  # (B N, 1) int64: how many they are, at least 1


class Layout(NamedTuple):
    """The regions of a batch on a grid, as attention reads them."""

    weights: Tensor  # (B, R, h, w): the share of each region's prompt in the prompt of a cell
    columns: Tensor  # (B, R, w, FEATURES / 2) of where columns lie in the box of a region
    rows: Tensor  # (B, R, h, FEATURES / 2)
    branches: Branches | None  # None: one attention over the whole map


def make_layout(cells: Tensor, kind: str, u: Tensor, v: Tensor, weights: Tensor | None = None) -> Layout:
    """Returns the layout of cells (B, R, h, w) bool for a kind of region attention.

    Columns lie at u (B, R, w) in the box of a region, rows at v (B, R, h), from 0 to 1. Without `weights`, the prompt
    of a cell is the mean over the regions that cover it.
    """
    if weights is None:
        weights = cells / cells.sum(1, keepdim=True).clamp(min=1)
    branches = None
    if kind in ("v1", "v2"):
        covered = cells.flatten(2)
        null = ~covered.any(1, keepdim=True)
        branches = find_branches(covered, torch.ones_like(null) if kind == "v1" else null)
    return Layout(weights, place_features(u), place_features(v), branches)


def layout_of(regions: Regions, height: int, width: int, kind: str, overlap: str) -> Layout:
    """Returns the layout of regions on a grid; computed once per grid, kind and overlap."""

    def compute() -> Layout:
        cells, weights = regions.at(height, width), None
        if overlap == "front":
            index = torch.arange(cells.shape[1], device=cells.device)
            cells = regions.front(height, width).unsqueeze(1) == index[:, None, None]
        elif kind == "segmentation":
            weights = regions.visible(height, width)
        return make_layout(cells, kind, *regions.places(height, width), weights)

    return regions.compute_once(("layout", height, width, kind, overlap), compute)


def prompts_of(condition: Condition) -> Tensor:
    """Returns the prompt of each region, (B, R, D): the mean of the tokens that describe it, 0 without any."""
    tokens = condition.tokens()
    if tokens is None or tokens.membership is None:
        raise ValueError("got regions and no tokens that describe them: add a condition that does, such as objects")
    members = tokens.membership if tokens.mask is None else tokens.membership & tokens.mask.unsqueeze(-1)
    members = members.mT.to(tokens.values.dtype)  # (B, R, M)
    return members @ tokens.values / members.sum(-1, keepdim=True).clamp(min=1)


# Groups of similar size


def find_branches(cells: Tensor, null: Tensor) -> Branches:
    """Returns the branches of cells (B, R, N) bool, and of those that attend to the whole map, `null` (B, 1, N).

    The CPU waits for the device once, for the sizes of the groups. How far a region is padded depends on its own size
    alone, so that no number depends on the rest of the batch. Compiled graphs have fixed shapes: all regions, absent
    ones too, are padded to N cells there.
    """
    (batch, regions, length), fixed = cells.shape, torch.compiler.is_compiling()
    cells = torch.cat([cells, null], 1)  # (B, S, N): the sets
    lengths = [length] if fixed else sorted({-(-length // 2**i) for i in range(LENGTHS)})
    null_lengths = [length] if fixed else sorted({*lengths, *(-(-length * i // EIGHTHS) for i in range(1, EIGHTHS))})
    sizes, places = cells.sum(2).flatten(), cells.cumsum(2) - 1
    packed, (image, number) = pack_cells(cells, places), index_sets(cells)
    kinds = sum((sizes > each).long() for each in lengths)
    null_kinds = len(lengths) + sum((sizes > each).long() for each in null_lengths)
    kinds, padded = null_kinds.where(number == regions, kinds), lengths + null_lengths
    kinds = kinds if fixed else kinds.where(sizes > 0, len(padded))
    if fixed:
        counts, most = [batch * regions, batch], regions + 1
    else:
        totals = (kinds.unsqueeze(1) == torch.arange(len(padded), device=cells.device)).sum(0)
        *counts, most = torch.cat([totals, cells.sum(1).amax().view(1)]).tolist()
    objects, empty, rows = [], [], torch.zeros_like(sizes)  # rows: of each set, its first one
    order, start, row = kinds.argsort(stable=True), 0, 0
    for i, (n, size) in enumerate(zip(counts, padded, strict=True)):
        if i and not n:
            continue
        chosen, of_regions = order[start : start + n], i < len(lengths)
        owners = (image * regions + number)[chosen] if of_regions else image[chosen]
        inside = torch.arange(size, device=cells.device) < sizes[chosen].unsqueeze(1)
        (objects if of_regions else empty).append(Group(owners, packed[chosen, :size], inside))
        rows[chosen] = row + size * torch.arange(n, device=cells.device)
        start, row = start + n, row + n * size
    objects = objects if counts[0] else objects[1:] or objects  # at least one: prompts always get a gradient
    rows = (rows.view(batch, -1, 1) + places).where(cells, row)
    turns = (cells.cumsum(1) - 1).where(cells, most)  # the turn of each set among those of a cell
    rows = rows.new_full((batch, most + 1, length), row).scatter_(1, turns, rows)[:, :most]
    return Branches(objects, empty, rows.mT.flatten(0, 1), cells.sum(1).view(-1, 1))


def index_sets(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the image and the number in it of each set of cells (B, S, N), (B S,) each."""
    index = torch.arange(cells.shape[0] * cells.shape[1], device=cells.device)
    return index // cells.shape[1], index % cells.shape[1]


def pack_cells(cells: Tensor, places: Tensor) -> Tensor:
    """Returns the covered ones of cells (B, S, N) bool at their places in order, (B, S, N), counted through the batch,
    and padding: (B S, N)."""
    batch, sets, length = cells.shape
    index = torch.arange(length, device=cells.device).expand_as(cells)
    packed = index.new_zeros(batch, sets, length + 1).scatter_(2, places.where(cells, length), index)[..., :length]
    return (packed + length * torch.arange(batch, device=cells.device).view(-1, 1, 1)).flatten(0, 1)


# Attention


class RegionAttention(Attention):
    """Attention of cells to those of the same region, with the prompt of its object: x (B, h, w, C) -> the same shape.

    The prompt is added to queries, keys and values. `kind` is one of REGION_ATTENTION:

    - v2: each cell gets the mean over the regions that cover it; without any, attention to the whole map.
    - v1: attention to the whole map is one more in that mean, in every cell.
    - no_partial: one attention over the whole map, with the mean prompt of each cell.
    - segmentation: the same, with the prompts of what is visible in a cell by their shares.

    `overlap` is one of OVERLAPS. mean: each region has its own prompt; mean_prompt: where regions overlap, all have the
    mean of their prompts, as published; front: a cell belongs to the region in front alone. With `places`, a layer that
    starts at zero adds where in the region's box a cell lies.

    The published null prompt, of cells that no region covers, is the bias of queries, keys and values here: a prompt
    added to all of them in all branches changes nothing else.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        prompt_width: int,
        *,
        kind: str = "v2",
        overlap: str = "mean",
        places: bool = True,
    ):
        super().__init__(width, heads)
        if kind not in REGION_ATTENTION or overlap not in OVERLAPS:
            wanted = f"{', '.join(REGION_ATTENTION)} and {', '.join(OVERLAPS)}"
            raise ValueError(f"got region attention {kind!r} with overlap {overlap!r}, wanted one of {wanted}")
        self.kind, self.overlap = kind, overlap
        self.prompt = nn.Linear(prompt_width, sum(self.sizes), bias=False)
        self.places = None
        if places:
            self.places = nn.Linear(FEATURES, sum(self.sizes), bias=False)
            nn.init.zeros_(self.places.weight)

    def forward(self, x: Tensor, prompts: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        """x (B, h, w, C), prompts (B, R, D) of the regions of `layout`; without a layout no region covers anything."""
        if layout is None:
            return super().forward(x)
        qkv, prompts = self.qkv(x), self.prompt(prompts)  # (B, h, w, 3 C), (B, R, 3 C)
        if layout.branches is None:
            q, k, v = self.split_heads(qkv + self.mean_prompt(prompts, layout))
            out = self.core(q, k, v, scale=self.scale).flatten(-2)
            maps = self.core.attention_map(q, k, scale=self.scale) if self.map_lists else None
        else:
            parts = self.branch_inputs(qkv, prompts, layout)
            rows, count = layout.branches.rows, layout.branches.count
            outputs = [self.core(*part.qkv, mask=part.mask, scale=self.scale).flatten(-2) for part in parts]
            out = add_rows(outputs, rows) / count
            maps = self.branch_map(parts, layout.branches, x.shape[1] * x.shape[2]) if self.map_lists else None
        for recorded in self.map_lists:
            recorded.append(maps)
        return self.proj(out.view_as(x))

    def mean_prompt(self, prompts: Tensor, layout: Layout) -> Tensor:
        """Returns the prompt of each cell, (B, h, w, 3 C), from those of the regions, (B, R, 3 C)."""
        mean = torch.einsum("brhw,brc->bhwc", layout.weights.to(prompts.dtype), prompts)
        if self.places is None:
            return mean
        dtype = torch.promote_types(prompts.dtype, torch.float32)
        weights, columns, rows = (part.to(dtype) for part in (layout.weights, layout.columns, layout.rows))
        places = [
            torch.einsum("brhw,brwf->bhwf", weights, columns),
            torch.einsum("brhw,brhf->bhwf", weights, rows),
        ]
        return mean + self.places(torch.cat(places, -1).to(prompts.dtype))

    def own_prompt(self, prompt: Tensor, group: Group, layout: Layout) -> Tensor:
        """Returns what regions with prompts (n, 3 C) add in each of L cells: (n, L, 3 C), or (n, 1, 3 C) in all."""
        own = prompt.unsqueeze(1)
        if self.places is None:
            return own
        (height, width), owners, cells = layout.weights.shape[2:], group.owners.unsqueeze(1), group.cells
        columns = F.embedding(owners * width + cells % width, layout.columns.flatten(0, 2))
        rows = F.embedding(owners * height + cells // width % height, layout.rows.flatten(0, 2))
        features = torch.cat([columns, rows], -1).to(own.dtype)  # (n, L, FEATURES)
        weight = self.places.weight.T.to(own.dtype).expand(len(cells), -1, -1)
        return own + features @ weight  # a product for each region: its bits do not depend on how many there are

    def split_heads(self, qkv: Tensor) -> list[Tensor]:
        """(..., 3 C) -> queries, keys and values (..., heads, C / heads)."""
        return [part.unflatten(-1, (self.heads, -1)) for part in qkv.chunk(3, -1)]

    def branch_inputs(self, qkv: Tensor, prompts: Tensor, layout: Layout) -> list["Inputs"]:
        """Returns the inputs of each group of branches; qkv (B, h, w, 3 C)."""
        objects, null = layout.branches.objects, layout.branches.null
        inputs, together = [], self.overlap == "mean_prompt"
        source = qkv + self.mean_prompt(prompts, layout) if together else qkv
        own = gather(prompts.flatten(0, 1), [group.owners for group in objects])
        rows = gather(source.flatten(0, 2), [group.cells for group in objects])  # (n, L, 3 C) each
        for group, prompt, part in zip(objects, own, rows, strict=True):
            part = part if together else part + self.own_prompt(prompt, group, layout)
            inputs.append(Inputs(self.split_heads(part), group.inside, group.cells))
        if not null:
            return inputs
        q, kv = qkv.flatten(1, 2).split((self.sizes[0], sum(self.sizes[1:])), -1)
        queries = gather(q.flatten(0, 1), [group.cells for group in null])
        counts = [len(group.owners) for group in null]
        kv = kv if counts == [len(kv)] else kv.index_select(0, torch.cat([group.owners for group in null]))
        for query, key_value in zip(queries, kv.split(counts), strict=True):
            parts = [query, *key_value.chunk(2, -1)]
            inputs.append(Inputs([part.unflatten(-1, (self.heads, -1)) for part in parts], None, None))
        return inputs

    def branch_map(self, parts: list["Inputs"], branches: Branches, length: int) -> Tensor:
        """Returns the mean of the maps of the branches of each cell, (B, heads, N, N)."""
        spread = []
        for (q, k, _), mask, cells in parts:
            weights = self.core.attention_map(q, k, mask=mask, scale=self.scale)  # (n, heads, L, M)
            if cells is not None:
                index = (cells % length)[:, None, None].expand_as(weights)
                weights = weights.new_zeros(*weights.shape[:3], length).scatter_add_(3, index, weights)
            spread.append(weights.transpose(1, 2).flatten(2))  # (n, L, heads N)
        maps = add_rows(spread, branches.rows) / branches.count
        return maps.view(-1, length, self.heads, length).transpose(1, 2)


class Inputs(NamedTuple):
    """What attends in a group of branches."""

    qkv: list[Tensor]  # (n, L, heads, d), (n, M, heads, d) and (n, M, heads, d)
    mask: Tensor | None  # (n, M) bool, True for keys; None: all
    cells: Tensor | None  # (n, M) the cells of the keys; None: all of an image


def gather(table: Tensor, indices: list[Tensor]) -> list[Tensor]:
    """Returns the rows of a table (N, C) at indices (...) each, (..., C) each, in one look-up."""
    rows = F.embedding(torch.cat([index.flatten() for index in indices]), table)
    parts = rows.split([index.numel() for index in indices])
    return [part.view(*index.shape, table.shape[1]) for part, index in zip(parts, indices, strict=True)]


def add_rows(parts: list[Tensor], rows: Tensor) -> Tensor:
    """Adds up rows of parts (n, L, C) by their numbers `rows` (B N, K), counted through; the next one is 0: (B N, C).

    They are added in order, so that a sum does not depend on K.
    """
    table = torch.cat([*(part.flatten(0, 1) for part in parts), parts[0].new_zeros(1, parts[0].shape[-1])])
    return F.embedding_bag(rows, table, mode="sum")


def place_features(place: Tensor) -> Tensor:
    """Returns sines and cosines of places in [0, 1], (...) -> (..., FEATURES / 2)."""
    angle = math.pi * place.unsqueeze(-1) * 2.0 ** torch.arange(FREQUENCIES, device=place.device)
    return torch.cat([angle.sin(), angle.cos()], -1)
