"""Learning-rate schedules against their formulas."""

import itertools
import math

import pytest

from train.lr_schedule import LR_SCHEDULES, learning_rate

LR = 0.3
RUNS = {  # schedule -> its arguments besides lr
    "constant": {"steps": 50, "warmup": 7},
    "cosine": {"steps": 50, "warmup": 7, "end": 0.1},
    "decay_tail": {"steps": 50, "warmup": 7, "decay_steps": 20, "end": 0.1},
}


def rates(schedule, **options):
    return [learning_rate(step, lr=LR, schedule=schedule, **options) for step in range(options["steps"])]


def test_every_schedule_is_tested():
    assert set(RUNS) == set(LR_SCHEDULES)


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_warm_up_is_linear_and_ends_at_lr(schedule):
    lrs = rates(schedule, **RUNS[schedule])
    assert lrs[:7] == pytest.approx([LR * (step + 1) / 7 for step in range(7)], rel=1e-12)
    assert lrs[6] == LR == max(lrs)


@pytest.mark.parametrize("schedule", ["cosine", "decay_tail"])
@pytest.mark.parametrize("end", [0.0, 0.1, 1.0])
def test_the_last_step_takes_the_end_rate(schedule, end):
    lrs = rates(schedule, **RUNS[schedule] | {"end": end})
    assert lrs[-1] == pytest.approx(end * LR, abs=1e-15)
    assert min(lrs) >= 0
    later = learning_rate(1000, lr=LR, schedule=schedule, **RUNS[schedule] | {"end": end})
    assert later == lrs[-1]


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_the_rate_is_continuous(schedule):
    """With ten times the steps, the largest change between two steps is at most a tenth."""
    coarse, fine = (
        rates(schedule, **{key: value * k if key != "end" else value for key, value in RUNS[schedule].items()})
        for k in (1, 10)
    )
    widest, finest = (max(abs(a - b) for a, b in itertools.pairwise(lrs)) for lrs in (coarse, fine))
    assert finest <= 0.11 * widest


def test_cosine_is_half_way_in_the_middle():
    lrs = rates("cosine", steps=101, end=0.2)
    assert lrs[0] == LR and lrs[50] == pytest.approx(0.6 * LR)
    assert lrs[25] == pytest.approx(LR * (0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2))
    assert all(a + b == pytest.approx(1.2 * LR) for a, b in zip(lrs, reversed(lrs), strict=True))


def test_the_tail_is_linear_and_earlier_steps_ignore_the_length():
    short, long = rates("decay_tail", **RUNS["decay_tail"]), rates("decay_tail", **RUNS["decay_tail"] | {"steps": 90})
    assert short[:30] == long[:30] and short[7:30] == [LR] * 23
    tail = [LR, *short[30:]]
    assert all(a - b == pytest.approx(0.9 * LR / 20) for a, b in itertools.pairwise(tail))
    assert len(tail) == 21


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_of_one_step_takes_lr(schedule):
    assert rates(schedule, steps=1) == [LR]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": "cosin"}, "constant, cosine, decay_tail"),
        ({"schedule": "decay_tail"}, "0 decay_steps"),
        ({"schedule": "decay_tail", "decay_steps": 6, "warmup": 5}, "shorten one"),
        ({"schedule": "cosine", "warmup": 10}, "leaves none for the cosine"),
        ({"lr": -1.0}, "got lr -1"),
        ({"lr": math.nan}, "got lr nan"),
        ({"end": 1.5}, "end 1.5"),
        ({"steps": 0}, "got 0 steps"),
        ({"warmup": -1}, "warm-up -1"),
        ({"step": -1}, "got step -1"),
    ],
)
def test_invalid_schedules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(**{"step": 0, "lr": LR, "steps": 10} | options)


def test_borderline_schedules_are_accepted():
    assert rates("decay_tail", steps=10, warmup=5, decay_steps=5)[4:6] == [LR, pytest.approx(0.8 * LR)]
    assert rates("cosine", steps=10, warmup=9)[8:] == [LR, 0]
    assert rates("constant", steps=2, warmup=10_000)[0] == pytest.approx(
        LR / 10_000
    )  # short runs keep their long warm-up
