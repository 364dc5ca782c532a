"""Whole sampling runs of Stable Diffusion, recorded with public pipelines: latents after every step."""

import numpy as np
import pytest
import torch

from diffusion.denoisers import guided
from diffusion.gaussian import GaussianDiffusion, scaled_linear, with_zero_terminal_snr
from diffusion.gaussian_solvers import ddim, dpmpp_2m, step_times
from diffusion.rng import Streams
from diffusion.sd_solvers import euler, plms, whole_step_times
from helpers.sd_fixtures import FIXTURES, HAS_FIXTURES, load_unet
from models.conditioning import Condition, Tokens

FIRST = 1 / 1000  # the time of the state after the first step of noise


def recorded(version):
    return {name: torch.from_numpy(v) for name, v in np.load(FIXTURES / version / "pipeline_io.npz").items()}


def process_of(version, zero_snr=False):
    alpha_bar = scaled_linear(1000)
    alpha_bar = with_zero_terminal_snr(alpha_bar) if zero_snr else alpha_bar
    return GaussianDiffusion(alpha_bar, "eps" if version == "sd1" else "v", "fixed_small")


def sample(version, io, solve, times, *, process=None, noise="noise", scale=7.5, rescale=0.0):
    """Returns the latents after every step, and the steps of the network calls."""
    process, (network, _) = process or process_of(version), load_unet(version, "folder")
    calls = []

    def denoise(x, t, condition):
        calls.append(round(t[0].item() * 1000) - 1)
        return process.to_prediction(network(x, process.network_times(t), condition), x, t)

    conditions = [Condition({"text": Tokens(io[name])}) for name in ("negative", "cond")]
    options = {"rescale": rescale, "rescale_of": "output", "process": process}
    denoise = guided(denoise, conditions, [scale], **options)
    states = []

    def keep(i, t, s, x, x0):
        states.append(x)
        return x

    with torch.no_grad():
        solve(denoise, process, io[noise], times, rng=Streams([0]), on_step=keep)
    return torch.stack(states), calls


def relative_rms(got, wanted):
    return ((got - wanted).pow(2).mean().sqrt() / wanted.pow(2).mean().sqrt()).item()


@HAS_FIXTURES
@pytest.mark.parametrize("version", ["sd1", "sd2"])
@pytest.mark.parametrize(
    ("name", "count", "options"),
    [
        ("ddim", 6, {}),
        ("ddim_rect", 3, {"noise": "noise_rect"}),
        ("ddim_noguide", 6, {"scale": 1.0}),
        ("ddim_rescale07", 6, {"rescale": 0.7}),
    ],
)
def test_ddim_is_that_of_the_public_pipeline(version, name, count, options, record_property):
    io = recorded(version)
    times = whole_step_times(process_of(version), count, "whole_leading", 1, last=FIRST)
    states, calls = sample(version, io, ddim, times, **options)
    difference = relative_rms(states[-1], io[f"{name}_latents"][-1])
    record_property(f"{version} {name}", difference)
    assert difference < 1e-5
    if f"{name}_t" in io:
        assert calls == io[f"{name}_t"].tolist()


@HAS_FIXTURES
def test_plms_is_that_of_the_public_pipeline(record_property):
    io = recorded("sd1")
    times = whole_step_times(process_of("sd1"), 6, "whole_leading", 1, last=FIRST)
    states, calls = sample("sd1", io, plms, times)
    assert calls == io["pndm_t"].tolist()  # one more than steps
    difference = relative_rms(states[-1], io["pndm_latents"][-1])
    record_property("sd1 plms", difference)
    assert difference < 1e-5
    for own, public in zip(states, io["pndm_latents"][1:], strict=True):  # theirs has the first step twice
        assert relative_rms(own, public) < 1e-5


@HAS_FIXTURES
@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_dpmpp_2m_is_that_of_the_public_pipeline(version, record_property):
    io = recorded(version)
    times = whole_step_times(process_of(version), 6, "whole_open")
    states, calls = sample(version, io, dpmpp_2m, times)
    assert calls == io["dpmpp2m_t"].tolist()
    difference = relative_rms(states[-1], io["dpmpp2m_latents"][-1])
    record_property(f"{version} dpmpp_2m", difference)
    assert difference < 1e-5


@HAS_FIXTURES
def test_trailing_steps_at_zero_terminal_snr(record_property):
    """The public scheduler steps to T // N below a step, while its next one is rounded: its states are off by one
    step, which is repeated here to compare with."""
    io, process = recorded("sd2"), process_of("sd2", zero_snr=True)
    times = whole_step_times(process, 6, "whole_trailing", last=FIRST)
    assert [round(t * 1000) - 1 for t in times[:-1]] == io["ddim_zsnr_trailing_t"].tolist()
    x = io["noise"]
    for t in times[:-1]:
        step = {"process": process, "noise": "x", "rescale": 0.7}
        x = sample("sd2", io | {"x": x}, ddim, [t, max(t - 166 / 1000, FIRST)], **step)[0][-1]
    difference = relative_rms(x, io["ddim_zsnr_trailing_latents"][-1])
    record_property("sd2 ddim, trailing, zero terminal SNR", difference)
    assert difference < 1e-5


@HAS_FIXTURES
@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_euler_is_that_of_the_public_pipeline(version, record_property):
    """The public state is x / alpha; between steps sigma / alpha is interpolated there, alpha here."""
    io, process = recorded(version), process_of(version)
    times = step_times(process, 6, "linspace")
    assert [t * 1000 - 1 for t in times[:-1]] == pytest.approx(io["euler_t"].tolist(), abs=1e-4)
    noise = process.sigma(torch.tensor(1.0)).float() * io["noise"]  # the prior of the process
    states, _ = sample(version, io | {"x": noise}, euler, times, noise="x")
    difference = relative_rms(states[-1], io["euler_latents"][-1])
    record_property(f"{version} euler", difference)
    assert difference < 1e-5
