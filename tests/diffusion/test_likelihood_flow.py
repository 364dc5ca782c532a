"""The probability-flow likelihood: against known densities, and its invariances."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import GaussianDiffusion, cosine, discretized_log_likelihood, linear, with_zero_terminal_snr
from diffusion.likelihood import BIN_WIDTH, dequantize, flow_bits_per_dimension, flow_points, flow_velocity
from diffusion.process import append_dims
from diffusion.rng import Streams
from diffusion.solvers import solvers_for
from diffusion.spacing import SPACINGS
from diffusion.types import Normal, Prediction
from helpers.parametrize import slow_after
from helpers.toy_gaussians import NORMAL, TWO, Circle, Mixture, convergence_order

PROCESSES = {
    "edm": EDM(),
    "flow": RectifiedFlow(),
    "shifted": RectifiedFlow(shift=3.0),
    "linear": GaussianDiffusion(linear(1000)),
    "cosine": GaussianDiffusion(cosine(1000)),
    "zero_terminal_snr": GaussianDiffusion(with_zero_terminal_snr(cosine(1000)), "v"),
    "learned_range": GaussianDiffusion(linear(300), "x0", "learned_range"),
}
EMPTY_AT_START = [name for name in PROCESSES if PROCESSES[name].alpha(torch.tensor(PROCESSES[name].start)) == 0]
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


class Correlated:
    """Gaussian images (1, 2, 2) with a mean and variance per pixel, rotated if `correlated`."""

    def __init__(self, correlated: bool):
        generator = torch.Generator().manual_seed(1)
        self.mean = torch.tensor([0.3, -0.2, 0.1, -0.4]).double()
        self.variances = torch.tensor([0.15, 0.02, 0.05, 0.004]).double()
        rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
        self.axes = rotation if correlated else torch.eye(4).double()

    def draw(self, count: int) -> torch.Tensor:
        noise = torch.randn(count, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return (self.mean + (noise * self.variances.sqrt()) @ self.axes.T).clamp(-1, 1).view(count, 1, 2, 2)

    def denoiser(self, process):
        def denoise(x, t):
            alpha, sigma = (c.to(x).view(-1, 1) for c in (process.alpha(t), process.sigma(t)))
            mean, axes, variances = self.mean.to(x), self.axes.to(x), self.variances.to(x)
            whitened = (x.flatten(1) - alpha * mean) @ axes / (alpha**2 * variances + sigma**2)
            x0, eps = mean + (alpha * variances * whitened) @ axes.T, (sigma * whitened) @ axes.T
            return Prediction(x0.view(x.shape), eps.view(x.shape))

        return denoise

    def bits(self, x, process=None):
        """Bits of x under the data's density or, with a process, under N(0, sigma_T^2) carried back by its flow."""
        mean, variances = self.mean @ self.axes, self.variances
        if process:
            (a, v), (a_T, v_T) = (
                (alpha, alpha**2 * variances + process.sigma(t) ** 2)
                for t in (torch.tensor(process.end), torch.tensor(process.start))
                for alpha in [process.alpha(t)]
            )
            spread = (v / v_T).sqrt()
            mean, variances = (
                (a - spread * a_T) * mean / a,
                (spread * process.sigma(torch.tensor(process.start)) / a) ** 2,
            )
        normal = torch.distributions.Normal(mean, variances.sqrt())
        return -normal.log_prob(x.flatten(1) @ self.axes).mean(1) / math.log(2) - math.log2(2 / 255)


def smoothed_bits(data: Mixture, process, x):
    """Bits under the density of x_end / alpha, for data with an independent mixture per value."""
    t = torch.tensor(process.end)
    spread = (data.variance + (process.sigma(t) / process.alpha(t)) ** 2).sqrt()
    parts = torch.distributions.Normal(torch.tensor(data.means).double(), spread).log_prob(x.unsqueeze(-1))
    density = (parts + torch.tensor(data.weights).double().log()).logsumexp(-1)
    return -density.flatten(1).mean(1) / math.log(2) - math.log2(2 / 255)


@pytest.fixture
def x0():
    return NORMAL.draw(3, 1, 2, 2).clamp(-1, 1)


# Known densities


@pytest.mark.parametrize("process", slow_after(3, PROCESSES.values()))
@pytest.mark.parametrize("correlated", slow_after(1, [True, False]))
def test_the_likelihood_of_a_gaussian_is_met_at_second_order(process, correlated, streams):
    data = Correlated(correlated)
    x0 = data.draw(3)
    expected, errors = data.bits(dequantize(x0, streams(3)), process), {}
    for steps in (20, 40, 80, 160):
        result = flow_bits_per_dimension(data.denoiser(process), process, x0, streams(3), steps=steps, exact=True)
        errors[steps] = (result.total - expected).abs().max().item()
    assert convergence_order(errors) == pytest.approx(2, abs=0.2) and errors[160] < 2e-3


@pytest.mark.parametrize("name", EMPTY_AT_START)
def test_the_likelihood_of_a_mixture_is_met_at_second_order(name, streams):
    process, x0 = PROCESSES[name], TWO.draw(3, 1, 2, 2).clamp(-1, 1)
    expected, errors = smoothed_bits(TWO, process, dequantize(x0, streams(3))), {}
    for steps in (50, 100, 200):
        result = flow_bits_per_dimension(TWO.denoiser(process), process, x0, streams(3), steps=steps, exact=True)
        errors[steps] = (result.total - expected).abs().max().item()
    assert convergence_order(errors) == pytest.approx(2, abs=0.25) and errors[200] < 2e-3


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_goes_from_the_least_noise_to_pure_noise(spacing, streams):
    process, data = Circle(), Correlated(False)
    path = flow_points(process, 40, spacing)
    assert len(path) == 41 and (path[0].t, path[-1].t) == (process.end, process.start)
    assert all(a.log_tan_half < b.log_tan_half for a, b in zip(path[:-1], path[1:], strict=True))
    x0, expected = data.draw(3), data.bits(dequantize(data.draw(3), streams(3)), process)
    result = flow_bits_per_dimension(data.denoiser(process), process, x0, streams(3), steps=400, spacing=spacing)
    assert (result.total - expected).abs().max() < 3e-3


@every_process
def test_the_bias_of_stopping_at_end_is_the_remaining_blur(process, streams):
    """On average it is KL(p_0 || p_end) of variances v and v + (sigma / alpha)^2: second order in their ratio."""
    data, t = Correlated(False), torch.tensor(process.end)
    blur = (process.sigma(t) / process.alpha(t)) ** 2 / data.variances
    expected = 0.5 * (blur.log1p() - blur / (1 + blur)).mean().item() / math.log(2)
    x = data.mean + data.variances.sqrt() * torch.tensor(
        [[1, 1, 1, 1], [-1, -1, -1, -1]]
    )  # their variance is the data's
    bias = (data.bits(x, process) - data.bits(x)).mean().item()
    assert bias == pytest.approx(expected, abs=1e-4) and bias < 3e-3
    x0 = x.view(2, 1, 2, 2)
    result = flow_bits_per_dimension(data.denoiser(process), process, x0, streams(2), steps=200)
    data_bits = data.bits(dequantize(x0, streams(2)))  # exact: depends on neither end nor start
    assert result.total.mean().item() == pytest.approx(data_bits.mean().item(), abs=2e-3)


# Bins


def test_uniform_images_have_eight_bits(streams):
    """The bins of 256 levels fill [-c, c], on which the density is constant: each has the mass 1 / 256."""
    process, c = EDM(), 256 / 255
    normal = torch.distributions.Normal(torch.zeros(()).double(), 1)

    def denoise(x, t):
        sigma = append_dims(process.sigma(t), x)
        low, high = (-c - x) / sigma, (c - x) / sigma
        pull = (normal.log_prob(low).exp() - normal.log_prob(high).exp()) / (normal.cdf(high) - normal.cdf(low))
        return Prediction(x + sigma * pull, -pull)

    x0 = (torch.tensor([3, 60, 128, 255 - 3]) / 127.5 - 1).view(1, 1, 2, 2).double()
    result = flow_bits_per_dimension(denoise, process, x0, streams(1), steps=200, exact=True)
    assert result.total.item() == pytest.approx(8, abs=1e-3)


def test_the_mean_density_in_a_bin_times_its_width_is_its_mass(streams):
    data, process = Mixture((1.0,), (0.2,), 0.004**2), Circle()
    t = torch.tensor(process.end)
    spread = (data.variance + (process.sigma(t) / process.alpha(t)) ** 2).sqrt()
    level = torch.tensor(153 / 127.5 - 1).double()
    x0 = level.expand(1000, 1, 1, 1)
    mass = discretized_log_likelihood(level, Normal(torch.tensor(0.2).double(), 2 * spread.log())).exp()
    result = flow_bits_per_dimension(data.denoiser(process), process, x0, streams(1000), steps=150)
    masses = (-result.total).exp2()
    assert masses.mean().item() == pytest.approx(mass.item(), abs=4 * masses.std().item() / 1000**0.5 + 1e-3)
    assert 2 ** -result.total.mean().item() < mass.item()  # Jensen: an upper bound on the bits


def test_dequantized_numbers_fill_their_bins_and_no_more(streams):
    x0 = torch.full((2, 1, 100, 100), 0.5, dtype=torch.float64)
    offset = (dequantize(x0, streams(2)) - x0) * 127.5
    assert BIN_WIDTH == 2 / 255 and offset.abs().max() <= 0.5
    assert offset.mean().abs() < 0.01 and offset.var().item() == pytest.approx(1 / 12, rel=0.03)


@pytest.mark.parametrize("end, extra", [(0.001, 1.73), (0.002, 0.07), (0.005, 0.0)])
def test_a_network_that_knows_the_levels_costs_bits_between_them(end, extra, streams):
    process = RectifiedFlow(end=end)
    levels = Mixture((1 / 256,) * 256, tuple(i / 127.5 - 1 for i in range(256)), 0.0)
    x0 = (torch.arange(50, 200, dtype=torch.float64) / 127.5 - 1).view(1, 1, 10, 15)
    result = flow_bits_per_dimension(levels.denoiser(process), process, x0, streams(1), steps=200)
    assert result.total.item() == pytest.approx(8 + extra, abs=0.1 if extra > 1 else 0.03)


# Hutchinson's estimate


@pytest.mark.parametrize("probes", [1, 3])
def test_the_estimate_is_unbiased_and_more_probes_spread_less(probes, streams):
    data, process, count = Correlated(True), PROCESSES["cosine"], 3000
    point, y = flow_points(process, 10, "logsnr")[3], data.draw(1).expand(count, 1, 2, 2)
    measure = partial(flow_velocity, data.denoiser(process), point)
    exact = measure(y[:1], streams(1), 1, True).divergence.item()
    result = measure(y, streams(count), probes, False).divergence
    error = result.std().item() / count**0.5
    assert 0 < error and abs(result.mean().item() - exact) < 4 * error
    single = measure(y, streams(count, 1), 1, False).divergence
    assert (result.std() / single.std()).item() == pytest.approx(probes**-0.5, rel=0.1)


def test_the_estimated_total_is_the_exact_one_on_average(streams):
    data, process, count = Correlated(True), PROCESSES["flow"], 2000
    x0 = data.draw(1).expand(count, 1, 2, 2)
    bits = partial(flow_bits_per_dimension, data.denoiser(process), process, x0, steps=10)
    gap = bits(streams(count)).total - bits(streams(count), exact=True).total  # of the same dequantization
    error = gap.std().item() / count**0.5
    assert 0 < error < 0.01 and abs(gap.mean().item()) < 4 * error


def test_the_exact_divergence_is_the_trace_of_the_jacobian(streams):
    process = PROCESSES["flow"]
    point, y = flow_points(process, 10, "logsnr")[4], TWO.draw(2, 1, 2, 2)

    def velocity(y):
        return flow_velocity(TWO.denoiser(process), point, y, streams(len(y)), 1, True).velocity

    shifted = torch.eye(4).double().view(4, 1, 2, 2) * 1e-5
    traces = [((velocity(image + shifted) - velocity(image - shifted)) / 2e-5).flatten(1).trace().item() for image in y]
    assert flow_velocity(TWO.denoiser(process), point, y, streams(2), 1, True).divergence.tolist() == pytest.approx(
        traces
    )


# Invariances


@pytest.mark.parametrize("exact", [False, True])
def test_the_bits_of_an_image_do_not_depend_on_its_batch(exact, streams):
    data, process = Correlated(True), PROCESSES["cosine"]
    bits = partial(flow_bits_per_dimension, data.denoiser(process), process, steps=5, exact=exact)
    batched, single = bits(data.draw(3), streams(3)), bits(data.draw(3)[:1], streams(1))
    assert batched.total.shape == (3,) and torch.allclose(batched.total[:1], single.total, rtol=1e-12)
    assert torch.allclose(batched.total, batched.prior + batched.volume + math.log2(127.5))
    assert not torch.equal(batched.total, bits(data.draw(3), streams(3, 1)).total)


def test_no_gradient_leaks_and_a_caller_may_be_without(x0, streams):
    process, network = PROCESSES["zero_terminal_snr"], nn.Conv2d(1, 1, 3, padding=1).double()

    def denoise(x, t):
        return process.to_prediction(network(x), x, t)

    x0.requires_grad_()
    result = flow_bits_per_dimension(denoise, process, x0, streams(3), steps=3)
    flow = flow_velocity(denoise, flow_points(process, 3, "logsnr")[1], x0, streams(3), 1, False)
    assert not any(part.requires_grad for part in (*result, *flow)) and torch.is_grad_enabled()
    assert x0.grad is None and network.weight.grad is None and network.weight.requires_grad
    with torch.no_grad():
        network.requires_grad_(False)
        assert torch.equal(flow_bits_per_dimension(denoise, process, x0, streams(3), steps=3).total, result.total)
        assert not torch.is_grad_enabled()


@every_process
def test_precision_is_the_images_own(process, streams):
    data = Correlated(False)  # with a diagonal Jacobian random signs give the exact trace
    x0 = data.draw(3)
    bits = partial(flow_bits_per_dimension, data.denoiser(process), process)
    for x in (x0, x0.float()):
        result, expected = bits(x, streams(3), steps=160), data.bits(dequantize(x, streams(3)).double(), process)
        assert all(part.dtype == x.dtype for part in result) and (result.total - expected).abs().max() < 5e-3
    assert bits(x0.half(), streams(3), steps=2).total.dtype == torch.float32


def test_both_ends_of_each_step_are_evaluated_from_end_to_start(x0, streams):
    times, process = [], EDM()

    def denoise(x, t):
        assert x.dtype == torch.float64 and t.shape == (3,) and t.dtype == torch.float32
        times.append(t[0].item())
        return NORMAL.denoiser(process)(x, t)

    flow_bits_per_dimension(denoise, process, x0, streams(3), steps=3)
    assert times[::5] == pytest.approx([0.002, 80]) and times[1::2][:-1] == times[2::2] and times == sorted(times)
    assert not {"flow_bits_per_dimension", "flow_velocity"} & solvers_for(process).keys()


def test_nothing_is_left_on_another_device():
    y, rng = torch.zeros(2, 1, 4, 4, device="meta"), Streams([1, 2], "meta")  # a device without data
    for exact in (False, True):
        flow = flow_velocity(lambda x, t: Prediction(x * t[0], x), flow_points(EDM(), 5, "logsnr")[2], y, rng, 2, exact)
        assert flow.velocity.device == flow.divergence.device == dequantize(y, rng).device == y.device


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "got 0 steps and 1 probes, wanted at least 1"),
        ({"probes": 0}, "got 50 steps and 0 probes, wanted at least 1"),
        ({"spacing": "even"}, "step spacing 'even': choose one of"),
    ],
)
def test_bad_options_are_refused(options, message, x0, streams):
    with pytest.raises(ValueError, match=message):
        flow_bits_per_dimension(NORMAL.denoiser(EDM()), EDM(), x0, streams(3), **options)


def test_what_is_no_scaled_image_is_refused_and_too_few_streams(x0, streams):
    bits = partial(flow_bits_per_dimension, NORMAL.denoiser(EDM()), EDM())
    for wrong in (x0.byte(), x0 * 127.5, x0[0]):
        with pytest.raises(ValueError, match=r"wanted images \(B, C, H, W\) in \[-1, 1\]: pass x / 127.5 - 1"):
            bits(wrong, streams(3))
    with pytest.raises(ValueError, match="one seed per example"):
        bits(x0, streams(2))


def test_a_denoiser_without_a_gradient_is_refused(x0, streams):
    with pytest.raises(ValueError, match="got a prediction without gradients"):
        flow_bits_per_dimension(torch.no_grad()(NORMAL.denoiser(EDM())), EDM(), x0, streams(3))
