"""What a training step does with its gradients: all optimizers move, or, where something is not finite, none."""

import torch
from torch import Tensor

from train.distributed import World
from train.loop import State
from train.parallel import gradient_norm, gradients
from train.precision import LossScale


def update(state: State, names: list[str], world: World, *, lr: float, clip: float) -> list[Tensor] | None:
    """Clips the gradients of each named optimizer to norm `clip` (0: does not), then takes a step with each.

    Returns the norms before clipping. Where one is not finite no weight changes, and the answer is None: gradients are
    those of all processes together, so all of them decide alike.
    """
    scale: LossScale | None = state.extras.get("loss_scale")
    parameters = {name: [p for g in state.optimizers[name].param_groups for p in g["params"]] for name in names}
    norms = torch.stack([gradient_norm(each, world) for each in parameters.values()])
    if scale is not None:
        norms = norms / scale.value
    finite = bool(norms.isfinite().all())
    for name, norm in zip(names, norms, strict=True):
        optimizer = state.optimizers[name]
        if finite:
            factor = torch.ones_like(norm) if clip == 0 else (clip / (norm + 1e-6)).clamp(max=1)
            if scale is not None:
                factor = factor / scale.value
            if clip > 0 or scale is not None:
                torch._foreach_mul_(gradients(parameters[name]), factor)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        optimizer.zero_grad()
    if scale is not None:
        scale.good() if finite else scale.overflowed()
    if not finite:
        return None
    return list(norms)
