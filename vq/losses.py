"""Adversarial losses of the first stage, each a formula on tensors, and LeCAM's regularization for small data."""

import torch
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


ADVERSARIAL_LOSSES = {  # of the discriminator, of the autoencoder
    "hinge": (hinge_loss, hinge_generator_loss),
    "non_saturating": (non_saturating_loss, non_saturating_generator_loss),
}


def adaptive_weight(recon_grad: Tensor, adv_grad: Tensor, maximum: float) -> Tensor:
    """lambda = |of_reconstruction| / (|of_adversarial| + 1e-4), at most `maximum` (Esser et al. 2021, eq. 7).

    These are the gradients of the two losses with respect to the last layer, each the mean over all processes: norms
    are not linear in the batch. The paper adds 1e-6 below, its code 1e-4.
    """
    return (recon_grad.norm() / (adv_grad.norm() + 1e-4)).clamp(0, maximum)


class LeCAM:
    """Keeps a discriminator's logits from leaving what they were on the other side (Tseng et al. 2021).

    R = mean relu(D(real) - fake)^2 + mean relu(real - D(fake))^2, where `real` and `fake` are averages of the mean
    logits over past steps, a <- decay a + (1 - decay) mean: the form of its authors' code, which decays by 0.99. The
    decay of 0.999 and the start at 0 are MaskBit's (Weber et al. 2024). The mean is over logits, not the square of
    their mean, so that it does not depend on how a batch is split. An extra of the training state.
    """

    def __init__(self, device: torch.device, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"got decay {decay}, wanted one in [0, 1)")
        self.decay = decay
        self.real, self.fake = torch.zeros((), device=device), torch.zeros((), device=device)

    def __call__(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Logits of real images and reconstructions, of any shape -> R (), with gradients to both."""
        return F.relu(real_logits - self.fake).square().mean() + F.relu(self.real - fake_logits).square().mean()

    @torch.no_grad()
    def update_averages(self, real: Tensor, fake: Tensor) -> None:
        """Takes a step's mean logits (), those of all processes together, into the averages."""
        self.real = torch.lerp(real, self.real, self.decay)
        self.fake = torch.lerp(fake, self.fake, self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.real, self.fake = (state[name].to(self.real) for name in ("real", "fake"))
