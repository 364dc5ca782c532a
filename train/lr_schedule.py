"""Learning-rate schedules as pure functions of the step."""

import math

LR_SCHEDULES = ("constant", "cosine", "decay_tail")


def learning_rate(
    step: int,
    *,
    lr: float,
    steps: int,
    warmup: int = 0,
    schedule: str = "constant",
    decay_steps: int = 0,
    end: float = 0.0,
) -> float:
    """Returns the learning rate of step `step`, counted from 0, in a run of `steps` steps.

    All schedules start with a linear warm-up, lr (step + 1) / warmup, which reaches lr at step warmup - 1. Then, with
    `last` = steps - 1:

    - constant: lr.
    - cosine: lr (end + (1 - end) (1 + cos(pi p)) / 2), where p rises from 0 at the end of the warm-up to 1 at `last`
      (Loshchilov & Hutter 2017, "SGDR", without restarts).
    - decay_tail: lr, and over the last `decay_steps` steps lr (end + (1 - end) (last - step) / decay_steps), which
      is end lr at `last` ("warmup-stable-decay", Hu et al. 2024, "MiniCPM"; Haegele et al. 2024). A run that has not
      reached its tail can be extended as if it had been longer from the start.

    `end` is a fraction of lr in [0, 1]; only decay_tail uses `decay_steps`. ValueError for invalid settings, at any
    step.
    """
    validate_schedule(lr, steps, warmup, schedule, decay_steps, end)
    if step < 0:
        raise ValueError(f"got step {step}, wanted 0 or more")
    if step < warmup:
        return lr * min(1.0, (step + 1) / warmup)
    last = steps - 1
    if schedule == "cosine":
        start = max(warmup - 1, 0)  # the last step with the full lr
        progress = min(1.0, (step - start) / max(last - start, 1))
        return lr * (end + (1 - end) * max(0.0, (1 + math.cos(math.pi * progress)) / 2))
    if schedule == "decay_tail":
        left = max(last - step, 0)
        return lr * (end + (1 - end) * min(1.0, left / decay_steps))
    return lr


def constant_steps(steps: int, warmup: int, schedule: str, decay_steps: int) -> float:
    """Returns the number of first steps whose learning rate does not depend on `steps`, the length of the run."""
    return {"constant": math.inf, "cosine": warmup, "decay_tail": steps - decay_steps}[schedule]


def validate_schedule(lr: float, steps: int, warmup: int, schedule: str, decay_steps: int, end: float) -> None:
    """Raises ValueError if the settings are invalid, or the schedule does not fit into the run."""
    if schedule not in LR_SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; there are: {', '.join(LR_SCHEDULES)}")
    if not 0 <= lr < math.inf or not 0 <= end <= 1:
        raise ValueError(f"got lr {lr}, end {end}: wanted a finite lr >= 0 and an end in [0, 1]")
    if steps < 1 or warmup < 0 or decay_steps < 0:
        raise ValueError(
            f"got {steps} steps, warm-up {warmup}, decay {decay_steps}: wanted at least 1 step, the others >= 0"
        )
    if schedule == "cosine" and warmup >= max(steps, 2):
        raise ValueError(
            f"got a warm-up of {warmup} in {steps} steps, which leaves none for the cosine: shorten it, or train longer"
        )
    if schedule == "decay_tail" and decay_steps == 0:
        raise ValueError("got decay_tail with 0 decay_steps: pass --decay_steps N, the steps over which the rate falls")
    if schedule == "decay_tail" and warmup + decay_steps > steps:
        raise ValueError(
            f"got a warm-up of {warmup} and a decay of {decay_steps} in {steps} steps: shorten one, or train longer"
        )
