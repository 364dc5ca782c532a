"""Editing of known data by what two conditions of one model predict: DiffEdit, its counterpart for codes, FlowEdit.

The source describes the data, the target the wanted result. Each is given as a denoiser: `(x, t (B,)) -> Prediction`
for a continuous process, or logits (B, H, W, K) for codes. Where both predict the same, nothing is edited.

Notation: x is the data x_0 (B, C, H, W); t -> s is a step of a solver (s < t); a mask (B, H, W) is True where the
result may differ from the data.
"""

from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.absorbing import AbsorbingDiffusion, mask_at_random
from diffusion.gaussian_solvers import ContinuousDenoiser, ddim
from diffusion.process import ContinuousProcess, expand
from diffusion.rng import Streams
from diffusion.types import Denoiser

MaskRule = Literal["diffusers", "paper"]
OUTLIER = 3.0  # times the mean of a map, from which on its values are equal


def check_noisings(n: int) -> None:
    """Raises ValueError for fewer than one noising."""
    if n < 1:
        raise ValueError(f"got {n} noisings, wanted at least 1: pass n=10, or --noisings 10")


@torch.no_grad()
def noise_differences(
    source: ContinuousDenoiser,
    target: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W)
    t: float,
    *,
    rng: Streams,
    n: int = 10,
) -> Tensor:
    """Returns how much the noise predicted under source and target differs at each place: (B, H, W), at least 0.

    It is the mean of |eps_target - eps_source| over the channels and over n noisings of x at t, each with noise of its
    own (Couairon et al. 2022, DiffEdit, section 3.2, step 1).
    """
    check_noisings(n)
    time, total = expand(t, x), x.new_zeros(len(x), *x.shape[2:])
    for _ in range(n):
        x_t = process.corrupt(x, time, rng.normal(x.shape).to(x.dtype))
        total = total + (target(x_t, time).eps - source(x_t, time).eps).abs().mean(1)
    return total / n


@torch.no_grad()
def code_differences(
    source: Denoiser,
    target: Denoiser,
    process: AbsorbingDiffusion,
    x: Tensor,  # (B, H, W)
    mask_prob: float,
    *,
    rng: Streams,
    n: int = 10,
) -> Tensor:
    """Returns how much the codes predicted under source and target differ at each place: (B, H, W) in [0, 1].

    It is the total variation distance of the two distributions of a masked code, the mean over those of n random
    maskings of x that mask it. Each masks a code with probability `mask_prob`; codes that none of them masks have 0.
    """
    check_noisings(n)
    time = expand(process.t_from_mask_prob(torch.tensor(mask_prob, dtype=torch.float64)).item(), x)
    total, count = x.new_zeros(x.shape, dtype=torch.float32), torch.zeros_like(x)
    for _ in range(n):
        x_t = mask_at_random(x, mask_prob, process.mask, rng)
        p, q = (denoise(x_t, time).float().softmax(-1) for denoise in (source, target))  # (B, H, W, K)
        masked = x_t == process.mask
        total, count = total + (p - q).abs().sum(-1) / 2 * masked, count + masked
    return total / count.clamp(min=1)


def mask_of_differences(differences: Tensor, rule: MaskRule = "diffusers") -> Tensor:
    """Returns where a map of differences (B, H, W) is large, by the values of each map alone: (B, H, W) bool.

    diffusers: above 1.5 times its mean, which is half of the 3 means at which that code clips a map. paper: above the
    middle of its range, after values above 3 means are clipped (DiffEdit, section 3.2: outliers, scaled to [0, 1],
    threshold 0.5). A constant map gives an empty mask.
    """
    if rule not in get_args(MaskRule):
        raise ValueError(f"got mask rule {rule!r}, wanted one of {', '.join(get_args(MaskRule))}: pass --mask_rule")
    mean = differences.mean((1, 2), keepdim=True)
    if rule == "diffusers":
        return differences > OUTLIER / 2 * mean
    clipped = differences.minimum(OUTLIER * mean)
    low, high = clipped.amin((1, 2), keepdim=True), clipped.amax((1, 2), keepdim=True)
    return clipped - low > (high - low) / 2


@torch.no_grad()
def diffedit(
    target: ContinuousDenoiser,
    process: ContinuousProcess,
    states: list[Tensor],  # (B, C, H, W) each
    mask: Tensor,  # (B, H, W) bool
    times: list[float],
    *,
    rng: Streams,
) -> Tensor:
    """Decodes inverted data under the target inside the mask, and keeps the data outside it exactly.

    `states` are those of `ddim_inversion` at `times`: the data first, the noisiest last. After each step of DDIM the
    places outside the mask are set to the inverted state of the time that the step has reached (DiffEdit, section 3.2,
    step 3), which after the last step is the data. Returns (B, C, H, W).
    """
    if len(states) != len(times):
        raise ValueError(f"got {len(states)} states for {len(times)} times, wanted one each: invert at these times")

    def restore_outside(i: int, t: float, s: float, x_s: Tensor, x0: Tensor) -> Tensor:
        return torch.where(mask.unsqueeze(1), x_s, states[-2 - i])

    return ddim(target, process, states[-1], times, rng=rng, on_step=restore_outside)


@torch.no_grad()
def flowedit(
    source: ContinuousDenoiser,
    target: ContinuousDenoiser,
    process: ContinuousProcess,
    x: Tensor,  # (B, C, H, W)
    times: list[float],
    *,
    rng: Streams,
    n: int = 1,
    plain_steps: int = 0,
) -> Tensor:
    """Moves data from source to target without inversion (Kulikov et al. 2024, FlowEdit, algorithm 1): (B, C, H, W).

    delta, the difference between the edit and x, starts at 0 at times[0]. In each step from t to s

        Z_source = alpha x + sigma eps,  Z_target = Z_source + delta,
        delta += mean over n draws of eps of [d(Z_target; target) - d(Z_source; source)],

    where d is the increment of DDIM, which for a flow is Euler's, as published. delta is a difference of two states
    x_t, so nothing is scaled where alpha changes: if both predictions have the same eps, its increment is
    (alpha_s - alpha_t) times the difference of their x_0. Each step takes n network calls on each side; equal sides
    give x to the bit. The last `plain_steps` steps, n_min of the paper, are DDIM under the target from Z_target: more
    freedom, and less of x.
    """
    check_noisings(n)
    steps = len(times) - 1
    if not 0 <= plain_steps <= steps:
        raise ValueError(f"got {plain_steps} plain steps of {steps}, wanted 0 to {steps}: pass --plain_steps")
    delta = torch.zeros_like(x)
    for t, s in pairwise(times[: len(times) - plain_steps]):
        total = torch.zeros_like(x)
        for _ in range(n):
            z_source = process.corrupt(x, expand(t, x), rng.normal(x.shape).to(x.dtype))
            after = [
                ddim(denoise, process, z, [t, s], rng=rng)
                for denoise, z in ((target, z_source + delta), (source, z_source))
            ]
            total = total + (after[0] - after[1])  # delta and the two increments, since Z_target - Z_source is delta
        delta = total / n
    if not plain_steps:
        return x + delta
    rest = times[steps - plain_steps :]
    z_target = process.corrupt(x, expand(rest[0], x), rng.normal(x.shape).to(x.dtype)) + delta
    return ddim(target, process, z_target, rest, rng=rng)
