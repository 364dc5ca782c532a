"""Gaussian diffusion in T steps: predictions, variances and losses, against their formulas."""

import pytest
import torch

from diffusion.gaussian import GaussianDiffusion, cosine, linear, with_zero_terminal_snr
from diffusion.types import Loss, Prediction
from helpers.toy_gaussians import noisy_batch

LINEAR = linear(1000)
PREDICTIONS = ("eps", "x0", "v")


@pytest.fixture
def batch():
    return noisy_batch()


def output_for(process, x0, noise, t, frac=0.5):
    """The output of a network that knows x0 and the noise."""
    target = process.target(x0, noise, t)
    return (
        torch.cat([target, torch.full_like(target, 2 * frac - 1)], 1) if process.variance == "learned_range" else target
    )


# Network outputs


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_gives_back_data_and_noise(batch, prediction, variance):
    x0, noise, t = batch
    process = GaussianDiffusion(LINEAR, prediction, variance)
    pred = process.to_prediction(output_for(process, x0, noise, t, 0.25), process.corrupt(x0, t, noise), t)
    assert torch.allclose(pred.x0, x0, atol=1e-9) and torch.allclose(pred.eps, noise, atol=1e-9)
    assert pred.frac is None if variance == "fixed_small" else torch.allclose(pred.frac, torch.tensor(0.25).double())


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_at_zero_terminal_snr_the_prediction_is_finite(prediction):
    process = GaussianDiffusion(with_zero_terminal_snr(LINEAR), prediction)
    x_t, output, t = *torch.randn(2, 1, 1, 3, 3, generator=torch.Generator().manual_seed(0)).unbind(), torch.ones(1)
    assert process.alpha(t) == 0 and process.sigma(t) == 1
    pred = process.to_prediction(output, x_t, t)
    assert torch.equal(pred.eps, x_t) and torch.equal(pred.x0, output if prediction == "x0" else -output)


def test_eps_at_zero_terminal_snr_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="zero terminal SNR, where x_T is pure noise: choose v or x0"):
        GaussianDiffusion(with_zero_terminal_snr(LINEAR))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"prediction": "noise"}, "prediction 'noise': choose one of eps, x0, v"),
        ({"variance": "learned"}, "variance 'learned': choose one of fixed_small"),
        ({"alpha_bar": LINEAR[1:]}, "must decrease strictly from 1"),
        ({"alpha_bar": torch.tensor([1, 0.5, 0.5])}, "must decrease strictly"),
    ],
)
def test_what_makes_no_process_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(**{"alpha_bar": LINEAR} | wrong)


def test_a_network_of_the_wrong_width_is_refused(batch):
    x0, noise, t = batch
    with pytest.raises(ValueError, match="got 2 channels from the network, wanted 4 for variance 'learned_range'"):
        GaussianDiffusion(LINEAR, variance="learned_range").to_prediction(noise, x0, t)


def test_half_precision_ends_at_the_prediction(batch):
    x0, noise, t = (b.bfloat16() if b.ndim > 1 else b for b in batch)
    process = GaussianDiffusion(LINEAR)
    assert process.to_prediction(noise, x0, t).x0.dtype == torch.float32
    assert process.loss(noise, x0, noise, t).per_example.dtype == torch.float32


# Time


@pytest.mark.parametrize("steps", [7, 1000, 4000])
def test_a_time_of_i_over_t_is_the_step_i_in_float32_too(steps):
    process, t = GaussianDiffusion(cosine(steps)), torch.arange(steps + 1) / steps
    assert t.dtype == torch.float32
    assert torch.equal(process.alpha(t), process.alpha_bar.sqrt())
    assert torch.equal(process.network_time(t[1:]), torch.arange(steps).float())
    assert torch.allclose(process.sigma(t) ** 2, 1 - process.alpha_bar, rtol=1e-6, atol=1e-15)


def test_between_steps_alpha_is_on_the_line():
    process = GaussianDiffusion(LINEAR)
    t = torch.tensor([499.25 / 1000], dtype=torch.float64)
    roots = LINEAR.sqrt()
    assert torch.allclose(process.alpha(t), 0.75 * roots[499] + 0.25 * roots[500])
    assert process.network_time(t).item() == pytest.approx(498.25, abs=1e-3)


def test_training_times_are_the_steps_and_never_zero(streams, p_value):
    process = GaussianDiffusion(cosine(5))
    t = process.times(streams(4000))
    assert p_value((5 * t).round().long() - 1, torch.full((5,), 0.2)) > 1e-4
    u = torch.tensor([2**-24, 0.2, 1.0])
    assert process.quantile(u).tolist() == pytest.approx([0.2, 0.2, 1.0])


# The variance of a reverse step


@pytest.mark.parametrize("i", [2, 500, 1000])
@pytest.mark.parametrize("pred, name", [(-1.0, "posterior_variance"), (1.0, "forward_variance")])
def test_the_ends_of_the_learned_range_are_beta_and_beta_tilde(i, pred, name):
    process = GaussianDiffusion(LINEAR, variance="learned_range")
    t, s, x_t = torch.tensor([i / 1000]), torch.tensor([(i - 1) / 1000]), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    output = torch.cat([x_t, torch.full_like(x_t, pred)], 1)
    log_variance = process.reverse_kernel(x_t, process.to_prediction(output, x_t, t), t, s).log_variance
    assert torch.allclose(log_variance.exp(), getattr(process, name)(t, s), rtol=1e-9)


def test_the_learned_range_is_open_and_even_in_logarithms():
    process = GaussianDiffusion(LINEAR, variance="learned_range")
    t, s, x_t = torch.tensor([0.3]), torch.tensor([0.2]), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    small, large = process.posterior_variance(t, s).log(), process.forward_variance(t, s).log()
    for v in (-3.0, 0.0, 0.5, 2.0):
        pred = process.to_prediction(torch.tensor([0, v]).double().view(1, 2, 1, 1), x_t, t)
        log_variance = process.reverse_kernel(x_t, pred, t, s).log_variance
        assert torch.allclose(log_variance, (v + 1) / 2 * large + (1 - v) / 2 * small)


@pytest.mark.parametrize(
    "variance, last", [("fixed_small", "least"), ("fixed_large", "least"), ("learned_range", "range")]
)
def test_the_last_step_has_the_variance_of_the_step_before(variance, last):
    process = GaussianDiffusion(LINEAR, variance=variance)
    t, x = torch.tensor([1 / 1000]), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    beta, previous = LINEAR[0] - LINEAR[1], process.posterior_variance(2 * t, t)
    log_variance = process.reverse_kernel(x, Prediction(x, x, x + 1), t, 0 * t).log_variance
    assert torch.allclose(log_variance.exp(), previous if last == "least" else beta, rtol=1e-9)
    assert previous.item() == pytest.approx(5.4531876613021935e-05, rel=1e-9)


def test_larger_steps_are_steps_of_a_respaced_process():
    parent, indices = GaussianDiffusion(LINEAR), torch.arange(0, 1001, 20)
    respaced = GaussianDiffusion(LINEAR[indices])
    i = torch.arange(2, 51)
    t, s = i / 50, (i - 1) / 50
    beta = 1 - respaced.alpha_bar[i] / respaced.alpha_bar[i - 1]
    assert torch.allclose(parent.forward_variance(t, s), beta, rtol=1e-9)
    assert torch.allclose(parent.posterior_variance(t, s), respaced.posterior_variance(t, s), rtol=1e-9)
    x = torch.randn(2, 49, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(parent.posterior_mean(*x, t, s), respaced.posterior_mean(*x, t, s), rtol=1e-9)


# Losses


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_simple_loss_is_the_mean_squared_error_of_the_target(batch, prediction):
    x0, noise, t = batch
    process = GaussianDiffusion(LINEAR, prediction)
    loss = process.loss(process.target(x0, noise, t) + 0.5, x0, noise, t)
    assert isinstance(loss, Loss) and loss.per_example.shape == (6,)
    assert torch.allclose(loss.per_example, torch.tensor(0.25).double())
    assert torch.equal(loss.metrics["mse"], loss.per_example)


def test_the_targets_are_noise_data_and_velocity(batch):
    x0, noise, t = batch
    assert GaussianDiffusion(LINEAR).target(x0, noise, t) is noise
    assert GaussianDiffusion(LINEAR, "x0").target(x0, noise, t) is x0
    v = GaussianDiffusion(LINEAR, "v").target(x0, noise, t)
    alpha_bar = LINEAR[[1, 2, 100, 500, 900, 1000]].view(-1, 1, 1, 1)
    assert torch.allclose(v, alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0)


def test_a_loss_weight_broadcasts_to_every_number(batch):
    x0, noise, t = batch
    process, weight = GaussianDiffusion(LINEAR), torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    pred = noise + torch.arange(2.0).view(2, 1, 1)
    loss = process.loss(pred, x0, noise, t, loss_weight=weight).per_example
    assert torch.allclose(loss, weight.double().mean((1, 2, 3)) / 2)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_does_not_depend_on_the_prediction_type(batch, gamma):
    x0, noise, t = batch
    x_t = GaussianDiffusion(LINEAR).corrupt(x0, t, noise)
    x0_hat = x0 + 0.1
    snr = LINEAR[[1, 2, 100, 500, 900, 1000]] / (1 - LINEAR[[1, 2, 100, 500, 900, 1000]])
    for prediction in PREDICTIONS:
        process = GaussianDiffusion(LINEAR, prediction)
        pred = process.with_x0(Prediction(x0, noise), x0_hat, x_t, t)
        output = process.target(pred.x0, pred.eps, t)
        loss = process.loss(output, x0, noise, t, "min_snr", gamma=gamma).per_example
        assert torch.allclose(loss, snr.clamp(max=gamma) * 0.01, rtol=1e-6)


def test_min_snr_has_the_three_published_weights():
    t = torch.arange(1, 1001) / 1000
    snr = LINEAR[1:] / (1 - LINEAR[1:])
    published = {"eps": snr.clamp(max=5) / snr, "x0": snr.clamp(max=5), "v": snr.clamp(max=5) / (snr + 1)}
    for prediction, weight in published.items():
        assert torch.allclose(GaussianDiffusion(LINEAR, prediction).min_snr_weight(t, 5.0), weight, rtol=1e-9)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_min_snr_learns_where_sampling_starts(prediction):
    """With zero terminal SNR the paper's weight is 0 at t = 1; here it is that of the simple loss."""
    t = torch.arange(1, 1001) / 1000
    process = GaussianDiffusion(with_zero_terminal_snr(LINEAR), prediction)
    weight, snr = process.min_snr_weight(t, 5.0), (process.alpha(t) / process.sigma(t)).square()
    assert weight[-1] == 1 and weight.min() > 1e-4
    usual = snr > 1
    assert torch.allclose(
        weight[usual] * (snr + 1 if prediction == "v" else 1 + 0 * snr)[usual], snr[usual].clamp(max=5)
    )
    assert process.min_snr_weight(t[-1:], 0.5) == 0.5  # gamma wins


def test_of_the_hybrid_loss_the_bound_moves_the_variance_alone(batch):
    x0, noise, t = batch
    process, generator = GaussianDiffusion(LINEAR, variance="learned_range"), torch.Generator().manual_seed(1)
    output = torch.randn(6, 4, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()

    def gradients(kind):
        return torch.autograd.grad(process.loss(output, x0, noise, t, kind).per_example.sum(), output)[0].chunk(2, 1)

    hybrid, simple, vlb = gradients("hybrid"), gradients("simple"), gradients("vlb")
    assert torch.allclose(hybrid[0], simple[0]) and not simple[1].any()
    assert torch.allclose(hybrid[1], vlb[1] / 1000) and hybrid[1].any()
    assert vlb[0].any()


@pytest.mark.parametrize("steps", [1000, 4000])
def test_the_hybrid_loss_is_simple_plus_a_thousandth_of_vlb(batch, steps):
    x0, noise, t = batch
    process = GaussianDiffusion(cosine(steps), variance="learned_range")
    output = torch.cat([noise + 0.1, 0 * noise], 1)
    simple, hybrid, vlb = (process.loss(output, x0, noise, t, kind) for kind in ("simple", "hybrid", "vlb"))
    assert torch.allclose(hybrid.per_example, simple.per_example + vlb.per_example / 1000)
    assert torch.equal(hybrid.metrics["vlb"], vlb.metrics["vlb"]) and torch.equal(vlb.metrics["vlb"], vlb.per_example)
    pred, x_t = process.to_prediction(output, process.corrupt(x0, t, noise), t), process.corrupt(x0, t, noise)
    assert torch.allclose(vlb.per_example, steps * process.bound_term(pred, x0, x_t, t))


@pytest.mark.parametrize(
    "process, kind, message",
    [
        (GaussianDiffusion(LINEAR), "l1", "loss 'l1': choose one of simple, min_snr, hybrid, vlb"),
        (
            GaussianDiffusion(LINEAR),
            "hybrid",
            "needs variance learned_range, got 'fixed_large': choose that, or the simple",
        ),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(batch, process, kind, message):
    x0, noise, t = batch
    with pytest.raises(ValueError, match=message):
        process.loss(noise, x0, noise, t, kind)
