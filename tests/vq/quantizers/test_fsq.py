"""FSQ: levels, ids and vectors, and the gradient through the bound."""

import math

import pytest
import torch

from vq.config import VQGANConfig
from vq.quantizer import make_quantizer
from vq.quantizers import fsq
from vq.quantizers.fsq import FSQQuantizer, bound

LEVELS = (8, 5, 2, 3)


def as_grid(ids):
    return ids.view(1, 1, -1)


def z_for(quantizer, batch=4, scale=3.0, dtype=torch.float32):
    return (scale * torch.randn(batch, quantizer.dim, 5, 6)).to(dtype)


@pytest.mark.parametrize("levels", range(2, 17))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_levels_are_reached_and_none_beyond(levels, dtype):
    z = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([-1e30, -1e4, 1e4, 1e30, math.inf, -math.inf])])
    z = z.to(dtype).view(1, 1, 1, -1)
    quantizer = FSQQuantizer((levels,))
    codes = quantizer(z)
    assert codes.ids.unique().tolist() == list(range(levels))
    h = levels // 2
    assert codes.vectors.unique().tolist() == pytest.approx([(k - h) / h for k in range(levels)])
    assert codes.vectors.min() == -1 and codes.vectors.max() == pytest.approx(1 if levels % 2 else 1 - 1 / h)
    order = z.double().flatten().argsort(stable=True)
    assert (codes.ids.flatten()[order].diff() >= 0).all()


@pytest.mark.parametrize("levels", range(2, 17))
def test_bounds_keep_zero_central_and_ends_within_half_a_step(levels):
    zero, ends = torch.zeros(1), torch.tensor([-1e3, 1e3])
    middle = bound(zero.double(), levels).item()
    assert abs(middle) < (0.05 if levels == 2 else 1e-3)
    assert FSQQuantizer((levels,)).assign(zero.view(1, 1, 1, 1)).item() == levels // 2
    low, high = bound(ends.double(), levels).tolist()
    assert (high - low) == pytest.approx((levels - 1) * 0.999)
    assert -(levels // 2) < low < high < (levels - 1) // 2


def test_the_bound_of_the_appendix():
    """half tanh(z + tan(1/2 / half)) - 1/2 for 8 levels, 1.998 tanh(z) for 5."""
    z = torch.tensor([-2.0, -0.1, 0.3, 1.5], dtype=torch.float64)
    assert torch.allclose(bound(z, 5), 1.998 * z.tanh(), rtol=1e-12)
    half = 3.4965
    assert torch.allclose(bound(z, 8), half * (z + math.tan(0.5 / half)).tanh() - 0.5, rtol=1e-12)


def test_ids_and_vectors_are_inverse_for_all_codes():
    quantizer = FSQQuantizer(LEVELS)
    assert (quantizer.codebook_size, quantizer.dim) == (240, 4)
    ids = as_grid(torch.arange(240))
    vectors = quantizer.vectors(ids)
    assert torch.equal(quantizer.ids_of(vectors), ids)
    assert vectors.movedim(1, -1).flatten(0, 2).unique(dim=0).shape == (240, 4)
    assert vectors.dtype == torch.float32 and vectors.abs().max() == 1


def test_the_first_number_is_the_last_digit():
    quantizer = FSQQuantizer(LEVELS)
    ids = as_grid(torch.tensor([0, 1, 8, 40, 80, 3 + 8 * (4 + 5 * (1 + 2 * 2))]))
    expected = [[-1, -1, -1, -1], [-3 / 4, -1, -1, -1], [-1, -1 / 2, -1, -1], [-1, -1, 0, -1], [-1, -1, -1, 0],
                [-1 / 4, 1, 0, 1]]  # fmt: skip
    assert quantizer.vectors(ids)[0, :, 0].t().tolist() == expected


def test_every_code_is_chosen_by_some_vector_and_decoded_exactly():
    quantizer = FSQQuantizer((4, 3, 5))
    z = z_for(quantizer, 400, 1.0)
    codes = quantizer(z)
    assert len(codes.ids.unique()) == 60
    assert torch.equal(codes.vectors, quantizer.vectors(codes.ids))
    assert torch.equal(codes.ids, quantizer.assign(z)) and torch.equal(codes.ids, quantizer.ids_of(codes.vectors))
    assert torch.equal(codes.loss, torch.zeros(400)) and codes.metrics == {}


@pytest.mark.parametrize("levels", [(8, 5), (2, 3, 4)])
def test_the_code_of_any_vector_is_the_nearest(levels):
    quantizer = FSQQuantizer(levels)
    codebook = quantizer.vectors(as_grid(torch.arange(quantizer.codebook_size)))[0, :, 0].t()  # (K, D)
    vectors = 1.5 * torch.randn(5, quantizer.dim, 6, 7)
    distances = (vectors[:, None] - codebook[:, :, None, None]).square().sum(2)
    assert torch.equal(quantizer.ids_of(vectors), distances.argmin(1))
    assert torch.equal(quantizer.ids_of(100 * vectors.sign()), quantizer.ids_of(vectors.sign()))


def test_the_gradient_is_that_of_the_bound():
    quantizer = FSQQuantizer(LEVELS)
    z = z_for(quantizer, dtype=torch.float64).requires_grad_()
    codes = quantizer(z)
    output_gradient = torch.randn_like(z)
    codes.vectors.backward(output_gradient)
    levels = torch.tensor(LEVELS, dtype=torch.float64).view(-1, 1, 1)
    half, offset = (levels - 1) / 2 * 0.999, (levels % 2 == 0) / 2
    slope = half / (z + (offset / half).tan()).cosh().square() / (levels // 2)
    assert torch.allclose(z.grad, output_gradient * slope, rtol=1e-9, atol=1e-15)
    assert codes.vectors.dtype == codes.loss.dtype == torch.float64


def test_the_loss_is_nothing_that_training_can_go_through():
    z = z_for(FSQQuantizer(LEVELS)).requires_grad_()
    loss = FSQQuantizer(LEVELS)(z).loss
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(4)) and torch.equal(z.grad, torch.zeros_like(z))


def test_large_and_half_precision_vectors_are_finite():
    quantizer = FSQQuantizer(LEVELS)
    for z in (z_for(quantizer, scale=1e30), z_for(quantizer, dtype=torch.bfloat16)):
        z.requires_grad_()
        codes = quantizer(z)
        codes.vectors.sum().backward()
        assert codes.vectors.isfinite().all() and codes.vectors.dtype == torch.float32 and z.grad.isfinite().all()
        assert 0 <= codes.ids.min() <= codes.ids.max() < 240


def test_the_config_gives_the_levels():
    quantizer = make_quantizer(VQGANConfig(quantizer="fsq", codebook_size=512))
    assert isinstance(quantizer, FSQQuantizer) and quantizer.levels == (8, 8, 8)
    options = fsq.Config(fsq_levels=(8, 5, 5, 5))
    quantizer = make_quantizer(VQGANConfig(quantizer="fsq", codebook_size=1000, quantizer_config=options))
    assert quantizer.levels == (8, 5, 5, 5) and quantizer.codebook_size == 1000
    assert not list(quantizer.parameters()) and not quantizer.state_dict()
