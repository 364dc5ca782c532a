"""Frechet and kernel distance (FID, KID) of a sampler's images to the real ones, with what makes them readable."""

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
    """Reference statistics (.npz with mu and sigma) instead of a split's; KID needs features (n x D) in it, too."""
    kid_subsets: int = 100
    """KID: pairs of random subsets whose mean and deviation it gives."""
    kid_subset_size: int = 1000
    """KID: images of each, or as many as there are."""

    def __post_init__(self):
        for name, low in (("n_samples", 2), ("kid_subsets", 1), ("kid_subset_size", 2)):
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"got {name} {value}, wanted at least {low}: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures generated images; results.json, samples.png and reconstructions.png lie in <logs_root>/<log_dir>."""

    distance: DistanceConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    from experiments.experiment import load_model, open_results
    from experiments.kept import forget
    from experiments.metrics.report import given_files, measure, print_report, saved_report
    from experiments.processes import experiment_world

    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        folder = open_results("FID", config, trained)
        results = saved_report(folder, world)
        given = given_files(config.distance)  # whose content may be another by now
        if results is None or not given.items() <= results["run"].get("files", {}).items():
            results = measure(config, trained, folder)
        if world.is_main:
            print_report(results, folder)
            forget(folder)


if __name__ == "__main__":
    run_script(main, Config, "calc_FID", under=settings_of_run)
