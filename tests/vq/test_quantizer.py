"""Operations that quantizers share, and the nearest-code quantizer: assignment, gradients, code statistics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.peak_tensor import LargestTensor
from models.sdpa import upcast
from vq import quantizer
from vq.config import VQGANConfig
from vq.quantizer import argmax_linear, count_codes, lookup, make_quantizer, nearest, perplexity, usage
from vq.quantizers import SingleProcess
from vq.quantizers.nearest import Config, NearestQuantizer

K, D, BETA = 11, 5, 0.25


def quantizer_and_vectors(batch=3, **options):
    generator = torch.Generator().manual_seed(0)
    quantizer = NearestQuantizer(K, D, BETA, **options)
    quantizer.codebook.weight.data = torch.randn(K, D, generator=generator)
    return quantizer, torch.randn(batch, D, 4, 3, generator=generator).requires_grad_()


def brute_force(z, codebook):
    distances = (z[:, None] - codebook[:, :, None, None]).square().sum(2)  # (B, K, h, w)
    return distances.argmin(1)


def test_the_code_is_the_nearest():
    quantizer, z = quantizer_and_vectors(50)
    codes = quantizer(z)
    assert torch.equal(codes.ids, brute_force(z, quantizer.codebook.weight))
    assert torch.equal(codes.ids, quantizer.assign(z)) and codes.ids.dtype == torch.int64
    assert torch.allclose(codes.vectors, quantizer.vectors(codes.ids), atol=1e-6)
    assert len(codes.ids.unique()) == K


def test_codes_are_their_own_nearest():
    quantizer, _ = quantizer_and_vectors()
    ids = torch.randint(0, K, (2, 4, 3))
    assert torch.equal(quantizer.ids_of(quantizer.vectors(ids)), ids)
    assert torch.equal(quantizer.vectors(ids)[1, :, 2, 0], quantizer.codebook.weight[ids[1, 2, 0]])


@given(
    size=st.integers(1, 40), max_scores=st.integers(1, 200), height=st.integers(1, 6), width=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_a_part_of_the_positions_at_a_time_changes_nothing(size, max_scores, height, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, 3, height, width, generator=generator, dtype=dtype)
    codebook = torch.randn(size, 3, generator=generator, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer, "MAX_SCORES", max_scores)
        ids = nearest(z, codebook)
    distances = (z[:, None] - codebook[:, :, None, None]).square().sum(2)
    selected = distances.gather(1, ids[:, None]).squeeze(1)
    assert torch.allclose(selected, distances.amin(1), atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_not_all_distances_are_in_memory_at_once(monkeypatch):
    z, codebook = torch.randn(1, 2, 64, 64), torch.randn(2**10, 2)
    monkeypatch.setattr(quantizer, "MAX_SCORES", 2**14)
    with LargestTensor() as largest:
        nearest(z, codebook)
    assert largest.made == 2**14 < z[:, 0].numel() * len(codebook) / 100


def test_distances_are_few_by_themselves_where_codes_are_many():
    assert 4 * quantizer.MAX_SCORES <= 2**26 and quantizer.MAX_SCORES // 2**16 >= 64  # bytes; positions


def test_the_largest_linear_function():
    z, weight, bias = torch.randn(2, D, 3, 4), torch.randn(K, D), 3 * torch.randn(K)
    assert torch.equal(
        argmax_linear(z, weight, bias), torch.nn.functional.conv2d(z, weight[:, :, None, None], bias).argmax(1)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_upcast(dtype):
    z = torch.randn(2, D, 3, 4).to(dtype)
    assert torch.equal(upcast(z), z) and upcast(z).dtype == max(dtype, torch.float32, key=lambda t: t.itemsize)
    assert torch.equal(nearest(z, torch.eye(D)), nearest(z.double(), torch.eye(D).double()))


def test_float64_is_not_rounded():
    codebook = torch.tensor([[1.0], [1 + 1e-6]], dtype=torch.float64)
    ids = torch.tensor([[[0, 1, 0, 1, 1]]])
    assert torch.equal(nearest(lookup(ids, codebook), codebook), ids)
    midpoints = torch.tensor([[[[1e-5 - 1e-9, 1e-5 + 1e-9]]]], dtype=torch.float64)
    assert nearest(midpoints, torch.tensor([[0.0], [2e-5]])).tolist() == [[[0, 1]]]
    quantizer, z = quantizer_and_vectors()
    codes = quantizer.double()(z.double())
    assert codes.vectors.dtype == codes.loss.dtype == torch.float64


def test_distances_are_float32_under_autocast():
    quantizer, z = quantizer_and_vectors(50)
    quantizer.codebook.weight.data = 3 + quantizer.codebook.weight.data / 10
    z = 3 + z.detach() / 10
    with torch.autocast("cpu", torch.bfloat16):
        flat, codes = z.movedim(1, -1), quantizer.codebook.weight
        rounded = (codes.square().sum(1) - 2 * flat @ codes.t()).argmin(-1)
        assert torch.equal(quantizer(z).ids, brute_force(z, codes))
    assert (rounded != brute_force(z, codes)).float().mean() > 0.1


def test_products_have_all_bits_and_the_setting_is_put_back(monkeypatch):
    precisions, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a: precisions.append(torch.get_float32_matmul_precision()) or addmm(*a))
    torch.set_float32_matmul_precision("high")
    try:
        nearest(torch.randn(1, D, 2, 2), torch.randn(K, D))
        assert precisions == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_gradient_passes_straight_through():
    quantizer, z = quantizer_and_vectors()
    output_gradient = torch.randn(z.shape)
    quantizer(z).vectors.backward(output_gradient)
    assert torch.equal(z.grad, output_gradient)
    assert quantizer.codebook.weight.grad is None


@pytest.mark.parametrize("legacy", [False, True])
def test_beta_weighs_the_commitment_and_one_the_codebook(legacy):
    """With `legacy_beta`, as in taming-transformers, the two are swapped."""
    quantizer, z = quantizer_and_vectors(legacy_beta=legacy)
    codes, n = quantizer(z), z[0].numel()
    e = quantizer.vectors(brute_force(z, quantizer.codebook.weight))
    codebook_weight, commitment_weight = (BETA, 1) if legacy else (1, BETA)
    grad_z, grad_weight = torch.autograd.grad(codes.loss.sum(), (z, quantizer.codebook.weight))
    pull = 2 * (e - z).detach() / n  # (B, D, h, w)
    summed = torch.zeros(K, D).index_add_(0, codes.ids.flatten(), pull.movedim(1, -1).flatten(0, 2))
    assert torch.allclose(grad_z, -commitment_weight * pull, atol=1e-7)
    assert torch.allclose(grad_weight, codebook_weight * summed, atol=1e-7)


def test_the_loss_is_per_example():
    quantizer, z = quantizer_and_vectors()
    commitment = (z - quantizer.vectors(quantizer.assign(z))).square().mean((1, 2, 3))
    codes = quantizer(z)
    assert torch.allclose(codes.loss, (1 + BETA) * commitment)
    assert torch.allclose(codes.metrics["commitment"], commitment.mean())


def test_codes_start_small_and_uniform():
    weight = NearestQuantizer(64, 100).codebook.weight.detach()
    assert weight.abs().max() <= 1 / 64 and weight.std() == pytest.approx(1 / 64 / math.sqrt(3), rel=0.05)


def test_the_config_names_the_quantizer():
    quantizer = make_quantizer(
        VQGANConfig(codebook_size=7, emb_dim=3, quantizer_config=Config(beta=0.5, legacy_beta=True))
    )
    assert isinstance(quantizer, NearestQuantizer) and (quantizer.codebook_size, quantizer.dim) == (7, 3)
    assert (quantizer.codebook_weight, quantizer.commitment_weight) == (0.5, 1)
    quantizer = make_quantizer(VQGANConfig(quantizer_config=Config(beta=0.5)))
    assert (quantizer.codebook_weight, quantizer.commitment_weight) == (1, 0.5)


def test_sum_and_mean_of_a_single_process_are_identities():
    x = torch.randn(3)
    assert torch.equal(SingleProcess().sum(x), x) and torch.equal(SingleProcess().mean(x), x)


def test_every_assignment_is_counted():
    ids = torch.tensor([[[0, 3, 3], [1, 3, 0]]])
    assert count_codes(ids, 5).tolist() == [2, 1, 0, 3, 0] and count_codes(ids, 5).dtype == torch.float32


@pytest.mark.parametrize(
    "counts, fraction, effective",
    [
        ([5, 5, 5, 5], 1, 4),
        ([0, 7, 0, 0], 1 / 4, 1),
        ([3, 0, 3, 0], 1 / 2, 2),
        ([4, 2, 2, 0], 3 / 4, 2**1.5),
    ],
)
def test_usage_and_perplexity_in_closed_form(counts, fraction, effective):
    counts = torch.tensor(counts, dtype=torch.float32)
    assert usage(counts) == pytest.approx(fraction)
    assert perplexity(counts) == pytest.approx(effective)
