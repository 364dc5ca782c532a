"""Tiny autoencoders: a block by its formula, ranges of images, and bounded latents."""

import pytest
import torch
import torch.nn.functional as F

from vq.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig, TinyBlock


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return TinyAutoencoder(TinyAutoencoderConfig(channels=8, latent_channels=5, middle_norm=True))


@torch.no_grad()
def test_a_block_with_a_norm_is_that_of_the_formula():
    """Of four groups of channels, each is normalised by its statistics over all positions."""
    torch.manual_seed(0)
    block, x = TinyBlock(4, norm=True), torch.randn(2, 4, 5, 6)
    weights = dict(block.named_parameters())
    wide = F.conv2d(x, weights["pool.0.weight"]).view(2, 4, -1)  # 16 channels in 4 groups
    normal = (wide - wide.mean(2, keepdim=True)) / (wide.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    y = x + F.conv2d(normal.view(2, 16, 5, 6).relu(), weights["pool.3.weight"])
    h = y
    for index in (0, 2, 4):
        h = F.conv2d(h, weights[f"conv.{index}.weight"], weights[f"conv.{index}.bias"], padding=1)
        h = h.relu() if index < 4 else h
    assert torch.allclose(block(x), (h + y).relu(), atol=1e-5)


@torch.no_grad()
def test_the_encoder_sees_images_between_0_and_1(network):
    for value, seen in ((-1, 0.0), (0, 0.5), (1, 1.0)):
        images = torch.full((1, 3, 8, 16), float(value))
        assert torch.equal(network.encode(images), network.encoder(torch.full_like(images, seen)))


@torch.no_grad()
def test_decoded_images_are_between_minus_1_and_1(network):
    latents = torch.randn(2, 5, 3, 2)
    images, raw = network.decode(latents), network.decoder(latents)
    assert images.shape == (2, 3, 24, 16) and images.min() >= -1 and images.max() <= 1
    inside = (raw > 0) & (raw < 1)
    assert 0 < inside.float().mean() and torch.allclose(images[inside], 2 * raw[inside] - 1)
    assert (images[raw <= 0] == -1).all() and (images[raw >= 1] == 1).all()


@torch.no_grad()
def test_latents_are_bounded_by_a_soft_clamp(network):
    latents, (clamp, *rest) = torch.linspace(-9, 9, 30).view(1, 5, 2, 3), network.decoder
    assert torch.allclose(clamp(latents), 3 * torch.tanh(latents / 3))
    assert torch.equal(network.decoder(latents * 1e6), torch.nn.Sequential(*rest)(3 * latents.sign()))
