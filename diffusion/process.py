"""What all Gaussian processes share: x_t = alpha(t) x_0 + sigma(t) eps, its kernels, and a network's prediction.

A process says what its time t is. At t = 0 there is no noise: alpha(0) = 1, sigma(0) = 0. Kernels take any t > s >= 0,
so respacing needs nothing more. Times are (B,), or one number for the whole batch.

Coefficients are computed on the CPU in float64 (Metal has none) and cast where they meet x: keep t on the CPU in
training, and nothing waits for the device.
"""

from typing import Literal

import torch
from torch import Tensor

from diffusion.rng import Streams
from diffusion.types import Normal, Prediction

Variance = Literal["fixed_small", "fixed_large", "learned_range"]


def like(values: Tensor, x: Tensor) -> Tensor:
    """(B,) or () -> (B or 1, 1, ...), in x's type and on its device."""
    return values.to(x.dtype).to(x.device).view(-1, *[1] * (x.ndim - 1))


def full(x: Tensor) -> Tensor:
    """float16 and bfloat16 as float32: half precision ends where the network does."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Gaussian:
    """A process. A kind of process defines the first five methods, and what it is trained on."""

    variance: Variance = "fixed_small"  # that of an ancestral reverse step
    start: float = 1.0  # t of pure noise, where sampling begins
    end: float = 1e-3  # the least t that networks are asked about; sampling then goes to 0

    def alpha(self, t: Tensor) -> Tensor:
        """What is left of the data: t, on any device -> its shape, float64 on the CPU."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise: t, on any device -> its shape, float64 on the CPU."""
        raise NotImplementedError

    def quantile(self, u: Tensor) -> Tensor:
        """Training times: u (B,) uniform on (0, 1] -> t (B,)."""
        raise NotImplementedError

    def network_time(self, t: Tensor) -> Tensor:
        """The number a network is told: (B,) -> (B,) float32, where t is."""
        raise NotImplementedError

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """What a network's output (B, C or 2 C, H, W) at x_t (B, C, H, W), t (B,) means."""
        raise NotImplementedError

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What a network is shown of x_t."""
        return x_t

    def times(self, rng: Streams) -> Tensor:
        """t (B,) to train on, one draw of each stream."""
        return self.quantile(1 - rng.uniform((len(rng),)))  # (0, 1]

    def prior(self, shape: tuple[int, ...], rng: Streams) -> Tensor:
        """The noise that sampling begins with."""
        noise = rng.normal(shape)
        return like(self.sigma(torch.tensor(self.start)), noise) * noise

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """q(x_t | x_0), with the noise given: (B, C, H, W)."""
        return like(self.alpha(t), x0) * x0 + like(self.sigma(t), x0) * noise

    def half_logsnr(self, t: Tensor) -> Tensor:
        """log(alpha / sigma), which falls in t; infinite where one of them is 0."""
        return (self.alpha(t) / self.sigma(t)).log()

    def time_at(self, half_logsnr: Tensor) -> Tensor:
        """The inverse of half_logsnr, by bisection: any shape, float64 on the CPU."""
        low, high = torch.zeros_like(half_logsnr), torch.full_like(half_logsnr, self.start)
        for _ in range(60):  # halvings, to float64's resolution
            middle = (low + high) / 2
            too_noisy = self.half_logsnr(middle) < half_logsnr
            low, high = torch.where(too_noisy, low, middle), torch.where(too_noisy, middle, high)
        return high

    def with_x0(self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """The prediction with another x0, and the eps that goes with it."""
        eps = (x_t - like(self.alpha(t), x_t) * x0) / like(self.sigma(t), x_t)
        return Prediction(x0, eps, prediction.share)

    def forward_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """Variance of q(x_t | x_s): beta_t of the papers for neighbouring steps. float64"""
        return self.sigma(t) ** 2 - (self.alpha(t) / self.alpha(s) * self.sigma(s)) ** 2

    def posterior_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """Variance of q(x_s | x_t, x_0): beta-tilde. float64"""
        return self.forward_variance(t, s) * (self.sigma(s) / self.sigma(t)) ** 2

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Mean of q(x_s | x_t, x_0) (Ho et al. 2020, eq. 7; for any alpha and sigma, Kingma et al. 2021)."""
        of_x_t = self.alpha(t) / self.alpha(s) * (self.sigma(s) / self.sigma(t)) ** 2
        of_x0 = self.alpha(s) * self.forward_variance(t, s) / self.sigma(t) ** 2
        return like(of_x_t, x_t) * x_t + like(of_x0, x_t) * x0

    def least_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """The posterior's variance, kept from zero at s = 0, so that it has a logarithm. float64"""
        return self.posterior_variance(t, s).clamp(min=1e-20)

    def reverse_kernel(self, x_t: Tensor, prediction: Prediction, t: Tensor, s: Tensor) -> Normal:
        """p(x_s | x_t): the posterior at the predicted x_0, its variance by `variance`.

        learned_range lies between the posterior's and the forward step's (Nichol & Dhariwal 2021, eq. 15).
        """
        mean = self.posterior_mean(prediction.x0, x_t, t, s)
        least, forward = self.least_variance(t, s), self.forward_variance(t, s)
        if self.variance == "learned_range":
            small, large = like(least.log(), x_t), like(forward.log(), x_t)
            return Normal(mean, prediction.share * large + (1 - prediction.share) * small)
        if self.variance == "fixed_large":  # the last step's is the least: a better likelihood, as in Ho et al.'s code
            least = torch.where(self.sigma(s) > 0, forward, least)
        return Normal(mean, like(least.log(), x_t))

    def reverse(self, x_t: Tensor, prediction: Prediction, t: Tensor, s: Tensor, rng: Streams) -> Tensor:
        """Draws x_s from the reverse kernel; at s = 0 its mean."""
        mean, log_variance = self.reverse_kernel(x_t, prediction, t, s)
        noise = rng.normal(x_t.shape).to(x_t.dtype)
        return torch.where(like(self.sigma(s), x_t) > 0, mean + (0.5 * log_variance).exp() * noise, mean)
