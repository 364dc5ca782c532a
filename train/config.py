"""The settings of every script, as typed dataclasses: a field is a flag. Free of torch, so `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.datasets import DatasetConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: which images, and how they are cut."""

    dataset: str = "digits"
    """Name of the data: a file of train/datasets, or a preset of configs/ that says which of them reads it."""
    reader: str = ""
    """File of train/datasets that reads the data; empty means the one named like the data set."""
    img_size: int = 256
    """Side of the square images, pixels."""
    n_channels: Literal[1, 3] = 3
    """1 grey, 3 colour."""
    horizontal_flip: bool = False
    """Also train on mirrored images."""
    shift: int = 0
    """Also train on images shifted by up to this many pixels each way, black coming in (for digits and the like)."""
    in_memory: bool = False
    """Keep resized images in memory: for data sets of a few GB at most."""
    num_workers: int = 0
    """Processes that load images beside each training process."""

    def __post_init__(self):
        for name, low in (("img_size", 1), ("shift", 0), ("num_workers", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least {low}: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training."""

    train_steps: int = 1_000_000
    """Steps in all, those before a resume included."""
    batch_size: int = 4
    """Images per step over all processes and accumulated parts together."""
    accumulate: int = 1
    """Parts a step's batch is computed in, to save memory."""
    lr: float = 1e-4
    """Learning rate."""
    warmup_iters: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    amp: bool = True
    """bfloat16 autocast where the device computes it natively, else float32 and a message."""
    ema: bool = True
    """Keep an exponential moving average of the weights."""
    ema_beta: float = 0.999
    """Its decay per step, reached after a warm-up."""
    seed: int = 0
    """Every random draw is a function of this, its purpose, the step and the sample."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""
    load_dir: str | None = None
    """Start from the weights of this run."""
    load_step: int | None = None
    """Step to start from; the newest if left out."""
    load_optim: bool = False
    """Load the optimizers as well."""

    def __post_init__(self):
        for name in ("train_steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least 1: pass --{name} N")
        if self.lr <= 0 or not 0 <= self.ema_beta < 1:
            raise ValueError(f"got lr {self.lr}, ema_beta {self.ema_beta}: wanted lr > 0 and ema_beta in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging and saving."""

    log_dir: str | None = None
    """Folder of the run, below --logs_root; its default names what is trained and the data set."""
    logs_root: str = str(ROOT / "logs")
    """Folder of all runs."""
    steps_per_log: int = 10
    """Steps between logged lines (averages over those steps)."""
    steps_per_checkpoint: int = 25_000
    """Steps between checkpoints; the last step always saves one."""
    steps_per_save_output: int = 5_000
    """Steps between pictures."""
    steps_per_eval: int = 5_000
    """Steps between validations; 0 for none."""

    def __post_init__(self):
        for name in ("steps_per_log", "steps_per_checkpoint", "steps_per_save_output"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least 1: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """What every learned sampler's own Config builds on."""

    sampler: str = "absorbing"
    """The learned model of images: a file of train/samplers."""


@dataclass(frozen=True, kw_only=True)
class FirstStageConfig:
    """First stage: the trained VQGAN, where there is one."""

    ae_load_dir: str | None = None
    """Folder of its run. Left out: vqgan_<dataset> for samplers of codes; others work on pixels."""
    ae_load_step: int | None = None
    """Its step; the newest if left out."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What every learned sampler's own Sampling builds on."""

    solver: str = "ancestral"
    """The routine that draws from the sampler."""
    sample_steps: int | None = None
    """Steps per image; the solver's own choice if left out."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is the plain conditional model."""

    def __post_init__(self):
        if self.sample_steps is not None and self.sample_steps < 1:
            raise ValueError(f"got {self.sample_steps} sampling steps, wanted at least 1: pass --sample_steps N")


@dataclass(frozen=True, kw_only=True)
class SamplerTrainingConfig(TrainingConfig):
    """Training."""

    batch_size: int = 20
    """Images per step over all processes and accumulated parts together."""
    train_steps: int = 2_000_000
    """Steps in all, those before a resume included."""
    warmup_iters: int = 10_000
    """Steps over which the learning rate rises from 0."""
    watch: tuple[str, ...] = ()
    """Dotted paths of functions (state, outputs), called at each step with {loss, x_t, t, prediction, x0_hat, x0}."""


@dataclass(frozen=True, kw_only=True)
class SecondStageConfig:
    """All that a run of a sampler is made of."""

    sampler: SamplerConfig
    first: FirstStageConfig
    data: DataConfig
    reader: DatasetConfig
    training: SamplerTrainingConfig
    sampling: SamplingConfig
    logging: LoggingConfig
