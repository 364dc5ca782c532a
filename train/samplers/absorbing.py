"""Absorbing diffusion on VQGAN codes: a transformer and its process."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.rng import Streams
from diffusion.solvers import Solver, solver_options_for
from diffusion.timesteps import low_discrepancy_times
from models.ranges import MILLION
from train.data.streams import TrainingStreams
from train.samplers._codes import DiscreteSampler, DiscreteSampling
from train.samplers._conditions import make_encoders
from train.samplers._transformer import TransformerConfig, make_network

SPACE = "codes"


@dataclass(frozen=True, kw_only=True)
class Config(TransformerConfig):
    """Absorbing diffusion: a transformer that predicts masked codes."""

    loss_type: Literal["reweighted_elbo", "elbo", "mlm"] = "reweighted_elbo"
    """Training loss; the ELBO in bits per code is always logged."""
    mask_schedule: Literal["random", "fixed"] = "random"
    """random: mask each code independently with the probability of its time; fixed: mask exactly that fraction."""
    schedule: Literal["linear", "cosine", "arccos", "square"] = "linear"
    """How the masking probability grows with t."""
    total_steps: int | None = 256
    """Time steps T of the process, with t uniform on {1/T, ..., 1}; None: continuous time, t uniform on (0, 1]."""
    time_sampler: Literal["uniform", "low_discrepancy"] = "uniform"
    """Training times: independent, or spread evenly over the batch."""

    RANGES = {"total_steps": MILLION}


@dataclass(frozen=True, kw_only=True)
class Sampling(*solver_options_for(AbsorbingDiffusion), DiscreteSampling):
    """Sampling."""

    solver: str = "ancestral"
    """ancestral; first_hitting (exact, one network call per code); for few steps halton, confidence, remask."""
    sample_steps: int | None = None
    """Sampling steps, at most one network call each; default: those of the process, or one per code (first_hitting)."""
    reveal: Literal["auto", "linear", "cosine", "arccos", "square"] = "auto"
    """Schedule of masked codes in sampling; auto: arccos for halton, cosine for confidence, else as in training."""
    guidance_interval: tuple[float, float] | None = None
    """Apply guidance only for t in this interval (0 is data, 1 all mask)."""

    @classmethod
    def solver_setting_names(cls) -> set[str]:
        return super().solver_setting_names() | {"reveal"}


class AbsorbingSampler(DiscreteSampler):
    """Absorbing diffusion over `codes` codes on a grid (h, w), with `n_classes` classes or 0."""

    def __init__(self, config: Config, *, codes: int, grid: tuple[int, int], n_classes: int):
        n_classes = n_classes if config.class_conditional else 0
        process = AbsorbingDiffusion(codes, config.total_steps, config.schedule)
        encoders = make_encoders(config, config.bert_n_emb, n_classes)
        network = make_network(config, codes=codes, grid=grid, encoders=encoders)
        loss_options = {"kind": config.loss_type}
        super().__init__(config, process, network, grid=grid, n_classes=n_classes, loss_options=loss_options)

    def times(self, streams: TrainingStreams, count: int) -> Tensor:
        if self.config.time_sampler == "uniform":
            return self.process.times(streams("time"))
        rng, first = streams.step_stream("time")
        return low_discrepancy_times(self.process, rng, count, first, streams.batch_size).t

    def corrupt(self, x0: Tensor, t: Tensor, rng: Streams) -> Tensor:
        corrupt = self.process.corrupt if self.config.mask_schedule == "random" else self.process.corrupt_fixed
        return corrupt(x0, t, rng)

    def noise_level(self, t: Tensor) -> Tensor:
        """Returns the expected fraction of masked codes at t (B,)."""
        return self.process.mask_prob(t)

    def sampling_process(self, solver: Solver, options: Sampling) -> AbsorbingDiffusion:
        """Returns the process with the schedule m(t) for sampling: --reveal, else the solver's, else its own."""
        default = self.process.schedule if solver.schedule is None else solver.schedule
        return replace(self.process, schedule=default if options.reveal == "auto" else options.reveal)

    def training_time(self, t: Tensor, process: AbsorbingDiffusion) -> Tensor:
        if process.schedule == self.process.schedule:
            return t
        return self.process.t_from_mask_prob(process.mask_prob(t).clamp(max=1))


def build(config: Config, *, codes: int, grid: tuple[int, int], n_classes: int) -> AbsorbingSampler:
    return AbsorbingSampler(config, codes=codes, grid=grid, n_classes=n_classes)
