"""Kernels of continuous processes: against Bayes' rule on a grid, and against each other."""

import copy
import math

import pytest
import torch

from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import GaussianDiffusion, cosine, linear, with_zero_terminal_snr
from diffusion.process import append_dims, apply_loss_weight, expand, is_shared, repeat_times, upcast
from diffusion.types import Prediction
from helpers.toy_gaussians import NORMAL, TWO, Circle

PROCESSES = {
    "linear": GaussianDiffusion(linear(1000)),
    "cosine": GaussianDiffusion(cosine(1000), variance="fixed_small"),
    "zero_terminal_snr": GaussianDiffusion(with_zero_terminal_snr(linear(1000)), "v"),
    "circle": Circle(),
    "flow": RectifiedFlow(shift=3.0),
    "edm": EDM(),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
TIME_PAIRS = [(0.9, 0.5), (0.5, 0.1), (0.25, 0.2), (1.0, 0.3)]  # (t, s) as fractions of the process's start


def scaled_times(process, t, s):
    return torch.tensor([t * process.start]), torch.tensor([s * process.start])


def normal(x, mean, variance):
    return (-0.5 * (x - mean) ** 2 / variance).exp() / (2 * math.pi * variance) ** 0.5


@every_process
def test_data_has_no_noise_and_time_adds_it(process):
    t = torch.linspace(0, 1, 101, dtype=torch.float64) * process.start
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert alpha[0] == 1 and sigma[0] == 0
    assert (alpha.diff() <= 0).all() and (sigma.diff() > 0).all()
    assert ((alpha / sigma)[1:].diff() < 0).all()


@every_process
@pytest.mark.parametrize("t, s", TIME_PAIRS)
def test_corruption_in_two_steps_is_corruption_in_one(process, t, s):
    t, s = scaled_times(process, t, s)
    scale = process.alpha(t) / process.alpha(s)
    assert torch.allclose(scale * process.alpha(s), process.alpha(t))
    assert torch.allclose(scale**2 * process.sigma(s) ** 2 + process.forward_variance(t, s), process.sigma(t) ** 2)
    assert (process.forward_variance(t, s) > 0).all()


@every_process
@pytest.mark.parametrize("t, s", TIME_PAIRS)
def test_the_posterior_is_bayes_rule(process, t, s):
    t, s = scaled_times(process, t, s)
    x0, x_t = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    mean, variance = process.posterior_mean(x0.view(1, 1), x_t.view(1, 1), t, s), process.posterior_variance(t, s)
    width = 12 * variance.sqrt().item()
    x_s = torch.linspace(mean.item() - width, mean.item() + width, 4001, dtype=torch.float64)
    prior = normal(x_s, process.alpha(s) * x0, process.sigma(s) ** 2)
    joint = prior * normal(x_t, process.alpha(t) / process.alpha(s) * x_s, process.forward_variance(t, s))
    joint = joint / joint.sum()
    assert (joint @ x_s).item() == pytest.approx(mean.item(), abs=1e-6 * width)
    assert (joint @ (x_s - joint @ x_s) ** 2).item() == pytest.approx(variance.item(), rel=1e-6)


@every_process
def test_the_last_step_gives_the_predicted_data(process):
    t, s = scaled_times(process, 0.1, 0)
    x_t, x0 = torch.full((1, 1, 2, 2), 0.3), torch.full((1, 1, 2, 2), 0.9)
    assert torch.allclose(process.posterior_mean(x0, x_t, t, s), x0)
    assert torch.isfinite(process.reverse_kernel(x_t, Prediction(x0, x0), t, s).log_variance).all()


@every_process
def test_the_reverse_kernel_draws_with_its_mean_and_variance(process, streams):
    t, s = scaled_times(process, 0.5, 0.3)
    x_t, pred = torch.full((1, 1, 100, 100), 0.3), Prediction(torch.full((1, 1, 100, 100), 0.9), torch.zeros(()))
    mean, log_variance = process.reverse_kernel(x_t, pred, t, s)
    x_s = process.reverse(x_t, pred, t, s, streams(1))
    deviation = (0.5 * log_variance).exp().item()
    assert x_s.mean().item() == pytest.approx(mean[0, 0, 0, 0].item(), abs=0.05 * deviation)
    assert x_s.std().item() == pytest.approx(deviation, rel=0.03)
    assert torch.equal(process.reverse(x_t, pred, t, 0 * s, streams(1)), process.posterior_mean(pred.x0, x_t, t, 0 * s))


@every_process
def test_times_may_be_one_per_example_or_one_for_all(process):
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9]) * process.start
    batched = process.corrupt(x0, t, noise)
    for i in range(3):
        assert torch.allclose(batched[i : i + 1], process.corrupt(x0[i : i + 1], t[i], noise[i : i + 1]))
        expected = process.alpha(t[i]) * x0[i] + process.sigma(t[i]) * noise[i]
        assert torch.allclose(batched[i], expected)


@every_process
def test_t_from_half_logsnr_inverts_half_logsnr(process):
    t = torch.tensor([0.003, 0.1, 0.5, 0.97], dtype=torch.float64) * process.start
    assert torch.allclose(process.t_from_half_logsnr(process.half_logsnr(t)), t, rtol=1e-3, atol=1e-9)


@every_process
@pytest.mark.parametrize("data", [NORMAL, TWO])
def test_data_and_noise_of_a_prediction_make_up_x_t(process, data):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    t = torch.tensor([0.4 * process.start])
    pred = data.denoiser(process)(x, t)
    assert torch.allclose(process.corrupt(pred.x0, t, pred.eps), x)  # holds for the tests' perfect denoiser, too
    other = process.with_x0(pred, pred.x0 + 0.1, x, t)
    assert torch.allclose(process.corrupt(other.x0, t, other.eps), x) and torch.equal(other.x0, pred.x0 + 0.1)


def test_coefficients_take_the_type_of_what_they_meet():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.ones(2, 3, 4, 4, dtype=dtype)
        assert append_dims(torch.ones(2, dtype=torch.float64), x).dtype == dtype
        assert PROCESSES["linear"].corrupt(x, torch.tensor([0.5, 1]), x).dtype == dtype
    assert upcast(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert upcast(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


@every_process
def test_noise_to_begin_with_has_the_size_of_pure_noise(process, streams):
    x = process.prior((2, 1, 64, 64), streams(2))
    assert x.std().item() == pytest.approx(process.sigma(torch.tensor(process.start)).item(), rel=0.03)


# Flow and EDM: their networks' outputs and losses


@pytest.mark.parametrize("process", [RectifiedFlow(), RectifiedFlow(shift=3.0), EDM()])
def test_a_perfect_output_has_no_loss_and_returns_x0_and_eps(process):
    x0, noise = torch.randn(2, 4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0.01, 0.3, 0.7, 1.0]) * process.start
    x_t = process.corrupt(x0, t, noise)
    if isinstance(process, RectifiedFlow):
        output = noise - x0
    else:
        sigma, data = append_dims(process.sigma(t), x0), process.sigma_data
        output = (x0 - x_t * data**2 / (sigma**2 + data**2)) * (sigma**2 + data**2) ** 0.5 / (sigma * data)
    pred = process.to_prediction(output, x_t, t)
    assert torch.allclose(pred.x0, x0) and torch.allclose(pred.eps, noise)
    assert torch.allclose(
        process.loss(output, x0, noise, t).per_example, torch.zeros(4, dtype=torch.float64), atol=1e-20
    )
    loss = process.loss(output + 0.1, x0, noise, t)  # a constant error costs the same at every time
    assert torch.allclose(loss.per_example, torch.full((4,), 0.01, dtype=torch.float64))
    weighted = process.loss(output + 0.1, x0, noise, t, loss_weight=torch.tensor([1.0, 0, 2]).view(1, 1, 1, 3) / 2)
    assert torch.allclose(weighted.per_example, loss.per_example / 2)
    assert torch.equal(weighted.metrics["mse"], loss.metrics["mse"])  # comparable between runs with other weights


def test_edm_network_input_and_target_have_unit_variance():
    process, t = EDM(sigma_data=0.5), torch.tensor([0.01, 0.5, 20.0])
    x0, noise = torch.randn(2, 3, 1, 200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = process.corrupt(0.5 * x0, t, noise)
    assert torch.allclose(
        process.network_input(x_t, t).flatten(1).std(1), torch.ones(3, dtype=torch.float64), rtol=0.02
    )
    zero, one = (process.to_prediction(torch.full_like(x_t, v), x_t, t).x0 for v in (0.0, 1.0))
    target = (0.5 * x0 - zero) / (one - zero)
    assert torch.allclose(target.flatten(1).std(1), torch.ones(3, dtype=torch.float64), rtol=0.02)
    assert process.network_time(t)[1].item() == pytest.approx(math.log(0.5) / 4)


def test_training_times_of_edm_and_flow(streams):
    log_sigma = EDM().times(streams(4000)).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.1) and log_sigma.std().item() == pytest.approx(
        1.2, rel=0.05
    )
    t = RectifiedFlow(mean=0.5, std=0.7).times(streams(4000))
    logit = t.logit()
    assert logit.mean().item() == pytest.approx(0.5, abs=0.06) and logit.std().item() == pytest.approx(0.7, rel=0.05)
    for process in (EDM(), RectifiedFlow()):
        assert torch.isfinite(process.quantile(torch.tensor([2**-24, 1.0]))).all()


def test_a_shift_moves_flow_towards_noise():
    t, plain, shifted = torch.tensor([0.0, 0.5, 1.0]), RectifiedFlow(), RectifiedFlow(shift=3.0)
    assert plain.sigma(t).tolist() == [0, 0.5, 1] and shifted.sigma(t).tolist() == [0, 0.75, 1]
    assert shifted.network_time(t).tolist() == [0, 0.75, 1]
    with pytest.raises(ValueError, match="shift 0"):
        RectifiedFlow(shift=0)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 4, 4), (3, 3, 4, 4), (3, 4, 4)])
def test_a_weight_of_each_example_place_or_number(shape):
    losses, weight = torch.rand(3, 3, 4, 4), torch.rand(shape)
    broadcast = weight.view(3, 1, 1, 1) if len(shape) == 1 else weight.unsqueeze(1) if len(shape) == 3 else weight
    assert torch.equal(apply_loss_weight(losses, weight), losses * broadcast)


@pytest.mark.parametrize("shape", [(4,), (3, 1), (4, 1, 4, 4), (3, 2, 4, 4), (4, 4)])
def test_a_weight_that_would_meet_other_axes_is_refused(shape):
    for losses in (torch.rand(3, 3, 4, 4), torch.rand(3, 4, 4)):
        with pytest.raises(ValueError, match="got a loss_weight"):
            apply_loss_weight(losses, torch.rand(shape))


@every_process
def test_scales_of_a_shared_time_are_those_of_every_example(process):
    x = torch.ones(3, 1, 2, 2)
    for t in (process.start, 0.3, 1 / 3, process.end):
        shared, each = expand(t, x), torch.full((3,), t)
        assert is_shared(shared) and not is_shared(each) and is_shared(each[:1]) and is_shared(torch.tensor(t))
        assert shared.device.type == "cpu" and torch.equal(shared, each)
        for alone, for_each in zip(process.scales(shared), process.scales(each), strict=True):
            assert alone.shape == () and alone.dtype == torch.float64
            assert torch.allclose(alone.expand(3), for_each, rtol=1e-15, atol=0)
        assert process.scales(shared) is process.scales(torch.tensor(t))  # looked up
        assert torch.equal(process.scales(each).alpha, process.alpha(each))
        assert torch.equal(process.corrupt(x, shared, 2 * x), process.corrupt(x, each, 2 * x))


def test_shared_times_that_are_kept_are_limited(monkeypatch):
    monkeypatch.setattr("diffusion.process.MAX_KNOWN", 3)
    process = RectifiedFlow()
    for i in range(10):
        assert process.scales(torch.tensor(i / 10)).sigma == pytest.approx(i / 10)
    assert 0 < len(process._known) <= 3 and process == RectifiedFlow()


def test_repeated_times_stay_shared():
    x = torch.ones(2, 1)
    assert is_shared(repeat_times(expand(0.5, x), 3)) and repeat_times(expand(0.5, x), 3).tolist() == [0.5] * 6
    assert repeat_times(torch.tensor([0.5, 0.25]), 2).tolist() == [0.5, 0.25, 0.5, 0.25]


@every_process
def test_scales_of_recent_times_are_kept_until_they_change(process):
    t, s = torch.tensor([0.5, 0.25, 0.125]) * process.start, torch.tensor([0.25, 0.125, 0.1]) * process.start
    first = process.scales(t), process.scales(s)
    assert process.scales(t) is first[0] and process.scales(s) is first[1]
    t.mul_(0.5)
    assert torch.equal(process.scales(t).sigma, process.sigma(t)) and not torch.equal(process.sigma(t), first[0].sigma)
    assert torch.equal(process.scales(s.clone()).alpha, process.alpha(s))


@every_process
def test_known_numbers_are_those_of_a_fresh_process(process):
    x, frac = torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2)

    def numbers(process, t, s, x):
        pred = Prediction(0.5 * x, x, frac.to(x.dtype))
        kernel = process.reverse_kernel(x, pred, t, s)
        times, eps = process.network_times(t.expand(3)), process.with_x0(pred, x, x, t).eps
        return *kernel, times, eps, process.network_input(x, t)

    t, s = torch.tensor(process.start / 2), torch.tensor(process.start / 3)
    for first, second, values in ((t, s, x), (s, s / 2, x), (t, s / 2, x), (t, s, x.double()), (t, s, x)):
        fresh = copy.copy(process)
        vars(fresh).pop("_known", None)
        for _ in range(2):
            for known, alone in zip(
                numbers(process, first, second, values), numbers(fresh, first, second, values), strict=True
            ):
                assert known.dtype == alone.dtype and torch.equal(known, alone)


def test_numbers_known_from_inference_can_be_trained_with():
    process, x = RectifiedFlow(), torch.ones(2, 1, 2, 2)
    with torch.inference_mode():
        process.corrupt(x, expand(0.5, x), x)
    noise = torch.ones(2, 1, 2, 2, requires_grad=True)
    process.corrupt(x, expand(0.5, x), noise).sum().backward()
    assert torch.equal(noise.grad, torch.full_like(x, 0.5))
