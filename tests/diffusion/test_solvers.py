"""The contract of the solvers of codes."""

import pytest
import torch
import torch.nn.functional as F

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.absorbing_solvers import ancestral
from diffusion.logits_warper import LogitsWarper
from diffusion.rng import Streams
from diffusion.solvers import get_solver, solvers_for
from helpers.solving import solve_in_steps

PROCESS = AbsorbingDiffusion(3)
SOLVERS = solvers_for(PROCESS)
NAMES = ["ancestral", "confidence", "discrete", "first_hitting", "halton", "remask"]


def uniform_denoiser(x, t, rows=None):
    """A uniform denoiser over three codes."""
    return torch.zeros(*x.shape, 3)


def masks(*shape):
    return torch.full(shape, PROCESS.mask)


def partly_known(*shape, seed=0):
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed))  # 3 is the mask


# The registry


def test_the_solvers_are_found_by_name():
    assert sorted(SOLVERS) == NAMES
    assert get_solver(PROCESS, "ancestral").solve is ancestral


def test_an_unknown_solver_is_refused_with_the_names():
    with pytest.raises(ValueError, match="'ddim' for AbsorbingDiffusion; choose one of .*ancestral.*first_hitting"):
        get_solver(PROCESS, "ddim")


def test_solvers_of_another_process_are_not_offered():
    assert solvers_for("no process") == {}


# Properties of every solver, with one step per code, which all of them support


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64])
def test_no_mask_is_left(name, schedule, steps, streams):
    process = AbsorbingDiffusion(3, schedule=schedule)
    x = solve_in_steps(SOLVERS[name].solve, uniform_denoiser, process, masks(2, 1, steps), steps=steps, rng=streams(2))
    assert x.shape == (2, 1, steps) and x.min() >= 0 and x.max() < 3


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "first_hitting"])
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_no_mask_is_left_whatever_the_steps(name, schedule, steps, streams):
    process, x = AbsorbingDiffusion(3, schedule=schedule), torch.cat([masks(1, 3, 4), partly_known(3, 3, 4)])
    out = solve_in_steps(SOLVERS[name].solve, uniform_denoiser, process, x, steps=steps, rng=streams(4))
    assert (out < 3).all() and torch.equal(out[x < 3], x[x < 3])


@pytest.mark.parametrize("name", SOLVERS)
def test_given_codes_are_kept_at_every_step(name, streams):
    x = partly_known(8, 3, 4)

    def on_step(i, t, s, x_s, logits):
        assert torch.equal(x_s[x < 3], x[x < 3])
        return x_s

    settings = {"remasking": "cap", "remask_eta": 1.0} if name == "remask" else {}
    plain = solve_in_steps(SOLVERS[name].solve, uniform_denoiser, PROCESS, x, steps=12, rng=streams(8), **settings)
    assert torch.equal(plain[x < 3], x[x < 3]) and (plain < 3).all()
    solve_in_steps(
        SOLVERS[name].solve, uniform_denoiser, PROCESS, x, steps=12, rng=streams(8), on_step=on_step, **settings
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_the_canvas_that_was_given_is_not_written_to(name, streams):
    x = partly_known(2, 3, 4)
    before = x.clone()
    solve_in_steps(SOLVERS[name].solve, uniform_denoiser, PROCESS, x, steps=12, rng=streams(2))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_codes_are_drawn_from_the_tempered_logits(name, temperature, streams, p_value):
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0]), 3000
    x = solve_in_steps(
        SOLVERS[name].solve, lambda x, t, rows=None: logits.expand(*x.shape, 4), AbsorbingDiffusion(4),
        torch.full((n, 1, 1), 4), steps=1, rng=streams(n), warper=LogitsWarper(temperature=temperature),
    ).flatten()  # fmt: skip
    assert p_value(x, F.softmax(logits / temperature, 0)) > 1e-4
    assert p_value(x, F.softmax(logits * temperature, 0)) < 1e-6


@pytest.mark.parametrize("name", SOLVERS)
def test_on_step_sees_and_may_change_x(name, streams):
    calls = []

    def on_step(i, t, s, x, logits):
        calls.append((i, t, s))
        assert logits.shape == (2, 1, 4, 3)
        return torch.where(torch.arange(4) == 1, 2, x)  # position 1 is always code 2

    def denoise(x, t, rows=None):
        assert not calls or (x[:, :, 1] == 2).all()
        return uniform_denoiser(x, t)

    x = solve_in_steps(SOLVERS[name].solve, denoise, PROCESS, masks(2, 1, 4), steps=4, rng=streams(2), on_step=on_step)
    assert calls == [(0, 1, 0.75), (1, 0.75, 0.5), (2, 0.5, 0.25), (3, 0.25, 0)]
    assert (x[:, :, 1] == 2).all() and (x < 3).all()


@pytest.mark.parametrize("name", ["confidence", "discrete", "remask"])
def test_codes_masked_by_on_step_are_sampled_again(name, streams):
    """These solvers look at the masked codes in every step."""

    def on_step(i, t, s, x, logits):
        return masks(2, 1, 4) if i == 1 else x

    x = solve_in_steps(
        SOLVERS[name].solve, uniform_denoiser, PROCESS, masks(2, 1, 4), steps=4, rng=streams(2), on_step=on_step
    )
    assert (x < 3).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_an_image_does_not_depend_on_its_batch(name):
    x = torch.cat([masks(1, 2, 3), partly_known(2, 2, 3)])

    def draw(rows):
        return solve_in_steps(
            SOLVERS[name].solve, uniform_denoiser, PROCESS, x[rows], steps=6, rng=Streams([5 + row for row in rows])
        )

    batched = draw([0, 1, 2])
    assert all(torch.equal(batched[[row]], draw([row])) for row in range(3))
    assert torch.equal(batched[[2, 0]], draw([2, 0]))
    samples = solve_in_steps(
        SOLVERS[name].solve, uniform_denoiser, PROCESS, masks(2, 2, 3), steps=6, rng=Streams([1, 2])
    )
    assert not torch.equal(samples[0], samples[1])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [0, -1])
def test_wrong_steps_are_refused(name, steps, streams):
    with pytest.raises(ValueError, match=f"got {steps}.*--sample_steps"):
        solve_in_steps(SOLVERS[name].solve, uniform_denoiser, PROCESS, masks(1, 1, 2), rng=streams(1), steps=steps)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "first_hitting"])
def test_in_continuous_time_steps_must_be_given(name, streams):
    with pytest.raises(ValueError, match="got None sampling steps, wanted at least 1: pass --sample_steps"):
        solve_in_steps(
            SOLVERS[name].solve, uniform_denoiser, AbsorbingDiffusion(3, None), masks(1, 1, 2), rng=streams(1)
        )


@pytest.mark.parametrize("name", SOLVERS)
def test_the_steps_left_out_are_those_of_the_process(name, streams):
    calls, process = [], AbsorbingDiffusion(3, steps=6)
    solve_in_steps(
        SOLVERS[name].solve,
        uniform_denoiser,
        process,
        masks(1, 2, 3),
        rng=streams(1),
        on_step=lambda i, t, s, x, logits: calls.append(i) or x,
    )
    assert calls == [0, 1, 2, 3, 4, 5]
