"""Halton order: against exact fractions, its evenness, and the solver against enumeration."""

import math
from fractions import Fraction

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.absorbing_solvers import halton, halton_order, radical_inverse
from helpers.parametrize import slow_after
from helpers.solving import solve_in_steps

SIZES = [(1, 1), (1, 2), (3, 1), (2, 3), (5, 4), (8, 8), (9, 27), (1, 64), (64, 1), (12, 12), (16, 16), (32, 16)]


def exact_radical_inverse(n, base):
    """The radical inverse of n, exactly."""
    value, scale = Fraction(0), Fraction(1, base)
    while n:
        value, n, scale = value + scale * (n % base), n // base, scale / base
    return value


def reference_order(height, width):
    """Visits the points in order and ranks each cell when it is first hit."""
    order, n = {}, 0
    while len(order) < height * width:
        cell = int(exact_radical_inverse(n, 2) * height), int(exact_radical_inverse(n, 3) * width)
        order.setdefault(cell, len(order))
        n += 1
    return torch.tensor([[order[i, j] for j in range(width)] for i in range(height)])


# The order


def test_the_sequence_by_hand():
    assert radical_inverse(6, 2).tolist() == [0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8]
    assert radical_inverse(6, 3).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1 / 9, 4 / 9, 7 / 9])


@pytest.mark.parametrize("size", SIZES)
def test_the_order_is_that_of_the_points_and_a_permutation(size):
    order = halton_order(*size)
    assert order.shape == size and sorted(order.flatten().tolist()) == list(range(math.prod(size)))
    assert torch.equal(order, reference_order(*size))


def test_every_small_grid_has_a_permutation():
    for height in range(1, 11):
        for width in range(1, 11):
            assert halton_order(height, width).flatten().sort().values.tolist() == list(range(height * width))


def discrepancy(order, n):
    """Star discrepancy of the first n positions."""
    visited = (order < n).double()
    fraction = visited.cumsum(0).cumsum(1) / n
    height, width = order.shape
    area = torch.arange(1, height + 1)[:, None] * torch.arange(1, width + 1) / (height * width)
    return (fraction - area).abs().max().item()


def empty_square(order, n):
    """The side of the largest square without any of the first n positions."""
    occupied, side = (order < n).float()[None, None], 0
    while side < min(order.shape):
        if torch.nn.functional.max_pool2d(occupied, side + 1, stride=1).min() == 1:
            break
        side += 1
    return side


@pytest.mark.parametrize("n", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("size", [(16, 16), (32, 16)])
def test_the_first_positions_are_more_even_than_random_ones(size, n):
    order = halton_order(*size)
    random = [
        torch.randperm(math.prod(size), generator=torch.Generator().manual_seed(seed)).view(size) for seed in range(20)
    ]
    assert discrepancy(order, n) < 0.75 * sum(discrepancy(each, n) for each in random) / 20
    assert empty_square(order, n) < sum(empty_square(each, n) for each in random) / 20


@pytest.mark.parametrize("size", [(0, 3), (3, 0), (-1, 2)])
def test_a_grid_without_cells_is_refused(size):
    with pytest.raises(ValueError, match=f"grid of {size[0]} x {size[1]}, wanted at least 1 x 1"):
        halton_order(*size)


# The solver


def uniform_denoiser(x, t, rows=None):
    return torch.zeros(*x.shape, 3)


def unmask_steps_of(process, steps, streams, x):
    """The step in which each code was revealed."""
    states = []
    solve_in_steps(
        halton,
        uniform_denoiser,
        process,
        x,
        steps=steps,
        rng=streams(len(x)),
        on_step=lambda i, t, s, x, logits: states.append(x) or x,
    )
    return sum((state == 3).long() for state in states)


def expected_counts(schedule, hidden, steps):
    """Number of revealed codes after each step: all but floor(m(s) N), at least one more per step."""
    mask_probs = {
        "linear": lambda t: t,
        "cosine": lambda t: math.sin(math.pi * t / 2),
        "arccos": lambda t: math.acos(1 - t) * 2 / math.pi,
        "square": lambda t: 1 - (1 - t) ** 2,
    }
    counts = [0]
    for i in range(1, steps + 1):
        left = math.floor(hidden * mask_probs[schedule](1 - i / steps) + 1e-9)
        counts.append(min(hidden, max(hidden - left, counts[-1] + 1)))
    return counts[1:]


@pytest.mark.parametrize("steps", [1, 3, 8, 12, 40])
@pytest.mark.parametrize("size", [(4, 6), (8, 8)])
def test_halton_follows_the_schedule_in_a_shifted_order(size, steps, schedule, streams):
    n, (height, width) = 6, size
    unmask_steps = unmask_steps_of(AbsorbingDiffusion(3, schedule=schedule), steps, streams, torch.full((n, *size), 3))
    counts = expected_counts(schedule, height * width, steps)
    assert [(unmask_steps[0] < i + 1).sum().item() for i in range(steps)] == counts
    order, shifts = halton_order(*size), set()
    for example in unmask_steps:
        step_of_rank = torch.searchsorted(torch.tensor(counts), order, right=True)
        matches = {
            (i, j)
            for i in range(height)
            for j in range(width)
            if torch.equal(step_of_rank.roll((i, j), (0, 1)), example)
        }
        assert matches
        shifts |= matches if len(matches) == 1 else set()
    assert len(shifts) > 3 or steps in (1, 3)  # each example has its own


def test_halton_skips_known_codes(streams, schedule):
    x = torch.randint(2, 4, (5, 6, 6), generator=torch.Generator().manual_seed(3))
    hidden = (x == 3).sum((1, 2))
    unmask_steps = unmask_steps_of(AbsorbingDiffusion(3, schedule=schedule), 5, streams, x)
    for example, canvas, count in zip(unmask_steps, x, hidden.tolist(), strict=True):
        counts = [(example[canvas == 3] < i + 1).sum().item() for i in range(5)]
        assert counts == expected_counts(schedule, count, 5)


def test_shifts_are_uniform(streams, p_value):
    """The first revealed code identifies the shift."""
    n = 4000
    unmask_steps = unmask_steps_of(AbsorbingDiffusion(3), 12, streams, torch.full((n, 3, 4), 3))
    assert p_value((unmask_steps == 0).flatten(1).int().argmax(1), torch.full((12,), 1 / 12)) > 1e-4


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("denoiser", slow_after(1, ["mistaken", "denoise"]))
def test_it_draws_the_product_over_turns_on_average_over_shifts(joint, schedule, streams, p_value, steps, denoiser):
    distribution, n = joint.with_schedule(schedule), 4000
    denoise, order = getattr(joint, denoiser), halton_order(1, joint.count)
    counts = torch.tensor(expected_counts(schedule, joint.count, steps))
    step_of_rank = torch.searchsorted(counts, order[0], right=True)
    expected = torch.stack(
        [joint.unmask_distribution(step_of_rank.roll(shift).tolist(), denoise) for shift in range(joint.count)]
    ).mean(0)
    x = solve_in_steps(halton, denoise, distribution.process(), joint.all_mask(n), steps=steps, rng=streams(n, steps))
    assert p_value(joint.index(x), expected) > 1e-4


def test_one_step_per_code_samples_the_joint_exactly(joint, streams, p_value):
    x = solve_in_steps(
        halton, joint.denoise, joint.process(), joint.all_mask(6000), steps=joint.count, rng=streams(6000)
    )
    assert p_value(joint.index(x), joint.data) > 1e-4
