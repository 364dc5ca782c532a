"""Stage 1: images -> VQGAN. `python train_vqgan.py --help`"""

import dataclasses
from dataclasses import dataclass

from train.cli import run_script
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
class Config:
    """Trains a VQGAN. Results lie in <logs_root>/<log_dir>: logs/vqgan_<dataset>."""

    data: DataConfig
    reader: DatasetConfig
    network: VQGANConfig
    loss: VQGANLossConfig
    training: VQGANTrainingConfig
    logging: LoggingConfig


def main(config: Config) -> None:
    from train import checkpoint
    from train.data import ImageSource, TrainingImages, build_dataset, training_batches
    from train.distributed import world
    from train.logging import Logger
    from train.loop import fit
    from train.runs import begin, run_folder
    from train.vqgan import VQGANReports, VQGANStep, build_state
    from vq.perceptual import load_perceptual

    data, training, logging = config.data, config.training, config.logging
    run = run_folder(logging.logs_root, logging.log_dir or f"vqgan_{data.dataset}")
    with world(training.device) as here:
        images = build_dataset(data, config.reader, "train")
        validation = ImageSource(build_dataset(data, config.reader, "val"), data)
        name, perceptual = load_perceptual(config.loss.perceptual_net if config.loss.perceptual_weight else "none")
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, perceptual_net=name))
        state = build_state(config.network, config.loss, data, training, here)
        begin(run, config, state, here, origin={})
        batches = training_batches(
            TrainingImages(ImageSource(images, data), training.seed),
            start=state.step,
            steps=training.train_steps,
            batch_size=training.batch_size,
            accumulate=training.accumulate,
            world=here,
            workers=data.num_workers,
        )
        logger = Logger(
            run,
            here,
            every=logging.steps_per_log,
            start=state.step,
            steps=training.train_steps,
            batch_size=training.batch_size,
        )
        step = VQGANStep(config.loss, training, here, perceptual)
        reports = VQGANReports(step, validation, logger, training.batch_size)
        hooks = [
            (1, logger),
            (logging.steps_per_eval, reports.validate),
            (logging.steps_per_save_output, reports.show),
            (logging.steps_per_checkpoint, checkpoint.saver(run, here)),
        ]
        fit(state, batches, step, steps=training.train_steps, world=here, seed=training.seed, hooks=hooks)
        logger.close()


if __name__ == "__main__":
    run_script(main, Config, "vqgan")
