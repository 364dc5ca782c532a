"""The continuous autoencoder: extreme posteriors, and where tiles of large images differ from the whole."""

import pytest
import torch

from vq.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vq.tiles import decode_latents_tiled, encode_latents_tiled, tile_difference


@torch.no_grad()
def test_log_variances_are_clamped():
    network = AutoencoderKL(AutoencoderKLConfig(channels=8, channel_mults=(1,), res_blocks=1, latent_channels=2))
    network.quant_conv.weight.zero_()
    network.quant_conv.bias.copy_(torch.tensor([-99.0, 99.0, -99.0, 99.0]))
    mean, logvar = network.posterior(torch.zeros(1, 3, 4, 4))
    assert (mean == torch.tensor([-99.0, 99.0]).view(1, 2, 1, 1)).all()
    assert (logvar == torch.tensor([-30.0, 20.0]).view(1, 2, 1, 1)).all()


@torch.no_grad()
def test_latents_far_right_and_below_see_zeros_beyond_the_image():
    """Downsampling pads on the right and below alone: (0, 1, 0, 1) as in the paper's code."""
    network = AutoencoderKL(AutoencoderKLConfig(channels=8, channel_mults=(1, 1), res_blocks=1))
    down = network.encoder.down[0][-1]
    x = torch.rand(1, 8, 6, 8)
    padded = torch.zeros(1, 8, 7, 9)
    padded[..., :6, :8] = x
    windows = padded.unfold(2, 3, 2).unfold(3, 3, 2)  # (1, 8, 3, 4, 3, 3)
    wanted = torch.einsum("bchwij,ocij->bohw", windows, down.conv.weight) + down.conv.bias[:, None, None]
    assert torch.allclose(down(x), wanted, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_tiles_differ_no_more_at_seams_than_twice_inside(seed):
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
