"""The settings of train_vqgan.py. Free of torch, so that `--help` answers at once."""

from dataclasses import dataclass

from train.config import DataConfig, LoggingConfig, TrainingConfig
from train.datasets import DatasetConfig
from vq.config import VQGANConfig, VQGANLossConfig


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
