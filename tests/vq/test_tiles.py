"""Tiled encoding and decoding: blending weights, agreement with the whole image, and seams."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vq.autoencoder import VQGAN
from vq.config import VQGANConfig
from vq.tiles import (
    apply_tiled,
    decode_latents_tiled,
    decode_tiled,
    encode_latents_tiled,
    encode_tiled,
    seam_ratio,
    seams,
    tile_difference,
    tile_starts,
    tile_weights,
)

SMALL = VQGANConfig(nf=8, ch_mult=(1, 2, 2), res_blocks=1, attn_resolutions=(4,), emb_dim=6, codebook_size=16)
CASES = [(24, 8, 2), (23, 8, 2), (9, 8, 4), (40, 16, 4), (17, 16, 15), (31, 7, 3), (12, 4, 0), (5, 8, 2), (8, 8, 2)]


class Convolutions(nn.Module):
    """A VQGAN of convolutions only, which reach one code to each side; in float64."""

    def __init__(self, codes=32, dim=4, factor=4):
        super().__init__()
        self.config = VQGANConfig(ch_mult=(1, 1, 1))
        self.encoder = nn.Conv2d(3, dim, 3 * factor, stride=factor, padding=factor)
        self.decoder = nn.ConvTranspose2d(dim, 3, 3 * factor, stride=factor, padding=factor)
        self.table = nn.Parameter(torch.randn(codes, dim))
        self.shapes = []
        self.double()
        self.quantizer = SimpleNamespace(assign=self.assign)

    def latents(self, images):
        self.shapes.append(tuple(images.shape))
        return self.encoder(images)

    def assign(self, z):
        return torch.cdist(z.movedim(1, -1).flatten(1, -2), self.table).argmin(-1).view(len(z), *z.shape[2:])

    @torch.no_grad()
    def encode(self, images):
        return self.assign(self.latents(images))

    @torch.no_grad()
    def decode(self, ids):
        self.shapes.append(tuple(ids.shape))
        return self.decoder(self.table[ids].movedim(-1, 1))


def random_network():
    return VQGAN(SMALL, (16, 16)).eval()


def images(height, width, batch=2, dtype=torch.float32):
    return torch.rand(batch, 3, height, width, dtype=dtype) * 2 - 1


@pytest.mark.parametrize("size, tile, overlap", CASES)
def test_tiles_cover_an_axis_with_at_least_the_given_overlap(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile >= size and (len(starts) == 1) == (size <= tile)
    if len(starts) > 1:
        assert starts[-1] + tile == size
        overlaps = [before + tile - start for before, start in zip(starts, starts[1:], strict=False)]
        assert min(overlaps) >= overlap and max(overlaps) < tile
        shorter = (len(starts) - 1) * (tile - overlap) + overlap
        assert shorter < size  # no tile too many


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("size, tile, overlap", CASES)
def test_weights_sum_to_one_and_stay_within_their_tiles(size, tile, overlap, scale):
    weights = tile_weights(size, tile, overlap, scale)
    starts = tile_starts(size, tile, overlap)
    assert weights.shape == (len(starts), size * scale) and (weights >= 0).all()
    assert torch.allclose(weights.sum(0), torch.ones(size * scale, dtype=torch.float64), atol=1e-12)
    for start, weight in zip(starts, weights, strict=True):
        inside = torch.zeros(size * scale, dtype=torch.bool)
        inside[start * scale : (start + tile) * scale] = True
        assert not weight[~inside].any() and weight[inside].any()


def test_weights_change_linearly_in_the_middle_of_an_overlap():
    weights = tile_weights(12, 8, 4, 2)  # tiles at 0 and 4; they share 8 ... 16 of 24 values
    rising = [0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1]
    assert weights[1].tolist() == pytest.approx([0] * 8 + rising + [1] * 8)
    assert seams(12, 8, 4, 2) == [10, 12, 14]


@pytest.mark.parametrize("size, tile, overlap", [(9, 8, 4), (17, 16, 8), (12, 8, 2), (13, 8, 1)])
def test_two_tiles_are_treated_alike_however_much_they_share(size, tile, overlap):
    weights = tile_weights(size, tile, overlap, 4)
    assert len(weights) == 2 and torch.allclose(weights[0], weights[1].flip(0), atol=1e-12)


def test_the_border_of_an_image_does_not_fade():
    weights = tile_weights(40, 16, 8, 1)
    assert weights[0, 0] == weights[-1, -1] == 1
    assert seams(16, 16, 8, 4) == [] and (tile_weights(16, 16, 8, 4) == 1).all()


@pytest.mark.parametrize("size", [(12, 20), (9, 17), (3, 21), (12, 12)])
def test_tiles_of_convolutions_decode_as_the_whole(size):
    network = Convolutions()
    ids = torch.randint(32, (2, *size))
    full, tiled = network.decode(ids), decode_tiled(network, ids, 8, 4)
    assert tiled.dtype == torch.float64 and torch.allclose(tiled, full, rtol=0, atol=1e-12)


def test_an_overlap_too_short_for_the_convolutions_shows():
    network, ids = Convolutions(), torch.randint(32, (1, 20, 20))
    assert tile_starts(20, 8, 2) == [0, 6, 12]
    error = (decode_tiled(network, ids, 8, 2) - network.decode(ids)).abs()
    assert error.max() > 1e-3 and error[..., :24, :24].max() < 1e-12  # not where one tile is alone


@pytest.mark.parametrize("size", [(12, 20), (9, 17), (3, 21)])
def test_tiles_of_convolutions_encode_as_the_whole(size):
    network, x = Convolutions(), images(*(4 * side for side in size), dtype=torch.float64)
    blended = apply_tiled(network.encoder, x, 8, 4, scales=(4, 1))
    assert torch.allclose(blended, network.encoder(x), rtol=0, atol=1e-12)
    assert torch.equal(encode_tiled(network, x, 8, 4), network.encode(x))


def test_abutting_tiles_are_the_tiles_by_themselves():
    network, ids = random_network(), torch.randint(16, (1, 8, 8))
    tiled = decode_tiled(network, ids, 4, 0)
    for top in (0, 4):
        for left in (0, 4):
            part = network.decode(ids[:, top : top + 4, left : left + 4])
            assert torch.equal(tiled[..., 4 * top : 4 * top + 16, 4 * left : 4 * left + 16], part)


@pytest.mark.parametrize("height, width", [(16, 16), (16, 8), (4, 12)])
def test_an_image_of_one_tile_is_taken_whole(height, width):
    network, x = random_network(), images(height, width)
    ids = encode_tiled(network, x, 4, 1)
    assert ids.dtype == torch.int64 and torch.equal(ids, network.encode(x))
    assert torch.equal(decode_tiled(network, ids, 4, 1), network.decode(ids))


def test_latents_are_blended_before_they_become_codes():
    """The quantizer gets each position once, with the blended latents of the full grid."""
    network, inputs = Convolutions(), []
    network.quantizer = SimpleNamespace(assign=lambda z: inputs.append(z) or network.assign(z))
    x = images(48, 48, dtype=torch.float64)
    encode_tiled(network, x, 8, 4)
    (latents,) = inputs
    assert latents.shape == (2, 4, 12, 12)


def test_only_tiles_are_computed_and_as_many_at_once_as_asked():
    network = Convolutions()
    ids = torch.randint(32, (1, 20, 12))  # 4 x 2 tiles
    single = decode_tiled(network, ids, 8, 4)
    assert network.shapes == [(1, 8, 8)] * 8
    network.shapes.clear()
    batched = decode_tiled(network, ids, 8, 4, tiles_per_batch=3)
    assert network.shapes == [(3, 8, 8), (3, 8, 8), (2, 8, 8)]
    assert torch.allclose(single, batched, rtol=0, atol=1e-12)
    network.shapes.clear()
    x = images(80, 48, dtype=torch.float64)
    encode_tiled(network, x, 8, 4, tiles_per_batch=2)
    assert network.shapes == [(4, 3, 32, 32)] * 4


def test_latents_of_half_precision_are_blended_in_float32():
    half = apply_tiled(lambda part: part.bfloat16(), torch.rand(1, 1, 12, 12), 8, 4, scales=(1, 1))
    assert half.dtype == torch.float32


def test_nothing_asks_for_gradients():
    network, x = random_network(), images(32, 32)
    assert not decode_tiled(network, encode_tiled(network, x, 4, 1), 4, 1).requires_grad


@pytest.mark.parametrize("height, width", [(30, 32), (32, 31), (2, 32)])
def test_sizes_that_are_no_multiples_are_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width}.*multiples of 4"):
        encode_tiled(random_network(), images(height, width), 4, 1)


@pytest.mark.parametrize("tile, overlap", [(4, 4), (4, -1), (0, 0), (4, 7)])
def test_invalid_tiles_and_overlaps_are_rejected(tile, overlap):
    with pytest.raises(ValueError, match=f"got tiles of {tile} codes with an overlap of {overlap}"):
        decode_tiled(random_network(), torch.zeros(1, 8, 8, dtype=torch.long), tile, overlap)


def test_the_seam_ratio_is_that_of_the_differences():
    ramp = torch.arange(16.0).expand(1, 3, 16, 16).clone()  # each column 1 more than the one before, rows equal
    assert seam_ratio(ramp, [], [8], 4) == pytest.approx(1)
    ramp[..., 8:] += 2
    assert seam_ratio(ramp, [], [8], 4) == pytest.approx(3)
    assert seam_ratio(ramp, [], [8, 12], 4) == pytest.approx(2)
    assert seam_ratio(ramp.transpose(2, 3), [8], [], 4) == pytest.approx(3)
    assert seam_ratio((ramp * 10).to(torch.uint8), [], [8], 4) == pytest.approx(3)
    assert seam_ratio(ramp, [8], [8], 4) == pytest.approx((3 + 0) / 1)  # no row differs: 1.5 at seams, 0.5 elsewhere
    blocks = torch.zeros(1, 1, 1, 32)
    blocks[..., torch.arange(32) // 4 % 2 == 1] = 1  # visible boundaries between codes are not seams
    assert seam_ratio(blocks, [], [16], 4) == pytest.approx(1)


def test_a_ratio_of_nothing_is_no_number():
    picture = images(16, 16)
    assert torch.tensor(seam_ratio(picture, [], [], 4)).isnan()
    assert torch.tensor(seam_ratio(torch.zeros(1, 3, 16, 16), [8], [8], 4)).isnan()


@pytest.mark.parametrize("seed", range(4))
def test_abutting_tiles_have_seams_that_blended_ones_have_not(seed):
    torch.manual_seed(seed)
    # one code everywhere: any variation comes from a border
    network, ids = random_network(), torch.full((1, 16, 16), 3)

    def seam(overlap):
        positions = seams(16, 8, overlap, 4)
        return seam_ratio(decode_tiled(network, ids, 8, overlap), positions, positions, 4)

    assert seam(0) > 1.05 * seam(4)


def test_a_constant_per_tile_shows_in_abutting_tiles_only():
    """As with group norm, each tile is shifted to mean 0."""
    surface = torch.linspace(-1, 1, 96).expand(1, 1, 96, 96)

    def seam(overlap):
        tiled = apply_tiled(lambda part: part - part.mean(), surface, 8, overlap, scales=(4, 4))
        positions = seams(24, 8, overlap, 4)
        return seam_ratio(tiled, positions, positions, 4)

    assert seam(0) > 10 and seam(4) < 2


@pytest.mark.parametrize("size", [(12, 20), (9, 17), (3, 21)])
def test_latents_of_convolutions_are_those_of_the_whole(size):
    network, x = Convolutions(), images(*(4 * side for side in size), dtype=torch.float64)
    latents = encode_latents_tiled(network.encoder, x, 4, 8, 4)
    assert torch.allclose(latents, network.encoder(x), rtol=0, atol=1e-12)
    tiled = decode_latents_tiled(network.decoder, latents, 4, 8, 4)
    assert not tiled.requires_grad and torch.allclose(tiled, network.decoder(latents), rtol=0, atol=1e-12)


def test_latents_of_sizes_that_are_no_multiples_are_refused():
    with pytest.raises(ValueError, match="got images of 30x32 pixels, wanted multiples of 4"):
        encode_latents_tiled(Convolutions().encoder, images(30, 32), 4, 4, 1)


def test_the_difference_at_seams_is_that_of_the_blends():
    whole = torch.zeros(1, 2, 24, 24)
    tiled = whole.clone()
    tiled[..., 9:15, :] = 3  # tiles of 8 codes share codes 4 to 8: they are blended in values 10 to 14
    by_rows = tile_difference(tiled, whole, 8, 4, 2)
    seam = (24 * 6 + 18 * 6, 24 * 6)  # values of both seams, and of the one that differs
    assert by_rows == pytest.approx((3 * 6 / 24, 3 * seam[1] / seam[0], 0.0))
    assert tile_difference(tiled.mT, whole, 8, 4, 2) == by_rows
    tiled[:], tiled[..., 0, 0] = 0, 1
    assert tile_difference(tiled, whole, 8, 4, 2) == pytest.approx((1 / 576, 0.0, 1 / (576 - seam[0])))
    assert torch.tensor(tile_difference(tiled, whole, 12, 4, 2).at_seams).isnan()  # a single tile
