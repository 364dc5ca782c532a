"""The log-variance head: shapes, bounds, and the mean of the likelihood."""

import math

import pytest
import torch

from vq.autoencoder import Decoder
from vq.config import VQGANConfig
from vq.likelihood import (
    INITIAL_LOG_VARIANCE,
    MAX_LOG_VARIANCE,
    MIN_LOG_VARIANCE,
    LogVarianceHead,
    build_head,
    reconstruct,
    soft_clamp,
)

CONFIG = VQGANConfig(nf=4, ch_mult=(1, 2), res_blocks=1, attn_resolutions=(4,), emb_dim=3, codebook_size=8)


@pytest.fixture(params=[1, 3])
def decoder(request):
    return Decoder(CONFIG, 8, request.param).eval()


def test_the_mean_is_the_decoders_own_image_not_clamped(decoder):
    vectors = 50 * torch.randn(2, 3, 4, 6)
    mean, features = reconstruct(decoder, vectors)
    assert torch.equal(mean, decoder(vectors)) and mean.abs().max() > 1
    assert features.shape == (2, 4, 8, 12) and torch.equal(decoder[-1](features), mean)


def test_the_last_layer_is_in_float32_under_autocast(decoder):
    vectors = torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        mean, features = reconstruct(decoder, vectors)
        assert torch.equal(mean, decoder(vectors))
    assert mean.dtype == features.dtype == torch.float32
    assert not torch.equal(mean, decoder(vectors))  # the other layers ran in bfloat16


def test_a_new_head_fits_its_decoder_and_starts_constant(decoder):
    mean, features = reconstruct(decoder, torch.randn(2, 3, 4, 6))
    log_variance = build_head(decoder)(features)
    assert log_variance.shape == mean.shape
    assert torch.allclose(log_variance, torch.full_like(log_variance, INITIAL_LOG_VARIANCE), atol=1e-2)


def test_the_head_has_the_size_of_the_reference():
    assert sum(p.numel() for p in LogVarianceHead(128, 3).parameters()) == 147_971


def test_a_heads_output_depends_on_a_3x3_neighbourhood():
    head = LogVarianceHead(4, 1)
    torch.nn.init.normal_(head[-1].weight)
    features = torch.randn(1, 4, 7, 7)
    other = features.clone()
    other[..., 3, 3] += 1
    changed = (head(features) != head(other))[0, 0]
    assert changed[2:5, 2:5].all() and changed.sum() == 9


def test_log_variances_are_bounded_smoothly():
    x = torch.linspace(-1000, 1000, 4001, requires_grad=True)
    y = soft_clamp(x)
    assert y.min() >= MIN_LOG_VARIANCE and y.max() <= MAX_LOG_VARIANCE + 1e-5
    assert (y.diff() >= 0).all()
    inside = (x > MIN_LOG_VARIANCE + 6) & (x < MAX_LOG_VARIANCE - 6)
    assert (y - x)[inside].abs().max() < 1e-2
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.isfinite().all() and (slope[(x > MIN_LOG_VARIANCE - 10) & (x < MAX_LOG_VARIANCE + 10)] > 1e-5).all()


def test_the_bounds_are_those_of_8_bit_images():
    level = 2 / 255
    assert math.exp(MIN_LOG_VARIANCE / 2) < level / 8 and math.exp(MAX_LOG_VARIANCE / 2) > 255 * level
