"""Inversion against runs that were recorded with a public UNet: states of every step, noise maps, round trips."""

import json

import numpy as np
import pytest
import torch

from diffusion.gaussian import GaussianDiffusion, scaled_linear
from diffusion.gaussian_solvers import ddim
from diffusion.inversion import bdia, bdia_inversion, ddim_inversion, ddpm_noise_maps, in_float64, replay
from diffusion.rng import Streams
from diffusion.sd_solvers import whole_step_times
from helpers.sd_fixtures import FIXTURES, HAS_FIXTURES, load_unet
from models.conditioning import Condition, Tokens

pytestmark = HAS_FIXTURES
FIRST = 1 / 1000  # the time of the state after the first step of noise, for which the image is taken
PREDICTED = {"sd1": "eps", "sd2": "v"}  # by the networks of the fixtures


def recorded(name):
    return {key: torch.from_numpy(array) for key, array in np.load(FIXTURES / f"editing/{name}.npz").items()}


def setting(version, steps=10):
    """The denoiser in float64 around a float32 network, its process, the times and the image."""
    process = GaussianDiffusion(scaled_linear(1000), PREDICTED[version], "fixed_small")
    source = recorded("inversion")["source"] if version == "sd1" else recorded("exact_inversions")["condition"]
    network, condition = load_unet(version, "folder")[0], Condition({"text": Tokens(source)})

    def denoise(x, t):
        return process.to_prediction(network(x, process.network_times(t), condition), x, t)

    times = whole_step_times(process, steps, "whole_leading", 1, last=FIRST)
    return in_float64(denoise), process, times, recorded("inversion")["latent"].double()


@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_the_first_iterate_is_that_of_the_public_scheduler(version, agrees):
    denoise, process, times, _ = setting(version)
    states = recorded("inversion")[f"{version}_inverted_1"].double()
    for i in range(10):
        step = [times[-2 - i], times[-1 - i]]
        found = ddim_inversion(denoise, process, states[i : i + 1], step, iterations=1)
        name = f"DDIM inversion: first iterates, {PREDICTED[version]}"
        assert agrees(found.states[-1], states[i + 1 : i + 2], name)


@pytest.mark.parametrize(
    ("version", "steps", "most"),
    [("sd2", 10, 5e-6), pytest.param("sd1", 50, 1e-3, marks=pytest.mark.slow)],
)
def test_twenty_iterations_return_to_the_image(version, steps, most, agrees):
    denoise, process, times, latent = setting(version, steps)
    found = ddim_inversion(denoise, process, latent, times, iterations=20, tolerance=1e-8)
    back = ddim(denoise, process, found.states[-1], times, rng=Streams([0]))
    name = f"DDIM inversion: round trip of 20 iterations, {PREDICTED[version]}, {steps} steps"
    assert agrees(back, latent, name, most)
    kind = {"sd1": "sd1_epsilon", "sd2": "sd2_v_prediction"}[version]
    errors = json.loads((FIXTURES / "editing/inversion_errors.json").read_text())
    assert (back - latent).abs().max() < 1e-4 * errors[f"{kind}_{steps}steps_1iterations"]["max"]


def test_twenty_iterations_find_the_recorded_states(agrees):
    denoise, process, times, latent = setting("sd2")
    found = ddim_inversion(denoise, process, latent, times, iterations=20, tolerance=1e-8)
    states = recorded("inversion")["sd2_inverted_20"].double()
    assert agrees(torch.cat(found.states), states, "DDIM inversion: states of 20 iterations, v, 10 steps")


def test_bdia_finds_the_recorded_states_and_returns(agrees):
    denoise, process, times, latent = setting("sd2")
    states = recorded("exact_inversions")["bdia_states"].double()
    back = bdia(denoise, process, states[-1:], states[-2:-1], times)
    assert agrees(back, latent, "BDIA: round trip of stored states, float32")
    own = bdia_inversion(denoise, process, latent, times)
    back = bdia(denoise, process, own[-1], own[-2], times)
    assert agrees(torch.cat(own), states, "BDIA: states")
    assert agrees(back, latent, "BDIA: round trip of states made here, float64", 1e-12)


class RecordedNoise:
    """Stands for the streams: the noise of recorded states, from the noisiest on."""

    def __init__(self, process, x0, states, times):
        alphas, sigmas = zip(*(process.scales(torch.tensor(t)) for t in times), strict=True)
        self.noise = [(x - a * x0) / s for x, a, s in zip(states, alphas, sigmas, strict=True)]

    def normal(self, shape):
        return self.noise.pop(0)


def test_noise_maps_are_the_recorded_ones(agrees):
    denoise, process, times, latent = setting("sd2")
    record = recorded("exact_inversions")
    states, maps = record["ddpm_noisings"].double().flip(0).unsqueeze(1), record["ddpm_noise_maps"].double()
    rng = RecordedNoise(process, latent, states[:-1], times[:-1])
    noise = ddpm_noise_maps(denoise, process, latent, times, rng)
    assert agrees(noise.x, states[0], "DDPM inversion: the noisiest state")
    assert agrees(noise.maps[:, 0], maps, "DDPM inversion: noise maps", 1e-4)
    back = replay(denoise, process, *noise, times)
    assert agrees(back, latent, "DDPM inversion: round trip of maps made here, float64", 1e-12)
    back = replay(denoise, process, states[0], maps.unsqueeze(1), times)
    assert agrees(back, latent, "DDPM inversion: round trip of stored maps, float32")
