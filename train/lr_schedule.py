"""The learning rate of every step, from numbers alone."""

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
    """The rate that step `step` of a run of `steps` takes, counted from 0; never negative.

    Warm-up, in all of them: lr (step + 1) / warmup, so step 0 takes lr / warmup and step warmup - 1 takes lr. Then,
    with `last` = steps - 1:

    - constant: lr.
    - cosine: lr (end + (1 - end) (1 + cos(pi p)) / 2), where p rises from 0 at the end of the warm-up to 1 at `last`
      (Loshchilov & Hutter 2017, "SGDR", without restarts).
    - decay_tail: lr, and over the last `decay_steps` steps lr (end + (1 - end) (last - step) / decay_steps), which
      `last` ends at end lr ("warmup-stable-decay", Hu et al. 2024, "MiniCPM"; Haegele et al. 2024). A run that stops
      before its tail can be made longer without a trace in what was done.

    `end` is a share of lr in [0, 1]; `decay_steps` matters to decay_tail alone. ValueError where the numbers do not
    fit, whatever the step.
    """
    validate_schedule(lr, steps, warmup, schedule, decay_steps, end)
    if step < 0:
        raise ValueError(f"got step {step}, wanted 0 or more")
    if step < warmup:
        return lr * min(1.0, (step + 1) / warmup)
    last = steps - 1
    if schedule == "cosine":
        start = max(warmup - 1, 0)  # the last step that takes lr
        progress = min(1.0, (step - start) / max(last - start, 1))
        return lr * (end + (1 - end) * max(0.0, (1 + math.cos(math.pi * progress)) / 2))
    if schedule == "decay_tail":
        left = max(last - step, 0)
        return lr * (end + (1 - end) * min(1.0, left / decay_steps))
    return lr


def validate_schedule(lr: float, steps: int, warmup: int, schedule: str, decay_steps: int, end: float) -> None:
    """ValueError where a schedule does not fit into its run."""
    if schedule not in LR_SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; there are: {', '.join(LR_SCHEDULES)}")
    if not 0 <= lr < math.inf or not 0 <= end <= 1:
        raise ValueError(f"got lr {lr}, end {end}: wanted a finite lr >= 0, and for its end a share of it in [0, 1]")
    if steps < 1 or warmup < 0 or decay_steps < 0:
        raise ValueError(
            f"got {steps} steps, warm-up {warmup}, decay {decay_steps}: wanted at least 1 step, the others 0 or more"
        )
    if schedule == "cosine" and warmup >= max(steps, 2):
        raise ValueError(
            f"got a warm-up of {warmup} in {steps} steps, which leaves the cosine none: shorten it, or train longer"
        )
    if schedule == "decay_tail" and decay_steps == 0:
        raise ValueError("got decay_tail with 0 decay_steps: say over how many steps the rate falls")
    if schedule == "decay_tail" and warmup + decay_steps > steps:
        raise ValueError(
            f"got a warm-up of {warmup} and a decay of {decay_steps} in {steps} steps: shorten one, or train longer"
        )
