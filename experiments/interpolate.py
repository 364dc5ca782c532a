"""Walks from one image to another: mixed, forgotten in part, and drawn again."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.editing_config import GivenConfig, check_strength  # noqa: E402
from experiments.experiment import ModelConfig, OutputConfig, settings_of_run  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import SamplingConfig  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class PairsConfig(GivenConfig):
    """Images to begin from, two for each walk."""

    n_images: int = 16
    """So many held-out images, drawn at random, always the same."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_images % 2 or len(self.image) % 2:
            got = f"{len(self.image)} images" if self.image else f"n_images {self.n_images}"
            raise ValueError(f"got {got}, wanted pairs: name two as --image A B, or pass an even --n_images")


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """The walk."""

    points: int = 7
    """Images on it, both ends included."""
    strength: float = 0.5
    """How much of a mixture is forgotten before it is drawn, 0 to 1: the share of its codes, or of noise put on it."""
    label: int | None = None
    """The class the model is told; left out it is told none, and guidance is 1."""

    def __post_init__(self):
        check_strength(self.strength)
        if self.points < 2:
            raise ValueError(f"got points {self.points}, wanted at least 2, the ends: pass --points N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Interpolates between images; interpolated.png (first | the walk | second), images/ and results.json lie in
    <logs_root>/<log_dir>."""

    given: PairsConfig
    path: PathConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    from experiments.editing import check_label
    from experiments.experiment import load_model, open_results
    from experiments.given_images import given_images
    from experiments.metrics.report import saved_report
    from experiments.processes import experiment_world
    from experiments.redrawing import interpolate, path_in_words

    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        check_label(trained, config.path.label, config.sampling)
        given = given_images(config.given.image, config.given.n_images, trained)
        folder = open_results("interpolated", config, trained, {"given_images": given.fingerprint})
        found = saved_report(folder, world) or interpolate(config, trained, given, folder)
        if found is not None:
            asked = f"{found['n_pairs']} pairs, {100 * found['strength']:.0f} % forgotten"
            print(f"\n{asked}\n{path_in_words(found)}\n\n{folder / 'interpolated.png'}\n{folder / 'images'}")


if __name__ == "__main__":
    run_script(main, Config, "interpolate", under=settings_of_run)
