"""Number of function evaluations: which examples are evaluated, in which steps, and how often."""

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.discrete_solvers import discrete
from diffusion.solvers import solvers_for
from helpers.solving import solve_in_steps

PROCESS = AbsorbingDiffusion(3)
SOLVERS = {name: entry for name, entry in solvers_for(PROCESS).items() if name != "discrete"}  # of this process only
ANY_STEPS = [name for name in SOLVERS if name != "first_hitting"]


class RecordingDenoiser:
    """A denoiser whose logits depend on the whole canvas and on the example; records its calls."""

    def __init__(self, count):
        self.count, self.calls = count, []

    def __call__(self, x, t, rows=None):
        indices = torch.arange(self.count) if rows is None else rows
        assert len(indices) == len(x) == len(t)
        self.calls.append(
            [
                (i, round(time, 5), canvas)
                for i, time, canvas in zip(indices.tolist(), t.tolist(), x.clone(), strict=True)
            ]
        )
        positions = torch.arange(x[0].numel() * 3).view(1, *x.shape[1:], 3)
        weights = torch.arange(1, x[0].numel() + 1).view(x[0].shape)
        return 2 * (positions * (1 + (x * weights).sum((1, 2)) + indices).view(-1, 1, 1, 1)).cos()


def canvases():
    """All mask, complete, and partly masked."""
    partly_masked = torch.randint(0, 4, (5, 2, 3), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.full((2, 2, 3), 3), partly_masked, torch.ones(1, 2, 3, dtype=torch.long)])


def settings(name):
    return {"remasking": "conf", "remask_eta": 0.8} if name == "remask" else {}


def run(name, steps, streams, on_step=None, schedule="linear"):
    x = canvases()
    denoise, process = RecordingDenoiser(len(x)), AbsorbingDiffusion(3, schedule=schedule)
    out = solve_in_steps(
        SOLVERS[name].solve, denoise, process, x, steps=steps, rng=streams(len(x)), on_step=on_step, **settings(name)
    )
    return out, denoise.calls


def cases():
    return [(name, steps) for name in SOLVERS for steps in ((6,) if name == "first_hitting" else (1, 2, 4, 6, 50))]


@pytest.mark.parametrize("name, steps", cases())
def test_calls_are_at_most_the_steps_and_the_codes(name, steps, schedule, streams):
    calls = run(name, steps, streams, schedule=schedule)[1]
    assert len(calls) <= (steps if name == "remask" else min(steps, 6))
    calls_per_example = [sum(i == example for call in calls for i, _, _ in call) for example in range(8)]
    n_masked = (canvases() == 3).sum((1, 2)).tolist()
    if name != "remask":
        assert all(n <= min(steps, left) for n, left in zip(calls_per_example, n_masked, strict=True))
        # at least one code per step while any is masked
        assert name == "ancestral" or max(calls_per_example) == min(steps, 6)
    assert name != "first_hitting" or calls_per_example == n_masked
    assert calls_per_example[-1] == 0  # it was complete


@pytest.mark.parametrize("name, steps", cases())
def test_who_watches_changes_nothing_that_is_drawn(name, steps, schedule, streams):
    plain = run(name, steps, streams, schedule=schedule)[0]
    states = []
    with_callback, calls = run(name, steps, streams, lambda i, t, s, x, logits: states.append(x) or x, schedule)
    assert torch.equal(plain, with_callback) and torch.equal(with_callback, states[-1])
    assert len(calls) == len(states) == steps and all(len(call) == 8 for call in calls)


@pytest.mark.parametrize("name, steps", cases())
def test_an_example_is_evaluated_only_when_its_codes_are_sampled(name, steps, streams):
    """The steps in which codes are sampled, as on_step sees them, with the canvas before each."""
    calls, states = run(name, steps, streams)[1], [canvases()]
    with_callback = run(name, steps, streams, lambda i, t, s, x, logits: states.append(x) or x)[1]
    expected = []
    for call, before, after in zip(with_callback, states[:-1], states[1:], strict=True):
        sampled = ((before == 3) & (after != 3)).flatten(1).any(1)
        for i, t, canvas in call:
            assert torch.equal(canvas, before[i])
            expected += [(i, t, canvas.flatten().tolist())] if sampled[i] else []
    result = [(i, t, canvas.flatten().tolist()) for call in calls for i, t, canvas in call]
    assert sorted(result) == sorted(expected)


@pytest.mark.parametrize("name, steps", cases())
def test_a_complete_canvas_costs_nothing(name, steps, streams):
    x = torch.randint(0, 3, (4, 2, 3), generator=torch.Generator().manual_seed(1))
    if name == "remask":  # known codes are never remasked
        x = torch.zeros_like(x)

    def denoise(*_):
        raise AssertionError("nothing should be sampled")

    assert torch.equal(
        solve_in_steps(SOLVERS[name].solve, denoise, PROCESS, x, steps=steps, rng=streams(4), **settings(name)), x
    )


@pytest.mark.parametrize("name", ["ancestral", "halton"])
def test_the_network_is_told_the_times_of_steps(name, streams):
    calls = run(name, 4, streams, lambda i, t, s, x, logits: x)[1]
    assert [{t for _, t, _ in call} for call in calls] == [{1.0}, {0.75}, {0.5}, {0.25}]


def test_few_codes_in_many_steps_cost_few_evaluations(streams):
    """256 steps for six codes: at most six network calls, whatever the steps of the examples."""
    x, denoise = torch.full((64, 2, 3), 3), RecordingDenoiser(64)
    solve_in_steps(SOLVERS["ancestral"].solve, denoise, PROCESS, x, steps=256, rng=streams(64))
    assert len(denoise.calls) == 6
    assert 64 * 5.8 < sum(map(len, denoise.calls)) <= 64 * 6
    assert len({t for _, t, _ in denoise.calls[0]}) > 20  # different times in one call


@pytest.mark.parametrize("name", ["ancestral", "first_hitting", "halton"])
def test_one_unknown_code_each_is_one_call_for_all(name, streams):
    """For any position and any step."""
    x, denoise = torch.ones(20, 2, 3, dtype=torch.long), RecordingDenoiser(20)
    x.view(20, 6)[torch.arange(20), torch.arange(20) % 6] = 3
    solve_in_steps(
        SOLVERS[name].solve, denoise, PROCESS, x, steps=6 if name == "first_hitting" else 50, rng=streams(20)
    )
    assert [len(call) for call in denoise.calls] == [20]


def test_the_general_solver_evaluates_what_is_still_masked(streams):
    x, denoise, states = canvases(), RecordingDenoiser(8), [canvases()]
    solve_in_steps(discrete, denoise, PROCESS, x, steps=4, rng=streams(8))
    solve_in_steps(
        discrete,
        RecordingDenoiser(8),
        PROCESS,
        x,
        steps=4,
        rng=streams(8),
        on_step=lambda i, t, s, x, _: states.append(x) or x,
    )
    expected = [(x == 3).flatten(1).any(1).nonzero()[:, 0].tolist() for x in states[:4]]
    assert [[i for i, _, _ in call] for call in denoise.calls] == expected and 7 not in sum(expected, [])
