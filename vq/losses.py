"""Adversarial losses of the first stage, the adaptive weight, and LeCAM regularisation."""

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator loss (mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2 of logits of any shape -> ().

    Lim & Ye 2017, "Geometric GAN"; the factor 1/2 is VQGAN's (Esser et al. 2021).
    """
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Autoencoder loss of the hinge GAN, -mean D(fake), of logits of any shape, -> ()."""
    return -fake_logits.mean()


def non_saturating_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator loss -(mean log s(D(real)) + mean log(1 - s(D(fake)))) / 2, s the sigmoid; any shape -> ().

    The cross-entropy of Goodfellow et al. 2014 (eq. 1), halved like the hinge loss.
    """
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """Autoencoder loss -mean log sigmoid(D(fake)), any shape -> (); does not saturate (Goodfellow et al. 2014, 3)."""
    return F.softplus(-fake_logits).mean()


ADVERSARIAL_LOSSES = {  # name: (discriminator loss, autoencoder loss)
    "hinge": (hinge_loss, hinge_generator_loss),
    "non_saturating": (non_saturating_loss, non_saturating_generator_loss),
}


def adaptive_weight(recon_grad: Tensor, adv_grad: Tensor, maximum: float) -> Tensor:
    """Returns lambda = |recon_grad| / (|adv_grad| + 1e-4), at most `maximum` (Esser et al. 2021, eq. 7).

    The arguments, of any shape, are gradients of the reconstruction and adversarial losses at the last layer, each
    averaged over all processes first, since norms are not linear in the batch. The constant 1e-4 is that of VQGAN's
    code; the paper states 1e-6.
    """
    return (recon_grad.norm() / (adv_grad.norm() + 1e-4)).clamp(0, maximum)


class LeCAM:
    """LeCAM regularisation: penalises logits that stray from moving averages of the other class (Tseng et al. 2021).

    R = mean relu(D(real) - fake)^2 + mean relu(real - D(fake))^2, where `real` and `fake` are moving averages of the
    mean logits, a <- decay a + (1 - decay) mean, as in the authors' code (decay 0.99). The decay of 0.999 and the start
    at 0 follow MaskBit (Weber et al. 2024). The mean is over the squares of single logits, so that it does not depend
    on how a batch is split. The averages are part of the training state.
    """

    def __init__(self, device: torch.device, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"got decay {decay}, wanted a number in [0, 1)")
        self.decay = decay
        self.real, self.fake = torch.zeros((), device=device), torch.zeros((), device=device)

    def __call__(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Returns R () of logits of real images and reconstructions, of any shape; differentiable in both."""
        return F.relu(real_logits - self.fake).square().mean() + F.relu(self.real - fake_logits).square().mean()

    @torch.no_grad()
    def update_averages(self, real: Tensor, fake: Tensor) -> None:
        """Updates the averages with the mean logits () of a step, over all processes."""
        self.real = torch.lerp(real, self.real, self.decay)
        self.fake = torch.lerp(fake, self.fake, self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.real, self.fake = (state[name].to(self.real) for name in ("real", "fake"))
