"""The settings of the training scripts, as typed dataclasses: a field is a flag."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from diffusion.solvers import SolverOptions
from train.datasets import DatasetConfig
from train.lr_schedule import learning_rate
from vq.config import VQGANConfig, VQGANLossConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: which images, and how they are cut."""

    dataset: str = "digits"
    """Name of the data: a file of train/datasets, or a preset of configs/ that says which of them reads it."""
    reader: str = ""
    """File of train/datasets that reads the data; empty means the one named like the data set."""
    img_size: int = 256
    """Height of the images, and their width unless --img_width says another, pixels."""
    img_width: int | None = None
    """Width of the images, where they are not square; left out, img_size."""
    n_channels: Literal[1, 3] = 3
    """1 grey, 3 colour."""
    data_range: tuple[float, float] | None = None
    """Lowest and highest value of 16-bit or float images, which become -1 and 1; left out, 16 bits are scaled to 8."""
    horizontal_flip: bool = False
    """Also train on mirrored images."""
    shift: int = 0
    """Also train on images shifted by up to this many pixels each way, black coming in (for digits and the like)."""
    crop_margin: int = 0
    """Training images are resized so many pixels larger, and cut at the centre and the four corners; 0: not cut."""
    in_memory: bool = False
    """Keep resized images in memory: for data sets of a few GB at most."""
    cache_images: bool = False
    """Keep decoded, resized images in one file in logs/.cache: height * width * n_channels bytes each."""
    num_workers: int = 0
    """Processes that load images beside each training process."""
    prefetch: int = 2
    """Batches that each of them keeps ready."""

    def __post_init__(self):
        lowest = {"img_size": 1, "img_width": 1, "shift": 0, "crop_margin": 0, "num_workers": 0, "prefetch": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"got {name} {value}, wanted at least {low}: pass --{name} N")
        if self.data_range is not None and not self.data_range[0] < self.data_range[1]:
            raise ValueError(
                f"got data_range {self.data_range}, wanted the lower first: pass --data_range LOWEST HIGHEST"
            )
        if self.crop_margin == 1:
            raise ValueError("got crop_margin 1, whose centre is a corner: pass --crop_margin 2 or more, or 0")
        if self.crop_margin and self.shift:
            got = f"shift {self.shift} and crop_margin {self.crop_margin}"
            raise ValueError(f"got {got}: a crop has pixels where a shift lets black in; leave one of them out")

    @property
    def without_augmentation(self) -> "DataConfig":
        """The same images, neither mirrored, shifted nor cut: what is validated on."""
        return replace(self, horizontal_flip=False, shift=0, crop_margin=0)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.img_size, self.img_size if self.img_width is None else self.img_width

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.n_channels, *self.size

    @property
    def side_lengths(self) -> tuple[int, ...]:
        """What keys of caches name: the one side of a square, else height and width."""
        height, width = self.size
        return (height,) if height == width else (height, width)


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
    optimizer: str = "adamw"
    """adamw, adam, radam, nadam, adafactor, sgd, or a dotted path to your own class."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the optimizer's averages of the gradient and of its square (sgd: momentum, unused)."""
    lr_schedule: Literal["constant", "cosine", "decay_tail"] = "constant"
    """The learning rate after its warm-up: constant, a cosine to the last step, or constant with a linear tail."""
    decay_steps: int = 0
    """Length of decay_tail's tail, steps."""
    lr_end: float = 0.0
    """Where cosine and decay_tail end, as a share of the learning rate."""
    amp: bool = True
    """Half-precision autocast where the device computes it natively, else float32 and a message."""
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where it is native, else float16 with loss scaling on CUDA."""
    max_bad_steps: int = 10
    """Steps whose loss or gradient is not finite are skipped; more of them among 1,000 end the run."""
    ema: bool = True
    """Keep an exponential moving average of the weights."""
    ema_beta: float = 0.999
    """Its decay per step, reached after a warm-up."""
    ema_profiles: tuple[float, ...] = ()
    """Relative lengths of power-function averages to keep as well (0.05 0.1), for --ema_length afterwards."""
    steps_per_ema_snapshot: int = 5_000
    """Steps between their snapshots on disk."""
    seed: int = 0
    """Every random draw is a function of this, its purpose, the step and the sample."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes: each keeps the whole network (ddp), or a shard of it, its averages and optimizer (fsdp)."""
    timeout_minutes: float = 10.0
    """Several processes: a job ends with an error when one of them has not been heard of for so long."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    channels_last: Literal["auto", "yes", "no"] = "auto"
    """Memory format of images in convolutions; auto: yes on CUDA in half precision, where it is faster."""
    tf32: bool = True
    """TF32 matrix products on CUDA wherever float32 is used."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: slower, and needs far less memory."""
    deterministic: bool = False
    """Only operations that give the same bits each time on a GPU; an error where there is none."""
    hooks: tuple[str, ...] = ()
    """Dotted paths of your own classes or functions, called as hook(state, outputs) after each step: see the README."""
    resume: str = "auto"
    """auto: go on from the run's newest whole checkpoint; never: only begin anew; PATH: go on from that checkpoint."""
    load_dir: str | None = None
    """Start from the weights of this run."""
    load_step: int | None = None
    """Step to start from; the newest if left out."""
    load_optim: bool = False
    """Load the optimizers as well."""
    load_partial: bool = False
    """Take what fits of the weights of --load_dir; what does not is reported, not refused."""
    train_only: tuple[str, ...] = ()
    """Train only the parts of the network with these names (encoders up_blocks.0); left out, all of it."""

    def __post_init__(self):
        for name in ("train_steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least 1: pass --{name} N")
        for name in ("warmup_iters", "weight_decay", "grad_clip", "decay_steps", "max_bad_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted 0 or more: pass --{name} N")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"got betas {self.betas}, wanted both in [0, 1)")
        if self.lr <= 0 or not 0 <= self.ema_beta < 1:
            raise ValueError(f"got lr {self.lr}, ema_beta {self.ema_beta}: wanted lr > 0 and ema_beta in [0, 1)")
        if self.timeout_minutes <= 0 or self.steps_per_ema_snapshot < 1:
            got = f"timeout_minutes {self.timeout_minutes}, steps_per_ema_snapshot {self.steps_per_ema_snapshot}"
            raise ValueError(f"got {got}: wanted positive ones")
        if self.load_partial and (self.load_dir is None or self.load_optim):
            why = "needs --load_dir" if self.load_dir is None else "fits no optimizer's state: leave --load_optim out"
            raise ValueError(f"got --load_partial, which {why}")
        learning_rate(0, **self.schedule)

    @property
    def schedule(self) -> dict[str, Any]:
        """The arguments of `train.lr_schedule.learning_rate`, but for the step."""
        return {
            "lr": self.lr,
            "steps": self.train_steps,
            "warmup": self.warmup_iters,
            "schedule": self.lr_schedule,
            "decay_steps": self.decay_steps,
            "end": self.lr_end,
        }


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
    checkpoint_minutes: float = 30.0
    """And at least every so many minutes; 0: by steps alone."""
    keep_last: int = 3
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every: int = 100_000
    """Checkpoints of multiples of so many steps are kept as well; 0: none."""
    steps_per_save_output: int = 5_000
    """Steps between pictures."""
    steps_per_eval: int = 5_000
    """Steps between validations; 0 for none."""
    steps_per_FD: int = 0
    """Steps between distances of generated (stage one: reconstructed) to real images; 0 for none."""
    FD_samples: int = 1_000
    """Images of which they are taken."""
    FD_features: str = "auto"
    """Their features: a file of experiments/metrics/features, or auto."""
    profile: bool = False
    """Record steps 10 to 14 of this start with PyTorch's profiler, into profile/."""

    def __post_init__(self):
        for name in ("steps_per_log", "steps_per_checkpoint", "steps_per_save_output"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least 1: pass --{name} N")
        if self.FD_samples < 2:
            raise ValueError(f"got FD_samples {self.FD_samples}, wanted at least 2: pass --FD_samples N")
        for name in ("steps_per_eval", "checkpoint_minutes", "keep_last", "keep_every", "steps_per_FD"):
            if getattr(self, name) < 0:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted 0 or more: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """What every learned sampler's own Config builds on."""

    sampler: str = "absorbing"
    """The learned model of images: a file of train/samplers."""
    adapt: ClassVar[str] = ""  # dotted path of what turns an item into a batch's fields; a Config may make it a flag


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
    condition_file: str | None = None
    """Conditions of generated images, .json or .csv, a row each, in turn; left out, classes as frequent as in training
    and other conditions of held-out images."""

    def __post_init__(self):
        if self.sample_steps is not None and self.sample_steps < 1:
            raise ValueError(f"got {self.sample_steps} sampling steps, wanted at least 1: pass --sample_steps N")

    @classmethod
    def option_names(cls) -> list[str]:
        """The options of its process's solvers: fields of the SolverOptions that it builds on."""
        bases = [base for base in cls.__mro__ if issubclass(base, SolverOptions)]
        own = [base for base in bases if not issubclass(base, SamplingConfig)]
        return list(dict.fromkeys(field.name for base in own for field in fields(base)))

    @classmethod
    def solver_setting_names(cls) -> set[str]:
        """What goes with the solver that is named: with another one, it is left to that."""
        return {"sample_steps", *cls.option_names()}

    @property
    def solver_options(self) -> dict[str, Any]:
        """The options of solvers that are given."""
        values = {name: getattr(self, name) for name in self.option_names()}
        return {name: value for name, value in values.items() if value is not None}

    def with_solver(self, solver: str, sample_steps: int | None = None) -> Self:
        """The same settings for another solver, with what goes with a solver left to it."""
        own = {field.name: field.default for field in fields(self) if field.name in self.solver_setting_names()}
        return replace(self, **own | {"solver": solver, "sample_steps": sample_steps})


@dataclass(frozen=True, kw_only=True)
class SamplerTrainingConfig(TrainingConfig):
    """Training."""

    batch_size: int = 20
    """Images per step over all processes and accumulated parts together."""
    train_steps: int = 2_000_000
    """Steps in all, those before a resume included."""
    warmup_iters: int = 10_000
    """Steps over which the learning rate rises from 0."""


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


@dataclass(frozen=True, kw_only=True)
class VQGANTrainingConfig(TrainingConfig):
    """Training."""

    lr: float = 1.8e-5
    """Learning rate (the reference takes 4.5e-6 per image of the batch)."""
    train_steps: int = 1_400_000
    """Steps in all, those before a resume included."""


@dataclass(frozen=True, kw_only=True)
class VQGANRunConfig:
    """All that a run of a VQGAN is made of."""

    data: DataConfig
    reader: DatasetConfig
    network: VQGANConfig
    loss: VQGANLossConfig
    training: VQGANTrainingConfig
    logging: LoggingConfig
