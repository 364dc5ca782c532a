"""The settings that comparisons of short training runs share."""

from dataclasses import dataclass

from train.config import LoggingConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class BriefTrainingConfig(TrainingConfig):
    """Training."""

    train_steps: int = 1000
    """Steps of each run."""
    batch_size: int = 32
    """Images per step."""
    lr: float = 1e-3
    """Learning rate."""
    warmup_iters: int = 100
    """Steps over which the learning rate rises from 0."""
    ema_beta: float = 0.99
    """Decay of the averaged weights, which are the ones measured."""


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Results."""

    log_dir: str | None = None
    """Folder of the results, below --logs_root; its default names the experiment and what is compared on."""
    logs_root: str = LoggingConfig.logs_root
    """Folder of all runs."""
