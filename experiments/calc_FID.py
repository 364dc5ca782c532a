"""Frechet distance of a trained sampler's images to the real ones, with what makes the number readable."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.experiment import ModelConfig, OutputConfig, settings_of_run  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import SamplingConfig  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class DistanceConfig:
    """Distance."""

    n_samples: int = 10_000
    """Number of generated images; the field's FID takes 50,000."""
    samples: str | None = None
    """Measure the images of this samples.npz instead of new ones."""
    features: str = "auto"
    """A file of experiments/metrics/features, or auto: the data set's own, inception, or pixels with a warning."""
    inception_weights: str | None = None
    """Path of torch-fidelity's Inception weights; left out, its cache or download."""
    split: Literal["train", "val"] = "train"
    """Real images that are the reference."""
    ref_stats: str | None = None
    """Reference statistics (.npz with mu and sigma) instead of a split's."""

    def __post_init__(self):
        if self.n_samples < 2:
            raise ValueError(f"got n_samples {self.n_samples}, wanted at least 2: pass --n_samples N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures generated images; results.json, samples.png and reconstructions.png lie in <logs_root>/<log_dir>."""

    distance: DistanceConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    from experiments.experiment import load_model, open_results
    from experiments.metrics.report import measure, print_report, saved_report
    from experiments.processes import experiment_world

    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        folder = open_results("FID", config, trained)
        results = saved_report(folder) or measure(config, trained, folder)
        if results is not None:
            print_report(results, folder)


if __name__ == "__main__":
    run_script(main, Config, "calc_FID", under=settings_of_run)
