"""The variational bound of Gaussian diffusion: its terms, and its value on data of known entropy."""

import math

import pytest
import torch

from diffusion.gaussian import GaussianDiffusion, discretized_log_likelihood, kl, linear, with_zero_terminal_snr
from diffusion.likelihood import bits_per_dimension
from diffusion.process import append_dims
from diffusion.types import Normal, Prediction
from helpers.toy_gaussians import Mixture, noisy_batch

LINEAR = linear(1000)


@pytest.fixture
def batch():
    return noisy_batch()


def test_kl_equals_its_integral_and_vanishes_for_equal_normals():
    p, q = (Normal(torch.tensor(m).double(), torch.tensor(v).double().log()) for m, v in ((0.3, 0.5), (-0.2, 1.7)))
    assert kl(p, p) == 0
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    log_p, log_q = (torch.distributions.Normal(n.mean, n.log_variance.exp().sqrt()).log_prob(x) for n in (p, q))
    assert kl(p, q).item() == pytest.approx(torch.trapezoid(log_p.exp() * (log_p - log_q), x).item(), rel=1e-9)


@pytest.mark.parametrize("mean, deviation", [(0.1, 0.3), (0.9, 0.01), (-3.0, 0.5), (0.0, 2e-3)])
def test_the_masses_of_all_bins_add_up_to_one(mean, deviation):
    x0 = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(1, 256)
    normal = Normal(torch.full_like(x0, mean), torch.full_like(x0, 2 * math.log(deviation)))
    mass = discretized_log_likelihood(x0, normal).exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-9)
    edges = torch.cat([torch.tensor([-math.inf]), x0[0, 1:] - 1 / 255, torch.tensor([math.inf])]).double()
    assert torch.allclose(mass[0], torch.special.ndtr((edges - mean) / deviation).diff(), atol=1e-12)


def test_a_far_mean_keeps_its_likelihood_and_gradient_in_float32():
    x0 = torch.tensor([0.5, -0.5, 1.0, -1.0])
    mean = torch.tensor([-0.5, 0.5, -0.5, 0.5], requires_grad=True)
    likelihood = discretized_log_likelihood(x0, Normal(mean, torch.full((4,), 2 * math.log(0.01))))
    gradient = torch.autograd.grad(likelihood.sum(), mean)[0]
    assert (likelihood < -4000).all() and (gradient * (x0 - mean) > 9000 * 0.5).all()
    assert torch.isfinite(discretized_log_likelihood(x0, Normal(mean, torch.full((4,), 60.0)))).all()


def test_a_perfect_prediction_has_only_the_last_bound_term(batch):
    x0, noise, t = batch
    process = GaussianDiffusion(LINEAR, variance="fixed_small")
    terms = process.bound_term(Prediction(x0, noise), x0, process.corrupt(x0, t, noise), t)
    assert torch.allclose(terms[1:], torch.zeros(5).double(), atol=1e-9) and terms[0] > 0


def test_the_bound_term_is_the_mistake_in_units_of_the_posterior(batch):
    x0, noise, t = (b[2:] for b in batch)
    process, s = GaussianDiffusion(LINEAR, variance="fixed_small"), t - 1 / 1000
    terms = process.bound_term(Prediction(x0 + 0.1, noise), x0, process.corrupt(x0, t, noise), t)
    snr = [(process.alpha(u) / process.sigma(u)) ** 2 for u in (s, t)]  # Kingma et al. 2021, eq. 13
    assert torch.allclose(terms, 0.5 * (snr[0] - snr[1]) * 0.01 / math.log(2), rtol=1e-4)


@pytest.mark.parametrize("steps", [1000, 300])
def test_the_prior_term_is_what_is_left_at_the_end(batch, steps):
    x0, alpha_bar = batch[0], LINEAR[steps]
    expected = 0.5 * (alpha_bar * x0**2 + (1 - alpha_bar) - 1 - (1 - alpha_bar).log()).mean((1, 2, 3)) / math.log(2)
    assert torch.allclose(GaussianDiffusion(LINEAR[: steps + 1]).prior_term(x0), expected)
    prior = GaussianDiffusion(with_zero_terminal_snr(LINEAR), "v").prior_term(x0)
    assert torch.equal(prior, torch.zeros_like(prior))


def oracle_denoiser(process, data):
    """The perfect denoiser of N(0, v), with the true variance of p(x_s | x_t) as fraction of the learned range."""
    denoise_mean = data.denoiser(process)

    def denoise(x, t):
        s = (process.fractional_step(t.double()) - 1) / process.steps
        alpha, sigma = process.alpha(t), process.sigma(t)
        x0_coefficient = process.alpha(s) * process.forward_variance(t, s) / sigma**2
        x0_variance = data.variance * sigma**2 / (alpha**2 * data.variance + sigma**2)  # Var(x_0 | x_t)
        variance = process.posterior_variance(t, s) + x0_coefficient**2 * x0_variance
        small, large = process.clipped_posterior_variance(t, s).log(), process.forward_variance(t, s).log()
        return denoise_mean(x, t)._replace(frac=append_dims((variance.log() - small) / (large - small), x))

    return denoise


def test_the_bound_of_the_true_reverse_process_is_the_entropy(streams):
    """With a fixed variance it stays above: the first steps are coarse, however many there are."""
    data = Mixture((1.0,), (0.0,), 0.25**2)
    x0 = ((data.draw(8, 1, 16, 16).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    entropy = -torch.distributions.Normal(0, 0.25).log_prob(x0).mean() / math.log(2) + math.log2(127.5)
    gap = {}
    for steps, variance in ((100, "learned_range"), (250, "learned_range"), (250, "fixed_small")):
        process = GaussianDiffusion(linear(steps), variance=variance)
        bound = bits_per_dimension(oracle_denoiser(process, data), process, x0, streams(8))
        assert bound.terms.shape == (8, steps)
        assert torch.allclose(bound.total, bound.prior + bound.terms.sum(1))
        gap[steps, variance] = ((bound.total.mean() - entropy) / entropy).item()
    assert abs(gap[100, "learned_range"]) < 0.005 and abs(gap[250, "learned_range"]) < 0.005
    assert gap[250, "fixed_small"] > 0.1
