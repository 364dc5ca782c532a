"""Gaussian diffusion against outputs of the public improved-diffusion code.

Without these files, test_gaussian_schedules.py still tests the betas.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.gaussian import GaussianDiffusion, cosine, linear
from diffusion.process import append_dims

TABLES = Path(os.environ.get("GUIDED_FIXTURES", "")) / "process.npz"
needs_tables = pytest.mark.skipif(
    not TABLES.is_file(), reason="GUIDED_FIXTURES names no folder with process.npz, outputs of the public code"
)
SCHEDULE = {"linear_1000": linear(1000), "cosine_4000": cosine(4000)}


@pytest.fixture(params=SCHEDULE)
def public(request):
    """The process, and the public code's arrays by name."""
    process = GaussianDiffusion(SCHEDULE[request.param], variance="learned_range")
    with np.load(TABLES) as file:
        names = [name for name in file.files if name.startswith(request.param)]
        return process, {name.removeprefix(request.param + "_"): torch.from_numpy(file[name]) for name in names}


def case(process, table):
    """x0, eps, x_t, t, s and the prediction of the recorded case."""
    t = (table["case_t"] + 1) / process.steps
    pred = process.to_prediction(table["case_net_out"], table["case_x_t"], t)
    return table["case_x0"], table["case_eps"], table["case_x_t"], t, table["case_t"] / process.steps, pred


@needs_tables
def test_the_posterior_is_that_of_the_public_code(public):
    process, table = public
    t, s = (table["idx"] + 1) / process.steps, table["idx"] / process.steps
    one, zero = torch.ones(6, 1, 1, 1, dtype=torch.float64), torch.zeros(6, 1, 1, 1, dtype=torch.float64)
    expected = {
        "betas": process.forward_variance(t, s),
        "alphas_cumprod": process.alpha(t) ** 2,
        "posterior_variance": process.posterior_variance(t, s),
        "posterior_log_variance_clipped": process.clipped_posterior_variance(t, s).log(),
        "posterior_mean_coef1": process.posterior_mean(one, zero, t, s).flatten(),
        "posterior_mean_coef2": process.posterior_mean(zero, one, t, s).flatten(),
    }
    for name, values in expected.items():
        assert torch.allclose(values, table[name], rtol=1e-6, atol=1e-12), name


@needs_tables
def test_respacing_is_that_of_the_public_code(public):
    process, table = public
    t = (table["respaced50_timesteps"] + 1) / process.steps
    s = torch.cat([torch.zeros(1), t[:-1]])
    assert torch.allclose(process.forward_variance(t, s), table["respaced50_betas"], rtol=1e-6, atol=1e-12)


@needs_tables
def test_the_reverse_step_is_that_of_the_public_code(public):
    process, table = public
    x0, noise, x_t, t, s, pred = case(process, table)
    assert torch.allclose(process.corrupt(x0, t, noise), x_t, atol=1e-6)
    mean, log_variance = process.reverse_kernel(x_t, pred, t, s)
    assert torch.allclose(pred.x0, table["case_pred_xstart"], atol=1e-5)
    assert torch.allclose(mean, table["case_mean"], atol=1e-5)
    assert torch.allclose(log_variance, table["case_log_variance"], atol=1e-4)


def with_tanh(x0, normal):
    """The public code's bin likelihood, with its tanh approximation of the normal CDF."""
    deviation = (0.5 * normal.log_variance).exp()

    def tail(x):
        return 0.5 * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())

    above = torch.where(x0 > 0.999, 1.0, tail((x0 + 1 / 255 - normal.mean) / deviation))
    below = torch.where(x0 < -0.999, 0.0, tail((x0 - 1 / 255 - normal.mean) / deviation))
    return (above - below).clamp(min=1e-12).log()


@needs_tables
def test_the_losses_are_those_of_the_public_code(public, monkeypatch):
    process, table = public
    x0, noise, x_t, t, _, pred = case(process, table)
    bits = table["case_vb_bits_per_dim"]
    assert torch.allclose(process.bound_term(pred, x0, x_t, t), bits, rtol=0.02)
    monkeypatch.setattr("diffusion.gaussian.discretized_log_likelihood", with_tanh)
    assert torch.allclose(process.bound_term(pred, x0, x_t, t), bits, rtol=1e-4)
    simple, hybrid = (process.loss(table["case_net_out"], x0, noise, t, k).per_example for k in ("simple", "hybrid"))
    assert torch.allclose(simple, table["case_loss_mse"], rtol=1e-5)
    scaled = process.steps / 1000 * table["case_loss_vb"]  # its "rescaled" loss; the table's has the factor 1
    assert torch.allclose(hybrid, table["case_loss_mse"] + scaled, rtol=1e-4)


@needs_tables
def test_ddim_and_its_inversion_are_those_of_the_public_code(public):
    process, table = public
    _, _, x_t, t, s, pred = case(process, table)
    for target, name in ((s, "ddim_eta0"), (t + 1 / process.steps, "ddim_reverse")):
        x_s = append_dims(process.alpha(target), x_t) * pred.x0 + append_dims(process.sigma(target), x_t) * pred.eps
        assert torch.allclose(x_s, table[f"case_{name}"], atol=1e-5)
