"""LeCAM's regularization of a discriminator, for small data."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    def follow(self, real: Tensor, fake: Tensor) -> None:
        """Takes a step's mean logits (), those of all processes together, into the averages."""
        self.real = torch.lerp(real, self.real, self.decay)
        self.fake = torch.lerp(fake, self.fake, self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.real, self.fake = (state[name].to(self.real) for name in ("real", "fake"))
