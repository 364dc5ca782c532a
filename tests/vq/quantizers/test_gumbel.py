"""Gumbel-softmax codes: probabilities, temperature, decoded vectors and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion.rng import Streams
from vq.config import VQGANConfig
from vq.quantizer import make_quantizer
from vq.quantizers import StepContext, gumbel
from vq.quantizers.gumbel import GumbelQuantizer

K, D, STEPS = 7, 3, 1000


def quantizer_and_vectors(batch=3, **options):
    quantizer = GumbelQuantizer(K, D, kl_weight=0.2, decay_steps=STEPS, **options).double()
    quantizer.logits.weight.data *= 3
    return quantizer, torch.randn(batch, D, 4, 5, dtype=torch.float64).requires_grad_()


class FixedRng:
    """An rng with fixed uniform numbers."""

    def __init__(self, u):
        self.u = u

    def uniform(self, shape):
        assert shape == tuple(self.u.shape)
        return self.u


def context(u, step=STEPS // 4):
    return StepContext(step, rng=FixedRng(u))


def logits_of(quantizer, z):
    return F.conv2d(z, quantizer.logits.weight, quantizer.logits.bias).movedim(1, -1)  # (B, h, w, K)


def gumbel_softmax(quantizer, z, u, tau):
    g = -torch.log(-torch.log(u))
    return ((logits_of(quantizer, z) + g) / tau).softmax(-1)


def mean_vectors(quantizer, y):
    return torch.einsum("bhwk,kd->bdhw", y, quantizer.codebook.weight)


def test_the_likeliest_code_without_training():
    quantizer, z = quantizer_and_vectors(20)
    codes, ids = quantizer(z), logits_of(quantizer, z).argmax(-1)
    assert torch.equal(codes.ids, ids) and torch.equal(quantizer.assign(z), ids) and len(ids.unique()) == K
    assert torch.equal(codes.vectors, quantizer.codebook.weight[ids].movedim(-1, 1))
    assert "temperature" not in codes.metrics


def test_training_decodes_the_mean_of_the_codebook():
    quantizer, z = quantizer_and_vectors()
    u = torch.rand(3, 4, 5, K, dtype=torch.float64)
    y, codes = gumbel_softmax(quantizer, z, u, tau=0.75), quantizer(z, context(u))
    assert torch.allclose(codes.vectors, mean_vectors(quantizer, y), rtol=1e-12)
    assert torch.equal(codes.ids, y.argmax(-1)) and (codes.ids != quantizer.assign(z)).any()
    assert codes.metrics["temperature"] == 0.75


def test_straight_through_decodes_one_code_by_mean_gradient():
    quantizer, z = quantizer_and_vectors(straight_through=True)
    u, output_gradient = torch.rand(3, 4, 5, K, dtype=torch.float64), torch.randn(3, D, 4, 5, dtype=torch.float64)
    codes, y = quantizer(z, context(u)), gumbel_softmax(quantizer, z, u, tau=0.75)
    assert torch.allclose(codes.vectors, quantizer.vectors(codes.ids)) and torch.equal(codes.ids, y.argmax(-1))
    inputs = (z, quantizer.logits.weight, quantizer.logits.bias)
    actual, expected = (
        torch.autograd.grad((vectors * output_gradient).sum(), inputs)
        for vectors in (codes.vectors, mean_vectors(quantizer, y))
    )
    assert all(torch.allclose(*pair) for pair in zip(actual, expected, strict=True)) and actual[0].abs().max() > 0
    (codebook_gradient,) = torch.autograd.grad(
        (quantizer(z, context(u)).vectors * output_gradient).sum(), quantizer.codebook.weight
    )
    summed = (
        torch.zeros(K, D).double().index_add_(0, codes.ids.flatten(), output_gradient.movedim(1, -1).reshape(-1, D))
    )
    assert torch.allclose(codebook_gradient, summed)


@pytest.mark.parametrize("step, tau", [(0, 1), (STEPS // 2, 0.5), (935, 0.065), (938, 1 / 16), (10 * STEPS, 1 / 16)])
def test_the_temperature_falls_to_a_sixteenth(step, tau):
    quantizer, z = quantizer_and_vectors()
    u = torch.rand(3, 4, 5, K, dtype=torch.float64)
    codes = quantizer(z, context(u, step))
    assert codes.metrics["temperature"] == pytest.approx(tau)
    assert torch.allclose(codes.vectors, mean_vectors(quantizer, gumbel_softmax(quantizer, z, u, tau)))


def test_codes_are_drawn_with_their_probabilities():
    quantizer = GumbelQuantizer(K, D)
    nn.init.normal_(quantizer.logits.weight)
    nn.init.normal_(quantizer.logits.bias)
    z = torch.randn(1, D, 1, 1).expand(1, D, 200, 200)
    ids = quantizer(z, StepContext(0, rng=Streams([3]))).ids
    p = logits_of(quantizer, z)[0, 0, 0].softmax(-1)
    deviation = (p * (1 - p) / ids.numel()).sqrt()
    assert ((ids.flatten().bincount(minlength=K) / ids.numel() - p).abs() < 5 * deviation).all()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_uniform_numbers_of_zero_give_finite_results(hard, double):
    quantizer, z = quantizer_and_vectors(straight_through=hard)
    quantizer = quantizer if double else quantizer.float()
    z = z.detach().to(quantizer.codebook.weight.dtype).requires_grad_()
    u = torch.rand(3, 4, 5, K)
    u[0], u[1, ..., 2] = 0.0, 0.0
    codes = quantizer(z, context(u))
    codes.vectors.square().sum().backward()
    assert codes.vectors.isfinite().all() and z.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in quantizer.parameters())
    assert torch.equal(codes.ids[0], quantizer.assign(z)[0]) and (codes.ids[1] != 2).any()


def test_the_largest_uniform_numbers_are_finite():
    quantizer, z = quantizer_and_vectors()
    codes = quantizer(z, context(torch.full((3, 4, 5, K), 1 - 2**-24)))
    assert codes.vectors.isfinite().all()


def test_a_training_without_random_numbers_is_refused():
    quantizer, z = quantizer_and_vectors()
    with pytest.raises(ValueError, match="without rng"):
        quantizer(z, StepContext(0))


def test_the_loss_is_the_distance_to_uniform_probabilities():
    quantizer, z = quantizer_and_vectors()
    p = torch.distributions.Categorical(logits=logits_of(quantizer, z))
    kl = torch.distributions.kl_divergence(p, torch.distributions.Categorical(logits=torch.zeros(K).double()))
    for codes in (quantizer(z), quantizer(z, context(torch.rand(3, 4, 5, K)))):
        assert torch.allclose(codes.loss, 0.2 * kl.mean((1, 2))) and torch.allclose(codes.metrics["kl"], kl.mean())


@pytest.mark.parametrize("scale, kl", [(0, 0), (1e6, math.log(K))])
def test_the_distance_lies_between_none_and_certainty(scale, kl):
    quantizer, z = quantizer_and_vectors()
    quantizer.logits.weight.data *= scale
    quantizer.logits.bias.data *= scale
    assert torch.allclose(quantizer(z).loss / 0.2, torch.tensor(kl).double(), atol=1e-4)


def test_products_have_float32_under_autocast():
    quantizer, z = quantizer_and_vectors()
    quantizer, z, u = quantizer.float(), z.float(), torch.rand(3, 4, 5, K)
    plain = quantizer(z, context(u))
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantizer(z, context(u))
    assert torch.equal(codes.vectors, plain.vectors) and torch.equal(codes.loss, plain.loss)


@pytest.mark.parametrize("dim", [2, 16])
def test_nearer_codes_are_likelier_at_first(dim):
    quantizer = GumbelQuantizer(50, dim).double()
    z = torch.randn(20, dim, 2, 2, dtype=torch.float64)
    assert torch.equal(quantizer.assign(z), quantizer.ids_of(z))
    squares = (z.movedim(1, -1).unsqueeze(-2) - quantizer.codebook.weight).square().sum(-1)  # (B, h, w, K)
    assert torch.allclose(logits_of(quantizer, z).softmax(-1), (-16 / dim * squares).softmax(-1))


def test_the_temperature_falls_over_the_run_unless_set():
    def decay_steps(stored={}, **options):  # noqa: B006
        config = VQGANConfig(quantizer="gumbel", quantizer_config=gumbel.Config(**options)).for_run(600, stored)
        return make_quantizer(config).decay_steps

    assert decay_steps() == 600 and decay_steps(gumbel_decay_steps=50) == 50
    assert decay_steps({"gumbel_decay_steps": 160_000}) == 160_000  # of the run that is continued
    assert decay_steps({"gumbel_decay_steps": 160_000}, gumbel_decay_steps=50) == 50


def test_settings_arrive():
    sizes = {"codebook_size": 9, "emb_dim": 2}
    options = gumbel.Config(gumbel_kl_weight=0.5, gumbel_straight_through=True, gumbel_decay_steps=5)
    q = make_quantizer(VQGANConfig(quantizer="gumbel", **sizes, quantizer_config=options))
    assert (q.codebook_size, q.dim, q.kl_weight, q.hard, q.decay_steps) == (9, 2, 0.5, True, 5)
    assert not make_quantizer(VQGANConfig(quantizer="gumbel", **sizes)).hard
