"""Whole sampling runs of Stable Diffusion, recorded with public pipelines: latents after every step."""

import numpy as np
import pytest
import torch

from diffusion.denoisers import guided
from diffusion.gaussian import GaussianDiffusion, scaled_linear, with_zero_terminal_snr
from diffusion.gaussian_solvers import ddim, dpmpp_2m
from diffusion.rng import Streams
from diffusion.sd_solvers import euler, plms, whole_step_times
from diffusion.spacing import step_times
from helpers.sd_fixtures import FIXTURES, HAS_FIXTURES, load_unet
from models.conditioning import Condition, Tokens
from train.converters.sd.files import read_source
from train.converters.sd.runs import load_autoencoder, load_text

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


@pytest.fixture
def is_close(agrees):
    """Compares latents or images by their relative root mean square: errors of float32 add up over the steps."""
    return lambda got, wanted, name: agrees(got, wanted, f"pipelines: {name}", relative=True)


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
def test_ddim_is_that_of_the_public_pipeline(version, name, count, options, is_close):
    io = recorded(version)
    times = whole_step_times(process_of(version), count, "whole_leading", 1, last=FIRST)
    states, calls = sample(version, io, ddim, times, **options)
    assert is_close(states[-1], io[f"{name}_latents"][-1], f"{version} {name}")
    if f"{name}_t" in io:
        assert calls == io[f"{name}_t"].tolist()


@HAS_FIXTURES
def test_plms_is_that_of_the_public_pipeline(is_close):
    io = recorded("sd1")
    times = whole_step_times(process_of("sd1"), 6, "whole_leading", 1, last=FIRST)
    states, calls = sample("sd1", io, plms, times)
    assert calls == io["pndm_t"].tolist()  # one more than steps
    for i, (own, public) in enumerate(zip(states, io["pndm_latents"][1:], strict=True)):  # theirs has step 0 twice
        assert is_close(own, public, f"sd1 plms, step {i}")


@HAS_FIXTURES
@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_dpmpp_2m_is_that_of_the_public_pipeline(version, is_close):
    io = recorded(version)
    times = whole_step_times(process_of(version), 6, "whole_open")
    states, calls = sample(version, io, dpmpp_2m, times)
    assert calls == io["dpmpp2m_t"].tolist()
    assert is_close(states[-1], io["dpmpp2m_latents"][-1], f"{version} dpmpp_2m")


@HAS_FIXTURES
def test_trailing_steps_at_zero_terminal_snr(is_close):
    """The public scheduler steps to T // N below a step, while its next one is rounded: its states are off by one
    step, which is repeated here to compare with."""
    io, process = recorded("sd2"), process_of("sd2", zero_snr=True)
    times = whole_step_times(process, 6, "whole_trailing", last=FIRST)
    assert [round(t * 1000) - 1 for t in times[:-1]] == io["ddim_zsnr_trailing_t"].tolist()
    x = io["noise"]
    for t in times[:-1]:
        step = {"process": process, "noise": "x", "rescale": 0.7}
        x = sample("sd2", io | {"x": x}, ddim, [t, max(t - 166 / 1000, FIRST)], **step)[0][-1]
    assert is_close(x, io["ddim_zsnr_trailing_latents"][-1], "sd2 ddim, trailing, zero terminal SNR")


@HAS_FIXTURES
@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_euler_is_that_of_the_public_pipeline(version, is_close):
    """The public state is x / alpha; between steps sigma / alpha is interpolated there, alpha here."""
    io, process = recorded(version), process_of(version)
    times = step_times(process, 6, "linspace")
    assert [t * 1000 - 1 for t in times[:-1]] == pytest.approx(io["euler_t"].tolist(), abs=1e-4)
    noise = process.sigma(torch.tensor(1.0)).float() * io["noise"]  # the prior of the process
    states, _ = sample(version, io | {"x": noise}, euler, times, noise="x")
    assert is_close(states[-1], io["euler_latents"][-1], f"{version} euler")


@HAS_FIXTURES
@pytest.mark.parametrize("version", ["sd1", "sd2"])
@pytest.mark.parametrize(("name", "count", "noise"), [("ddim", 6, "noise"), ("ddim_rect", 3, "noise_rect")])
@torch.no_grad()
def test_a_prompt_becomes_the_image_of_the_public_pipeline(version, name, count, noise, is_close):
    """From the ids of a prompt and of the empty one to pixels: only ids and noise are recorded."""
    io, folder = recorded(version), FIXTURES / f"text/{version}"
    encoder, autoencoder = load_text(read_source(folder))[0].eval(), load_autoencoder(read_source(FIXTURES / "vae"))
    prompt, empty = encoder(torch.from_numpy(np.load(folder / "io.npz")["tiny_ids"][:2])).tokens.split(1)
    times = whole_step_times(process_of(version), count, "whole_leading", 1, last=FIRST)
    states, _ = sample(version, io | {"cond": prompt, "negative": empty}, ddim, times, noise=noise)
    network = autoencoder.network.eval()
    image = (network.decode(states[-1] / network.config.scaling_factor) / 2 + 0.5).clamp(0, 1)
    assert is_close(image, io[f"{name}_image"], f"{version} {name}, image of the prompt")
