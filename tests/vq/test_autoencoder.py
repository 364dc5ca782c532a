"""The VQGAN autoencoder: its size, its shapes, and that its parts agree."""

import pytest
import torch

from models.blocks import AttentionBlock, Downsample, ResBlock, Upsample, count_parameters
from vq.autoencoder import VQGAN, Decoder
from vq.config import VQGANConfig

SMALL = VQGANConfig(nf=8, ch_mult=(1, 2, 2), res_blocks=1, attn_resolutions=(4,), emb_dim=6, codebook_size=16)


def autoencoder(config=SMALL, img_size=16, n_channels=3):
    return VQGAN(config, img_size, n_channels)


def images(batch=2, channels=3, side=16):
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def count(network, kind):
    return sum(isinstance(m, kind) for m in network.modules())


def test_the_size_is_the_published_one_less_convolutions_never_used():
    with torch.device("meta"):
        network = VQGAN(VQGANConfig(), img_size=256)

    def unused(channels):
        """A 1 x 1 convolution: the reference keeps one in every ResBlock, and uses it where the width changes."""
        return channels**2 + channels

    encoder, decoder = 30_349_568, 35_168_262 - 147_971  # without the head for a learned variance
    assert count_parameters(network.encoder) == encoder - 4 * unused(128) - 3 * unused(256) - 3 * unused(512)
    assert count_parameters(network.decoder) == decoder - 3 * unused(128) - 3 * unused(256) - 4 * unused(512)
    assert count_parameters(network.quantizer) == 262_144


def test_levels_have_their_blocks_and_attention_stands_at_its_resolutions():
    network = autoencoder(VQGANConfig(nf=8, ch_mult=(1, 2, 2), res_blocks=3, attn_resolutions=(8, 4), emb_dim=6))
    seen = []
    for side, resize in [(network.encoder, Downsample), (network.decoder, Upsample)]:
        assert count(side, ResBlock) == 3 * 3 + 2  # two in the middle
        assert count(side, resize) == 2
        for block in side:
            if isinstance(block, AttentionBlock):
                block.register_forward_hook(lambda block, args, out: seen.append(out.shape[-1]))
    network(images())
    assert seen == [8] * 3 + [4] * 4 + [4] * 4 + [8] * 3  # one in each middle


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ch_mult, grid", [((1,), 16), ((1, 2), 8), ((1, 2, 2), 4)])
def test_shapes_make_the_round_trip(channels, ch_mult, grid):
    config = VQGANConfig(nf=8, ch_mult=ch_mult, res_blocks=1, attn_resolutions=(), emb_dim=6, codebook_size=16)
    network = autoencoder(config, 16, channels)
    x = images(channels=channels)
    reconstruction, codes = network(x)
    assert network.grid == (grid, grid) and codes.ids.shape == (2, grid, grid) and codes.vectors.shape[1] == 6
    assert reconstruction.shape == network.decode(network.encode(x)).shape == x.shape


def test_encode_and_decode_agree_with_forward():
    network, x = autoencoder(), images()
    reconstruction, codes = network(x)
    assert torch.equal(network.encode(x), codes.ids)
    assert torch.allclose(network.decode(codes.ids), reconstruction.clamp(-1, 1), atol=1e-5)
    assert not network.decode(codes.ids).requires_grad and reconstruction.requires_grad


def test_decoded_images_stay_in_their_range():
    network = autoencoder()
    network.decoder[-1].bias.data = torch.tensor([5.0, -5.0, 0.0])
    out = network.decode(network.encode(images()))
    assert (out[:, 0] == 1).all() and (out[:, 1] == -1).all() and (out[:, 2].abs() < 1).any()


def test_the_reconstruction_trains_the_encoder_and_not_the_codebook():
    network = autoencoder()
    network(images())[0].square().mean().backward()
    assert all(p.grad.any() for p in network.encoder.parameters())
    assert network.quantizer.codebook.weight.grad is None


def test_every_weight_is_trained():
    network = autoencoder()
    reconstruction, codes = network(images())
    (reconstruction.square().mean() + codes.loss.mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_the_last_layer_makes_the_pixels():
    decoder = autoencoder().decoder
    assert isinstance(decoder, Decoder) and decoder.last_layer is decoder[-1].weight
    assert decoder.last_layer.shape == (3, 8, 3, 3)


@pytest.mark.parametrize("img_size, grid", [(256, 16), (32, 2), (16, 1)])
def test_the_grid_of_an_image(img_size, grid):
    assert VQGANConfig().factor == 16 and VQGANConfig().grid(img_size) == (grid, grid)


@pytest.mark.parametrize("img_size", [8, 0, 100, 250])
def test_an_image_that_does_not_divide_is_refused(img_size):
    with pytest.raises(ValueError, match=f"got img_size {img_size} for 5 levels, wanted a multiple of 16"):
        VQGANConfig().grid(img_size)


@pytest.mark.parametrize(
    "wrong", [{"ch_mult": ()}, {"ch_mult": (1, 0)}, {"nf": 0}, {"res_blocks": 0}, {"emb_dim": 0}, {"codebook_size": 0}]
)
def test_a_config_without_sizes_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"got {name} .*--{name}"):
        VQGANConfig(**wrong)
