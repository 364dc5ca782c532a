"""Stage 1: images -> VQGAN. `python train_vqgan.py --help`"""

import dataclasses
from dataclasses import dataclass
from functools import partial

from experiments.metrics.training_distance import reconstruction_distance
from train.cli.files import run_folder
from train.cli.parse import data_flag_names, run_script
from train.config import VQGANRunConfig
from train.data.loading import ImageSource, TrainingImages, build_splits, with_declared_range
from train.execution import uses_channels_last
from train.loggers import require_logger
from train.loop import Timer
from train.progress import print_next, sampler_command
from train.resumed_settings import read_resumed_settings
from train.runs import (
    open_or_resume,
    perceptual_provenance,
    read_continued_network,
    read_provenance,
    resumed_run,
    run_context,
)
from train.spaces import PixelSpace
from train.start import DurationEstimate, print_start
from train.trainer import make_hooks, train
from train.vqgan import VQGANReports, VQGANStep, build_state, choose_memory_format
from vq.perceptual import load_perceptual, net_for_channels


@dataclass(frozen=True, kw_only=True)
class Config(VQGANRunConfig):
    """Trains a VQGAN. The run is saved in <logs_root>/<log_dir>, by default logs/vqgan_<dataset>."""

    EXAMPLES = (
        "python train_vqgan.py --dataset mnist",
        "python train_vqgan.py --dataset folder --data_dir ~/photos --img_size 64 --train_steps 20000",
    )


def main(config: Config) -> None:
    training, logging = config.training, config.logging
    run = run_folder(logging.logs_root, logging.log_dir or f"vqgan_{config.data.dataset}")
    require_logger(logging.logger)
    with run_context(run, training) as world:
        resumed = resumed_run(run, training.resume)
        origin = None if resumed is None else read_provenance(resumed)
        training = choose_memory_format(training, world, config.network.nf, origin)
        splits = build_splits(config.data, config.reader, world)
        data = with_declared_range(config.data, splits["train"])
        margins = {"train": data.crop_margin, "val": 0}
        images, validation = (ImageSource(splits[split], data, margin=margins[split]) for split in splits)
        net, weights = config.loss.perceptual_net, config.loss.perceptual_weights
        net = net_for_channels(net if config.loss.perceptual_weight else "none", data.n_channels)
        name, perceptual = load_perceptual(net, weights)
        weights = None if perceptual is None else weights
        loss = dataclasses.replace(config.loss, perceptual_net=name, perceptual_weights=weights)
        continued = read_continued_network(run, training, logging.logs_root, config.network.quantizer)
        network = config.network.for_run(training.train_steps, continued)
        config = dataclasses.replace(config, network=network, loss=loss, data=data)
        state = build_state(network, config.loss, data, training, world)
        hooks, make_distance_hook = make_hooks(training.hooks, state), None
        if logging.steps_per_FD:
            make_distance_hook = reconstruction_distance(
                run, images.dataset, validation, config.reader, training, logging, world
            )
        source = TrainingImages(images, training.seed, balance=training.balance_classes)
        provenance = perceptual_provenance(weights) | {"channels_last": uses_channels_last(training, world.device)}
        open_or_resume(run, config, state, world, provenance, splits["train"])
        step = VQGANStep(config.loss, training, world, perceptual, keep_outputs=bool(hooks))
        make_reports = partial(VQGANReports, step, validation, training.batch_size, len(images))
        height, width = network.grid(*data.size)
        name = f"VQGAN of {PixelSpace(data).description} as {height}x{width} codes of {network.codebook_size:,}"
        print_start(state, training, world, name, len(images), splits["train"].class_names)
        later = state.step < loss.disc_start_step < training.train_steps
        note = f"; the discriminator adds to this from step {loss.disc_start_step:,} on" if later else ""
        timer = Timer()
        estimate = DurationEstimate(training, data, config.reader, world, timer, "vqgan", note)
        hooks.append(("logging", 1, estimate))
        options = {
            "hooks": hooks,
            "make_distance_hook": make_distance_hook,
            "workers": data.num_workers,
            "prefetch": data.prefetch,
            "timer": timer,
        }
        train(run, training, logging, state, world, source, step, make_reports, **options)
        if world.is_main:
            print_next([sampler_command(run, data.dataset, logging.logs_root, data_flag_names())])


if __name__ == "__main__":
    run_script(main, Config, "vqgan", read_run_settings=read_resumed_settings)
