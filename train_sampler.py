"""Stage 2: codes -> a learned sampler of images. `python train_sampler.py --sampler absorbing --help`"""

import sys
from dataclasses import dataclass

from train.cli import first_stage_data, peek, run_script
from train.config import (
    DataConfig,
    FirstStageConfig,
    LoggingConfig,
    SamplerConfig,
    SamplingConfig,
    TrainingConfig,
)
from train.datasets import DatasetConfig


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
class Config:
    """Trains a sampler on a VQGAN's codes. Results lie in <logs_root>/<log_dir>: logs/<sampler>_<dataset>."""

    sampler: SamplerConfig
    first: FirstStageConfig
    data: DataConfig
    reader: DatasetConfig
    training: SamplerTrainingConfig
    sampling: SamplingConfig
    logging: LoggingConfig


def main(config: Config) -> None:
    from functools import partial

    from train.data import build_dataset
    from train.distributed import world
    from train.generate import class_frequencies, load_first_stage
    from train.runs import begin, run_folder, train
    from train.second_stage import SamplerReports, SamplerStep, build_state, code_source

    data, training, logging = config.data, config.training, config.logging
    run = run_folder(logging.logs_root, logging.log_dir or f"{config.sampler.sampler}_{data.dataset}")
    first_run = run_folder(logging.logs_root, config.first.ae_load_dir or f"vqgan_{data.dataset}")
    with world(training.device) as here:
        first = load_first_stage(first_run, config.first.ae_load_step, here.device, training.amp)
        first.check_fits(data)
        images = {split: build_dataset(data, config.reader, split) for split in ("train", "val")}
        frequencies = class_frequencies(images["train"])
        sampler, state = build_state(config.sampler, training, first, len(frequencies), here)
        begin(run, config, state, here, first.origin | {"class_frequencies": frequencies})
        codes = {split: code_source(first, images[split], split, data, training.seed, here) for split in images}
        step = SamplerStep(sampler, training, here)
        reports = partial(SamplerReports, step, first, codes["val"], config.sampling)
        train(run, config, state, here, codes["train"], step, reports)


if __name__ == "__main__":
    run_script(main, Config, section=peek(sys.argv, "sampler") or SamplerConfig.sampler, under=first_stage_data)
