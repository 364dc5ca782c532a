"""Runs a solver with a number of steps, as samplers do."""

from collections.abc import Callable

from torch import Tensor

from diffusion import discrete_solvers
from diffusion.process import ContinuousProcess
from diffusion.solvers import get_solver
from diffusion.spacing import step_times


def solve_in_steps(
    solve: Callable,
    denoise: Callable,
    process: object,
    x: Tensor,
    *,
    steps: int | None = None,
    spacing: str = "uniform",
    **kwargs: object,
) -> Tensor:
    """Runs the solver on x in `steps` steps, or its default number; `spacing` is for continuous processes."""
    if steps is None:
        steps = get_solver(process, solve.__name__).steps(process, x[0].numel())
    if isinstance(process, ContinuousProcess):
        return solve(denoise, process, x, step_times(process, steps, spacing), **kwargs)
    return solve(denoise, process, x, discrete_solvers.even_times(steps), **kwargs)
