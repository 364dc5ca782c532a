"""Stage 2: codes, latents or pixels -> a learned sampler of images. `python train_sampler.py --sampler ddpm --help`"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.metrics.training_distance import sample_distance
from train.class_names import check_class_order, recorded_class_names
from train.cli.files import run_folder
from train.cli.parse import Source, run_script
from train.config import FineTuningConfig, SecondStageConfig
from train.data.hints import HintsConfig
from train.data.loading import BatchSource, build_splits, with_declared_range
from train.data.shuffle import check_balance
from train.datasets import Dataset
from train.finetuning import (
    Base,
    find_base,
    hint_makers,
    saves_text_encoder,
    start_provenance,
    with_hint_settings,
    write_additions,
    write_merged_run,
)
from train.loggers import require_logger
from train.loop import Timer, TrainState
from train.progress import experiment_commands, print_next
from train.resumed_settings import read_base_settings, read_resumed_settings
from train.runs import open_or_resume, resumed_provenance, resumed_run, run_context
from train.sampler import SamplerReports, SamplerStep, WithNoise, build_state, check_sampling
from train.samplers._condition_sources import with_condition_fields
from train.samplers._conditions import options_of_conditions, with_declared_values, with_hint_channels
from train.space_opening import open_space
from train.start import DurationEstimate, check_warmup, print_start
from train.text_encoder_file import open_text_cache, text_location, text_provenance
from train.trained_sampler import TrainedSampler, class_frequencies
from train.trainer import make_hooks, train


@dataclass(frozen=True, kw_only=True)
class Config(SecondStageConfig):
    """Trains an image sampler. The run is saved in <logs_root>/<log_dir>, by default logs/<sampler>_<dataset>, or
    logs/<sampler>_<dataset>_tuned if that is the run of --load_dir."""

    EXAMPLES = (
        "python train_sampler.py --sampler {sampler} --dataset mnist",
        "python train_sampler.py --sampler {sampler} --dataset folder --data_dir ~/photos --img_size 64",
    )
    NOT_EVERYDAY = ("fine_tuning", "sampling")

    fine_tuning: FineTuningConfig
    hints: HintsConfig

    @property
    def run(self) -> Path:
        root, name = self.logging.logs_root, f"{self.sampler.sampler}_{self.data.dataset}"
        if self.logging.log_dir is not None:
            return run_folder(root, self.logging.log_dir)
        source, folder = self.training.load_dir, run_folder(root, name)
        return run_folder(root, f"{name}_tuned") if source and run_folder(root, source) == folder else folder

    def check(self, sources: Mapping[str, Source]) -> None:
        check_warmup(self.run, self.training, sources["warmup_iters"])


def main(config: Config) -> None:
    training, logging, run = config.training, config.logging, config.run
    require_logger(logging.logger)
    sampler_config = with_hint_channels(config.sampler, config.hints.condition_image, config.data.n_channels)
    config = replace(config, sampler=sampler_config)
    with run_context(run, training) as world:
        images = build_splits(config.data, config.reader, world)
        config = with_declared_settings(config, images)
        data, hints, resumed = config.data, config.hints, resumed_provenance(run, training.resume)
        space = open_space(config, resumed, images["train"], world)
        frequencies, recorded = class_frequencies(images["train"]), recorded_class_names(resumed, run)
        names = images["train"].class_names or recorded
        check_class_order(names, recorded, resumed_run(run, training.resume) or run)
        check_balance(training.balance_classes, images["train"].labels)
        is_new = resumed_run(run, training.resume) is None
        tuning = with_hint_settings(config.fine_tuning, hints, data.n_channels, space.factor, is_new)
        config = replace(config, fine_tuning=tuning)
        base = find_base(run, training, tuning, logging.logs_root, hints)
        save_text = saves_text_encoder(run, training, tuning)
        built = tuning if is_new else replace(tuning, load_control=None)  # the checkpoint has the branch
        network = config.sampler, training, space, len(frequencies), world, built, base, save_text
        sampler, state = build_state(*network)
        hooks, make_distance_hook = make_hooks(training.hooks, state), None
        shares = torch.tensor(frequencies, dtype=torch.float64) if sampler.n_classes else None
        opened = run, 0, sampler, space, data, config.reader, shares, "", world, training.amp, names
        model = TrainedSampler(*opened, hint_makers=hint_makers(tuning, hints), hints=hints)
        if logging.steps_per_FD:
            make_distance_hook = sample_distance(model, images["train"], training, config.sampling, logging)
        rows = model.with_hints(model.read_rows(config.sampling.condition_file), config.sampling)
        rows = model.with_metadata(rows, config.sampling)
        check_sampling(model, state, config.sampling, rows, images["val"])
        provenance = space.provenance | {"class_frequencies": frequencies, "class_names": list(names)}
        provenance |= weights_provenance(config, state, base, save_text) | start_provenance(tuning, resumed, is_new)
        open_or_resume(run, config, state, world, provenance, images["train"])
        sources = open_sources(config, model, images)
        step = SamplerStep(sampler, space, training, world, keep_outputs=bool(hooks))
        make_reports = partial(SamplerReports, step, sources["val"], config.sampling, rows, names)
        workers = space.workers(data) if model.adapt is None else data.num_workers  # items are read
        loading = {"workers": workers, "prefetch": data.prefetch, "tokens": space.tokens}
        if loading["workers"] and sampler.noise_shape is not None:
            sources["train"] = WithNoise(sources["train"], training.seed, sampler.noise_shape)
        model_name = f"{config.sampler.sampler} on {space.description}"
        print_start(state, training, world, model_name, len(sources["train"]), names)
        timer = Timer()
        estimate = DurationEstimate(training, data, config.reader, world, timer, config.sampler.sampler)
        hooks.append(("logging", 1, estimate))
        save = partial(write_additions, run, config=tuning, base=base, world=world, hints=hints)
        if tuning.lora_rank or tuning.text_new_tokens or tuning.control:
            hooks.append(("checkpoints", logging.steps_per_checkpoint, lambda state, _: save(state)))
        keywords = {"hooks": hooks, "make_distance_hook": make_distance_hook, "timer": timer} | loading
        train(run, training, logging, state, world, sources["train"], step, make_reports, **keywords)
        save(state)
        if world.is_main and tuning.save == "merged":
            print(f"merged: {write_merged_run(run, state)}", flush=True)
        if world.is_main:
            name = config.sampler.sampler
            print_next(experiment_commands(run, name, data.dataset, logging.logs_root, training.ema))


def with_declared_settings(config: Config, images: Mapping[str, Dataset]) -> Config:
    """Returns the settings with what the images of both splits declare of themselves: their range, and the values of
    their conditions."""
    data = with_declared_range(config.data, images["train"])
    return replace(config, data=data, sampler=with_declared_values(config.sampler, *images.values()))


def weights_provenance(config: Config, state: TrainState, base: Base | None, save_text: bool) -> dict[str, Any]:
    """Returns what config.yaml records of weights that the run does not learn: the base and what of it fitted, and the
    text encoder, with its place unless checkpoints have it too."""
    options, root = options_of_conditions(config.sampler), config.logging.logs_root
    provenance = text_provenance(options) | ({"base": base.record(config.run, root)} if base else {})
    provenance |= {"load_report": state.load_report} if state.load_report else {}
    return provenance | ({} if save_text else text_location(options, config.run, root))


def open_sources(config: Config, model: TrainedSampler, images: Mapping[str, Dataset]) -> dict[str, BatchSource]:
    """Returns the batches of both splits, with their conditions as the network reads them."""
    training, network = config.training, model.sampler.network
    draws = {"train": (training.seed, training.balance_classes), "val": (0, 0.0)}  # all validate on the same images
    sources = {
        split: model.space.source(images[split], split, config.data, seed, model.world, model.adapt, balance)
        for split, (seed, balance) in draws.items()
    }
    cache = open_text_cache(options_of_conditions(config.sampler), config.logging.logs_root, network)
    seeds = {"train": training.seed, "val": None}
    return {split: with_condition_fields(sources[split], network, seed, cache) for split, seed in seeds.items()}


if __name__ == "__main__":
    run_script(
        main,
        Config,
        base_values=partial(read_base_settings, Config),
        read_run_settings=read_resumed_settings,
        check=Config.check,
    )
