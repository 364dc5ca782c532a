"""Uniform discrete diffusion and a sampler by it: a complete example of a new discrete process."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.process import DiscreteProcess, append_dims
from diffusion.rng import Streams
from diffusion.solvers import solver_options_for
from models.transformer import Transformer
from train.samplers._codes import DiscreteSampler, DiscreteSampling
from train.samplers._transformer import TransformerConfig


@dataclass(frozen=True)
class UniformDiffusion(DiscreteProcess):
    """With probability t a code is replaced by a uniformly random one of all K (Austin et al. 2021)."""

    codes: int
    steps: int | None = 8

    def prior(self, shape: tuple[int, ...], rng: Streams) -> Tensor:
        return (rng.uniform(shape) * self.codes).long()

    def corrupt(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        return torch.where(rng.uniform(x0.shape) < t.view(-1, 1, 1), self.prior(x0.shape, rng), x0)

    def may_change(self, x_t: Tensor, t: float, s: float) -> Tensor:
        return torch.ones_like(x_t, dtype=torch.bool)

    def reverse_probabilities(self, x_t: Tensor, logits: Tensor, t: float, s: float) -> Tensor:
        """The sum over x_0 of q(x_s | x_t, x_0) p(x_0 | x_t); t and s may be (B,) too."""
        t, s = (append_dims(torch.as_tensor(each), logits) for each in (t, s))
        stay_prob, one_hot = (1 - t) / (1 - s), F.one_hot(x_t, self.codes).to(logits.dtype)
        ratio = logits.softmax(-1) / ((1 - t) * one_hot + t / self.codes)  # p(x_0) / q(x_t | x_0)
        to_x_t = stay_prob * one_hot + (1 - stay_prob) / self.codes  # q(x_t | x_s), by x_s
        return to_x_t * ((1 - s) * ratio + s / self.codes * ratio.sum(-1, keepdim=True))

    def position_losses(self, logits: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of the step from t to t - 1/T."""
        s = ((t * self.steps).round() - 1) / self.steps
        certain = F.one_hot(x0, self.codes).to(logits.dtype).log()
        truth = self.reverse_probabilities(x_t, certain, t, s)
        result = self.reverse_probabilities(x_t, logits, t, s).clamp(min=1e-30)
        return (torch.special.xlogy(truth, truth) - truth * result.log()).sum(-1)

    def elbo_weight(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.steps)


@dataclass(frozen=True, kw_only=True)
class Sampling(*solver_options_for(UniformDiffusion), DiscreteSampling):
    """Sampling."""

    solver: str = "discrete"


class UniformSampler(DiscreteSampler):
    """A sampler by uniform diffusion, with a transformer with (`time_scale`) or without time input."""

    def __init__(self, *, codes: int, grid: tuple[int, int], steps: int = 8, time_scale: float | None = 1000.0):
        small = {"width": 32, "heads": 2, "layers": 1, "time_scale": time_scale}
        network, process = Transformer(codes=codes, grid=grid, **small), UniformDiffusion(codes, steps)
        super().__init__(TransformerConfig(), process, network, grid=grid, n_classes=0)
