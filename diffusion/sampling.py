"""Sampling in one call from a network and a process, for training loops without a run folder."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion.denoisers import guided, thresholded
from diffusion.discrete_solvers import even_times
from diffusion.process import ContinuousProcess, DiscreteProcess
from diffusion.rng import Streams, seed_of, to_device
from diffusion.solvers import Solver, solvers_for
from diffusion.spacing import step_times as continuous_step_times
from diffusion.types import Denoiser, OnStep, Prediction

Network = Callable[..., Tensor]
Process = ContinuousProcess | DiscreteProcess


def predictor(network: Network, process: Process) -> Callable[..., Prediction | Tensor]:
    """Returns a function (x, t (B,), condition=None) -> the network's prediction at x.

    Continuous processes: the network is called with `process.network_input(x, t)` (B, C, H, W) and
    `process.network_time(t)`; returns a Prediction.
    Discrete processes: it is called with ids (B, H, W), and with the keyword t if predictions depend on the time;
    returns logits (B, H, W, K). A condition is the last positional argument. t may be on the CPU, where solvers keep
    it; the network gets its times on x's device.
    """

    def evaluate(x: Tensor, t: Tensor, condition: Any = None) -> Prediction | Tensor:
        conditions = () if condition is None else (condition,)
        if not isinstance(process, ContinuousProcess):
            time = {"t": to_device(t, x.device)} if process.prediction_depends_on_time else {}
            return network(x, *conditions, **time)
        time = to_device(process.network_times(t), x.device)
        return process.to_prediction(network(process.network_input(x, t), time, *conditions), x, t)

    return evaluate


def denoiser(network: Network, process: Process) -> Denoiser:
    """Returns the unconditional denoiser of a network, for solvers and likelihoods."""
    evaluate = predictor(network, process)
    return lambda x, t, rows=None: evaluate(x, t)


def sample(
    network: Network,
    process: Process,
    shape: tuple[int, ...],
    *,
    solver: str,
    steps: int | None = None,
    spacing: str | None = None,
    condition: Mapping[str, Any] | None = None,
    guidance: float = 1.0,
    clip: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: OnStep | None = None,
    **options: Any,
) -> Tensor:
    """Samples x of the given shape with a solver: (B, C, H, W), or (B, H, W) for a discrete process.

    `steps` defaults to the solver's own number; a discrete process in continuous time has none and needs it. `spacing`
    is a key of spacing.SPACINGS, for continuous processes. `condition` maps names of encoders, such as label,
    to the raw conditions of B examples (see `network.encode`), and `guidance` is the scale of classifier-free guidance.
    `clip` keeps the predicted x_0 of a continuous process in [-1, 1]: pass False for data with another range, such as
    latents. Example i of a seed does not depend on the batch size. `options` are those of the solver, such as eta.
    ValueError for an unknown solver or spacing, guidance without a condition, or missing steps.
    """
    if guidance != 1 and condition is None:
        raise ValueError(f"got guidance {guidance} without a condition: pass condition, or guidance=1.0")
    solvers = solvers_for(process)
    if solver not in solvers:
        names = ", ".join(sorted(solvers))
        raise ValueError(f"unknown solver {solver!r} for {type(process).__name__}; there are: {names}")
    entry = solvers[solver]
    rng = Streams([seed_of(seed, "sample", i) for i in range(shape[0])], device)
    x = process.prior(shape, rng)
    times = solver_times(entry, process, x[0].numel(), steps, spacing)
    if isinstance(process, DiscreteProcess) and entry.schedule is not None:
        process = replace(process, schedule=entry.schedule)  # the schedule m(t) that the solver prefers
    if condition is None:
        denoise = denoiser(network, process)
    else:
        conditions = [network.encode({}, x), network.encode(condition, x)]
        denoise = guided(predictor(network, process), conditions, [guidance])
    if clip and isinstance(process, ContinuousProcess):
        denoise = thresholded(denoise, process)
    return entry.solve(denoise, process, x, times, rng=rng, on_step=on_step, **options)


def solver_times(entry: Solver, process: Process, size: int, steps: int | None, spacing: str | None) -> list[float]:
    """Returns the decreasing times of a solver, ending at 0, for examples of `size` numbers or codes."""
    steps = entry.steps(process, size) if steps is None else steps
    if isinstance(process, ContinuousProcess):
        return continuous_step_times(process, steps, spacing or process.default_spacing)
    if spacing is not None:
        raise ValueError(f"got spacing {spacing!r} for {type(process).__name__}, whose steps are even: leave it out")
    return even_times(steps)
