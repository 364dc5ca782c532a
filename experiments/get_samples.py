"""Images from a trained sampler: samples.npz as the field's evaluators read it, a PNG grid, PNG files on wish."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.experiment import ModelConfig, OutputConfig, settings_of_run  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import SamplingConfig  # noqa: E402


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
    from contextlib import nullcontext

    from experiments.classes import images_of_class
    from experiments.experiment import load_model, open_results, write_results
    from experiments.images import SampleWriter, save_grid
    from experiments.kept import forget, kept_batches
    from experiments.metrics.report import saved_report
    from experiments.process import STRIPS, save_process
    from experiments.processes import experiment_world
    from experiments.progress import progress

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


if __name__ == "__main__":
    run_script(main, Config, "get_samples", under=settings_of_run)
