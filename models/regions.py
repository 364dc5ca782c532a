"""Regions of images, given as boxes, masks or segments of an id map, and the cells of a grid that they cover.

Shapes: R regions of an image, H W pixels of a mask or an id map, h w cells of a grid.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Rule = Literal["touched", "share", "nearest", "half"]
SLIVER = 1e-6  # of a cell: a region that covers no more of it does not touch it
ABSENT = torch.iinfo(torch.int64).min  # replaces the id of a region that is not present: no pixel has it
SHAPES = ("masks", "id_maps", "boxes")


@dataclass(frozen=True, eq=False, kw_only=True)
class Regions:
    """The regions of each image of a batch, which may overlap; images with fewer than R are padded.

    Their shapes are `masks` or, without any, the segments `instance_ids` of `id_maps` or, without any, `boxes`. Their
    order is depth: each is in front of those before it or, with `front_first`, behind them. Regions that are not
    present are padding, dropped, or outside the image: they cover nothing, their boxes are 0 and their ids -1.
    """

    present: Tensor  # (B, R) bool
    boxes: Tensor | None = None  # (B, R, 4) x0, y0, x1, y1 as fractions of the image, in [0, 1]
    masks: Tensor | None = None  # (B, R, H, W) bool
    id_maps: Tensor | None = None  # (B, H, W) integers: disjoint segments; other ids than those of regions are no one's
    class_ids: Tensor | None = None  # (B, R) int64; None: all -1, unknown
    instance_ids: Tensor | None = None  # (B, R) int64, those in `id_maps`; None: all -1
    outside: Tensor | None = None  # (B,) int64: how many were left out, since nothing of them is in the image; None: 0
    front_first: bool = False
    cache: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)  # what `at` and others computed

    def __post_init__(self):
        if not self.shapes:
            raise ValueError("got regions without shapes, wanted boxes, masks or id_maps")
        if self.shapes[0] == "id_maps" and self.instance_ids is None:
            raise ValueError("got id_maps without instance_ids, wanted the id of each region")
        unknown = torch.full_like(self.present, -1, dtype=torch.int64)
        for name in ("class_ids", "instance_ids"):
            object.__setattr__(self, name, unknown if getattr(self, name) is None else getattr(self, name))
        if self.outside is None:
            object.__setattr__(self, "outside", unknown.new_zeros(len(unknown)))
        size = tuple(self.present.shape)
        leading = {"boxes": (*size, 4), "id_maps": size[:1], "outside": size[:1]}  # axes; all others have (B, R) first
        for name, tensor in self.tensors().items():
            first, more = leading.get(name, size), ("H", "W") if name in ("masks", "id_maps") else ()
            if tensor.shape[: len(first)] != first or tensor.ndim != len(first) + len(more):
                wanted = ", ".join(map(str, (*first, *more)))
                raise ValueError(f"got {name} {tuple(tensor.shape)} of regions, wanted ({wanted})")

    @property
    def shapes(self) -> tuple[str, ...]:
        """The names of the shapes that the regions have; the first one defines what they cover."""
        return tuple(name for name in SHAPES if getattr(self, name) is not None)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by name, (B, ...) each."""
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> "Regions":
        """Returns the regions with `fn` applied to every tensor."""
        return replace(self, **{name: fn(tensor) for name, tensor in self.tensors().items()})

    def __getitem__(self, rows: slice | Tensor) -> "Regions":
        """Returns the regions of some images."""
        return self.map_tensors(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "Regions":
        """Returns the regions on a device."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def keep(self, present: Tensor) -> "Regions":
        """Returns the regions without those that are not `present`, (B, R) bool."""
        present = present & self.present
        ids = {name: getattr(self, name).where(present, -1) for name in ("class_ids", "instance_ids")}
        boxes = None if self.boxes is None else self.boxes.where(present.unsqueeze(-1), 0)
        return replace(self, present=present, boxes=boxes, **ids)

    def keep_inside(self) -> "Regions":
        """Returns the regions without those of which nothing is in the image, and adds their number to `outside`."""
        kept = self.keep(self.at(1, 1, "share").flatten(1) > 0)
        return replace(kept, outside=self.outside + self.present.sum(1) - kept.present.sum(1))

    def drop(self, images: Tensor) -> "Regions":
        """Returns the regions without all those of some images, (B,) bool."""
        return self.keep(~images.unsqueeze(1))

    # Coverage

    def at(self, height: int, width: int, rule: Rule = "touched") -> Tensor:
        """Returns the cells of a grid that each region covers, (B, R, height, width); computed once per grid and rule.

        - share, float32: the share of each cell that is covered, exactly.
        - touched, bool: cells with any share; every present region has at least the cell of its largest share.
        - half, bool: cells of which more than half is covered.
        - nearest, bool: cells whose centre is covered (of masks: the pixel that "nearest-exact" takes).
        """
        return self.compute_once((rule, height, width), lambda: self.cover(height, width, rule))

    def compute_once(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Returns what `compute` returned the first time for this key."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]

    def cover(self, height: int, width: int, rule: Rule) -> Tensor:
        """Computes `at`."""
        present = self.present[:, :, None, None]
        if rule == "share":
            return self.shares(height, width).float() * present
        if rule == "nearest":
            return self.centres(height, width) & present
        share = self.at(height, width, "share")
        if rule == "half":
            return share > 0.5
        if rule != "touched":
            raise ValueError(f"got rule {rule!r}, wanted touched, share, nearest or half")
        largest = (share == share.amax((2, 3), keepdim=True)) & (share > 0)
        first = largest.flatten(2).cumsum(-1).view_as(share) == 1  # of several largest ones, wherever the rest lie
        return (share > SLIVER) | (largest & first)

    def shares(self, height: int, width: int) -> Tensor:
        """Returns the share of each cell that each region's shape covers, (B, R, height, width)."""
        shape = self.shapes[0]
        if shape == "id_maps":
            return self.segment_shares(height, width)
        if shape == "masks":
            areas = sum_over_cells(sum_over_cells(self.masks.int(), height, 2), width, 3)
            return areas / (self.masks.shape[2] * self.masks.shape[3])
        x0, y0, x1, y1 = to_double(self.boxes).unbind(-1)
        error = torch.finfo(self.boxes.dtype).eps / 2
        rows, columns = overlaps(y0, y1, height, error), overlaps(x0, x1, width, error)
        return rows.unsqueeze(-1) * columns.unsqueeze(-2)

    def segment_shares(self, height: int, width: int) -> Tensor:
        """Returns `shares` of segments, in one pass over the id maps, without a mask for each."""
        (batch, count), (rows, columns), device = self.present.shape, self.id_maps.shape[1:], self.id_maps.device
        y, x = pieces(rows, height, device), pieces(columns, width, device)
        segments = self.segments().index_select(1, y.pixel).index_select(2, x.pixel)
        cells = (segments * height + y.cell[:, None]) * width + x.cell  # (B, y pieces, x pieces)
        areas = (y.length[:, None] * x.length).expand_as(cells).flatten(1)
        sums = areas.new_zeros(batch, (count + 1) * height * width).scatter_add_(1, cells.flatten(1), areas)
        return sums.view(batch, count + 1, height, width)[:, :count] / (rows * columns)

    def segments(self) -> Tensor:
        """Returns the region of each pixel of the id maps, (B, H, W) int64 in [0, R]; R: none."""

        def find() -> Tensor:
            count, pixels = self.present.shape[1], self.id_maps.flatten(1).long()
            ids = F.pad(self.instance_ids.where(self.present, ABSENT), (0, 1), value=ABSENT)  # (B, R + 1): not empty
            ids, order = ids.sort(1)
            place = torch.searchsorted(ids, pixels).clamp(max=count)
            found = (ids.gather(1, place) == pixels) & (pixels != ABSENT)
            return order.gather(1, place).where(found, count).view_as(self.id_maps)

        return self.compute_once("segments", find)

    def centres(self, height: int, width: int) -> Tensor:
        """Returns the cells whose centres each region's shape covers, (B, R, height, width) bool."""
        shape = self.shapes[0]
        if shape == "boxes":
            x0, y0, x1, y1 = to_double(self.boxes).unsqueeze(-2).unbind(-1)  # (B, R, 1) each
            y, x = cell_centres(height, y0), cell_centres(width, x0)
            return ((y0 <= y) & (y < y1)).unsqueeze(-1) & ((x0 <= x) & (x < x1)).unsqueeze(-2)
        if shape == "masks":
            return at_centres(self.masks, height, width)
        index = torch.arange(self.present.shape[1], device=self.id_maps.device)
        return at_centres(self.segments(), height, width).unsqueeze(1) == index[:, None, None]

    # Depth and places

    def front(self, height: int, width: int, rule: Rule = "touched") -> Tensor:
        """Returns the region in front in each cell, (B, height, width) int64 in [0, R), -1 where there is none."""
        covered = self.at(height, width, rule)
        depth = torch.arange(1, covered.shape[1] + 1, device=covered.device)
        depth = depth.flip(0) if self.front_first else depth
        depth = F.pad(covered * depth[:, None, None], (0, 0, 0, 0, 0, 1)).amax(1)  # R may be 0
        return (covered.shape[1] - depth).where(depth > 0, -1) if self.front_first else depth - 1

    def visible(self, height: int, width: int) -> Tensor:
        """Returns the share of each cell in which a region is seen, (B, R, height, width); they add up to at most 1.

        A box or mask hides those behind it, in a cell that it covers in part in proportion. Segments are disjoint.
        """
        share = self.at(height, width, "share")
        if self.shapes[0] == "id_maps":
            return share
        behind = share if self.front_first else share.flip(1)  # from front to back
        left = F.pad(1 - behind, (0, 0, 0, 0, 1, 0), value=1.0).cumprod(1)[:, :-1]
        return share * (left if self.front_first else left.flip(1))

    def bounds(self) -> Tensor:
        """Returns the boxes (B, R, 4) or, without any, those around the masks or segments."""

        def find() -> Tensor:
            height, width = getattr(self, self.shapes[0]).shape[-2:]
            y0, y1 = first_and_last(self.at(height, 1, "share").flatten(2) > 0)
            x0, x1 = first_and_last(self.at(1, width, "share").flatten(2) > 0)
            return torch.stack([x0, y0, x1, y1], -1) * self.present.unsqueeze(-1)

        return self.compute_once("bounds", find) if self.boxes is None else self.boxes

    def places(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns where the centres of cells lie in each region's box: u (B, R, width) from its left edge, 0, to its
        right edge, 1, and v (B, R, height) from top to bottom; of centres outside it those of the nearest edge."""
        x0, y0, x1, y1 = to_double(self.bounds()).unsqueeze(-2).unbind(-1)
        u, v = (
            ((cell_centres(cells, start) - start) / (end - start).clamp(min=1e-12)).clamp(0, 1).float()
            for start, end, cells in ((x0, x1, width), (y0, y1, height))
        )
        return u * self.present.unsqueeze(-1), v * self.present.unsqueeze(-1)

    # Windows and batches

    def window(self, top: int, left: int, height: int, width: int, grid: tuple[int, int]) -> "Regions":
        """Returns the regions in a window of cells of a grid; those of which nothing is in it are not present."""
        rows, columns = check_window(top, left, height, width, grid)
        cropped = {
            name: crop_cells(crop_cells(getattr(self, name), -2, top, height, rows), -1, left, width, columns)
            for name in self.shapes
            if name != "boxes"
        }
        if self.boxes is not None:
            x, y = self.boxes[..., 0::2] * columns - left, self.boxes[..., 1::2] * rows - top  # in cells of the window
            x, y = (x / width).clamp(0, 1), (y / height).clamp(0, 1)
            cropped["boxes"] = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)
        return replace(self, **cropped).keep_inside()

    def pad_to(self, count: int) -> "Regions":
        """Returns the regions padded to `count` of them, R or more, in each image."""
        missing = count - self.present.shape[1]
        pads = {"present": (0, missing), "boxes": (0, 0, 0, missing), "masks": (0, 0, 0, 0, 0, missing)}
        padded = {name: F.pad(tensor, pads[name]) for name, tensor in self.tensors().items() if name in pads}
        ids = {name: F.pad(getattr(self, name), (0, missing), value=-1) for name in ("class_ids", "instance_ids")}
        return replace(self, **padded, **ids)

    def empty(self, batch: int) -> "Regions":
        """Returns `batch` images without regions, with which these can be concatenated."""
        blank = self.map_tensors(lambda tensor: tensor.new_zeros(batch, *tensor.shape[1:]))
        return blank.keep(blank.present)

    @classmethod
    def cat(cls, regions: Sequence["Regions"]) -> "Regions":
        """Concatenates regions along the batch, padded to the largest R. ValueError for shapes of different kinds."""
        kinds = {" and ".join(each.shapes) + ", front first" * each.front_first for each in regions}
        if len(kinds) > 1:
            raise ValueError(f"got regions as {'; and as '.join(sorted(kinds))}: wanted the same in all")
        largest = max(each.present.shape[1] for each in regions)
        parts = [each.pad_to(largest).tensors() for each in regions]
        return replace(regions[0], **{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    @classmethod
    def from_fields(cls, batch: Mapping[str, Any], *, front_first: bool = False) -> "Regions":
        """Returns the regions that fields of a batch describe, clipped to the image.

        Either one for each of `boxes` or `masks`, with `box_class` and, if `panoptic` is their shape, `box_id`; or one
        for each `segment_id` of `panoptic`, with `segment_class`. `check_region_fields` checks the fields.
        """
        kind, boxes, masks = kind_of_regions(batch), batch.get("boxes"), batch.get("masks")
        return cls(
            present=find_present(batch, kind),
            boxes=None if boxes is None else boxes.clamp(0, 1),
            masks=None if masks is None else masks > 0,
            id_maps=batch.get("panoptic"),
            class_ids=batch.get(f"{kind}_class"),
            instance_ids=batch.get(f"{kind}_id"),
            front_first=front_first,
        ).keep_inside()


# Fields of a batch


def kind_of_regions(batch: Mapping[str, Any]) -> Literal["box", "segment"]:
    """Returns what the fields of a batch describe: boxes (or masks), or segments. ValueError for both, and for none."""
    boxes, segments = (sorted({*batch} & names) for names in ({"boxes", "masks"}, {"segment_id", "segment_class"}))
    if boxes and segments or not (boxes or "segment_id" in segments):
        got = ", ".join(boxes + segments) or "no fields"
        raise ValueError(f"got {got} as regions, wanted either boxes or masks, or panoptic with segment_id")
    return "box" if boxes else "segment"


def find_present(batch: Mapping[str, Any], kind: str) -> Tensor:
    """Returns which regions are no padding, (B, R) bool."""
    name = "segment_id" if kind == "segment" else "boxes" if "boxes" in batch else "masks"
    if f"{name}_mask" in batch:
        return batch[f"{name}_mask"]
    return torch.ones_like(batch[name][:, :, *[0] * (batch[name].ndim - 2)], dtype=torch.bool)


def check_region_fields(
    batch: Mapping[str, Any], limits: Mapping[str, int] | None = None, names: Sequence[str] | None = None
) -> None:
    """Raises ValueError, with the name of the image, for regions that cannot be; it waits for the device of the batch.

    These are boxes that are not finite or have no extent, segments of the same id, and numbers of a field beyond its
    `limits`, such as {"box_class": 10}. A box without extent at the border of the image is what clamping leaves of one
    outside. `names` are those of the images; without any, they are known by their index in the batch.
    """
    kind = kind_of_regions(batch)
    present = find_present(batch, kind)

    def refuse(wrong: Tensor, field: str, reason: str) -> None:
        for image, row in (wrong & present).nonzero()[:1].tolist():
            name = f"image {image} of the batch" if names is None else names[image]
            raise ValueError(f"{name}: got {field} {batch[field][image, row].tolist()} as region {row}, {reason}")

    if "boxes" in batch:
        start, end = batch["boxes"].unflatten(-1, (2, 2)).unbind(-2)
        clamped = (start == end) & ((start <= 0) | (start >= 1))
        wrong = ~batch["boxes"].isfinite().all(-1) | ~((start < end) | clamped).all(-1)
        refuse(wrong, "boxes", "wanted numbers x0 < x1 and y0 < y1: correct it, or leave it out")
    if kind == "segment":
        same = (batch["segment_id"].unsqueeze(1) == batch["segment_id"].unsqueeze(2)) & present.unsqueeze(1)
        refuse(same.tril(-1).any(-1), "segment_id", "which an earlier one has: wanted different ones")
    for field_name, limit in (limits or {}).items():
        if field_name in batch:
            values = batch[field_name]
            refuse((values < 0) | (values >= limit), field_name, f"wanted 0 to {limit - 1}")


# Cells of a grid


class Pieces(NamedTuple):
    """The pieces into which the edges of pixels and cells divide an axis; some have no length."""

    pixel: Tensor  # (n,) int64 that each is part of
    cell: Tensor  # (n,)
    length: Tensor  # (n,), of which a cell has as many as there are pixels


def pieces(pixels: int, cells: int, device: torch.device) -> Pieces:
    """Divides an axis of `pixels` pixels into `cells` cells, in whole numbers."""
    edges = torch.cat(
        [torch.arange(pixels + 1, device=device) * cells, torch.arange(cells + 1, device=device) * pixels]
    )
    edges = edges.sort().values
    start = edges[:-1]
    return Pieces((start // cells).clamp(max=pixels - 1), (start // pixels).clamp(max=cells - 1), edges.diff())


def sum_over_cells(x: Tensor, cells: int, axis: int) -> Tensor:
    """Sums integers (..., pixels, ...) over the cells of an axis, by their lengths in each: (..., cells, ...)."""
    piece = pieces(x.shape[axis], cells, x.device)
    length = piece.length.to(x.dtype).view(-1, *[1] * (x.ndim - 1 - axis))
    sums = x.new_zeros([cells if i == axis else n for i, n in enumerate(x.shape)])
    return sums.index_add_(axis, piece.cell, x.index_select(axis, piece.pixel) * length)


def overlaps(start: Tensor, end: Tensor, cells: int, error: float) -> Tensor:
    """Returns the length of each interval (B, R) in each of `cells` cells of [0, 1], in cells: (B, R, cells).

    An edge no further from that of a cell than the rounding `error` of its number is on it, if any length is left.
    """
    first = torch.arange(cells, device=start.device)
    start, end = (edge.unsqueeze(-1) * cells for edge in (start, end))
    lengths = (end.minimum(first + 1.0) - start.maximum(first)).clamp(min=0)
    rounded = lengths.where(lengths > error * cells, 0)
    return rounded.where(rounded.any(-1, keepdim=True), lengths)


def cell_centres(cells: int, like: Tensor) -> Tensor:
    """Returns the centres of `cells` cells of [0, 1], (cells,)."""
    return (torch.arange(cells, device=like.device, dtype=like.dtype) + 0.5) / cells


def at_centres(x: Tensor, height: int, width: int) -> Tensor:
    """Returns the pixels (..., height, width) at the centres of cells, of x (..., H, W)."""
    for axis, cells in ((-2, height), (-1, width)):
        centre = (2 * torch.arange(cells, device=x.device) + 1) * x.shape[axis] // (2 * cells)
        x = x.index_select(axis, centre)
    return x


def first_and_last(covered: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where the covered part of an axis, (..., n) bool, starts and ends in [0, 1]; 1 and 0 if there is none."""
    n, index = covered.shape[-1], torch.arange(covered.shape[-1], device=covered.device)
    return index.where(covered, n).amin(-1) / n, (index + 1).where(covered, 0).amax(-1) / n


def check_window(top: int, left: int, height: int, width: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Returns the grid; ValueError unless the window lies in it."""
    rows, columns = grid
    if not (0 <= top < top + height <= rows and 0 <= left < left + width <= columns):
        raise ValueError(f"got a window of {height} x {width} cells at ({top}, {left}) of {rows} x {columns} cells")
    return rows, columns


def crop_cells(x: Tensor, axis: int, first: int, count: int, cells: int) -> Tensor:
    """Returns `count` cells of an axis of (..., pixels, ...) from cell `first` on; a pixel that is cut is repeated."""
    pixels = x.shape[axis]
    repeats = cells // math.gcd(pixels, cells)
    per_cell = pixels * repeats // cells
    index = torch.arange(first * per_cell, (first + count) * per_cell, device=x.device) // repeats
    return x.index_select(axis, index)


def to_double(x: Tensor) -> Tensor:
    """Returns a tensor of any shape in float64 or, on MPS, which has none, in float32."""
    return x.float() if x.device.type == "mps" else x.double()
