"""The training images nearest to a sampler's images: does it copy? A picture and distances."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.experiment import ModelConfig, OutputConfig, settings_of_run  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import SamplingConfig  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class NeighboursConfig:
    """Nearest neighbours."""

    n_samples: int = 100
    """Number of generated images; as many held-out real ones are what they are compared with."""
    samples: str | None = None
    """Take the images of this samples.npz instead of new ones."""
    neighbours: int = 10
    """Nearest training images told of each."""
    candidates: int = 100
    """Nearest training images by features, in the views it was trained on, that are then ranked anew."""
    features: str = "auto"
    """A file of experiments/metrics/features, or auto: the data set's own, inception, or pixels with a warning."""
    inception_weights: str | None = None
    """Path of torch-fidelity's Inception weights; left out, its cache or download."""
    rerank: Literal["auto", "lpips", "pixels"] = "auto"
    """Distance that ranks candidates: LPIPS (of images below 64 pixels, bilinearly enlarged by a whole number), or the
    Euclidean one of pixels in [0, 1]. auto: LPIPS, or pixels with one sentence where its weights are not to be had."""
    perceptual_net: Literal["alex", "vgg", "squeeze"] = "alex"
    """Network of LPIPS."""
    perceptual_weights: str | None = None
    """File of its ImageNet weights (torchvision's state dict); left out, torch's cache or download."""
    rows: int = 4
    """Rows of the picture for each kind: the samples nearest to a training image, others, held-out images."""

    def __post_init__(self):
        lowest = {"n_samples": 1, "neighbours": 1, "candidates": self.neighbours, "rows": 1}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"got {name} {value}, wanted at least {low}: pass --{name} N")
        if self.rerank == "pixels" and self.perceptual_weights is not None:
            raise ValueError("got --perceptual_weights with --rerank pixels, which needs none: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Finds nearest training images; results.json and neighbours.png lie in <logs_root>/<log_dir>."""

    neighbours: NeighboursConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    from experiments.experiment import load_model, open_results
    from experiments.kept import forget
    from experiments.metrics.neighbours_report import files_of, measure, print_report
    from experiments.metrics.report import saved_report
    from experiments.processes import experiment_world

    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        folder = open_results("neighbours", config, trained)
        results = saved_report(folder, world)
        given = files_of(config)  # whose content may be another by now
        if results is None or not given.items() <= results["run"].get("files", {}).items():
            results = measure(config, trained, folder)
        if world.is_main:
            print_report(results, folder)
            forget(folder)


if __name__ == "__main__":
    run_script(main, Config, "calc_nearest_neighbours", under=settings_of_run)
