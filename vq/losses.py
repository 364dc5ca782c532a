"""Losses of the first stage, each a formula on tensors."""

import torch.nn.functional as F
from torch import Tensor


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss: (mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2 (Lim & Ye 2017, "Geometric GAN").

    The half is VQGAN's (Esser et al. 2021).
    """
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """The autoencoder's side of it: -mean D(fake)."""
    return -fake_logits.mean()


def non_saturating_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss: -(mean log s(D(real)) + mean log(1 - s(D(fake)))) / 2, s the logistic function.

    The cross-entropy of Goodfellow et al. 2014 (eq. 1), halved as the hinge loss is.
    """
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """The autoencoder's side of it: -mean log s(D(fake)), whose gradient is large where D is sure (section 3 there)."""
    return F.softplus(-fake_logits).mean()


ADVERSARIAL = {  # of the discriminator, of the autoencoder
    "hinge": (hinge_loss, hinge_generator_loss),
    "non_saturating": (non_saturating_loss, non_saturating_generator_loss),
}


def adaptive_weight(of_reconstruction: Tensor, of_adversarial: Tensor, maximum: float) -> Tensor:
    """lambda = |of_reconstruction| / (|of_adversarial| + 1e-4), at most `maximum` (Esser et al. 2021, eq. 7).

    These are the gradients of the two losses with respect to the last layer, each the mean over all processes: norms
    are not linear in the batch. The paper adds 1e-6 below, its code 1e-4.
    """
    return (of_reconstruction.norm() / (of_adversarial.norm() + 1e-4)).clamp(0, maximum)
