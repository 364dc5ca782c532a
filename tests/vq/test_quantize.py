"""The nearest-code quantizer: its choice, its two gradients, how codes are counted."""

import math

import pytest
import torch

from vq.quantize import NearestQuantizer, perplexity, usage

K, E, BETA = 11, 5, 0.25


def quantizer_and_vectors(batch=3):
    generator = torch.Generator().manual_seed(0)
    quantizer = NearestQuantizer(K, E, BETA)
    quantizer.codebook.weight.data = torch.randn(K, E, generator=generator)
    return quantizer, torch.randn(batch, E, 4, 3, generator=generator).requires_grad_()


def brute_force(quantizer, z):
    distances = (z[:, None] - quantizer.codebook.weight[:, :, None, None]).square().sum(2)  # (B, K, h, w)
    return distances.argmin(1)


def test_the_code_is_the_nearest():
    quantizer, z = quantizer_and_vectors(50)
    codes = quantizer(z)
    assert torch.equal(codes.ids, brute_force(quantizer, z)) and torch.equal(codes.ids, quantizer.nearest(z))
    assert torch.allclose(codes.vectors, quantizer.vectors(codes.ids), atol=1e-6)
    assert len(codes.ids.unique()) == K


def test_codes_are_their_own_nearest():
    quantizer, _ = quantizer_and_vectors()
    ids = torch.randint(0, K, (2, 4, 3))
    assert torch.equal(quantizer.nearest(quantizer.vectors(ids)), ids)
    assert torch.equal(quantizer.vectors(ids)[1, :, 2, 0], quantizer.codebook.weight[ids[1, 2, 0]])


def test_distances_are_float32_under_autocast():
    quantizer, z = quantizer_and_vectors(50)
    quantizer.codebook.weight.data = 3 + quantizer.codebook.weight.data / 10
    z = 3 + z.detach() / 10
    with torch.autocast("cpu", torch.bfloat16):
        flat, codes = z.movedim(1, -1), quantizer.codebook.weight
        rounded = (codes.square().sum(1) - 2 * flat @ codes.t()).argmin(-1)
        assert torch.equal(quantizer(z).ids, brute_force(quantizer, z))
    assert (rounded != brute_force(quantizer, z)).float().mean() > 0.1


def test_the_gradient_passes_straight_through():
    quantizer, z = quantizer_and_vectors()
    of_output = torch.randn(z.shape)
    quantizer(z).vectors.backward(of_output)
    assert torch.equal(z.grad, of_output)
    assert quantizer.codebook.weight.grad is None


def gradients(loss, z, quantizer):
    return torch.autograd.grad(loss, (z, quantizer.codebook.weight))


def test_beta_weighs_the_commitment_and_one_the_codebook():
    quantizer, z = quantizer_and_vectors()
    codes, e, n = quantizer(z), quantizer.vectors(brute_force(quantizer, z)), z[0].numel()
    of_z, of_codebook = gradients(codes.loss.sum(), z, quantizer)
    pull = 2 * (e - z).detach() / n  # (B, E, h, w)
    wanted = torch.zeros(K, E).index_add_(0, codes.ids.flatten(), pull.movedim(1, -1).flatten(0, 2))
    assert torch.allclose(of_z, -BETA * pull, atol=1e-8)
    assert torch.allclose(of_codebook, wanted, atol=1e-7)

    swapped = ((e.detach() - z) ** 2 + BETA * (e - z.detach()) ** 2).sum() / n  # as in taming-transformers
    of_z, of_codebook = gradients(swapped, z, quantizer)
    assert torch.allclose(of_z, -pull) and torch.allclose(of_codebook, BETA * wanted, atol=1e-7)


def test_the_loss_is_per_example():
    quantizer, z = quantizer_and_vectors()
    e = quantizer.vectors(quantizer.nearest(z))
    assert torch.allclose(quantizer(z).loss, (1 + BETA) * (z - e).square().mean((1, 2, 3)))


def test_every_choice_is_counted():
    quantizer, z = quantizer_and_vectors()
    codes = quantizer(z)
    assert torch.equal(codes.counts, codes.ids.flatten().bincount(minlength=K).float())


def test_codes_start_small_and_uniform():
    weight = NearestQuantizer(64, 100).codebook.weight.detach()
    assert weight.abs().max() <= 1 / 64 and weight.std() == pytest.approx(1 / 64 / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(
    "counts, share, effective",
    [
        ([5, 5, 5, 5], 1, 4),
        ([0, 7, 0, 0], 1 / 4, 1),
        ([3, 0, 3, 0], 1 / 2, 2),
        ([4, 2, 2, 0], 3 / 4, 2**1.5),
    ],
)
def test_usage_and_perplexity_in_closed_form(counts, share, effective):
    counts = torch.tensor(counts, dtype=torch.float32)
    assert usage(counts) == pytest.approx(share)
    assert perplexity(counts) == pytest.approx(effective)
