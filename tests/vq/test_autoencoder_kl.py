"""The continuous autoencoder: where tiles of large images differ from the whole."""

import pytest
import torch

from vq.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vq.tiles import decode_latents_tiled, encode_latents_tiled, tile_difference


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_tiles_of_a_continuous_autoencoder_differ_no_more_at_seams(seed):
    """Group norm and attention see a tile alone, so tiles differ inside too; where they abut, seams differ most."""
    torch.manual_seed(seed)
    network = AutoencoderKL(AutoencoderKLConfig(channels=8, channel_mults=(1, 2), res_blocks=1)).eval()
    x, factor = torch.rand(1, 3, 48, 64) * 2 - 1, network.config.factor

    def differences(overlap):
        latents, whole = network.posterior(x).mean, network(x)
        tiled = encode_latents_tiled(lambda part: network.posterior(part).mean, x, factor, 16, overlap)
        yield tile_difference(tiled, latents, 16, overlap, 1)
        tiled = decode_latents_tiled(network.decode, latents, factor, 16, overlap)
        yield tile_difference(tiled, whole, 16, overlap, factor)

    for blended, abutting in zip(differences(8), differences(0), strict=True):
        assert 0 < blended.at_seams < 2 * blended.inside
        assert abutting.at_seams / abutting.inside > blended.at_seams / blended.inside
        assert abutting.mean > 1.2 * blended.mean
