"""Stage 2: codes, latents or pixels -> a learned sampler of images. `python train_sampler.py --sampler ddpm --help`"""

from dataclasses import dataclass

from train.cli import first_stage_data, run_script
from train.config import SecondStageConfig


@dataclass(frozen=True, kw_only=True)
class Config(SecondStageConfig):
    """Trains a sampler of images. Results lie in <logs_root>/<log_dir>: logs/<sampler>_<dataset>."""


def main(config: Config) -> None:
    from functools import partial

    from train.data import build_dataset
    from train.distributed import world
    from train.generate import class_frequencies
    from train.registry import dotted
    from train.runs import begin, origin_of, run_folder, train
    from train.second_stage import SamplerReports, SamplerStep, build_state
    from train.spaces import open_space

    data, training, logging = config.data, config.training, config.logging
    run = run_folder(logging.logs_root, logging.log_dir or f"{config.sampler.sampler}_{data.dataset}")
    adapt = dotted(config.sampler.adapt, "--adapt") if getattr(config.sampler, "adapt", "") else None
    watchers = [dotted(path, "--watch") for path in training.watch]
    with world(training.device) as here:
        images = {split: build_dataset(data, config.reader, split) for split in ("train", "val")}
        space = open_space(config, origin_of(run), images["train"], here)
        frequencies = class_frequencies(images["train"])
        sampler, state = build_state(config.sampler, training, space, len(frequencies), here)
        begin(run, config, state, here, space.origin | {"class_frequencies": frequencies})
        sources = {split: space.source(images[split], split, data, training.seed, here, adapt) for split in images}
        step = SamplerStep(sampler, space, training, here, watchers)
        reports = partial(SamplerReports, step, sources["val"], config.sampling)
        train(run, config, state, here, sources["train"], step, reports, space.workers(data))


if __name__ == "__main__":
    run_script(main, Config, under=first_stage_data)
