"""The loop, when only the device knows yet whether a step was taken."""

import itertools

import pytest
import torch
from torch import nn

from train.distributed import DistContext
from train.loop import TrainState, fit

WORLD = DistContext(torch.device("cpu"))
BAD = 2


def run(
    hooks=(), steps=5, outputs=lambda step: {"loss": torch.tensor(float(step)), "finite": torch.tensor(step != BAD)}
):
    """Runs the loop with batches that are numbers; returns the state, and (now, step, batch) of each skipped step."""
    state, skipped = TrainState({"network": nn.Linear(1, 1)}, {}), []
    fit(
        state,
        ([{"position": torch.tensor([step])}] for step in itertools.count()),
        lambda state, parts: outputs(state.step),
        steps=steps,
        world=WORLD,
        hooks=hooks,
        on_skipped=lambda state, step, parts: skipped.append((state.step, step, parts[0]["position"].item())),
    )
    return state, skipped


def test_a_skipped_step_is_read_after_the_next_has_begun():
    state, skipped = run()
    assert skipped == [(BAD + 1, BAD, BAD)] and state.pending is None


@pytest.mark.parametrize("steps", [BAD + 1, BAD + 2])
def test_a_skipped_step_at_the_end_is_read(steps):
    assert [step for _, step, _ in run(steps=steps)[1]] == [BAD]


def test_what_is_known_at_once_is_recorded_at_once():
    assert run(outputs=lambda step: None if step == BAD else {})[1] == [(BAD, BAD, BAD)]


def test_users_hooks_get_no_outputs_of_a_skipped_step():
    seen = []
    _, skipped = run([("hooks", 1, lambda state, outputs: seen.append((state.step, sorted(outputs))))])
    assert seen == [(step + 1, [] if step == BAD else ["finite", "loss"]) for step in range(5)]
    assert skipped == [(BAD + 1, BAD, BAD)]  # before that hook


def test_a_hook_may_settle_the_step_itself():
    taken = []

    def save(state, outputs):
        if state.step == BAD + 1:
            taken.append((state.settle(), state.settle()))

    assert run([("checkpoints", 1, save)])[1] == [(BAD + 1, BAD, BAD)]
    assert taken == [(False, True)]  # read once
