"""The solvers: what they draw against what they must draw, enumerated."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from diffusion.absorbing import AbsorbingDiffusion, ancestral, one_by_one
from diffusion.rng import Streams
from diffusion.solvers import solver, solvers_of

PROCESS = AbsorbingDiffusion(3)
SOLVERS = solvers_of(PROCESS)


def flat(x, t):
    """A denoiser that knows nothing: three codes, all as likely."""
    return torch.zeros(*x.shape, 3)


def masks(*shape):
    return torch.full(shape, PROCESS.mask)


# The registry


def test_the_solvers_are_found_by_name():
    assert {"ancestral", "one_by_one"} <= SOLVERS.keys()
    assert solver(PROCESS, "ancestral") is ancestral


def test_an_unknown_solver_is_refused_with_the_names():
    with pytest.raises(ValueError, match="'ddim' for AbsorbingDiffusion; there are: .*ancestral.*one_by_one"):
        solver(PROCESS, "ddim")


def test_solvers_of_another_process_are_not_offered():
    assert solvers_of("no process") == {}


# What every solver promises. It is asked for one step per code, which every solver can do


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 256])
def test_no_mask_is_left(name, steps, streams):
    x = SOLVERS[name](flat, PROCESS, masks(2, 1, steps), steps=steps, rng=streams(2))
    assert x.shape == (2, 1, steps) and x.min() >= 0 and x.max() < 3


@pytest.mark.parametrize("name", SOLVERS)
def test_given_codes_are_kept(name, streams):
    x = torch.randint(0, 4, (8, 3, 4), generator=torch.Generator().manual_seed(0))  # 3 is the mask
    out = SOLVERS[name](flat, PROCESS, x, steps=12, rng=streams(8))
    assert torch.equal(out[x < 3], x[x < 3]) and (out < 3).all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(name, temperature, streams, p_value):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    x = SOLVERS[name](
        lambda x, t: logits.expand(*x.shape, 4),
        AbsorbingDiffusion(4),
        torch.full((4000, 1, 1), 4),
        steps=1,
        rng=streams(4000),
        temperature=temperature,
    ).flatten()
    assert p_value(x, F.softmax(logits / temperature, 0)) > 1e-4
    assert p_value(x, F.softmax(logits * temperature, 0)) < 1e-6


@pytest.mark.parametrize("name", ["ancestral", "one_by_one"])
def test_the_network_sees_times_from_one_down_to_one_step(name, streams):
    seen = []
    SOLVERS[name](lambda x, t: seen.append(t) or flat(x, t), PROCESS, masks(2, 2, 2), rng=streams(2), steps=4)
    assert torch.stack(seen).tolist() == [[1, 1], [0.75, 0.75], [0.5, 0.5], [0.25, 0.25]]


@pytest.mark.parametrize("name", ["ancestral", "one_by_one"])
def test_a_solver_can_be_watched_and_corrected(name, streams):
    seen = []

    def on_step(i, t, s, x, logits):
        seen.append((i, t, s))
        assert logits.shape == (2, 1, 4, 3)
        return torch.where(torch.arange(4) == 1, 2, x)  # position 1 is always code 2

    x = SOLVERS[name](flat, PROCESS, masks(2, 1, 4), steps=4, rng=streams(2), on_step=on_step)
    assert seen == [(0, 1, 0.75), (1, 0.75, 0.5), (2, 0.5, 0.25), (3, 0.25, 0)]
    assert (x[:, :, 1] == 2).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_an_image_does_not_depend_on_its_batch(name):
    def draw(seeds):
        return SOLVERS[name](flat, PROCESS, masks(len(seeds), 2, 3), steps=6, rng=Streams(seeds))

    together, first, last = draw([5, 6, 7]), draw([5]), draw([7])
    assert torch.equal(together[:1], first) and torch.equal(together[2:], last)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("wrong, message", [({"temperature": 0.0}, "temperature 0.0"), ({"steps": 0}, "steps|got 0")])
def test_wrong_arguments_are_refused(name, wrong, message, streams):
    with pytest.raises(ValueError, match=message):
        SOLVERS[name](flat, PROCESS, masks(1, 1, 2), rng=streams(1), **wrong)


# Ancestral sampling: the steps draw codes independently, which costs 1/T


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_sampling_draws_what_its_steps_make(joint, streams, p_value, steps):
    process = AbsorbingDiffusion(joint.codes, steps)
    x = ancestral(joint.denoise, process, joint.all_mask(8000), rng=streams(8000, steps))
    assert p_value(joint.index(x), joint.sampled(steps)) > 1e-4
    if steps == 1:
        assert p_value(joint.index(x), joint.data) < 1e-6  # one step draws the product of the marginals


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 256])
def test_ancestral_sampling_leaves_no_mask_on_a_grid_of_any_size(steps, streams):
    assert (ancestral(flat, PROCESS, masks(2, 4, 4), steps=steps, rng=streams(2)) < 3).all()


def test_the_steps_may_differ_from_those_of_training(joint, streams, p_value):
    process = AbsorbingDiffusion(joint.codes, 256)
    x = ancestral(joint.denoise, process, joint.all_mask(8000), steps=3, rng=streams(8000))
    assert p_value(joint.index(x), joint.sampled(3)) > 1e-4
    with pytest.raises(ValueError, match="got None sampling steps"):
        ancestral(flat, AbsorbingDiffusion(3, steps=None), masks(1, 1, 2), rng=streams(1))


def test_the_gap_to_the_joint_is_positive_and_falls_as_one_over_the_steps(joint):
    gap = {steps: (joint.sampled(steps) - joint.data).abs().sum().item() / 2 for steps in (1, 4, 16, 32)}
    assert 0.5 > gap[1] > gap[4] > gap[16] > gap[32] > 0
    assert gap[16] / gap[32] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_two_equal_bits_differ_with_probability_one_half_over_the_steps(equal_bits, steps):
    unequal = equal_bits.sampled(steps)[equal_bits.index(torch.tensor([[[0, 1]], [[1, 0]]]))]
    assert unequal.sum() == pytest.approx(1 / (2 * steps))  # both are drawn in one step, and then by chance


# One by one: no two codes are drawn together


def test_one_by_one_meets_the_joint(joint, equal_bits, streams, p_value):
    for known in (joint, equal_bits):
        x = one_by_one(known.denoise, AbsorbingDiffusion(known.codes), known.all_mask(8000), rng=streams(8000))
        assert p_value(known.index(x), known.data) > 1e-4
        assert p_value(known.index(x), known.sampled(1)) < 1e-6


def test_one_by_one_reveals_one_code_per_step_in_every_order(streams, p_value):
    paths = []

    def on_step(i, t, s, x, logits):
        paths.append(x == 3)
        assert (paths[-1].sum((1, 2)) == 2 - i).all()
        return x

    one_by_one(flat, PROCESS, masks(3000, 1, 3), rng=streams(3000), on_step=on_step)
    turn = torch.stack(paths).sum(0)[:, 0]  # (B, 3): after how many steps each position was still masked
    orders = torch.tensor(list(itertools.permutations(range(3))))
    which = (turn[:, None] == orders).all(-1).int().argmax(1)
    assert p_value(which, torch.full((6,), 1 / 6)) > 1e-4


def test_one_by_one_takes_as_many_steps_as_there_are_codes(streams):
    with pytest.raises(ValueError, match="takes 6 steps on this grid, got 5"):
        one_by_one(flat, PROCESS, masks(1, 2, 3), steps=5, rng=streams(1))
