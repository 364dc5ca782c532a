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
    from train import checkpoint
    from train.data import build_dataset, training_batches
    from train.distributed import world
    from train.generate import class_frequencies, load_first_stage
    from train.logging import Logger
    from train.loop import fit
    from train.runs import begin, run_folder
    from train.second_stage import SamplerReports, SamplerStep, build_state, code_source

    data, training, logging = config.data, config.training, config.logging
    run = run_folder(logging.logs_root, logging.log_dir or f"{config.sampler.sampler}_{data.dataset}")
    first_run = run_folder(logging.logs_root, config.first.ae_load_dir or f"vqgan_{data.dataset}")
    with world(training.device) as here:
        first = load_first_stage(first_run, config.first.ae_load_step, here.device, training.amp)
        first.check_fits(data)
        datasets = {split: build_dataset(data, config.reader, split) for split in ("train", "val")}
        frequencies = class_frequencies(datasets["train"])
        sampler, state = build_state(config.sampler, training, first, len(frequencies), here)
        begin(run, config, state, here, first.origin | {"class_frequencies": frequencies})
        sources = {
            split: code_source(first, dataset, split, data, training.seed, here) for split, dataset in datasets.items()
        }
        batches = training_batches(
            sources["train"],
            start=state.step,
            steps=training.train_steps,
            batch_size=training.batch_size,
            accumulate=training.accumulate,
            world=here,
            workers=0,
        )
        logger = Logger(
            run,
            here,
            every=logging.steps_per_log,
            start=state.step,
            steps=training.train_steps,
            batch_size=training.batch_size,
        )
        step = SamplerStep(sampler, training, here)
        reports = SamplerReports(step, first, sources["val"], logger, config.sampling, frequencies)
        hooks = [
            (1, logger),
            (logging.steps_per_eval, reports.validate),
            (logging.steps_per_save_output, reports.show),
            (logging.steps_per_checkpoint, checkpoint.saver(run, here)),
        ]
        fit(state, batches, step, steps=training.train_steps, world=here, seed=training.seed, hooks=hooks)
        logger.close()


if __name__ == "__main__":
    run_script(main, Config, section=peek(sys.argv, "sampler") or SamplerConfig.sampler, under=first_stage_data)
