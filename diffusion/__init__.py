"""The mathematics of diffusion: processes, losses, solvers, denoiser wrappers, likelihoods."""

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.autoregressive import Autoregression
from diffusion.denoisers import guided, thresholded, windowed
from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import SCHEDULES, GaussianDiffusion, with_zero_terminal_snr
from diffusion.likelihood import bits_per_code, bits_per_dimension, flow_bits_per_dimension
from diffusion.logits_warper import LogitsWarper
from diffusion.process import ContinuousProcess, DiscreteProcess
from diffusion.rng import Streams, seed_of
from diffusion.sampling import denoiser, sample
from diffusion.solvers import get_solver, solvers_for
from diffusion.timesteps import LossSecondMoment, low_discrepancy_times, uniform_times
from diffusion.types import Bound, Likelihood, Loss, Normal, Prediction

__all__ = [
    "AbsorbingDiffusion",
    "Autoregression",
    "Bound",
    "ContinuousProcess",
    "DiscreteProcess",
    "EDM",
    "GaussianDiffusion",
    "Likelihood",
    "LogitsWarper",
    "Loss",
    "LossSecondMoment",
    "Normal",
    "Prediction",
    "RectifiedFlow",
    "SCHEDULES",
    "Streams",
    "bits_per_code",
    "bits_per_dimension",
    "denoiser",
    "flow_bits_per_dimension",
    "get_solver",
    "guided",
    "low_discrepancy_times",
    "sample",
    "seed_of",
    "solvers_for",
    "thresholded",
    "uniform_times",
    "windowed",
    "with_zero_terminal_snr",
]
