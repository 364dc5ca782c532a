"""LFQ: bits and ids, and the loss against a softmax over all codes, on one process and on two."""

import math

import pytest
import torch

from vq.config import VQGANConfig
from vq.quantizer import make_quantizer
from vq.quantizers import StepContext, lfq
from vq.quantizers.lfq import LFQQuantizer

D = 5
K = 2**D
BETA, WEIGHT, TEMPERATURE = 0.3, 0.7, 1.5


def quantizer(**options):
    return LFQQuantizer(K, **{"beta": BETA, "entropy_weight": WEIGHT, "temperature": TEMPERATURE} | options)


def z_for(batch=3, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(batch, D, 4, 3, dtype=torch.float64)).to(dtype).requires_grad_()


def all_codes(q, dtype=torch.float64):
    """All codes' vectors (K, D)."""
    return q.vectors(torch.arange(q.codebook_size).view(1, 1, -1))[0, :, 0].t().to(dtype)


def distance_softmax(z, codes, temperature):
    """softmax over all codes of -|z - c|^2 / temperature, (B, h w, K)."""
    flat = z.movedim(1, -1).flatten(1, 2)
    return (-(flat[:, :, None] - codes).square().sum(-1) / temperature).softmax(-1)


def reference_loss(q, z, mean_p=None):
    p = distance_softmax(z, all_codes(q), TEMPERATURE)
    mean = p.flatten(0, 1).mean(0) if mean_p is None else mean_p
    code_entropy, codebook_entropy = torch.special.entr(p).sum(-1).mean(1), torch.special.entr(mean).sum()
    signs = torch.where(z >= 0, 1.0, -1.0).double()
    return (
        BETA * (z - signs).square().mean((1, 2, 3)) + WEIGHT * (code_entropy - codebook_entropy),
        code_entropy,
        codebook_entropy,
    )


def test_signs_are_bits_and_zero_is_positive():
    z = torch.tensor([-1.0, -1e-30, 0.0, -0.0, 7.0]).view(1, D, 1, 1)
    codes = quantizer()(z)
    assert codes.ids.item() == quantizer().assign(z).item() == 0b11100
    assert codes.vectors.flatten().tolist() == [-1, -1, 1, 1, 1]
    assert quantizer().vectors(torch.tensor([[[1, 2, 16]]]))[0, :, 0].t().tolist() == [
        [1, -1, -1, -1, -1], [-1, 1, -1, -1, -1], [-1, -1, -1, -1, 1]]  # fmt: skip


def test_every_code_is_chosen_and_is_the_nearest():
    q, z = quantizer(), z_for(50, dtype=torch.float32).detach()
    codes = q(z)
    distances = (z[:, None] - all_codes(q, torch.float32)[:, :, None, None]).square().sum(2)
    assert torch.equal(codes.ids, distances.argmin(1)) and len(codes.ids.unique()) == K
    assert torch.equal(codes.ids, q.assign(z)) and torch.equal(codes.ids, q.ids_of(z))
    assert torch.equal(codes.vectors, q.vectors(codes.ids)) and codes.vectors.dtype == torch.float32


@pytest.mark.parametrize("bits", [1, 2, 9, 16])
def test_ids_and_vectors_are_inverse_for_all_codes(bits):
    q = LFQQuantizer(2**bits)
    ids = torch.arange(2**bits).view(1, 1, -1)
    assert q.dim == bits and torch.equal(q.ids_of(q.vectors(ids)), ids)


def test_the_gradient_passes_straight_through():
    z, output_gradient = z_for(), torch.randn(3, D, 4, 3, dtype=torch.float64)
    quantizer()(z).vectors.backward(output_gradient)
    assert torch.equal(z.grad, output_gradient)


def test_loss_and_gradient_match_sums_over_all_codes():
    q, z, weights = quantizer(), z_for(), torch.rand(3, dtype=torch.float64)
    codes, (loss, code_entropy, codebook_entropy) = q(z), reference_loss(q, z)
    assert torch.allclose(codes.loss, loss, rtol=1e-10) and codes.loss.dtype == torch.float64
    assert codes.metrics["entropy"] == pytest.approx(code_entropy.mean().item())
    assert codes.metrics["codebook_entropy"] == pytest.approx(codebook_entropy.item())
    assert codes.metrics["commitment"] == pytest.approx((z.abs() - 1).square().mean().item())
    gradients = [torch.autograd.grad((x * weights).sum(), z)[0] for x in (codes.loss, loss)]
    assert torch.allclose(*gradients, rtol=1e-8, atol=1e-12)


def test_temperature_001_is_open_magvit2s_inverse_100():
    """Open-MAGVIT2's softmax of 100 * 2 z.c over all codes."""
    q, z = quantizer(temperature=0.01, beta=0), z_for(scale=0.01)
    p = (200 * z.movedim(1, -1).flatten(0, 2) @ all_codes(q).t()).softmax(-1)
    codes = q(z)
    assert codes.metrics["entropy"] == pytest.approx(torch.special.entr(p).sum(1).mean().item())
    assert codes.metrics["codebook_entropy"] == pytest.approx(torch.special.entr(p.mean(0)).sum().item())


class TwoProcesses:
    """Simulates one of two processes, given the mean of the other."""

    size = 2

    def __init__(self, rank, other):
        self.rank, self.other = rank, other

    def mean(self, x):
        return (x + self.other) / 2

    def sum(self, x):
        return x + self.other


def test_two_processes_have_the_loss_and_the_gradient_of_one():
    """Gradients with respect to a weight before the quantizer, averaged as DDP does."""
    q, x = quantizer(), torch.randn(4, 3, 4, 3, dtype=torch.float64)
    weight = torch.randn(D, 3, 1, 1, dtype=torch.float64, requires_grad=True)

    def z_of(part):
        return torch.nn.functional.conv2d(part, weight)

    full = q(z_of(x), StepContext(0)).loss
    (expected,) = torch.autograd.grad(full.mean(), weight)
    means = [
        distance_softmax(z_of(part), all_codes(q), TEMPERATURE).flatten(0, 1).mean(0).detach() for part in x.chunk(2)
    ]
    losses, gradients = [], []
    for rank, part in enumerate(x.chunk(2)):
        codes = q(z_of(part), StepContext(0, dist=TwoProcesses(rank, means[1 - rank])))
        losses.append(codes.loss.detach())
        gradients.append(torch.autograd.grad(codes.loss.mean(), weight)[0])
    assert torch.allclose(torch.cat(losses), full, rtol=1e-10)
    assert torch.allclose(sum(gradients) / 2, expected, rtol=1e-8)
    local = [torch.autograd.grad(q(z_of(part)).loss.mean(), weight)[0] for part in x.chunk(2)]
    assert not torch.allclose(sum(local) / 2, expected, rtol=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("scale, dtype", [(1e15, torch.float32), (1e6, torch.bfloat16), (1, torch.bfloat16)])
def test_large_and_half_precision_vectors_are_finite(scale, dtype, temperature):
    q, z = quantizer(temperature=temperature), z_for(scale=scale, dtype=dtype)
    codes = q(z, StepContext(0))
    (codes.loss.sum() + codes.vectors.sum()).backward()
    assert codes.loss.isfinite().all() and codes.loss.dtype == torch.float32 and z.grad.isfinite().all()
    assert torch.equal(codes.vectors, z.detach().sign().float())


def test_entropies_spread_codes_that_had_collapsed():
    """From one code for nearly all positions, gradient steps on the loss alone lead to nearly all codes."""
    q = quantizer(temperature=1.0, beta=0.25, entropy_weight=1.0)
    z = (0.5 + 0.25 * torch.randn(8, D, 6, 6)).requires_grad_()
    before = len(q.assign(z).unique()), q(z).metrics
    for _ in range(100):
        (gradient,) = torch.autograd.grad(q(z, StepContext(0)).loss.sum(), z)
        z = (z - 2 * gradient).detach().requires_grad_()
    after = len(q.assign(z).unique()), q(z).metrics
    assert before[0] < K / 4 and after[0] > 0.8 * K
    information = [metrics["codebook_entropy"] - metrics["entropy"] for _, metrics in (before, after)]  # nats of a code
    assert information[0] < 1 and information[1] > 0.7 * math.log(K)


def test_the_config_gives_weights_and_temperature():
    options = lfq.Config(beta=0.5, entropy_weight=0.2, entropy_temperature=0.3)
    config = VQGANConfig(quantizer="lfq", codebook_size=64, quantizer_config=options)
    q = make_quantizer(config)
    assert isinstance(q, LFQQuantizer) and (q.codebook_size, q.dim) == (64, 6) == (64, config.code_dim)
    assert (q.beta, q.entropy_weight, q.temperature) == (0.5, 0.2, 0.3)


@pytest.mark.parametrize("codebook_size", [0, 1, 12])
def test_codebook_sizes_that_are_no_power_of_2_are_rejected(codebook_size):
    with pytest.raises(ValueError, match=f"got codebook_size {codebook_size} for lfq"):
        LFQQuantizer(codebook_size)
