"""Losses of the first stage, each a formula on tensors."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss: (mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2 (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The generator's adversarial loss: -mean D(fake)."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    maximum: float,
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """lambda = |grad reconstruction| / (|grad adversarial| + 1e-4), at most `maximum` (Esser et al. 2021, eq. 7).

    Gradients are those of the two scalar losses with respect to `last_layer`. Norms are not linear in the batch, so
    `average` takes the mean of a gradient over all processes before its norm is formed.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    ratio = average(of_reconstruction.float()).norm() / (average(of_adversarial.float()).norm() + 1e-4)
    return ratio.clamp(0, maximum).detach()
