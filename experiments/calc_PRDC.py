"""Precision, recall, density and coverage of a sampler's images, beside those of held-out real ones."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.experiment import ModelConfig, OutputConfig, settings_of_run  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import SamplingConfig  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class PRDCConfig:
    """Precision, recall, density, coverage."""

    n_samples: int = 10_000
    """Number of generated images, and of real ones; as many as the split has, where that is fewer."""
    nearest_k: int = 5
    """A feature's ball reaches to its so manieth neighbour; papers take 3 or 5."""
    samples: str | None = None
    """Measure the images of this samples.npz instead of new ones."""
    features: str = "auto"
    """A file of experiments/metrics/features, or auto: the data set's own, inception, or pixels with a warning."""
    inception_weights: str | None = None
    """Path of torch-fidelity's Inception weights; left out, its cache or download."""
    split: Literal["train", "val"] = "train"
    """Real images they are measured against: of a larger split a random part, always the same."""

    def __post_init__(self):
        for name, low in (("n_samples", 2), ("nearest_k", 1)):
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"got {name} {value}, wanted at least {low}: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures generated images; results.json and samples.png lie in <logs_root>/<log_dir>."""

    prdc: PRDCConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    from experiments.experiment import load_model, open_results
    from experiments.kept import forget
    from experiments.metrics.prdc_report import files_of, measure, print_report
    from experiments.metrics.report import saved_report
    from experiments.processes import experiment_world

    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        folder = open_results("PRDC", config, trained)
        results = saved_report(folder, world)
        given = files_of(config)  # whose content may be another by now
        if results is None or not given.items() <= results["run"].get("files", {}).items():
            results = measure(config, trained, folder)
        if world.is_main:
            print_report(results, folder)
            forget(folder)


if __name__ == "__main__":
    run_script(main, Config, "calc_PRDC", under=settings_of_run)
