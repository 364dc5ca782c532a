"""Settings of the training scripts, as typed dataclasses: each field is a flag."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from models.ranges import COUNT, COUNT_OR_ZERO, FINITE, MILLION, NOT_NEGATIVE, POSITIVE, SEED, SIZE, check_ranges
from train.control import ControlConfig
from train.datasets import DatasetConfig
from train.distance_config import DistanceLoggingConfig
from train.lr_schedule import learning_rate
from train.sampling_config import SamplingConfig
from vq.config import VQGANConfig, VQGANLossConfig

ROOT = Path(__file__).resolve().parents[1]
Changeable = Literal["lr", "warmup_iters", "grad_clip", "amp", "amp_dtype"]  # remedies for steps that are not finite
CHANGEABLE = get_args(Changeable)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: images and preprocessing."""

    dataset: str = "digits"
    """Name of the data set: a file in train/datasets, or a preset in configs/ that names its reader."""
    reader: str = ""
    """File in train/datasets that reads the data; by default the one named like the data set."""
    img_size: int = 256
    """Height of the images in pixels, and their width unless --img_width is given."""
    img_width: int | None = None
    """Width of the images in pixels, if they are not square; defaults to img_size."""
    n_channels: int = 3
    """Channels: 1 for greyscale, 3 for colour; any number of .npy files and of .tif files with a page per channel."""
    data_range: tuple[float, float] | None = None
    """Values of 16-bit or float images that are mapped to -1 and 1; by default 16-bit images are reduced to 8 bits."""
    horizontal_flip: bool = False
    """Also train on horizontally mirrored images."""
    shift: int = 0
    """Also train on images shifted by up to this many pixels in each direction, padded with black (for digits)."""
    crop_margin: int = 0
    """Resize training images this many pixels larger and take crops at the centre and the four corners; 0: no crops."""
    patches: int = 1
    """Cut each image, and what belongs to it, into this many rows and columns: 2 makes four images of each."""
    captions: Literal["own", "templates"] = "own"
    """own: the captions of the data set, if it has any; templates: sentences made of the classes, others in validation
    than in training."""
    subset: int = 0
    """Use only so many images of each split, a fixed random choice, to try something; 0: all."""
    in_memory: bool = False
    """Keep resized images in memory; for data sets of up to a few GB."""
    cache_images: bool = False
    """Cache decoded, resized images in one file in logs/.cache: height * width * n_channels bytes per image, 4
    times that with --data_range."""
    num_workers: int = 0
    """Data-loading worker processes per training process."""
    prefetch: int = 2
    """Micro-batches that each worker loads in advance."""

    EVERYDAY = ("dataset", "img_size", "num_workers")
    RANGES = {
        **{"img_size": SIZE, "img_width": SIZE, "n_channels": SIZE, "data_range": FINITE, "shift": "[0, 65536]"},
        **{"crop_margin": "[0, 65536]", "patches": "[1, 64]", "num_workers": "[0, 1024]", "prefetch": "[1, 1024]"},
        "subset": COUNT_OR_ZERO,
    }

    def __post_init__(self):
        check_ranges(self)
        if self.data_range is not None and not self.data_range[0] < self.data_range[1]:
            raise ValueError(
                f"got data_range {self.data_range}, wanted the lower first: pass --data_range LOWEST HIGHEST"
            )
        if self.crop_margin == 1:
            raise ValueError("got crop_margin 1, whose centre is a corner: pass --crop_margin 2 or more, or 0")
        if self.crop_margin and self.shift:
            got = f"shift {self.shift} and crop_margin {self.crop_margin}"
            raise ValueError(f"got {got}: crops replace shifts, which pad with black; leave one of them out")

    @property
    def without_augmentation(self) -> "DataConfig":
        """The same images, neither mirrored, shifted nor cropped, as validation uses them."""
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
        """The sizes in the keys of caches: one side of a square, otherwise height and width."""
        height, width = self.size
        return (height,) if height == width else (height, width)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training."""

    train_steps: int = 1_000_000
    """Total number of training steps, including those before a resume."""
    batch_size: int = 4
    """Global batch size: images per step over all processes and micro-batches."""
    accumulate: int = 1
    """Number of micro-batches per step (gradient accumulation), to save memory."""
    lr: float = 1e-4
    """Learning rate."""
    warmup_iters: int = 0
    """Steps of linear learning-rate warm-up."""
    weight_decay: float = 0.0
    """Weight decay; decoupled (as in AdamW), except with adam and sgd."""
    grad_clip: float = 1.0
    """Maximum gradient norm; 0 turns clipping off."""
    optimizer: str = "adamw"
    """adamw, adam, radam, nadam, adafactor, sgd, adamw8bit (needs bitsandbytes), or a dotted path to your own class."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the optimizer's averages of the gradient and of its square (sgd: momentum, unused)."""
    lr_schedule: Literal["constant", "cosine", "decay_tail"] = "constant"
    """Learning rate after the warm-up: constant, cosine decay, or constant and then a linear decay (decay_tail)."""
    decay_steps: int = 0
    """Steps of the linear decay at the end (decay_tail)."""
    lr_end: float = 0.0
    """Final learning rate of cosine and decay_tail, as a fraction of --lr."""
    amp: bool = True
    """Mixed precision (autocast) in --amp_dtype; float32, with a message, if auto finds no native half precision."""
    amp_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 if the device supports it natively, otherwise float16 with loss scaling on CUDA."""
    max_bad_steps: int = 10
    """Steps with a non-finite loss or gradient are skipped; more than this many in 1,000 steps end the run."""
    ema: bool = True
    """Keep an exponential moving average of the weights."""
    ema_beta: float = 0.999
    """Decay of the EMA per step, reached after a warm-up."""
    ema_profiles: tuple[float, ...] = ()
    """Relative lengths of additional averages for post-hoc EMA (for example 0.05 0.1), for --ema_length afterwards."""
    steps_per_ema_snapshot: int = 5_000
    """Steps between snapshots of the averages of --ema_profiles."""
    seed: int = 0
    """Random seed."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if available, otherwise mps, otherwise cpu."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: ddp replicates the network; fsdp shards it, its averages and optimizer states."""
    timeout_minutes: float = 10.0
    """The run fails if another of its processes, also one that loads data, does not respond for this many minutes."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    channels_last: Literal["auto", "yes", "no"] = "auto"
    """Channels-last memory format for convolutions; auto: yes where it is faster, in half precision on CUDA
    and, for a VQGAN with an --nf of 64 or more, on CPUs with AMX."""
    tf32: bool = True
    """Use TF32 for float32 matrix products on CUDA."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: slower, but needs much less memory."""
    deterministic: bool = False
    """Use deterministic algorithms only; an operation without one is an error."""
    hooks: tuple[str, ...] = ()
    """Dotted paths of your own classes or functions, called as hook(state, outputs) after each step."""
    resume: str = "auto"
    """auto: resume from the newest intact checkpoint; never: start from scratch; PATH: resume from this checkpoint."""
    change: tuple[Changeable, ...] = ()
    """Settings whose new values a resumed run takes, such as lr amp in --lr 1e-5 --no_amp --change lr amp."""
    load_dir: str | None = None
    """Run whose weights to start from (fine-tuning). A sampler also has its network, process and first stage, and
    without --dataset its data; other settings, such as those of training, are typed."""
    load_step: int | None = None
    """Step of --load_dir; the newest by default."""
    load_optim: bool = False
    """Also load the optimizer states of --load_dir."""
    load_partial: bool = False
    """Load only the weights of --load_dir that fit, and report the others, instead of requiring all to match."""
    balance_classes: float = 0.0
    """Train on images of rare classes more often: 0: as often as in the data; 1: all classes equally often; 0.5: as
    often as the square root of their number of images."""
    train_only: tuple[str, ...] = ()
    """Train only these parts of the network (for example encoders up_blocks.0); experts are all layers with experts;
    all of it by default."""

    EVERYDAY = ("train_steps", "batch_size", "lr", "device")
    RANGES = {
        **{"train_steps": COUNT, "batch_size": MILLION, "accumulate": MILLION, "lr": POSITIVE},
        **{"warmup_iters": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "grad_clip": NOT_NEGATIVE, "betas": "[0, 1)"},
        **{"decay_steps": NOT_NEGATIVE, "lr_end": "[0, 1]", "max_bad_steps": NOT_NEGATIVE, "ema_beta": "[0, 1)"},
        **{"ema_profiles": "(0, 0.3003]", "steps_per_ema_snapshot": COUNT, "seed": SEED},
        **{"timeout_minutes": "(0, 30000]", "load_step": NOT_NEGATIVE, "balance_classes": "[0, 1]"},
    }

    def __post_init__(self):
        check_ranges(self)
        if self.load_partial and (self.load_dir is None or self.load_optim):
            reason = "needs --load_dir" if self.load_dir is None else "cannot load optimizers: leave --load_optim out"
            raise ValueError(f"got --load_partial, which {reason}")
        learning_rate(0, **self.schedule)

    @property
    def schedule(self) -> dict[str, Any]:
        """The arguments of `train.lr_schedule.learning_rate`, except the step."""
        rise = {"lr": self.lr, "steps": self.train_steps, "warmup": self.warmup_iters}
        return rise | {"schedule": self.lr_schedule, "decay_steps": self.decay_steps, "end": self.lr_end}


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(DistanceLoggingConfig):
    """Logging and checkpoints."""

    log_dir: str | None = None
    """Folder of the run, below --logs_root; by default named after the model and the data set. Alone, it resumes the
    run there with the run's own settings."""
    logs_root: str = str(ROOT / "logs")
    """Folder of all runs."""
    steps_per_log: int = 10
    """Steps between log lines, which average over these steps."""
    steps_per_checkpoint: int = 25_000
    """Steps between checkpoints; the last step is always saved."""
    checkpoint_minutes: float = 30.0
    """Maximum minutes between checkpoints; 0: no limit."""
    keep_last: int = 3
    """Number of newest checkpoints to keep; 0: all."""
    keep_every: int = 100_000
    """Also keep the checkpoints of every multiple of this many steps; 0: none."""
    steps_per_save_output: int = 5_000
    """Steps between images of samples or reconstructions."""
    steps_per_eval: int = 5_000
    """Steps between validations; 0: no validation."""
    logger: str = ""
    """Also send metrics and images to a service: wandb, or another file in train/loggers; by default none."""
    profile: bool = False
    """Profile five steps, from the 10th after the start or resume, with PyTorch's profiler; written to profile/."""

    EVERYDAY = ("log_dir",)
    RANGES = {
        **{"steps_per_log": COUNT, "steps_per_checkpoint": COUNT, "checkpoint_minutes": NOT_NEGATIVE},
        **{"keep_last": NOT_NEGATIVE, "keep_every": NOT_NEGATIVE, "steps_per_save_output": COUNT},
        "steps_per_eval": COUNT_OR_ZERO,
    }


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Base class of every learned sampler's Config."""

    sampler: str = "absorbing"
    """Learned sampler to train: a file in train/samplers."""
    adapt: ClassVar[str] = ""  # dotted path of a function that maps items to batch fields; a Config may make it a flag

    EVERYDAY = ("sampler",)

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class FirstStageConfig:
    """First stage: the trained VQGAN or other autoencoder, if any."""

    ae_load_dir: str | None = None
    """Run folder of the VQGAN or autoencoder. If omitted: vqgan_<dataset> for samplers of codes; other samplers work on
    pixels."""
    ae_load_step: int | None = None
    """Step of the VQGAN or autoencoder; the newest by default."""
    cache_latents: bool = False
    """Samplers of latents: encode all images once, in all training views, into a file in the autoencoder's folder."""
    latent_sampling: Literal["mode", "sample"] = "mode"
    """Autoencoders that encode an image to a distribution of latents: train on its mean, or on a sample each time."""

    EVERYDAY = ("ae_load_dir",)
    RANGES = {"ae_load_step": NOT_NEGATIVE}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class SamplerTrainingConfig(TrainingConfig):
    """Training."""

    batch_size: int = 20
    """Global batch size: images per step over all processes and micro-batches."""
    train_steps: int = 2_000_000
    """Total number of training steps, including those before a resume."""
    warmup_iters: int = 10_000
    """Steps of linear learning-rate warm-up."""


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig(ControlConfig):
    """Fine-tuning: what of the network of --load_dir learns beside --train_only, and what is saved."""

    lora_rank: int = 0
    """Rank of the LoRA adapters, which then learn instead of the network; 0: none."""
    lora_alpha: float | None = None
    """Adapters are scaled by this, divided by their rank; by default it is the rank."""
    lora_targets: tuple[str, ...] = ("attention",)
    """Layers with an adapter: groups such as attention and feed_forward, or names of layers."""
    lora_dropout: float = 0.0
    """Dropout of the inputs of adapters."""
    dora: bool = False
    """DoRA: adapters also learn the norm of each row of a weight."""
    lora_trigger_words: tuple[str, ...] = ()
    """Words of prompts that the adapters were trained with; noted in <log_dir>/lora.safetensors."""
    lora_rank_of: tuple[str, ...] = ()
    """Ranks of the adapters of parts, named as in --lora_targets, as in text=4 feed_forward=8; of a layer in several
    parts, the last one counts."""
    text_new_tokens: tuple[str, ...] = ()
    """Words to add to the vocabulary of a trained text encoder, which learn too: <toy>, <toy>=cat to start from a word
    that it knows, <toy>=cat*4 for four tokens; alone with --train_only new_tokens (textual inversion)."""
    differential: Literal["", "diff_v2", "diff_v1_split"] = ""
    """Replace softmax attention of the loaded network: diff_v2 begins as the same function; diff_v1_split is
    AdDiffusion's, another function from the first step on."""
    differential_in: Literal["self", "cross", "both"] = "self"
    """Attention that --differential replaces."""
    lr_scale: tuple[str, ...] = ()
    """Factors of the learning rate of parts of the network, named as in --train_only, as in lora=2 text=0.75: lora are
    the adapters, new_tokens the new words, experts the experts, text the encoder of that condition."""
    save: Literal["learned", "full", "merged"] = "learned"
    """Checkpoints hold what learns; the frozen rest stays in the run of --load_dir or the file of --text_encoder. full:
    they hold all; merged: also write <log_dir>_merged at the end, a run with the adapters merged into the weights."""

    EVERYDAY = ()
    RANGES = {"lora_rank": "[0, 65536]", "lora_alpha": POSITIVE, "lora_dropout": "[0, 1)"}

    def __post_init__(self):
        super().__post_init__()
        own = ("dora", "lora_dropout", "lora_trigger_words", "lora_rank_of")
        given = next((name for name in own if getattr(self, name)), None)
        given = given or ("lora_alpha" if self.lora_alpha is not None else None)
        if not self.lora_rank and given is not None:
            raise ValueError(f"got {given} without adapters: pass --lora_rank 4, or leave --{given} out")
        if self.lora_rank and not self.lora_targets:
            raise ValueError("got no lora_targets, wanted layers for adapters: pass --lora_targets attention")
        if self.save == "merged" and not self.lora_rank:
            raise ValueError("got save merged without adapters: pass --lora_rank 4, or --save full")

    @property
    def changes_network(self) -> bool:
        """Whether the network gets other layers after the base has been loaded."""
        return bool(self.lora_rank or self.differential or self.text_new_tokens or self.control)


@dataclass(frozen=True, kw_only=True)
class SecondStageConfig:
    """The full config of a sampler run."""

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
    """Learning rate (the reference uses 4.5e-6 per image in the batch)."""
    train_steps: int = 1_400_000
    """Total number of training steps, including those before a resume."""


@dataclass(frozen=True, kw_only=True)
class VQGANRunConfig:
    """The full config of a VQGAN run."""

    data: DataConfig
    reader: DatasetConfig
    network: VQGANConfig
    loss: VQGANLossConfig
    training: VQGANTrainingConfig
    logging: LoggingConfig
