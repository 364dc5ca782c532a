"""Gaussian diffusion against diffusers: the same network and the same noise give the same trajectories.

Its step k is our t = (k + 1) / T. Its tables are float32, with four digits of alpha near T: they are compared, then
replaced by ours in float64, so that the formulas are tested rather than rounding. The last test keeps them.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion import gaussian_solvers as solvers
from diffusion.gaussian import GaussianDiffusion, cosine, linear, scaled_linear, with_zero_terminal_snr
from diffusion.process import append_dims
from diffusion.rng import Streams
from diffusion.spacing import step_times
from diffusion.types import Prediction
from helpers.parametrize import slow_after
from helpers.solving import solve_in_steps

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here: pip install diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

T = 1000
SCHEDULES = {
    "linear": (linear(T), {"beta_schedule": "linear"}),
    "scaled_linear": (
        scaled_linear(T),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (cosine(T), {"beta_schedule": "squaredcos_cap_v2"}),
    "zero_terminal_snr": (
        with_zero_terminal_snr(linear(T)),
        {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
    ),
}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SPACINGS = {"uniform": ("trailing", 20), "leading": ("leading", 20), "linspace": ("linspace", 10)}
SHAPE = (2, 3, 6, 6)

each_spacing = pytest.mark.parametrize("spacing", SPACINGS)
each_case = pytest.mark.parametrize(
    "schedule, prediction", [(s, p) for s in SCHEDULES for p in PREDICTIONS if (s, p) != ("zero_terminal_snr", "eps")]
)
each_multistep_case = pytest.mark.parametrize(  # at zero terminal SNR their alpha is 2^-12, ours 0
    "schedule, prediction", [(s, p) for s in ("linear", "cosine") for p in PREDICTIONS]
)


class Network:
    """A small fixed network of x and step k with bounded x_0, which predicts its process's target."""

    def __init__(self, process: GaussianDiffusion):
        self.process, generator = process, torch.Generator().manual_seed(0)
        draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 3, 3, 3), (6, 8, 3, 3))]
        self.first, self.second = (draw / draw[0].numel() ** 0.5 for draw in draws)

    def __call__(self, x, k):
        shift = (append_dims(k, x) / 300 + torch.arange(8).view(-1, 1, 1)).to(x.dtype)
        h = (F.conv2d(x, self.first.to(x.dtype), padding=1) + shift).sin()
        x0, frac = F.conv2d(h, self.second.to(x.dtype), padding=1).tanh().chunk(2, 1)
        t = (k.double() + 1) / T
        alpha, sigma = append_dims(self.process.alpha(t), x), append_dims(self.process.sigma(t), x)
        eps = (x - alpha * x0) / sigma
        pred = {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0}[self.process.prediction]
        return torch.cat([pred, frac], 1) if self.process.variance == "learned_range" else pred

    def denoise(self, x, t) -> Prediction:
        return self.process.to_prediction(self(x, self.process.network_time(t)), x, t)


class Noise:
    """Reproducible float64 noise."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def run_ours(solve, process, x, rng, steps, spacing, **options):
    """x after each step."""
    states = []
    network = Network(process)
    options["on_step"] = lambda i, t, s, x, x0: states.append(x) or x
    assert torch.equal(
        solve_in_steps(solve, network.denoise, process, x, steps=steps, rng=rng, spacing=spacing, **options), states[-1]
    )
    return states


def run_theirs(scheduler, process, x, noise=None, **options):
    """x after each step; `noise` is drawn for steps that take it as an argument."""
    states = []
    network = Network(process)
    for k in scheduler.timesteps:
        step_options = options if noise is None else {**options, "variance_noise": noise.normal(x.shape)}
        x = scheduler.step(network(x, k.expand(len(x))), k, x, **step_options).prev_sample
        states.append(x if getattr(scheduler, "last_sample", None) is None else scheduler.last_sample)
    return states if states[-1] is x else [*states[1:], x]  # UniPC: x as corrected by the next step


def largest_difference(actual, expected):
    """The largest difference over all steps, relative to the size of x."""
    pairs = list(zip(actual, expected, strict=True))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def their_steps(process, steps, spacing):
    return [round(t * T) - 1 for t in step_times(process, steps, spacing)[:-1]]


def scheduler_of(name, process, schedule, spacing="uniform", **options):
    """Their scheduler with float64 tables, and its number of steps, with our spacing if it supports it."""
    their_spacing, steps = SPACINGS[spacing]
    settings = {
        "prediction_type": PREDICTIONS[process.prediction],
        "timestep_spacing": their_spacing,
        **SCHEDULES[schedule][1],
    }
    scheduler = getattr(diffusers, name)(**settings, **options)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = process.alpha_bar[1:]
    if name in ("DDPMScheduler", "DDIMScheduler") or spacing == "uniform":
        assert scheduler.timesteps.tolist() == their_steps(process, steps, spacing)
    else:  # their multi-step solvers take one more interval, whose last point is 0
        scheduler.timesteps = torch.tensor(their_steps(process, steps, spacing))
    if hasattr(scheduler, "sigmas"):  # sigma / alpha, and 0
        alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps]
        ratios = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), alpha_bar.new_zeros(1)])
        assert spacing != "uniform" or torch.allclose(scheduler.sigmas.double(), ratios, rtol=1e-3)
        scheduler.sigmas = ratios
    return scheduler, steps


def initial_noise(process):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x * process.sigma(torch.tensor(1.0))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_tables_are_the_same(name):
    alpha_bar, options = SCHEDULES[name]
    scheduler = diffusers.DDPMScheduler(**options)
    assert torch.allclose(scheduler.alphas_cumprod.double(), alpha_bar[1:], rtol=2e-4, atol=1e-12)
    assert torch.allclose(scheduler.betas.double(), 1 - alpha_bar[1:] / alpha_bar[:-1], rtol=1e-3)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_snr_is_theirs(name):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    alpha_bar = SCHEDULES[name][0]
    betas = rescale_zero_terminal_snr(1 - alpha_bar[1:] / alpha_bar[:-1])
    shifted = with_zero_terminal_snr(alpha_bar)
    assert torch.allclose(1 - shifted[1:] / shifted[:-1], betas, rtol=1e-9, atol=1e-12)
    assert torch.allclose((1 - betas).cumprod(0), shifted[1:], rtol=1e-9, atol=1e-15) and betas[-1] == 1


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_are_theirs(prediction):
    """The weights of its training examples; for v divided by SNR + 1, since v's error is x_0's times sqrt(SNR + 1)."""
    from diffusers.training_utils import compute_snr

    k = torch.tensor([0, 10, 100, 500, 900, 999])
    snr = compute_snr(diffusers.DDPMScheduler(), k).double()
    per_output = {"eps": snr, "v": snr + 1, "x0": torch.ones(1).double()}[prediction]
    process = GaussianDiffusion(linear(T), prediction)
    weight = process.min_snr_weight((k + 1) / T, gamma=5.0)
    assert torch.allclose(weight, snr.clamp(max=5.0) / per_output, rtol=1e-3)


@each_case
@each_spacing
@pytest.mark.parametrize("variance", slow_after(1, ["learned_range", "fixed_small", "fixed_large"]))
def test_ddpm(schedule, prediction, spacing, variance, monkeypatch):
    """Theirs adds noise to the finished image where its last k is not 0 ("trailing"): here that noise is 0."""
    process = GaussianDiffusion(SCHEDULES[schedule][0], prediction, variance)
    options = {"variance_type": variance, "clip_sample": False}
    scheduler, steps = scheduler_of("DDPMScheduler", process, schedule, spacing, **options)
    noise, remaining = Noise(), iter(range(steps - 1, -1, -1))
    draw = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(draw, lambda shape, **_: noise.normal(shape) * (next(remaining) > 0))
    result = run_theirs(scheduler, process, initial_noise(process))
    assert (
        largest_difference(run_ours(solvers.ddpm, process, initial_noise(process), Noise(), steps, spacing), result)
        < 1e-9
    )


@each_case
@each_spacing
@pytest.mark.parametrize("eta", slow_after(1, [0.5, 0.0, 1.0]))
def test_ddim(schedule, prediction, spacing, eta):
    process = GaussianDiffusion(SCHEDULES[schedule][0], prediction)
    scheduler, steps = scheduler_of("DDIMScheduler", process, schedule, spacing, clip_sample=False)
    if spacing == "linspace":
        scheduler.num_inference_steps = steps - 1  # its stride is T // this, and linspace has one interval fewer
    result = run_theirs(scheduler, process, initial_noise(process), Noise(), eta=eta)
    assert (
        largest_difference(
            run_ours(solvers.ddim, process, initial_noise(process), Noise(), steps, spacing, eta=eta), result
        )
        < 1e-9
    )


@each_multistep_case
@each_spacing
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_solver_plus_plus(schedule, prediction, spacing, algorithm, monkeypatch):
    """Theirs rounds x to float32 between steps, and bounds no extrapolation."""
    monkeypatch.setattr(solvers, "LONG_STEP", math.inf)
    process = GaussianDiffusion(SCHEDULES[schedule][0], prediction)
    options = {"algorithm_type": algorithm, "solver_type": "midpoint", "final_sigmas_type": "zero"}
    scheduler, steps = scheduler_of("DPMSolverMultistepScheduler", process, schedule, spacing, **options)
    solve = solvers.dpmpp_2m if algorithm == "dpmsolver++" else solvers.dpmpp_2m_sde
    result = run_theirs(scheduler, process, initial_noise(process), Noise())
    assert largest_difference(run_ours(solve, process, initial_noise(process), Noise(), steps, spacing), result) < 2e-6


@each_multistep_case
@each_spacing
def test_unipc(schedule, prediction, spacing, monkeypatch):
    """Theirs takes 1/2 for the weight of the first correction, ours the integral: both are second order.

    Theirs bounds no extrapolation.
    """
    monkeypatch.setattr(solvers, "LONG_STEP", math.inf)
    process = GaussianDiffusion(SCHEDULES[schedule][0], prediction)
    scheduler, steps = scheduler_of("UniPCMultistepScheduler", process, schedule, spacing, solver_type="bh2")
    result = run_theirs(scheduler, process, initial_noise(process))
    default = largest_difference(
        run_ours(solvers.unipc, process, initial_noise(process), Noise(), steps, spacing), result
    )
    corrector = solvers.unipc_corrector

    def halved_corrector(x, x0, ahead, past, ends):
        half = solvers.x0_step(x, (x0 + ahead) / 2, ends)
        return half if past is None else corrector(x, x0, ahead, past, ends)

    monkeypatch.setattr(solvers, "unipc_corrector", halved_corrector)
    halved = largest_difference(
        run_ours(solvers.unipc, process, initial_noise(process), Noise(), steps, spacing), result
    )
    assert halved < 1e-9 and 1e-6 < default < 0.02


FLOAT32_CASES = {  # ours -> theirs
    "ddpm": ("DDPMScheduler", "leading", {"variance_type": "learned_range", "clip_sample": False}, {}),
    "ddim": ("DDIMScheduler", "uniform", {"clip_sample": False}, {"eta": 0.5}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", "uniform", {"algorithm_type": "sde-dpmsolver++"}, {}),
}


@pytest.mark.parametrize("solver", FLOAT32_CASES)
def test_the_same_seeds_make_the_same_images_in_float32(solver):
    name, spacing, options, extra = FLOAT32_CASES[solver]
    process = GaussianDiffusion(linear(T), variance="learned_range" if solver == "ddpm" else "fixed_small")
    scheduler = getattr(diffusers, name)(**options, timestep_spacing=SPACINGS[spacing][0])
    scheduler.set_timesteps(20)
    x = initial_noise(process).float()
    result = run_theirs(scheduler, process, x, **extra, generator=Streams([5, 6]).generators)
    actual = run_ours(getattr(solvers, solver), process, x, Streams([5, 6]), 20, spacing, **extra)
    assert actual[-1].dtype == result[-1].dtype == torch.float32
    assert largest_difference(actual, result) < 1e-4
