"""Sampling in one call: the same samples as by hand, for every kind of process."""

import pytest
import torch
from torch import nn

from diffusion import (
    EDM,
    SCHEDULES,
    AbsorbingDiffusion,
    GaussianDiffusion,
    RectifiedFlow,
    Streams,
    denoiser,
    sample,
    seed_of,
    solvers_for,
)
from diffusion.spacing import step_times

PROCESSES = {
    "gaussian": GaussianDiffusion(SCHEDULES["cosine"](100), "x0"),
    "edm": EDM(),
    "flow": RectifiedFlow(),
    "absorbing": AbsorbingDiffusion(4, 10),
}
SHAPES = {name: (3, 4, 4) if name == "absorbing" else (3, 2, 4, 4) for name in PROCESSES}


class Network(nn.Module):
    """Predicts a constant image: 0.25, or a tenth of the label."""

    def encode(self, fields, x):
        return fields.get("label", torch.full(x.shape[:1], 9))

    def forward(self, x, t=None, label=None):
        return torch.full_like(x, 0.25) if label is None else label.view(-1, 1, 1, 1).expand_as(x) / 10


def code_logits(x):
    """Logits that are certain of code 2."""
    return nn.functional.one_hot(torch.full_like(x, 2), 4).float() * 100


def network_of(name):
    return code_logits if name == "absorbing" else Network()


@pytest.mark.parametrize("name", PROCESSES)
def test_every_solver_draws(name):
    for solver in solvers_for(PROCESSES[name]):
        x = sample(
            network_of(name), PROCESSES[name], SHAPES[name], solver=solver, steps=None if solver[0] == "f" else 5
        )
        assert x.shape == SHAPES[name] and torch.isfinite(x.float()).all()
        if name == "absorbing":
            assert (x == 2).all()


def test_a_certain_network_gives_its_data():
    x = sample(Network(), PROCESSES["gaussian"], (2, 1, 4, 4), solver="ddim", steps=5)
    torch.testing.assert_close(x, torch.full((2, 1, 4, 4), 0.25))


@pytest.mark.parametrize("name", ["gaussian", "edm", "flow"])
def test_it_is_the_solver_called_by_hand(name):
    process, shape = PROCESSES[name], SHAPES[name]
    rng = Streams([seed_of(4, "sample", i) for i in range(3)])
    x = process.prior(shape, rng)
    times = step_times(process, 6, "karras" if name == "edm" else "uniform")
    expected = solvers_for(process)["ddim"].solve(denoiser(Network(), process), process, x, times, rng=rng, eta=0.5)
    samples = sample(Network(), process, shape, solver="ddim", steps=6, seed=4, eta=0.5, clip=False)
    assert torch.equal(samples, expected)


@pytest.mark.parametrize("name", PROCESSES)
def test_examples_do_not_depend_on_their_batch(name):
    solver = "ancestral" if name == "absorbing" else "ddpm"
    network = (lambda x: torch.zeros(*x.shape, 4)) if name == "absorbing" else (lambda x, t: x / 2)
    batched = sample(network, PROCESSES[name], SHAPES[name], solver=solver, steps=4)
    single = sample(network, PROCESSES[name], (1, *SHAPES[name][1:]), solver=solver, steps=4)
    assert torch.equal(batched[:1], single)
    assert not torch.equal(sample(network, PROCESSES[name], SHAPES[name], solver=solver, steps=4, seed=1), batched)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_goes_from_the_null_to_the_condition(scale):
    process, label = PROCESSES["gaussian"], torch.tensor([1, 2, 3])
    kwargs = {"solver": "ddim", "steps": 4, "clip": False}
    x = sample(Network(), process, (3, 1, 4, 4), condition={"label": label}, guidance=scale, **kwargs)
    expected = (9 + scale * (label - 9)) / 10
    torch.testing.assert_close(x.mean((1, 2, 3)), expected, rtol=1e-4, atol=1e-4)


def test_predictions_are_clipped_unless_told_otherwise():
    process = PROCESSES["gaussian"]
    kwargs = {"solver": "ddim", "steps": 4, "condition": {"label": torch.tensor([30])}}
    assert sample(Network(), process, (1, 1, 4, 4), **kwargs).max() == 1
    assert sample(Network(), process, (1, 1, 4, 4), clip=False, **kwargs).max() > 2.9


def test_halton_uses_the_schedule_it_prefers():
    masked = {}
    for schedule in ("linear", "arccos", "cosine"):
        counts = masked.setdefault(schedule, [])
        process = AbsorbingDiffusion(4, None, schedule)
        on_step = lambda i, t, s, x, logits, counts=counts: counts.append((x == 4).sum().item()) or x  # noqa: E731
        sample(code_logits, process, (1, 16, 16), solver="halton", steps=4, on_step=on_step)
    assert masked["linear"] == masked["arccos"] == masked["cosine"]
    assert masked["linear"] != [192, 128, 64, 0]


def test_what_cannot_be_drawn_is_refused():
    network = Network()
    with pytest.raises(ValueError, match="unknown solver 'eulr'"):
        sample(network, PROCESSES["flow"], (1, 1, 2, 2), solver="eulr")
    with pytest.raises(ValueError, match="guidance 2.0 without a condition"):
        sample(network, PROCESSES["flow"], (1, 1, 2, 2), solver="ddim", guidance=2.0)
    with pytest.raises(ValueError, match="got spacing 'karras' for AbsorbingDiffusion"):
        sample(code_logits, PROCESSES["absorbing"], (1, 2, 2), solver="ancestral", spacing="karras")


def test_random_streams_follow_the_global_seed():
    torch.manual_seed(5)
    first, other = Streams.random(3).normal((3, 4)), Streams.random(3).normal((3, 4))
    torch.manual_seed(5)
    assert torch.equal(Streams.random(3).normal((3, 4)), first) and not torch.equal(first, other)
    assert first.unique().numel() == 12  # each example has a stream of its own
