"""Times of sampling at whole steps of a `GaussianDiffusion`, as Stable Diffusion's schedulers choose them.

Step n, from 0 to T - 1, is the time (n + 1) / T. After Lin et al. 2024, table 2; the file names are those of the paper.
"""

from collections.abc import Callable

from diffusion.gaussian import GaussianDiffusion


def whole_leading(T: int, count: int, offset: int) -> list[int]:
    """Multiples of T // count, plus `offset`, with which the last step is not at 0."""
    return [i * (T // count) + offset for i in reversed(range(count))]


def whole_trailing(T: int, count: int, offset: int) -> list[int]:
    """Equal steps from T - 1 on, rounded; the last step is long."""
    return [round(T - i * T / count) - 1 for i in range(count)]


def whole_linspace(T: int, count: int, offset: int) -> list[int]:
    """Equal steps from T - 1 to 0, both included, rounded."""
    return [round((T - 1) * i / max(count - 1, 1)) for i in reversed(range(count))] if count > 1 else [T - 1]


def whole_open(T: int, count: int, offset: int) -> list[int]:
    """Equal steps from T - 1 to 0, rounded, without the last (as of DPM-Solver in public code)."""
    return [round((T - 1) * i / count) for i in reversed(range(1, count + 1))]


WHOLE_STEPS: dict[str, Callable[[int, int, int], list[int]]] = {
    function.__name__: function for function in (whole_leading, whole_trailing, whole_linspace, whole_open)
}


def whole_step_times(
    process: object, count: int, spacing: str, offset: int = 0, *, start: float = 1.0, last: float = 0.0
) -> list[float]:
    """Returns decreasing times of `count` steps by a key of WHOLE_STEPS, then `last`: 0, or 1 / T, the time of step 0.

    Times above `start` are left out. ValueError for a process without steps, for more steps than it has, and for an
    offset beyond its last step.
    """
    if not isinstance(process, GaussianDiffusion):
        raise ValueError(f"got spacing {spacing} for a process without whole steps: pass another --spacing")
    if not 1 <= count <= process.steps:
        raise ValueError(f"got {count} sampling steps, wanted 1 to {process.steps} for spacing {spacing}")
    steps = WHOLE_STEPS[spacing](process.steps, count, offset)
    if offset and (spacing != "whole_leading" or steps[0] >= process.steps):
        raise ValueError(
            f"got steps_offset {offset} for spacing {spacing} of {count} steps, wanted whole_leading, and no step "
            f"beyond {process.steps - 1}: leave --steps_offset out"
        )
    times = [(n + 1) / process.steps for n in steps]
    times = [t for t in times if t <= start * (1 + 1e-6)] or [times[-1]]
    return [*(t for t in times if t > last), last]
