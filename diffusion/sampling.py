"""From a network and a process to samples in one call, for training loops without a run folder."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion.denoisers import guided, thresholded
from diffusion.discrete_solvers import even_times
from diffusion.edm import EDM
from diffusion.gaussian_solvers import step_times as continuous_step_times
from diffusion.process import ContinuousProcess, DiscreteProcess
from diffusion.rng import Streams, seed_of
from diffusion.solvers import Solver, solvers_for
from diffusion.types import Denoiser, OnStep, Prediction

Network = Callable[..., Tensor]
Process = ContinuousProcess | DiscreteProcess


def predictor(network: Network, process: Process) -> Callable[..., Prediction | Tensor]:
    """A function (x, t, condition=None) -> what the network predicts at x, t (B,).

    Of a continuous process, the network is called with x (B, C, H, W) and the time as `process.network_time` gives it,
    and the result is a Prediction. Of a discrete one it is called with ids (B, H, W), and with t=t (B,) if predictions
    depend on the time, and the result is logits (B, H, W, K). A condition is passed behind these.
    """

    def evaluate(x: Tensor, t: Tensor, condition: Any = None) -> Prediction | Tensor:
        conditions = () if condition is None else (condition,)
        if not isinstance(process, ContinuousProcess):
            return network(x, *conditions, **({"t": t} if process.prediction_depends_on_time else {}))
        time = process.network_time(t).to(x.device)
        return process.to_prediction(network(process.network_input(x, t), time, *conditions), x, t)

    return evaluate


def denoiser(network: Network, process: Process) -> Denoiser:
    """The unconditional predictions of a network, as solvers and likelihoods call them."""
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
    """Draws x of a shape, (B, C, H, W) or, of a discrete process, (B, H, W), by the solver of that name.

    Without `steps` the solver chooses their number; `spacing` is one of gaussian_solvers.SPACINGS, of a continuous
    process. `condition` are the raw fields of B examples, which `network.encode` takes, `guidance` is the scale of
    classifier-free guidance. `clip` keeps the predicted x_0 of a continuous process in [-1, 1]: pass False for data of
    another range, such as latents. Example i of a seed does not depend on the batch. `options` are those of the solver,
    such as eta. ValueError for an unknown solver or spacing, and guidance without a condition.
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
        process = replace(process, schedule=entry.schedule)  # the masking schedule that this solver works best with
    if condition is None:
        denoise = denoiser(network, process)
    else:
        conditions = [network.encode({}, x), network.encode(condition, x)]
        denoise = guided(predictor(network, process), conditions, [guidance])
    if clip and isinstance(process, ContinuousProcess):
        denoise = thresholded(denoise, process)
    return entry.solve(denoise, process, x, times, rng=rng, on_step=on_step, **options)


def solver_times(entry: Solver, process: Process, size: int, steps: int | None, spacing: str | None) -> list[float]:
    """The times that a solver stops at for examples of `size` numbers or codes, falling to 0."""
    steps = entry.steps(process, size) if steps is None else steps
    if isinstance(process, ContinuousProcess):
        return continuous_step_times(process, steps, spacing or ("karras" if isinstance(process, EDM) else "uniform"))
    if spacing is not None:
        raise ValueError(f"got spacing {spacing!r} for {type(process).__name__}, whose steps are even: leave it out")
    return even_times(steps)
