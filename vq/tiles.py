"""Tiled encoding and decoding of large images in overlapping tiles; memory is that of a few tiles and the result.

`tile` and `overlap` are in codes, or positions of latents. Group norm and attention see one tile at a time, so results
differ from those of the whole image; a tile of the training size suits the network best. For a network of convolutions
alone the result is the same if the overlap is at least four times the receptive field's reach to one side.
"""

from collections.abc import Callable
from itertools import pairwise, product
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from vq.autoencoder import VQGAN


class Tiles(NamedTuple):
    """How large images are tiled: lengths in codes or positions of latents, and the number of tiles computed at
    once."""

    tile: int
    overlap: int
    tiles_per_batch: int = 1


def make_tiles(tile: int, overlap: int | None = None, tiles_per_batch: int = 1) -> Tiles:
    """Returns a tiling, by default with an overlap of a quarter of a tile; ValueError unless 0 <= overlap < tile."""
    overlap = tile // 4 if overlap is None else overlap
    tile_starts(tile, tile, overlap)  # raises ValueError
    return Tiles(tile, overlap, tiles_per_batch)


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Returns the starts of the tiles along an axis: the last tile ends at the end, neighbours overlap by >= `overlap`.

    An axis of at most `tile` codes is one tile. ValueError unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"got tiles of {tile} codes with an overlap of {overlap}: wanted 0 <= overlap < tile")
    if size <= tile:
        return [0]
    count = -((overlap - size) // (tile - overlap))
    return [i * (size - tile) // (count - 1) for i in range(count)]


def blend_ramps(size: int, tile: int, overlap: int, scale: int) -> list[tuple[float, float]]:
    """Returns (start, end) of the linear blend between neighbouring tiles, on an axis of `size * scale` values.

    A ramp is half the overlap long and centred in the overlap: at its border a tile sees padding instead of the image,
    and gets weight 0 there.
    """
    starts = tile_starts(size, tile, overlap)
    middles = [(start + before + tile) / 2 for before, start in pairwise(starts)]
    return [((middle - overlap / 4) * scale, (middle + overlap / 4) * scale) for middle in middles]


def tile_weights(size: int, tile: int, overlap: int, scale: int) -> Tensor:
    """Returns the weight of each tile at each value of an axis, (tiles, size * scale) float64; weights sum to 1."""
    x = torch.arange(size * scale, dtype=torch.float64) + 0.5
    rising = [torch.ones_like(x)]
    for low, high in blend_ramps(size, tile, overlap, scale):
        rising.append(((x - low) / (high - low)).clamp(0, 1) if high > low else (x > low).double())
    rising = torch.stack([*rising, torch.zeros_like(x)])
    return rising[:-1] - rising[1:]


def seams(size: int, tile: int, overlap: int, scale: int) -> list[int]:
    """Returns the indices, on an axis of `size * scale` values, where ramps start, reach one half, and end."""
    indices = {round(x) for low, high in blend_ramps(size, tile, overlap, scale) for x in (low, (low + high) / 2, high)}
    return sorted(indices)


def apply_tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    *,
    scales: tuple[int, int],
    tiles_per_batch: int = 1,
) -> Tensor:
    """Applies `function` to x (B, ..., H, W) tile by tile and blends the results, on the device of x.

    `scales`: values per code along a side of x and of the result; `function` gets `tiles_per_batch` tiles at once.
    """
    scale_in, scale_out = scales
    grid = [side // scale_in for side in x.shape[-2:]]
    weights = [tile_weights(side, tile, overlap, scale_out) for side in grid]
    tiles = list(product(*(enumerate(tile_starts(side, tile, overlap)) for side in grid)))
    height, width = (min(tile, side) for side in grid)
    result = None
    for first in range(0, len(tiles), tiles_per_batch):
        batch = tiles[first : first + tiles_per_batch]
        corners = [(top, left) for (_, top), (_, left) in batch]
        crops = [x[..., tile_slice(top, height, scale_in), tile_slice(left, width, scale_in)] for top, left in corners]
        outs = function(torch.cat(crops)).to(x.device)
        if result is None:
            shape = len(x), *outs.shape[1:-2], *(side * scale_out for side in grid)
            result = outs.new_zeros(shape, dtype=torch.promote_types(outs.dtype, torch.float32))
        for ((i, top), (j, left)), out in zip(batch, outs.split(len(x)), strict=True):
            rows, columns = tile_slice(top, height, scale_out), tile_slice(left, width, scale_out)
            weight = weights[0][i, rows, None] * weights[1][j, columns]
            result[..., rows, columns] += weight.to(result) * out
    return result


def tile_slice(start: int, length: int, scale: int) -> slice:
    """Returns the slice of the values of `length` codes from `start`, with `scale` values per code."""
    return slice(start * scale, (start + length) * scale)


@torch.no_grad()
def encode_tiled(vqgan: VQGAN, images: Tensor, tile: int, overlap: int, *, tiles_per_batch: int = 1) -> Tensor:
    """Encodes images (B, C, H, W) in [-1, 1] as ids (B, h, w), on the device of the images.

    Latents are blended before quantization: more codes then agree with those of the whole image than if each came from
    the tile with the nearest centre. ValueError for sizes that are not multiples of the factor.
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
    """Decodes ids (B, h, w) to images (B, C, H, W) in [-1, 1], on the device of the ids."""
    scales, device = (1, vqgan.config.factor), device_of(vqgan)
    return apply_tiled(
        lambda part: vqgan.decode(part.to(device)), ids, tile, overlap, scales=scales, tiles_per_batch=tiles_per_batch
    )


@torch.no_grad()
def encode_latents_tiled(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    factor: int,
    tile: int,
    overlap: int,
    *,
    tiles_per_batch: int = 1,
) -> Tensor:
    """Encodes images (B, C, H, W) in [-1, 1] with a continuous autoencoder: latents (B, D, H / factor, W / factor).

    `encode` maps a tile to its latents, or to several maps of their size such as means and log-variances. ValueError
    for sizes that are not multiples of the factor.
    """
    height, width = images.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"got images of {height}x{width} pixels, wanted multiples of {factor}: crop or pad them")
    return apply_tiled(encode, images, tile, overlap, scales=(factor, 1), tiles_per_batch=tiles_per_batch)


@torch.no_grad()
def decode_latents_tiled(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    factor: int,
    tile: int,
    overlap: int,
    *,
    tiles_per_batch: int = 1,
) -> Tensor:
    """Decodes latents (B, D, h, w) with a continuous autoencoder to images (B, C, h * factor, w * factor)."""
    return apply_tiled(decode, latents, tile, overlap, scales=(1, factor), tiles_per_batch=tiles_per_batch)


class TileDifference(NamedTuple):
    """Mean absolute differences between what tiles give and what the whole gives."""

    mean: float
    at_seams: float  # where neighbouring tiles are blended, and one value to each side; NaN for a single tile
    inside: float  # elsewhere; NaN if there is no elsewhere


def tile_difference(tiled: Tensor, whole: Tensor, tile: int, overlap: int, scale: int) -> TileDifference:
    """Compares results of tiles with those of the whole, (B, C, H, W), with `scale` values per code along a side."""
    difference = (tiled - whole).abs().double().mean((0, 1))  # (H, W)
    seam = torch.zeros_like(difference, dtype=torch.bool)
    for axis, side in enumerate(difference.shape):
        x = torch.arange(side, device=seam.device) + 0.5
        for low, high in blend_ramps(side // scale, tile, overlap, scale):
            near = (x > low - 1) & (x < high + 1)
            seam |= near[:, None] if axis == 0 else near
    return TileDifference(*(part.mean().item() for part in (difference, difference[seam], difference[~seam])))


def device_of(vqgan: VQGAN) -> torch.device:
    """Returns the device of the weights of a VQGAN."""
    return next(vqgan.parameters()).device


def seam_ratio(images: Tensor, rows: list[int], columns: list[int], factor: int) -> float:
    """Returns the mean absolute difference of neighbouring pixels across seams, relative to elsewhere; 1: no seams.

    images (B, C, H, W) of any dtype; each of `rows` and `columns` is the first pixel after a seam. Elsewhere means at
    other code borders, multiples of `factor` from a seam, since decoders leave a pattern within each code. NaN without
    seams, or without differences elsewhere.
    """
    sums, counts = [0.0, 0.0], [0, 0]  # elsewhere, at seams
    for pattern, seam_indices in (("b c h w -> h (b c w)", rows), ("b c h w -> w (b c h)", columns)):
        steps = rearrange(images.float(), pattern).diff(dim=0).abs()  # before indices 1, 2, ...
        step_sums = [0.0, *steps.sum(1, dtype=torch.float64).tolist()]
        phases = {index % factor for index in seam_indices}
        for index in range(1, len(step_sums)):
            if index % factor in phases:
                sums[index in seam_indices] += step_sums[index]
                counts[index in seam_indices] += steps.shape[1]
    if not all(counts) or not sums[0]:
        return float("nan")
    return sums[1] / counts[1] / (sums[0] / counts[0])
