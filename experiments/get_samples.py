"""Images from a trained sampler: samples.npz as the field's evaluators read it, a PNG grid, PNG files on wish."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import _root
import torch

from experiments.harness.batches import experiment_world, forget, kept_batches
from experiments.harness.experiment import (
    ModelConfig,
    OutputConfig,
    load_model,
    open_results,
    saved_report,
    settings_of_run,
    write_results,
)
from experiments.harness.images import STRIPS, SampleWriter, save_grid, save_process
from experiments.harness.report import progress
from train.cli.parse import run_script
from train.config import SamplingConfig
from train.inference import TrainedSampler
from train.loop import Batch


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Samples."""

    n_samples: int = 100
    """Number of images."""
    label: int | None = None
    """The class of all of them; left out, classes as frequent as in the training data."""
    save_individually: bool = False
    """Also write each image as images/<number>.png."""
    save_process: bool = False
    """Also draw process.png: what the first images and their predictions are on the way from noise."""

    def __post_init__(self):
        if self.n_samples < 1:
            raise ValueError(f"got n_samples {self.n_samples}, wanted at least 1: pass --n_samples N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Samples a trained model into <logs_root>/<log_dir>/samples.npz (arr_0: uint8 N x H x W x 3) and samples.png."""

    samples: SamplesConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    samples, output = config.samples, config.output
    count = samples.n_samples
    with experiment_world(output.device) as world:
        trained = load_model(config.model, output, world)
        draw = images_of_class(trained, samples.label, output.seed, config.sampling)
        folder = open_results("samples", config, trained)
        if saved_report(folder, world) is None:
            made = kept_batches(folder, "samples", list(range(count)), output.batch_size, draw, world)
            writer = SampleWriter(folder, count, png_files=samples.save_individually)
            with writer if world.is_main else nullcontext():
                for batch in progress(made, count, "sampling", world.is_main):
                    writer.add(batch)
            if world.is_main:
                if samples.save_process:
                    save_process(folder / "process.png", trained, list(range(min(count, STRIPS))), draw)
                save_grid(folder / "samples.png", writer.first)
                write_results(folder, {"n_samples": count, "seed": output.seed, "label": samples.label})
                forget(folder)
        print(f"{count} images: {folder / 'samples.npz'}\ngrid: {folder / 'samples.png'}")


def images_of_class(
    trained: TrainedSampler, label: int | None, seed: int, options: SamplingConfig
) -> Callable[..., Batch]:
    """A function from indices to images, as `TrainedSampler.draw` makes them, all of one class where one is named.

    Conditions beside the class are those that are drawn without it. All processes must ask. ValueError: there is no
    such class.
    """
    classes = trained.sampler.n_classes
    if label is not None and not 0 <= label < classes:
        wanted = f"a class from 0 to {classes - 1}: pass --label N" if classes else "a model of classes: leave it out"
        raise ValueError(f"got --label {label} for {trained.run}, wanted {wanted}")
    held_out = trained.held_out()

    def draw(indices: list[int], **how) -> Batch:
        if label is None:
            return trained.draw(indices, seed, options, held_out=held_out, **how)
        given = trained.conditions(seed, indices, held_out) | {"label": torch.full((len(indices),), label)}
        return trained.draw(indices, seed, options, given=given, **how)

    return draw


if __name__ == "__main__":
    run_script(main, Config, "get_samples", under=settings_of_run)
