"""Images too large for memory, encoded and decoded in overlapping tiles; memory is that of a tile and the outcome.

`tile` and `overlap` are in codes. A network with group norm or attention sees one tile at a time, so tiles differ from
the whole image at once: a tile as large as the images it was trained on is what it knows best. A network of
convolutions alone gives the very same where the overlap is four times as long as it reaches to a side.
"""

from collections.abc import Callable
from itertools import pairwise, product

import torch
from torch import Tensor

from vq.autoencoder import VQGAN


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles of an axis begin: the last ends with the axis, neighbours share `overlap` or a little more.

    An axis of at most `tile` is one tile. ValueError unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"got tiles of {tile} codes with an overlap of {overlap}: wanted 0 <= overlap < tile")
    if size <= tile:
        return [0]
    count = -((overlap - size) // (tile - overlap))
    return [i * (size - tile) // (count - 1) for i in range(count)]


def blend_ramps(size: int, tile: int, overlap: int, scale: int) -> list[tuple[float, float]]:
    """Where, on an axis of `size * scale` values, each tile but the first takes over from the one before: from, to.

    The ramp is as long as half the overlap and lies in the middle of what the two tiles share: at its border a tile
    sees zeros where the image goes on, and has no share there.
    """
    starts = tile_starts(size, tile, overlap)
    middles = [(start + before + tile) / 2 for before, start in pairwise(starts)]
    return [((middle - overlap / 4) * scale, (middle + overlap / 4) * scale) for middle in middles]


def tile_weights(size: int, tile: int, overlap: int, scale: int) -> Tensor:
    """(tiles, size * scale) float64: the share of each tile in each value of an axis, in [0, 1]; their sum is 1.

    A tile's share rises linearly where it takes over and falls where the next does; the axis's ends do not fade.
    """
    x = torch.arange(size * scale, dtype=torch.float64) + 0.5
    risen = [torch.ones_like(x)]
    for low, high in blend_ramps(size, tile, overlap, scale):
        risen.append(((x - low) / (high - low)).clamp(0, 1) if high > low else (x > low).double())
    risen = torch.stack([*risen, torch.zeros_like(x)])
    return risen[:-1] - risen[1:]


def seams(size: int, tile: int, overlap: int, scale: int) -> list[int]:
    """The values of an axis of `size * scale` before which a tile sets in, reaches its full share, or is half way."""
    places = {round(x) for low, high in blend_ramps(size, tile, overlap, scale) for x in (low, (low + high) / 2, high)}
    return sorted(places)


def apply_tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    *,
    scales: tuple[int, int],
    tiles_per_batch: int = 1,
) -> Tensor:
    """`function` of x (B, ..., H, W), a tile at a time, blended.

    `scales` are the values per code along a side in x and in what the function gives. `tiles_per_batch` tiles are computed
    together. The outcome lies on the device of x.
    """
    into, out = scales
    grid = [side // into for side in x.shape[-2:]]
    shares = [tile_weights(side, tile, overlap, out) for side in grid]
    places = list(product(*(enumerate(tile_starts(side, tile, overlap)) for side in grid)))
    height, width = (min(tile, side) for side in grid)
    result = None
    for first in range(0, len(places), tiles_per_batch):
        some = places[first : first + tiles_per_batch]
        parts = [x[..., tile_slice(top, height, into), tile_slice(left, width, into)] for (_, top), (_, left) in some]
        made = function(torch.cat(parts)).to(x.device)
        if result is None:
            shape = len(x), *made.shape[1:-2], *(side * out for side in grid)
            result = made.new_zeros(shape, dtype=torch.promote_types(made.dtype, torch.float32))
        for ((i, top), (j, left)), part in zip(some, made.split(len(x)), strict=True):
            rows, columns = tile_slice(top, height, out), tile_slice(left, width, out)
            share = shares[0][i, rows, None] * shares[1][j, columns]
            result[..., rows, columns] += share.to(result) * part
    return result


def tile_slice(start: int, length: int, scale: int) -> slice:
    return slice(start * scale, (start + length) * scale)


@torch.no_grad()
def encode_tiled(vqgan: VQGAN, images: Tensor, tile: int, overlap: int, *, tiles_per_batch: int = 1) -> Tensor:
    """images (B, C, H, W) in [-1, 1] -> ids (B, h, w), on the device of the images.

    The latents are blended before they become codes, which leaves more codes as they are of the whole image than to
    take each from the tile whose middle is nearest. ValueError for sizes that are no multiples of the factor.
    """
    vqgan.config.grid(*images.shape[2:])
    scales, device = (vqgan.config.factor, 1), device_of(vqgan)
    latents = apply_tiled(
        lambda part: vqgan.latents(part.to(device)),
        images,
        tile,
        overlap,
        scales=scales,
        tiles_per_batch=tiles_per_batch,
    )
    return vqgan.quantizer.assign(latents.to(device)).to(images.device)


@torch.no_grad()
def decode_tiled(vqgan: VQGAN, ids: Tensor, tile: int, overlap: int, *, tiles_per_batch: int = 1) -> Tensor:
    """ids (B, h, w) -> images (B, C, H, W) in [-1, 1], on the device of the ids."""
    scales, device = (1, vqgan.config.factor), device_of(vqgan)
    return apply_tiled(
        lambda part: vqgan.decode(part.to(device)), ids, tile, overlap, scales=scales, tiles_per_batch=tiles_per_batch
    )


def device_of(vqgan: VQGAN) -> torch.device:
    return next(vqgan.parameters()).device


def seam_ratio(images: Tensor, rows: list[int], columns: list[int], factor: int) -> float:
    """How much larger neighbouring pixels differ across seams than elsewhere, on average; 1 where none is to be seen.

    images (B, C, H, W) of any type; a seam lies before each of these rows and columns. Elsewhere is where codes meet in
    the same way, a multiple of `factor` from a seam: a decoder has a pattern of its own in every code. NaN where there
    is no seam, or no difference elsewhere.
    """
    sums, counts = [0.0, 0.0], [0, 0]  # of places elsewhere, of seams
    for axis, places in ((-2, rows), (-1, columns)):
        steps = images.movedim(axis, 0).float().diff(dim=0).abs().flatten(1)  # before places 1, 2, ...
        at_place = [0.0, *steps.sum(1, dtype=torch.float64).tolist()]
        phases = {place % factor for place in places}
        for place in range(1, len(at_place)):
            if place % factor in phases:
                sums[place in places] += at_place[place]
                counts[place in places] += steps.shape[1]
    if not all(counts) or not sums[0]:
        return float("nan")
    return sums[1] / counts[1] / (sums[0] / counts[0])
